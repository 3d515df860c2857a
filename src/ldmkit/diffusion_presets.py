"""Named settings of the second stage: the demo's, the paper's whole table, and sizes for people.

"LDM" is the code published with the paper (CompVis/latent-diffusion, a506df5), "SD" that of Stable
Diffusion 1 (CompVis/stable-diffusion, 21f890f), "paper" Rombach et al. 2022. The number behind a
colon is what the paper calls the size of the model. Learning rates are those after the code's
scaling by the batch.
"""

from typing import Any, NamedTuple

Settings = dict[str, Any]


class Use(NamedTuple):
    """What the network of a diffusion preset was published for; at training time the data say it."""

    latents: tuple[int, int, int]
    """Channels, height, width."""
    concatenated: int = 0
    """Further channels beside the latents: of a low-resolution picture, a label map, a mask."""
    tokens: str = ""
    """What is attended to; "" for none."""
    published: int | None = None
    """Parameters as published."""
    beside: int = 0
    """Of these, parameters outside the U-Net."""
    counted: str = ""
    """What those are."""


class Preset(NamedTuple):
    """Named settings and where they come from."""

    settings: Settings
    source: str
    use: Use | None = None
    """Of a diffusion preset made for latents of one kind."""


F4, F8 = (3, 64, 64), (4, 32, 32)
FINE, COARSE = [1, 2, 4], [2, 4, 8]
"""Attention at maps of 32, 16 and 8 cells: the factors of 32 x 32 latents and of 64 x 64 latents."""


L1: Settings = {"loss": "l1"}
UNGUIDED: Settings = {"condition_dropout": 0.0, "preview_guidance": 1.0}
"""Published without training for guidance."""
CAPTIONS: Settings = {"condition": "text", "text": {"depth": 32}}


def _schedule(beta_end: float, beta_start: float = 0.0015) -> Settings:
    return {"timesteps": 1000, "beta_start": beta_start, "beta_end": beta_end}


def _trained(
    batch_size: int,
    steps: int | None,
    lr: float,
    unet: Settings,
    schedule: Settings,
    **more: Any,  # noqa: ANN401
) -> Settings:
    """What all have in common. `steps` None: the source does not say, and the default stays."""
    known = {} if steps is None else {"steps": steps}
    return {
        **known,
        "batch_size": batch_size,
        "lr": lr,
        "save_every": 5_000,
        "unet": unet,
        "schedule": schedule,
        **more,
    }


def _faces(batch_size: int, steps: int, lr: float) -> Settings:
    """The unconditional models on vq-f4 latents."""
    unet = {
        "channels": 224,
        "multipliers": [1, 2, 3, 4],
        "attention_factors": COARSE,
        "head_channels": 32,
    }
    return _trained(batch_size, steps, lr, unet, _schedule(0.0195), condition="none")


TINY: Settings = {
    # The demo: 16 x 16 latents, minutes on two CPU cores. v, and the schedule of the paper's
    # text-to-image model, because they learn layouts in so few steps (docs/log.md).
    "steps": 2600,
    "batch_size": 16,
    "lr": 1e-3,
    "warmup": 100,
    "cooldown": 900,
    "parameterization": "v",
    "schedule": {"beta_start": 0.00085, "beta_end": 0.012},
    "precision": "auto",
    "log_every": 50,
    "sample_every": 650,
    "save_every": 650,
    "unet": {
        "channels": 64,
        "multipliers": [1, 2, 2],
        "residual_blocks": 1,
        "attention_factors": [4],
        "head_channels": 32,
        "norm_groups": 16,
        "context_channels": 128,
    },
}


def _sized(channels: int, attention: list[int], batch_size: int) -> Settings:
    """A network for a machine: everything in it can be exported to diffusers."""
    return {
        "steps": 200_000,
        "batch_size": batch_size,
        "lr": 1e-4,
        "warmup": 1_000,
        "cooldown": 50_000,
        "parameterization": "v",
        "schedule": {"beta_start": 0.00085, "beta_end": 0.012},
        "save_every": 5_000,
        "unet": {
            "channels": channels,
            "multipliers": [1, 2, 4],
            "attention_factors": attention,
            "head_channels": 32,
            "context_channels": 512,
        },
    }


CHURCHES: Settings = {
    "channels": 192,
    "multipliers": [1, 2, 2, 4, 4],
    "attention_factors": [1, 2, 4, 8],
    "heads": 8,
    "scale_shift": True,
    "residual_updown": True,
}
IMAGENET_8: Settings = {
    "channels": 256,
    "multipliers": [1, 2, 4],
    "attention_factors": FINE,
    "head_channels": 32,
    "context_channels": 512,
}
IMAGENET_4: Settings = {
    "channels": 192,
    "multipliers": [1, 2, 3, 5],
    "attention_factors": COARSE,
    "context_channels": 512,
}
TEXT_1P4B: Settings = {
    "channels": 320,
    "multipliers": [1, 2, 4, 4],
    "attention_factors": FINE,
    "heads": 8,
    "context_channels": 1280,
}
OPENIMAGES: Settings = {
    "channels": 128,
    "multipliers": [1, 2, 3, 4],
    "attention_factors": COARSE,
    "head_channels": 32,
    "transformer_depth": [3],
    "context_channels": 512,
}
COCO: Settings = {
    "channels": 192,
    "multipliers": [1, 2, 4],
    "attention_factors": FINE,
    "transformer_depth": [2],
    "context_channels": 512,
    "dropout": 0.1,
}
SEMANTIC: Settings = {
    # the code names factors 8, 16 and 32, which three levels do not have: the middle alone attends
    "channels": 128,
    "multipliers": [1, 4, 8],
    "attention_factors": [],
    "heads": 8,
}
SUPER_RESOLUTION: Settings = {
    # the code names factors 8 and 16, and four levels have no 16
    "channels": 160,
    "multipliers": [1, 2, 2, 4],
    "attention_factors": [8],
    "head_channels": 32,
}
INPAINTING: Settings = {
    "channels": 256,
    "multipliers": [1, 2, 3, 4],
    "attention_factors": COARSE,
    "heads": 8,
    "residual_updown": True,
}
LABEL, BOXES, TEXT = "class label", "boxes", "text"
_CONFIG = "LDM models/ldm/{0}/config.yaml; paper {1}"
_TEXT_MODEL = "the text transformer, 32 layers of 1280, with its unused output layer"
_BOX_MODEL = "the box transformer, 16 layers of 512, with its unused output layer"
_BOX_MODEL_8 = (
    "a box transformer of 8 layers of 512, which is inferred: with Tab. 17's 16 it were 371M"
)

DIFFUSION_MODELS: dict[str, Preset] = {
    "tiny": Preset(TINY, "the demo's: 16 x 16 latents", Use((4, 16, 16), tokens=LABEL)),
    "s": Preset(
        _sized(128, [2, 4], 32),
        "own, for 8 GB (6.5 by --dry-run): batch 32 on f8 latents",
        Use(F8, tokens=LABEL),
    ),
    "b": Preset(
        _sized(192, [2, 4], 48),
        "own, for 16 GB (14.5 by --dry-run): batch 48 on f8 latents",
        Use(F8, tokens=LABEL),
    ),
    "l": Preset(
        _sized(256, FINE, 32),
        "own, for 40 GB (33.5 by --dry-run): batch 32 on f8 latents",
        Use(F8, tokens=LABEL),
    ),
    "ldm-4-celeba": Preset(
        _faces(48, 410_000, 9.6e-5),
        _CONFIG.format("celeba256", "Tab. 12: 274M"),
        Use(F4, published=274_000_000),
    ),
    "ldm-4-ffhq": Preset(
        _faces(42, 635_000, 8.4e-5),
        _CONFIG.format("ffhq256", "Tab. 12: 274M"),
        Use(F4, published=274_000_000),
    ),
    "ldm-4-bedrooms": Preset(
        _faces(48, 1_900_000, 9.6e-5),
        _CONFIG.format("lsun_beds256", "Tab. 12: 274M"),
        Use(F4, published=274_000_000),
    ),
    "ldm-8-churches": Preset(
        _trained(
            *(96, 500_000, 5e-5, CHURCHES, _schedule(0.0155)),
            objective=L1,
            condition="none",
            warmup=10_000,
        ),
        _CONFIG.format("lsun_churches256", "Tab. 12: 294M"),
        Use(F8, published=294_000_000),
    ),
    "ldm-8-imagenet": Preset(
        _trained(
            *(64, 2_900_000, 6.4e-5, IMAGENET_8, _schedule(0.0195)),
            condition="class",
            **UNGUIDED,
        ),
        _CONFIG.format("cin256", "Tab. 13 and 18: 395M"),
        Use(F8, tokens=LABEL, published=395_000_000, beside=512_000, counted="the class table"),
    ),
    "ldm-4-imagenet": Preset(
        _trained(1200, 178_000, 1e-4, IMAGENET_4, _schedule(0.0195), condition="class"),
        "LDM configs/latent-diffusion/cin256-v2.yaml; paper Tab. 15 (there 395M) and 18: 400M",
        Use(F4, tokens=LABEL, published=400_000_000, beside=512_512, counted="the class table"),
    ),
    "txt2img-1p4b": Preset(
        _trained(*(680, 390_000, 1e-4, TEXT_1P4B, _schedule(0.012, 0.00085)), **CAPTIONS),
        "LDM configs/latent-diffusion/txt2img-1p4B-eval.yaml; paper Tab. 15: 1.45B",
        Use(F8, tokens=TEXT, published=1_450_000_000, beside=581_994_042, counted=_TEXT_MODEL),
    ),
    "text2img-256": Preset(
        _trained(
            *(28, None, 5.6e-5),
            {**IMAGENET_4, "head_channels": 32, "context_channels": 640},
            _schedule(0.0195),
            **CAPTIONS,
        ),
        "LDM models/ldm/text2img256/config.yaml; neither steps nor size are published",
        Use(F4, tokens=TEXT),
    ),
    "layout-openimages": Preset(
        _trained(
            *(24, 4_400_000, 4.8e-5, OPENIMAGES, _schedule(0.0205)),
            objective=L1,
            condition="layout",
            layout={"depth": 16},
            **UNGUIDED,
        ),
        _CONFIG.format("layout2img-openimages256", "Tab. 15: 306M"),
        Use(F4, tokens=BOXES, published=306_000_000, beside=58_858_496, counted=_BOX_MODEL),
    ),
    "layout-coco": Preset(
        _trained(
            *(48, 170_000, 4.8e-5, COCO, _schedule(0.0205)),
            objective=L1,
            condition="layout",
            layout={"depth": 8},
            **UNGUIDED,
        ),
        "paper Tab. 15: 345M; schedule and loss as layout-openimages (the paper does not say)",
        Use(F8, tokens=BOXES, published=345_000_000, beside=33_651_712, counted=_BOX_MODEL_8),
    ),
    "semantic-256": Preset(
        _trained(
            *(48, 360_000, 4.8e-5, SEMANTIC, _schedule(0.0205)),
            objective=L1,
            condition="labelmap",
            **UNGUIDED,
        ),
        _CONFIG.format("semantic_synthesis256", "Tab. 15 (there on f8 latents): 215M"),
        Use(F4, concatenated=3, published=215_000_000, beside=546, counted="the map's projection"),
    ),
    "bsr-sr": Preset(
        _trained(
            *(64, 860_000, 6.4e-5, SUPER_RESOLUTION, _schedule(0.0155)),
            condition="lowres",
            **UNGUIDED,
        ),
        _CONFIG.format("bsr_sr", "Tab. 15: 169M"),
        Use(F4, concatenated=3, published=169_000_000, beside=55_322_782, counted="vq-f4"),
    ),
    "inpainting-big": Preset(
        _trained(
            *(128, 360_000, 1e-6, INPAINTING, _schedule(0.0205)),
            objective=L1,
            warmup=1_000,
            condition="mask",
            **UNGUIDED,
        ),
        _CONFIG.format(
            "inpainting_big", "Sec. 4.5: 387M; batch, steps and rate of the small one in Tab. 15"
        ),
        Use(F4, concatenated=4, published=387_000_000),
    ),
    "sd-v1": Preset(
        _trained(
            *(2048, 431_000, 1e-4),
            {**TEXT_1P4B, "context_channels": 768},
            _schedule(0.012, 0.00085),
            warmup=10_000,
        ),
        "SD configs/stable-diffusion/v1-inference.yaml; model card, v1-1: 860M",
        Use((4, 64, 64), tokens=TEXT, published=860_000_000),
    ),
}
