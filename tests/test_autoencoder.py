import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder.networks import Downsample
from ldmkit.autoencoder.posterior import GaussianPosterior
from ldmkit.autoencoder_configs import AutoencoderConfig
from ldmkit.networks.blocks import Norm

TINY = AutoencoderConfig(channels=8, multipliers=(1, 2, 2), residual_blocks=1)


@pytest.mark.parametrize("multipliers", [(1, 2), (1, 2, 2), (1, 1, 2, 2)])
@pytest.mark.parametrize("image_channels", [1, 3])
def test_shapes(multipliers, image_channels):
    config = TINY.model_copy(update={"multipliers": multipliers, "latent_channels": 5})
    model = Autoencoder(config, image_channels)
    posterior = model.encode(torch.zeros(2, image_channels, 32, 48))
    assert posterior.mean.shape == (2, 5, 32 // config.factor, 48 // config.factor)
    assert model.decode(posterior.mean).shape == (2, image_channels, 32, 48)


def test_attention_factors_and_middle_attention_add_their_blocks():
    def blocks(**changes):
        model = Autoencoder(TINY.model_copy(update=changes), 3)
        return sum(name.endswith("qkv.weight") for name, _ in model.named_parameters())

    assert blocks() == 2  # one middle in the encoder, one in the decoder
    assert blocks(middle_attention=False) == 0
    assert blocks(attention_factors=(4,)) == 2 + 1 + 2  # one residual block down, two up
    assert blocks(attention_factors=(2, 4)) == 2 + 2 * 3


def test_downsampling_pads_right_and_bottom_only():
    layer = Downsample(1)
    torch.nn.init.ones_(layer.conv.weight)
    assert layer.conv.bias is not None
    torch.nn.init.zeros_(layer.conv.bias)
    x = torch.arange(16.0).view(1, 1, 4, 4)
    # windows start at 0 and 2; the second one reaches one row and column past the edge
    expected = [
        [x[0, 0, :3, :3].sum(), x[0, 0, :3, 2:].sum()],
        [x[0, 0, 2:, :3].sum(), x[0, 0, 2:, 2:].sum()],
    ]
    assert torch.equal(layer(x)[0, 0], torch.tensor(expected))


def test_posterior_against_torch_distributions(generator):
    moments = torch.randn(3, 8, 2, 2, generator=generator)
    posterior = GaussianPosterior(moments)
    reference = Normal(moments[:, :4], (0.5 * moments[:, 4:]).exp())
    assert torch.allclose(posterior.mean, reference.mean)
    assert torch.allclose(posterior.std, reference.stddev)
    expected = kl_divergence(reference, Normal(0.0, 1.0)).sum() / 3
    assert torch.allclose(posterior.penalty(), expected, rtol=1e-5)
    assert torch.allclose(posterior.sample(torch.ones_like), reference.mean + reference.stddev)


def test_log_variance_is_clamped():
    posterior = GaussianPosterior(torch.tensor([0.0, 0.0, -100.0, 100.0]).view(1, 4, 1, 1))
    assert posterior.log_variance.flatten().tolist() == [-30.0, 20.0]


def test_moments_are_summed_in_float32():
    assert (
        GaussianPosterior(torch.ones(1, 2, 1, 1, dtype=torch.bfloat16)).penalty().dtype
        == torch.float32
    )


@pytest.mark.parametrize("bottleneck", ["kl", "deterministic", "vq"])
def test_checkpointing_changes_no_gradient(bottleneck, generator):
    torch.manual_seed(0)
    model = Autoencoder(TINY.model_copy(update={"bottleneck": bottleneck}), 3)
    images = torch.rand(2, 3, 16, 16, generator=generator)
    gradients = []
    for checkpointing in (False, True):
        model.checkpoint_activations(checkpointing)
        loss = model.decode(model.encode(images).mean).square().sum()
        weights = [p for p in model.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(loss, weights, allow_unused=True))
    for kept, again in zip(*gradients, strict=True):
        assert (kept is None) == (again is None)
        assert kept is None or torch.equal(kept, again)


def test_the_identity_is_pixels_and_trains_nothing():
    model = Autoencoder(AutoencoderConfig(bottleneck="identity"), 2)
    images = torch.rand(1, 2, 5, 7)
    posterior = model.encode(images)
    assert torch.equal(model.decode(posterior.mean), images)
    assert posterior.std is None
    assert model.latent_channels == 2
    assert model.config.factor == 1
    assert list(model.parameters()) == []


def test_norms_and_softmax_are_computed_in_float32_under_bfloat16(generator):
    """As if in float32 on the same bfloat16 inputs: off by the last bit of the result at most."""
    x = (torch.randn(2, 32, 8, 8, generator=generator) * 3 + 5).bfloat16()
    norm = Norm(8, 1e-6)(32)
    q = torch.randn(1, 1, 64, 32, generator=generator).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        normed, attended = norm(x), F.scaled_dot_product_attention(q, q, q)
    exact = norm(x.float()), F.scaled_dot_product_attention(q.float(), q.float(), q.float())
    for found, wanted in zip((normed, attended), exact, strict=True):
        error = (found.float() - wanted).abs()
        assert (error <= 2**-7 * wanted.abs() + 2**-9).all()


def test_one_batch_overfits(generator):
    torch.manual_seed(0)
    model = Autoencoder(TINY.model_copy(update={"channels": 16}), 3)
    images = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(80):
        loss = (model.decode(model.encode(images).mean) - images).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
