"""Intervals of the metrics of generated pictures: what they would be for other samples of the model.

The samples are drawn again with replacement; the real pictures stay. Each draw is a row of counts, how often
every sample is in it, so that kernels, roots and balls are computed once.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ldmkit.data.order import generator_for
from ldmkit.metrics.frechet import covariance_root
from ldmkit.metrics.generation import (
    BLOCK,
    Logits,
    Neighbourhoods,
    Points,
    inception_scores,
    polynomial_kernel,
)

PLACE = 12
"""In the seed tree."""
LEVEL = 0.95

Counts = Int[Tensor, "draws samples"]
Drawn = Float[Tensor, " draws"]


def resampling_counts(count: int, draws: int, seed: int) -> Counts:
    """How often each of `count` samples is in each draw; every row adds up to `count`."""
    chosen = torch.randint(count, (draws, count), generator=generator_for(seed, PLACE))
    return torch.zeros(draws, count, dtype=torch.int64).scatter_add_(
        1, chosen, torch.ones_like(chosen)
    )


def interval(drawn: Sequence[float] | Drawn, value: float) -> tuple[float, float]:
    """Percentiles of the draws that hold 95 %, moved so that their mean is the measured value.

    A draw holds only 63 % of the samples, the rest twice or more, so a Fréchet distance of it is that of
    fewer pictures and too large, and recall too small; unmoved, the interval would miss the value itself.
    """
    draws = torch.as_tensor(drawn).double()
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = (draws - draws.mean() + value).quantile(ends).tolist()
    return low, high


def frechet_draws(
    samples: Points, real: tuple[Tensor, Tensor], counts: Counts, root: Tensor | None = None
) -> Drawn:
    """The Fréchet distance of each draw of the samples to real pictures.

    tr((C R)^(1/2)) is the sum of the roots of the eigenvalues of R^(1/2) C R^(1/2). With Z = X R^(1/2) for
    centred samples X this is Z'Z, whose eigenvalues other than 0 are those of the smaller of Z'Z and
    ZZ'; the latter is made of one Gram matrix for all draws.

    Args:
        samples: features `[n, f]`.
        real: mean `[f]` and covariance R `[f, f]`, float64.
        counts: of the draws.
        root: `covariance_root(R)`, for who measures many sets against one.
    """
    mean, covariance = real
    x = samples.double() - mean
    z = x @ (covariance_root(covariance) if root is None else root)
    squares, count = x.square().sum(1), len(x)
    gram = z @ z.T if 0.632 * count <= x.shape[1] else None
    found = []
    for row in counts:
        weights = row.double()
        offset = weights @ x / count
        spread = (weights @ squares - count * offset.square().sum()) / (count - 1)
        there = weights.nonzero().flatten()
        if gram is not None:
            product = _centred_gram(gram[there][:, there], weights[there], count)
        else:
            centred = (z[there] - weights @ z / count) * weights[there, None].sqrt()
            product = centred.T @ centred
        roots = torch.linalg.eigvalsh(product / (count - 1)).clamp_min(0.0).sqrt().sum()
        found.append(offset.square().sum() + spread + covariance.trace() - 2.0 * roots)
    return torch.stack(found)


def _centred_gram(gram: Tensor, weights: Tensor, count: int) -> Tensor:
    """The Gram matrix of points less their weighted mean, each as long as the root of its weight."""
    toward_mean = gram @ weights / count
    mean = weights @ toward_mean / count
    centred = gram - toward_mean - toward_mean[:, None] + mean
    scale = weights.sqrt()
    return centred * scale * scale[:, None]


def kernel_draws(samples: Points, real: Points, counts: Counts) -> Drawn:
    """The unbiased squared MMD of each draw to all real pictures.

    Pairs of a sample with itself are left out, also where a draw holds it twice.
    """
    weights = counts.double()
    count, others = len(samples), len(real)
    # with the counts c of a draw: the sum over pairs i != j of c_i c_j k_ij, and how many pairs there are
    pairs = count**2 - weights.square().sum(1)
    within, between = torch.zeros_like(pairs), torch.zeros_like(pairs)
    for rows, mine in zip(samples.split(BLOCK), weights.split(BLOCK, dim=1), strict=True):
        within += (mine * (weights @ polynomial_kernel(samples, rows))).sum(1)
        between += mine @ polynomial_kernel(rows, real).sum(1)
    lengths = samples.double().square().sum(1) / samples.shape[1]
    within -= weights.square() @ (lengths + 1.0).pow(3)
    real_sum = sum(
        (polynomial_kernel(rows, real).sum() for rows in real.split(BLOCK)),
        start=torch.zeros((), dtype=torch.float64),
    )
    real_lengths = real.double().square().sum(1) / real.shape[1]
    real_within = (real_sum - (real_lengths + 1.0).pow(3).sum()) / (others * (others - 1))
    return within / pairs + real_within - 2.0 * between / (count * others)


def score_draws(logits: Logits, counts: Counts) -> Drawn:
    """The Inception score of each draw, over parts of it in random order."""
    log_p = logits.double().log_softmax(dim=1)
    found = []
    for number, row in enumerate(counts):
        chosen = torch.repeat_interleave(torch.arange(len(logits)), row)
        order = torch.randperm(len(chosen), generator=generator_for(number, PLACE))
        found.append(inception_scores(log_p[chosen[order]]).mean())
    return torch.stack(found)


def share_draws(balls: Neighbourhoods, counts: Counts) -> dict[str, Drawn]:
    """Precision, recall, density and coverage of each draw; balls stay as large as they were."""
    weights = counts.double()
    present = (counts > 0).float()
    total = len(balls.precise)
    return {
        "precision": weights @ balls.precise.double() / total,
        "recall": _reached(balls.recalled, present),
        "density": weights @ balls.density / total,
        "coverage": _reached(balls.covered, present),
    }


def _reached(inside: Tensor, present: Tensor) -> Drawn:
    """For each draw the share of real pictures that a sample in it reaches."""
    reached = torch.zeros(len(present), dtype=torch.float64)
    for rows in inside.split(BLOCK):
        reached += (present @ rows.float().T > 0).double().sum(1)
    return reached / len(inside)
