"""Shared fixtures: a folder of small pictures, and a pipeline trained on it for a moment."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import settings
from PIL import Image, ImageDraw

import ldmkit
from ldmkit import terminal
from ldmkit.autoencoder_configs import AutoencoderConfig, DiscriminatorConfig, PreprocessingConfig
from ldmkit.cli import app
from ldmkit.configs import TrainAEConfig, TrainDiffusionConfig
from ldmkit.data_configs import EncodeConfig
from ldmkit.diffusion_configs import UNetConfig
from ldmkit.torchvision_import import import_torchvision

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(
    1
)  # for networks this small more cost time, on a busy machine many times over

settings.register_profile("ldmkit", deadline=None, derandomize=True)  # a busy machine is no failure
settings.load_profile("ldmkit")

SIZE = 32
COLOURS = ("red", "green", "blue", "orange", "purple", "black")


@pytest.fixture(autouse=True)
def _quiet():
    terminal.be_quiet(True)


def draw_picture(kind: str, number: int) -> Image.Image:
    """A circle or a square, of a size and colour that depend on the number."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    box = [4 + number % 5, 4, 20 + number % 7, 24]
    shape = ImageDraw.Draw(image)
    (shape.ellipse if kind == "circle" else shape.rectangle)(box, fill=COLOURS[number % 6])
    return image


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Twelve pictures in two class folders."""
    root = tmp_path_factory.mktemp("pictures")
    for kind in ("circle", "square"):
        (root / kind).mkdir()
        for number in range(6):
            draw_picture(kind, number).save(root / kind / f"{number}.png")
    return root


def ae_config(data: Path, out: Path, **changes) -> TrainAEConfig:
    """A training run of seconds, with every term of the loss."""
    settings = {
        "data": data,
        "out": out,
        "steps": 4,
        "batch_size": 4,
        "lr": 1e-3,
        "precision": "fp32",
        "save_every": 2,
        "log_every": 1,
        "sample_every": 2,
        "preprocessing": PreprocessingConfig(size=SIZE, flip=True),
        "autoencoder": AutoencoderConfig(
            channels=8, multipliers=(1, 2, 2), residual_blocks=1, norm_groups=2
        ),
        "disc": DiscriminatorConfig(start="1", warmup=1, ramp=2, channels=8, layers=1),
    }
    return TrainAEConfig.model_validate(settings | changes)


def diffusion_config(latents: Path, out: Path, **changes) -> TrainDiffusionConfig:
    """A training run of seconds."""
    settings = {
        "latents": latents,
        "out": out,
        "steps": 4,
        "batch_size": 4,
        "lr": 1e-3,
        "precision": "fp32",
        "save_every": 2,
        "log_every": 1,
        "sample_every": 2,
        "preview_steps": 2,
        "unet": UNetConfig(
            channels=16,
            multipliers=(1, 2),
            residual_blocks=1,
            attention_factors=(2,),
            head_channels=8,
            norm_groups=4,
            context_channels=16,
        ),
    }
    return TrainDiffusionConfig.model_validate(settings | changes)


class Pipeline:
    """The files of one run through all stages."""

    def __init__(self, data: Path, root: Path) -> None:
        self.data = data
        self.ae = ldmkit.train_ae(ae_config(data, root / "ae"))
        latents = ldmkit.encode(
            EncodeConfig(
                data=str(data), ae=self.ae, out=root / "latents", shard_size=5, batch_size=4
            )
        )
        assert latents is not None
        self.latents = latents
        self.ldm = ldmkit.train_diffusion(diffusion_config(self.latents, root / "ldm", ae=self.ae))


@pytest.fixture(scope="session")
def pipeline(pictures, tmp_path_factory) -> Pipeline:
    terminal.be_quiet(True)
    return Pipeline(pictures, tmp_path_factory.mktemp("pipeline"))


def save_pickled(path: Path, content: object, *, zipped: bool = True) -> None:
    """Write a checkpoint as other projects do."""
    torch.save(content, path, _use_new_zipfile_serialization=zipped)  # noqa: TID251


class Done(NamedTuple):
    """What a command left."""

    returncode: int
    stdout: bytes
    stderr: bytes


@pytest.fixture
def run(capfdbinary, tmp_path_factory):
    """Run `ldmkit ARGUMENTS` in this process, with real file descriptors for all three streams."""
    input_file = tmp_path_factory.mktemp("stdin") / "stdin"

    def call(*arguments: object, stdin: bytes = b"") -> Done:
        input_file.write_bytes(stdin)
        former = os.dup(0)
        capfdbinary.readouterr()
        with input_file.open("rb") as file:
            os.dup2(file.fileno(), 0)
        try:
            app([str(argument) for argument in arguments])
            code = 0
        except SystemExit as exit_:
            code = exit_.code or 0
        finally:
            os.dup2(former, 0)
            os.close(former)
        assert isinstance(code, int)
        return Done(code, *capfdbinary.readouterr())

    return call


@pytest.fixture(scope="session")
def published_weights() -> Callable[[str], list[Path]]:
    """Finds files of published weights, for tests marked `weights`: a missing one is a failure."""
    variable = "LDMKIT_TEST_WEIGHTS"
    root = Path(os.environ.get(variable) or "nowhere: it is not set")

    def find(pattern: str) -> list[Path]:
        files = sorted(root.rglob(pattern))
        if not files:
            pytest.fail(
                f"no {pattern} in the directory that {variable} names ({root}): "
                "CONTRIBUTING.md says which files it must hold",
                pytrace=False,
            )
        return files

    return find


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def diffusers():
    """The package that networks are compared with; its import is loud, and wants torchvision."""
    import_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers")
