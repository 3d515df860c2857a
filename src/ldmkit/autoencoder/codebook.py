"""Vector quantisation (van den Oord et al. 2017; Esser et al. 2021; Rombach et al. 2022, Sec. 3.1).

Latents are kept unquantised: they are what stage 2 learns. The decoder's first act is to put the
nearest code in the place of each latent vector.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from ldmkit.autoencoder.posterior import PointPosterior
from ldmkit.autoencoder_configs import CodebookConfig
from ldmkit.tensors import Latents, Scalar
from ldmkit.training import ranks

Codes = Float[Tensor, "size z"]
Vectors = Float[Tensor, "count z"]
Indices = Int[Tensor, "b y x"]
MAX_DISTANCES = 1 << 26
"""Distances computed at once, a quarter of a gigabyte."""
KMEANS_ROUNDS = 10


class Codebook(nn.Module):
    """A table of codes, and the search for the nearest one.

    Args:
        config: its size and how it is trained.
        latent_channels: z.
    """

    def __init__(self, config: CodebookConfig, latent_channels: int) -> None:
        super().__init__()
        self.config = config
        bound = 1.0 / config.size
        codes = torch.empty(config.size, latent_channels).uniform_(-bound, bound)
        self.codes = nn.Parameter(codes, requires_grad=config.ema_decay == 0)

    def nearest(self, latents: Latents) -> Indices:
        """The number of the code nearest to each latent vector; the lowest of equals."""
        vectors = as_vectors(latents.detach())
        chunk = max(1, MAX_DISTANCES // len(self.codes))
        with torch.autocast(latents.device.type, enabled=False):
            found = [nearest_rows(part, self.codes.detach()) for part in vectors.split(chunk)]
        return torch.cat(found).view(latents.shape[0], *latents.shape[2:])

    def lookup(self, indices: Indices) -> Latents:
        """The codes of these numbers, `[b, z, y, x]`, differentiable in the codes."""
        return rearrange(self.codes[indices], "b y x z -> b z y x")

    def quantize(self, latents: Latents) -> Latents:
        """The nearest codes, with the gradient passed straight on to the latents."""
        codes = self.lookup(self.nearest(latents)).detach()
        return latents + (codes - latents).detach()


class QuantizedPosterior(PointPosterior):
    """Latents before quantisation, and the codes that the decoder will see in their place.

    Args:
        latents: `[b, z, y, x]`.
        codebook: the table.
    """

    def __init__(self, latents: Latents, codebook: Codebook) -> None:
        super().__init__(latents)
        self.codebook = codebook

    def penalty(self) -> Scalar:
        """||sg[z] - e||^2 + beta ||z - sg[e]||^2, means over all values (van den Oord et al. 2017, Eq. 3).

        The first term is left out where codes are running means; the legacy placement has beta on
        the first term instead of the second.
        """
        config = self.codebook.config
        codes = self.codebook.lookup(self.codebook.nearest(self.mean))
        codes_pull = (codes - self.mean.detach()).square().mean()
        latents_pull = (self.mean - codes.detach()).square().mean()
        if config.legacy_commitment:
            return config.commitment * codes_pull + latents_pull
        if config.ema_decay:
            return config.commitment * latents_pull
        return codes_pull + config.commitment * latents_pull


class CodebookUpkeep(nn.Module):
    """What a codebook in training needs beside gradients: start, running means, restarts, counts.

    Its state is in buffers, so that a checkpoint holds it; the autoencoder's file does not.

    Args:
        codebook: the table it looks after.
    """

    def __init__(self, codebook: Codebook) -> None:
        super().__init__()
        self._codebook = [codebook]  # in a list: not a submodule, its codes are saved elsewhere
        size, z = codebook.codes.shape
        device = codebook.codes.device
        self.register_buffer("counts", torch.ones(size, device=device))
        self.register_buffer("sums", torch.zeros(size, z, device=device))
        self.register_buffer("idle", torch.zeros(size, dtype=torch.int64, device=device))

    @torch.no_grad()
    def begin(self, latents: Latents | None, generator: torch.Generator) -> None:
        """Before the first step: codes become the k-means of these latents, unless None."""
        codes = self._codebook[0].codes
        if latents is not None:
            codes.copy_(kmeans(as_vectors(latents), len(codes), generator))
        self.get_buffer("sums").copy_(codes)

    @torch.no_grad()
    def update(self, latents: Latents, generator: torch.Generator) -> dict[str, Scalar]:
        """After a step: move running means, wake idle codes; returns `usage` and `perplexity`.

        Of several processes each gives the latents of its rows, and all count together.

        Running means with Laplace smoothing (van den Oord et al. 2017, App. A.1). `usage` is the
        share of codes in this batch, `perplexity` exp of the entropy of their frequencies.
        """
        book = self._codebook[0]
        config, codes = book.config, book.codes
        vectors, indices = as_vectors(latents), book.nearest(latents).flatten()
        used = ranks.sum_over_ranks(torch.bincount(indices, minlength=len(codes)).float())
        counts, sums, idle = (self.get_buffer(name) for name in ("counts", "sums", "idle"))
        if config.ema_decay:
            own = torch.zeros_like(sums).index_add_(0, indices, vectors)
            total = ranks.sum_over_ranks(own)
            counts.lerp_(used, 1.0 - config.ema_decay)
            sums.lerp_(total, 1.0 - config.ema_decay)
            smoothed = (counts + 1e-5) / (counts.sum() + len(codes) * 1e-5) * counts.sum()
            codes.copy_(sums / smoothed[:, None])
        idle.add_(1).masked_fill_(used > 0, 0)
        if config.restart_after:
            dead = (idle >= config.restart_after).nonzero().flatten()
            chosen = _some_of_all(vectors, len(dead), generator)
            codes[dead], sums[dead], counts[dead], idle[dead] = chosen, chosen, 1.0, 0
        return {"usage": (used > 0).float().mean(), "perplexity": perplexity(used)}


def as_vectors(latents: Latents) -> Vectors:
    """Latents as rows of z float32 values."""
    return rearrange(latents, "b z y x -> (b y x) z").float()


def nearest_rows(vectors: Vectors, codes: Codes) -> Int[Tensor, " count"]:
    """Argmin of ||z - e||^2 = ||z||^2 + ||e||^2 - 2 z e; the first term decides nothing."""
    return (codes.square().sum(1) - 2.0 * vectors @ codes.T).argmin(1)


def perplexity(counts: Float[Tensor, " size"]) -> Scalar:
    """exp(-sum p log p) of the frequencies p: as many codes used evenly have the same entropy."""
    frequencies = counts / counts.sum().clamp_min(1.0)
    return torch.special.entr(frequencies).sum().exp()


def kmeans(vectors: Vectors, size: int, generator: torch.Generator) -> Codes:
    """Centres of `size` clusters (Lloyd 1982), from random vectors; empty clusters stay as they are.

    With fewer vectors than clusters some begin on the same one, a hair apart.
    """
    centres = vectors[_draw(len(vectors), size, generator).to(vectors.device)]
    noise = torch.randn(centres.shape, generator=generator).to(centres.device)
    centres = centres + 1e-3 * vectors.std(0) * noise
    chunk = max(1, MAX_DISTANCES // size)
    for _ in range(KMEANS_ROUNDS):
        owners = torch.cat([nearest_rows(part, centres) for part in vectors.split(chunk)])
        counts = torch.bincount(owners, minlength=size).float()[:, None]
        sums = torch.zeros_like(centres).index_add_(0, owners, vectors)
        centres = torch.where(counts > 0, sums / counts.clamp_min(1.0), centres)
    return centres


def _some_of_all(
    vectors: Vectors, wanted: int, generator: torch.Generator
) -> Float[Tensor, "wanted z"]:
    """Random ones of the vectors of all processes; each adds those that it has to zeros."""
    count = ranks.size() * len(vectors)
    picks = _draw(count, wanted, generator).to(vectors.device)
    places = torch.arange(count, device=vectors.device)[ranks.own(count)]
    own = torch.isin(picks, places)
    chosen = vectors.new_zeros(wanted, vectors.shape[1])
    chosen[own] = vectors[picks[own] - places[0]]
    return ranks.sum_over_ranks(chosen)


def _draw(count: int, wanted: int, generator: torch.Generator) -> Int[Tensor, " wanted"]:
    """`wanted` indices below `count`, all different as long as there are enough."""
    rounds = -(-wanted // count)
    picks = [torch.randperm(count, generator=generator) for _ in range(rounds)]
    return torch.cat(picks)[:wanted] if picks else torch.empty(0, dtype=torch.int64)
