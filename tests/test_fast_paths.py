"""Faster ways to compute the same: each beside the plain one."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ldmkit import heap
from ldmkit.diffusion_configs import UNetConfig
from ldmkit.networks import blocks, packed
from ldmkit.networks.attention import MANY_PAIRS, attend
from ldmkit.networks.blocks import Upsample
from ldmkit.networks.inference import compute_in_bfloat16, packing_works, remember_contexts
from ldmkit.networks.transformer import TransformerBlock
from ldmkit.networks.unet import UNet


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
    right = torch.autograd.grad(
        F.scaled_dot_product_attention(exact[0], exact[1], exact[2]).sum(), exact
    )
    for one, other in zip(found, right, strict=True):
        assert (one - other).norm() <= 0.02 * other.norm()


def test_attention_takes_matrix_products_only_where_they_win(monkeypatch):
    taken = []
    fused = F.scaled_dot_product_attention

    def spied(q, k, v):
        taken.append(q.shape)
        return fused(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spied)
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
    weights = list(layer.parameters())
    right = torch.autograd.grad((plain * wanted).sum(), weights)
    found = torch.autograd.grad((layer(x) * wanted).sum(), weights)
    for one, other in zip(found, right, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_a_result_does_not_depend_on_the_batch_in_the_way_it_is_computed(monkeypatch):
    layer, ways = Upsample(8), []
    folded = layer.folded
    monkeypatch.setattr(layer, "folded", lambda: (ways.append(1), folded())[1])
    for batch in (1, 64):
        layer(drawn(batch, 8, 4, 4))
    assert len(ways) == 2
    layer(drawn(64, 8, 2, 2))  # too few pixels for its channels
    assert len(ways) == 2


def small_unet():
    torch.manual_seed(0)
    config = UNetConfig(
        channels=16,
        multipliers=(1, 2),
        residual_blocks=1,
        attention_factors=(1, 2),
        head_channels=8,
        norm_groups=8,
        context_channels=12,
    )
    network = UNet(config, in_channels=4, out_channels=4, use_tokens=True).eval()
    for weight in network.parameters():  # nothing starts silent
        torch.nn.init.normal_(weight, std=0.1)
    return network.requires_grad_(False)


def relative(found, right):
    return float((found.float() - right).norm() / right.norm())


@torch.no_grad()
def test_packed_bfloat16_is_as_near_to_float32_as_bfloat16_is():
    network = small_unet()
    x, tokens, times = drawn(2, 4, 8, 8), drawn(2, 5, 12), torch.tensor([3.0, 999.0])
    right = network(x, times, None, tokens)
    low = [part.bfloat16() for part in (x, tokens)]
    plain = copy.deepcopy(network).bfloat16()(low[0], times, None, low[1])
    compute_in_bfloat16(network)
    packed = network(low[0], times, None, low[1])
    assert packed.dtype == torch.bfloat16
    assert 0.0 < relative(packed, right) <= 1.5 * relative(plain, right) < 0.05
    for size in (4, 12, 16, 20, 24, 8):  # more shapes than are kept
        assert (
            network(drawn(1, 4, size, size).bfloat16(), times[:1], None, low[1][:1])
            .isfinite()
            .all()
        )
    assert torch.equal(packed, network(low[0], times, None, low[1]))


@torch.no_grad()
def test_what_a_branch_is_added_to_is_rounded_with_it():
    """In the kernel, so that the sum is nearer to float32 than two roundings are."""
    layer = blocks.ResidualConv2d(16, 16, 3, padding=1)
    x, onto = drawn(3, 16, 8, 8).bfloat16(), drawn(3, 16, 8, 8).bfloat16()
    layer.bfloat16()
    right = copy.deepcopy(layer).float()(x.float(), onto.float())
    twice, kept = layer(x, onto), onto.clone()
    packed.pack(layer)
    assert relative(layer(x, onto), right) < 0.9 * relative(twice, right)
    assert torch.equal(onto, kept)
    assert torch.equal(layer(x), layer(x, torch.zeros_like(onto)))


def test_packed_layers_let_gradients_through():
    network = small_unet()
    plain = copy.deepcopy(network).bfloat16()
    compute_in_bfloat16(network)
    x, tokens = drawn(1, 4, 8, 8).bfloat16(), drawn(1, 5, 12).bfloat16()
    gradients = []
    for one in (plain, network):
        given = x.clone().requires_grad_()
        one(given, torch.tensor([7.0]), None, tokens).sum().backward()
        gradients.append(given.grad)
    assert torch.equal(*gradients)


def test_where_torch_has_no_packing_the_layers_stay(monkeypatch):
    def missing(*args):
        raise AttributeError("no such operator")

    monkeypatch.setitem(packed.KINDS, torch.nn.Linear, missing)
    packing_works.cache_clear()
    try:
        assert not packing_works()
        network = small_unet()
        compute_in_bfloat16(network)
        assert network.dtype == torch.bfloat16
        assert not any("forward" in vars(layer) for layer in network.modules())
    finally:
        packing_works.cache_clear()


def usual_unet(side):
    """With layers as wide as those whose kernels choose another order for another batch."""
    torch.manual_seed(0)
    config = UNetConfig(
        channels=64,
        multipliers=(1, 4),
        residual_blocks=1,
        attention_factors=(2,),
        head_channels=32,
        context_channels=256,
    )
    network = UNet(config, in_channels=4, out_channels=4, use_tokens=True).eval()
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    compute_in_bfloat16(network.requires_grad_(False))
    x, tokens = drawn(5, 4, side, side), drawn(5, 77, 256)
    return lambda rows: network(
        x[rows].bfloat16(), torch.full((len(x[rows]),), 500.0), None, tokens[rows].bfloat16()
    )


@pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_convolution_pointwise"),
    reason="this torch was built without oneDNN, whose layers are packed",
)
@pytest.mark.parametrize(("side", "threads"), [(8, 1), (8, 2), (32, 2), (32, 3)])
@torch.no_grad()
def test_a_row_has_the_same_bytes_in_every_batch(side, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    assert packing_works()  # else there is nothing to try
    try:
        network = usual_unet(side)
        pairs = [network(slice(first, first + 2)) for first in (0, 2)]
        alone = torch.cat(pairs)
        for first, last in ((0, 1), (0, 4), (0, 5), (1, 4)):
            rows = network(slice(first, last))
            last = min(last, 4)
            assert torch.equal(rows[: last - first], alone[first:last])
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_a_layer_that_adds_up_otherwise_in_larger_batches_goes_pair_by_pair(monkeypatch):
    """Such as this one: in batches of more than two it adds up the inputs from the last to the first."""

    def ordered(layer, weights):
        def forward(x):
            seen = x if len(x) <= 2 else x.flip(-1)
            weight = layer.weight if len(x) <= 2 else layer.weight.flip(1)
            sums = torch.zeros(len(x), layer.out_features)
            for column in range(x.shape[-1]):
                sums += seen[:, column, None].float() * weight[:, column].float()
            return sums.to(x.dtype)

        return forward

    monkeypatch.setitem(packed.KINDS, torch.nn.Linear, ordered)
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32).bfloat16()
    x = drawn(5, 64, dtype=torch.bfloat16)
    pairs = torch.cat([ordered(layer, None)(x[first : first + 2]) for first in (0, 2)])
    assert not packed.rows_are_alike(layer, x)
    packed.pack(layer)
    assert torch.equal(layer(x)[:4], pairs)


@torch.no_grad()
def test_contexts_are_remembered_by_what_they_are():
    network, remembering = small_unet(), small_unet()
    remember_contexts(remembering)
    block = next(one for one in remembering.modules() if isinstance(one, TransformerBlock))
    x, times = drawn(2, 4, 8, 8), torch.tensor([3.0, 5.0])
    contexts = [drawn(2, 5, 12) + shift for shift in (0.0, 1.0, 2.0)]
    for context in (*contexts, contexts[1], contexts[0]):
        right = network(x, times, None, context)
        assert torch.equal(remembering(x, times, None, context), right)
        keys = block.cross_attention.to_k(context)
        assert block.cross_attention.to_k(context) is keys
    with torch.enable_grad():
        assert block.cross_attention.to_k(contexts[0]) is not block.cross_attention.to_k(
            contexts[0]
        )


def test_a_training_command_keeps_its_heap():
    """In a process of its own, since there is no way back: a large block is taken from the heap."""
    script = (
        "import ctypes, sys\n"
        "from ldmkit.heap import keep_heap\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p\n"
        "if sys.argv[1] == 'keep':\n"
        "    assert keep_heap()\n"
        "before = libc.sbrk(0)\n"
        "block = libc.malloc(ctypes.c_size_t(1 << 28))\n"
        "print(libc.sbrk(0) - before >= 1 << 28)\n"
    )
    grown = [
        subprocess.run(
            [sys.executable, "-c", script, word], capture_output=True, text=True, check=True
        ).stdout.strip()
        for word in ("leave", "keep")
    ]
    assert grown == ["False", "True"]


def test_other_c_libraries_are_left_as_they_are(monkeypatch):
    monkeypatch.setattr(heap.platform, "libc_ver", lambda: ("", ""))
    assert not heap.keep_heap()
