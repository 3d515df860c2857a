"""The patch discriminator and the adversarial losses (Isola et al. 2017; Esser et al. 2021)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ldmkit.tensors import Images, Scalar

Logits = Float[Tensor, "batch 1 y x"]
MAX_ADAPTIVE_WEIGHT = 1e4


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches: 4x4 convolutions, BatchNorm, LeakyReLU 0.2 (Isola et al. 2017).

    Args:
        image_channels: of the pictures.
        channels: of the first layer; doubled by each further one up to eight times.
        layers: strided layers; 3 makes patches of 70 x 70 pixels. Small pictures want 1 or 2.
    """

    def __init__(self, image_channels: int, *, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [channels * min(2**level, 8) for level in range(layers + 1)]
        stages: list[nn.Module] = [nn.Conv2d(image_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for level in range(1, layers + 1):
            stride = 2 if level < layers else 1
            stages += [
                nn.Conv2d(widths[level - 1], widths[level], 4, stride, 1, bias=False),
                nn.BatchNorm2d(widths[level]),
                nn.LeakyReLU(0.2),
            ]
        stages.append(nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.stages = nn.Sequential(*stages)
        self.apply(_initialise)

    def forward(self, images: Images) -> Logits:
        """One logit for each patch; positive means "real"."""
        return self.stages(images)


def adversarial_loss(fake_logits: Logits) -> Scalar:
    """What the decoder minimises: minus the mean logit of its pictures."""
    return -fake_logits.float().mean()


def discriminator_loss(real_logits: Logits, fake_logits: Logits) -> Scalar:
    """Hinge loss: 1/2 (mean relu(1 - real) + mean relu(1 + fake)) (Lim and Ye 2017)."""
    real = F.relu(1.0 - real_logits.float()).mean()
    fake = F.relu(1.0 + fake_logits.float()).mean()
    return 0.5 * (real + fake)


def adaptive_weight(reconstruction: Scalar, adversarial: Scalar, last_layer: Tensor) -> Scalar:
    """Balance of the two losses at the decoder's last layer (Esser et al. 2021, Eq. 7).

    ||d reconstruction / d W|| / (||d adversarial / d W|| + 1e-4), clamped to [0, 1e4], no gradient.

    Args:
        reconstruction: the loss without KL and adversarial terms; its graph is kept.
        adversarial: the adversarial loss; its graph is kept.
        last_layer: the weight W of the decoder's last convolution.
    """
    pull = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)[0].norm()
    push = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0].norm()
    return (pull / (push + 1e-4)).clamp(0.0, MAX_ADAPTIVE_WEIGHT).detach()


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
