"""Whole checkpoints of the original code, in and out: the same numbers, and sentences for the rest."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

import ldmkit
from conftest import save_pickled
from ldmkit import terminal
from ldmkit.assembly import (
    autoencoder_facts,
    diffusion_facts,
    load_autoencoder,
    load_diffusion,
    save_autoencoder,
    save_diffusion,
)
from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder_configs import AutoencoderConfig, CodebookConfig, PreprocessingConfig
from ldmkit.condition_configs import ClassCondition
from ldmkit.conditioning.condition import Condition
from ldmkit.diffusion.schedule import BETAS, build_schedule
from ldmkit.diffusion_configs import DiffusionConfig, ScheduleConfig, UNetConfig
from ldmkit.errors import DataError, UsageError
from ldmkit.facts import DiffusionFacts, Whitening
from ldmkit.interop import ldm_export
from ldmkit.interop.ldm_layout import to_ldm
from ldmkit.interop.ldm_model import ema_name
from ldmkit.interop.ldm_schedule import schedule_buffers, schedule_of
from ldmkit.interop.ldm_unet import OWN, published_as, published_scale, unet_shape, with_heads
from ldmkit.interop.unet_layout import LDM_PREFIX, UNET_LDM, to_foreign_unet
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.modelfile import versions
from ldmkit.named_settings import PRESETS
from ldmkit.networks.unet import UNet

SIZE = 32
STAGE = AutoencoderConfig(
    channels=32, multipliers=(1, 2), residual_blocks=1, codebook=CodebookConfig(size=16)
)
PLAIN: dict[str, Any] = {
    "channels": 32,
    "multipliers": (1, 2),
    "residual_blocks": 1,
    "attention_factors": (2,),
    "heads": 4,
    "norm_groups": 32,
}
TABLE = "cond_stage_model.embedding.weight"


def disturb(model) -> None:
    """Give zeros and ones of a fresh network other values, so that none can be confused."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any() or parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)


def stage_of(bottleneck="kl") -> Autoencoder:
    torch.manual_seed(1)
    model = Autoencoder(STAGE.model_copy(update={"bottleneck": bottleneck}), 3).eval()
    disturb(model)
    if model.codebook is not None:
        model.codebook.codes.data.normal_()
    return model


def classes_of(count: int, way="tokens") -> tuple[ClassCondition, ...]:
    names = tuple(f"kind {number}" for number in range(count))
    return (ClassCondition.model_validate({"names": names, "way": way}),) if count else ()


def table_of(model: LatentDiffusion) -> torch.Tensor:
    """Of its classes; the null last."""
    return model.state_dict()["conditioners.class.embedding.weight"]


def told(*labels: int) -> dict[str, torch.Tensor]:
    return {"class": torch.tensor(labels)[:, None]}


def names_of(model: LatentDiffusion) -> tuple[str, ...]:
    classes = [c for c in model.config.conditions if isinstance(c, ClassCondition)]
    return classes[0].names if classes else ()


def model_of(
    *, classes=0, way="tokens", schedule=None, parameterization="epsilon", **unet
) -> LatentDiffusion:
    torch.manual_seed(2)
    settings = {
        "unet": PLAIN | {"context_channels": 24} | unet,
        "schedule": schedule or {},
        "parameterization": parameterization,
        "latent_channels": 4,
        "conditions": classes_of(classes, way),
    }
    model = LatentDiffusion(DiffusionConfig.model_validate(settings)).eval()
    disturb(model)
    return model.requires_grad_(False)


def linear_tables(start=0.0015, end=0.0195, steps=1000) -> dict[str, torch.Tensor]:
    """As the original code registers them: its "linear", float64 until they are stored."""
    betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    after = torch.cumprod(1.0 - betas, 0)
    return {"betas": betas.float(), "alphas_cumprod": after.float()}


def checkpoint(model: LatentDiffusion, stage: Autoencoder | None) -> dict[str, torch.Tensor]:
    """What the original code saves of such a model, with averages that are half its weights."""
    unet = to_foreign_unet(model.unet, UNET_LDM)
    if model.config.conditions and not model.unet.use_tokens:
        unet["label_emb.weight"] = table_of(model)
    state = {LDM_PREFIX + name: tensor for name, tensor in unet.items()}
    for name, tensor in unet.items():  # LitEma: names of the wrapper's parameters without dots
        state["model_ema." + f"diffusion_model.{name}".replace(".", "")] = tensor * 0.5
    state |= linear_tables() | {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(17, dtype=torch.int32),
        "scale_factor": torch.tensor(0.25),
    }
    if stage is not None:
        own = to_ldm(stage.state_dict(), stage.config)
        state |= {f"first_stage_model.{name}": tensor for name, tensor in own.items()}
    if model.unet.use_tokens:
        state[TABLE] = table_of(model).clone()
    return state


@cache
def usual_checkpoint(classes: int) -> dict[str, torch.Tensor]:
    return checkpoint(model_of(classes=classes), stage_of())


def write(state: dict[str, torch.Tensor], folder: Path, name="model.safetensors") -> Path:
    path = folder / name
    if path.suffix == ".ckpt":
        save_pickled(path, {"state_dict": state, "epoch": 3, "global_step": 9})
    else:
        safetensors.torch.save_file({n: x.contiguous().clone() for n, x in state.items()}, path)
    return path


def bring_in(source: Path, **options) -> Path:
    settings = {"source": source, "out": source.with_suffix(""), "heads": 4} | options
    if "head_channels" in options:
        settings["heads"] = None
    return ldmkit.import_(ldmkit.ImportConfig.model_validate(settings))


def same_unet(mine: LatentDiffusion, other: LatentDiffusion, *, atol=0.0) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 8, 12, generator=generator)
    tokens = None
    if mine.unet.use_tokens:
        width = mine.config.unet.context_channels
        tokens = torch.randn(2, 3, width, generator=generator)
    times = torch.tensor([3.0, 700.0])
    wanted = other.unet(x, times, *Condition(tokens=tokens))
    assert wanted.std() > 0.1  # else everything would agree
    found = mine.unet(x, times, *Condition(tokens=tokens))
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


def halved(model: LatentDiffusion) -> LatentDiffusion:
    """The averages of `checkpoint`."""
    model.unet.load_state_dict({n: x * 0.5 for n, x in model.unet.state_dict().items()})
    return model


# In --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("model.ckpt", "auto"),
        ("model.safetensors", "auto"),
        ("model.safetensors", "ema"),
        ("model.safetensors", "plain"),
    ],
)
def test_a_whole_model_comes_in_as_two_files_that_name_each_other(tmp_path, name, weights):
    source, stage = model_of(), stage_of()
    folder = bring_in(write(checkpoint(source, stage), tmp_path, name), weights=weights, size=64)
    ae, ldm = folder / "autoencoder.safetensors", folder / "diffusion.safetensors"
    assert sorted(folder.iterdir()) == [ae, ldm]
    facts, back = diffusion_facts(ldm), load_diffusion(ldm)
    assert facts.autoencoder == autoencoder_facts(ae).fingerprint
    assert facts.latent_shape == (4, 32, 32)
    assert autoencoder_facts(ae).preprocessing == PreprocessingConfig(size=64)
    assert facts.whitening == Whitening(mean=(0.0,) * 4, std=(4.0,) * 4)  # 1 / 0.25
    assert facts.trained["weights"] == ("plain" if weights == "plain" else "ema")
    assert facts.trained.get("ema_updates") == (None if weights == "plain" else 17)
    assert back.config == source.config.model_copy(
        update={"schedule": ScheduleConfig(kind="scaled-linear")}
    ).model_copy(update={"unet": back.config.unet})
    raw = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(back.whiten(raw), raw * 0.25, rtol=0, atol=0)
    wanted = source if weights == "plain" else halved(source)
    for key, tensor in wanted.unet.state_dict().items():
        assert torch.equal(back.unet.state_dict()[key], tensor), key
    noisy, sigma = torch.randn(1, 4, 8, 8), torch.tensor([2.0])
    clean = back.denoise(noisy, sigma, Condition())
    assert torch.equal(clean, wanted.denoise(noisy, sigma, Condition()))
    for key, tensor in load_autoencoder(ae).state_dict().items():
        assert torch.equal(tensor, stage.state_dict()[key]), key


def test_a_published_table_of_classes_with_its_null(tmp_path, run):
    """ImageNet's 1001 rows: samples of class 7 and of nothing are those of the source."""
    source = model_of(classes=1000)
    path = write(checkpoint(source, stage_of()), tmp_path)
    out = tmp_path / "out"
    done = run("import", path, "--out", out, "--heads", 4, "--size", 32)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().splitlines() == [
        str(out / "autoencoder.safetensors"),
        str(out / "diffusion.safetensors"),
    ]
    back = load_diffusion(out / "diffusion.safetensors")
    assert names_of(back) == tuple(map(str, range(1000)))
    labels, x = told(7, -1), torch.randn(2, 4, 8, 8)
    found = back.denoise(x, torch.ones(2), back.condition(labels))
    wanted = halved(source)
    assert torch.equal(found, wanted.denoise(x, torch.ones(2), wanted.condition(labels)))
    done = run("sample", out / "diffusion.safetensors", "--num", 1, "--steps", 2, "--label", 999,
               "--out", tmp_path / "s.safetensors")  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("rows", "null_class"), [(1000, "auto"), (5, "none")])
def test_a_table_without_null_gets_a_silent_one_and_a_warning(tmp_path, capfd, rows, null_class):
    source = model_of(classes=rows - 1)
    terminal.be_quiet(False)
    folder = bring_in(write(checkpoint(source, stage_of()), tmp_path), null_class=null_class)
    assert "sample it with --guidance 1" in capfd.readouterr().err
    back = load_diffusion(folder / "diffusion.safetensors")
    assert len(names_of(back)) == rows
    assert torch.equal(table_of(back)[:-1], table_of(source))
    assert not table_of(back)[-1].any()


def test_a_table_that_is_added_to_the_time(tmp_path):
    """`label_emb` is part of the U-Net there, and of its averages."""
    source = model_of(classes=4, way="vector")
    path = write(checkpoint(source, stage_of()), tmp_path)
    back = load_diffusion(bring_in(path, null_class="last") / "diffusion.safetensors")
    assert back.config.conditions == (ClassCondition(way="vector", names=tuple("0123")),)
    assert torch.equal(table_of(back), table_of(source) * 0.5)
    x = torch.randn(3, 4, 8, 8)
    found = back.unet(x, torch.full((3,), 9.0), *back.condition(told(0, 3, -1)))
    rows = table_of(source)[[0, 3, 4]] * 0.5
    assert torch.equal(found, halved(source).unet(x, torch.full((3,), 9.0), rows))
    assert (found[0] - found[1]).abs().max() > 0  # it matters at all


CASES = {
    "one-level": {"multipliers": (1,), "attention_factors": ()},
    "three-levels": {"multipliers": (1, 2, 2), "attention_factors": (1, 4), "residual_blocks": 2},
    "middle-only": {"attention_factors": (), "multipliers": (1, 3, 4)},
    "scale-shift": {"scale_shift": True},
    "residual-updown": {"residual_updown": True, "attention_factors": (1,), "scale_shift": True},
    "updown-middle-only": {"residual_updown": True, "attention_factors": ()},
    "head-width": {"heads": None, "head_channels": 16},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
@pytest.mark.parametrize("classes", [0, 3])
def test_the_architecture_is_read_off_names_and_shapes(changes, classes):
    if classes:
        changes = changes | {"transformer_depth": (2,)}
    source = model_of(classes=classes, **changes)
    unet = source.config.unet
    tensors = to_foreign_unet(source.unet, UNET_LDM)
    shape = unet_shape(tensors, "here")
    found = with_heads(shape, unet.heads, unet.head_channels, "here")
    wanted = unet if classes else unet.model_copy(update={"context_channels": 512})
    assert found == wanted
    assert (shape.in_channels, shape.out_channels, shape.use_tokens) == (4, 4, classes > 0)


DIFFUSION_PRESETS = PRESETS["train-diffusion"]
PUBLISHED = [name for name in DIFFUSION_PRESETS if name not in OWN]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_are_known_with_their_heads(name, capfd):
    terminal.be_quiet(False)
    preset = DIFFUSION_PRESETS[name]
    assert preset.use is not None
    config = UNetConfig.model_validate(preset.settings["unet"])
    with torch.device("meta"):
        z, more = preset.use.latents[0], preset.use.concatenated
        model = UNet(
            config, in_channels=z + more, out_channels=z, use_tokens=bool(preset.use.tokens)
        )
    shape = unet_shape(to_foreign_unet(model, UNET_LDM), "here")
    assert name in published_as(shape)
    found = with_heads(shape, None, None, "here")
    assert (found.heads, found.head_channels) == (config.heads, config.head_channels)
    assert "as in the published" in capfd.readouterr().err
    assert published_scale(shape) == (0.18215 if name in ("sd-v1", "txt2img-1p4b") else None)


KINDS = {
    "scaled-linear": {"beta_start": 0.00085, "beta_end": 0.012},
    "linear": {"beta_start": 0.0001, "beta_end": 0.02, "timesteps": 400},
    "cosine": {"timesteps": 300},
    "sigmoid": {},
    "sigmoid-beta": {"beta_start": 0.0001, "beta_end": 0.02},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", ["both", "betas", "alphas_cumprod", "half"])
def test_schedules_are_recognised_exactly(kind, stored):
    config = ScheduleConfig.model_validate({"kind": kind} | KINDS[kind])
    betas = BETAS[kind](config)
    tables = {"betas": betas.float(), "alphas_cumprod": torch.cumprod(1 - betas, 0).float()}
    if stored == "half":
        tables = {name: table.half() for name, table in tables.items()}
    elif stored != "both":
        tables = {stored: tables[stored]}
    assert schedule_of(tables, "here") == config
    assert sorted(KINDS) == sorted(BETAS)


def test_all_tables_are_those_of_the_original_code():
    """Its formulas, from betas on, in float64."""
    config = ScheduleConfig(kind="scaled-linear")
    schedule = build_schedule(config, "epsilon")
    tables = schedule_buffers(schedule)  # pyright: ignore[reportArgumentType]
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    alphas = 1.0 - betas
    after = torch.cumprod(alphas, 0)
    before = torch.cat([torch.ones(1).double(), after[:-1]])
    variance = betas * (1.0 - before) / (1.0 - after)
    wanted = linear_tables() | {
        "alphas_cumprod_prev": before,
        "posterior_variance": variance,
        "posterior_log_variance_clipped": torch.log(variance.clamp(min=1e-20)),
        "posterior_mean_coef1": betas * before.sqrt() / (1.0 - after),
        "posterior_mean_coef2": (1.0 - before) * alphas.sqrt() / (1.0 - after),
        "sqrt_recipm1_alphas_cumprod": (1.0 / after - 1.0).sqrt(),
        "log_one_minus_alphas_cumprod": torch.log(1.0 - after),
    }
    for name, table in wanted.items():
        torch.testing.assert_close(tables[name].double(), table.double(), rtol=1e-5, atol=1e-7)
    assert len(tables) == 12


def test_the_autoencoder_may_lie_elsewhere(tmp_path):
    source, stage = model_of(), stage_of()
    page = PreprocessingConfig(size=48)
    save_autoencoder(tmp_path / "ae.safetensors", stage, page, {})
    for inside in (None, stage):  # not in the checkpoint, and there too
        path = write(checkpoint(source, inside), tmp_path, f"{inside is None}.safetensors")
        folder = bring_in(path, ae=tmp_path / "ae.safetensors")
        assert [file.name for file in folder.iterdir()] == ["diffusion.safetensors"]
        facts = diffusion_facts(folder / "diffusion.safetensors")
        assert facts.autoencoder == autoencoder_facts(tmp_path / "ae.safetensors").fingerprint
        assert facts.latent_shape == (4, 24, 24)
    other = stage_of()
    disturb(other)
    save_autoencoder(tmp_path / "other.safetensors", other, page, {})
    with pytest.raises(DataError, match="made with another autoencoder"):
        bring_in(path, ae=tmp_path / "other.safetensors", out=tmp_path / "x")
    none = write(checkpoint(source, None), tmp_path, "none.safetensors")
    with pytest.raises(UsageError, match=r"holds no autoencoder: give the file of .* --ae FILE"):
        bring_in(none)
    assert not none.with_suffix("").exists()


def test_codes_need_no_scale_and_leftovers_are_named(tmp_path, capfd):
    state = checkpoint(model_of(), stage_of("vq"))
    del state["scale_factor"]
    state |= {
        "first_stage_model.loss.logvar": torch.zeros(()),
        "logvar": torch.zeros(1000),
        "sqrt_alphas_cumprod": torch.ones(1000),
    }
    terminal.be_quiet(False)
    folder = bring_in(write(state, tmp_path))
    said = capfd.readouterr().err
    assert "2 tensors are no part of the two models: first_stage_model.loss, logvar" in said
    assert "(ema weights), heads 4, epsilon, scaled-linear schedule of 1000 steps" in said
    assert diffusion_facts(folder / "diffusion.safetensors").whitening.std == (1.0,) * 4
    assert load_autoencoder(folder / "autoencoder.safetensors").config.bottleneck == "vq"


def test_half_precision_becomes_single(tmp_path):
    source = model_of()
    state = {name: x.half() for name, x in checkpoint(source, stage_of()).items()}
    folder = bring_in(write(state, tmp_path), weights="plain", parameterization="v")
    back = load_diffusion(folder / "diffusion.safetensors")
    assert back.config.schedule == ScheduleConfig(kind="scaled-linear")
    assert back.config.parameterization == "v"
    assert {x.dtype for x in back.state_dict().values()} == {torch.float32}
    same_unet(back, source, atol=0.02)


def test_a_file_name_gives_the_autoencoder_alone(tmp_path):
    path = write(checkpoint(model_of(), stage_of()), tmp_path)
    out = ldmkit.import_(ldmkit.ImportConfig(source=path, out=tmp_path / "ae.safetensors"))
    assert autoencoder_facts(out).factor == 2
    with pytest.raises(UsageError, match=r"--heads means nothing here: --out .* names one file"):
        bring_in(path, out=tmp_path / "b.safetensors")
    only = to_ldm(stage_of().state_dict(), STAGE)
    with pytest.raises(UsageError, match=r"--weights means nothing here: .* holds no whole model"):
        bring_in(write(only, tmp_path, "only.safetensors"), heads=None, weights="ema")


# What is refused --------------------------------------------------------------------------------


class Refusal(NamedTuple):
    change: dict[str, Any]
    """Tensors that are put in; None takes one out."""
    words: str
    options: Mapping[str, Any] = MappingProxyType({})
    classes: int = 0


OUT2 = LDM_PREFIX + "out.2.bias"
MIDDLE = LDM_PREFIX + "middle_block.1.norm.weight"
REFUSALS = {
    "text": Refusal(
        {"cond_stage_model.transformer.token_emb.weight": torch.zeros(3, 2)},
        r"conditioned through cond_stage_model\.transformer\.token_emb\.weight.* not yet; its auto",
    ),
    "second-encoder": Refusal({"conditioner.embedders.0.x": torch.zeros(1)}, "conditioned through"),
    "clip": Refusal(
        {"cond_stage_model.transformer.text_model.x": torch.zeros(1)},
        r"CLIP's text model.* not yet",
    ),
    "classes-twice": Refusal(
        {LDM_PREFIX + "label_emb.weight": torch.zeros(5, 128)},
        "classes in two ways",
        {"weights": "plain"},
        classes=4,
    ),
    "label-emb-width": Refusal(
        {LDM_PREFIX + "label_emb.weight": torch.zeros(5, 24)},
        r"label_emb\.weight has shape \[5, 24\].* of 128",
        {"weights": "plain"},
    ),
    "no-classes": Refusal({}, "--null-class means nothing here.* no table", {"null_class": "none"}),
    "concatenated": Refusal(
        {LDM_PREFIX + "input_blocks.0.0.weight": torch.zeros(32, 7, 3, 3)},
        "takes 7 channels and gives 4",
        {"weights": "plain"},
    ),
    "no-tokens": Refusal({TABLE: torch.zeros(5, 24)}, "attends to no tokens, and the file has"),
    "no-table": Refusal({TABLE: None}, "the file does not say what makes them", classes=4),
    "table-width": Refusal({TABLE: torch.zeros(5, 23)}, r"has shape \[5, 23\].* of 24", classes=4),
    "null-unknown": Refusal({}, "give --null-class last or --null-class none", classes=4),
    "table-nan": Refusal(
        {TABLE: torch.full((5, 24), float("nan"))},
        "embedding.weight holds values that are not finite",
        {"null_class": "last"},
        classes=4,
    ),
    "no-heads": Refusal({}, "give --heads or --head-channels", {"heads": None}),
    "heads-divide": Refusal({}, "3 attention heads do not divide a level of 32", {"heads": 3}),
    "no-schedule": Refusal(
        {"betas": None, "alphas_cumprod": None}, "neither betas nor alphas_cumprod"
    ),
    "unknown-schedule": Refusal(
        {"betas": torch.linspace(0.0015, 0.0195, 1000).sqrt()}, r"table betas \(1000 steps, from"
    ),
    "tables-disagree": Refusal(
        {"alphas_cumprod": linear_tables(end=0.012)["alphas_cumprod"]}, "is none of scaled-linear"
    ),
    "no-table-shape": Refusal({"betas": torch.zeros(())}, r"betas of shape \[\] is no table"),
    "no-scale": Refusal(
        {"scale_factor": None}, "does not say by which factor .* give --scaling-factor"
    ),
    "scale-nan": Refusal(
        {"scale_factor": torch.tensor(-1.0)}, "scale_factor is no positive number"
    ),
    "scale-typed": Refusal({}, "says 0.25; leave it out", {"scaling_factor": 0.5}),
    "ema-missing": Refusal(
        {ema_name("out.2.bias"): None}, "lacks tensor model_ema.diffusion_modelout2bias"
    ),
    "ema-unknown": Refusal({"model_ema.x": torch.zeros(1)}, "has the unknown tensor model_ema.x"),
    "unet-missing": Refusal({OUT2: None}, r"lacks tensor out\.2\.bias", {"weights": "plain"}),
    "unet-unknown": Refusal(
        {LDM_PREFIX + "extra": torch.zeros(1)}, "has the unknown tensor extra", {"weights": "plain"}
    ),
    "unet-nan": Refusal(
        {OUT2: torch.full((4,), float("nan"))}, r"out\.2\.bias holds values", {"weights": "plain"}
    ),
    "no-middle": Refusal(
        {MIDDLE: None}, r"tensor middle_block\.1\.norm\.weight", {"weights": "plain"}
    ),
    "first-missing": Refusal(
        {LDM_PREFIX + "input_blocks.0.0.weight": None},
        r"lacks tensor input_blocks\.0\.0\.weight: it holds no U-Net",
        {"weights": "plain"},
    ),
    "volumes": Refusal(
        {LDM_PREFIX + "input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3, 3)},
        "has 5 dimensions",
        {"weights": "plain"},
    ),
    "groups": Refusal(
        {LDM_PREFIX + "input_blocks.0.0.weight": torch.zeros(24, 4, 3, 3)},
        r"levels of \[32, 64\] channels.* 24, in 32",
        {"weights": "plain"},
    ),
    "irregular": Refusal(
        {LDM_PREFIX + "output_blocks.3.0.in_layers.0.weight": None},
        "not made of levels",
        {"weights": "plain"},
    ),
    "size": Refusal({}, "--size 34 is not a multiple of 4", {"size": 34}),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_expressed_is_named(tmp_path, name):
    refusal = REFUSALS[name]
    state: dict[str, Any] = usual_checkpoint(refusal.classes) | refusal.change
    kept = {key: tensor for key, tensor in state.items() if tensor is not None}
    path = write(kept, tmp_path)
    with pytest.raises((DataError, UsageError), match=refusal.words):
        bring_in(path, **{"out": tmp_path / "out", **refusal.options})
    assert not (tmp_path / "out").exists()


def test_averages_that_are_asked_for_must_be_there(tmp_path):
    state = {n: x for n, x in checkpoint(model_of(), stage_of()).items() if "model_ema" not in n}
    path = write(state, tmp_path)
    with pytest.raises(DataError, match=r"--weights ema: .* holds no averages"):
        bring_in(path, weights="ema")
    folder = bring_in(path)  # auto: the plain weights, and the file says so
    assert diffusion_facts(folder / "diffusion.safetensors").trained["weights"] == "plain"
    with pytest.raises(UsageError, match="exists"):
        bring_in(path)


def test_another_number_of_latent_channels_is_refused(tmp_path):
    stage = Autoencoder(STAGE.model_copy(update={"latent_channels": 3}), 3)
    path = write(checkpoint(model_of(), stage), tmp_path)
    with pytest.raises(DataError, match="for latents of 4 channels, the autoencoder makes 3"):
        bring_in(path)


def test_heads_are_given_once(run, tmp_path):
    done = run("import", tmp_path / "x.safetensors", "--heads", 2, "--head-channels", 3)
    assert done.returncode == 2
    assert b"--heads 2 and --head-channels 3: give one" in done.stderr


# Out -------------------------------------------------------------------------------------------


class Ours(NamedTuple):
    ae: Path
    ldm: Path


def write_ours(folder: Path, *, bottleneck="kl", mean=0.0, std: Any = 2.0, **changes) -> Ours:
    """Both files, as training would leave them."""
    stage, model = stage_of(bottleneck), model_of(**changes)
    ours = Ours(folder / "ae.safetensors", folder / "ldm.safetensors")
    save_autoencoder(ours.ae, stage, PreprocessingConfig(size=SIZE), {})
    means, stds = torch.full((4,), mean), torch.as_tensor(std).expand(4)
    whitening = Whitening(mean=tuple(means.tolist()), std=tuple(stds.tolist()))
    model.set_whitening(whitening)
    facts = DiffusionFacts(
        fingerprint="",
        autoencoder=autoencoder_facts(ours.ae).fingerprint,
        latent_shape=(4, 16, 16),
        whitening=whitening,
        trained={},
        versions=versions(),
    )
    save_diffusion(ours.ldm, model, facts)
    return ours


def send_out(ours: Ours, out: Path, **options) -> Path:
    settings = {"model": ours.ldm, "ae": ours.ae, "to": "ldm", "out": out} | options
    return ldmkit.export(ldmkit.ExportConfig.model_validate(settings))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"classes": 3, "parameterization": "v", "heads": None, "head_channels": 8},
        {"classes": 3, "way": "vector"},
        {"heads": None, "schedule": {"kind": "linear", "beta_start": 0.0001, "beta_end": 0.02}},
        {"parameterization": "x0", "schedule": {"kind": "cosine"}, "bottleneck": "vq"},
    ],
    ids=["plain", "classes", "added-classes", "one-head", "codes"],
)
def test_there_and_back_is_the_same_model(tmp_path, changes):
    """Nothing but paths is typed on the way back: the file says what the layout has no place for."""
    ours = write_ours(tmp_path, **changes)
    file = send_out(ours, tmp_path / "whole.safetensors")
    folder = ldmkit.import_(ldmkit.ImportConfig(source=file, out=tmp_path / "back"))
    source, back = load_diffusion(ours.ldm), load_diffusion(folder / "diffusion.safetensors")
    theirs, facts = diffusion_facts(ours.ldm), diffusion_facts(folder / "diffusion.safetensors")
    assert facts.autoencoder == theirs.autoencoder
    assert facts.latent_shape == theirs.latent_shape
    assert back.config.conditions == source.config.conditions
    assert facts.whitening == theirs.whitening
    assert facts.fingerprint == theirs.fingerprint
    assert back.config.parameterization == source.config.parameterization
    with safe_open(file, framework="pt") as opened:
        assert not any("model_ema" in name for name in opened.keys())  # noqa: SIM118


@pytest.mark.parametrize("bottleneck", ["kl", "deterministic", "vq"])
def test_whitening_by_channel_goes_into_the_autoencoder(tmp_path, bottleneck):
    std = 3.0 if bottleneck == "vq" else torch.tensor([0.5, 1.0, 2.0, 7.0])
    ours = write_ours(tmp_path, bottleneck=bottleneck, mean=0.7, std=std)
    folder = ldmkit.import_(
        ldmkit.ImportConfig(source=send_out(ours, tmp_path / "w.safetensors"), out=tmp_path / "b")
    )
    source, back = load_diffusion(ours.ldm), load_diffusion(folder / "diffusion.safetensors")
    stage = load_autoencoder(ours.ae)
    other = load_autoencoder(folder / "autoencoder.safetensors")
    assert back.latent_std.tolist() == [1.0] * 4
    pictures = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5)) * 2 - 1
    mine, theirs = stage.encode(pictures), other.encode(pictures)
    torch.testing.assert_close(
        back.whiten(theirs.mean), source.whiten(mine.mean), rtol=0, atol=1e-5
    )
    if bottleneck == "kl":
        assert mine.std is not None
        scaled = mine.std / source.latent_std.view(-1, 1, 1)
        torch.testing.assert_close(theirs.std, scaled, rtol=1e-5, atol=1e-5)
    whitened = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(6))
    found, wanted = other.decode(back.unwhiten(whitened)), stage.decode(source.unwhiten(whitened))
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    same_unet(back, source)


def test_the_page_of_a_model_with_added_classes(tmp_path):
    send_out(write_ours(tmp_path, classes=3, way="vector"), tmp_path / "whole.safetensors")
    page = (tmp_path / "whole.yaml").read_text()
    assert (
        "    conditioning_key: adm\n    cond_stage_config:\n      target: torch.nn.Identity\n"
        in page
    )
    assert "        num_classes: 4\n" in page
    assert "context_dim" not in page


def test_the_page_beside_is_what_the_original_code_reads(tmp_path, run):
    ours = write_ours(tmp_path, classes=3, std=4.0)
    out = tmp_path / "whole.safetensors"
    done = run("export", ours.ldm, "--ae", ours.ae, "--to", "ldm", "--out", out)
    assert (done.returncode, done.stdout) == (0, f"{out}\n".encode()), done.stderr
    page = (tmp_path / "whole.yaml").read_text()
    for line in (
        "    beta_schedule: linear\n    linear_start: 0.0015\n    linear_end: 0.0195",
        "    scale_factor: 0.25",
        "    use_ema: false",
        "    conditioning_key: crossattn",
        "        n_classes: 4",
        "        channel_mult: [1, 2]",
        "        attention_resolutions: [2]",
        "        num_heads: 4",
        "        context_dim: 24",
        "    first_stage_config:\n      target: ldm.models.autoencoder.AutoencoderKL\n      params:",
        "          ch_mult: [1, 2]",
    ):
        assert f"{line}\n" in page, line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parameterization": "flow"}, "no word for the parameterization flow"),
        ({"schedule": {"kind": "sigmoid"}}, "no word for the schedule sigmoid"),
        (
            {"parameterization": "v", "schedule": {"zero_terminal_snr": True}},
            "no word for zero terminal SNR",
        ),
        ({"qk_norm": True}, "no word for qk_norm"),
        ({"norm_groups": 8}, "normalises in 32 groups"),
        ({"bottleneck": "vq", "std": torch.tensor([1.0, 2.0, 1.0, 1.0])}, "has a codebook"),
    ],
)
def test_what_the_layout_cannot_say_is_named(tmp_path, changes, words):
    ours, out = write_ours(tmp_path, **changes), tmp_path / "w.safetensors"
    with pytest.raises(DataError, match=words):
        send_out(ours, out)
    assert not out.exists()
    assert not out.with_suffix(".yaml").exists()


def test_options_that_do_not_go_with_whole_models(tmp_path):
    ours = write_ours(tmp_path)
    for options, words in (
        ({"ae": None}, "give the autoencoder of its latents with --ae FILE"),
        ({"model": ours.ae}, "--ae goes with a diffusion model"),
        ({"out": tmp_path / "folder"}, r"name it \*\.safetensors"),
        ({"latents": tmp_path}, "has its own whitening"),
    ):
        with pytest.raises(UsageError, match=words):
            send_out(ours, **{"out": tmp_path / "w.safetensors", **options})
    other = stage_of()
    disturb(other)
    save_autoencoder(tmp_path / "other.safetensors", other, PreprocessingConfig(size=SIZE), {})
    with pytest.raises(DataError, match="another autoencoder"):
        send_out(Ours(tmp_path / "other.safetensors", ours.ldm), tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", ["out.2.bias", "first_stage_model.decoder.conv_out.bias"])
def test_an_export_that_differs_leaves_nothing(tmp_path, monkeypatch, name):
    proper = ldm_export.whole_tensors

    def wrong(*arguments):
        tensors = proper(*arguments)
        key = name if name in tensors else LDM_PREFIX + name
        return tensors | {key: tensors[key] + 0.01}

    monkeypatch.setattr(ldm_export, "whole_tensors", wrong)
    with pytest.raises(DataError, match="differs from the model"):
        send_out(write_ours(tmp_path), tmp_path / "w.safetensors")
    assert {file.name for file in tmp_path.iterdir()} == {"ae.safetensors", "ldm.safetensors"}
