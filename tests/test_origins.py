"""Samples that begin with more than a seed: latents, a picture around a hole, given noise, two seeds."""

import itertools
import json
import math
import re
import shlex
import shutil
from pathlib import Path
from string import Template

import numpy as np
import pytest
import torch
from PIL import Image

import ldmkit
from ldmkit.assembly import load_diffusion
from ldmkit.conditioning.condition import Condition, mixed
from ldmkit.data.latent_set import LatentSet
from ldmkit.data_configs import EncodeConfig
from ldmkit.diffusion.interpolation import slerp
from ldmkit.diffusion.inversion import invert_ddim
from ldmkit.diffusion.known_region import KnownRegion, keeping, surrounded, touched
from ldmkit.diffusion.samplers import SAMPLERS, run_sampler
from ldmkit.diffusion.schedule import build_schedule
from ldmkit.diffusion_configs import ScheduleConfig
from ldmkit.drawing import Manner, levels_of
from ldmkit.errors import DataError, UsageError
from ldmkit.generation_configs import SampleConfig
from ldmkit.inversion_configs import InvertConfig
from ldmkit.modelfile import load, save

SIZE = 32
"""Of the pictures, pixels."""
ROOT = Path(__file__).parent.parent
SCHEDULE = build_schedule(ScheduleConfig(), "v")
NOWHERE = Path("nowhere.safetensors")


def gaussian(variance):
    """The right `denoise` for latents of mean 0 and that variance."""
    return lambda x, sigma: x * (variance / (variance + sigma.view(-1, 1, 1, 1) ** 2)).to(x)


def drawn(model, folder, **settings):
    """Columns and facts of samples of a command."""
    config = {"steps": 2, "device": "cpu", "label": ("circle",)}
    config |= {"model": model, "out": folder / "samples.safetensors"} | settings
    ldmkit.sample(SampleConfig.model_validate(config))
    header, tensors = load(config["out"], kind="samples")
    return header.facts, tensors


def told_of(tensors):
    data, ends = tensors["told.bytes"].numpy().tobytes(), tensors["told.offsets"].tolist()
    return [json.loads(data[start:stop]) for start, stop in itertools.pairwise(ends)]


@pytest.fixture(scope="module")
def holes(pipeline, tmp_path_factory) -> Path:
    """The pictures with a hole in each."""
    out = tmp_path_factory.mktemp("holes") / "set"
    config = {"data": str(pipeline.data), "ae": pipeline.ae, "out": out, "holes": "boxes"}
    ldmkit.encode(EncodeConfig.model_validate(config | {"keep_pictures": True}))
    return out


# interpolation


def test_slerp_follows_the_arc():
    first, last = torch.tensor([[2.0, 0.0]] * 5), torch.tensor([[0.0, 2.0]] * 5)
    share = torch.linspace(0, 1, 5)
    angle = share * math.pi / 2
    expected = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
    assert torch.allclose(slerp(first, last, share), expected, atol=1e-6)


def test_slerp_ends_exactly_where_it_should(generator):
    first, last = torch.randn(2, 3, 4, 4, 4, generator=generator)
    assert torch.equal(slerp(first, last, torch.zeros(3)), first)
    assert torch.equal(slerp(first, last, torch.ones(3)), last)
    assert torch.allclose(slerp(first, first, torch.full((3,), 0.3)), first, atol=1e-6)
    assert slerp(first, -first, torch.full((3,), 0.5)).isfinite().all()
    nothing = torch.zeros_like(first)
    assert torch.equal(slerp(nothing, nothing, torch.full((3,), 0.5)), nothing)


def test_noise_between_noises_is_noise(generator):
    first, last = torch.randn(2, 1, 4, 64, 64, generator=generator)
    for share in (0.25, 0.5, 0.8):
        assert float(slerp(first, last, torch.tensor([share])).std()) == pytest.approx(1, abs=0.02)
    assert float(((first + last) / 2).std()) < 0.75


def test_conditions_between_conditions():
    first = Condition(vector=torch.tensor([[0.0, 1.0], [1.0, 0.3]]))
    last = Condition(vector=torch.tensor([[4.0, 3.0], [0.1, 0.7]]))
    half = mixed(first, last, torch.tensor([0.25, 1.0])).vector
    assert half is not None
    assert last.vector is not None
    assert torch.equal(half[0], torch.tensor([1.0, 1.5]))
    assert torch.equal(half[1], last.vector[1])
    twice = mixed(
        Condition(tokens=torch.zeros(4, 1, 1)),
        Condition(tokens=torch.ones(4, 1, 1)),
        torch.tensor([0.25, 0.5]),
    )
    assert twice.tokens is not None
    assert twice.tokens.flatten().tolist() == [0.25, 0.5, 0.25, 0.5]  # as guidance stacks its rows


# the cut grid


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("share", [0.3, 0.75, 1.0])
def test_a_share_of_the_levels_takes_as_many_calls(sampler, share):
    steps, calls = 14, []
    sigmas = levels_of(SCHEDULE, Manner(steps, sampler=sampler, share=share))

    def counted(x, sigma):
        calls.append(float(sigma[0]))
        return gaussian(1.0)(x, sigma)

    start = torch.ones(1, 1, 2, 2) * sigmas[0]
    settings = {"interval": (0.05, 0.2)} if sampler == "restart" else {}
    run_sampler(
        sampler, counted, start, sigmas, calls=steps, noise=torch.randn_like, settings=settings
    )
    assert len(calls) == steps
    assert calls[0] == float(sigmas[0])


def test_the_share_is_one_of_the_time():
    whole = levels_of(SCHEDULE, Manner(40))
    assert torch.equal(levels_of(SCHEDULE, Manner(40, share=1.0)), whole)
    assert torch.equal(levels_of(SCHEDULE, Manner(10, share=0.25)), whole[30:])
    for share in (0.1, 0.5, 0.9):
        first = levels_of(SCHEDULE, Manner(50, share=share))[:1]
        assert float(SCHEDULE.timestep(first)) == pytest.approx(1000 * share, abs=10)


# known regions


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_known_stays_and_is_shown_at_its_noise_level(sampler, generator):
    latents = torch.randn(1, 4, 16, 16, generator=generator) * 3.0
    hole = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    hole[..., 4:9, 4:9] = True
    known = KnownRegion(latents, hole)
    outside = ~hole.expand_as(latents)
    sigmas = levels_of(SCHEDULE, Manner(14, sampler=sampler))
    seen = []

    def watched(x, sigma):
        noise = ((x - latents) / sigma.view(-1, 1, 1, 1))[outside]
        seen.append((float(noise.mean()), float(noise.std())))
        return gaussian(1.0)(x, sigma)

    def noise(like):
        return torch.randn(like.shape, generator=generator)

    unit = noise(latents)
    start = surrounded(SCHEDULE.initial(unit, float(sigmas[0])), known, unit, float(sigmas[0]))
    found = run_sampler(
        sampler, keeping(watched, known), start, sigmas, calls=14, noise=noise, settings={}
    )
    assert torch.allclose(found[outside], latents[outside], atol=1e-4)
    assert not torch.allclose(found[~outside], latents[~outside], atol=0.1)
    means, spreads = zip(*seen, strict=True)
    assert max(map(abs, means)) < 0.25
    assert min(spreads) > 0.85
    assert max(spreads) < 1.15


def test_a_latent_is_in_the_hole_where_one_of_its_pixels_is():
    hole = torch.zeros(1, 8, 8, dtype=torch.bool)
    hole[0, 3, 4] = True
    assert touched(hole, 2, 2)[0, 0].tolist() == [[False, True], [False, False]]
    assert torch.equal(touched(hole, 8, 8)[:, 0], hole)


# inversion


def test_inversion_is_undone_the_better_the_more_steps(generator):
    latents = 0.5 * torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
    denoise, errors, misses = gaussian(0.25), [], []
    for steps in (25, 50, 100, 200):
        sigmas = levels_of(SCHEDULE, Manner(steps)).double()
        noisy = invert_ddim(denoise, latents, sigmas)
        back = run_sampler(
            "ddim", denoise, noisy, sigmas, calls=steps, noise=torch.randn_like, settings={}
        )
        errors.append(float((back - latents).abs().max()))
        exact = latents * math.sqrt((0.25 + float(sigmas[0]) ** 2) / 0.25)
        misses.append(float((noisy / exact - 1.0).abs().max()))
    for worse, better in itertools.pairwise(errors):
        assert better < 0.65 * worse
    assert errors[-1] < 0.05
    assert misses == sorted(misses, reverse=True)
    assert misses[-1] < 0.05


def test_inversion_makes_one_call_a_step():
    calls = []

    def counted(x, sigma):
        calls.append(float(sigma[0]))
        return x / 2

    sigmas = levels_of(SCHEDULE, Manner(7))
    invert_ddim(counted, torch.ones(1, 1, 2, 2), sigmas)
    assert len(calls) == 7
    assert calls == sorted(calls)


# the commands


def test_image_to_image_is_nearer_the_less_strength(pipeline, tmp_path):
    source = LatentSet(pipeline.latents).read(range(4)).mean.float()
    far = []
    for strength in (0.01, 0.5, 1.0):
        facts, found = drawn(
            pipeline.ldm, tmp_path, from_=pipeline.latents, strength=strength, num=4
        )
        assert found["latents"].shape == source.shape
        far.append(float((found["latents"] - source).square().mean()))
        assert facts["manner"]["strength"] == strength
        assert facts["manner"]["source"]["name"] == "latents"
    assert far[0] < far[1] < far[2]
    assert far[0] < 0.25 * float(source.var())


@pytest.mark.parametrize("kind", ["from_", "inpaint", "between", "noise"])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp-2m-sde"])
def test_a_sample_depends_on_its_seed_and_source_alone(kind, sampler, pipeline, holes, tmp_path):
    origins = {"from_": pipeline.latents, "inpaint": holes, "between": (3, 8, 4), "noise": None}
    if kind == "noise":
        out = tmp_path / "noise.safetensors"
        origins["noise"] = ldmkit.invert(
            InvertConfig(model=pipeline.ldm, latents=pipeline.latents, out=out, steps=2)
        )
    settings = {kind: origins[kind], "sampler": sampler, "label": ("circle", "square")}
    settings |= {"frames": 3} if kind == "between" else {"num": 3}
    alone = drawn(pipeline.ldm, tmp_path, batch_size=1, **settings)[1]["latents"]
    together = drawn(pipeline.ldm, tmp_path, batch_size=3, **settings)[1]["latents"]
    assert len(alone) == 3
    assert torch.equal(alone, together)


def test_variations_take_turns_with_new_seeds(pipeline, tmp_path):
    _, found = drawn(pipeline.ldm, tmp_path, from_=pipeline.latents, num=24, steps=1)
    told = told_of(found)
    latents = found["latents"]
    assert [one["from"] for one in told[:12]] == [one["from"] for one in told[12:]]
    assert len({one["from"] for one in told}) == 12
    assert found["seed"].tolist() == list(range(24))
    assert not torch.allclose(latents[:12], latents[12:], atol=0.01)


def test_samples_can_be_begun_with_too(pipeline, tmp_path):
    drawn(pipeline.ldm, tmp_path, num=3)
    first = (tmp_path / "samples.safetensors").rename(tmp_path / "first.safetensors")
    _, found = drawn(pipeline.ldm, tmp_path, from_=first, strength=0.01)
    source = load(first, kind="samples")[1]["latents"]
    assert torch.allclose(found["latents"], source, atol=0.5 * float(source.std()))
    assert [one["from"] for one in told_of(found)] == ["seed 0", "seed 1", "seed 2"]


def test_pairs_with_like_fit_by_row(pipeline, tmp_path):
    settings = {"from_": pipeline.latents, "label": (), "like": pipeline.latents, "steps": 1}
    _, found = drawn(pipeline.ldm, tmp_path, **settings)
    keys = list(LatentSet(pipeline.latents).texts("key"))
    assert told_of(found) == [{"like": key} for key in keys]
    _, held = drawn(pipeline.ldm, tmp_path, **settings, holdout=0.5)
    assert 0 < len(held["latents"]) < 12


@pytest.mark.parametrize("strength", [None, 0.5])
def test_only_the_hole_is_painted(strength, pipeline, holes, tmp_path, run):
    begin = ["--num", 24, "--steps", 1, "--label", "circle"]
    begin += ["--strength", strength] if strength else []
    piped = run("sample", pipeline.ldm, "--inpaint", holes, *begin)
    assert piped.returncode == 0, piped.stderr.decode()
    done = run("decode", "--ae", pipeline.ae, "--out", tmp_path, "-q", stdin=piped.stdout)
    assert done.returncode == 0, done.stderr.decode()
    latents = LatentSet(holes)
    given = latents.rows("image", range(12)).permute(0, 2, 3, 1).numpy()
    hole = latents.rows("hole", range(12)).numpy() > 0
    files = sorted(tmp_path.glob("0*.png"))
    made = np.stack([np.asarray(Image.open(file)) for file in files])
    assert len(made) == 24
    for half in (made[:12], made[12:]):
        assert (half[~hole] == given[~hole]).all()
    assert (made[:12] != made[12:])[hole].mean() > 0.2  # other seeds, other fillings
    record = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert record["told"]["from"] == latents.text("key", 0)
    assert record["manner"]["source"]["name"] == holes.name


def test_what_is_known_is_what_is_written(pipeline, holes, tmp_path):
    """The latents outside of the holes are the pictures' own, so that decoding fits at the rim."""
    _, found = drawn(pipeline.ldm, tmp_path, inpaint=holes)
    latents = LatentSet(holes)
    source = latents.read(range(12)).mean.float()
    outside = ~touched(latents.rows("hole", range(12)) > 0, *source.shape[2:]).expand_as(source)
    assert torch.allclose(found["latents"][outside], source[outside], atol=1e-3)
    assert not torch.allclose(found["latents"][~outside], source[~outside], atol=0.1)


def test_inversion_and_sampling_undo_each_other(pipeline, tmp_path, run):
    few = tmp_path / "few.safetensors"
    source, errors = drawn(pipeline.ldm, tmp_path, num=2, out=few)[1]["latents"], []
    for steps in (6, 24):
        out = tmp_path / f"{steps}.safetensors"
        told = ["--label", "circle", "--steps", steps]
        done = run("invert", pipeline.ldm, few, *told, "-o", out)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.decode() == f"{out}\n"
        facts, found = drawn(pipeline.ldm, tmp_path, noise=out, guidance=1.0, steps=steps)
        assert facts["manner"]["source"]["name"] == out.name
        errors.append(float((found["latents"] - source).square().mean() / source.var()) ** 0.5)
    header, tensors = load(out, kind="noise")
    assert tensors["noise"].shape == source.shape
    assert header.facts["level"] == pytest.approx(SCHEDULE.highest)
    assert header.facts["manner"]["steps"] == 24
    assert errors[1] < 0.5 * errors[0]
    assert run("inspect", out).returncode == 0


def test_the_ends_of_a_strip_are_usual_samples(pipeline, tmp_path):
    labels = ("circle", "square")
    facts, found = drawn(pipeline.ldm, tmp_path, between=(3, 8), frames=5, label=labels)
    strip = found["latents"]
    for end, seed, label in ((0, 3, "circle"), (-1, 8, "square")):
        usual = drawn(pipeline.ldm, tmp_path, num=1, seed=seed, label=(label,))[1]["latents"]
        assert torch.allclose(strip[[end]], usual, atol=1e-5)
    assert facts["manner"]["between"] == [3, 8]
    words = [one["class"] for one in told_of(found)]
    assert words == ["circle", *["circle to square"] * 3, "square"]
    moves = (strip[1:] - strip[:-1]).square().mean(dim=(1, 2, 3)).sqrt()
    assert float(moves.max()) < 0.75 * float((strip[-1] - strip[0]).square().mean().sqrt())


def test_conditions_alone_can_change_along_a_strip(pipeline, tmp_path, monkeypatch):
    model = load_diffusion(pipeline.ldm)
    seen = []
    ask = type(model).denoise

    def watched(self, x, sigma, condition):
        seen.append(condition.tokens)
        return ask(self, x, sigma, condition)

    monkeypatch.setattr(type(model), "denoise", watched)
    settings = {"label": ("circle", "square"), "steps": 1, "guidance": 1.0}
    drawn(pipeline.ldm, tmp_path, between=(3, 3), frames=3, **settings)
    start, middle, end = torch.cat(seen)[:3]
    assert not torch.allclose(start, end)
    assert torch.allclose(middle, (start + end) / 2, atol=1e-6)


# what does not fit


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from", "a", "--inpaint", "b"], "--from and --inpaint"),
        (["--between", "3,8", "--noise", "b"], "--noise and --between"),
        (["--strength", "0.5"], "--strength is for"),
        (["--strength", "0", "--from", "a"], "--strength"),
        (["--between", "3"], "two seeds or more"),
        (["--frames", "3"], "--frames is for"),
        (["--between", "3,8", "--num", "4"], "leave out --num"),
        (["--from", "a", "--strength", "0.01", "--steps", "50"], "--strength 0.01"),
    ],
)
def test_options_that_do_not_go_together(arguments, words, pipeline, run):
    done = run("sample", pipeline.ldm, "-o", NOWHERE, *arguments)
    assert done.returncode == 2
    assert words in done.stderr.decode()


def test_sources_that_do_not_fit(pipeline, holes, tmp_path):
    drawn(pipeline.ldm, tmp_path, num=2)
    path = tmp_path / "samples.safetensors"
    header, tensors = load(path, kind="samples")
    other, small = tmp_path / "other.safetensors", tmp_path / "small.safetensors"
    save(other, tensors, kind="samples", config={}, facts=header.facts | {"autoencoder": "b" * 64})
    cut = tensors | {"latents": tensors["latents"][..., :4]}
    save(small, cut, kind="samples", config={}, facts=header.facts)
    for settings, words in (
        ({"from_": other}, "another autoencoder"),
        ({"from_": small}, "the model was trained on"),
        ({"from_": tmp_path / "missing"}, "missing"),
        ({"inpaint": pipeline.latents}, "--keep-pictures"),
        ({"inpaint": path}, "--keep-pictures"),
        ({"noise": path}, "holds samples"),
        ({"from_": path, "label": (), "like": holes}, "row by row"),
    ):
        with pytest.raises(DataError, match=words):
            drawn(pipeline.ldm, tmp_path, out=tmp_path / "no.safetensors", **settings)


def test_noise_of_another_level_is_refused(pipeline, tmp_path):
    out = tmp_path / "noise.safetensors"
    config = InvertConfig(model=pipeline.ldm, latents=pipeline.latents, out=out, steps=2)
    ldmkit.invert(config)
    with pytest.raises(DataError, match="--grid"):
        drawn(pipeline.ldm, tmp_path, noise=out, grid="leading")


def test_a_model_is_not_told_of_latents_what_it_does_not_know(pipeline, tmp_path):
    config = {"model": pipeline.ldm, "latents": pipeline.latents, "out": tmp_path / "noise"}
    with pytest.raises(UsageError, match="text"):
        ldmkit.invert(InvertConfig.model_validate(config | {"prompt": ("a",)}))
    with pytest.raises(ValueError, match="give one"):
        InvertConfig.model_validate(config | {"label": ("circle",), "like": pipeline.latents})


def test_the_commands_of_the_page_run(pipeline, tmp_path, monkeypatch, run):
    """Line by line in this process: variables and pipes as the shell has them."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/uses.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pipeline.data, "photos")
    (tmp_path / "masks").mkdir()
    for file in sorted(Path("photos").rglob("*.png")):
        if int(file.stem) > 1:  # four pictures are enough
            file.unlink()
            continue
        mask = Image.new("L", (SIZE, SIZE))
        mask.paste(255, (8, 8, 20, 20))
        target = Path("masks") / file.relative_to("photos")
        target.parent.mkdir(exist_ok=True)
        mask.save(target)
    variables = {"ae": str(pipeline.ae), "ldm": str(pipeline.ldm)}
    for line in "".join(blocks).splitlines():
        assigned = re.fullmatch(r"(\w+)=\$\((.*)\)", line)
        data = b""
        for command in (assigned[2] if assigned else line).split(" | "):
            program, *arguments = shlex.split(Template(command).substitute(variables))
            assert program == "ldmkit", line
            fewer = ["--steps", "1"] if arguments[0] in ("sample", "invert") else []
            fewer += ["--num", "2"] if "--num" in arguments else []
            done = run(*arguments, *fewer, stdin=data)
            assert done.returncode == 0, (line, done.stderr.decode())
            data = done.stdout
        if assigned:
            variables[assigned[1]] = data.decode().rstrip("\n")
    for folder in ("warmer", "variations", "filled", "back", "strip"):
        assert (tmp_path / folder / "grid.png").is_file(), folder
