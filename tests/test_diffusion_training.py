"""How the diffusion model is trained: optimizers, rates, parts, updates left out, validation."""

import itertools
import json
import math
import os
import signal
from typing import get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import ldmkit
from conftest import diffusion_config
from ldmkit import terminal
from ldmkit.configs import TrainDiffusionConfig
from ldmkit.data.latent_set import LatentSet
from ldmkit.diffusion.denoiser import denoiser
from ldmkit.diffusion.noise_draw import LEVELS, even_sigmas, level_of
from ldmkit.diffusion.objective import denoising_loss
from ldmkit.diffusion.parameterization import PARAMETERIZATIONS
from ldmkit.diffusion.schedule import DiscreteSchedule, scaled_linear
from ldmkit.diffusion.validation import compared_losses, linear_denoise
from ldmkit.diffusion_configs import NoiseDrawConfig, ObjectiveConfig, ScheduleConfig
from ldmkit.diffusion_step import add_gradients, learner_of, losses_by_bin, noise_of_parts
from ldmkit.errors import DataError, InterruptedRun, NonFiniteError, UsageError
from ldmkit.modelfile import load
from ldmkit.recipes import train_diffusion as recipe
from ldmkit.training.adamw8bit import AdamW8bit
from ldmkit.training.checkpoint import saved_checkpoints
from ldmkit.training.guard import PATIENCE, NonFiniteGuard, step_or_put_back, step_unless_found
from ldmkit.training.optimization import gradient_norm, learning_rate, lr_decay
from ldmkit.training.optimizers import OPTIMIZERS, build_optimizers, parameters_of
from ldmkit.training.recomputation import compilation_explained
from test_latent_set import write_set

SCHEDULE = DiscreteSchedule(torch.cumprod(1.0 - scaled_linear(ScheduleConfig()), dim=0))
OBJECTIVE = ObjectiveConfig()
NAMES = get_args(TrainDiffusionConfig.model_fields["optimizer"].annotation)
CPU = torch.device("cpu")
COUNT = 16


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Sixteen latents of unit variance, with two classes."""
    root = tmp_path_factory.mktemp("latents")
    means = torch.randn(COUNT, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return write_set(root / "set", [means], class_names=("a", "b"), labels=torch.arange(COUNT) % 2)


def spoilt(root, indices):
    """The same latents, some of which are not numbers."""
    means = torch.randn(COUNT, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    means[indices] = float("nan")
    return write_set(root / "spoilt", [means])


def settings(out, latents, **changes):
    return diffusion_config(latents, out, **{"steps": 4, **changes})


def tensors_of(path):
    return load(path, kind="diffusion")[1]


def states(out):
    return [
        load(path / "state.safetensors", kind="checkpoint")[1]
        for path in saved_checkpoints(out / "checkpoints")
    ]


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def interrupted_after(step, monkeypatch):
    """Ask the run to stop while it does this step (counted from 1)."""
    add, count = recipe.RunLog.add, itertools.count(1)

    def stop(self, *arguments):
        add(self, *arguments)
        if next(count) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(recipe.RunLog, "add", stop)


# learning rate


def rates(tmp_path, **changes):
    config = settings(tmp_path, tmp_path, lr=1.0, **changes)
    return [
        learning_rate(config.peak_lr, step, config) * lr_decay(step, config)
        for step in range(config.steps)
    ]


def test_the_rate_falls_as_a_cosine_from_the_end_of_the_warm_up(tmp_path):
    found = rates(tmp_path, steps=10, warmup=2, lr_decay="cosine")
    expected = [(1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    assert found == pytest.approx([0.5, 1.0, *expected])
    assert rates(tmp_path, steps=10, lr_decay="cosine", decay_start=5)[:6] == [1.0] * 6


def test_the_rate_falls_with_the_inverse_root_of_the_step(tmp_path):
    found = rates(tmp_path, steps=17, warmup=4, lr_decay="inverse-sqrt")
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found[9] == pytest.approx(2 / 3)
    assert found[16] == pytest.approx(0.5)
    cooled = rates(tmp_path, steps=17, warmup=4, lr_decay="inverse-sqrt", cooldown=2)
    assert cooled[16] == pytest.approx(0.25)


def test_constant_is_the_rate_of_before_to_the_last_bit(tmp_path):
    config = settings(tmp_path, tmp_path, lr=1e-4, steps=50, warmup=7, cooldown=9)
    assert [learning_rate(1e-4, step, config) for step in range(50)] == [
        learning_rate(config.peak_lr, step, config) * lr_decay(step, config) for step in range(50)
    ]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lr_decay": "inverse-sqrt"}, "needs --decay-start"),
        ({"lr_decay": "cosine", "warmup": 4}, "before the last step"),
        ({"decay_start": 2}, "needs --lr-decay"),
        ({"accumulate": 3}, "does not divide --batch-size 4"),
        ({"optimizer": "adafactor", "betas": (0.5, 0.9)}, "adafactor has none"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(changes, sentence, tmp_path):
    with pytest.raises(ValidationError, match=sentence):
        settings(tmp_path, tmp_path, **changes)


def test_the_scaled_rate_is_the_papers_printed_and_stored(latents, tmp_path, capsys):
    terminal.be_quiet(False)
    changes = {"lr": 2e-6, "scale_lr": True, "batch_size": 8, "accumulate": 2}
    path = ldmkit.train_diffusion(settings(tmp_path / "run", latents, **changes, steps=2))
    assert "learning rate 1.6e-05 = 2e-06 x 8 samples" in capsys.readouterr().err
    facts = ldmkit.inspect(ldmkit.InspectConfig(path=path))["facts"]
    assert facts["trained"]["learning_rate"] == pytest.approx(1.6e-5)
    assert lines(tmp_path / "run")[1]["learning_rate"] == pytest.approx(1.6e-5)
    typed = {"lr": 2e-6 * 8, "batch_size": 8, "accumulate": 2, "steps": 2}
    again = ldmkit.train_diffusion(settings(tmp_path / "typed", latents, **typed))
    assert all(torch.equal(a, tensors_of(again)[k]) for k, a in tensors_of(path).items())


# optimizers


def test_the_optimizers_are_those_of_the_config():
    assert set(OPTIMIZERS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("decay_all", [True, False])
def test_every_weight_is_moved_by_one_optimizer_and_decays_as_asked(name, decay_all, tmp_path):
    norm, frozen = torch.nn.GroupNorm(2, 4), torch.nn.Linear(4, 4)
    linear, table = torch.nn.Linear(4, 4), torch.nn.Embedding(3, 4)
    conv = torch.nn.Conv2d(4, 4, 3)
    module = torch.nn.ModuleList([norm, frozen.requires_grad_(False), linear, table, conv])
    config = settings(tmp_path, tmp_path, optimizer=name, decay_all=decay_all, weight_decay=0.3)
    built = build_optimizers(module, config)
    moved = [id(p) for p in parameters_of(built.values())]
    assert sorted(moved) == sorted(id(p) for p in module.parameters() if p.requires_grad)
    decays = {
        id(p): group["weight_decay"]
        for optimizer in built.values()
        for group in optimizer.param_groups
        for p in group["params"]
    }
    vectors = (norm.weight, norm.bias, linear.bias, conv.bias)
    assert {decays[id(p)] for p in vectors} == {0.3 if decay_all else 0.0}
    assert {decays[id(p)] for p in (linear.weight, table.weight, conv.weight)} == {0.3}
    if name == "muon":
        assert [id(p) for p in parameters_of([built["muon"]])] == [id(linear.weight)]


def test_an_update_of_muon_is_as_large_as_one_of_adamw(tmp_path):
    sizes = []
    for name in ("adamw", "muon"):
        torch.manual_seed(0)
        linear = torch.nn.Linear(64, 128)
        before = linear.weight.detach().clone()
        config = settings(tmp_path, tmp_path, optimizer=name, weight_decay=0.0, lr=1e-3)
        linear.weight.grad = torch.randn_like(before)
        for optimizer in build_optimizers(linear, config).values():
            optimizer.step()
        sizes.append((linear.weight - before).square().mean().sqrt().item())
    assert sizes[0] == pytest.approx(1e-3, rel=0.01)
    assert (
        0.1 < sizes[1] / sizes[0] < 0.4
    )  # Liu et al. 2025: AdamW's updates are 0.2 to 0.4 in the run


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_interrupted_equals_uninterrupted(name, accumulate, latents, tmp_path, monkeypatch):
    changes = {"optimizer": name, "accumulate": accumulate, "clip_norm": 1.0, "lr_decay": "cosine"}
    changes |= {"holdout": 0.2, "validate_every": 2, "weight_decay": 0.1, "decay_all": False}
    whole = ldmkit.train_diffusion(settings(tmp_path / "whole", latents, **changes)).read_bytes()
    config = settings(tmp_path / "parts", latents, **changes)
    with monkeypatch.context() as patch:
        interrupted_after(3, patch)
        with pytest.raises(InterruptedRun, match="saved before step 3"):
            ldmkit.train_diffusion(config)
    assert ldmkit.train_diffusion(config).read_bytes() == whole
    measured = [line["step"] for line in lines(tmp_path / "parts") if "validation_loss" in line]
    assert measured == [2, 4]


def test_learned_uncertainty_is_trained_and_resumed_and_in_no_model_file(
    latents, tmp_path, monkeypatch
):
    changes = {"objective": {"weighting": "uncertainty"}, "log_every": 1}
    whole = ldmkit.train_diffusion(settings(tmp_path / "whole", latents, **changes))
    plain = ldmkit.train_diffusion(settings(tmp_path / "plain", latents, log_every=1))
    assert tensors_of(whole).keys() == tensors_of(plain).keys()
    assert whole.read_bytes() != plain.read_bytes()
    # before its first step u is 0, and what is logged is the loss itself
    first = [lines(tmp_path / name)[0]["loss"] for name in ("whole", "plain")]
    assert first[0] == first[1]
    first, last = (state["uncertainty.out.weight"] for state in states(tmp_path / "whole"))
    assert last.any()
    assert not torch.equal(first, last)

    config = settings(tmp_path / "parts", latents, **changes)
    with monkeypatch.context() as patch:
        interrupted_after(3, patch)
        with pytest.raises(InterruptedRun):
            ldmkit.train_diffusion(config)
    assert ldmkit.train_diffusion(config).read_bytes() == whole.read_bytes()


# parts, clipping, memory


def test_the_parts_of_a_batch_get_the_noise_of_the_whole():
    def source():
        generator = torch.Generator().manual_seed(3)
        return lambda like: torch.randn(like.shape, generator=generator)

    whole, parts = source(), noise_of_parts(source(), 4)
    asked = [(8, 3, 2, 2), (8, 3, 1, 1)]
    expected = [whole(torch.empty(shape)) for shape in asked]
    found = [[part(torch.empty(2, *shape[1:])) for shape in asked] for part in parts]
    for place, tensor in enumerate(expected):
        assert torch.equal(torch.cat([rows[place] for rows in found]), tensor)


def test_a_batch_in_parts_sees_the_same_samples(latents, tmp_path):
    found = {}
    for accumulate in (1, 2, 4):
        out = tmp_path / str(accumulate)
        ldmkit.train_diffusion(settings(out, latents, accumulate=accumulate, steps=2))
        found[accumulate] = lines(out)
    for accumulate in (2, 4):
        for one, other in zip(found[1], found[accumulate], strict=True):
            assert one.keys() == other.keys()
            same = [name for name in one if name.startswith(("loss", "gradient"))]
            assert {n: one[n] for n in same} == pytest.approx({n: other[n] for n in same}, rel=1e-4)


def test_gradients_are_clipped_together():
    weights = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    for limit, kept in ((0.0, 13.0), (26.0, 13.0), (1.3, 1.3)):
        weights[0].grad, weights[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
        assert gradient_norm(weights, limit).item() == pytest.approx(13.0)
        assert torch.cat([p.grad for p in weights]).norm().item() == pytest.approx(kept, rel=1e-5)  # pyright: ignore[reportCallIssue, reportArgumentType]


def test_recomputed_activations_change_no_bit(latents, tmp_path):
    unet = settings(tmp_path, latents).unet.model_copy(update={"dropout": 0.2})
    found = [
        tensors_of(
            ldmkit.train_diffusion(
                settings(tmp_path / str(wanted), latents, checkpointing=wanted, unet=unet, steps=2)
            )
        )
        for wanted in (False, True)
    ]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_recomputing_keeps_less(latents, tmp_path):
    kept = []
    for wanted in (False, True):
        config = settings(tmp_path, latents, checkpointing=wanted)
        data = LatentSet(latents)
        model_config = recipe.diffusion_config(config, data)
        learner = learner_of(recipe.fresh_model(config, model_config, data), config, CPU)
        batch = recipe.draw_batch(
            *(learner.model, data.read(range(4)), {"class": torch.tensor([[0], [1], [0], [1]])}),
            *(torch.Generator().manual_seed(0), config),
        )
        kept.append(0)

        def pack(tensor):
            kept[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            add_gradients(learner, [batch], config.objective)
    assert kept[1] < kept[0]


def test_a_network_that_cannot_be_compiled_is_a_sentence():
    def backend(graph, inputs):
        raise RuntimeError("no compiler here")

    compiled = torch.compile(lambda x: x + 1, backend=backend)
    expected = r"could not compile the network .*no compiler here.*--no-compile"
    with pytest.raises(UsageError, match=expected), compilation_explained():
        compiled(torch.zeros(1))
    with pytest.raises(RuntimeError, match="something else"), compilation_explained():
        raise RuntimeError("something else")
    torch._dynamo.reset()


# updates that are left out


@pytest.mark.parametrize("name", NAMES)
def test_a_latent_that_is_no_number_costs_its_step_and_nothing_else(name, tmp_path, capsys):
    terminal.be_quiet(False)
    step = 2
    config = settings(tmp_path / "run", tmp_path / "spoilt", optimizer=name, save_every=1)
    bad = recipe.samples_of_step(
        step, [np.arange(COUNT)], batch_size=config.samples_per_step, seed=config.seed
    )[0]
    spoilt(tmp_path, [bad])
    ldmkit.train_diffusion(config.model_copy(update={"steps": step + 1}))
    before, after = states(tmp_path / "run")
    learnt = {k for k in before if k.startswith(("model.", "optimizer."))}
    assert learnt == {k for k in after if k.startswith(("model.", "optimizer."))}
    assert all(torch.equal(before[name], after[name]) for name in learnt)
    assert (int(before["guard.skipped"]), int(after["guard.skipped"])) == (0, 1)
    assert f"step {step}: loss or gradient is not finite, so no update; samples {bad}\n" in (
        capsys.readouterr().err
    )
    path = ldmkit.train_diffusion(config)
    assert all(value.isfinite().all() for value in tensors_of(path).values())
    trained = ldmkit.inspect(ldmkit.InspectConfig(path=path))["facts"]["trained"]
    assert trained["skipped_updates"] == 1
    found = lines(tmp_path / "run")
    assert [line["skipped_updates"] for line in found] == [float(s > step) for s in range(1, 5)]
    assert [line["step"] for line in found if "loss" not in line] == [step + 1]


def test_ten_in_a_row_end_the_run_with_the_weights_of_before(tmp_path):
    data = spoilt(tmp_path, list(range(COUNT)))
    config = settings(tmp_path / "run", data, steps=30, save_every=100, log_every=100)
    with pytest.raises(
        NonFiniteError, match=rf"{PATIENCE} updates in a row .* step 9 with"
    ) as error:
        ldmkit.train_diffusion(config)
    assert error.value.exit_code == 5
    [state] = states(tmp_path / "run")
    data_set = LatentSet(data)
    fresh = learner_of(
        recipe.fresh_model(config, recipe.diffusion_config(config, data_set), data_set), config, CPU
    )
    for name, value in fresh.model.state_dict().items():
        assert torch.equal(state[f"model.{name}"], value), name
    with pytest.raises(NonFiniteError, match="step 19 with"):  # as many tries again
        ldmkit.train_diffusion(config)


def test_a_good_update_ends_a_row():
    guard = NonFiniteGuard()
    good, bad = torch.ones(3), torch.tensor([1.0, float("inf"), 1.0])
    for step in range(30):
        losses = good if step % PATIENCE == PATIENCE - 1 else bad
        guard.judge(step, np.arange(3) + 10 * step, losses, torch.ones(()))
    skipped, exhausted = guard.look()
    assert not exhausted
    assert [skip.step for skip in skipped] == [s for s in range(30) if s % 10 != 9]
    assert all(skip.indices.tolist() == [10 * skip.step + 1] for skip in skipped)
    guard.judge(30, np.arange(3), good, torch.tensor(float("nan")))
    [skip], _ = guard.look()
    assert skip.indices.tolist() == [0, 1, 2]  # the gradient's fault: any of them


def test_losses_by_noise_level_leave_out_what_is_no_number():
    losses = torch.tensor([1.0, float("nan"), 3.0, 5.0])
    total, number = losses_by_bin(losses, torch.tensor([0, 0, 2, 2]))
    assert (total[0], number[0], total[2], number[2]) == (1.0, 1.0, 8.0, 2.0)
    assert number.sum() == 3


def build(name):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(80, 60))
    if name == "adamw-8bit":
        return weight, AdamW8bit([{"params": [weight]}], 0.1, (0.9, 0.999))
    if name == "adamw":
        return weight, torch.optim.AdamW([weight], 0.1, fused=True)
    return weight, torch.optim.Muon([weight], 0.1)


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit", "muon"])
def test_a_step_is_left_out_on_the_device_as_on_the_host(name):
    """The ways for devices that must not be waited for, against optimizers that never saw the gradient."""

    def masked(optimizer, sound):
        if name != "muon":
            step_unless_found(optimizer, (~torch.tensor(sound)).float())
        else:
            with torch.no_grad():
                step_or_put_back(torch.tensor(sound), optimizer)

    weight, optimizer = build(name)
    expected, plain = build(name)
    for sound in (False, True, True, False, True):
        gradient = torch.randn(80, 60)
        weight.grad = gradient if sound else torch.full_like(gradient, float("nan"))
        masked(optimizer, sound)
        if sound:
            expected.grad = gradient
            plain.step()
        assert torch.equal(weight, expected)
    for key, value in plain.state[expected].items():
        assert torch.equal(optimizer.state[weight][key], value), key


# validation


def test_the_linear_denoiser_is_the_best_for_white_latents(generator):
    latents = torch.randn(4000, 1, 2, 2, generator=generator)
    noise = torch.randn(4000, 1, 2, 2, generator=generator)
    sigma = even_sigmas(SCHEDULE, NoiseDrawConfig(), 4000, generator)
    for name, parameterization in PARAMETERIZATIONS.items():
        losses = compared_losses(
            linear_denoise, parameterization, latents, sigma, noise, None, OBJECTIVE
        )
        assert torch.equal(losses.model, losses.linear)
        expected = sigma**2 / (1 + sigma**2) / parameterization(sigma).c_out ** 2
        assert losses.linear.mean().item() == pytest.approx(expected.mean().item(), rel=0.03), name
        for factor in (0.8, 1.2):
            worse = compared_losses(
                lambda x, s, c, factor=factor: factor * linear_denoise(x, s, c),
                parameterization,
                latents,
                sigma,
                noise,
                None,
                OBJECTIVE,
            )
            assert worse.model.mean() > losses.linear.mean()


def test_zero_is_the_loss_of_a_network_before_its_first_step(generator):
    latents = torch.randn(64, 1, 2, 2, generator=generator)
    noise = torch.randn(64, 1, 2, 2, generator=generator)
    sigma = even_sigmas(SCHEDULE, NoiseDrawConfig(), 64, generator)
    epsilon = PARAMETERIZATIONS["epsilon"]
    losses = compared_losses(linear_denoise, epsilon, latents, sigma, noise, None, OBJECTIVE)
    assert torch.allclose(losses.zero, noise.square().mean((1, 2, 3)), rtol=1e-4)
    silent = denoiser(lambda x, t, c: 0 * x, SCHEDULE, epsilon)
    again = denoising_loss(silent, epsilon, latents, sigma, lambda like: noise, None, OBJECTIVE)
    assert torch.allclose(losses.zero, again, rtol=1e-4)


def test_validation_times_fill_every_bin_alike(generator):
    bins = level_of(SCHEDULE, even_sigmas(SCHEDULE, NoiseDrawConfig(), 50, generator))
    assert torch.bincount(bins, minlength=LEVELS).tolist() == [5] * LEVELS
    assert bins.tolist() != sorted(bins.tolist())
    assert level_of(SCHEDULE, SCHEDULE.sigmas[[0, 99, 100, 999]].float()).tolist() == [0, 0, 1, 9]


def test_the_validation_loss_is_the_same_each_time_and_depends_on_the_weights_alone(
    latents, tmp_path, capsys
):
    terminal.be_quiet(False)
    changes = {"validation_latents": latents, "validate_every": 2, "validate_num": 10}
    ldmkit.train_diffusion(settings(tmp_path / "a", latents, **changes))
    spoken = capsys.readouterr().err
    plain = ldmkit.train_diffusion(settings(tmp_path / "plain", latents))
    measured = tensors_of(tmp_path / "a/diffusion.safetensors")
    assert all(torch.equal(v, measured[name]) for name, v in tensors_of(plain).items())
    ldmkit.train_diffusion(settings(tmp_path / "b", latents, **changes, log_every=3))
    runs = [[x for x in lines(tmp_path / name) if "validation_loss" in x] for name in "ab"]
    assert runs[0] == runs[1]
    first, last = runs[0]
    for name in ("validation_linear", "validation_zero"):
        assert first[name] == last[name]
    assert first["validation_loss"] != last["validation_loss"]
    assert sum(name.startswith("validation_loss_by_noise_") for name in last) == LEVELS
    numbers = [f"{last[f'validation_{name}']:.4g}" for name in ("loss", "linear", "zero")]
    assert "step 4: validation {}, linear {}, zero {}\n".format(*numbers) in spoken
    path = tmp_path / "a/diffusion.safetensors"
    trained = ldmkit.inspect(ldmkit.InspectConfig(path=path))["facts"]["trained"]
    assert trained["validation_loss"] == last["validation_loss"]


def test_validation_latents_of_another_autoencoder_or_other_classes_are_refused(latents, tmp_path):
    means = torch.randn(4, 3, 4, 4)
    others = write_set(tmp_path / "others", [means])
    with pytest.raises(DataError, match="others has other classes than the model"):
        ldmkit.train_diffusion(settings(tmp_path / "a", latents, validation_latents=others))
    manifest = others / "manifest.json"
    page = json.loads(manifest.read_text().replace("0" * 64, "1" * 64))
    del page["digest"]  # which does not hold after the change
    manifest.write_text(json.dumps(page))
    with pytest.raises(DataError, match="another autoencoder"):
        ldmkit.train_diffusion(settings(tmp_path / "a", latents, validation_latents=others))


def test_latents_of_several_shapes_are_measured(tmp_path):
    mixed = write_set(tmp_path / "mixed", [torch.randn(5, 3, 4, 4), torch.randn(3, 3, 4, 8)])
    config = settings(tmp_path / "run", mixed, validation_latents=mixed, validate_num=8)
    ldmkit.train_diffusion(config)
    assert math.isfinite(lines(tmp_path / "run")[-1]["validation_loss"])
