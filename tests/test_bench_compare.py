"""The benchmark beside the peers: its statistics, and that what it compares is the same."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(scope="module")
def bench():
    """Imports a file of the benchmarks by name, as they import each other."""
    sys.path.insert(0, str(BENCH))
    yield import_module
    sys.path.remove(str(BENCH))


@pytest.fixture
def tiny(bench):
    workloads = bench("workloads")
    return workloads.Sizes(16, 16, (1, 2), 1, 4, 8, 3, 12, 4)


def timings(clock, *pairs):
    return [clock.Timing(seconds, others) for seconds, others in pairs]


def test_a_timing_is_disturbed_by_use_of_cores_that_the_threads_want(bench):
    clock = bench("clock")
    assert clock.is_disturbed(clock.Timing(1.0, 0.2), threads=2, cores=2)
    assert not clock.is_disturbed(clock.Timing(1.0, 0.1), threads=2, cores=2)
    assert not clock.is_disturbed(clock.Timing(1.0, 1.1), threads=1, cores=2)
    assert clock.is_disturbed(clock.Timing(1.0, 1.2), threads=1, cores=2)


def test_disturbed_timings_are_left_out_where_enough_remain(bench):
    clock = bench("clock")
    calm = timings(clock, (1.0, 0.0), (2.0, 0.0), (3.0, 0.1))
    spread = clock.spread_of([*calm, clock.Timing(90.0, 1.5)], 2, 2)
    assert spread == (2.0, 1.5, 2.5, 3, 4)
    few = clock.spread_of([*calm[:2], clock.Timing(90.0, 1.5)], 2, 2)
    assert (few.median, few.undisturbed, few.taken) == (2.0, 2, 3)  # of all three
    assert clock.spread_of(calm[:1], 2, 2) == (1.0, 1.0, 1.0, 1, 1)


def test_a_ratio_is_the_median_of_those_of_the_rounds(bench):
    clock = bench("clock")
    reference = timings(clock, (2.0, 0), (40.0, 0), (6.0, 0), (9.0, 2.0))
    ours = timings(clock, (1.0, 0), (10.0, 0), (2.0, 0), (0.1, 0))
    ratio = clock.ratio_of(reference, ours, 2, 2)
    assert ratio == (
        3.0,
        2.0,
        4.0,
        3,
    )  # the last round was disturbed; medians alone would give 3.75
    assert clock.ratio_of(ours, ours, 2, 2)[:3] == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="shorter"):
        clock.ratio_of(reference, ours[:2], 2, 2)


def test_every_case_comes_first_in_turn(bench):
    rotated = bench("clock").rotated
    orders = [rotated(3, round_) for round_ in range(3)]
    assert [order[0] for order in orders] == [0, 1, 2]
    assert all(sorted(order) == [0, 1, 2] for order in orders)


def test_short_steps_are_repeated_until_others_can_be_seen(bench):
    clock = bench("clock")
    assert [clock.repeats_for(seconds) for seconds in (1.0, 0.3, 0.1, 0.01)] == [1, 1, 3, 30]
    calls = []
    timing = clock.timed(lambda: calls.append(1), "cpu", 5)
    assert len(calls) == 5
    assert timing.seconds > 0
    assert timing.others >= 0


def test_flops_are_those_of_products(bench):
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert bench("clock").count_flops(lambda: a @ b) == 2 * 3 * 5 * 7
    q = torch.randn(2, 1, 6, 4)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert bench("clock").count_flops(lambda: attention(q, q, q)) == 2 * (2 * 2 * 6 * 6 * 4)


def run_of(bench, **cases):
    """A run whose cases took so many seconds in each of three quiet rounds."""
    clock, measuring = bench("clock"), bench("measuring")
    found = [
        measuring.CaseRun(
            name=name,
            parameters=1,
            number="fp32",
            same=True,
            sound=name != "diffusers:bf16",
            flops=8_000_000_000,
            timings=timings(clock, *[(seconds, 0.0)] * 3),
        )
        for name, seconds in cases.items()
    ]
    return measuring.Run("w", "cpu", 2, 2, {"fp32": 16e9, "bf16": 32e9}, found)


CASES = {"diffusers:fp32": 4.0, "diffusers:amp": 2.0, "diffusers:bf16": 1.5, "ldmkit": 1.0}


def test_the_best_setting_is_one_that_is_sound(bench):
    tables = bench("tables")
    run = run_of(bench, **CASES)
    ours = next(line for line in tables.lines_of(run) if line.case.name == "ldmkit")
    assert ours.over_default.median == 4.0
    assert ours.over_best.median == 2.0  # amp, not bf16
    assert ours.share == pytest.approx(0.5)
    shown = tables.markdown("w", "encode", run)
    assert "| **ldmkit** | 1 | 1,000 (1,000 to 1,000) | 4.00 (4.00 to 4.00) | 2.00" in shown
    assert "diffusers:bf16 (unsound)" in shown


def test_processes_are_pooled_round_by_round(bench):
    measuring = bench("measuring")
    slow = run_of(bench, **{name: 3 * seconds for name, seconds in CASES.items()})
    both = measuring.pooled([run_of(bench, **CASES), slow])
    ours = bench("tables").lines_of(both)[-1]
    assert ours.spread.taken == 6
    assert ours.over_default[:3] == (4.0, 4.0, 4.0)


def test_a_document_is_read_back_as_it_was(bench):
    tables = bench("tables")
    found = [("w", "encode", run_of(bench, **CASES))]
    page = json.loads(json.dumps(tables.document(found)))
    assert tables.read_document(page) == found
    with pytest.raises(SystemExit, match="schema_version 9"):
        tables.read_document({"schema_version": 9})


@pytest.mark.parametrize("kind", ["decode", "ae-train"])
def test_autoencoders_are_of_one_size(bench, tiny, diffusers, kind):
    measuring, work = bench("measuring"), bench("workloads").Workload(kind, 16, 2, sizes=tiny)
    cases = ("diffusers:fp32", "ldmkit:fp32")
    prepared = {case: measuring.prepare(work, case, "cpu") for case in cases}
    measuring.require_same_size(prepared)
    assert len({one.parameters for one in prepared.values()}) == 1
    smaller = prepared["ldmkit:fp32"]._replace(parameters=1)
    with pytest.raises(SystemExit, match="differ in size"):
        measuring.require_same_size(prepared | {"ldmkit:fp32": smaller})


@pytest.mark.parametrize("attends", [True, False])
def test_unets_are_of_one_size_and_trained_whole(bench, tiny, diffusers, attends):
    measuring = bench("measuring")
    work = bench("workloads").Workload("unet-train", 4, 2, attends, tiny)
    prepared = {c: measuring.prepare(work, c, "cpu") for c in ("diffusers:fp32", "ldmkit:fp32")}
    measuring.require_same_size(prepared)
    for name, one in prepared.items():
        with pytest.raises(SystemExit, match="got no gradient"):
            measuring.require_gradients(name, one.trained)
        one.step()
        measuring.require_gradients(name, one.trained)


@pytest.mark.parametrize(("kind", "side"), [("encode", 16), ("sample", 4)])
def test_inference_of_ours_gives_what_the_command_gives(bench, tiny, kind, side):
    work = bench("workloads").Workload(kind, side, 3, sizes=tiny)
    made = bench("measuring").prepare(work, "ldmkit", "cpu").step()
    if kind == "encode":
        assert made.mean.shape == (3, 4, 8, 8)
        assert made.mean.dtype == torch.float16
    else:
        assert torch.cat(made).shape == (3, 4, 4, 4)


def test_unknown_settings_and_peers_are_named(bench, tiny):
    measuring, work = bench("measuring"), bench("workloads").WORKLOADS["encode"]
    with pytest.raises(SystemExit, match="no setting fp16"):
        measuring.prepare(work, "diffusers:fp16", "cpu")
    with pytest.raises(SystemExit, match="compvis has nothing"):
        measuring.prepare(work, "compvis:fp32", "cpu")
    assert not measuring.is_sound(
        bench("workloads").WORKLOADS["unet-train"], "diffusers:bf16+fused"
    )
    assert measuring.is_sound(work, "diffusers:bf16")
