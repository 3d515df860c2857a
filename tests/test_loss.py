import math

import pytest
import torch

from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder.discriminator import PatchDiscriminator, adversarial_loss
from ldmkit.autoencoder.loss import (
    Adversary,
    ReconstructionLoss,
    frequency_distance,
    pixel_distance,
    where_valid,
)
from ldmkit.autoencoder.perceptual import box_distance
from ldmkit.autoencoder.posterior import GaussianPosterior
from ldmkit.autoencoder_configs import (
    AutoencoderConfig,
    AutoencoderLossConfig,
    CodebookConfig,
    DiscriminatorConfig,
)

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
TINY = AutoencoderConfig(channels=8, multipliers=(1, 2), residual_blocks=1, norm_groups=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Autoencoder(TINY, 3)


@pytest.fixture
def quantized_model():
    torch.manual_seed(0)
    settings = {"bottleneck": "vq", "codebook": CodebookConfig(size=5)}
    return Autoencoder(TINY.model_copy(update=settings), 3)


@pytest.fixture
def adversary(model):
    torch.manual_seed(1)
    discriminator = PatchDiscriminator(3, DiscriminatorConfig(channels=8, layers=1))
    return Adversary(discriminator, 0.3, model.last_layer, 1e4)


def terms_of(model, config, *, adversary=None, perceptual=None):
    posterior = model.encode(IMAGES)
    reconstructions = model.decode(posterior.sample(torch.zeros_like))
    loss = ReconstructionLoss(config, perceptual)
    return loss(IMAGES, reconstructions, posterior, adversary=adversary)


def test_the_total_is_the_papers_sum(model, adversary):
    """By hand on the same tensors: sums over a picture's values, means over the batch."""
    config = AutoencoderLossConfig(kl_weight=0.1, perceptual_weight=0.7)
    perceptual = box_distance()
    terms = terms_of(model, config, adversary=adversary, perceptual=perceptual)

    posterior = model.encode(IMAGES)
    reconstructions = model.decode(posterior.mean)
    distance = perceptual(IMAGES, reconstructions).view(2, 1, 1, 1)
    nll = ((IMAGES - reconstructions).abs() + 0.7 * distance).sum() / 2
    g = -adversary.discriminator(reconstructions).mean()
    last = model.decoder.conv_out.weight
    pull, push = (torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (nll, g))
    weight = pull / (push + 1e-4)
    kl = 0.5 * (posterior.mean.square() + posterior.std.square() - 1 - 2 * posterior.std.log())
    expected = nll + 0.1 * kl.sum() / 2 + 0.3 * weight * g
    assert torch.allclose(terms.adaptive, weight, rtol=1e-4)
    assert torch.allclose(terms.total, expected, rtol=1e-4)


def test_the_total_with_a_codebook_is_the_papers_mean(quantized_model):
    """Esser et al. 2021, Eq. 4: means over all values, and the codebook's loss beside them."""
    terms = terms_of(quantized_model, AutoencoderLossConfig(codebook_weight=2.0))
    z = quantized_model.encode(IMAGES).mean
    distances = (z.movedim(1, -1)[..., None, :] - quantized_model.codebook.codes).square().sum(-1)
    codes = quantized_model.codebook.codes[distances.argmin(-1)].movedim(-1, 1)
    squares = (z - codes).square().mean()
    pixel = (IMAGES - quantized_model.decode(z)).abs().mean()
    assert torch.allclose(terms.total, pixel + 2.0 * (squares + 0.25 * squares), rtol=1e-5)


def test_pixel_and_frequency_distances_by_hand():
    x, y = torch.zeros(1, 1, 2, 2), torch.tensor([[1.0, -3.0], [0.0, 2.0]]).view(1, 1, 2, 2)
    assert pixel_distance(x, y, "l1").item() == 1.5
    assert pixel_distance(x, y, "l2").item() == 3.5
    # the orthonormal 2 x 2 FFT of y is [[0, 1], [-4... halves of sums and differences
    amplitudes = torch.tensor([[0.0, 2.0], [-4.0, 6.0]]).abs() / 2
    assert frequency_distance(x, y).item() == pytest.approx(amplitudes.square().mean().item())
    shifted = torch.roll(y, 1, dims=3)
    assert frequency_distance(y, shifted).item() == pytest.approx(0.0, abs=1e-12)


def test_a_learned_variance_divides_the_loss_and_finds_its_optimum(model):
    config = AutoencoderLossConfig(learn_variance=True, kl_weight=0.0)
    loss = ReconstructionLoss(config, None)
    posterior = model.encode(IMAGES)
    reconstructions = model.decode(posterior.mean).detach()
    error = pixel_distance(IMAGES, reconstructions, "l1").item()
    with torch.no_grad():
        loss.log_variance.fill_(math.log(error))
    terms = loss(IMAGES, reconstructions, posterior)
    assert terms.total.item() == pytest.approx(IMAGES[0].numel() * (1 + math.log(error)), rel=1e-5)
    terms.total.backward()  # r / e^s + s is least where e^s = r
    assert loss.log_variance.grad is not None
    assert loss.log_variance.grad.item() == pytest.approx(0.0, abs=1e-3)
    fixed = ReconstructionLoss(AutoencoderLossConfig(), None)
    assert not fixed.log_variance.requires_grad


@pytest.mark.parametrize(
    "term", ["pixel", "perceptual", "frequency", "regularization", "adversarial"]
)
def test_the_gradient_of_each_term_reaches_where_it_should(term, model, adversary):
    """The defect of other trainers: a term computed without gradient trains nothing, silently."""
    config = AutoencoderLossConfig(frequency_weight=1.0)
    terms = terms_of(model, config, adversary=adversary, perceptual=box_distance())
    getattr(terms, term).backward()
    encoder = model.encoder.conv_in.weight.grad
    decoder = model.decoder.conv_in.weight.grad
    assert encoder is not None
    assert encoder.abs().sum() > 0
    if term == "regularization":
        assert decoder is None  # the posterior lies before the decoder
    else:
        assert decoder is not None
        assert decoder.abs().sum() > 0


def test_the_codebooks_loss_reaches_codes_and_encoder_but_not_the_decoder(quantized_model):
    terms_of(quantized_model, AutoencoderLossConfig()).regularization.backward()
    assert quantized_model.codebook.codes.grad.abs().sum() > 0
    assert quantized_model.encoder.conv_in.weight.grad.abs().sum() > 0
    assert quantized_model.decoder.conv_in.weight.grad is None


def test_pixels_pass_straight_through_the_codebook_but_not_into_the_codes(quantized_model):
    terms_of(quantized_model, AutoencoderLossConfig()).pixel.backward()
    assert quantized_model.encoder.conv_in.weight.grad.abs().sum() > 0
    assert quantized_model.codebook.codes.grad is None


def test_before_its_start_the_discriminator_is_not_even_asked(model):
    terms = terms_of(model, AutoencoderLossConfig())
    assert terms.adversarial == terms.adaptive == 0
    pixels = IMAGES[0].numel()
    assert torch.allclose(terms.total, pixels * terms.pixel + 1e-6 * terms.regularization)


@pytest.mark.parametrize("reconstruction", ["l1", "l2"])
def test_pixels_that_do_not_count_count_in_no_term(model, adversary, reconstruction):
    """Whatever stands there, in the picture or its reconstruction, nothing changes."""
    valid = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(3)) > 0.3
    config = AutoencoderLossConfig(frequency_weight=1.0, reconstruction=reconstruction)
    loss = ReconstructionLoss(config, box_distance())
    posterior = GaussianPosterior(torch.zeros(2, 8, 8, 8))
    base = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(4)) * 2 - 1
    adversary.discriminator.eval()
    found = []
    for spoil in (0.0, 0.5, 37.0):
        made = torch.where(valid, base, base + spoil).requires_grad_()
        shown = where_valid(IMAGES, made, valid)
        terms = loss(IMAGES, shown, posterior, valid=valid)
        terms = terms._replace(adversarial=adversarial_loss(adversary.discriminator(shown)))
        (terms.total + terms.adversarial).backward()
        assert made.grad is not None
        assert (made.grad[~valid.expand_as(made)] == 0).all()
        assert (made.grad[valid.expand_as(made)] != 0).float().mean() > 0.9
        found.append(torch.stack([term.detach() for term in terms]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    difference = (IMAGES - base)[valid.expand_as(base)]
    by_hand = difference.abs().mean() if reconstruction == "l1" else difference.square().mean()
    assert found[0][1].item() == pytest.approx(by_hand.item(), rel=1e-5)
