import json
import os
import signal
import time

import pytest
import torch

import ldmkit
from conftest import ae_config, diffusion_config
from ldmkit.autoencoder.loss import ReconstructionLoss
from ldmkit.autoencoder_configs import DiscriminatorConfig
from ldmkit.errors import DataError, InterruptedRun, NonFiniteError, UsageError
from ldmkit.modelfile import load
from ldmkit.training.averages import averaged_copy, update_average, warmed_decay
from ldmkit.training.checkpoint import TrainingState, saved_checkpoints
from ldmkit.training.interruption import Interruption
from ldmkit.training.optimization import learning_rate
from ldmkit.training.runlog import RunLog
from ldmkit.training.runtime import CPU_GROUP, groups_of

STEPS = 6


def interrupt_at(step, monkeypatch, recipe_name):
    """Send this process SIGTERM while it trains step `step`, as a scheduler would."""
    recipe = __import__(f"ldmkit.recipes.{recipe_name}", fromlist=["x"])
    original = RunLog.add
    count = [0]

    def add(self, scalars):
        original(self, scalars)
        count[0] += 1
        if count[0] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(recipe.RunLog, "add", add)


@pytest.fixture(scope="module")
def whole_runs(pipeline, tmp_path_factory):
    """Both trainers, uninterrupted: the bytes of their model files."""
    root = tmp_path_factory.mktemp("whole")
    ae = ldmkit.train_ae(ae_config(pipeline.data, root / "ae", steps=STEPS))
    ldm = ldmkit.train_diffusion(diffusion_config(pipeline.latents, root / "ldm", steps=STEPS))
    return {"train_ae": ae.read_bytes(), "train_diffusion": ldm.read_bytes()}


def config_for(name, pipeline, out, **changes):
    if name == "train_ae":
        return ae_config(pipeline.data, out, steps=STEPS, **changes)
    return diffusion_config(pipeline.latents, out, steps=STEPS, **changes)


@pytest.mark.parametrize("name", ["train_ae", "train_diffusion"])
@pytest.mark.parametrize("step", range(1, STEPS))
def test_interrupted_at_any_step_ends_with_the_same_bytes(
    name, step, pipeline, whole_runs, tmp_path, monkeypatch
):
    config = config_for(name, pipeline, tmp_path / "run")
    train = getattr(ldmkit, name)
    with monkeypatch.context() as patch:
        interrupt_at(step, patch, name)
        with pytest.raises(InterruptedRun, match=f"saved before step {step}"):
            train(config)
    assert train(config).read_bytes() == whole_runs[name]
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(steps)
    assert [s for s in range(1, STEPS + 1) if s not in steps] == []


@pytest.mark.parametrize("name", ["train_ae", "train_diffusion"])
def test_interrupted_twice_and_a_lost_checkpoint(name, pipeline, whole_runs, tmp_path, monkeypatch):
    config = config_for(name, pipeline, tmp_path / "run")
    train = getattr(ldmkit, name)
    for step in (3, 1):
        with monkeypatch.context() as patch:
            interrupt_at(step, patch, name)
            with pytest.raises(InterruptedRun):
                train(config)
    newest = saved_checkpoints(tmp_path / "run/checkpoints")[-1] / "state.safetensors"
    damaged = bytearray(newest.read_bytes())
    damaged[-1] ^= 1
    newest.write_bytes(damaged)  # it falls back to the one before, and says so
    assert train(config).read_bytes() == whole_runs[name]
    for checkpoint in saved_checkpoints(tmp_path / "run/checkpoints"):
        load(checkpoint / "state.safetensors", kind="checkpoint")


def test_a_checkpoint_that_could_not_be_read_is_written_again(tmp_path):
    module = torch.nn.Linear(2, 2)
    TrainingState(tmp_path, {"module": module}, {}).save(1)
    file = tmp_path / "checkpoints/step-000000001/state.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    TrainingState(tmp_path, {"module": module}, {}).save(1)
    assert file.read_bytes() == whole


@pytest.mark.parametrize("name", ["train_ae", "train_diffusion"])
def test_more_steps_go_on_from_a_finished_run(name, pipeline, whole_runs, tmp_path):
    config = config_for(name, pipeline, tmp_path / "run")
    train = getattr(ldmkit, name)
    train(config.model_copy(update={"steps": 3}))
    assert train(config).read_bytes() == whole_runs[name]


def test_killed_without_warning_the_run_goes_on(pipeline, whole_runs, tmp_path, run):
    import subprocess
    import sys

    from ldmkit.configfile import to_toml

    config = config_for("train_diffusion", pipeline, tmp_path / "run", save_every=1)
    (tmp_path / "run.toml").write_text(to_toml(config))
    command = [
        sys.executable,
        "-m",
        "ldmkit",
        "train-diffusion",
        "--config",
        str(tmp_path / "run.toml"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not saved_checkpoints(tmp_path / "run/checkpoints") and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    done = run("train-diffusion", "--config", tmp_path / "run.toml")
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "run/diffusion.safetensors").read_bytes() == whole_runs["train_diffusion"]


def test_a_finished_run_returns_at_once_without_its_data(pipeline, tmp_path, monkeypatch):
    config = ae_config(pipeline.data, tmp_path / "run", steps=1)
    path = ldmkit.train_ae(config)
    monkeypatch.setattr("ldmkit.recipes.train_ae.open_source", None)  # calling it would fail
    assert ldmkit.train_ae(config) == path


def test_another_config_in_the_same_directory_is_refused(pipeline, tmp_path):
    config = ae_config(pipeline.data, tmp_path / "run", steps=1)
    ldmkit.train_ae(config)
    with pytest.raises(UsageError, match=r"lr = 0.001, not 0.002"):
        ldmkit.train_ae(config.model_copy(update={"lr": 2e-3}))
    with pytest.raises(UsageError, match="cooldown"):
        ldmkit.train_ae(config.model_copy(update={"cooldown": 1}))


def test_with_a_cooldown_the_number_of_steps_is_fixed(pipeline, tmp_path):
    config = ae_config(pipeline.data, tmp_path / "run", steps=2, cooldown=1)
    ldmkit.train_ae(config)
    with pytest.raises(UsageError, match="steps = 2, not 3"):
        ldmkit.train_ae(config.model_copy(update={"steps": 3}))


def test_checkpoints_that_cannot_be_read_never_mean_a_new_start(pipeline, tmp_path):
    config = diffusion_config(pipeline.latents, tmp_path / "run", steps=4)
    ldmkit.train_diffusion(config)
    for checkpoint in saved_checkpoints(tmp_path / "run/checkpoints"):
        (checkpoint / "state.safetensors").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="none of the 2 checkpoints"):
        ldmkit.train_diffusion(config.model_copy(update={"steps": 5}))


def test_a_number_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    pipeline, tmp_path, monkeypatch
):
    """Of the autoencoder; what the diffusion model's training does is tested in test_training_loop2."""
    # without an adversary; what it does is tested beside it
    disc = DiscriminatorConfig(weight=0)
    config = ae_config(pipeline.data, tmp_path / "run", steps=STEPS, save_every=1, disc=disc)
    forward, calls = ReconstructionLoss.forward, [0]

    def poisoned(*arguments, **settings):
        calls[0] += 1
        terms = forward(*arguments, **settings)
        return terms._replace(total=terms.total * float("nan")) if calls[0] >= 4 else terms

    monkeypatch.setattr(ReconstructionLoss, "forward", poisoned)
    with pytest.raises(NonFiniteError, match=r"became nan between steps 3 and 4"):
        ldmkit.train_ae(config)
    newest = saved_checkpoints(tmp_path / "run/checkpoints")[-1]
    assert newest.name == "step-000000003"


def test_checkpoints_refuse_weights_that_are_not_finite(tmp_path):
    module = torch.nn.Linear(2, 2)
    state = TrainingState(tmp_path, {"module": module}, {})
    state.save(1)
    with torch.no_grad():
        module.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"module.weight is not finite"):
        state.save(2)
    assert [path.name for path in saved_checkpoints(tmp_path / "checkpoints")] == ["step-000000001"]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    state = TrainingState(tmp_path, {"module": torch.nn.Linear(2, 2)}, {})
    for step in range(1, 6):
        state.save(step)
    names = [path.name for path in saved_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-000000004", "step-000000005"]


def test_the_average_follows_its_formula():
    module = torch.nn.Linear(1, 1)
    average = averaged_copy(module)
    expected = module.weight.item()
    for step in range(30):
        with torch.no_grad():
            module.weight.fill_(float(step))
        update_average(average, module, warmed_decay(step, 0.5))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert average.weight.item() == pytest.approx(expected, rel=1e-5)


def test_the_average_covers_the_conditioner(pipeline):
    model = ldmkit.load_diffusion(pipeline.ldm)
    state = saved_checkpoints(pipeline.ldm.parent / "checkpoints")[-1] / "state.safetensors"
    _, tensors = load(state, kind="checkpoint")
    for name, value in model.state_dict().items():
        assert torch.equal(value, tensors[f"average.{name}"]), name
    trained = tensors["model.conditioners.class.embedding.weight"]
    assert not torch.equal(model.state_dict()["conditioners.class.embedding.weight"], trained)


def test_the_learning_rate_rises_stays_and_falls(pipeline, tmp_path):
    config = ae_config(pipeline.data, tmp_path, steps=10, warmup=2, cooldown=4)
    rates = [learning_rate(8.0, step, config) for step in range(10)]
    assert rates == [4.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 6.0, 4.0, 2.0]


def test_groups_cover_every_sample_once_and_are_always_full_on_the_cpu():
    for count in range(1, 9):
        for batch_size in (1, 3, 16):
            found, sizes = [], set()
            for indices, kept in groups_of(count, batch_size, torch.device("cpu")):
                found += indices[:kept].tolist()
                sizes.add(len(indices))
            assert found == list(range(count))
            assert sizes == {CPU_GROUP}
    assert [kept for _, kept in groups_of(5, 3, torch.device("cuda"))] == [3, 2]


def test_a_second_ctrl_c_leaves_at_once(tmp_path):
    with Interruption(tmp_path) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        stop.look()
        assert stop.stopping
        assert stop.saving
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_log_cuts_what_a_resumed_run_will_write_again(tmp_path):
    lines = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    log = RunLog(tmp_path, 2, tensorboard=False)
    log.add({"loss": torch.tensor(1.0)})
    log.add({"loss": torch.tensor(2.0)})
    log.write_means(4, batch_size=1)
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == [1, 2, 4]
    assert found[-1]["loss"] == 1.5


def test_a_scalar_that_starts_late_is_averaged_over_its_own_steps(tmp_path):
    log = RunLog(tmp_path, 0, tensorboard=False)
    log.add({"loss": torch.tensor(1.0)})
    log.add({"loss": torch.tensor(3.0), "disc_loss": torch.tensor(0.5)})
    assert log.write_means(2, batch_size=1) == {"loss": 2.0, "disc_loss": 0.5}


def test_a_run_leaves_its_config_numbers_and_previews(pipeline):
    for run, preview in ((pipeline.ae.parent, "reconstructions"), (pipeline.ldm.parent, "samples")):
        assert (run / "config.toml").is_file()
        assert {path.name for path in (run / "samples").iterdir()} == {
            f"{preview}-000000002.png",
            f"{preview}-000000004.png",
        }
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_tensorboard_mirrors_the_numbers(pipeline, tmp_path):
    config = diffusion_config(pipeline.latents, tmp_path / "run", steps=2, tensorboard=True)
    ldmkit.train_diffusion(config)
    [events] = (tmp_path / "run/tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


def test_held_back_pictures_are_measured_and_not_trained_on(pipeline, tmp_path):
    config = ae_config(pipeline.data, tmp_path / "run", steps=1, holdout=0.4)
    path = ldmkit.train_ae(config)
    trained = ldmkit.inspect(ldmkit.InspectConfig(path=path))["facts"]["trained"]
    assert 0 < trained["pictures"] < 12
    assert trained["held_back_psnr"] > 0
    assert trained["held_back_vgg16"] > 0
