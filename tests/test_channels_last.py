"""Training with channels last: the same numbers, within what bfloat16 rounds."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldmkit.autoencoder.autoencoder import Autoencoder
from ldmkit.autoencoder_configs import AutoencoderConfig
from ldmkit.networks import blocks, channels_last
from ldmkit.networks.blocks import SpatialAttention
from ldmkit.networks.channels_last import CHANNELS_LAST, activated, is_channels_last, laid_out

SIDE = 32
"""Of a map that is large enough."""


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def error(found, right):
    return float((found.double() - right.double()).norm() / right.double().norm())


def layers_and_gradients(norm, x, slope):
    """SiLU of the norm, and the gradients of input, weight and bias."""
    norm, x = copy.deepcopy(norm), x.clone(memory_format=torch.preserve_format).requires_grad_()
    result = activated(norm, x)
    result.backward(slope.to(result))
    return [result.detach(), x.grad, norm.weight.grad, norm.bias.grad]


@pytest.mark.parametrize("groups", [1, 4, 16])
@pytest.mark.parametrize("offset", [0.0, 4.0])
@pytest.mark.parametrize("shape", [(1, 16, 32, 32), (3, 16, 40, 33)])
def test_gradients_are_those_of_float64(groups, offset, shape):
    norm = nn.GroupNorm(groups, 16, eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(1.0 + 0.5 * drawn(16))
        norm.bias.copy_(0.5 * drawn(16))
    x = (drawn(*shape) + offset * drawn(1, 16, 1, 1)).bfloat16()
    slope = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    right = layers_and_gradients(copy.deepcopy(norm).double(), x.double(), slope)
    found = layers_and_gradients(norm, x.contiguous(memory_format=CHANNELS_LAST), slope)
    assert is_channels_last(found[0])
    assert is_channels_last(found[1])
    for one, wanted in zip(found, right, strict=True):
        assert error(one, wanted) < 0.01
    if offset == 0.0:  # as near as torch's own in bfloat16, nearly
        plain = layers_and_gradients(norm, x, slope)
        for one, other, wanted in zip(found, plain, right, strict=True):
            assert error(one, wanted) < 3.0 * error(other, wanted)


def test_the_gradient_may_lie_otherwise_and_be_asked_for_twice():
    norm, x = nn.GroupNorm(4, 16), drawn(2, 16, SIDE, SIDE).bfloat16()
    x = x.contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    slope = drawn(2, 16, SIDE, SIDE).bfloat16()
    result = activated(norm, x)
    (first,) = torch.autograd.grad(result, x, slope, retain_graph=True)
    (again,) = torch.autograd.grad(result, x, slope.contiguous(memory_format=CHANNELS_LAST))
    assert torch.equal(first, again)


def test_only_the_input_is_kept():
    norm, x = nn.GroupNorm(4, 16), drawn(2, 16, SIDE, SIDE).bfloat16()
    kept = []
    for given in (x, x.contiguous(memory_format=CHANNELS_LAST)):
        given.requires_grad_()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda one, sizes=sizes: sizes.append(one.numel()), lambda none: none
        ):
            activated(norm, given)
        kept.append(sum(size == x.numel() for size in sizes))
    assert kept == [2, 1]


@pytest.mark.parametrize(
    ("side", "dtype", "learns", "last"),
    [
        (SIDE, torch.bfloat16, True, True),
        (SIDE - 1, torch.bfloat16, True, False),
        (SIDE, torch.float32, True, False),
        (SIDE, torch.bfloat16, False, False),
    ],
)
def test_large_maps_in_bfloat16_that_learn_are_laid_out_so(side, dtype, learns, last):
    x = drawn(2, 16, side, side).to(dtype)
    with torch.set_grad_enabled(learns):
        assert is_channels_last(laid_out(x)) is last
        assert torch.equal(laid_out(x), x)
    small = drawn(2, 16, 8, 8).to(dtype).contiguous(memory_format=CHANNELS_LAST)
    with torch.set_grad_enabled(learns):
        assert is_channels_last(laid_out(small)) is not (learns and dtype == torch.bfloat16)


def slopes(model, images, *, low):
    model = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        posterior = model.encode(images)
        loss = F.mse_loss(model.decode(posterior.mean).float(), images)
    loss.backward()
    return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])


@pytest.mark.parametrize("attends", [(), (1,), (2,)])
def test_an_autoencoder_learns_the_same(attends, monkeypatch):
    torch.manual_seed(0)
    config = AutoencoderConfig(
        channels=16, multipliers=(1, 2, 2), residual_blocks=1, attention_factors=attends
    )
    model, images = Autoencoder(config, 3), 0.5 * drawn(2, 3, 64, 64)
    used = []
    apply = channels_last._GroupNormSiLU.apply
    monkeypatch.setattr(
        channels_last._GroupNormSiLU, "apply", lambda *given: used.append(1) or apply(*given)
    )
    right, found = (slopes(model, images, low=low) for low in (False, True))
    assert len(used) >= 5
    monkeypatch.setattr(channels_last, "FAST_PIXELS", 1 << 62)
    count = len(used)
    plain = slopes(model, images, low=True)
    assert len(used) == count  # nothing of it
    assert error(found, right) < 1.5 * error(plain, right) < 0.2


def test_attention_behind_such_a_map_has_its_own_layout():
    layer = SpatialAttention(16, norm=blocks.Norm(4, 1e-6), zero_init=False)
    x = drawn(2, 16, SIDE, SIDE)
    torch.testing.assert_close(
        layer(x.contiguous(memory_format=CHANNELS_LAST)), layer(x), rtol=1e-5, atol=1e-5
    )
