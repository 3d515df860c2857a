"""Classes, scalars, pictures and layouts as conditions: what all promise, and what each does."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ldmkit.conditioning.classes import ClassConditioner, class_index
from ldmkit.conditioning.condition import Condition
from ldmkit.conditioning.image import (
    PictureConditioner,
    picture_row,
)
from ldmkit.conditioning.layout import LayoutConditioner, LayoutFormat, layout_of_boxes
from ldmkit.conditioning.scalars import ScalarConditioner, scalar_row, scalar_statistics
from ldmkit.data.items import Box

WIDTH = 8
NAMES = ("Cat", "dog", "7")


class Case(NamedTuple):
    conditioner: nn.Module
    values: Tensor
    tokens: int | None
    """How many; None for a vector."""


def _layout():
    ids = [
        layout_of_boxes([Box(n, 0.0, 0.0, 0.2 * n, 1.0)], LayoutFormat(2, 30)).ids for n in (1, 2)
    ]
    conditioner = LayoutConditioner(WIDTH, objects=2, vocabulary=30, depth=2, heads=2, head_width=4)
    return Case(conditioner, torch.stack([*ids, *ids]), 8)


def _pictures(generator):
    return torch.rand(4, 3, 16, 16, generator=generator) * 2 - 1


CASES = {
    "layout": lambda _: _layout(),
    "class tokens": lambda _: Case(
        ClassConditioner((3, 5), WIDTH), torch.tensor([[0, 4], [2, -1], [-1, 3], [1, 1]]), 2
    ),
    "class vector": lambda _: Case(
        ClassConditioner((3, 5), WIDTH, way="vector"),
        torch.tensor([[0, 4], [2, -1], [-1, 3], [1, 1]]),
        None,
    ),
    "scalar tokens": lambda _: Case(
        ScalarConditioner((40.0, 0.0), (10.0, 1.0), WIDTH, way="tokens"),
        torch.tensor([[30.0, 1.0], [math.nan, 1.0], [45.0, math.nan], [45.0, 0.5]]),
        2,
    ),
    "scalar vector": lambda _: Case(
        ScalarConditioner((40.0, 0.0), (10.0, 1.0), WIDTH),
        torch.tensor([[30.0, 1.0], [math.nan, 1.0], [45.0, math.nan], [45.0, 0.5]]),
        None,
    ),
    "picture": lambda generator: Case(
        PictureConditioner(3, 16, WIDTH, hidden=8), _pictures(generator), 5
    ),
}


@pytest.fixture(params=CASES)
def case(request, generator):
    torch.manual_seed(0)
    return CASES[request.param](generator)


def result(case: Case, values: Tensor) -> Tensor:
    condition = case.conditioner(values)
    assert isinstance(condition, Condition)
    told = [part for part in condition if part is not None]
    assert len(told) == 1
    assert (condition.vector is None) == (case.tokens is not None)
    return told[0]


def test_shapes(case):
    middle = () if case.tokens is None else (case.tokens,)
    assert result(case, case.values).shape == (4, *middle, WIDTH)


def test_the_null_is_what_dropped_rows_get(case):
    empty = case.conditioner.empty(case.values)
    assert (empty.shape, empty.dtype) == (case.values.shape, case.values.dtype)
    drop = torch.tensor([True, False, True, False])
    rows = drop.view(-1, *[1] * (empty.ndim - 1))
    found = result(case, torch.where(rows, empty, case.values))
    null, given = result(case, empty), result(case, case.values)
    assert torch.allclose(found[drop], null[drop], atol=1e-6)
    assert torch.allclose(found[~drop], given[~drop], atol=1e-6)
    assert torch.allclose(null, null[:1].expand_as(null), atol=1e-6)  # it says nothing
    assert null.isfinite().all()


def test_rows_do_not_see_each_other(case):
    order = torch.tensor([2, 0, 3, 1])
    found = result(case, case.values)
    assert torch.allclose(result(case, case.values[order]), found[order], atol=1e-6)
    assert torch.allclose(result(case, case.values[1:2]), found[1:2], atol=1e-6)


def test_different_values_give_different_conditions(case):
    null = result(case, case.conditioner.empty(case.values))
    found = torch.cat([result(case, case.values), null[:1]]).flatten(1)
    for one, other in itertools.combinations(range(len(found)), 2):
        same = one < 4 and other < 4 and torch.equal(case.values[one], case.values[other])
        assert torch.allclose(found[one], found[other], atol=1e-4) == same


def test_gradients_are_finite_and_reach_every_parameter(case, generator):
    with torch.no_grad():  # what starts as nothing lets no gradient through at first
        for parameter in case.conditioner.parameters():
            if not parameter.any():
                parameter.normal_(generator=generator)
    values = torch.cat([case.values, case.conditioner.empty(case.values)])
    found = result(case, values)
    (found * torch.randn(found.shape, generator=generator)).sum().backward()
    for name, parameter in case.conditioner.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_the_state_can_be_loaded_strictly(case):
    state = {name: value.clone() for name, value in case.conditioner.state_dict().items()}
    before = result(case, case.values)
    with torch.no_grad():
        for parameter in case.conditioner.parameters():
            parameter.zero_()
    case.conditioner.load_state_dict(state)
    assert torch.equal(result(case, case.values), before)


# classes


def test_the_table_of_one_set_ends_with_the_null():
    conditioner = ClassConditioner((5,), WIDTH)
    table = conditioner.embedding.weight
    assert table.shape == (6, WIDTH)
    found = conditioner(torch.tensor([[0], [4], [-1]])).tokens
    assert torch.equal(found[:, 0], table[[0, 4, 5]])


def test_sets_have_rows_of_their_own():
    conditioner = ClassConditioner((2, 3), WIDTH)
    table = conditioner.embedding.weight
    assert table.shape == (7, WIDTH)
    tokens = conditioner(torch.tensor([[1, 2], [-1, 0], [0, -1]])).tokens
    assert torch.equal(tokens, table[torch.tensor([[1, 5], [2, 3], [0, 6]])])
    vector = ClassConditioner((2, 3), WIDTH, way="vector")
    vector.load_state_dict(conditioner.state_dict())
    assert torch.allclose(vector(torch.tensor([[1, -1]])).vector[0], table[1] + table[6])


def test_a_class_of_no_set_is_an_error_not_another_sets_row():
    with pytest.raises(IndexError):
        ClassConditioner((2, 3), WIDTH)(torch.tensor([[2, 0]]))
    for sizes in ((), (3, 0)):
        with pytest.raises(ValueError, match="one class or more"):
            ClassConditioner(sizes, WIDTH)


def test_classes_by_name_and_number():
    assert [class_index(text, NAMES) for text in ("cat", " DOG ", "1", 2, "none", None, -1)] == [
        *(0, 1, 1, 2),
        *(-1, -1, -1),
    ]
    assert class_index("7", NAMES) == 2  # a name goes before a number
    assert class_index("a", ("A", "a")) == 1
    for bad in ("bird", "3", 3, -2, 1.0, True, "9" * 5000, [1]):
        with pytest.raises(ValueError, match=r"no class; known are 0 Cat, 1 dog, 2 7$"):
            class_index(bad, NAMES)
    with pytest.raises(ValueError, match=r"19 19 \.\.\.$"):
        class_index("x", [str(n) for n in range(30)])


# scalars


def test_near_values_give_near_features_and_distinct_ones_differ():
    conditioner = ScalarConditioner((40.0,), (10.0,), WIDTH)
    base = torch.linspace(-40.0, 120.0, 33)[:, None]  # -8 to 8 standard deviations

    def moved(stds):
        change = conditioner.features(base + 10.0 * stds) - conditioner.features(base)
        return change.norm(dim=-1)

    # sines of wavelength L move by 2 sin(pi d / L) each, wherever they are
    wavelengths = 50.0 * (0.1 / 50.0) ** (torch.arange(16) / 15)
    expected = (2 * torch.sin(math.pi * 0.01 / wavelengths)).norm()
    assert torch.allclose(moved(0.01), expected.expand(33, 1), rtol=2e-2)
    assert expected > 0.5  # of features of norm 4
    assert moved(0.0001).max() < 0.02
    assert moved(0.0).max() == 0


def test_values_far_apart_are_never_taken_for_each_other():
    conditioner = ScalarConditioner((0.0,), (1.0,), WIDTH)
    features = conditioner.features(torch.linspace(-24.9, 24.9, 999)[:, None])[:, 0]
    apart = torch.cdist(features, features) + 10 * torch.eye(999)
    assert apart.min() > 0.5


def test_a_missing_scalar_leaves_the_others_told():
    conditioner = ScalarConditioner((0.0, 0.0), (1.0, 1.0), WIDTH, way="tokens")
    full = conditioner(torch.tensor([[0.3, -0.4]])).tokens
    half = conditioner(torch.tensor([[math.nan, -0.4]])).tokens
    assert torch.equal(full[:, 1], half[:, 1])
    assert not torch.allclose(full[:, 0], half[:, 0])


def test_what_is_missing_spoils_no_gradient():
    conditioner = ScalarConditioner((0.0, 0.0), (1.0, 1.0), WIDTH)
    values = torch.tensor([[math.nan, -0.4]], requires_grad=True)
    conditioner(values).vector.sum().backward()
    assert values.grad is not None
    assert values.grad[0, 0] == 0
    assert values.grad[0, 1] != 0


def test_the_unit_of_a_scalar_does_not_matter():
    torch.manual_seed(0)
    metres = ScalarConditioner((2.0,), (0.5,), WIDTH)
    millimetres = ScalarConditioner((2000.0,), (500.0,), WIDTH)
    own = {"mean", "std"}
    millimetres.load_state_dict(
        {name: value for name, value in metres.state_dict().items() if name not in own},
        strict=False,
    )
    values = torch.tensor([[1.5], [2.25]])
    found, expected = millimetres(1000 * values).vector, metres(values).vector
    assert torch.allclose(found, expected, atol=1e-5)


def test_statistics_leave_missing_values_out():
    values = torch.tensor([[1.0, math.nan], [3.0, 5.0], [math.nan, 7.0]])
    assert scalar_statistics(values, ("age", "dose")) == ((2.0, 6.0), (1.0, 1.0))
    for column, message in (
        ([2.0, 2.0], "dose is the same everywhere"),
        ([math.nan, math.nan], "dose is missing everywhere"),
        ([math.inf, 1.0], "not finite"),
        ([1e8, 1e8 + 8], "subtract a constant"),
    ):
        with pytest.raises(ValueError, match=message):
            scalar_statistics(torch.tensor([[1.0, column[0]], [2.0, column[1]]]), ("age", "dose"))
    with pytest.raises(ValueError, match="scalar 1 is the same everywhere"):
        ScalarConditioner((1.0, 2.0), (1.0, 0.0), WIDTH)
    with pytest.raises(ValueError, match="give one each"):
        ScalarConditioner((1.0, 2.0), (1.0,), WIDTH)


def test_scalars_by_name():
    row = scalar_row({"dose": "1e-2", "age": None}, ("age", "dose", "score"))
    assert row.dtype == torch.float32
    assert row[1] == pytest.approx(0.01)
    assert row.isnan().tolist() == [True, False, True]
    for given, message in (
        ({"weight": 1}, "'weight' is no scalar of this model; it knows age, dose"),
        ({"age": "old"}, "age is 'old', which is not a number"),
        ({"age": ""}, "age is '', which is not a number"),
        ({"age": True}, "age is 'True', which is not a number"),
        ({"age": [1]}, "which is not a number"),
        ({"age": 10**400}, "which is not a number"),
        ({"age": math.inf}, "age is inf: give a finite number"),
        ({"age": "nan"}, "age is nan: give a finite number"),
        ({"age": 1e39}, "finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            scalar_row(given, ("age", "dose"))


# pictures


def test_tokens_of_a_picture_are_its_places(generator):
    conditioner = PictureConditioner(3, 64, WIDTH, hidden=8)
    picture = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
    changed = picture.clone()
    changed[..., 56:, 56:] *= -1
    before, after = conditioner(picture).tokens, conditioner(changed).tokens
    moved = (before - after).norm(dim=-1)[0]
    assert len(moved) == 65
    assert moved[:64].argmax() == 63
    assert moved[64] > 1e-3


def test_the_colour_of_a_flat_picture_is_seen():
    torch.manual_seed(0)
    conditioner = PictureConditioner(3, 16, WIDTH, hidden=16)
    levels = torch.tensor([-1.0, -0.5, 0.5, 1.0])
    flat = conditioner(levels.view(-1, 1, 1, 1).expand(4, 3, 16, 16)).tokens[:, -1]
    assert (torch.cdist(flat, flat) + torch.eye(4)).min() > 1e-2


def test_a_gap_in_a_picture_is_not_hidden():
    conditioner = PictureConditioner(1, 8, WIDTH, hidden=8)
    picture = torch.zeros(1, 1, 8, 8)
    picture[..., 3, 3] = math.nan
    assert conditioner(picture).tokens.isnan().any()


def test_picture_rows(generator):
    picture = torch.rand(3, 32, 32, generator=generator) * 2 - 1
    assert torch.equal(picture_row(picture, 3, 32), picture)
    small = picture_row(torch.full((3, 32, 32), 0.25), 3, 16)
    assert torch.allclose(small, torch.full((3, 16, 16), 0.25))
    gap = picture.clone()
    gap[:, 0, 0] = math.nan
    for bad, message in (
        (picture[:1], "1 channels; the model takes 3"),
        (picture[:, :20], "32 x 20 pixels: cut it to a square"),
        (gap, "fill its gaps"),
        (picture * 255, r"must lie in \[-1, 1\]"),
        (picture.byte(), "floating point"),
        (picture[None], "floating point"),
    ):
        with pytest.raises(ValueError, match=message):
            picture_row(bad, 3, 16)
    for size in (0, 4, 20):
        with pytest.raises(ValueError, match="multiple of 8"):
            PictureConditioner(3, size, WIDTH)
