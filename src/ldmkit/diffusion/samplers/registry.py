"""The samplers by name, with what a caller must know to make an exact number of model calls."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ldmkit.diffusion.samplers.ancestral import sample_ddim, sample_ddpm, sample_euler_ancestral
from ldmkit.diffusion.samplers.dpm_solver import (
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_dpmpp_2s,
    sample_dpmpp_3m_sde,
)
from ldmkit.diffusion.samplers.er_sde import sample_er_sde
from ldmkit.diffusion.samplers.euler import sample_euler, sample_heun
from ldmkit.diffusion.samplers.linear_multistep import sample_deis, sample_lms, sample_plms
from ldmkit.diffusion.samplers.restart import sample_restart
from ldmkit.diffusion.samplers.stepping import DenoiseAt, Levels, OnStep
from ldmkit.diffusion.samplers.unipc import sample_unipc
from ldmkit.tensors import Latents, Noise


class Sampler(NamedTuple):
    """One sampler.

    Attributes:
        sample: the function.
        grid_steps: steps that the grid must have for a number of model calls.
        stochastic: draws noise, with its parameters as they are by default.
    """

    sample: Callable[..., Latents]
    grid_steps: Callable[[int], int]
    stochastic: bool

    @property
    def parameters(self) -> dict[str, Any]:
        """Its own parameters and their defaults."""
        shared = {"denoise", "x", "sigmas", "noise", "calls", "on_step"}
        known = inspect.signature(self.sample).parameters
        return {name: known[name].default for name in known if name not in shared}

    @property
    def takes_calls(self) -> bool:
        """Whether it must be told the number of calls, since the grid does not settle it."""
        return "calls" in inspect.signature(self.sample).parameters


def run_sampler(
    name: str,
    denoise: DenoiseAt,
    x: Latents,
    sigmas: Levels,
    *,
    calls: int,
    noise: Noise,
    settings: Mapping[str, Any],
    on_step: OnStep | None = None,
) -> Latents:
    """Clean latents by the sampler of a name, with exactly `calls` model calls.

    Args:
        name: one of `SAMPLERS`.
        denoise: latents and noise level -> clean latents.
        x: start, noise of level `sigmas[0]`.
        sigmas: a grid of `SAMPLERS[name].grid_steps(calls)` steps.
        calls: model calls.
        noise: source of unit noise.
        settings: the sampler's own parameters that differ from their defaults.
        on_step: called after each step with its number and the clean latents expected.

    Raises:
        ValueError: an unknown parameter, or a grid of another number of steps.
    """
    sampler = SAMPLERS[name]
    steps, known = sampler.grid_steps(calls), sampler.parameters
    if len(sigmas) != steps + 1:
        raise ValueError(f"{calls} calls of {name} take {steps} steps, not {len(sigmas) - 1}")
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(
            f"{name} has no {unknown[0]}; it has {', '.join(known) or 'no parameters'}"
        )
    budget = {"calls": calls} if sampler.takes_calls else {}
    return sampler.sample(denoise, x, sigmas, noise=noise, on_step=on_step, **budget, **settings)


def _one_call_a_step(calls: int) -> int:
    return calls


def _plms_steps(calls: int) -> int:
    """Two calls in the first step, wherever there is more than one step."""
    return calls if calls <= 2 else calls - 1


def _heun_steps(calls: int) -> int:
    """Two calls a step and one in the last: ceil((calls + 1) / 2)."""
    return calls // 2 + 1


def _restart_steps(calls: int) -> int:
    """Half of the calls for the restarts, where enough are left for a step of Heun's in each."""
    return _heun_steps(calls) if calls < 12 else (calls // 2 - 1) // 2


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(sample_ddpm, _one_call_a_step, stochastic=True),
    "ddim": Sampler(sample_ddim, _one_call_a_step, stochastic=False),
    "plms": Sampler(sample_plms, _plms_steps, stochastic=False),
    "euler": Sampler(sample_euler, _one_call_a_step, stochastic=False),
    "euler-ancestral": Sampler(sample_euler_ancestral, _one_call_a_step, stochastic=True),
    "heun": Sampler(sample_heun, _heun_steps, stochastic=False),
    "lms": Sampler(sample_lms, _one_call_a_step, stochastic=False),
    "dpmpp-2s": Sampler(sample_dpmpp_2s, _one_call_a_step, stochastic=False),
    "dpmpp-2m": Sampler(sample_dpmpp_2m, _one_call_a_step, stochastic=False),
    "dpmpp-2m-sde": Sampler(sample_dpmpp_2m_sde, _one_call_a_step, stochastic=True),
    "dpmpp-3m-sde": Sampler(sample_dpmpp_3m_sde, _one_call_a_step, stochastic=True),
    "unipc": Sampler(sample_unipc, _one_call_a_step, stochastic=False),
    "deis": Sampler(sample_deis, _one_call_a_step, stochastic=False),
    "er-sde": Sampler(sample_er_sde, _one_call_a_step, stochastic=True),
    "restart": Sampler(sample_restart, _restart_steps, stochastic=True),
}
