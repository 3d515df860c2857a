import pytest
import torch

from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    adversarial_loss,
    discriminator_loss,
)
from ldmkit.autoencoder.loss import generator_loss
from ldmkit.autoencoder.perceptual import box_distance
from ldmkit.configs import AutoencoderConfig, AutoencoderLossConfig

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Autoencoder(AutoencoderConfig(channels=8, multipliers=(1, 2), residual_blocks=1), 3)


@pytest.fixture
def discriminator():
    torch.manual_seed(1)
    return PatchDiscriminator(3, channels=8, layers=1)


def terms_of(model, config, *, discriminator=None, perceptual=None):
    posterior = model.encode(IMAGES)
    return generator_loss(
        IMAGES,
        model.decode(posterior.sample(torch.zeros_like)),
        posterior,
        config,
        perceptual=perceptual,
        discriminator=discriminator,
        last_layer=model.decoder.conv_out.weight,
    )


def test_the_total_is_the_papers_sum(model, discriminator):
    """By hand on the same tensors: sums over a picture's values, means over the batch."""
    config = AutoencoderLossConfig(kl_weight=0.1, perceptual_weight=0.7, disc_weight=0.3)
    perceptual = box_distance()
    terms = terms_of(model, config, discriminator=discriminator, perceptual=perceptual)

    posterior = model.encode(IMAGES)
    reconstructions = model.decode(posterior.mean)
    distance = perceptual(IMAGES, reconstructions).view(2, 1, 1, 1)
    nll = ((IMAGES - reconstructions).abs() + 0.7 * distance).sum() / 2
    g = -discriminator(reconstructions).mean()
    last = model.decoder.conv_out.weight
    pull, push = (torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (nll, g))
    weight = pull / (push + 1e-4)
    expected = nll + 0.1 * posterior.penalty() + 0.3 * weight * g
    assert torch.allclose(terms.adaptive, weight, rtol=1e-4)
    assert torch.allclose(terms.total, expected, rtol=1e-4)


@pytest.mark.parametrize("term", ["pixel", "perceptual", "kl", "adversarial"])
def test_the_gradient_of_each_term_reaches_where_it_should(term, model, discriminator):
    """The defect of other trainers: a term computed without gradient trains nothing, silently."""
    terms = terms_of(
        model, AutoencoderLossConfig(), discriminator=discriminator, perceptual=box_distance()
    )
    getattr(terms, term).backward()
    encoder = model.encoder.conv_in.weight.grad
    decoder = model.decoder.conv_in.weight.grad
    assert encoder is not None
    assert encoder.abs().sum() > 0
    if term == "kl":
        assert decoder is None  # the posterior lies before the decoder
    else:
        assert decoder is not None
        assert decoder.abs().sum() > 0


def test_before_its_start_the_discriminator_is_not_even_asked(model):
    terms = terms_of(model, AutoencoderLossConfig(perceptual="none"))
    assert terms.adversarial == terms.adaptive == 0
    pixels = IMAGES[0].numel()
    assert torch.allclose(terms.total, pixels * terms.pixel + 1e-6 * terms.kl)


def test_adversarial_losses_by_hand():
    real = torch.tensor([2.0, 0.5, -1.0]).view(3, 1, 1, 1)
    fake = torch.tensor([-3.0, 0.0, 0.5]).view(3, 1, 1, 1)
    # relu(1 - real) = 0, .5, 2; relu(1 + fake) = 0, 1, 1.5
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * (2.5 / 3 + 2.5 / 3))
    assert adversarial_loss(fake).item() == pytest.approx(2.5 / 3)


def test_the_adaptive_weight_is_clamped_and_carries_no_gradient():
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    weight = adaptive_weight(
        (w * torch.tensor([6.0, 8.0])).sum(), (w * torch.tensor([0.0, 2.0])).sum(), w
    )
    assert weight.item() == pytest.approx(10.0 / (2.0 + 1e-4))
    assert not weight.requires_grad
    assert adaptive_weight((1e9 * w).sum(), (w * 1.0).sum(), w).item() == 1e4


def test_the_discriminators_loss_leaves_the_generator_alone(model, discriminator):
    reconstructions = model.decode(model.encode(IMAGES).mean)
    discriminator_loss(discriminator(IMAGES), discriminator(reconstructions.detach())).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


@pytest.mark.parametrize(("layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_the_patch_size_is_the_one_stated(layers, field):
    """A logit depends on `field` x `field` pixels (Isola et al. 2017, App. 6.1.2)."""
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(1, channels=8, layers=layers).eval()
    images = torch.rand(1, 1, 128, 128, requires_grad=True)
    logits = discriminator(images)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert images.grad is not None
    touched = images.grad[0, 0].abs().sum(0).nonzero().flatten()
    assert touched[-1] - touched[0] + 1 == field
