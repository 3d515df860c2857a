"""`--shard fsdp2`: weights, averages and moments divided among real processes, over gloo."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from conftest import diffusion_config
from ldmkit.configs import TrainDiffusionConfig
from ldmkit.diffusion_configs import AverageConfig, ObjectiveConfig, UNetConfig
from ldmkit.training.averages import averaged_copy, update_average
from ldmkit.training.guard import step_unless_found
from ldmkit.training.optimization import gradient_norm
from ldmkit.training.sharding import (
    gathered,
    is_divided,
    runnable,
    shard,
    shard_like,
    whole,
)
from ldmkit.training.snapshots import snapshot_path, snapshot_steps
from rank_worker import run_job
from test_ranks import (
    NETWORK,
    assert_same_run,
    job,
    left,
    lines,
    start,
    torchrun,
    torchrun_ends,
    wait_for_steps,
    weights_of,
)

MODEL = "diffusion.safetensors"
SHARED = {"shard": "fsdp2"}
# Adam's first steps make whole ones of gradients that are nothing but rounding: keep them small
PLAIN = {"steps": 6, "batch_size": 8, "save_every": 100, "lr": 1e-4}


def states(run: Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint."""
    return load_file(sorted((run / "checkpoints").iterdir())[-1] / "state.safetensors")


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert (value.double() - other[name].double()).abs().max() <= 1e-5, name


@pytest.fixture(scope="module")
def done(pipeline, tmp_path_factory) -> Path:
    """All that two processes can show in one start; each job beside the same one in this process."""
    root = tmp_path_factory.mktemp("sharded")
    latents = pipeline.latents
    full: dict[str, Any] = {
        "unet": UNetConfig(**NETWORK, dropout=0.2, self_conditioning=True, residual_updown=True),
        "steps": 4,
        "batch_size": 8,
        "lr": 1e-4,
        "clip_norm": 0.5,
        "holdout": 0.1,
        "checkpointing": True,
        "ae": pipeline.ae,
        "objective": ObjectiveConfig(weighting="uncertainty"),
        "average": AverageConfig(kind="power", snapshots=2),
    }

    def at(name: str, **settings: Any) -> dict[str, Any]:
        return job(diffusion_config(latents, root / name, **settings), latents)

    run_job(at("full1", **full, accumulate=4))
    run_job(at("nan1", **PLAIN) | {"poison": 2})
    order = [1, 3, int(signal.SIGTERM), str(root / "sent")]
    stopped = at("stopped", **PLAIN, **SHARED)
    first = stopped | {"signal": order, "record": str(root / "stopped-first")}
    jobs = [
        at("full2", **full, **SHARED, accumulate=2),
        at("nan2", **PLAIN, **SHARED) | {"poison": 2},
        at("undisturbed", **PLAIN, **SHARED),
        *(first, stopped),
        at("without", **PLAIN),
    ]
    torchrun(2, jobs, root / "jobs.json")
    return root


def test_divided_among_two_it_trains_as_one_process_does(done):
    assert_same_run(done / "full1", done / "full2", MODEL)
    assert_close(states(done / "full1"), states(done / "full2"))
    first, second = left(done / "full2", 2)
    assert first.digests == second.digests
    assert first.ids != second.ids
    assert any("validation_loss" in line for line in lines(done / "full2"))


def test_it_ends_as_two_processes_that_hold_everything(done):
    assert_same_run(done / "without", done / "undisturbed", MODEL)
    assert_close(states(done / "without"), states(done / "undisturbed"))


def test_each_process_holds_half(done):
    for one in left(done / "full2", 2):
        for name, (own, total) in one.held.items():
            assert 0.4 < own / total < 0.6, name
    for one in left(done / "without", 2):
        assert all(own == total for own, total in one.held.values())


def test_snapshots_and_previews_are_of_whole_averages(done):
    assert snapshot_steps(done / "full2") == snapshot_steps(done / "full1") == [2, 4]
    for step in (2, 4):
        one, two = (load_file(snapshot_path(done / name, step)) for name in ("full1", "full2"))
        assert_close(one, two)
    pictures = [
        sorted(p.name for p in (done / n / "samples").iterdir()) for n in ("full1", "full2")
    ]
    assert pictures[0] == pictures[1] != []


def test_what_one_process_cannot_use_is_left_out_by_all(done):
    assert_same_run(done / "nan1", done / "nan2", MODEL)
    first, second = left(done / "nan2", 2)
    assert first.digests == second.digests
    assert first.digests[2] == first.digests[1] != first.digests[3]


def test_a_signal_to_one_saves_whole_tensors_and_the_run_ends_with_the_same_bytes(done):
    assert [one.code for one in left(done / "stopped-first", 2)] == [75, 75]
    assert [len(one.digests) for one in left(done / "stopped-first", 2)] == [4, 4]
    assert [(one.code, len(one.digests)) for one in left(done / "stopped", 2)] == [(0, 2)] * 2
    assert weights_of(done / "stopped") == weights_of(done / "undisturbed")
    assert states(done / "stopped").keys() == states(done / "undisturbed").keys()


def test_files_do_not_say_how_they_were_made(done):
    shapes = []
    for name in ("without", "undisturbed"):
        with safe_open(done / name / MODEL, "pt") as file:
            shapes.append({key: file.get_slice(key).get_shape() for key in sorted(file.keys())})
    assert shapes[0] == shapes[1]


def test_one_process_goes_on_with_what_was_divided(done, pipeline, tmp_path):
    """From the checkpoint that two left, without and with the option, which one process has no use for."""
    found = []
    for number, divided in enumerate(("none", "fsdp2")):
        out = tmp_path / str(number)
        out.mkdir()
        config = diffusion_config(pipeline.latents, out, **PLAIN | {"steps": 8}, shard=divided)
        shutil.copytree(done / "undisturbed" / "checkpoints", out / "checkpoints")
        assert run_job(job(config, pipeline.latents)) == 0
        assert len(left(out)[0].digests) == 2
        found.append(weights_of(out))
    assert found[0] == found[1]


@pytest.mark.parametrize("optimizer", ["adamw-8bit", "adafactor", "muon"])
def test_optimizers_that_need_whole_weights_are_refused(optimizer, tmp_path):
    with pytest.raises(ValueError, match=f"--optimizer adamw: {optimizer} needs whole weights"):
        TrainDiffusionConfig(latents=tmp_path, shard="fsdp2", optimizer=optimizer)


@pytest.fixture
def alone():
    """A group of one process, in which everything is divided by one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    yield
    dist.destroy_process_group()


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_an_update_of_parts_is_left_out_on_the_device(alone, found):
    """The way in which CUDA leaves it out, without asking the host."""
    weights = []
    for wanted in (False, True):
        module = layers()
        if wanted:
            shard([*module, module], torch.device("cpu"))
        optimizer = torch.optim.AdamW(module.parameters(), 0.1, fused=True)
        module(torch.ones(5, 3)).square().sum().backward()
        assert gradient_norm(module.parameters(), 0.5) > 1
        step_unless_found(optimizer, torch.tensor(found))
        weights.append([whole(p).clone() for p in module.parameters()])
    for one, other, before in zip(*weights, layers().parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-6)
        assert torch.equal(other, before) == bool(found)


def test_clipping_takes_parts_and_whole_weights_together(alone):
    module, other = layers(), nn.Parameter(torch.ones(2))
    shard([*module, module], torch.device("cpu"))
    module(torch.ones(5, 3)).square().sum().backward()
    other.grad = torch.full((2,), 3.0)
    parameters = [*module.parameters(), other]
    gradients = torch.cat([whole(p.grad).flatten() for p in parameters if p.grad is not None])
    assert gradient_norm(parameters, 1.0) == pytest.approx(gradients.norm().item())
    clipped = torch.cat([whole(p.grad).flatten() for p in parameters if p.grad is not None])
    assert torch.allclose(clipped, gradients / gradients.norm(), rtol=1e-4)


def test_copies_are_divided_and_made_whole_again(alone):
    module = layers()
    average = averaged_copy(module)
    shard([*module, module], torch.device("cpu"))
    shard_like(average, module)
    assert all(map(is_divided, average.parameters()))
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(1.0)
    update_average(average, module, 0.5)
    complete = runnable(average)
    assert not any(map(is_divided, complete.parameters()))
    for one, before in zip(complete.parameters(), layers().parameters(), strict=True):
        assert torch.allclose(one, before + 0.5)
    names = dict(complete.named_parameters())
    assert all(torch.equal(x, names[name]) for name, x in gathered(average.state_dict()).items())


@pytest.mark.slow
def test_the_death_of_one_is_told_by_the_other(pipeline, tmp_path):
    settings = {"steps": 10_000, "sample_every": 10_000, "save_every": 10_000}
    config = diffusion_config(pipeline.latents, tmp_path / "run", **settings, **SHARED)
    file = job(config, pipeline.latents)["config"]
    started = start(file, pipeline.latents, "train-diffusion")
    wait_for_steps(config.out, started)
    started.processes[1].kill()
    assert started.codes() == [1, -9]
    said = [process.communicate() for process in started.processes]
    assert b"another process of this run has ended" in said[0][1]


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_processes_divided_or_not(pipeline, tmp_path):
    latents = pipeline.latents
    whole = diffusion_config(latents, tmp_path / "whole", **PLAIN | {"steps": 8})
    run_job(job(whole, latents))
    for name, order in (("a", ("fsdp2", "fsdp2", "none")), ("b", ("none", "fsdp2", "fsdp2"))):
        for processes, at, divided in zip((4, 2, 1), (1, 4, None), order, strict=True):
            config = diffusion_config(
                latents, tmp_path / name, **PLAIN | {"steps": 8}, shard=divided
            )
            record = tmp_path / f"{name}-by{processes}"
            if at is None:
                run_job(job(config, latents, record=record))
                continue
            sent = [processes - 1, at, int(signal.SIGTERM), str(tmp_path / f"{name}{processes}")]
            stopping = job(config, latents, signal=sent, record=record)
            torchrun_ends(processes, stopping, tmp_path / "jobs.json")
            assert [one.code for one in left(record, processes)] == [75] * processes
        assert_same_run(tmp_path / "whole", tmp_path / name, MODEL)


@pytest.mark.slow
def test_four_processes_train_as_one_does(pipeline, tmp_path):
    latents = pipeline.latents
    run_job(job(diffusion_config(latents, tmp_path / "one", **PLAIN, clip_norm=0.5), latents))
    four = diffusion_config(latents, tmp_path / "four", **PLAIN, **SHARED, clip_norm=0.5)
    torchrun(4, [job(four, latents)], tmp_path / "jobs.json")
    assert_same_run(tmp_path / "one", tmp_path / "four", MODEL)
    assert_close(states(tmp_path / "one"), states(tmp_path / "four"))
    for one in left(tmp_path / "four", 4):
        assert all(own / total < 0.4 for own, total in one.held.values() if total)
