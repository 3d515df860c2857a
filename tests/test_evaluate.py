"""The command `evaluate`: sources of samples, references, copies, thresholds."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import ldmkit
from conftest import diffusion_config, draw_picture
from ldmkit.configs import EMAConfig
from ldmkit.data.images import split
from ldmkit.data.items import Span
from ldmkit.data.sources import open_source
from ldmkit.data_configs import SourceConfig
from ldmkit.diffusion_configs import AverageConfig
from ldmkit.errors import DataError, UsageError
from ldmkit.evaluation_configs import EvaluateConfig
from ldmkit.generation_configs import SampleConfig
from ldmkit.metrics import feature_networks
from ldmkit.recipes import evaluate as recipe
from ldmkit.recipes.evaluation_parts import own_range

ROOT = Path(__file__).parent.parent
COUNT = 24


class Small(nn.Module):
    """In the place of EfficientNet-Lite0, which would take most of the time of these tests."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("weight", torch.full((1,), weight))

    def pooled(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)


@pytest.fixture(autouse=True)
def effnet(monkeypatch, tmp_path):
    """A weights file, and a network that reads it in no time."""

    def load(path):
        if not path.is_file():
            raise DataError(f"there is no file {path}")
        return Small(float(path.stat().st_size))

    monkeypatch.setattr(feature_networks, "load_efficientnet_lite0", load)
    file = tmp_path / "effnet.pth"
    file.write_bytes(b"x")
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, each with a line of its own place, so that no two are the same."""
    root = tmp_path_factory.mktemp("real")
    for number in range(COUNT):
        picture = draw_picture("circle", number)
        picture.paste("black", (0, number, 32, number + 3))
        picture.save(root / f"{number:02d}.png")
    return root


def report_of(out):
    return json.loads((out / "report.json").read_text())


def numbers_of(report):
    return {
        label: number["value"] for label, number in report["quality"]["effnet"]["numbers"].items()
    }


def test_a_folder_against_itself_and_against_noise(folder, effnet, tmp_path, run):
    noise = tmp_path / "noise"
    noise.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(10):
        pixels = torch.randint(256, (40, 40, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(noise / f"{number}.png")
    found = []
    for samples in (folder, noise):
        done = run(
            *("evaluate", "--samples", samples, "--data", folder, "--effnet", effnet),
            *("--size", 32, "-o", tmp_path / "out", "--quiet"),
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.decode() == f"{tmp_path / 'out'}\n"
        found.append(report_of(tmp_path / "out"))
    same, other = map(numbers_of, found)
    assert same["FD-effnet"] == pytest.approx(0, abs=1e-6)
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    assert other["FD-effnet"] > 1
    assert other["precision"] == 0
    assert found[1]["quality"]["effnet"]["samples"] == 10
    assert found[1]["quality"]["effnet"]["real"] == COUNT
    assert found[1]["quality"]["effnet"]["floor_pictures"] == 10
    assert found[0]["quality"]["effnet"]["floor_pictures"] == COUNT // 2
    assert "the floor is that of 12 pictures" in found[0]["findings"][0]
    assert found[0]["schema_version"] == 1
    assert "looked for" in found[0]["findings"][-1]


def test_the_text_has_labels_counts_intervals_and_floors(folder, effnet, tmp_path, run):
    done = run(
        *("evaluate", "--samples", folder, "--data", folder, "--effnet", effnet),
        *("--size", 32, "-o", tmp_path / "out", "--json", "--num", 12, "--bootstrap", 20),
    )
    assert json.loads(done.stdout) == report_of(tmp_path / "out")
    text = done.stderr.decode()
    assert "12 samples against 24 real pictures; floor: 12 real against 12 others" in text
    assert re.search(r"FD-effnet: [\d.e-]+ \(95 %: [\d.e-]+ to [\d.e-]+\); floor [\d.e-]+", text)
    assert "FID" not in text


def test_a_reference_stands_for_the_pictures(folder, effnet, tmp_path, run):
    file = tmp_path / "real.safetensors"
    common = ("evaluate", "--samples", folder, "--effnet", effnet, "--bootstrap", 0, "--num", 10)
    first = run(
        *(*common, "--data", folder, "--size", 32, "--save-reference", file, "-o", tmp_path / "a")
    )
    assert first.returncode == 0, first.stderr
    again = run(*common, "--reference", file, "--size", 32, "-o", tmp_path / "b")
    assert again.returncode == 0, again.stderr
    a, b = report_of(tmp_path / "a"), report_of(tmp_path / "b")
    assert numbers_of(a) == pytest.approx(numbers_of(b))
    assert a["protocol"] == b["protocol"]
    assert b["protocol"]["effnet"]["count"] == COUNT
    assert ldmkit.inspect(ldmkit.InspectConfig(path=file))["kind"] == "reference"
    for changed, words in (
        (("--size", 16), "size 32 there, 16 here"),
        (("--size", 32, "--holdout", 0.1), "holdout 0.0 there, 0.1 here"),
    ):
        done = run(*common, "--reference", file, *changed, "-o", tmp_path / "b")
        assert done.returncode == 3
        assert f"measured by another protocol: {words}" in " ".join(done.stderr.decode().split())
    effnet.write_bytes(b"other weights")
    done = run(*common, "--reference", file, "--size", 32, "-o", tmp_path / "b")
    assert done.returncode == 3
    assert b"protocol: weights" in done.stderr


def test_copies_are_named_and_shown(folder, effnet, tmp_path, run):
    """Three training pictures among the samples, one compressed, one mirrored; others are new."""
    training, held_back = split(open_source(SourceConfig(data=str(folder))).items, 0.5)
    samples = tmp_path / "samples"
    samples.mkdir()
    paths = [item.picture.file for item in training[:3] if isinstance(item.picture, Span)]
    shutil.copy(paths[0], samples / "exact.png")
    Image.open(paths[1]).save(samples / "compressed.jpg", quality=92)
    Image.open(paths[2]).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(samples / "mirrored.png")
    for number in range(6):
        draw_picture("square", number).transpose(Image.Transpose.ROTATE_90).save(
            samples / f"new-{number}.png"
        )
    arguments = (
        *("evaluate", "--samples", samples, "--data", folder, "--effnet", effnet, "--size", 32),
        *("--holdout", 0.5, "-o", tmp_path / "out", "--bootstrap", 0),
    )
    done = run(*arguments, "--max-copies", 2, "--max-fd", 1e-9)
    assert done.returncode == 3
    assert "copies is 3, which misses --max-copies 2" in " ".join(done.stderr.decode().split())
    assert b"misses --max-fd" in done.stderr
    report = report_of(tmp_path / "out")
    found = report["memorization"]
    assert found["training"] == len(training)
    assert found["held_back"] == len(held_back)
    pairs = {pair["key"]: pair["training"] for pair in found["copied"]}
    names = ("exact.png", "compressed.jpg", "mirrored.png")
    assert pairs == {name: item.key for name, item in zip(names, training[:3], strict=True)}
    assert found["held_back_duplicates"] == 0
    assert 0 <= found["nearer_to_training"] <= 1
    with Image.open(tmp_path / "out" / "nearest.png") as strip:
        assert strip.size == (8 * 34 + 2, 2 * 34 + 2)
        first = strip.crop((2, 2, 34, 34)).tobytes()
        assert first == strip.crop((2, 36, 34, 68)).tobytes()  # the exact copy and its source
    assert run(*arguments, "--max-copies", 3).returncode == 0


def test_a_model_and_its_sample_file_give_the_same_pictures(pipeline, effnet, tmp_path):
    """The seeds and what they are told are those of `sample`."""
    file = tmp_path / "samples.safetensors"
    ldmkit.sample(SampleConfig(model=pipeline.ldm, out=file, num=7, steps=2, seed=3))
    common = {"data": pipeline.data, "ae": pipeline.ae, "effnet": effnet, "bootstrap": 0}
    ldmkit.evaluate(
        EvaluateConfig(model=pipeline.ldm, num=7, steps=2, seed=3, out=tmp_path / "a", **common)
    )
    ldmkit.evaluate(EvaluateConfig(samples=file, seed=3, out=tmp_path / "b", **common))
    names = [f"{seed:06d}.png" for seed in range(3, 10)]
    for name in names:
        one, other = (tmp_path / out / "samples" / name for out in ("a", "b"))
        assert one.read_bytes() == other.read_bytes()
    assert sorted(path.name for path in (tmp_path / "a" / "samples").iterdir()) == names
    a, b = report_of(tmp_path / "a"), report_of(tmp_path / "b")
    assert numbers_of(a) == pytest.approx(numbers_of(b))
    assert a["protocol"]["effnet"]["size"] == 32


def test_samples_are_told_what_a_set_says(pipeline, effnet, tmp_path):
    out = ldmkit.evaluate(
        EvaluateConfig(
            model=pipeline.ldm,
            data=pipeline.data,
            ae=pipeline.ae,
            effnet=effnet,
            num=6,
            steps=1,
            like=pipeline.latents,
            holdout=0.7,
            out=tmp_path,
        )
    )
    report = report_of(out)
    assert report["samples"] == 6
    assert report["memorization"]["network"] == "effnet"


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--samples", "S", "--data", "S", "--size", 32], 2, "give --effnet FILE, --inception"),
        (["--data", "S", "--size", 32, "--effnet", "E"], 2, "give --samples or --model"),
        (["--samples", "S", "--size", 32, "--effnet", "E"], 2, "give --data or --reference"),
        (["--samples", "S", "--data", "S", "--effnet", "E"], 2, "give --ae or --size"),
        (
            ["--model", "M", "--data", "S", "--size", 8, "--effnet", "E"],
            2,
            "autoencoder: give --ae",
        ),
        (["--max-fid", 3], 2, "--max-fid needs --inception FILE or --fid"),
        (["--max-copies", 3], 2, "--max-copies needs --data and --holdout"),
        (["--like", "x"], 2, "--like needs --model"),
        (["--holdout", 1e-9], 3, "keeps none of the 24 pictures out"),
        (["--num", 3], 3, "need 6 pictures or more on each side; there are 3"),
        (["--inception", "absent.pth"], 3, "there is no file absent.pth"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(folder, effnet, tmp_path, run, options, code, words):
    names = {"S": folder, "E": effnet}
    complete = ["--samples", folder, "--data", folder, "--size", 32, "--effnet", effnet]
    given = [names.get(option, option) for option in options]
    typed = given if "--data" in options or "--samples" in options else [*complete, *given]
    done = run("evaluate", "-o", tmp_path / "out", *typed)
    assert done.returncode == code, done.stderr
    text = " ".join(done.stderr.decode().split())
    assert words in text
    assert "Traceback" not in text


def test_samples_of_another_autoencoder_are_refused(pipeline, effnet, tmp_path, run):
    header = tmp_path / "samples.safetensors"
    ldmkit.sample(SampleConfig(model=pipeline.ldm, out=header, num=1, steps=1))
    from ldmkit.modelfile import load, save

    found, tensors = load(header, kind="samples")
    save(header, tensors, kind="samples", config={}, facts=found.facts | {"autoencoder": "other"})
    done = run(
        *("evaluate", "--samples", header, "--ae", pipeline.ae, "--data", pipeline.data),
        *("--effnet", effnet, "-o", tmp_path / "out"),
    )
    assert done.returncode == 3
    assert b"made with another autoencoder" in done.stderr


def test_steps_beyond_the_model_are_a_sentence(pipeline, effnet, tmp_path, run):
    done = run(
        *("evaluate", "--model", pipeline.ldm, "--ae", pipeline.ae, "--data", pipeline.data),
        *("--effnet", effnet, "-o", tmp_path, "--steps", 100000),
    )
    assert done.returncode == 2
    assert b"--steps" in done.stderr


def test_the_commands_of_the_page_run(pipeline, effnet, tmp_path, run, monkeypatch):
    """As printed in docs/evaluation.md, but for paths, steps and numbers."""
    page = (ROOT / "docs/evaluation.md").read_text()
    commands = re.findall(r"^ldmkit (evaluate (?:[^\n]*\\\n)*[^\n&|]*)", page, re.MULTILINE)
    assert len(commands) >= 3
    shutil.copytree(pipeline.data, tmp_path / "photos")
    shutil.copytree(pipeline.data, tmp_path / "samples")
    monkeypatch.chdir(tmp_path)
    for command in commands:
        words = command.replace("\\\n", " ").replace('"$ae"', str(pipeline.ae))
        words = words.replace('"$ldm"', str(pipeline.ldm)).replace("0.05", "0.6")
        words = re.sub(r"--num \d+", "--num 8 --steps 1", words)
        words = words.replace("effnet.pth", str(effnet))
        done = run(*words.split(), "--out", tmp_path / "out")
        assert done.returncode in (0, 3), done.stderr
        assert (tmp_path / "out" / "report.json").is_file(), done.stderr
        (tmp_path / "out" / "report.json").unlink()


def test_inception_features_are_called_what_they_are(folder, tmp_path, monkeypatch):
    """FID, KID and IS come of Inception alone, beside the other network's."""

    def network(path, device):
        del path, device
        return feature_networks.FeatureNetwork(
            "inception",
            "abc",
            "299",
            lambda pixels: feature_networks.Side(
                pixels.float().mean(dim=(2, 3)), pixels.float().mean(dim=3)[:, 0]
            ),
        )

    monkeypatch.setattr(recipe, "inception_network", network)
    report = report_of(
        ldmkit.evaluate(
            EvaluateConfig(
                samples=str(folder), data=str(folder), fid=True, size=32, out=tmp_path, max_kid=1.0
            )
        )
    )
    found = report["quality"]["inception"]["numbers"]
    assert set(found) == {"FID", "KID", "IS", "precision", "recall", "density", "coverage"}
    assert found["IS"]["value"] >= 1
    assert report["thresholds"][0]["met"]


def test_a_sweep_of_averages_is_scored_by_distance_to_a_reference(pipeline, effnet, tmp_path):
    config = diffusion_config(
        pipeline.latents, tmp_path / "run", steps=4, average=AverageConfig(snapshots=2)
    )
    ldmkit.train_diffusion(config)
    reference = tmp_path / "real.safetensors"
    shared = {"ae": pipeline.ae, "effnet": effnet}
    real = str(pipeline.data)
    ldmkit.evaluate(
        EvaluateConfig(
            samples=real,
            data=real,
            save_reference=reference,
            bootstrap=2,
            **{"out": tmp_path / "e", **shared},
        )
    )
    sweep = EMAConfig(
        run=tmp_path / "run", sweep=(0.05, 0.1), reference=reference, num=6, steps=2, **shared
    )
    first, second = (ldmkit.ema(sweep)["models"] for _ in range(2))
    scores = [model["score"] for model in first]
    assert scores == [model["score"] for model in second]
    assert scores[0] != scores[1]
    drawn = tmp_path / "drawn"
    report = ldmkit.evaluate(
        EvaluateConfig(
            model=Path(first[0]["path"]),
            reference=reference,
            out=drawn,
            num=6,
            steps=2,
            guidance=1.0,
            bootstrap=2,
            **shared,
        )
    )
    measured = report_of(report)
    assert scores[0] == pytest.approx(numbers_of(measured)["FD-effnet"], rel=1e-6)
    with pytest.raises(UsageError, match="give --ae and --effnet too"):
        ldmkit.ema(sweep.model_copy(update={"ae": None}))


def files_of(out):
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("source", ["model", "folder", "file"])
def test_jobs_make_the_report_of_one_call(source, pipeline, effnet, tmp_path, folder):
    settings = {"data": folder, "ae": pipeline.ae, "effnet": effnet, "holdout": 0.4}
    settings |= {"batch_size": 3, "bootstrap": 20, "device": "cpu", "seed": 5}
    if source == "model":
        settings |= {"model": pipeline.ldm, "num": 11, "steps": 2}
    elif source == "folder":
        settings |= {"samples": folder, "num": 11}
    else:
        wish = {"model": pipeline.ldm, "num": 11, "steps": 2, "device": "cpu", "seed": 5}
        made = tmp_path / "s.safetensors"
        ldmkit.sample(SampleConfig.model_validate(wish | {"out": made}))
        settings |= {"samples": made}
    found = []
    for jobs in (("1/1",), ("2/2", "1/2"), ("3/5", "5/5", "2/5", "1/5", "4/5")):
        out = tmp_path / str(len(jobs))
        for number, job in enumerate(jobs, start=1):
            config = EvaluateConfig.model_validate(settings | {"out": out, "jobs": job})
            assert ldmkit.evaluate(config) == out
            assert (out / "report.json").exists() == (number == len(jobs))
        files = files_of(out)
        files["report.json"] = json.dumps(report_without_place(out)).encode()
        found.append(files)
    assert found[0].keys() == found[1].keys() == found[2].keys()
    assert "nearest.png" in found[0]
    for name, data in found[0].items():
        assert found[1][name] == found[2][name] == data, name


def report_without_place(out):
    report = report_of(out)
    report.pop("digest", None)
    assert report["config"].pop("out") == str(out)
    return report


def test_processes_of_torchrun_are_jobs_and_parts_of_other_commands_do_not_count(
    folder, effnet, tmp_path, monkeypatch
):
    config = EvaluateConfig(
        samples=str(folder), data=str(folder), effnet=effnet, size=32, out=tmp_path, batch_size=4
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    ldmkit.evaluate(config.model_copy(update={"seed": 1, "num": 10}))
    monkeypatch.setenv("RANK", "1")
    ldmkit.evaluate(config)
    assert not (tmp_path / "report.json").exists()
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) == 2
    damaged = tmp_path / "parts" / "00002-of-00002.safetensors"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    monkeypatch.setenv("RANK", "0")
    ldmkit.evaluate(config)
    assert not (tmp_path / "report.json").exists()
    damaged.write_bytes(whole)
    ldmkit.evaluate(config)
    assert report_of(tmp_path)["samples"] == COUNT
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize(("total", "size", "jobs"), [(11, 3, 2), (12, 4, 3), (1, 4, 3), (7, 1, 7)])
def test_ranges_of_jobs_are_whole_batches_and_cover_all_once(total, size, jobs):
    ranges = [own_range(total, size, (number, jobs)) for number in range(1, jobs + 1)]
    assert [number for part in ranges for number in part] == list(range(total))
    assert all(part.start % size == 0 for part in ranges if part)


def test_the_last_job_prints_the_report_and_an_old_one_goes(folder, effnet, tmp_path, run):
    call = ("evaluate", "--samples", folder, "--data", folder, "--effnet", effnet, "--size", 32)
    call += ("-o", tmp_path / "out", "--json", "--bootstrap", 0)
    assert json.loads(run(*call).stdout)["samples"] == COUNT
    first = run(*call, "--jobs", "1/2", "--num", 20)
    assert (first.returncode, first.stdout) == (0, b"")
    assert not (tmp_path / "out" / "report.json").exists()
    last = run(*call, "--jobs", "2/2", "--num", 20)
    assert json.loads(last.stdout)["samples"] == 20
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.json"]
