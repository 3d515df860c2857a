"""Samplers of the discrete process, one model call a step: DDIM, DDPM, Euler ancestral.

In units where noisy = clean + sigma n all three are one step: keep the direction of the noise at some
level, add fresh noise up to the following one.
"""

from ldmkit.diffusion.samplers.stepping import DenoiseAt, Levels, OnStep, at, steps_of, towards
from ldmkit.tensors import Latents, Noise


def sample_ddim(
    denoise: DenoiseAt,
    x: Latents,
    sigmas: Levels,
    *,
    noise: Noise,
    eta: float = 0.0,
    on_step: OnStep | None = None,
) -> Latents:
    """DDIM (Song et al. 2021, Eq. 12 and 16), exactly one model call a step.

    The step keeps the direction of the noise at sqrt(s'^2 - up^2) and adds fresh noise of
    up = eta (s' / s) sqrt(s^2 - s'^2). eta 1 is DDPM's ancestral sampling.

    Args:
        denoise: latents and noise level -> clean latents.
        x: start, noise of level `sigmas[0]`.
        sigmas: falling noise levels, the last one 0.
        noise: source of unit noise; not called for eta 0.
        eta: share of the noise that is drawn anew, 0 to 1.
        on_step: called after each step with its number and the clean latents expected.
    """
    for step, level, following in steps_of(sigmas):
        clean = at(denoise, x, level)
        up = _fresh(level, following, eta)
        x = towards(clean, x, (following**2 - up**2) ** 0.5 / level)
        if up > 0:
            x = x + up * noise(x)
        if on_step is not None:
            on_step(step, clean)
    return x


def sample_ddpm(
    denoise: DenoiseAt,
    x: Latents,
    sigmas: Levels,
    *,
    noise: Noise,
    variance: float = 0.0,
    on_step: OnStep | None = None,
) -> Latents:
    """Ancestral sampling of DDPM (Ho et al. 2020, Alg. 2), one model call a step.

    The mean is that of q(x' | x, clean). Its variance lies between both that the paper tries (Sec. 3.2):
    the posterior's own, s'^2 (s^2 - s'^2) / s^2, which is right for data that are one point, and beta,
    here (s^2 - s'^2) (1 + s'^2) / (1 + s^2), right for data of variance 1.

    Args:
        denoise: latents and noise level -> clean latents.
        x: start, noise of level `sigmas[0]`.
        sigmas: falling noise levels, the last one 0.
        noise: source of unit noise, called for each step but the last.
        variance: share of beta in the variance, 0 to 1; the rest is the posterior's own.
        on_step: called after each step with its number and the clean latents expected.
    """
    for step, level, following in steps_of(sigmas):
        clean = at(denoise, x, level)
        x = towards(clean, x, (following / level) ** 2)
        if following > 0:
            beta = (level**2 - following**2) * (1.0 + following**2) / (1.0 + level**2)
            own = _fresh(level, following, 1.0) ** 2
            x = x + ((1.0 - variance) * own + variance * beta) ** 0.5 * noise(x)
        if on_step is not None:
            on_step(step, clean)
    return x


def sample_euler_ancestral(
    denoise: DenoiseAt,
    x: Latents,
    sigmas: Levels,
    *,
    noise: Noise,
    eta: float = 1.0,
    s_noise: float = 1.0,
    on_step: OnStep | None = None,
) -> Latents:
    """Euler's step to a lower level, then fresh noise up to the following one (k-diffusion), one call a step.

    The very step of `sample_ddim`, known under this name with eta 1 and a factor on the noise.

    Args:
        denoise: latents and noise level -> clean latents.
        x: start, noise of level `sigmas[0]`.
        sigmas: falling noise levels, the last one 0.
        noise: source of unit noise; not called for eta 0.
        eta: share of the noise that is drawn anew, 0 to 1.
        s_noise: factor on fresh noise; slightly above 1 makes up for detail lost by the network.
        on_step: called after each step with its number and the clean latents expected.
    """
    return sample_ddim(
        denoise, x, sigmas, noise=lambda like: s_noise * noise(like), eta=eta, on_step=on_step
    )


def _fresh(level: float, following: float, eta: float) -> float:
    return eta * following / level * (level**2 - following**2) ** 0.5
