import math

import pytest
import torch

from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder.codebook import (
    Codebook,
    CodebookUpkeep,
    QuantizedPosterior,
    kmeans,
    perplexity,
)
from ldmkit.autoencoder_configs import AutoencoderConfig, CodebookConfig


def codebook(size=4, z=3, **settings):
    torch.manual_seed(0)
    book = Codebook(CodebookConfig(size=size, **settings), z)
    with torch.no_grad():
        book.codes.normal_()
    return book


def test_the_nearest_code_is_the_nearest(generator, monkeypatch):
    book = codebook(size=17)
    latents = torch.randn(2, 3, 5, 4, generator=generator)
    distances = (latents.movedim(1, -1)[..., None, :] - book.codes).norm(dim=-1)
    assert torch.equal(book.nearest(latents), distances.argmin(-1))
    monkeypatch.setattr("ldmkit.autoencoder.codebook.MAX_DISTANCES", 50)  # in small bites
    assert torch.equal(book.nearest(latents), distances.argmin(-1))


def test_quantized_values_are_codes_and_gradients_pass_straight_on(generator):
    book = codebook()
    latents = torch.randn(1, 3, 2, 2, generator=generator, requires_grad=True)
    quantized = book.quantize(latents)
    assert torch.allclose(quantized, book.lookup(book.nearest(latents)), atol=1e-6)
    upstream = torch.randn(1, 3, 2, 2, generator=generator)
    quantized.backward(upstream)
    assert latents.grad is not None
    assert torch.equal(latents.grad, upstream)
    assert book.codes.grad is None


@pytest.mark.parametrize(
    ("settings", "codes_share", "latents_share"),
    [
        ({"commitment": 0.25}, 1.0, 0.25),
        ({"commitment": 0.25, "legacy_commitment": True}, 0.25, 1.0),
        ({"commitment": 0.25, "ema_decay": 0.9}, 0.0, 0.25),
    ],
)
def test_commitment_stands_where_the_paper_has_it(settings, codes_share, latents_share):
    """One code at 1, one latent at 3: both squares are 4, their gradients 2 x 2."""
    book = Codebook(CodebookConfig(size=1, **settings), 1)
    with torch.no_grad():
        book.codes.fill_(1.0)
    book.codes.requires_grad_(True)
    latents = torch.full((1, 1, 1, 1), 3.0, requires_grad=True)
    penalty = QuantizedPosterior(latents, book).penalty()
    penalty.backward()
    assert penalty.item() == pytest.approx(4.0 * (codes_share + latents_share))
    assert latents.grad is not None
    assert latents.grad.item() == pytest.approx(4.0 * latents_share)
    pull = 0.0 if book.codes.grad is None else book.codes.grad.item()
    assert pull == pytest.approx(-4.0 * codes_share)


def test_running_means_follow_their_formula(generator):
    """van den Oord et al. 2017, App. A.1, on two codes and four latents."""
    book = codebook(size=2, z=1, ema_decay=0.75)
    assert not book.codes.requires_grad
    with torch.no_grad():
        book.codes.copy_(torch.tensor([[0.0], [10.0]]))
    upkeep = CodebookUpkeep(book)
    upkeep.begin(None, generator)
    upkeep.update(torch.tensor([1.0, 2.0, 3.0, 12.0]).view(1, 1, 2, 2), generator)
    counts = torch.tensor([0.75 * 1 + 0.25 * 3, 0.75 * 1 + 0.25 * 1])
    sums = torch.tensor([0.75 * 0 + 0.25 * 6, 0.75 * 10 + 0.25 * 12])
    smoothed = (counts + 1e-5) / (counts.sum() + 2e-5) * counts.sum()
    assert torch.allclose(book.codes.flatten(), sums / smoothed)


def test_codes_that_nobody_uses_move_to_where_latents_are(generator):
    book = codebook(size=4, z=2, restart_after=3)
    with torch.no_grad():
        book.codes.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0], [50.0, 50.0], [60.0, 60.0]]))
    upkeep = CodebookUpkeep(book)
    upkeep.begin(None, generator)
    latents = torch.rand(2, 2, 4, 4, generator=generator)
    for _ in range(3):
        assert bool((book.codes[2:] >= 50).all())
        assert upkeep.update(latents, generator)["usage"] <= 0.5
    assert bool((book.codes[2:] <= 1).all())
    assert upkeep.update(latents, generator)["usage"] > 0.5


def test_usage_and_perplexity(generator):
    assert perplexity(torch.tensor([5.0, 5.0, 5.0, 5.0])).item() == pytest.approx(4.0)
    assert perplexity(torch.tensor([7.0, 0.0])).item() == pytest.approx(1.0)
    thirds = torch.tensor([2.0, 1.0])
    entropy = -(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3)
    assert perplexity(thirds).item() == pytest.approx(math.exp(entropy))
    book = codebook(size=2, z=1)
    with torch.no_grad():
        book.codes.copy_(torch.tensor([[0.0], [1.0]]))
    numbers = CodebookUpkeep(book).update(torch.zeros(1, 1, 2, 2), generator)
    assert numbers["usage"] == 0.5
    assert numbers["perplexity"].item() == pytest.approx(1.0)


def test_kmeans_finds_clusters_and_copes_with_too_few_vectors(generator):
    centres = torch.tensor([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0]])
    vectors = centres.repeat(50, 1) + 0.1 * torch.randn(150, 2, generator=generator)
    found = torch.cdist(centres, kmeans(vectors, 6, generator)).min(1).values
    assert (found < 0.5).all()
    many = kmeans(vectors[:5], 32, generator)
    assert many.shape == (32, 2)
    assert many.isfinite().all()


def test_stage_two_gets_latents_before_quantisation_and_decode_quantises():
    torch.manual_seed(0)
    config = AutoencoderConfig(
        bottleneck="vq",
        channels=8,
        multipliers=(1, 2),
        residual_blocks=1,
        codebook=CodebookConfig(size=6),
    )
    model = Autoencoder(config, 3).eval()
    assert model.codebook is not None
    posterior = model.encode(torch.rand(1, 3, 16, 16))
    assert posterior.std is None
    codes = model.codebook.lookup(model.codebook.nearest(posterior.mean))
    assert not torch.allclose(posterior.mean, codes)
    assert torch.equal(posterior.sample(torch.ones_like), posterior.mean)
    assert torch.allclose(
        model.decode(posterior.mean), model.decoder(model.from_latents(codes)), atol=1e-5
    )
