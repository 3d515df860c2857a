"""From the options of `sample` to how samples are drawn; what does not fit is refused before the first."""

import difflib
import math
from pathlib import Path
from typing import Any

import torch

from ldmkit.assembly import diffusion_facts, load_diffusion
from ldmkit.diffusion.guidance import Guidance
from ldmkit.diffusion.samplers import SAMPLERS, run_sampler
from ldmkit.diffusion.samplers.euler import Churn
from ldmkit.drawing import Guide, Manner, guide_together, levels_of
from ldmkit.errors import DataError, UsageError
from ldmkit.generation_configs import SampleConfig
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.requests import text_values
from ldmkit.tuned_steps import read_tuned

OPTIONS = {
    "eta": "--eta",
    "order": "--sampler-options.order",
    "churn": "--sampler-options.churn",
    "interval": "--sampler-options.restart-interval",
    "repeats": "--sampler-options.restart-repeats",
}
"""Parameter of samplers -> the option that sets it."""


def manner_of(config: SampleConfig, model: LatentDiffusion) -> Manner:
    """How a command draws from its model.

    Args:
        config: of the command.
        model: the one it names, on the device to draw on.

    Raises:
        UsageError: an option does not fit the sampler, the schedule, or what the model is told.
        DataError: the weaker model cannot be used beside the model, or a file of noise levels.
    """
    manner = Manner(
        config.steps,
        _guide(config, model),
        config.sampler,
        "auto" if isinstance(config.grid, Path) else config.grid,
        settings=_settings(config),
        levels=_levels(config.grid, config.model) if isinstance(config.grid, Path) else (),
        share=config.share,
    )
    try:
        sigmas = levels_of(model.schedule, manner)
    except ValueError as error:
        grid = "" if config.grid == "auto" else f", --grid {config.grid}"
        part = "" if config.share == 1.0 else f", --strength {config.share:g}"
        raise UsageError(f"--steps {config.steps}{grid}{part}: {error}") from error
    try:  # with one number for latents, so that the sampler's own checks come before any work
        run_sampler(
            config.sampler,
            lambda x, sigma: torch.zeros_like(x),
            torch.zeros(1, 1, 1, 1),
            sigmas,
            calls=config.steps,
            noise=torch.zeros_like,
            settings=manner.settings,
        )
    except ValueError as error:
        set_by = "".join(f", {OPTIONS[name]}" for name in manner.settings)
        raise UsageError(f"--sampler {config.sampler}{set_by}: {error}") from error
    return manner


def _levels(file: Path, model: Path) -> tuple[float, ...]:
    return read_tuned(file, diffusion_facts(model).fingerprint).levels


def _settings(config: SampleConfig) -> dict[str, Any]:
    """Parameters of the sampler that were given."""
    options = config.sampler_options
    asked = {
        "eta": config.eta,
        "order": options.order,
        "churn": None if options.churn is None else Churn(options.churn),
        "interval": options.restart_interval,
        "repeats": options.restart_repeats,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    for name in given:
        takers = [sampler for sampler, entry in SAMPLERS.items() if name in entry.parameters]
        if config.sampler not in takers:
            raise UsageError(
                f"{OPTIONS[name]} is not for --sampler {config.sampler}: it goes with {', '.join(takers)}"
            )
    return given


def _guide(config: SampleConfig, model: LatentDiffusion) -> Guide | None:
    """What guides, with everything that the options ask for."""
    if config.weaker is not None:
        found = Guide(
            Guidance((config.weight,)),
            weaker=_weaker(config.weaker, config.model, model),
        )
    elif config.guidance_of:
        found = _guide_by_each(config, model)
    else:
        found = guide_together(model.config.conditions, config.weight)
    if found is None:
        _require_nothing_lost(config, model)
        return None
    guidance = found.guidance._replace(
        combination=config.guidance_combination,
        interval=config.guidance_interval or (0.0, math.inf),
        rescale=config.guidance_rescale,
    )
    found = found._replace(guidance=guidance, growth=config.guidance_growth)
    if config.negative is None:
        return found
    negative = text_values(model.config, config.negative, f"--negative {config.negative}")
    if not any("text" in group for group in found.groups):
        raise UsageError("--negative is for guidance by text: add --guidance-of text=WEIGHT")
    return found._replace(negative=negative)


def _guide_by_each(config: SampleConfig, model: LatentDiffusion) -> Guide:
    kinds = [condition.kind for condition in model.config.conditions]
    for kind in config.weights:
        if kind not in kinds:
            close = difflib.get_close_matches(kind, kinds, n=1, cutoff=0.6)
            known = ", ".join(kinds) or "no conditions"
            hint = f"did you mean {close[0]}?" if close else f"it knows {known}"
            raise UsageError(
                f"--guidance-of {kind}: {config.model} was trained without {kind}; {hint}"
            )
    return Guide(
        Guidance(tuple(config.weights.values())), tuple((kind,) for kind in config.weights)
    )


def _require_nothing_lost(config: SampleConfig, model: LatentDiffusion) -> None:
    """Where nothing is guided, no option may ask for guidance."""
    asked = {
        "--guidance": config.guidance not in (None, 1.0),
        "--negative": config.negative is not None,
        "--guidance-interval": config.guidance_interval is not None,
        "--guidance-rescale": config.guidance_rescale != 0.0,
        "--guidance-growth": config.guidance_growth != "constant",
    }
    given = [option for option, is_given in asked.items() if is_given]
    if not given:
        return
    kinds = [condition.kind for condition in model.config.conditions]
    if config.guidance == 1.0 and any(not one.channels for one in model.config.conditions):
        why = "--guidance 1 is none: give another weight"
    elif kinds:
        why = f"{kinds[0]} is concatenated and stays told: take --guidance-of {kinds[0]}=WEIGHT"
    else:
        why = "the model is told nothing that could guide it: leave it out, or give --weaker MODEL"
    raise UsageError(f"{given[0]} asks for guidance, and {why}")


def _weaker(path: Path, beside: Path, model: LatentDiffusion) -> LatentDiffusion:
    """The model to lead away from, on the device of the other one.

    Raises:
        DataError: it makes other latents, or is told something else.
    """
    weaker = load_diffusion(
        path, model.latent_mean.device, "bf16" if model.unet.dtype == torch.bfloat16 else "fp32"
    )
    facts, its_facts = diffusion_facts(beside), diffusion_facts(path)
    config, its_config = model.config, weaker.config
    same = {
        "autoencoder": facts.autoencoder == its_facts.autoencoder,
        "whitening": facts.whitening == its_facts.whitening,
        "number of latent channels": config.latent_channels == its_config.latent_channels,
        "conditions": _by_kind(config.conditions) == _by_kind(its_config.conditions),
    }
    differing = [what for what, is_same in same.items() if not is_same]
    if differing:
        raise DataError(
            f"--weaker {path} has another {differing[0]} than {beside}: give a model that was trained on "
            "the same latents, told the same"
        )
    return weaker


def _by_kind(conditions: tuple[Any, ...]) -> dict[str, Any]:
    return {condition.kind: condition for condition in conditions}
