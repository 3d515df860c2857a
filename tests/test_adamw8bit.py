"""AdamW with moments of a byte each, against AdamW."""

import copy

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from ldmkit.training.adamw8bit import BLOCK, AdamW8bit, packed, unpacked, values_of


@pytest.mark.parametrize("signed", [True, False])
def test_a_byte_stands_for_256_numbers(signed):
    values = values_of(signed=signed)
    assert values.unique().numel() == 256
    assert values[-1] == 1.0
    assert (values == 0.0).sum() == 1
    if signed:  # all but the one have an opposite
        assert torch.equal(values[:127], -values[128:255].flip(0))
    else:
        assert values[0] == 0.0
    above = values[values > 0]
    assert above[0] < 1e-6
    assert (above.log10().floor() == -1.0).sum() == (65 - 1 if signed else 128)


@given(st.integers(1, 3 * BLOCK), st.booleans(), st.floats(1e-20, 1e20))
@example(1, True, 1.0)
@example(BLOCK, False, 1e-20)
def test_numbers_are_kept_to_a_few_percent(count, signed, size):
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(count))
    numbers = size * (drawn if signed else drawn.square())
    codes, scales = packed(numbers, signed=signed)
    assert (codes.dtype, codes.shape) == (torch.uint8, numbers.shape)
    found = unpacked(codes, scales, signed=signed)
    largest = int(numbers.abs().argmax())
    assert found[largest].abs() >= 0.99 * numbers[largest].abs()
    assert (found - numbers).double().norm() < 0.03 * numbers.double().norm()
    assert ((found == 0) | (found.sign() == numbers.sign())).all()


def test_zero_stays_zero_and_what_is_not_finite_does_not_hide():
    zero = torch.zeros(BLOCK + 3)
    assert torch.equal(unpacked(*packed(zero, signed=True), signed=True), zero)
    for bad in (float("nan"), float("inf")):
        _, scales = packed(torch.cat([zero, torch.tensor([bad])]), signed=True)
        assert not scales.isfinite().all()


def optimizers_of(net, rate=1e-2, decay=0.1):
    groups = [{"params": list(net.parameters()), "weight_decay": decay}]
    return AdamW8bit(groups, rate, (0.9, 0.999))


def test_the_first_step_is_that_of_adamw():
    """The moments are rounded behind it."""
    torch.manual_seed(0)
    net, plain = (nn.Linear(100, 60) for _ in range(2))
    plain.load_state_dict(net.state_dict())
    ours = optimizers_of(net)
    theirs = torch.optim.AdamW(plain.parameters(), 1e-2, (0.9, 0.999), weight_decay=0.1)
    x = torch.randn(8, 100)
    for one in (net, plain):
        one(x).square().sum().backward()
    ours.step()
    theirs.step()
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    kept = [
        tuple(state[name].dtype for name in ("exp_avg", "exp_avg_sq"))
        for state in ours.state.values()
    ]
    assert kept == [(torch.uint8, torch.uint8), (torch.float32, torch.float32)]


def regression(kind, steps):
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 256), nn.Tanh(), nn.Linear(256, 32))
    net = nn.Sequential(nn.Linear(32, 256), nn.Tanh(), nn.Linear(256, 32))
    optimizer = kind(net)
    generator, loss = torch.Generator().manual_seed(1), torch.zeros(())
    for _ in range(steps):
        x = torch.randn(64, 32, generator=generator)
        loss = (net(x) - teacher(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def test_it_learns_as_adamw_does():
    plain = regression(lambda net: torch.optim.AdamW(net.parameters(), 3e-3), 300)
    bytes_ = regression(lambda net: optimizers_of(net, 3e-3, 0.01), 300)
    start = regression(lambda net: optimizers_of(net, 3e-3, 0.01), 1)
    assert plain < 0.1 * start
    assert bytes_ < 1.2 * plain


def test_it_goes_on_to_the_same_bytes():
    torch.manual_seed(0)
    net = nn.Linear(100, 60)
    slopes = [torch.randn_like(net.weight) for _ in range(6)]

    def go(net, optimizer, slopes):
        for slope in slopes:
            net.weight.grad = slope
            optimizer.step()

    optimizer = optimizers_of(net)
    go(net, optimizer, slopes[:3])
    again = copy.deepcopy(net)
    resumed = optimizers_of(again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    go(net, optimizer, slopes[3:])
    go(again, resumed, slopes[3:])
    assert torch.equal(net.weight, again.weight)
    assert resumed.state[again.weight]["exp_avg"].dtype == torch.uint8
