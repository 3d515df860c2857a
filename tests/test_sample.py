"""Drawing by every sampler, grid and kind of guidance: random networks, told several things."""

import math
import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
import torch

import ldmkit
from ldmkit.assembly import build_diffusion, load_diffusion, save_diffusion
from ldmkit.condition_configs import ClassCondition, LowResCondition, TextCondition
from ldmkit.conditioning.condition import stacked
from ldmkit.diffusion import guidance as guidance_module
from ldmkit.diffusion.grids import GRIDS
from ldmkit.diffusion.guidance import Guidance
from ldmkit.diffusion.samplers import SAMPLERS, sample_ddim
from ldmkit.diffusion_configs import DiffusionConfig, ScheduleConfig, UNetConfig
from ldmkit.drawing import Guide, Manner, denoise_at, draw_latents, guide_together, seeded_noise
from ldmkit.errors import DataError, UsageError
from ldmkit.facts import DiffusionFacts, Whitening
from ldmkit.generation_configs import (
    Combination,
    GridName,
    GrowthName,
    SampleConfig,
    SamplerName,
    SamplerOptions,
)
from ldmkit.manner import OPTIONS, manner_of
from ldmkit.modelfile import load
from ldmkit.requests import text_values

UNET = UNetConfig(
    channels=8,
    multipliers=(1,),
    residual_blocks=1,
    attention_factors=(1,),
    head_channels=8,
    norm_groups=4,
    context_channels=8,
)
CLASS = ClassCondition(names=("cat", "dog"))
TEXT = TextCondition(length=8, depth=1, heads=1, head_width=8, merges=())
LOWRES = LowResCondition(image_channels=3, ratio=4, factor=4)
SHAPE = (2, 4, 4)


def built(path: Path, *conditions, seed=0, autoencoder="a", std=2.0, network=(), **config) -> Path:
    """A model file with random weights, every one of which matters."""
    settings = {"parameterization": "epsilon", "schedule": ScheduleConfig()} | config
    unet = UNET.model_copy(update=dict(network))
    model = build_diffusion(
        DiffusionConfig(unet=unet, latent_channels=SHAPE[0], conditions=conditions, **settings)
    )
    whitening = Whitening(mean=(0.5,) * SHAPE[0], std=(std,) * SHAPE[0])
    model.set_whitening(whitening)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in model.parameters():
            weights.copy_(0.2 * torch.randn(weights.shape, generator=generator))
    facts = DiffusionFacts(
        fingerprint="",
        autoencoder=autoencoder * 64,
        latent_shape=SHAPE,
        whitening=whitening,
        trained={},
        versions={},
    )
    save_diffusion(path, model, facts)
    return path


@pytest.fixture(scope="module")
def ldm(tmp_path_factory):
    """Told classes and texts."""
    return built(tmp_path_factory.mktemp("ldm") / "diffusion.safetensors", CLASS, TEXT)


@pytest.fixture(scope="module")
def super_resolution(tmp_path_factory):
    """Told classes and low-resolution pictures."""
    return built(tmp_path_factory.mktemp("sr") / "diffusion.safetensors", CLASS, LOWRES)


def drawn(model, out, **settings):
    """Latents from a command."""
    config = {"num": 3, "steps": 4, "device": "cpu", "prompt": ("a b",), "label": ("dog",)}
    config |= {"model": model, "out": out / "samples.safetensors"} | settings
    config["out"].unlink(missing_ok=True)  # else one of the same samples would stay as it is
    ldmkit.sample(SampleConfig.model_validate(config))
    return load(config["out"], kind="samples")[1]["latents"]


def values_for(model, count):
    """What `count` samples are told, all differently."""
    made = {
        "class": torch.arange(count)[:, None] % 2,
        "text": torch.stack([text_values(model.config, "x" * n, "") for n in range(1, count + 1)])
        if any(one.kind == "text" for one in model.config.conditions)
        else None,
        "lowres": torch.cat(
            [torch.rand(count, 3, 4, 4) * 2 - 1, torch.zeros(count, 1, 4, 4)], dim=1
        ),
    }
    return {one.kind: made[one.kind] for one in model.config.conditions}


def test_options_are_in_step_with_the_mathematics():
    assert set(get_args(SamplerName)) == set(SAMPLERS)
    assert set(get_args(GridName)) == {"auto", *GRIDS}
    assert set(get_args(Combination)) == set(get_args(guidance_module.Combination))
    assert set(get_args(GrowthName)) == set(get_args(guidance_module.GrowthName))
    known = {name for sampler in SAMPLERS.values() for name in sampler.parameters}
    assert set(OPTIONS) <= known


def test_unguided_and_guided_ddim_are_what_they_were(ldm):
    """One weight: a doubled batch, conditional rows first, and the schedule's own grid."""
    model, count, weight = load_diffusion(ldm), 3, 2.7
    values = values_for(model, count)
    condition = stacked(model.condition(values), model.condition(model.empty(values)))

    def guided(x, sigma):
        both = model.denoise(torch.cat([x, x]), torch.cat([sigma, sigma]), condition)
        conditional, null = both.chunk(2)
        return null + weight * (conditional - null)

    def plain(x, sigma):
        return model.denoise(x, sigma, model.condition(values))

    for denoise, guide in (
        (guided, guide_together(model.config.conditions, weight)),
        (plain, guide_together(model.config.conditions, 1.0)),
    ):
        noise = seeded_noise(range(count))
        start, sigmas = noise(torch.empty(count, *SHAPE)), model.schedule.steps(5)
        with torch.no_grad():
            x = model.schedule.initial(start, float(sigmas[0]))
            expected = sample_ddim(denoise, x, sigmas, noise=noise, eta=0.5)
        found = draw_latents(
            model,
            values,
            (count, *SHAPE),
            seeded_noise(range(count)),
            Manner(5, guide, settings={"eta": 0.5}),
        )
        assert torch.equal(found, model.unwhiten(expected))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_of_any_sampler_depends_on_its_seed_alone(sampler, ldm, tmp_path):
    steps = 13 if sampler == "restart" else 5  # so many that restart restarts
    settings = {"sampler": sampler, "steps": steps, "num": 4}
    alone = drawn(ldm, tmp_path, batch_size=1, **settings)
    together = drawn(ldm, tmp_path, batch_size=4, **settings)
    assert alone.isfinite().all()
    assert torch.equal(alone, together)

    model, manner = load_diffusion(ldm), Manner(steps, sampler=sampler)
    values = values_for(model, 4)
    four = draw_latents(model, values, (4, *SHAPE), seeded_noise(range(4)), manner)
    one = {kind: value[2:3] for kind, value in values.items()}
    third = draw_latents(model, one, (1, *SHAPE), seeded_noise([2]), manner)
    assert torch.allclose(four[2:3], third, rtol=1e-3, atol=1e-3 * float(four.std()))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 6])
def test_steps_are_the_calls_of_the_model(sampler, steps, ldm, monkeypatch):
    model, calls = load_diffusion(ldm), []
    ask = model.denoise

    def counted(x, sigma, condition):
        calls.append(len(x))
        return ask(x, sigma, condition)

    monkeypatch.setattr(model, "denoise", counted)
    config = SampleConfig(model=ldm, sampler=sampler, steps=steps)
    values, noise = values_for(model, 2), seeded_noise([0, 1])
    draw_latents(model, values, (2, *SHAPE), noise, manner_of(config, model))
    assert calls == [4] * steps  # guided: two rows a sample


def test_a_grid_is_walked_and_auto_is_the_schedules_own(ldm, tmp_path):
    found = {grid: drawn(ldm, tmp_path, grid=grid, num=1) for grid in get_args(GridName)}
    assert torch.allclose(found["auto"], found["trailing"], rtol=1e-4, atol=1e-4)
    for grid in ("linspace", "leading", "karras", "exponential", "beta", "align-your-steps"):
        assert not torch.allclose(found["auto"], found[grid], rtol=1e-2)


@pytest.mark.parametrize("parameterization", ["flow", "edm"])
@pytest.mark.parametrize("grid", ["auto", "karras"])
def test_continuous_schedules_have_grids_too(parameterization, grid, tmp_path):
    path = built(tmp_path / "ldm.safetensors", TEXT, parameterization=parameterization)
    found = drawn(path, tmp_path, grid=grid, sampler="heun", label=())
    assert found.isfinite().all()


def test_parameters_reach_their_samplers(ldm, tmp_path):
    for sampler, settings in (
        ("ddim", {"eta": 1.0}),
        ("dpmpp-2m-sde", {"eta": 0.0}),
        ("unipc", {"sampler_options": SamplerOptions(order=1)}),
        ("heun", {"sampler_options": SamplerOptions(churn=2.0)}),
        ("restart", {"sampler_options": SamplerOptions(restart_interval=(0.3, 1.0))}),
        ("restart", {"sampler_options": SamplerOptions(restart_repeats=1)}),
    ):
        both = {"sampler": sampler, "steps": 14 if sampler == "restart" else 5, "num": 1}
        usual = drawn(ldm, tmp_path, **both)
        changed = drawn(ldm, tmp_path, **both, **settings)
        assert not torch.allclose(usual, changed, rtol=1e-3), (sampler, settings)
    ancestral = drawn(ldm, tmp_path, sampler="euler-ancestral")
    assert torch.equal(ancestral, drawn(ldm, tmp_path, sampler="ddim", eta=1.0))


class Estimates:
    """Clean latents that a model expects in the first call, under any condition."""

    def __init__(self, model, values):
        self.model, self.values = model, values
        count = len(next(iter(values.values())))
        self.sigma = model.schedule.steps(1)[:1].expand(count)
        noise = seeded_noise(range(count))(torch.empty(count, *SHAPE))
        self.x = model.schedule.initial(noise, float(self.sigma[0]))

    def __call__(self, silent=(), **others):
        """Told everything but `silent`, and `others` in place of its own values."""
        empty = self.model.empty(self.values)
        told = {
            kind: empty[kind] if kind in silent else value for kind, value in self.values.items()
        }
        with torch.no_grad():
            return self.model.denoise(self.x, self.sigma, self.model.condition(told | others))

    def drawn(self, guide):
        """What is drawn in one step, whitened: that step's guided estimate."""
        count = len(self.x)
        noise, shape = seeded_noise(range(count)), (count, *SHAPE)
        return self.model.whiten(
            draw_latents(self.model, self.values, shape, noise, Manner(1, guide))
        )


def same(found, expected):
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def guide_of(path, **settings):
    """What a command settles."""
    found = manner_of(SampleConfig(model=path, **settings), load_diffusion(path)).guide
    assert found is not None
    return found


def test_one_weight_keeps_what_is_concatenated(super_resolution):
    model = load_diffusion(super_resolution)
    expect = Estimates(model, values_for(model, 2))
    told, null = expect(), expect(silent=("class",))
    found = expect.drawn(guide_of(super_resolution, guidance=3.0))
    assert same(found, null + 3.0 * (told - null))
    usual = expect.drawn(guide_of(super_resolution))
    assert same(usual, null + 2.0 * (told - null))
    null = expect(silent=("lowres",))
    found = expect.drawn(guide_of(super_resolution, guidance_of=("lowres=1.5",)))
    assert same(found, null + 1.5 * (told - null))


def test_several_weights_composed_and_nested(super_resolution):
    model = load_diffusion(super_resolution)
    expect = Estimates(model, values_for(model, 2))
    told, null = expect(), expect(silent=("class", "lowres"))
    by_class, by_picture = expect(silent=("lowres",)), expect(silent=("class",))
    both = ("class=7.5", "lowres=1.5")
    found = expect.drawn(guide_of(super_resolution, guidance_of=both))
    assert same(found, null + 7.5 * (by_class - null) + 1.5 * (by_picture - null))
    nested = guide_of(super_resolution, guidance_of=both, guidance_combination="nested")
    expected = null + 7.5 * (by_class - null) + 1.5 * (told - by_class)
    assert same(expect.drawn(nested), expected)
    turned = guide_of(super_resolution, guidance_of=both[::-1], guidance_combination="nested")
    expected = null + 1.5 * (by_picture - null) + 7.5 * (told - by_picture)
    assert same(expect.drawn(turned), expected)


def test_a_negative_text_takes_the_place_of_the_empty_one(ldm):
    model = load_diffusion(ldm)
    expect = Estimates(model, values_for(model, 2))
    ugly = text_values(model.config, "ugly", "").expand(2, -1)
    told, away = expect(), expect(silent=("class",), text=ugly)
    found = expect.drawn(guide_of(ldm, guidance=4.0, negative="ugly"))
    assert same(found, away + 4.0 * (told - away))
    away = expect(text=ugly)
    found = expect.drawn(guide_of(ldm, guidance_of=("text=4",), negative="ugly"))
    assert same(found, away + 4.0 * (told - away))
    plain = expect.drawn(guide_of(ldm, guidance=4.0))
    assert torch.equal(plain, expect.drawn(guide_of(ldm, guidance=4.0, negative="")))


def test_the_interval_the_rescaling_and_the_growth_act(ldm, tmp_path):
    model = load_diffusion(ldm)
    expect = Estimates(model, values_for(model, 2))
    rescaled = expect.drawn(guide_of(ldm, guidance=5.0, guidance_rescale=1.0))
    assert same(rescaled.std(dim=(1, 2, 3)), expect().std(dim=(1, 2, 3)))
    beyond = guide_of(ldm, guidance=5.0, guidance_interval=(1e5, math.inf))
    assert same(expect.drawn(beyond), expect())

    steps, usual = 6, drawn(ldm, tmp_path, guidance=3.0, steps=6)
    sigmas = model.schedule.steps(steps)
    for growth, first in (("linear", 1 / 6), ("cosine", 1 - math.cos(math.pi / 12))):
        grown = drawn(ldm, tmp_path, guidance=3.0, steps=steps, guidance_growth=growth)
        assert not torch.allclose(usual, grown, rtol=1e-3)
        guide = guide_of(ldm, guidance=3.0, guidance_growth=growth)
        with torch.no_grad():
            x = model.schedule.initial(torch.ones(2, *SHAPE), float(sigmas[0]))
            at = sigmas[:1].expand(2)
            found = denoise_at(model, expect.values, guide, sigmas)(x, at)
            empty = model.condition(model.empty(expect.values))
            null, told = (
                model.denoise(x, at, one) for one in (empty, model.condition(expect.values))
            )
        assert same(found, null + (1 + 2.0 * first) * (told - null))


@pytest.mark.parametrize("parameterization", ["epsilon", "v"])
def test_a_weaker_model_takes_the_place_of_the_null(parameterization, ldm, tmp_path):
    weaker = built(
        tmp_path / "weak.safetensors",
        *(TEXT, CLASS),  # in another order
        seed=1,
        network={"channels": 16},
        parameterization=parameterization,
    )
    model = load_diffusion(ldm)
    expect = Estimates(model, values_for(model, 2))
    expect_less = Estimates(load_diffusion(weaker), expect.values)
    weak, good = expect_less(), expect()
    found = expect.drawn(guide_of(ldm, weaker=weaker, guidance=1.8))
    assert same(found, weak + 1.8 * (good - weak))
    untold = built(tmp_path / "one.safetensors")
    less = built(tmp_path / "less.safetensors", seed=2)
    samples = drawn(untold, tmp_path, weaker=less, label=(), prompt=())
    assert not torch.allclose(samples, drawn(untold, tmp_path, label=(), prompt=()), rtol=1e-2)


@pytest.mark.parametrize(
    ("conditions", "settings", "word"),
    [
        ((CLASS, TEXT), {"autoencoder": "b"}, "autoencoder"),
        ((CLASS, TEXT), {"std": 3.0}, "whitening"),
        ((CLASS,), {}, "conditions"),
        ((ClassCondition(names=("cat", "cow")), TEXT), {}, "conditions"),
    ],
)
def test_a_weaker_model_of_other_latents_is_refused(conditions, settings, word, ldm, tmp_path):
    weaker = built(tmp_path / "weak.safetensors", *conditions, **settings)
    with pytest.raises(DataError, match=rf"weak\.safetensors has another {word} than .*give"):
        drawn(ldm, tmp_path, weaker=weaker)


SELF_CONDITIONED = {"self_conditioning": True}


@pytest.mark.parametrize("guided", ["not", "together", "by each", "by a weaker", "a weaker alone"])
def test_self_conditioning_sees_the_guided_estimate(guided, tmp_path, monkeypatch):
    """Whatever guides: each model that can see an estimate sees the one that the sampler took."""
    sees = {} if guided == "a weaker alone" else SELF_CONDITIONED
    weak_sees = SELF_CONDITIONED if guided == "a weaker alone" else {}
    path = built(tmp_path / "ldm.safetensors", CLASS, TEXT, network=sees)
    weaker = built(tmp_path / "weak.safetensors", CLASS, TEXT, seed=1, network=weak_sees)
    model = load_diffusion(path)
    settings = {
        "not": {"guidance": 1.0},
        "together": {"guidance": 3.0},
        "by each": {"guidance_of": ("class=2", "text=3"), "guidance_interval": (0.5, math.inf)},
    }.get(guided, {"weaker": weaker})
    config = SampleConfig(model=path, steps=5, sampler="heun", **settings)
    guide = manner_of(config, model).guide
    watched = model if sees else guide.weaker if guide else None
    assert watched is not None
    seen = []
    ask = watched.denoise

    def watch(x, sigma, condition):
        seen.append(condition.previous)
        return ask(x, sigma, condition)

    monkeypatch.setattr(watched, "denoise", watch)
    sigmas, values = model.schedule.steps(3), values_for(model, 2)
    denoise = denoise_at(model, values, guide, sigmas)
    with torch.no_grad():
        x = model.schedule.initial(torch.ones(2, *SHAPE), float(sigmas[0]))
        results = [denoise(x, level.expand(2)) for level in sigmas[:2]]
        results.append(denoise(x, torch.tensor([0.1, 10.0])))  # on both sides of the interval
    assert seen[0] is None
    assert torch.equal(seen[1], results[0])
    assert torch.equal(seen[2], results[1])
    unseen = denoise_at(model, values, guide, sigmas)(x, sigmas[1:2].expand(2))
    assert not torch.allclose(unseen, results[1], rtol=1e-3)
    alone = drawn(path, tmp_path, batch_size=1, steps=2, **settings)
    assert alone.isfinite().all()
    assert torch.equal(alone, drawn(path, tmp_path, batch_size=4, steps=2, **settings))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--sampler euler --eta 0.5", "--eta is not for --sampler euler: it goes with ddim, eul"),
        ("--sampler-options.order 2", "order is not for --sampler heun: it goes with lms, unipc"),
        ("--sampler ddim --sampler-options.churn 2", "it goes with euler, heun"),
        ("--sampler lms --sampler-options.restart-repeats 2", "it goes with restart"),
        ("--sampler unipc --sampler-options.order 4", "--sampler-options.order: order 4 asked"),
        (
            "--sampler restart --sampler-options.restart-interval 0.1,200",
            "--sampler-options.restart-interval: restart interval 0.1 to 200: take one between",
        ),
        (
            "--sampler ddim --steps 1001",
            "--steps 1001: 1001 sampling steps asked for; this model takes 1 to 1000",
        ),
        ("--sampler ddim --steps 1001 --grid ldm", "--steps 1001, --grid ldm: 1001 sampling steps"),
        ("--guidance 3 --guidance-of text=2", "give one"),
        ("--guidance-of text", "--guidance-of text: write KIND=WEIGHT"),
        ("--guidance-of text=-1", "with a weight of 0 or more"),
        ("--guidance-of text=1 --guidance-of text=2", "names each kind of condition once"),
        ("--guidance-of txt=2", "was trained without txt; did you mean text?"),
        ("--guidance-combination nested", "for two --guidance-of or more"),
        ("--guidance-interval 2,1", "--guidance-interval: LO must lie below HI"),
        ("--guidance-interval=-1,1", "--guidance-interval"),
        ("--guidance-rescale 2", "--guidance-rescale"),
        ("--negative ugly --guidance 1", "--guidance 1 is none: give another weight"),
        ("--negative ugly --guidance-of class=2", "add --guidance-of text=WEIGHT"),
        ("--negative ugly --weaker x", "--weaker and --negative both say"),
        ("--weaker x --guidance-of text=2", "--weaker and --guidance-of both say"),
    ],
)
def test_what_does_not_fit_is_one_sentence(arguments, words, ldm, run):
    done = run("sample", ldm, *shlex.split(arguments))
    assert (done.returncode, done.stdout) == (2, b"")
    lines = done.stderr.decode().splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    assert words in done.stderr.decode()


def test_where_nothing_guides_guidance_is_not_asked_for_in_vain(tmp_path):
    untold = built(tmp_path / "untold.safetensors")
    concatenated = built(tmp_path / "sr.safetensors", LOWRES)
    plain = SampleConfig(model=untold)
    assert manner_of(plain, load_diffusion(untold)).guide is None
    off = SampleConfig(model=untold, guidance=1.0)
    assert manner_of(off, load_diffusion(untold)).guide is None
    for path, settings, words in (
        (untold, {"guidance": 3.0}, "--guidance asks .* told nothing"),
        (untold, {"guidance_growth": "cosine"}, "--guidance-growth asks"),
        (concatenated, {"guidance": 3.0}, "take --guidance-of lowres=WEIGHT"),
        (concatenated, {"guidance_of": ("lowres=2",), "negative": "x"}, "trained without text"),
        (untold, {"negative": "x"}, "--negative asks"),
    ):
        with pytest.raises(UsageError, match=words):
            manner_of(SampleConfig.model_validate({"model": path} | settings), load_diffusion(path))


def test_a_grid_of_discrete_times_is_refused_elsewhere(tmp_path):
    path = built(tmp_path / "ldm.safetensors", parameterization="flow")
    with pytest.raises(UsageError, match="--grid ldm: the ldm grid is one of a discrete"):
        manner_of(SampleConfig(model=path, grid="ldm"), load_diffusion(path))


def test_guides_without_a_command():
    assert guide_together((LOWRES,), 3.0) is None
    assert guide_together((CLASS,), 1.0) is None
    assert guide_together((CLASS, LOWRES, TEXT), 3.0) == Guide(
        Guidance((3.0,)), (("class", "text"),)
    )


def test_the_commands_of_the_page_run(ldm, tmp_path, monkeypatch, run):
    page = (Path(__file__).parent.parent / "docs/sampling.md").read_text()
    monkeypatch.chdir(tmp_path)
    built(tmp_path / "weak.safetensors", CLASS, TEXT, seed=1)
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    assert len(lines) > 8
    for line in lines:
        program, command, model, *options = shlex.split(line, comments=True)
        assert (program, command, model) == ("ldmkit", "sample", "ldm.safetensors")
        done = run(command, ldm, *options, "--num", 2, "--steps", 3)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.decode() == f"{options[options.index('-o') + 1]}\n"
