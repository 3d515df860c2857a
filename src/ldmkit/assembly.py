"""From a config or a model file to live objects, and back: the one place that knows both stages."""

from pathlib import Path
from typing import Any, TypeVar

import torch

from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder_configs import AutoencoderConfig, PreprocessingConfig
from ldmkit.condition_configs import ConditionConfig
from ldmkit.conditioning.kinds import KINDS
from ldmkit.configs import TrainDiffusionConfig
from ldmkit.container import read_header
from ldmkit.data.latent_set import LatentSet
from ldmkit.diffusion_configs import DiffusionConfig
from ldmkit.errors import DataError
from ldmkit.facts import AutoencoderFacts, Depth, DiffusionFacts, validated
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.modelfile import load, require_tensors, save, versions
from ldmkit.networks.blocks import Norm
from ldmkit.networks.inference import compute_in_bfloat16, remember_contexts
from ldmkit.precision_configs import Precision
from ldmkit.terminal import say
from ldmkit.training.runtime import in_bfloat16

AnyModel = TypeVar("AnyModel", Autoencoder, LatentDiffusion)


def build_autoencoder(config: AutoencoderConfig, preprocessing: PreprocessingConfig) -> Autoencoder:
    """An autoencoder for such pictures, with fresh weights from the global random generator."""
    if config.bottleneck != "identity":
        _warn_of_lone_channels(config.channels, config.norm_groups, "--autoencoder.norm-groups")
    return Autoencoder(config, preprocessing.channels)


def save_autoencoder(
    path: Path,
    model: Autoencoder,
    preprocessing: PreprocessingConfig,
    trained: dict[str, Any],
    *,
    depth: Depth = "uint8",
    decodes: tuple[str, ...] = (),
) -> None:
    """Write an autoencoder's model file.

    Args:
        path: where.
        model: its weights and config.
        preprocessing: what its pictures went through.
        trained: on what, how long, and how good it is.
        depth: number format of its pictures.
        decodes: fingerprints of further autoencoders whose latents it decodes.
    """
    facts = AutoencoderFacts(
        fingerprint="",
        image_channels=model.image_channels,
        factor=model.config.factor,
        latent_channels=model.latent_channels,
        preprocessing=preprocessing,
        decodes=decodes,
        depth=depth,
        trained=trained,
        versions=versions(),
    )
    save(
        path,
        model.state_dict(),
        kind="autoencoder",
        config=model.config.model_dump(mode="json"),
        facts=facts.model_dump(mode="json"),
    )


def load_autoencoder(
    path: Path | str, device: torch.device | str = "cpu", precision: Precision = "fp32"
) -> Autoencoder:
    """The autoencoder of a model file, ready to encode and decode (evaluation mode, no gradients).

    Pictures and latents go in and come out in float32 whatever the precision.

    Raises:
        DataError: the file is missing, damaged, or no autoencoder.
    """
    header, tensors = load(Path(path), kind="autoencoder")
    config = validated(AutoencoderConfig, header.config, str(path))
    facts = validated(AutoencoderFacts, header.facts, str(path))
    model = Autoencoder(config, facts.image_channels)
    require_tensors(model.state_dict(), tensors, str(path))
    model.load_state_dict(tensors)
    return ready(model.to(device), precision)


def init_autoencoder(model: Autoencoder, path: Path) -> list[str]:
    """Begin with the weights of an autoencoder file, as far as names and shapes agree.

    Returns:
        The names of tensors that the model has and the file does not give.

    Raises:
        DataError: the file is missing, damaged, no autoencoder, or gives nothing.
    """
    _, found = load(path, kind="autoencoder")
    own = model.state_dict()
    fitting = {name: x for name, x in found.items() if name in own and x.shape == own[name].shape}
    if not fitting:
        raise DataError(f"{path} has no tensor in common with the autoencoder asked for")
    model.load_state_dict(fitting, strict=False)
    return sorted(own.keys() - fitting.keys())


def autoencoder_facts(path: Path) -> AutoencoderFacts:
    """What an autoencoder file says of itself, from its header alone."""
    return validated(AutoencoderFacts, read_header(path).facts, str(path))


def precision_for(facts: AutoencoderFacts, precision: Precision) -> Precision:
    """What `auto` leaves open for pictures of this autoencoder: more than 8 bits need float32."""
    return "fp32" if precision == "auto" and facts.depth != "uint8" else precision


def preprocessing_of(facts: AutoencoderFacts, size: int | None) -> PreprocessingConfig:
    """The autoencoder's own preprocessing without randomness: centre crop, no flip.

    Args:
        facts: of the autoencoder.
        size: of the pictures, pixels; None for the size that it was trained with.

    Raises:
        DataError: the size is not a multiple of the autoencoder's factor.
    """
    size = size or facts.preprocessing.size
    if size % facts.factor:
        raise DataError(
            f"--size {size} is not a multiple of the autoencoder's factor {facts.factor}"
        )
    return facts.preprocessing.model_copy(update={"size": size, "crop": "center", "flip": False})


def diffusion_config(config: TrainDiffusionConfig, latents: LatentSet) -> DiffusionConfig:
    """The model's config for this data: latent channels, and what it is told.

    Raises:
        DataError: the latents do not hold a condition that is asked for, or are too small for the
            network's levels.
    """
    shrink = 2 ** (len(config.unet.multipliers) - 1)
    odd = [shape for shape in latents.shapes if any(side % shrink for side in shape[1:])]
    if odd:
        raise DataError(
            f"latents of {odd[0][1:]} cannot be halved {len(config.unet.multipliers) - 1} "
            "times: take fewer --unet.multipliers, or another picture size"
        )
    return DiffusionConfig(
        unet=config.unet,
        schedule=config.schedule,
        parameterization=config.parameterization,
        latent_channels=latents.manifest.latent_shape[0],
        conditions=conditions_of(config, latents),
    )


def conditions_of(config: TrainDiffusionConfig, latents: LatentSet) -> tuple[ConditionConfig, ...]:
    """What a model is told that is trained on these latents.

    Raises:
        DataError: the latents do not hold it.
    """
    kinds = config.condition
    if kinds == ("auto",):
        kinds = ("class",) if latents.has_labels else ()
    found = []
    for kind in kinds:
        if kind != "none":
            found.append(KINDS[kind].settle(config.options_of(kind), latents))
    return tuple(found)


def build_diffusion(config: DiffusionConfig) -> LatentDiffusion:
    """A diffusion model with fresh weights from the global random generator."""
    unet = config.unet
    if unet.norm == "group":
        _warn_of_lone_channels(unet.channels, unet.norm_groups, "--unet.norm-groups")
    if set(unet.attention_factors) <= set(unet.missing_factors):
        middle = f"only the middle, at factor {unet.factors[-1]},"
        where = middle if unet.middle_attention else "nothing"
        say(
            f"warning: --unet.attention-factors names no level, so {where} has attention; the "
            f"levels have factors {', '.join(map(str, unet.factors))}"
        )
    return LatentDiffusion(config)


def save_diffusion(path: Path, model: LatentDiffusion, facts: DiffusionFacts) -> None:
    """Write a diffusion model's file; the fingerprint in `facts` is filled in."""
    save(
        path,
        model.state_dict(),
        kind="diffusion",
        config=model.config.model_dump(mode="json"),
        facts=facts.model_dump(mode="json"),
    )


def load_diffusion(
    path: Path | str, device: torch.device | str = "cpu", precision: Precision = "fp32"
) -> LatentDiffusion:
    """The diffusion model of a file, ready to denoise (evaluation mode, no gradients).

    Latents go in and come out in float32 whatever the precision, which is that of the U-Net.

    Raises:
        DataError: the file is missing, damaged, or no diffusion model.
    """
    header, tensors = load(Path(path), kind="diffusion")
    model = LatentDiffusion(validated(DiffusionConfig, header.config, str(path)))
    require_tensors(model.state_dict(), tensors, str(path))
    model.load_state_dict(tensors)
    return ready(model.to(device), precision)


def ready(model: AnyModel, precision: Precision) -> AnyModel:
    """A model where it is to be run, from now on without learning: evaluation mode, in that precision.

    Args:
        model: its weights do not change any more.
        precision: of an autoencoder's networks, or of the U-Net.
    """
    model.eval().requires_grad_(False)
    if isinstance(model, Autoencoder):
        networks = (model.encoder, model.to_moments, model.from_latents, model.decoder)
        device = model.device
    else:
        networks, device = (model.unet,), model.latent_mean.device
    for network in networks:
        if in_bfloat16(device, precision):
            compute_in_bfloat16(network)
        remember_contexts(network)
    return model


def diffusion_facts(path: Path) -> DiffusionFacts:
    """What a diffusion model file says of itself, from its header alone."""
    return validated(DiffusionFacts, read_header(path).facts, str(path))


def require_same_autoencoder(wanted: str, path: Path, what: str) -> None:
    """Check that `path` holds the autoencoder of that fingerprint, or one with its latents.

    Raises:
        DataError: it is another one; the message names both.
    """
    facts = autoencoder_facts(path)
    if wanted not in (facts.fingerprint, *facts.decodes):
        raise DataError(
            f"{what} were made with another autoencoder ({wanted[:12]}) than {path} "
            f"({facts.fingerprint[:12]}); give the one they were made with"
        )


def _warn_of_lone_channels(channels: int, groups: int, option: str) -> None:
    if Norm(groups, 0.0).groups_of(channels) == channels:
        say(
            f"warning: {option} {groups} puts each of the {channels} channels of the finest level into "
            f"a group of its own, which erases colours and time steps; try {max(1, channels // 4)}"
        )
