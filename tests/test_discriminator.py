import pytest
import torch
from torch import nn

from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder.discriminator import (
    ActNorm,
    PatchDiscriminator,
    accuracy,
    adaptive_weight,
    adversarial_loss,
    gradient_penalty,
    hinge_loss,
    vanilla_loss,
)
from ldmkit.autoencoder_configs import AutoencoderConfig, DiscriminatorConfig

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
REAL = torch.tensor([2.0, 0.5, -1.0]).view(3, 1, 1, 1)
FAKE = torch.tensor([-3.0, 0.0, 0.5]).view(3, 1, 1, 1)


def discriminator(channels=3, **settings):
    torch.manual_seed(0)
    return PatchDiscriminator(channels, DiscriminatorConfig(channels=8, **settings))


def test_adversarial_losses_by_hand():
    # relu(1 - real) = 0, .5, 2; relu(1 + fake) = 0, 1, 1.5
    assert hinge_loss(REAL, FAKE).item() == pytest.approx(0.5 * (2.5 / 3 + 2.5 / 3))
    assert adversarial_loss(FAKE).item() == pytest.approx(2.5 / 3)
    # log(1 + e^x) at -2, -.5, 1 and at -3, 0, .5
    real, fake = 0.126928 + 0.474077 + 1.313262, 0.048587 + 0.693147 + 0.974077
    assert vanilla_loss(REAL, FAKE).item() == pytest.approx(0.5 * (real + fake) / 3, rel=1e-5)
    assert accuracy(REAL, FAKE).item() == pytest.approx(0.5 * (2 / 3 + 1 / 3))


def test_the_adaptive_weight_is_clamped_and_carries_no_gradient():
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    pull, push = (w * torch.tensor([6.0, 8.0])).sum(), (w * torch.tensor([0.0, 2.0])).sum()
    weight = adaptive_weight(pull, push, w, 1e4)
    assert weight.item() == pytest.approx(10.0 / (2.0 + 1e-4))
    assert not weight.requires_grad
    assert adaptive_weight((1e9 * w).sum(), (w * 1.0).sum(), w, 1e4).item() == 1e4
    assert adaptive_weight((1e9 * w).sum(), (w * 1.0).sum(), w, 7.0).item() == 7.0


@pytest.mark.parametrize(("layers", "field"), [(1, 16), (2, 34), (3, 70), (4, 142)])
def test_the_patch_size_is_the_one_stated(layers, field):
    """A logit depends on `field` x `field` pixels (Isola et al. 2017, App. 6.1.2)."""
    network = discriminator(1, layers=layers).eval()
    images = torch.rand(1, 1, 256, 256, requires_grad=True)
    logits = network(images)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert images.grad is not None
    touched = images.grad[0, 0].abs().sum(0).nonzero().flatten()
    assert touched[-1] - touched[0] + 1 == field


def test_its_loss_leaves_the_generator_alone():
    """The defect of other trainers: reconstructions that still carry a graph in the second step."""
    torch.manual_seed(0)
    config = AutoencoderConfig(channels=8, multipliers=(1, 2), residual_blocks=1)
    model, network = Autoencoder(config, 3), discriminator(layers=1)
    reconstructions = model.decode(model.encode(IMAGES).mean)
    hinge_loss(network(IMAGES), network(reconstructions.detach())).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        ("batch", nn.BatchNorm2d),
        ("sync-batch", nn.SyncBatchNorm),
        ("group", nn.GroupNorm),
        ("act", ActNorm),
    ],
)
def test_each_normalisation_is_there_and_judges(norm, kind):
    network = discriminator(norm=norm, layers=2)
    assert sum(isinstance(module, kind) for module in network.modules()) == 2
    assert network(IMAGES).isfinite().all()


def test_actnorm_is_set_by_its_first_batch_only(generator):
    layer = ActNorm(3)
    x = torch.randn(8, 3, 5, 5, generator=generator) * 4 + 2
    y = layer(x)
    assert torch.allclose(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(y.std((0, 2, 3)), torch.ones(3), atol=1e-4)
    assert torch.equal(layer(x * 2), (x * 2 + layer.shift) * layer.scale)
    restored = ActNorm(3)
    restored.load_state_dict(layer.state_dict())  # a resumed run must not be set anew
    assert torch.equal(restored(x * 3), layer(x * 3))


def test_spectral_norm_bounds_every_layer():
    network = discriminator(spectral_norm=True, layers=2, norm="group")
    for _ in range(30):
        network(IMAGES)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            largest = torch.linalg.matrix_norm(module.weight.flatten(1), ord=2)
            assert largest.item() == pytest.approx(1.0, rel=0.05)


def test_the_gradient_penalty_by_hand():
    """D(x) = sum of w x, so that the gradient is w everywhere: half its squared norm."""
    linear = nn.Conv2d(1, 1, 2, bias=False)
    penalty = gradient_penalty(linear, torch.zeros(3, 1, 2, 2))
    assert penalty.item() == pytest.approx(0.5 * linear.weight.square().sum().item(), rel=1e-5)
    penalty.backward()
    assert linear.weight.grad is not None
    assert torch.allclose(linear.weight.grad, linear.weight)


@pytest.mark.parametrize(
    ("start", "step"),
    [
        ("50001", 50001),
        (7, 7),
        ("600000images", 37500),
        ("601 images", 38),
        ("40%", 80000),
        ("0.5%", 1000),
    ],
)
def test_the_start_in_steps_images_and_percent(start, step):
    assert DiscriminatorConfig(start=start).start_step(200_000, 16) == step


@pytest.mark.parametrize("start", ["", "soon", "-3", "40 %%", "1.5", "3 epochs"])
def test_other_units_are_refused(start):
    with pytest.raises(ValueError, match="start"):
        DiscriminatorConfig(start=start)
