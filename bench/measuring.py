"""All cases of a workload in one process, in rounds; several processes pooled; memory by itself."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple, TypeVar

import clock
import loops
import torch
from clock import Number, Timing
from loops import Prepared
from ours import OURS, train_with_adversary_as_shipped
from workloads import Kind, Workload

from ldmkit import terminal
from ldmkit.heap import keep_heap

OURS_NAME, REFERENCE = "ldmkit", "diffusers:fp32"
WARM_UP = 2
Result = TypeVar("Result")


class Options(NamedTuple):
    """How to measure."""

    cases: tuple[str, ...] = ()
    """Instead of those of the workload."""
    rounds: int = 7
    threads: int = 2
    device: str = "cpu"
    quiet: float = 0.0
    """Seconds to wait at most, before each timing, for others to be quiet."""


class CaseRun(NamedTuple):
    """What was measured of a case."""

    name: str
    parameters: int
    number: Number
    same: bool
    """Whether the work is that of the others."""
    sound: bool
    """Whether one would train so."""
    flops: int | None
    """Of a step: model FLOPs, those of the reference where the work is the same."""
    timings: list[Timing]
    memory: int | None = None
    """Peak bytes of a process of its own."""


class Run(NamedTuple):
    """A workload, measured."""

    workload: str
    device: str
    threads: int
    cores: int
    peaks: dict[Number, float]
    """Best rate of a matrix product or convolution in this run, FLOP/s."""
    cases: list[CaseRun]


def cases_of(kind: Kind, device: str) -> tuple[str, ...]:
    """The cases of a kind of work, diffusers' default first: PEER:SETTING, or one of ours."""
    return (CUDA_CASES if device == "cuda" else CPU_CASES)[kind]


def prepare(workload: Workload, case: str, device: str) -> Prepared:
    """Build a case.

    Raises:
        SystemExit: there is none of that name, or its package is not installed.
    """
    peer, _, setting = case.partition(":")
    if peer != OURS_NAME:
        return loops.prepare(workload, peer, setting or "fp32", device)
    if setting == "vgg16" and workload.kind == "ae-train-gan":
        return train_with_adversary_as_shipped(workload, device, "auto")
    if setting not in ("", "fp32", "bf16"):
        raise SystemExit(
            f"{case}: ldmkit has fp32, bf16 and, without either, what its commands choose"
        )
    return OURS[workload.kind](workload, device, setting or "auto")


def is_sound(workload: Workload, case: str) -> bool:
    """Whether one would use it: weights in bf16 alone lose most of an update, so nobody trains so."""
    return not (workload.trains and "bf16" in case.split(":")[-1].split("+"))


def require_same_size(prepared: Mapping[str, Prepared]) -> None:
    """Check that cases with the same architecture have as many parameters.

    Raises:
        SystemExit: they do not, so that nothing could be compared.
    """
    counts = {name: one.parameters for name, one in prepared.items() if one.same}
    if len(set(counts.values())) > 1:
        raise SystemExit(f"the networks differ in size: {counts}")


def require_gradients(name: str, trained: Sequence[torch.nn.Module]) -> None:
    """Check after a step that it reached all weights: one that leaves out part of the work looks fast.

    Raises:
        SystemExit: a weight got no gradient.
    """
    for module in trained:
        for weight, value in module.named_parameters():
            if value.requires_grad and value.grad is None:
                raise SystemExit(f"{name}: {weight} got no gradient")


def flops_of(prepared: Mapping[str, Prepared]) -> dict[str, int | None]:
    """Model FLOPs of a step by case; a case of the same work has the reference's, however it saves."""
    reference = clock.count_flops(prepared[REFERENCE].step) if REFERENCE in prepared else None
    return {
        name: reference if one.same else clock.count_flops(one.step)
        for name, one in prepared.items()
    }


def measure(
    name: str, workload: Workload, options: Options, note: Callable[[str], None] = print
) -> Run:
    """Time all cases of a workload in rounds, each of which has another order."""
    terminal.be_quiet(True)
    if workload.kind != "sample":  # as the commands do; here all cases have it
        keep_heap()
    torch.set_num_threads(options.threads)
    device, names = options.device, options.cases or cases_of(workload.kind, options.device)
    prepared = {case: prepare(workload, case, device) for case in names}
    require_same_size(prepared)
    flops = flops_of(prepared)
    repeats = {}
    for case, one in prepared.items():
        warm = [clock.timed(one.step, device).seconds for _ in range(WARM_UP)]
        require_gradients(case, one.trained)
        repeats[case] = clock.repeats_for(min(warm))
    tried = clock.probes(device)
    peaks: dict[Number, float] = dict.fromkeys(clock.DTYPES, 0.0)
    timings: dict[str, list[Timing]] = {case: [] for case in prepared}
    for round_ in range(options.rounds):
        found = clock.probe_peak(tried, device)
        peaks = {number: max(best, found[number]) for number, best in peaks.items()}
        for place in clock.rotated(len(names), round_):
            case = names[place]
            clock.wait_until_quiet(options.quiet)
            timings[case].append(clock.timed(prepared[case].step, device, repeats[case]))
        note(f"{name}: round {round_ + 1} of {options.rounds}")
    cases = [
        CaseRun(
            name=case,
            parameters=one.parameters,
            number=one.number,
            same=one.same,
            sound=is_sound(workload, case),
            flops=flops[case],
            timings=timings[case],
        )
        for case, one in prepared.items()
    ]
    return Run(name, device, options.threads, cores(), peaks, cases)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def pooled(runs: Sequence[Run]) -> Run:
    """Runs of the same cases in several processes as one: rounds one after the other."""
    first = runs[0]
    cases = [
        case._replace(timings=[timing for run in runs for timing in run.cases[place].timings])
        for place, case in enumerate(first.cases)
    ]
    peaks = {number: max(run.peaks[number] for run in runs) for number in first.peaks}
    return first._replace(cases=cases, peaks=peaks)


def memory_of(workload: Workload, case: str, options: Options) -> int:
    """Peak bytes of this process, which does nothing else, after some steps of a case."""
    terminal.be_quiet(True)
    torch.set_num_threads(options.threads)
    prepared = prepare(workload, case, options.device)
    for _ in range(WARM_UP):
        prepared.step()
    return clock.peak_memory(options.device)


def alone(function: Callable[..., Result], *arguments: object) -> Result:
    """Call a function in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def with_memory(run: Run, workload: Workload, options: Options) -> Run:
    """The run with each case's peak memory, each in a process of its own."""
    cases = [
        case._replace(memory=alone(memory_of, workload, case.name, options)) for case in run.cases
    ]
    return run._replace(cases=cases)


INFERENCE = ("diffusers:fp32", "diffusers:fp32+cl", "diffusers:bf16", "diffusers:bf16+cl")
CPU_CASES: dict[Kind, tuple[str, ...]] = {
    "ae-train": (
        *("diffusers:fp32", "diffusers:amp", "diffusers:amp+fused", "diffusers:bf16+fused"),
        *("monai:fp32", "monai:amp+fused", "ldmkit:fp32", "ldmkit"),
    ),
    "ae-train-gan": (
        *("diffusers:fp32", "diffusers:amp", "diffusers:amp+fused", "ldmkit", "ldmkit:vgg16"),
    ),
    "encode": (*INFERENCE, "monai:bf16", "ldmkit"),
    "decode": (*INFERENCE, "monai:bf16", "ldmkit"),
    "unet-train": (
        *("diffusers:fp32", "diffusers:amp", "diffusers:amp+fused", "diffusers:bf16+fused"),
        *("monai:amp+fused", "denoising-diffusion-pytorch:amp+fused", "ldmkit:fp32", "ldmkit"),
    ),
    "sample": (*INFERENCE, "monai:bf16", "ldmkit"),
}
CUDA_TRAINING = (
    *("diffusers:fp32", "diffusers:amp+cl", "diffusers:amp+cl+fused"),
    *("diffusers:amp+cl+fused+compile", "ldmkit"),
)
CUDA_INFERENCE = ("diffusers:fp32", "diffusers:bf16+cl", "diffusers:bf16+cl+compile", "ldmkit")
CUDA_CASES: dict[Kind, tuple[str, ...]] = {
    "ae-train": CUDA_TRAINING,
    "ae-train-gan": (
        *("diffusers:fp32", "diffusers:amp+cl", "diffusers:amp+cl+fused", "ldmkit", "ldmkit:vgg16"),
    ),
    "encode": CUDA_INFERENCE,
    "decode": CUDA_INFERENCE,
    "unet-train": CUDA_TRAINING,
    "sample": CUDA_INFERENCE,
}
