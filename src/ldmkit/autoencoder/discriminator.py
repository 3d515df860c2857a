"""The patch discriminator and the adversarial losses (Isola et al. 2017; Esser et al. 2021)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ldmkit.autoencoder_configs import DiscriminatorConfig
from ldmkit.networks.blocks import Norm
from ldmkit.tensors import Images, Scalar
from ldmkit.training import ranks

Logits = Float[Tensor, "batch 1 y x"]
GROUPS = 32


class ActNorm(nn.Module):
    """A scale and a shift for each channel, set by the first batch to mean 0 and variance 1.

    (Kingma and Dhariwal 2018, Sec. 3.1.)

    Args:
        channels: of the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        """(x + shift) * scale, `[b, c, h, w]`."""
        ready = self.get_buffer("ready")
        if self.training and not ready:
            with torch.no_grad():
                # of several processes the first one's part counts, as the first of several parts does
                mean = ranks.from_first(x.float().mean((0, 2, 3)))
                std = ranks.from_first(x.float().std((0, 2, 3)))
                self.shift.copy_(-mean.view_as(self.shift))
                self.scale.copy_(1.0 / (std.view_as(self.scale) + 1e-6))
                ready.fill_(True)
        return (x + self.shift) * self.scale


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches: 4x4 convolutions, a norm, LeakyReLU 0.2 (Isola et al. 2017).

    Args:
        image_channels: of the pictures.
        config: width, layers, normalisation. 3 layers make patches of 70 x 70 pixels; small
            pictures want 1 or 2.
    """

    def __init__(self, image_channels: int, config: DiscriminatorConfig) -> None:
        super().__init__()
        norm = NORMS[config.norm]
        widths = [config.channels * min(2**level, 8) for level in range(config.layers + 1)]
        stages: list[nn.Module] = [
            nn.Conv2d(image_channels, config.channels, 4, 2, 1),
            nn.LeakyReLU(0.2),
        ]
        for level in range(1, config.layers + 1):
            stride = 2 if level < config.layers else 1
            stages += [
                nn.Conv2d(widths[level - 1], widths[level], 4, stride, 1, bias=False),
                norm(widths[level]),
                nn.LeakyReLU(0.2),
            ]
        stages.append(nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.stages = nn.Sequential(*stages)
        self.apply(_initialise)
        if config.spectral_norm:  # (Miyato et al. 2018)
            for stage in self.stages:
                if isinstance(stage, nn.Conv2d):
                    spectral_norm(stage)

    def forward(self, images: Images) -> Logits:
        """One logit for each patch; positive means "real"."""
        return self.stages(images)


def adversarial_loss(fake_logits: Logits) -> Scalar:
    """What the decoder minimises: minus the mean logit of its pictures."""
    return -fake_logits.float().mean()


def hinge_loss(real_logits: Logits, fake_logits: Logits) -> Scalar:
    """1/2 (mean relu(1 - real) + mean relu(1 + fake)) (Lim and Ye 2017)."""
    real = F.relu(1.0 - real_logits.float()).mean()
    fake = F.relu(1.0 + fake_logits.float()).mean()
    return 0.5 * (real + fake)


def vanilla_loss(real_logits: Logits, fake_logits: Logits) -> Scalar:
    """1/2 (mean softplus(-real) + mean softplus(fake)) (Goodfellow et al. 2014)."""
    real = F.softplus(-real_logits.float()).mean()
    fake = F.softplus(fake_logits.float()).mean()
    return 0.5 * (real + fake)


def accuracy(real_logits: Logits, fake_logits: Logits) -> Scalar:
    """Share of patches that are judged rightly, real and fake ones counting the same."""
    return 0.5 * ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean())


def gradient_penalty(discriminator: nn.Module, images: Images) -> Scalar:
    """R1: half the squared norm of d D(x) / d x, mean over real pictures (Mescheder et al. 2018)."""
    images = images.detach().requires_grad_(True)
    with torch.autocast(images.device.type, enabled=False):
        score = discriminator(images).sum()
    gradient = torch.autograd.grad(score, images, create_graph=True)[0]
    return 0.5 * gradient.square().sum() / len(images)


def adaptive_weight(
    reconstruction: Scalar, adversarial: Scalar, last_layer: Tensor, largest: float
) -> Scalar:
    """Balance of the two losses at the decoder's last layer (Esser et al. 2021, Eq. 7).

    ||d reconstruction / d W|| / (||d adversarial / d W|| + 1e-4), at most `largest`, no gradient.

    Args:
        reconstruction: the loss without regularising and adversarial terms; its graph is kept.
        adversarial: the adversarial loss; its graph is kept.
        last_layer: the weight W of the decoder's last convolution.
        largest: where the weight is clamped.
    """
    pull = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)[0].norm()
    push = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0].norm()
    return (pull / (push + 1e-4)).clamp(0.0, largest).detach()


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "sync-batch": nn.SyncBatchNorm,
    "group": Norm(GROUPS, 1e-6),
    "act": ActNorm,
}
DISCRIMINATOR_LOSSES: dict[str, Callable[[Logits, Logits], Scalar]] = {
    "hinge": hinge_loss,
    "vanilla": vanilla_loss,
}
