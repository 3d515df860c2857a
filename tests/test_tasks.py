"""The tasks of the paper as scripts: their options exist, their data are what they say, and they run."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.main import get_command

import ldmkit
from conftest import ae_config
from ldmkit import terminal
from ldmkit.autoencoder_configs import (
    AutoencoderConfig,
    AutoencoderLossConfig,
    DiscriminatorConfig,
    PreprocessingConfig,
)
from ldmkit.cli import app

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
TASKS = sorted(set(EXAMPLES.glob("*.sh")) - {EXAMPLES / "demo.sh"})
CLASSES = json.loads((EXAMPLES / "data/classes.json").read_text())
COUNT = 24


def composed(out: Path, count: int = COUNT, seed: int = 0, canvas: str = "any") -> Path:
    script = EXAMPLES / "compose.py"
    asked = ("--count", str(count), "--seed", str(seed), "--canvas", canvas)
    subprocess.run(
        [sys.executable, script, EXAMPLES / "data", out, *asked], check=True, capture_output=True
    )
    return out


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return composed(tmp_path_factory.mktemp("composed"))


@pytest.fixture
def measures() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "bench/canvas.py")))


def images_of(folder: Path) -> torch.Tensor:
    files = sorted((folder / "images").glob("*.png"))
    return torch.stack([torch.tensor(np.array(Image.open(file))).movedim(2, 0) for file in files])


def maps_of(folder: Path) -> torch.Tensor:
    files = sorted((folder / "labelmaps").glob("*.png"))
    return torch.stack([torch.tensor(np.array(Image.open(file))) for file in files])


def lines_of(folder: Path) -> list[dict]:
    return [
        json.loads(line) for line in (folder / "images/metadata.jsonl").read_text().splitlines()
    ]


def bytes_of(folder: Path) -> dict[Path, bytes]:
    return {
        file.relative_to(folder): file.read_bytes()
        for file in folder.rglob("*.*")
        if file.is_file()
    }


# composed pictures


def test_composing_is_a_function_of_the_seed(pictures, tmp_path):
    found = bytes_of(pictures)
    assert len(found) == 2 * COUNT + 2
    assert bytes_of(composed(tmp_path / "again")) == found
    other = bytes_of(composed(tmp_path / "other", seed=1))
    assert all(other[name] != found[name] for name in found if name.parts[0] == "images")


def test_white_canvases_stay_white(tmp_path):
    folder = composed(tmp_path / "white", canvas="white")
    images, empty = images_of(folder).movedim(1, 3).float(), maps_of(folder) == 0
    assert (images[:, 0] == 255).all()
    assert images[empty].mean() > 250  # but for the rims of objects
    assert images[~empty].mean() < 230


def test_boxes_hold_the_objects_of_the_label_maps(pictures):
    coco = json.loads((pictures / "instances.json").read_text())
    assert [entry["name"] for entry in coco["categories"]] == CLASSES
    maps, lines = maps_of(pictures), lines_of(pictures)
    for entry in coco["images"]:
        classes = maps[entry["id"]]
        own = [one for one in coco["annotations"] if one["image_id"] == entry["id"]]
        assert len(own) == lines[entry["id"]]["count"]
        assert 1 <= len(own) <= 3
        outside = classes.clone()
        for one in own:
            x, y, width, height = one["bbox"]
            assert min(x, y) >= 2
            assert max(x + width, y + height) <= 62
            assert 20 <= max(width, height) <= 36
            inside = classes[y : y + height, x : x + width]
            assert (inside == one["category_id"]).float().mean() > 0.15
            outside[y : y + height, x : x + width] = 0
        assert not outside.any()


def test_what_is_said_of_a_picture_can_be_measured_again(pictures, measures):
    images = images_of(pictures) / 127.5 - 1.0
    told = torch.tensor([line["lightness"] for line in lines_of(pictures)])
    assert (measures.lightness(images) - told).abs().max() < 0.005
    objects = maps_of(pictures) > 0
    agreement = measures.overlaps(measures.foreground(images), objects)
    control = measures.overlaps(measures.foreground(images), objects.roll(1, 0))
    assert agreement.mean() > 0.8
    assert control.mean() < 0.4


def test_captions_name_what_is_there(pictures):
    lines = lines_of(pictures)
    for line in lines:
        shade = re.search(r" on a (dark|medium|light) (plain|shaded) canvas$", line["text"])
        assert shade is not None
        assert (shade[1] == "dark") == (line["lightness"] < 0.35)
        assert " of " not in line["text"].split(" on a ")[0][:6]
    assert len({line["text"] for line in lines}) == COUNT


# scripts


@pytest.mark.parametrize("script", TASKS, ids=lambda script: script.stem)
def test_scripts_are_short_and_can_be_called(script):
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n#")
    assert "set -euo pipefail" in text
    lines = text.replace("\\\n", " ").splitlines()
    commands = [line for line in lines if line and not re.match(r"#|set |\w+\(\) \{|\}", line)]
    assert 5 <= len(commands) <= 10


@pytest.mark.parametrize("script", TASKS, ids=lambda script: script.stem)
def test_scripts_use_options_that_exist(script):
    text = script.read_text().replace("\\\n", " ")
    calls = re.findall(r"ldmkit ([a-z-]+) ((?:[^|)>\n]|\$\{[^}]*\})*)", text)
    assert {name for name, _ in calls} == {
        "train-ae",
        "encode",
        "train-diffusion",
        "sample",
        "decode",
    }
    for name, arguments in calls:
        command = get_command(app).commands[name]  # pyright: ignore[reportAttributeAccessIssue]
        known = {option for parameter in command.params for option in parameter.opts}
        used = re.findall(r"(?<![\w.])--[a-z][\w.-]*", arguments)
        assert set(used) <= known, (name, set(used) - known)
    for helper, arguments in re.findall(r'python "\$here/(\w+\.py)" ([^>\n]*)', text):
        said = (EXAMPLES / helper).read_text()
        for option in re.findall(r"--\w+", arguments):
            assert f'"{option}"' in said
    assert shlex.split(text, comments=True)


def test_every_task_has_a_script_and_a_line_in_the_docs():
    names = {script.stem for script in TASKS}
    assert names == {
        *("unconditional", "class_conditional", "text_to_image", "layout_to_image"),
        *("semantic_synthesis", "super_resolution", "inpainting", "scalar_conditional"),
        "pixel_vs_latent",
    }
    page = (ROOT / "docs/tasks.md").read_text()
    for name in names:
        assert f"../examples/{name}.sh" in page


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> Path:
    """Of 64 pixels and factor 4, trained for a moment."""
    terminal.be_quiet(True)
    config = ae_config(
        EXAMPLES / "data",
        tmp_path_factory.mktemp("ae"),
        steps=1,
        look_first=False,
        preprocessing=PreprocessingConfig(size=64),
        autoencoder=AutoencoderConfig(
            channels=8, multipliers=(1, 1, 1), residual_blocks=1, norm_groups=2
        ),
        loss=AutoencoderLossConfig(perceptual="none"),
        disc=DiscriminatorConfig(weight=0),
    )
    return ldmkit.train_ae(config)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("script", TASKS, ids=lambda script: script.stem)
def test_a_shell_runs_the_script(script, autoencoder, tmp_path):
    for name, command in (("ldmkit", "-m ldmkit"), ("python", "")):
        binary = tmp_path / "bin" / name
        binary.parent.mkdir(exist_ok=True)
        binary.write_text(f'#!/bin/sh\nexec {sys.executable} {command} "$@"\n')
        binary.chmod(0o755)
    done = subprocess.run(
        [script, tmp_path / "out"],
        env=os.environ
        | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "AE": str(autoencoder),
            "STEPS": "2",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out/sheet.png'}\n"
    with Image.open(tmp_path / "out/sheet.png") as sheet:
        assert sheet.size[0] > 12 * 128
