"""The peers' work as a plain loop, as their users write it: a step under one of the settings.

Settings, joined by `+`: fp32, amp (fp32 weights under bf16 autocast), bf16 (weights and inputs), cl
(channels-last), fused (AdamW), compile (torch.compile).
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from clock import Number
from peers import (
    AUTOENCODERS,
    UNETS,
    Autoencoding,
    Predicting,
    lpips_distance,
)
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn
from workloads import (
    ADVERSARIAL_WEIGHT,
    GUIDANCE,
    KL_WEIGHT,
    LEARNING_RATE,
    SAMPLING_STEPS,
    WEIGHT_DECAY,
    Workload,
)

from ldmkit.autoencoder.discriminator import PatchDiscriminator
from ldmkit.autoencoder_configs import DiscriminatorConfig

SETTINGS = {"fp32", "amp", "bf16", "cl", "fused", "compile"}
TIMESTEPS = 1000
DECAY = 0.9999
"""Of the average of the U-Net's weights."""
MAX_ADAPTIVE = 1e4


class Prepared(NamedTuple):
    """A case ready to run."""

    step: Callable[[], object]
    parameters: int
    """Of the autoencoder or U-Net."""
    number: Number
    """What it computes in."""
    same: bool
    """Whether the network has the architecture of the others."""
    trained: tuple[nn.Module, ...] = ()
    """What each step has to give gradients to."""


class Setting(NamedTuple):
    """How a peer computes."""

    parts: frozenset[str]
    device: str

    @property
    def number(self) -> Number:
        """Of the matrix products."""
        return "bf16" if self.parts & {"amp", "bf16"} else "fp32"

    @property
    def layout(self) -> torch.memory_format:
        """Of maps and weights."""
        return torch.channels_last if "cl" in self.parts else torch.contiguous_format

    def context(self) -> AbstractContextManager[object]:
        """What a forward pass runs in."""
        if "amp" in self.parts:
            return torch.autocast(self.device, dtype=torch.bfloat16)
        return nullcontext()

    def module(self, module: nn.Module) -> nn.Module:
        """A module with its weights so."""
        dtype = torch.bfloat16 if "bf16" in self.parts else torch.float32
        module = module.to(self.device, dtype)
        return module.to(memory_format=self.layout)  # pyright: ignore[reportCallIssue]

    def values(self, values: Tensor) -> Tensor:
        """Inputs so."""
        values = values.to(torch.bfloat16) if "bf16" in self.parts else values
        return values.contiguous(memory_format=self.layout) if values.ndim == 4 else values

    def function(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A network's function, compiled if it is to be."""
        return torch.compile(function, dynamic=False) if "compile" in self.parts else function

    def optimizer(self, weights: Iterable[nn.Parameter]) -> Optimizer:
        """AdamW; without `fused` as torch chooses."""
        fused = True if "fused" in self.parts else None
        return AdamW(weights, LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=fused)


def setting_of(text: str, device: str) -> Setting:
    """A setting by its name.

    Raises:
        SystemExit: a part of it is unknown.
    """
    parts = frozenset(text.split("+"))
    if unknown := parts - SETTINGS:
        raise SystemExit(
            f"{text}: no setting {sorted(unknown)[0]}; take {', '.join(sorted(SETTINGS))}"
        )
    return Setting(parts, device)


def train_autoencoder(network: Autoencoding, setting: Setting, workload: Workload) -> Prepared:
    """L1 and KL, AdamW."""
    module = setting.module(network.module).train()
    images = setting.values(workload.images(setting.device))
    encode, decode = setting.function(network.encode), setting.function(network.decode)
    optimizer = setting.optimizer(module.parameters())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with setting.context():
            made, penalty = _reconstructed(encode, decode, images)
            loss = (made - images).abs().mean() + KL_WEIGHT * penalty
        loss.backward()
        optimizer.step()

    return _prepared(step, module, setting, same=network.same, trained=(module,))


def train_with_adversary(network: Autoencoding, setting: Setting, workload: Workload) -> Prepared:
    """L1, the lpips package, KL and a patch discriminator with its adaptive weight (Esser et al. 2021)."""
    device = setting.device
    module = setting.module(network.module).train()
    judge = setting.module(PatchDiscriminator(3, DiscriminatorConfig())).train()
    distance = setting.module(lpips_distance())
    images = setting.values(workload.images(device))
    optimizers = [setting.optimizer(module.parameters()), setting.optimizer(judge.parameters())]

    def step() -> None:
        judge.requires_grad_(False)
        optimizers[0].zero_grad(set_to_none=True)
        with setting.context():
            made, penalty = _reconstructed(network.encode, network.decode, images)
            values = images[0].numel()
            near = values * ((made - images).abs().mean() + distance(images, made).mean())
            fooled = -judge(made).mean()
        norms = [
            torch.autograd.grad(term, network.last_layer, retain_graph=True)[0].float().norm()
            for term in (near, fooled)
        ]
        adaptive = (norms[0] / (norms[1] + 1e-4)).clamp(0.0, MAX_ADAPTIVE)
        (near + ADVERSARIAL_WEIGHT * adaptive * fooled + KL_WEIGHT * penalty).backward()
        optimizers[0].step()
        judge.requires_grad_(True)
        optimizers[1].zero_grad(set_to_none=True)
        with setting.context():
            real, fake = judge(images), judge(made.detach())
            loss = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
        loss.backward()
        optimizers[1].step()

    return _prepared(step, module, setting, same=network.same, trained=(module, judge))


def encode(network: Autoencoding, setting: Setting, workload: Workload) -> Prepared:
    """Pictures to the posterior's moments."""
    module = setting.module(network.module).eval()
    images = setting.values(workload.images(setting.device))
    function = setting.function(network.encode)
    return _prepared(
        _without_gradients(setting, function, images), module, setting, same=network.same
    )


def decode(network: Autoencoding, setting: Setting, workload: Workload) -> Prepared:
    """Latents to pictures."""
    module = setting.module(network.module).eval()
    latents = setting.values(workload.latents(setting.device))
    function = setting.function(network.decode)
    step = _without_gradients(setting, function, latents)
    return _prepared(step, module, setting, same=network.same)


def train_unet(network: Predicting, setting: Setting, workload: Workload) -> Prepared:
    """The noise's mean squared error, norm of the gradient, AdamW, average of the weights, as ours does."""
    device = setting.device
    module = setting.module(network.module).train()
    predict = setting.function(network.predict)
    clean = setting.values(workload.latents(device))
    tokens = setting.values(workload.context(device)) if workload.attends else None
    weights: list[Tensor] = [*module.parameters()]
    optimizer = setting.optimizer(module.parameters())
    average = [weight.detach().clone() for weight in weights]
    update_average = get_ema_multi_avg_fn(DECAY)
    kept = _kept_signal(device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        times = torch.randint(TIMESTEPS, (workload.batch,), device=device)
        noise = torch.randn_like(clean)
        share = kept[times].view(-1, 1, 1, 1).to(clean.dtype)
        noisy = share.sqrt() * clean + (1 - share).sqrt() * noise
        with setting.context():
            loss = F.mse_loss(predict(noisy, times, tokens).float(), noise.float())
        loss.backward()
        norm = nn.utils.get_total_norm(x.grad for x in weights if x.grad is not None)
        if not norm.isfinite():
            return
        optimizer.step()
        with torch.no_grad():
            update_average(average, weights, 1)

    return _prepared(step, module, setting, same=network.same, trained=(module,))


def sample(network: Predicting, setting: Setting, workload: Workload) -> Prepared:
    """DDIM (Song et al. 2021, Eq. 12) with guidance in one doubled batch."""
    device = setting.device
    module = setting.module(network.module).eval()
    predict = setting.function(network.predict)
    start = setting.values(workload.latents(device))
    tokens = setting.values(workload.context(device))
    both = torch.cat([torch.zeros_like(tokens), tokens])
    kept = torch.cat([_kept_signal(device), torch.ones(1, device=device)])
    times = torch.linspace(TIMESTEPS - 1, 0, SAMPLING_STEPS).round().int().tolist()

    @torch.no_grad()
    def step() -> Tensor:
        x = start
        for time, following in zip(times, [*times[1:], TIMESTEPS], strict=True):
            now = torch.full((2 * len(x),), time, device=device)
            with setting.context():
                without, told = predict(torch.cat([x, x]), now, both).chunk(2)
            noise = without + GUIDANCE * (told - without)
            clean = (x - (1 - kept[time]).sqrt() * noise) / kept[time].sqrt()
            x = (kept[following].sqrt() * clean + (1 - kept[following]).sqrt() * noise).to(x.dtype)
        return x

    return _prepared(step, module, setting, same=network.same)


def prepare(workload: Workload, peer: str, text: str, device: str) -> Prepared:
    """A peer at its work under a setting.

    Raises:
        SystemExit: there is no such peer or setting, or its package is not installed.
    """
    setting = setting_of(text, device)
    torch.manual_seed(0)
    known = UNETS if workload.second_stage else AUTOENCODERS
    if peer not in known:
        raise SystemExit(f"{peer} has nothing for {workload.kind}; take {', '.join(known)}")
    if workload.second_stage:
        unet = UNETS[peer](workload.sizes, attends=workload.attends)
        return (train_unet if workload.kind == "unet-train" else sample)(unet, setting, workload)
    return FIRST_STAGE[workload.kind](AUTOENCODERS[peer](workload.sizes), setting, workload)


def _reconstructed(
    encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], images: Tensor
) -> tuple[Tensor, Tensor]:
    """Reconstructions from drawn latents, and the KL divergence of a picture."""
    mean, log_variance = encode(images).float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-30.0, 20.0)
    latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)
    return decode(latents.to(images.dtype)), divergence.sum(dim=(1, 2, 3)).mean()


def _without_gradients(
    setting: Setting, function: Callable[..., Tensor], values: Tensor
) -> Callable[[], Tensor]:
    @torch.no_grad()
    def step() -> Tensor:
        with setting.context():
            return function(values)

    return step


def _kept_signal(device: str) -> Tensor:
    """Share of the signal's variance at each time, "linear" in sqrt(beta) (Rombach et al. 2022)."""
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, TIMESTEPS, dtype=torch.float64).square()
    return (1 - betas).cumprod(0).float().to(device)


def _prepared(
    step: Callable[[], object],
    module: nn.Module,
    setting: Setting,
    *,
    same: bool,
    trained: tuple[nn.Module, ...] = (),
) -> Prepared:
    count = sum(weight.numel() for weight in module.parameters())
    return Prepared(step, count, setting.number, same, trained)


FIRST_STAGE: dict[str, Callable[[Autoencoding, Setting, Workload], Prepared]] = {
    "ae-train": train_autoencoder,
    "ae-train-gan": train_with_adversary,
    "encode": encode,
    "decode": decode,
}
