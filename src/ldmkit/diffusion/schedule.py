"""The paper's discrete noise schedule, and the only place where t and sigma meet.

Everything outside speaks of sigma, the noise in units of whitened latents: noisy = x + sigma n. The
paper's process (Ho et al. 2020) scales that by sqrt(alpha_bar): x_t = sqrt(alpha_bar_t) (x + sigma_t n),
sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ldmkit.tensors import Sigmas

SNAP = 1e-3
"""A sigma this close to a step's (in steps) is that step's: it came from the table in float32."""


class DiscreteSchedule:
    """T noise levels with variances linear in their square root ("linear" in the LDM code).

    beta_t = (sqrt(beta_1) + (t / (T - 1)) (sqrt(beta_T) - sqrt(beta_1)))^2, t = 0 .. T - 1.
    """

    def __init__(self, timesteps: int, beta_start: float, beta_end: float) -> None:
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=torch.float64)
        self.alpha_bar: Float[Tensor, " T"] = torch.cumprod(1.0 - roots.square(), dim=0)
        self.sigmas: Float[Tensor, " T"] = ((1.0 - self.alpha_bar) / self.alpha_bar).sqrt()
        self.timesteps = timesteps

    def draw(self, count: int, generator: torch.Generator) -> Sigmas:
        """Noise levels for training: t uniform over the T steps."""
        return self.sigmas[torch.randint(self.timesteps, (count,), generator=generator)].float()

    def steps(self, count: int) -> Float[Tensor, " count_plus_1"]:
        """Falling noise levels for exactly `count` model calls, evenly spaced in t, then 0.

        Starts at t = T - 1, so that the first level is the one pure noise stands for ("trailing"
        spacing, Lin et al. 2024).

        Raises:
            ValueError: `count` is not within 1 .. T.
        """
        if not 1 <= count <= self.timesteps:
            raise ValueError(
                f"{count} sampling steps asked for; this model takes 1 to {self.timesteps}"
            )
        back = torch.arange(count, dtype=torch.float64) * (self.timesteps / count)
        chosen = (self.timesteps - back).round().long() - 1
        return torch.cat([self.sigmas[chosen], torch.zeros(1, dtype=torch.float64)]).float()

    def timestep(self, sigma: Sigmas) -> Float[Tensor, " batch"]:
        """The time t of a noise level: whole at the table's levels, linear in log sigma between."""
        table = self.sigmas.log().float().to(sigma.device)
        level = sigma.float().log().clamp(table[0], table[-1])
        above = torch.searchsorted(table, level).clamp(1, self.timesteps - 1)
        low, high = table[above - 1], table[above]
        time = (above - 1) + (level - low) / (high - low)
        whole = time.round()
        return torch.where((time - whole).abs() < SNAP, whole, time)

    def initial(
        self, noise: Float[Tensor, "batch *rest"], sigma: float
    ) -> Float[Tensor, "batch *rest"]:
        """Where sampling starts: unit noise of the paper's process, in this module's scale."""
        return noise * (1.0 + sigma**2) ** 0.5
