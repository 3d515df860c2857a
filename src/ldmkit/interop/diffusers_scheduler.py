"""diffusers' words for a noise schedule and a parameterization: `scheduler_config.json` and back.

Its schedulers mix what a network was trained on (the betas, the kind of prediction) with how one
samples (order, spacing, clipping). Only the former comes in; ours are options of `ldmkit sample`.
"""

from typing import Any

import torch

from ldmkit.diffusion.schedule import BETAS
from ldmkit.diffusion_configs import (
    DiffusionConfig,
    ParameterizationName,
    ScheduleConfig,
    ScheduleName,
    schedule_name,
)
from ldmkit.errors import DataError
from ldmkit.facts import validated

DISCRETE = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
)
DDIM, FLOW = "DDIMScheduler", "FlowMatchEulerDiscreteScheduler"
BETA_SCHEDULES: dict[str, ScheduleName] = {
    "scaled_linear": "scaled-linear",
    "linear": "linear",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid-beta",
}
PREDICTIONS: dict[str, ParameterizationName] = {
    "epsilon": "epsilon",
    "sample": "x0",
    "v_prediction": "v",
}
DDIM_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")
FLOW_STEPS = 1000
FIXED: dict[str, tuple[Any, ...]] = {
    "trained_betas": (None,),
    "timestep_type": ("discrete",),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
    "invert_sigmas": (False,),
}
"""Settings that change what the network was trained on, and that ours cannot express otherwise."""


def read_schedule(page: dict[str, Any], source: str) -> tuple[ScheduleConfig, ParameterizationName]:
    """The schedule and parameterization that a `scheduler_config.json` describes.

    Args:
        page: the file's content.
        source: how to name it in errors.

    Raises:
        DataError: another class, or something that ours cannot express; it is named.
    """
    kind = page.get("_class_name")
    if kind not in (*DISCRETE, FLOW):
        raise DataError(f"{source} holds {kind}; {', '.join(DISCRETE)} and {FLOW} can be imported")
    for key, values in FIXED.items():
        if page.get(key, values[0]) not in values:
            found = "a list" if isinstance(page[key], list) else repr(page[key])
            raise DataError(f"{source}: {key} is {found}, which ours cannot express")
    timesteps = page.get("num_train_timesteps", 1000)
    if kind == FLOW:
        if timesteps != FLOW_STEPS:
            raise DataError(
                f"{source}: num_train_timesteps {timesteps}; a flow's network is told times up to "
                f"{FLOW_STEPS} here"
            )
        return validated(
            ScheduleConfig, {"kind": "flow", "shift": page.get("shift", 1.0)}, source
        ), "flow"
    betas, prediction = page.get("beta_schedule", "linear"), page.get("prediction_type", "epsilon")
    for name, value, known in (
        ("beta_schedule", betas, BETA_SCHEDULES),
        ("prediction_type", prediction, PREDICTIONS),
    ):
        if value not in known:
            raise DataError(
                f"{source}: {name} {value!r} has no counterpart here, only {', '.join(known)}"
            )
    settings = {
        "kind": BETA_SCHEDULES[betas],
        "timesteps": timesteps,
        "beta_start": page.get("beta_start", 0.0001),
        "beta_end": page.get("beta_end", 0.02),
        "zero_terminal_snr": page.get("rescale_betas_zero_snr", False),
    }
    return validated(ScheduleConfig, settings, source), PREDICTIONS[prediction]


def clips(page: dict[str, Any]) -> bool:
    """Whether their sampler would clip predicted latents, which ours never does."""
    may = page.get("_class_name") in ("DDIMScheduler", "DDPMScheduler")
    return bool(page.get("clip_sample", may) or page.get("thresholding", False))


def schedule_page(config: DiffusionConfig) -> dict[str, Any]:
    """The `scheduler_config.json` with which diffusers takes the steps that ours does.

    DDIM on an even grid from t = T - 1 down, to the clean latents and not to those of t = 0; for
    flows Euler's steps, which are DDIM's. Same steps where their number divides T: `DDIMScheduler`
    rounds the distance between two steps.

    Raises:
        DataError: diffusers has no word for the schedule or the parameterization; it is named.
    """
    schedule, parameterization = config.schedule, config.parameterization
    name = schedule_name(schedule, parameterization)
    if name == "flow" and parameterization == "flow":
        return {"_class_name": FLOW, "num_train_timesteps": FLOW_STEPS, "shift": schedule.shift}
    theirs = {ours: key for key, ours in PREDICTIONS.items()}
    if parameterization not in theirs or name not in BETAS:
        raise DataError(
            f"no scheduler of diffusers that this command writes goes with parameterization "
            f"{parameterization} on schedule {name}"
        )
    page: dict[str, Any] = {
        "_class_name": DDIM,
        "num_train_timesteps": schedule.timesteps,
        "prediction_type": theirs[parameterization],
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "clip_sample": False,
        "thresholding": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "trailing",
    }
    words = {BETA_SCHEDULES[key]: key for key in DDIM_SCHEDULES}
    if name in words:
        return page | {
            "beta_schedule": words[name],
            "beta_start": schedule.beta_start,
            "beta_end": schedule.beta_end,
        }
    return page | {"trained_betas": BETAS[name](schedule).to(torch.float64).tolist()}
