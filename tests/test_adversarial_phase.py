"""The adversarial phase: how it begins, and that a collapse is noticed, undone once, then named."""

import contextlib
import json

import pytest
import torch

import ldmkit
from conftest import ae_config
from ldmkit.autoencoder.adversarial_phase import CollapseWatch, phase_of
from ldmkit.autoencoder.loss import ReconstructionLoss
from ldmkit.autoencoder_configs import DiscriminatorConfig
from ldmkit.errors import CollapseError
from ldmkit.modelfile import load
from ldmkit.training.checkpoint import saved_checkpoints

SAFE = {"start": "2", "warmup": 2, "ramp": 2, "channels": 8, "layers": 1, "jump": 1e6}


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights_of(run):
    newest = saved_checkpoints(run / "checkpoints")[-1]
    return load(newest / "state.safetensors", kind="checkpoint")[1]


def test_the_phases_of_a_run():
    config = DiscriminatorConfig(start="10", warmup=3, ramp=4, weight=0.8)
    phases = [phase_of(step, 10, config) for step in range(9, 20)]
    assert [p.autoencoder_learns for p in phases] == [True] + 3 * [False] + 7 * [True]
    assert [p.discriminator_learns for p in phases] == [False] + 10 * [True]
    weights = [p.weight for p in phases]
    assert weights == pytest.approx([0, 0, 0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8])
    at_once = DiscriminatorConfig(start="0", warmup=0, ramp=0, weight=0.8)
    assert phase_of(0, 0, at_once).weight == 0.8
    off = DiscriminatorConfig(weight=0)
    assert phase_of(10**9, 0, off) == (True, False, 0.0)


def test_while_the_discriminator_warms_up_the_autoencoder_waits(pictures, tmp_path):
    config = ae_config(pictures, tmp_path / "run", save_every=1, disc=SAFE, steps=5)
    saved = {}
    for steps in (2, 3, 4, 5):
        ldmkit.train_ae(config.model_copy(update={"steps": steps}))
        saved[steps] = weights_of(tmp_path / "run")

    def moved(name, before, after):
        return not torch.equal(saved[before][name], saved[after][name])

    for before in (2, 3):
        assert not moved("autoencoder.decoder.conv_out.weight", before, before + 1)
        assert moved("discriminator.stages.0.weight", before, before + 1)
    assert moved("autoencoder.decoder.conv_out.weight", 4, 5)
    assert moved("discriminator.stages.0.weight", 4, 5)
    lines = {line["step"]: line for line in lines_of(tmp_path / "run")}
    assert lines[2]["adaptive"] == 0
    assert "disc_loss" not in lines[2]
    assert "total" not in lines[3]
    assert 0 <= lines[3]["accuracy"] <= 1
    assert lines[5]["adaptive"] > 0


def test_the_watch_sees_each_kind_of_collapse():
    watch = CollapseWatch(DiscriminatorConfig(patience=3, jump=2.0))
    one = torch.tensor(1.0)
    for _ in range(100):
        watch.note_autoencoder(one, torch.tensor(0.5))
        watch.note_discriminator(torch.tensor(0.8))
    watch.raise_if_collapsed(7)
    for _ in range(3):
        watch.note_discriminator(one)
    with pytest.raises(CollapseError, match="step 8: the discriminator was never wrong for 3"):
        watch.raise_if_collapsed(8)
    watch.note_discriminator(torch.tensor(0.9))
    watch.raise_if_collapsed(9)
    watch.note_autoencoder(one, torch.tensor(10.0))  # one bad batch is no collapse
    watch.raise_if_collapsed(9)
    for _ in range(60):
        watch.note_autoencoder(one, torch.tensor(1.6))
    with pytest.raises(CollapseError, match=r"rose from 0\.5 to 1\."):
        watch.raise_if_collapsed(10)
    watch = CollapseWatch(DiscriminatorConfig())
    watch.note_autoencoder(torch.tensor(float("nan")), one)
    watch.note_autoencoder(one, one)  # it is remembered
    with pytest.raises(CollapseError, match="not finite"):
        watch.raise_if_collapsed(11)


def plant(monkeypatch, from_call, change, *, times):
    """From its `from_call`-th call on, the loss with an adversary is changed, `times` times."""
    original, calls, weights = ReconstructionLoss.forward, [0], []

    def planted(self, *arguments, **settings):
        terms = original(self, *arguments, **settings)
        calls[0] += 1
        adversary = settings.get("adversary")
        if adversary is None:
            return terms
        weights.append(adversary.weight)
        if calls[0] >= from_call and calls[0] < from_call + times:
            return change(terms)
        return terms

    monkeypatch.setattr(ReconstructionLoss, "forward", planted)
    return weights


def spoil(terms):
    return terms._replace(total=terms.total * float("nan"))


def jump(terms):
    return terms._replace(perceptual=terms.perceptual + 1e9)


@pytest.mark.parametrize("change", [spoil, jump])
def test_a_collapse_goes_back_once_with_half_the_weight(change, pictures, tmp_path, monkeypatch):
    config = ae_config(pictures, tmp_path / "run", disc=SAFE, steps=9, save_every=100)
    weights = plant(
        monkeypatch, 5, change, times=1
    )  # in step 6, two of them without the autoencoder
    path = ldmkit.train_ae(config)
    assert path.exists()
    setback = json.loads((tmp_path / "run/setback.json").read_text())
    assert (setback["step"], setback["failed"]) == (4, 7)
    assert weights == [0.25, 0.5, 0.5, 0.125, 0.25, 0.25, 0.25, 0.25]
    lines = lines_of(tmp_path / "run")
    assert [line["step"] for line in lines if "total" in line or "accuracy" in line] == list(
        range(1, 10)
    )
    assert [line["set_back_from"] for line in lines if "set_back_from" in line] == [7]
    assert all(x.isfinite().all() for x in load(path, kind="autoencoder")[1].values())


def test_a_setback_is_remembered_by_a_resumed_run(pictures, tmp_path, monkeypatch):
    config = ae_config(pictures, tmp_path / "run", disc=SAFE, steps=9, save_every=100)
    weights = plant(monkeypatch, 5, spoil, times=1)
    whole = ldmkit.train_ae(config).read_bytes()
    weights.clear()
    (tmp_path / "run/autoencoder.safetensors").unlink()
    for checkpoint in saved_checkpoints(tmp_path / "run/checkpoints")[1:]:
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    assert ldmkit.train_ae(config).read_bytes() == whole
    assert weights == [0.125, 0.25, 0.25, 0.25, 0.25]


@pytest.mark.parametrize("change", [spoil, jump])
def test_a_second_collapse_ends_the_run_with_its_reason(
    change, pictures, tmp_path, monkeypatch, run
):
    from ldmkit.configfile import to_toml

    config = ae_config(pictures, tmp_path / "run", disc=SAFE, steps=9, save_every=100)
    (tmp_path / "config.toml").write_text(to_toml(config))
    plant(monkeypatch, 5, change, times=100)
    done = run("train-ae", pictures, "--config", tmp_path / "config.toml")
    assert done.returncode == 5
    assert done.stdout == b""
    words = done.stderr.decode()
    assert "collapsed before step" in words
    assert "--disc.weight" in words
    assert not (tmp_path / "run/autoencoder.safetensors").exists()
    good = weights_of(tmp_path / "run")
    assert all(tensor.isfinite().all() for tensor in good.values())


def test_a_discriminator_that_is_never_wrong_is_a_collapse(pictures, tmp_path, monkeypatch):
    always_right = {"accuracy": torch.tensor(1.0)}
    from ldmkit.autoencoder import training_step

    monkeypatch.setattr(training_step, "update_discriminator", lambda *_, **__: always_right)
    config = ae_config(pictures, tmp_path / "run", disc=SAFE | {"patience": 3}, steps=12)
    with pytest.raises(CollapseError, match=r"never wrong for 3 steps; so it did before step 7"):
        ldmkit.train_ae(config)


@pytest.mark.slow
def test_an_adversary_of_absurd_weight_is_caught(pictures, tmp_path):
    """No planted number: a run that really breaks."""
    disc = SAFE | {"weight": 1e6, "max_adaptive": 1e12, "jump": 1.15, "start": "80"}
    often = {"save_every": 1000, "sample_every": 1000, "log_every": 5}
    config = ae_config(pictures, tmp_path / "run", disc=disc, steps=150, lr=0.003, **often)
    with contextlib.suppress(CollapseError):  # half of such a weight may break it again
        ldmkit.train_ae(config)
    setback = json.loads((tmp_path / "run/setback.json").read_text())
    assert "the perceptual distance rose" in setback["reason"]
