"""Named settings: the demo's, the paper's published ones with their sources, and today's.

Those of the first stage are here, those of the second in `diffusion_presets`.

A preset is a partial config; what it does not name keeps the default, and what the user types wins.
"LDM" below is the code published with the paper (CompVis/latent-diffusion, a506df5), "paper" is
Rombach et al. 2022. Published learning rates are 4.5e-6 x batch.
"""

from typing import Any

from ldmkit.diffusion_presets import DIFFUSION_MODELS, Preset, Settings


def _tiny(multipliers: list[int], latent_channels: int, **autoencoder: Any) -> Settings:  # noqa: ANN401
    """64 px pictures in minutes on two CPU cores."""
    return {
        "steps": 700,
        "batch_size": 8,
        "lr": 1e-3,
        "betas": [0.9, 0.99],
        "warmup": 50,
        "cooldown": 350,
        "holdout": 0.05,
        "precision": "auto",
        "log_every": 25,
        "sample_every": 175,
        "save_every": 175,
        "preprocessing": {"size": 64, "flip": True},
        "autoencoder": {
            "channels": 32,
            "multipliers": multipliers,
            "residual_blocks": 1,
            "norm_groups": 8,
            "latent_channels": latent_channels,
            **autoencoder,
        },
        "loss": {"kl_weight": 0.02},
        "disc": {"start": "80%", "warmup": 20, "ramp": 60, "channels": 32, "layers": 2},
    }


def _published(
    batch_size: int, steps: int, autoencoder: Settings, disc: Settings | None = None
) -> Settings:
    """What the published first stages have in common: 256 px, Adam (0.5, 0.9), 4.5e-6 x batch."""
    return {
        "steps": steps,
        "batch_size": batch_size,
        "lr": 4.5e-6 * batch_size,
        "save_every": 5_000,
        "preprocessing": {"size": 256, "crop": "random"},
        "autoencoder": autoencoder,
        "loss": {"perceptual": "lpips-vgg"},
        "disc": disc or {},
    }


def _kl(
    batch_size: int, steps: int, latent_channels: int, multipliers: list[int], *attention: int
) -> Settings:
    return _published(
        batch_size,
        steps,
        {
            "multipliers": multipliers,
            "attention_factors": list(attention),
            "latent_channels": latent_channels,
        },
    )


def _vq(
    batch_size: int,
    steps: int,
    codebook: tuple[int, int],
    multipliers: list[int],
    disc: Settings,
    *attention: int,
) -> Settings:
    """A codebook of (codes, channels); the paper's has neither k-means nor restarts."""
    size, latent_channels = codebook
    return _published(
        batch_size,
        steps,
        {
            "bottleneck": "vq",
            "multipliers": multipliers,
            "attention_factors": list(attention),
            "latent_channels": latent_channels,
            "codebook": {"size": size, "kmeans_start": False},
        },
        disc,
    )


def _modern(latent_channels: int) -> Settings:
    """The published f8 with what has proved itself since: averaged weights, clipping, a safe start."""
    return {
        "steps": 200_000,
        "batch_size": 16,
        "lr": 1e-4,
        "warmup": 1_000,
        "cooldown": 50_000,
        "ema_decay": 0.999,
        "clip_norm": 1.0,
        "save_every": 5_000,
        "preprocessing": {"size": 256, "crop": "random"},
        "autoencoder": {"multipliers": [1, 2, 4, 4], "latent_channels": latent_channels},
        "disc": {"start": "40%", "norm": "group"},
    }


def _without_attention(settings: Settings) -> Settings:
    return {**settings, "autoencoder": {**settings["autoencoder"], "middle_attention": False}}


def _at_once(weight: float, start: int = 0, layers: int = 3) -> Settings:
    """The adversary of models that were published with one from the start on."""
    return {"start": str(start), "weight": weight, "layers": layers, "warmup": 0, "ramp": 0}


_LATE: Settings = {"start": "250001", "weight": 0.75}
_LDM = "LDM models/first_stage_models/{0}/config.yaml; README: {1} steps"
_PAPER = "paper Tab. 8; training as its neighbours in LDM (the paper does not say)"
F2, F4, F8_KL, F8 = [1, 2], [1, 2, 4], [1, 2, 4, 4], [1, 2, 2, 4]
F16, F32 = [1, 1, 2, 2, 4], [1, 1, 2, 2, 4, 4]

AUTOENCODERS: dict[str, Preset] = {
    "tiny": Preset(_tiny([1, 2, 4], 4), "the demo's: 64 px, factor 4"),
    "tiny-kl-f2": Preset(_tiny([1, 2], 2), "the demo's at factor 2"),
    "tiny-kl-f8": Preset(_tiny([1, 2, 4, 4], 4), "the demo's at factor 8"),
    "tiny-vq-f4": Preset(
        _tiny(
            [1, 2, 4],
            4,
            bottleneck="vq",
            codebook={"size": 512, "ema_decay": 0.99, "restart_after": 50},
        ),
        "the demo's with a codebook",
    ),
    "identity": Preset(
        {"autoencoder": {"bottleneck": "identity"}, "preprocessing": {"size": 256}},
        "paper Sec. 4.1, LDM-1: diffusion on pixels",
    ),
    "kl-f4": Preset(_kl(10, 176_991, 3, F4), _LDM.format("kl-f4", 176991)),
    "kl-f8": Preset(_kl(4, 246_803, 4, F8_KL), _LDM.format("kl-f8", 246803)),
    "kl-f16": Preset(_kl(6, 442_998, 16, F16, 16), _LDM.format("kl-f16", 442998)),
    "kl-f32": Preset(_kl(6, 406_763, 64, F32, 16, 32), _LDM.format("kl-f32", 406763)),
    "vq-f4": Preset(_vq(8, 533_066, (8192, 3), F4, _at_once(0.75)), _LDM.format("vq-f4", 533066)),
    "vq-f4-noattn": Preset(
        _without_attention(_vq(8, 658_131, (8192, 3), F4, _at_once(0.75, start=11))),
        _LDM.format("vq-f4-noattn", 658131),
    ),
    "vq-f8": Preset(
        _vq(10, 971_043, (16384, 4), F8, _at_once(0.6, start=1, layers=2), 8),
        _LDM.format("vq-f8", 971043),
    ),
    "vq-f8-n256": Preset(
        _vq(10, 1_608_649, (256, 4), F8, _LATE, 8),
        _LDM.format("vq-f8-n256", 1608649),
    ),
    "vq-f16": Preset(
        _vq(14, 1_101_166, (16384, 8), F16, {**_LATE, "layers": 2}, 16),
        _LDM.format("vq-f16", 1101166),
    ),
    "kl-f2": Preset(_kl(10, 176_991, 2, F2), _PAPER),
    "vq-f2": Preset(_vq(8, 533_066, (2048, 2), F2, _at_once(0.75)), _PAPER),
    "vq-f2-n64": Preset(_vq(8, 533_066, (64, 2), F2, _at_once(0.75)), _PAPER),
    "vq-f4-n256": Preset(_vq(8, 533_066, (256, 3), F4, _at_once(0.75)), _PAPER),
    "vq-f32": Preset(_vq(14, 1_101_166, (16384, 16), F32, _LATE, 16, 32), _PAPER),
    "kl-f16-d8": Preset(_kl(6, 442_998, 8, F16, 16), _PAPER),
    "kl-f32-d16": Preset(_kl(6, 406_763, 16, F32, 16, 32), _PAPER),
    "sd-f8": Preset(_modern(4), "Stable Diffusion 1's autoencoder, trained with averaged weights"),
    "f8-d16": Preset(_modern(16), "the same with the 16 channels of Stable Diffusion 3's"),
}

PRESETS: dict[str, dict[str, Preset]] = {
    "train-ae": AUTOENCODERS,
    "train-diffusion": DIFFUSION_MODELS,
}
"""Command -> name -> preset."""
