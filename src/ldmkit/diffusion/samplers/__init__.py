"""Samplers: pure functions from noise to latents. No state, no hidden random numbers."""

from ldmkit.diffusion.samplers.ancestral import sample_ddim
from ldmkit.diffusion.samplers.registry import SAMPLERS, Sampler, run_sampler
from ldmkit.diffusion.samplers.stepping import DenoiseAt, Levels, OnStep

__all__ = ["SAMPLERS", "DenoiseAt", "Levels", "OnStep", "Sampler", "run_sampler", "sample_ddim"]
