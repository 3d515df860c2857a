"""One number for a diffusion model: the Fréchet distance of its pictures to stored statistics."""

from collections.abc import Callable
from pathlib import Path

import torch

from ldmkit.assembly import (
    autoencoder_facts,
    load_autoencoder,
    precision_for,
    preprocessing_of,
    ready,
)
from ldmkit.configs import EMAConfig
from ldmkit.drawing import Manner, draw_latents, seeded_noise
from ldmkit.errors import UsageError
from ldmkit.generation_configs import SampleConfig
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.metrics.feature_networks import effnet_network, features_of
from ldmkit.metrics.frechet import FeatureStatistics, frechet_distance, rgb_pixels
from ldmkit.metrics.reference import load_reference, stored_protocol
from ldmkit.requests import asked_of
from ldmkit.sample_groups import sample_groups
from ldmkit.terminal import track

BATCH = 16


def frechet_score(
    config: EMAConfig, reference: Path, shape: tuple[int, int, int]
) -> Callable[[LatentDiffusion], float]:
    """The FD-effnet of samples from seeds 0 to N - 1, without guidance, classes in turns.

    Args:
        config: names the autoencoder and the feature network, and says how many samples and steps.
        reference: what `evaluate --save-reference` wrote.
        shape: z, height, width of the latents.

    Returns:
        The number for a model, which is made ready to draw and cannot be trained after that.

    Raises:
        UsageError: the autoencoder or the network is not named.
        DataError: a file cannot be used, or the reference was measured otherwise.
    """
    if config.ae is None or config.effnet is None:
        raise UsageError("--reference scores pictures: give --ae and --effnet too")
    facts, device = autoencoder_facts(config.ae), torch.device("cpu")
    # as `decode`, `sample` and `evaluate` compute unless asked otherwise
    decoder = load_autoencoder(config.ae, device, precision_for(facts, "auto"))
    network = effnet_network(config.effnet, device)
    seen = preprocessing_of(facts, None)
    same = seen.model_dump(include={"size", "resize", "crop", "channels", "background", "range"})
    wanted = {"weights": network.weights, "network_input": network.resize, **same}
    stored = load_reference(
        reference, stored_protocol(reference, network.name).model_copy(update=wanted)
    )
    manner = Manner(config.steps)

    @torch.no_grad()
    def score(model: LatentDiffusion) -> float:
        wish = SampleConfig(model=config.run, num=config.num)
        asked = asked_of(wish, model.config, shape, None)
        statistics = FeatureStatistics()
        ready(model, "auto")
        with track("samples", config.num, unit="sample") as progress:
            for group, kept in sample_groups(config.num, BATCH, model.unet, shape[1] * shape[2]):
                numbers = group.tolist()
                noise = seeded_noise(numbers)
                size = (len(numbers), *shape)
                latents = draw_latents(model, asked.values(numbers), size, noise, manner)[:kept]
                pixels = rgb_pixels(decoder.decode(latents).float())
                statistics.add(features_of(network, [pixels], progress.advance).features)
        return frechet_distance(statistics.moments(), (stored.mean, stored.covariance))

    return score
