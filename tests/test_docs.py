"""Docs that are checked: generated pages are current, trees are real, commands run."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from string import Template

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", ["cli", "presets"])
def test_generated_pages_are_current(page):
    script = ROOT / f"docs/generate_{page}.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert (ROOT / f"docs/{page}.md").read_text() == done.stdout, "run `make docs`"


def test_the_file_tree_of_the_readme_is_the_real_one():
    text = (ROOT / "README.md").read_text()
    tree = re.search(r"```text\nsrc/ldmkit/\n(.*?)```", text, re.DOTALL)
    assert tree is not None
    shown = set(re.findall(r"^ +([\w.]+/|[\w.]+\.py)", tree.group(1), re.MULTILINE))
    top = {
        f"{item.name}/" if item.is_dir() else item.name
        for item in (ROOT / "src/ldmkit").iterdir()
        if item.name not in ("__pycache__", "py.typed")
    }
    assert shown == top


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.fixture
def readme_script(pictures, tmp_path):
    """The pipeline of the README as printed, on twelve pictures and with fewer, smaller steps."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    script = next(block for block in blocks if "ldmkit train-ae photos/" in block)
    small = {
        "train-ae": "--steps 2 --batch-size 2 --preprocessing.size 32 --autoencoder.channels 8"
        " --autoencoder.multipliers 1,2 --loss.perceptual vgg16 --disc.weight 0",
        "train-diffusion": "--steps 2 --batch-size 2 --unet.channels 32 --unet.multipliers 1,2"
        " --unet.attention-factors 2",
        "sample": "--steps 2",
    }
    for command, options in small.items():
        script = re.sub(rf"(ldmkit {command} [^|)\n]*)", rf"\1 {options} ", script)
    shutil.copytree(pictures, tmp_path / "photos")
    return script


def test_the_commands_of_the_readme_run(readme_script, tmp_path, monkeypatch, run):
    """Line by line in this process: variables and pipes as the shell has them."""
    monkeypatch.chdir(tmp_path)
    variables: dict[str, str] = {}
    for line in readme_script.splitlines():
        assigned = re.fullmatch(r"(\w+)=\$\((.*)\)", line)
        data = b""
        for command in (assigned[2] if assigned else line).split(" | "):
            program, *arguments = shlex.split(Template(command).substitute(variables))
            assert program == "ldmkit", line
            done = run(*arguments, stdin=data)
            assert done.returncode == 0, done.stderr.decode()
            data = done.stdout
        if assigned:
            variables[assigned[1]] = data.decode().rstrip("\n")
    assert set(variables) == {"ae", "latents", "ldm"}
    assert len(list((tmp_path / "samples").glob("*.png"))) == 65


@pytest.mark.slow
def test_a_shell_runs_the_commands_of_the_readme(readme_script, tmp_path):
    binary = tmp_path / "bin" / "ldmkit"
    binary.parent.mkdir()
    binary.write_text(f'#!/bin/sh\nexec {sys.executable} -m ldmkit "$@"\n')
    binary.chmod(0o755)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", readme_script],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{binary.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "samples").glob("*.png"))) == 65


def test_the_library_example_runs(pictures, tmp_path, monkeypatch, capsys):
    script = ROOT / "examples/library_use.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(pictures), str(tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    assert "image of (1, 3, 32, 32)" in capsys.readouterr().out


def test_every_make_target_is_explained():
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):", text, re.MULTILINE)
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:.*## \S", text, re.MULTILINE), target
