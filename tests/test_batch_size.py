"""`--batch-size auto`, and what a dry run says of memory."""

import os
import signal
import tomllib

import pytest
import torch
from torch import nn

import ldmkit
from conftest import ae_config, diffusion_config
from ldmkit.configs import TrainAEConfig, TrainDiffusionConfig
from ldmkit.data.latent_set import LatentSet
from ldmkit.errors import OutOfMemoryError, UsageError
from ldmkit.training import batch_size, memory
from ldmkit.training.batch_size import (
    Line,
    Peak,
    batch_sizes,
    largest_batch,
    largest_within,
    line_through,
)
from ldmkit.training.memory import Free, cgroup_rooms, free_memory, peak_bytes, pretended
from ldmkit.training.optimizers import build_optimizers, moment_bytes
from ldmkit.training.run import as_begun
from ldmkit.trials import planned_autoencoder, planned_diffusion

CPU = torch.device("cpu")
MEGA = 1 << 20
EACH = 10 * MEGA
"""What a sample takes in the trials below."""


def auto(**changes) -> TrainDiffusionConfig:
    return TrainDiffusionConfig.model_validate({"latents": "x", "batch_size": "auto"} | changes)


def greedy(config) -> None:
    """A trial in another process that fills ten megabytes for each sample."""
    block = bytearray(EACH * config.samples_per_step)
    del block


def doomed(config) -> None:
    """A trial that the system ends, as it does where memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def misused(config) -> None:
    """A trial that finds the settings wrong."""
    raise UsageError("these settings are wrong")


def test_the_batches_to_choose_from():
    assert batch_sizes(1, 1, 20) == [1, 2, 3, 4, 6, 8, 12, 16]
    assert batch_sizes(4, 1, 50) == [4, 8, 12, 16, 24, 32, 48]
    assert batch_sizes(5, 2, 40) == [10, 15, 20, 30, 40]
    assert batch_sizes(1, 1, 1) == [1]
    with pytest.raises(UsageError, match="more than the 3 samples"):
        batch_sizes(4, 1, 3)


def test_the_line_through_two_peaks_and_what_fits():
    line = line_through(Peak(2, 300 * MEGA), Peak(4, 340 * MEGA))
    assert line == Line(260 * MEGA, 20 * MEGA)
    sizes = batch_sizes(1, 1, 1000)
    assert largest_within(line, sizes, 260 * MEGA + 20 * MEGA * 48) == 48
    assert largest_within(line, sizes, 260 * MEGA + 20 * MEGA * 48 - 1) == 32
    assert largest_within(line, sizes, 100 * MEGA) is None
    near = line_through(Peak(2, 300 * MEGA), Peak(4, 301 * MEGA))  # noise: nothing is taken as free
    assert near.at(8) >= 2 * 301 * MEGA


def in_this_process(trial, config, sizes, device):
    """Stands for the other process where the choice is looked at."""
    for size in sizes:
        yield Peak(size, 100 * MEGA + size * EACH)


@pytest.mark.parametrize(("room", "found"), [(1100, 96), (1059, 64), (100, None)])
def test_the_largest_batch_is_predicted_from_two(room, found, monkeypatch, capsys):
    free = Free(-(-room * MEGA * 5 // 4), "a test")
    monkeypatch.setattr(batch_size, "free_memory", lambda device: free)
    monkeypatch.setattr(batch_size, "_peaks", in_this_process)
    monkeypatch.setattr("ldmkit.terminal._quiet", False)
    if found is None:
        with pytest.raises(OutOfMemoryError, match="--accumulate"):
            largest_batch(greedy, auto(), batch_sizes(1, 1, 500), CPU)
        return
    assert largest_batch(greedy, auto(), batch_sizes(1, 1, 500), CPU) == found
    said = capsys.readouterr().err
    assert f"batch size {found}: a step took 0.13 GB with 2 and 0.15 GB with 4 samples" in said
    assert "free (a test)" in said


def test_another_process_is_measured():
    first, last = (next(iter(batch_size._peaks(greedy, auto(), [size], CPU))) for size in (2, 12))
    assert 0.9 * 10 * EACH < last.amount - first.amount < 1.1 * 10 * EACH
    assert last.amount < 12 * EACH + 8 * MEGA  # nothing of this process is counted


def test_what_ends_the_other_process_is_no_harm():
    sizes = batch_sizes(1, 1, 8)
    with pytest.raises(OutOfMemoryError, match="2 samples ran out of memory"):
        largest_batch(doomed, auto(), sizes, CPU)
    with pytest.raises(UsageError, match="these settings are wrong"):
        largest_batch(misused, auto(), sizes, CPU)


def test_auto_does_not_reach_what_trains():
    with pytest.raises(TypeError, match="not been resolved"):
        _ = auto().samples_per_step
    with pytest.raises(TypeError):
        _ = auto(scale_lr=True).peak_lr
    with pytest.raises(UsageError, match="not on mps"):
        free_memory(torch.device("mps"))


def test_both_stages_train_with_the_number_found_and_keep_it(pipeline, tmp_path, monkeypatch):
    ae = ae_config(pipeline.data, tmp_path / "ae", batch_size="auto", steps=1)
    ldm = diffusion_config(
        pipeline.latents, tmp_path / "ldm", batch_size="auto", steps=1, accumulate=3, scale_lr=True
    )
    ldmkit.train_ae(ae)
    model = ldmkit.train_diffusion(ldm)
    assert tomllib.loads((ae.out / "config.toml").read_text())["batch_size"] == 12
    assert tomllib.loads((ldm.out / "config.toml").read_text())["batch_size"] == 12
    begun = as_begun(ldm)
    assert begun.samples_per_step == 12
    assert begun.peak_lr == 12 * ldm.lr
    assert ldmkit.train_diffusion(ldm) == model  # finished; and nothing is tried again:
    monkeypatch.setattr(batch_size, "largest_batch", None)
    monkeypatch.setattr("ldmkit.trials.largest_batch", None)
    assert ldmkit.train_diffusion(ldm.model_copy(update={"steps": 2})) == model
    with pytest.raises(UsageError, match="stands for 12 here"):
        ldmkit.train_diffusion(ldm.model_copy(update={"accumulate": 5}))


def test_the_command_line_takes_a_number_or_auto(run, pipeline, tmp_path):
    arguments = ("train-diffusion", pipeline.latents, "--preset", "tiny", "--out", tmp_path / "run")
    done = run(*arguments, "--batch-size", "auto", "--dry-run")
    assert done.returncode == 0, done.stderr.decode()
    assert b'batch_size = "auto"' in done.stdout
    assert b"12 is assumed here" in done.stderr  # there are no more samples
    assert not (tmp_path / "run").exists()
    for wrong in ("many", "0"):
        done = run(*arguments, "--batch-size", wrong)
        assert done.returncode == 2
        assert b"--batch-size" in done.stderr
        assert b"or auto (got" in done.stderr


def test_room_below_the_limits_of_control_groups(tmp_path):
    def write(folder, names, limit, usage, cached):
        folder.mkdir(parents=True, exist_ok=True)
        values = (str(limit), str(usage), f"anon 5\n{names[2]} {cached}\n")
        for name, value in zip((names[0], names[1], "memory.stat"), values, strict=True):
            (folder / name).write_text(value)

    second = ("memory.max", "memory.current", "inactive_file")
    first = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    write(tmp_path / "job", second, 1000, 700, 50)
    write(tmp_path / "job/task", second, "max", 700, 50)
    write(tmp_path / "memory/box", first, 500, 600, 0)
    member = tmp_path / "cgroup"
    member.write_text("4:memory:/box\n2:cpu:/box\n0::/job/task\n")
    rooms = sorted(free.amount for free in cgroup_rooms(member, tmp_path))
    assert rooms == [0, 350]
    assert cgroup_rooms(tmp_path / "missing", tmp_path) == []
    assert 0 < memory.resident() <= memory.peak_resident()


def test_the_bytes_that_a_step_holds_are_counted_without_memory():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(100, 300), nn.ReLU(), nn.Linear(300, 1))

    def step():
        pretended(net)
        net(torch.empty(1000, 100)).sum().backward()

    weights = 4 * (100 * 300 + 300 + 300 + 1)
    kept = 4 * (1000 * 100 + 1000 * 300)  # the input, and what ReLU gave
    assert weights + kept <= peak_bytes(step) <= 2 * weights + kept + 2 * 4 * 1000 * 301


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "adafactor", "muon"])
def test_moments_are_counted_as_the_optimizers_keep_them(optimizer):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 999))
    config = auto(batch_size=1, optimizer=optimizer)
    optimizers = build_optimizers(net, config)
    net(torch.ones(2, 3, 3, 3)).sum().backward()
    kept = 0
    for one in optimizers.values():
        one.step()
        kept += sum(
            v.nbytes for state in one.state.values() for v in state.values() if v.numel() > 1
        )
    assert moment_bytes(net, config) == kept


def test_a_plan_knows_what_costs_memory(pipeline, tmp_path):
    latents = LatentSet(pipeline.latents)

    def held(**changes):
        wide = {
            "unet": {
                "channels": 32,
                "multipliers": (1, 2),
                "norm_groups": 4,
                "attention_factors": (2,),
            }
        }
        return planned_diffusion(auto(**({"batch_size": 64} | wide | changes)), latents, CPU)

    plain = held(precision="fp32")
    assert held(precision="fp32", batch_size=128) > 1.3 * plain
    for less in (
        {"accumulate": 4},
        {"checkpointing": True},
        {"optimizer": "adafactor"},
        {"precision": "bf16"},
    ):
        assert held(**({"precision": "fp32"} | less)) < plain, less
    weights = held(precision="fp32", average={"snapshots": 1}) - plain
    assert weights == held(precision="fp32", average={"snapshots": 9}) - plain > 0

    def first(**changes) -> int:
        config = ae_config(pipeline.data, tmp_path, **changes)
        return planned_autoencoder(TrainAEConfig.model_validate(config.model_dump()), CPU)

    usual = first()
    assert first(accumulate=2) < usual
    assert first(checkpointing=True) < usual
    assert first(ema_decay=0.9) > usual
    assert first(multi_resolution=(32, 64)) > 1.5 * usual
    codes = {"channels": 8, "multipliers": (1, 2), "norm_groups": 2, "bottleneck": "vq"}
    assert first(autoencoder=codes) > 0
