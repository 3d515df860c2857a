"""Several processes train one model: real ones, started by torchrun, over gloo."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from conftest import ae_config, diffusion_config
from ldmkit.autoencoder_configs import AutoencoderConfig, CodebookConfig, DiscriminatorConfig
from ldmkit.configfile import to_toml
from ldmkit.diffusion_configs import UNetConfig
from ldmkit.training.meeting import fresh_name
from rank_worker import run_job

WORKER = Path(__file__).with_name("rank_worker.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
NETWORK = {
    "channels": 16,
    "multipliers": (1, 2),
    "residual_blocks": 1,
    "attention_factors": (2,),
    "head_channels": 8,
    "norm_groups": 4,
    "context_channels": 16,
}


def job(config: Any, argument: Path, **changes: Any) -> dict[str, Any]:
    """For `rank_worker`, of a config that is written beside its run."""
    file = config.out.with_suffix(".toml")
    file.write_text(to_toml(config))
    return {
        "command": "train-ae" if hasattr(config, "disc") else "train-diffusion",
        "config": str(file),
        "argument": str(argument),
        "record": str(changes.pop("record", config.out)),
        **changes,
    }


def torchrun(
    processes: int, jobs: list[dict[str, Any]], file: Path, *options: str, limit: float = 280
) -> None:
    """Run jobs one after the other in so many processes."""
    file.write_text(json.dumps(jobs))
    command = [*TORCHRUN, f"--nproc-per-node={processes}", *options, str(WORKER), str(file)]
    done = subprocess.run(command, capture_output=True, env=ENVIRONMENT, timeout=limit, check=False)
    assert done.returncode == 0, done.stderr.decode()[-4000:]


class Left(NamedTuple):
    """What a process left of a job."""

    code: int
    ids: list[Any]
    digests: list[str]
    held: dict[str, list[int]]
    times: dict[str, float]


def left(out: Path, processes: int = 1) -> list[Left]:
    return [Left(**json.loads(Path(f"{out}-{rank}.json").read_text())) for rank in range(processes)]


def together(out: Path, processes: int) -> list[Any]:
    """The samples of each step, in the order of the whole batch."""
    steps = zip(*(one.ids for one in left(out, processes)), strict=True)
    return [list(itertools.chain(*parts)) for parts in steps]


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, other: Path, model: str) -> None:
    """The same losses within 1e-6, the same weights within 1e-5."""
    assert len(lines(one)) == len(lines(other)) > 0
    for a, b in zip(lines(one), lines(other), strict=True):
        for name in ("images_per_second", "crc32"):  # the line's own checksum
            a.pop(name, None)
        assert {name: b[name] for name in a} == pytest.approx(a, rel=1e-6, abs=1e-6)
    weights = load_file(other / model)
    for name, value in load_file(one / model).items():
        assert (value - weights[name]).abs().max() <= 1e-5, name


def weights_of(run: Path, model: str = "diffusion.safetensors") -> dict[str, Any]:
    return {name: value.numpy().tobytes() for name, value in load_file(run / model).items()}


@pytest.fixture(scope="module")
def done(pipeline, tmp_path_factory) -> Path:
    """All that two processes can show in one start; each job beside the same one in this process."""
    root = tmp_path_factory.mktemp("ranks")
    latents, pictures = pipeline.latents, pipeline.data
    unet = UNetConfig(**NETWORK, dropout=0.2, self_conditioning=True)
    told = {"unet": unet, "steps": 4, "batch_size": 8, "clip_norm": 0.5, "holdout": 0.1}
    plain = {"steps": 6, "batch_size": 4, "save_every": 100}
    quantized = AutoencoderConfig(
        channels=8,
        multipliers=(1, 2),
        residual_blocks=1,
        norm_groups=2,
        dropout=0.1,
        bottleneck="vq",
        codebook=CodebookConfig(size=16, ema_decay=0.9, restart_after=1, kmeans_start=True),
    )
    disc = DiscriminatorConfig(start="1", warmup=0, ramp=2, channels=8, layers=1, norm="act")
    # the keys' bias has no gradient but rounding, of which Adam makes whole steps: keep them small
    vq = {"autoencoder": quantized, "disc": disc, "ema_decay": 0.9, "lr": 1e-4}

    def jobs(number: str, parts: int) -> list[dict[str, Any]]:
        return [
            job(
                diffusion_config(latents, root / f"told{number}", **told, accumulate=2 * parts),
                latents,
            ),
            job(ae_config(pictures, root / f"gan{number}", accumulate=parts), pictures),
            job(ae_config(pictures, root / f"vq{number}", **vq, accumulate=parts), pictures),
            job(diffusion_config(latents, root / f"nan{number}", **plain), latents, poison=2),
        ]

    stops = []
    for rank in (0, 1):
        config = diffusion_config(latents, root / f"stopped{rank}", **plain)
        order = [rank, 3, int(signal.SIGTERM), str(root / f"sent{rank}")]
        record = root / f"stopped{rank}-first"
        stops += [job(config, latents, signal=order, record=record), job(config, latents)]
    undisturbed = job(diffusion_config(latents, root / "undisturbed", **plain), latents)
    odd = job(diffusion_config(latents, root / "odd", batch_size=5), latents)
    small = job(ae_config(pictures, root / "small", batch_size=2), pictures)
    auto = job(diffusion_config(latents, root / "auto", batch_size="auto"), latents)
    for single in jobs("1", 2):
        run_job(single)
    torchrun(2, [*jobs("2", 1), undisturbed, *stops, odd, small, auto], root / "jobs.json")
    return root


@pytest.mark.parametrize(
    ("name", "model"), [("told", "diffusion"), ("gan", "autoencoder"), ("vq", "autoencoder")]
)
def test_two_processes_train_as_one_does_with_twice_the_parts(done, name, model):
    assert_same_run(done / f"{name}1", done / f"{name}2", f"{model}.safetensors")
    first, second = left(done / f"{name}2", 2)
    assert first.digests == second.digests  # of the weights after each step
    assert len(first.digests) == 4


def test_each_process_reads_its_own_part_of_the_same_batches(done):
    whole = left(done / "told1")[0].ids
    own = [one.ids for one in left(done / "told2", 2)]
    training = [ids for ids in whole if len(ids) == 8]  # the others are validation's
    assert [ids for ids in together_of(own) if len(ids) == 8] == training
    pictures = left(done / "gan1")[0].ids
    first, second = (one.ids for one in left(done / "gan2", 2))
    steps = zip(chunks(first, 2), chunks(second, 2), strict=True)
    assert [place for pair in steps for part in pair for place in part] == pictures


def together_of(own: list[list[Any]]) -> list[Any]:
    """Batches put together from those parts that have half a batch."""
    parts = [[ids for ids in one if len(ids) == 4] for one in own]
    return [list(itertools.chain(*pair)) for pair in zip(*parts, strict=True)]


def chunks(values: list[Any], count: int) -> list[list[Any]]:
    return [values[first : first + count] for first in range(0, len(values), count)]


def test_what_one_process_cannot_use_is_left_out_by_all(done):
    assert_same_run(done / "nan1", done / "nan2", "diffusion.safetensors")
    assert [line["skipped_updates"] for line in lines(done / "nan2")] == [0, 0, 1, 1, 1, 1]
    first, second = left(done / "nan2", 2)
    assert first.digests == second.digests
    assert first.digests[2] == first.digests[1] != first.digests[3]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_any_one_stops_all_and_the_run_ends_with_the_same_bytes(done, rank):
    first = left(done / f"stopped{rank}-first", 2)
    assert [one.code for one in first] == [75, 75]
    assert [len(one.digests) for one in first] == [4, 4]
    again = left(done / f"stopped{rank}", 2)
    assert [(one.code, len(one.digests)) for one in again] == [(0, 2), (0, 2)]
    assert weights_of(done / f"stopped{rank}") == weights_of(done / "undisturbed")


@pytest.mark.parametrize("name", ["odd", "small", "auto"])
def test_a_batch_that_cannot_be_divided_is_refused(done, name):
    assert [one.code for one in left(done / name, 2)] == [2, 2]
    assert not (done / name / "checkpoints").exists()


def test_processes_do_not_take_the_dead_for_the_living():
    store, wait = HashStore(), timedelta(seconds=20)
    store.set("ldmkit/came/1", "of one that is dead")
    names = set()
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda rank: fresh_name(store, rank, 3, wait), range(3)))
        assert len(set(found)) == 1
        names |= set(found)
    assert len(names) == 3
    with pytest.raises(RuntimeError, match="1 of 2 did not come"):
        fresh_name(store, 0, 2, timedelta(seconds=0.1))


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_processes(pipeline, tmp_path):
    latents = pipeline.latents
    # Adam's first steps make whole ones of gradients that are nothing but rounding
    settings = {"steps": 6, "batch_size": 8, "save_every": 100, "lr": 1e-4}
    whole = diffusion_config(latents, tmp_path / "whole", **settings)
    run_job(job(whole, latents))
    config = diffusion_config(latents, tmp_path / "shrinking", **settings)
    for processes, at in ((4, 1), (2, 3)):
        order = [processes - 1, at, int(signal.SIGTERM), str(tmp_path / f"sent{processes}")]
        record = tmp_path / f"by{processes}"
        stopping = job(config, latents, signal=order, record=record)
        torchrun_ends(processes, stopping, tmp_path / "jobs.json")
        assert [one.code for one in left(record, processes)] == [75] * processes
    run_job(job(config, latents, record=tmp_path / "by1"))
    assert_same_run(tmp_path / "whole", tmp_path / "shrinking", "diffusion.safetensors")
    ids = [
        ids for processes in (4, 2, 1) for ids in together(tmp_path / f"by{processes}", processes)
    ]
    assert ids == left(tmp_path / "whole")[0].ids


def torchrun_ends(processes: int, stopping: dict[str, Any], file: Path) -> None:
    """A single job whose processes leave with its exit code, which torchrun calls a failure."""
    file.write_text(json.dumps([stopping]))
    command = [*TORCHRUN, f"--nproc-per-node={processes}", str(WORKER), str(file)]
    done = subprocess.run(command, capture_output=True, env=ENVIRONMENT, timeout=280, check=False)
    assert done.returncode == 1
    left_with_75 = done.stderr.count(
        b"exitcode  : 75"
    )  # though torchrun signals those that are slower
    assert left_with_75 == processes, done.stderr.decode()[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train-ae", "train-diffusion"])
def test_a_killed_worker_is_replaced_and_the_run_ends_with_the_same_bytes(
    pipeline, tmp_path, command
):
    def prepared(name: str, **changes: Any) -> dict[str, Any]:
        if command == "train-ae":
            return job(ae_config(pipeline.data, tmp_path / name, steps=6), pipeline.data, **changes)
        config = diffusion_config(pipeline.latents, tmp_path / name, steps=6)
        return job(config, pipeline.latents, **changes)

    order = [1, 3, int(signal.SIGKILL), str(tmp_path / "sent")]
    jobs = [prepared("undisturbed"), prepared("killed", signal=order)]
    torchrun(2, jobs, tmp_path / "jobs.json", "--max-restarts=3")
    assert (tmp_path / "sent").exists()
    model = "autoencoder.safetensors" if command == "train-ae" else "diffusion.safetensors"
    assert weights_of(tmp_path / "killed", model) == weights_of(tmp_path / "undisturbed", model)


class Started(NamedTuple):
    """Processes as srun starts them: nobody watches over them but the test."""

    processes: list[subprocess.Popen[bytes]]

    def codes(self) -> list[int]:
        return [process.wait(60) for process in self.processes]


def start(config: str, argument: Path, command: str = "train-ae") -> Started:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = [sys.executable, "-m", "ldmkit", command, str(argument), "--config", config]
    return Started(
        [
            subprocess.Popen(
                words,
                env=ENVIRONMENT | address | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                start_new_session=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for rank in range(2)
        ]
    )


def wait_for_steps(run: Path, started: Started) -> None:
    """Until there are more lines in its log."""
    log = run / "metrics.jsonl"
    before = len(log.read_bytes()) if log.exists() else 0
    while not log.exists() or len(log.read_bytes()) <= before:
        assert all(process.poll() is None for process in started.processes)
        time.sleep(0.1)


@pytest.mark.slow
def test_processes_without_torchrun_leave_together(pipeline, tmp_path):
    """A signal to the group of one process, its readers too; then the death of one."""
    config = ae_config(
        pipeline.data, tmp_path / "run", steps=10_000, workers=1, sample_every=10_000
    )
    file = job(config, pipeline.data)["config"]
    started = start(file, pipeline.data)
    wait_for_steps(config.out, started)
    os.killpg(started.processes[1].pid, signal.SIGTERM)
    begun = time.monotonic()
    assert started.codes() == [75, 75]
    assert time.monotonic() - begun < 20
    out, said = started.processes[0].communicate()
    assert out == b""
    assert b"stopped and saved before step" in said
    silent = started.processes[1].communicate()
    assert silent == (b"", b"")
    again = start(file, pipeline.data)
    wait_for_steps(config.out, again)
    again.processes[1].kill()
    assert again.codes() == [1, -9]
    assert b"another process of this run has ended" in again.processes[0].communicate()[1]
    for started_ in (started, again):
        for process in started_.processes:
            for pipe in (process.stdout, process.stderr):
                assert pipe is not None
                pipe.close()
