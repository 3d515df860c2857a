"""How fast `decode` writes: `python bench/decode.py`, a table, or one JSON document with --json.

Photo-like 256 px pictures through the whole command, pictures/s of wall time, best of some rounds. The
autoencoder is the identity, so that what is measured is all but the network: reading, encoding of
files, flushing them to disk, provenance; no contact sheet.
"""

import argparse
import io
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from data import photo
from PIL import Image

import ldmkit
from ldmkit import terminal
from ldmkit.assembly import autoencoder_facts, build_autoencoder, save_autoencoder
from ldmkit.autoencoder_configs import AutoencoderConfig, PreprocessingConfig
from ldmkit.data.latents import text_columns
from ldmkit.decode_configs import DecodeConfig
from ldmkit.facts import SampleFacts
from ldmkit.modelfile import save

SIDE, DIFFERENT = 256, 16


def write_samples(root: Path, count: int) -> tuple[Path, Path]:
    """An autoencoder that does nothing, and a sample file of photos."""
    preprocessing = PreprocessingConfig(size=SIDE)
    model = build_autoencoder(AutoencoderConfig(bottleneck="identity"), preprocessing)
    save_autoencoder(root / "ae.safetensors", model, preprocessing, {"steps": 0})
    arrays = [np.asarray(Image.open(io.BytesIO(photo(number)))) for number in range(DIFFERENT)]
    photos = torch.from_numpy(np.stack(arrays)).movedim(3, 1).float() / 127.5 - 1.0
    facts = SampleFacts(
        fingerprint="",
        autoencoder=autoencoder_facts(root / "ae.safetensors").fingerprint,
        diffusion="",
        total=count,
        first=0,
        versions={},
    )
    tensors = {
        "latents": photos[torch.arange(count) % DIFFERENT],
        "seed": torch.arange(count),
        **text_columns("told", ['{"class": "photo"}'] * count),
    }
    dump = facts.model_dump(mode="json")
    save(root / "s.safetensors", tensors, kind="samples", config={}, facts=dump)
    return root / "ae.safetensors", root / "s.safetensors"


def rates(count: int, rounds: int) -> dict[str, float]:
    """Pictures/s by format and number of threads."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        ae, samples = write_samples(root, count)
        ways = [
            *(("png", writers) for writers in (1, 2, 4)),
            *((name, 4) for name in ("jpg", "webp", "npy")),
        ]
        for _ in range(rounds):
            for name, writers in ways:
                settings = {"samples": samples, "ae": ae, "out": root / "out", "grid": "none"}
                config = DecodeConfig.model_validate(
                    settings | {"format": name, "writers": writers}
                )
                start = time.perf_counter()
                ldmkit.decode(config)
                rate = count / (time.perf_counter() - start)
                key = f"{name}, {writers} threads"
                found[key] = max(found.get(key, 0.0), rate)
                shutil.rmtree(root / "out")
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    terminal.be_quiet(True)
    found = rates(arguments.pictures, arguments.rounds)
    if arguments.json:
        print(json.dumps({"schema_version": 1, "pictures_per_second": found}))
        return
    for key, rate in found.items():
        print(f"{key:20} {rate:8.1f} pictures/s")


if __name__ == "__main__":
    main()
