"""Which latents a training step sees: all of one shape."""

import numpy as np

from ldmkit.data.latent_set import LatentSet
from ldmkit.data.order import bucketed_indices_of_step, indices_of_step


def training_buckets(latents: LatentSet, holdout: float) -> list[np.ndarray]:
    """The samples to train on, apart by the shape of their latents.

    Raises:
        DataError: there are none.
    """
    training = latents.training_indices(holdout)
    if len(latents.shapes) == 1:
        return [training]
    buckets = [np.intersect1d(training, indices) for indices in latents.shapes.values()]
    return [indices for indices in buckets if len(indices)]


def samples_of_step(
    step: int, buckets: list[np.ndarray], *, batch_size: int, seed: int
) -> np.ndarray:
    """Indices of the samples of a step, all of one shape."""
    counts = [len(indices) for indices in buckets]
    if len(buckets) == 1:
        places = indices_of_step(step, count=counts[0], batch_size=batch_size, seed=seed)
        return buckets[0][[index for index, _ in places]]
    bucket, places = bucketed_indices_of_step(step, counts=counts, batch_size=batch_size, seed=seed)
    return buckets[bucket][[index for index, _ in places]]
