"""Between two noises: spherical interpolation, under which noise stays noise."""

import torch
from jaxtyping import Float
from torch import Tensor

PARALLEL = 1e-6
"""Directions whose sine is less than this have no arc between them worth following."""


def slerp(
    first: Float[Tensor, "batch *rest"],
    last: Float[Tensor, "batch *rest"],
    share: Float[Tensor, " batch"],
) -> Float[Tensor, "batch *rest"]:
    """Spherical interpolation, row by row (Shoemake 1985; of noise: White 2016).

    sin((1 - t) a) / sin a first + sin(t a) / sin a last, where a is the angle between both. Of two
    independent noises, whose angle is close to a right one, this has unit variance at every t; a straight
    line between them has half of it in the middle. Parallel rows are joined by a straight line.

    Args:
        first: at share 0, exactly.
        last: at share 1, exactly.
        share: t of each row, 0 to 1.
    """
    one, other = (rows.detach().cpu().double().flatten(1) for rows in (first, last))
    t = share.detach().cpu().double()
    lengths = one.norm(dim=1) * other.norm(dim=1)
    cosine = (one * other).sum(dim=1) / lengths.clamp(min=torch.finfo(torch.float64).tiny)
    angle = cosine.clamp(-1.0, 1.0).acos()
    sine = angle.sin()
    straight = sine < PARALLEL
    divisor = torch.where(straight, 1.0, sine)
    weights = (
        torch.where(straight, 1.0 - t, ((1.0 - t) * angle).sin() / divisor),
        torch.where(straight, t, (t * angle).sin() / divisor),
    )
    shape = [-1] + [1] * (first.ndim - 1)
    of_first, of_last = (weight.view(shape).to(first) for weight in weights)
    return of_first * first + of_last * last
