"""UniPC: a predictor whose next model call also corrects it (Zhao et al. 2023)."""

import math
from typing import Literal

import torch

from ldmkit.diffusion.samplers.stepping import (
    DenoiseAt,
    Levels,
    OnStep,
    at,
    log_ratio,
    require_order,
    steps_of,
    towards,
)
from ldmkit.tensors import Latents, Noise

Kind = Literal["bh1", "bh2"]
History = list[tuple[Latents, float]]
"""Clean latents and level of each step, newest first."""


def sample_unipc(
    denoise: DenoiseAt,
    x: Latents,
    sigmas: Levels,
    *,
    noise: Noise,
    order: int = 3,
    kind: Kind = "bh2",
    on_step: OnStep | None = None,
) -> Latents:
    """UniPC on the clean latents (Zhao et al. 2023, Alg. 1 and 2), one model call a step.

    The call at a step's end serves its correction (UniC) and the following prediction (UniP). First and
    last steps are of lower order, the one to 0 of order 1.

    Args:
        denoise: latents and noise level -> clean latents.
        x: start, noise of level `sigmas[0]`.
        sigmas: falling noise levels, the last one 0.
        noise: never called.
        order: of the predictor, 1 to 3; the corrector's is one higher.
        kind: the paper's B(h), h or e^h - 1; for few steps it prefers bh1 without, bh2 with guidance.
        on_step: called after each step with its number and the clean latents expected.

    Raises:
        ValueError: there is no such order.
    """
    require_order(order, 3)
    steps = len(sigmas) - 1
    former, history, used = x, [], 0
    for step, level, following in steps_of(sigmas):
        clean = at(denoise, x, level)
        if step > 0:
            x = _step(former, history[:used], level, kind, clean)
        history = [(clean, level), *history[: order - 1]]
        used = min(order, len(history), steps - step)
        former = x
        x = clean if following == 0.0 else _step(x, history[:used], following, kind)
        if on_step is not None:
            on_step(step, clean)
    return x


def _step(
    x: Latents, history: History, following: float, kind: Kind, found: Latents | None = None
) -> Latents:
    """From the newest level of `history` to `following`, corrected by `found` there if given."""
    clean, level = history[0]
    h = log_ratio(level, following)
    places = [-log_ratio(older, level) / h for _, older in history[1:]]
    changes = [other - clean for other, _ in history[1:]]
    if found is not None:
        places, changes = [*places, 1.0], [*changes, found - clean]
    moved = towards(clean, x, following / level)
    for weight, place, change in zip(_weights(places, h, kind), places, changes, strict=True):
        moved = moved + (weight / place) * change
    return moved


def _weights(places: list[float], h: float, kind: Kind) -> list[float]:
    """What each difference counts: -B(-h) times the solution of R a = b (Eq. 10 with -h for h)."""
    scale = -h if kind == "bh1" else math.expm1(-h)
    if len(places) < 2:
        return [-0.5 * scale] * len(places)
    phi, factorial, wanted = math.expm1(-h) / -h - 1.0, 1.0, []
    for power in range(1, len(places) + 1):
        wanted.append(phi * factorial / scale)
        factorial *= power + 1
        phi = phi / -h - 1.0 / factorial
    rows = [[place**power for place in places] for power in range(len(places))]
    found = torch.linalg.solve(
        torch.tensor(rows, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64)
    )
    return [-scale * weight for weight in found.tolist()]
