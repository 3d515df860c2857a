"""AdamW whose two moments take a byte for each weight (Dettmers et al. 2022, "8-bit optimizers via block-wise quantization").

A block of 256 numbers is divided by its largest one, and of each the nearest of 256 values is kept, which lie
dense around zero: one to seven decimal orders below the largest, each order with twice as many as the one below.
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ldmkit.tensors import Scalar

BLOCK = 256
LEAST = 4096
"""Weights in a tensor; smaller ones, such as norms and biases, keep moments in float32."""
CHUNK = 1 << 20
"""Numbers that are computed at once, which bounds the memory."""
ORDERS = 7
MOMENTS = ("exp_avg", "exp_avg_sq")

Flat = Float[Tensor, " count"]
Codes = UInt8[Tensor, " count"]
Scales = Float[Tensor, " blocks"]


@cache
def values_of(*, signed: bool) -> Float[Tensor, "256"]:
    """The numbers that a byte stands for, in order: dynamic tree quantization (Dettmers 2016).

    Each order of ten is divided evenly, the lower end left out, and the middles of its parts are the values.

    Args:
        signed: of -1 to 1; else of 0 to 1, twice as fine.
    """
    found = [torch.tensor([0.0, 1.0])]
    for order in range(ORDERS):
        parts = 2**order if signed else 2 ** (order + 1)
        ends = torch.linspace(0.1, 1.0, parts + 1, dtype=torch.float64)
        middles = (ends[1:] + ends[:-1]) / 2 * 10.0 ** (order - ORDERS + 1)
        found += [middles.float(), *([-middles.float()] if signed else [])]
    return torch.cat(found).sort().values


@cache
def _nearest(*, signed: bool) -> UInt8[Tensor, "65536"]:
    """The byte for each number in float16, at 32,768 more than its bits as a signed integer.

    Looked up in one step, ten times as fast on the CPU as a search; float16 is finer than bytes are.
    """
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    values = values_of(signed=signed)
    middles = (values[1:] + values[:-1]) / 2
    return torch.bucketize(bits.view(torch.float16).float(), middles).to(torch.uint8)


class AdamW8bit(Optimizer):
    """AdamW (Loshchilov and Hutter 2019) that keeps moments as bytes.

    Args:
        params: as other optimizers take them.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second one.

    `found_inf`, 0 or 1, may be set before a step: with 1 it changes nothing, and nobody waits for the device.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.found_inf: Scalar | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move the weights that have a gradient; no closure is called."""
        del closure
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As other optimizers, but bytes stay bytes, which torch makes numbers of the weights' kind."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in MOMENTS:
                if f"{name}_scale" in state:
                    state[name] = state[name].to(torch.uint8)

    def _move(self, weight: Parameter, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state.update(_fresh(weight))
        found = self.found_inf
        state["step"] += 1.0 if found is None else 1.0 - found
        corrections = [1.0 - beta ** state["step"] for beta in group["betas"]]
        flat, slope = weight.view(-1), weight.grad.reshape(-1)  # pyright: ignore[reportOptionalMemberAccess]
        for first in range(0, weight.numel(), CHUNK):
            part = slice(first, first + CHUNK)
            moments = [_read(state, name, part) for name in MOMENTS]
            new = _stepped(flat[part], slope[part].float(), moments, corrections, group)
            _put(flat[part], new[0], found)
            for name, one in zip(MOMENTS, new[1:], strict=True):
                _write(state, name, part, one, found)


def _stepped(
    values: Flat,
    slope: Flat,
    moments: list[Flat],
    corrections: list[Tensor],
    group: dict[str, Any],
) -> list[Flat]:
    """Weights and moments after a step."""
    rate, (beta1, beta2) = group["lr"], group["betas"]
    first = moments[0].lerp(slope, 1.0 - beta1)
    second = (beta2 * moments[1]).addcmul_(slope, slope, value=1.0 - beta2)
    size = (second / corrections[1]).sqrt_().add_(group["eps"])
    decayed = values * (1.0 - rate * group["weight_decay"])
    return [decayed.sub_(rate / corrections[0] * (first / size)), first, second]


def _fresh(weight: Parameter) -> dict[str, Tensor]:
    count = weight.numel()
    state = {"step": torch.zeros((), device=weight.device)}
    for name, zero in zip(MOMENTS, map(_zero_code, (True, False)), strict=True):
        if count < LEAST:
            state[name] = torch.zeros_like(weight, dtype=torch.float32)
        else:
            state[name] = torch.full((count,), zero, dtype=torch.uint8, device=weight.device)
            blocks = -(-count // BLOCK)
            state[f"{name}_scale"] = torch.zeros(blocks, device=weight.device)
    return state


def _zero_code(signed: bool) -> int:
    return int((values_of(signed=signed) == 0.0).nonzero())


def _read(state: dict[str, Tensor], name: str, part: slice) -> Flat:
    """A part of a moment as numbers."""
    if f"{name}_scale" not in state:
        return state[name].view(-1)[part]
    scales = state[f"{name}_scale"][part.start // BLOCK : part.stop // BLOCK]
    return unpacked(state[name][part], scales, signed=name == "exp_avg")


def _write(
    state: dict[str, Tensor], name: str, part: slice, moment: Flat, found: Scalar | None
) -> None:
    if f"{name}_scale" not in state:
        _put(state[name].view(-1)[part], moment, found)
        return
    codes, scales = packed(moment, signed=name == "exp_avg")
    _put(state[name][part], codes, found)
    blocks = slice(part.start // BLOCK, part.stop // BLOCK)
    _put(state[f"{name}_scale"][blocks], scales, found)


def _put(place: Tensor, new: Tensor, found: Scalar | None) -> None:
    """Into its place, unless 1 was found."""
    place.copy_(new if found is None else torch.where(found > 0, place, new))


def packed(numbers: Flat, *, signed: bool) -> tuple[Codes, Scales]:
    """Numbers as bytes and the largest of each block; not finite ones make their block so."""
    count = numbers.numel()
    blocks = F.pad(numbers, (0, -count % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    shares = blocks / scales.where(scales > 0, 1.0)[:, None]
    places = shares.half().view(torch.int16).int().view(-1)[:count] + 2**15
    return _nearest(signed=signed).to(numbers.device).index_select(0, places), scales


def unpacked(codes: Codes, scales: Scales, *, signed: bool) -> Flat:
    """The numbers that bytes stand for."""
    table = values_of(signed=signed).to(scales.device)
    count = codes.numel()
    shares = F.pad(table.index_select(0, codes.int()), (0, -count % BLOCK)).view(-1, BLOCK)
    return (shares * scales[:, None]).view(-1)[:count]
