"""The five commands that write, each small enough to be run hundreds of times, and what they leave."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from conftest import ae_config, diffusion_config
from ldmkit.artefacts import check_path
from ldmkit.autoencoder_configs import AutoencoderConfig, DiscriminatorConfig, PreprocessingConfig
from ldmkit.configfile import config_page
from ldmkit.diffusion_configs import UNetConfig
from ldmkit.durable import TEMPORARY_MARK
from ldmkit.ownership import LOCK

SMALL_AE = AutoencoderConfig(channels=4, multipliers=(1, 1), residual_blocks=1, norm_groups=2)
SMALL_DISC = DiscriminatorConfig(start="1", warmup=1, ramp=1, channels=4, layers=1)
SMALL_UNET = UNetConfig(
    channels=8,
    multipliers=(1,),
    residual_blocks=1,
    attention_factors=(1,),
    head_channels=8,
    norm_groups=4,
    context_channels=8,
)
COMMANDS = ("train-ae", "encode", "train-diffusion", "sample", "decode")
UNFINISHED = ("belongs to a set without manifest.json", ".parts/")


class Stage(NamedTuple):
    """One command, and where it writes."""

    name: str
    root: Path
    """A directory that is there already; all is written below it."""
    arguments: tuple[str, ...]
    result: Path
    """What is there when the command is through."""

    def empty(self) -> None:
        """Begin anew."""
        shutil.rmtree(self.root)
        self.root.mkdir()

    def left(self) -> dict[str, Any]:
        """What lies below the root, file by file, without clocks and the locks of killed processes."""
        files = (x for x in sorted(self.root.rglob("*")) if x.is_file() and x.name != LOCK)
        return {str(path.relative_to(self.root)): _content(path) for path in files}

    def temporaries(self) -> list[str]:
        """What only a command at work may have there."""
        marks = (TEMPORARY_MARK, ".parts", ".part")
        names = (str(path.relative_to(self.root)) for path in self.root.rglob("*"))
        return [name for name in names if any(mark in name for mark in marks)]

    def problems(self) -> list[str]:
        """What `verify` finds; that a set or the samples are not finished yet is none."""
        if not any(self.root.iterdir()):
            return []
        found = [text for one in check_path(self.root) for text in one.problems]
        return [text for text in found if not any(part in text for part in UNFINISHED)]


def _content(path: Path) -> bytes | list[dict[str, Any]]:
    if path.name != "metrics.jsonl":
        return path.read_bytes()
    clocks = ("images_per_second", "crc32")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: line[name] for name in line if name not in clocks} for line in lines]


def make_stages(
    pipeline: Any,
    run: Callable[..., Any],
    directory: Path,
) -> dict[str, Stage]:
    """All commands, each with a directory of its own below which it makes two more."""
    samples = directory / "samples.safetensors"
    sampling = ("sample", pipeline.ldm, "--num", 3, "--steps", 1, "--batch-size", 2)
    assert run(*sampling, "--out", samples, "--quiet").returncode == 0
    roots = {name: directory / name for name in COMMANDS}
    out = {name: root / "new" / "out" for name, root in roots.items()}
    short = {"steps": 3, "save_every": 1, "sample_every": 2, "batch_size": 2}
    ae = ae_config(pipeline.data, out["train-ae"], **short)
    ae = ae.model_copy(
        update={
            "autoencoder": SMALL_AE,
            "disc": SMALL_DISC,
            "preprocessing": PreprocessingConfig(size=8, flip=True),
        }
    )
    ldm = diffusion_config(pipeline.latents, out["train-diffusion"], unet=SMALL_UNET, **short)
    for config in (ae, ldm):
        (directory / f"{config.out.parent.parent.name}.toml").write_text(config_page(config))
    file = out["sample"] / "samples.safetensors"
    typed = {
        "train-ae": (pipeline.data, "--config", directory / "train-ae.toml"),
        "encode": (pipeline.data, "--ae", pipeline.ae, "--shard-size", 5, "-o", out["encode"]),
        "train-diffusion": (pipeline.latents, "--config", directory / "train-diffusion.toml"),
        "sample": (*sampling[1:], "-o", file),
        "decode": (samples, "--ae", pipeline.ae, "--writers", 1, "-o", out["decode"]),
    }
    results = {
        "train-ae": out["train-ae"] / "autoencoder.safetensors",
        "encode": out["encode"] / "manifest.json",
        "train-diffusion": out["train-diffusion"] / "diffusion.safetensors",
        "sample": file,
        "decode": out["decode"] / "samples.jsonl",
    }
    for root in roots.values():
        root.mkdir()
    return {
        name: Stage(name, roots[name], (name, *map(str, typed[name]), "--quiet"), results[name])
        for name in COMMANDS
    }
