"""`ldmkit inspect`: what is this file, directory or stream, and is it whole?"""

import math
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from ldmkit.configfile import read_run_config
from ldmkit.configs import STREAM, InspectConfig
from ldmkit.container import Header, read_header, read_messages, verify, verify_file
from ldmkit.errors import DataError
from ldmkit.facts import SampleFacts, SamplesSeen, validated
from ldmkit.manifest import MANIFEST, read_manifest, verify_shard
from ldmkit.output.provenance import may_carry, provenance_of

SCHEMA_VERSION = 1
BY_NAME = {"conditions": "kind", "label_sets": "name", "sets": "name"}
"""Lists whose entries are shown one by one, by what they are called."""


def inspect(config: InspectConfig, stream: BufferedIOBase | None = None) -> dict[str, Any]:
    """A JSON-able report: kind, config, facts, tensors, whether the digests hold.

    Raises:
        DataError: it is nothing of ldmkit's, or it is damaged.
    """
    report: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "path": str(config.path)}
    if config.path == STREAM and stream is not None:
        return report | _stream(stream)
    if config.path.is_dir():
        return report | _directory(config.path)
    if may_carry(config.path):
        return report | _picture(config.path)
    header = read_header(config.path)
    verify_file(header, config.path)
    return report | _described(header) | {"digests": "hold"}


def _picture(path: Path) -> dict[str, Any]:
    record = provenance_of(path)
    if record is None:
        raise DataError(
            f"{path} does not say what it was made of: ldmkit did not write it, or with --no-provenance"
        )
    return {"kind": "picture", "provenance": record}


def _described(header: Header) -> dict[str, Any]:
    tensors = {
        name: {"dtype": entry.dtype, "shape": list(entry.shape)}
        for name, entry in header.tensors.items()
    }
    numbers = sum(math.prod(entry.shape) for entry in header.tensors.values())
    return {
        "kind": header.kind,
        "config": header.config,
        "facts": header.facts,
        "numbers": numbers,
        "tensors": tensors,
    }


def _stream(stream: BufferedIOBase) -> dict[str, Any]:
    kinds: dict[str, int] = {}
    samples, last = 0, None
    complete = SamplesSeen("standard input")
    for header, block in read_messages(stream, "standard input"):
        verify(header, memoryview(block)[header.payload_start :], "standard input")
        kinds[header.kind] = kinds.get(header.kind, 0) + 1
        rows = [
            entry.shape[0] for name, entry in header.tensors.items() if name in ("mean", "latents")
        ]
        samples += sum(rows)
        if header.kind == "samples":
            facts = validated(SampleFacts, header.facts, "standard input")
            complete.add(facts, sum(rows))
        last = header
    if last is None:
        raise DataError("standard input is empty: the command before it wrote nothing")
    if "latents" in kinds and last.kind != "manifest":
        raise DataError("standard input ended before the manifest: its writer was stopped")
    complete.close()
    return {
        "kind": "stream",
        "messages": kinds,
        "samples": samples,
        "facts": last.facts,
        "digests": "hold",
    }


def _directory(path: Path) -> dict[str, Any]:
    if (path / MANIFEST).is_file():
        return _latent_set(path)
    if (path / "config.toml").is_file():
        return _run(path)
    raise DataError(f"{path} is neither a latent set nor a run directory")


def _latent_set(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    for entry in manifest.shards:
        verify_shard(path, entry)
    return {"kind": "latents", "facts": manifest.model_dump(mode="json"), "digests": "hold"}


def _run(path: Path) -> dict[str, Any]:
    checkpoints = sorted((path / "checkpoints").glob("step-*/state.safetensors"))
    averages = sorted((path / "averages").glob("step-*.safetensors"))
    models = sorted(path.glob("*.safetensors"))
    for file in (*checkpoints, *averages, *models):
        verify_file(read_header(file), file)
    return {
        "kind": "run",
        "config": read_run_config(path / "config.toml"),
        "checkpoints": [file.parent.name for file in checkpoints],
        "averages": [file.stem for file in averages],
        "models": [file.name for file in models],
        "digests": "hold",
    }


def as_text(report: dict[str, Any]) -> str:
    """The report for people: facts as indented lines, tensors as a count."""
    shown = {
        key: value for key, value in report.items() if key not in ("schema_version", "tensors")
    }
    lines = list(_lines(shown, ""))
    if "tensors" in report:
        lines.append(f"tensors: {len(report['tensors'])} (names and shapes: --json)")
    return "\n".join(lines)


def _lines(value: dict[str, Any], indent: str) -> list[str]:
    lines: list[str] = []
    for key, item in value.items():
        if key in BY_NAME and isinstance(item, list):
            item = {part[BY_NAME[key]]: part for part in item}
        if isinstance(item, dict) and item:
            lines += [f"{indent}{key}:", *_lines(item, indent + "  ")]
        elif isinstance(item, list) and (
            len(item) > 12 or any(isinstance(part, dict) for part in item)
        ):
            lines.append(f"{indent}{key}: {len(item)} entries (--json lists them)")
        else:
            lines.append(f"{indent}{key}: {item}")
    return lines
