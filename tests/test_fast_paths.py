"""Faster ways to compute the same: each beside the plain one."""

import pytest
import torch
import torch.nn.functional as F

from ldmkit.networks.attention import MANY_PAIRS, attend
from ldmkit.networks.blocks import Upsample


def drawn(*shape, dtype=torch.float32):
    torch.manual_seed(sum(shape))
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (16, 77), (256, 256), (300, 300)])
def test_attention_in_bfloat16_is_as_near_to_float64_as_torchs(queries, keys):
    q, k, v = (drawn(2, 3, length, 8, dtype=torch.bfloat16) for length in (queries, keys, keys))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    theirs = (F.scaled_dot_product_attention(q, k, v) - exact).square().mean().sqrt()
    ours = (attend(q.requires_grad_(), k, v) - exact).square().mean().sqrt()
    assert ours <= 1.5 * theirs + 2e-3 * exact.square().mean().sqrt()


def test_attention_has_the_gradients_of_torchs():
    tensors = [drawn(2, 3, 24, 8, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    found = torch.autograd.grad(attend(*tensors).sum(), tensors)
    right = torch.autograd.grad(F.scaled_dot_product_attention(*exact).sum(), exact)
    for one, other in zip(found, right, strict=True):
        assert (one - other).norm() <= 0.02 * other.norm()


def test_attention_takes_matrix_products_only_where_they_win(monkeypatch):
    taken = []
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *args: (taken.append(len(args)), plain(*args))[1]
    )
    short, long = (drawn(1, 1, side, 4, dtype=torch.bfloat16) for side in (16, 257))
    assert long.shape[2] ** 2 > MANY_PAIRS
    attend(*[short.clone().requires_grad_()] * 3)
    assert not taken
    attend(short, short, short)  # no gradient
    attend(*[short.float().requires_grad_()] * 3)
    attend(*[long.clone().requires_grad_()] * 3)
    assert len(taken) == 3


@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("size", [(4, 4), (7, 5), (1, 16)])
def test_doubling_and_convolution_as_one(channels, size):
    layer, x = Upsample(channels), drawn(2, channels, *size)
    plain = layer.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert torch.allclose(layer(x), plain, rtol=1e-5, atol=1e-6)


def test_doubling_and_convolution_as_one_learn_alike():
    layer, x = Upsample(8).double(), drawn(2, 8, 6, 6).double()
    wanted = drawn(2, 8, 12, 12).double()
    plain = layer.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    right = torch.autograd.grad((plain * wanted).sum(), layer.parameters())
    found = torch.autograd.grad((layer(x) * wanted).sum(), layer.parameters())
    for one, other in zip(found, right, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_a_result_does_not_depend_on_the_batch_in_the_way_it_is_computed(monkeypatch):
    layer, ways = Upsample(8), []
    folded = layer._folded
    monkeypatch.setattr(layer, "_folded", lambda: (ways.append(1), folded())[1])
    for batch in (1, 64):
        layer(drawn(batch, 8, 4, 4))
    assert len(ways) == 2
    layer(drawn(64, 8, 2, 2))  # too few pixels for its channels
    assert len(ways) == 2
