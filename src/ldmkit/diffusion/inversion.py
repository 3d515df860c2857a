"""DDIM inversion: the probability-flow ODE from latents up to the noise that leads to them."""

from ldmkit.diffusion.samplers import DenoiseAt, Levels
from ldmkit.diffusion.samplers.stepping import at, steps_of, towards
from ldmkit.tensors import Latents


def invert_ddim(denoise: DenoiseAt, clean: Latents, sigmas: Levels) -> Latents:
    """DDIM run backwards (Song et al. 2021, Sec. 4.3), one model call a step, steps as in sampling.

    dx = n dsigma with the noise expected n = (x - clean(x)) / sigma of each step's lower end, where DDIM
    takes that of its upper end; so both undo each other up to an error of first order in the steps. The
    first step leaves sigma 0, where n has no value: it takes that of the lowest level above.

    Args:
        denoise: latents and noise level -> clean latents.
        clean: whitened latents.
        sigmas: falling noise levels, the last one 0, as a sampler takes them.

    Returns:
        Latents with noise of level `sigmas[0]`.
    """
    x = clean
    for _, above, level in reversed(list(steps_of(sigmas))):
        if level == 0.0:
            x = x + (x - at(denoise, x, above))
        else:
            x = towards(at(denoise, x, level), x, above / level)
    return x
