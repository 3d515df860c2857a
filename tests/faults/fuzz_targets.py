"""What is fuzzed: every reader of files that strangers may have made, with whole files to begin with.

Used by `test_fuzz.py` with seeded mutations, and by `fuzz_atheris.py` with coverage to guide them. A
reader may refuse (an error of ldmkit's) and must do nothing else.
"""

import contextlib
import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ldmkit.configfile import to_toml
from ldmkit.configs import TrainAEConfig, TrainDiffusionConfig
from ldmkit.container import FORMAT_VERSIONS
from ldmkit.data.formats.sidecars import text_of
from ldmkit.data.formats.tables import read_jsonl, read_table
from ldmkit.data.latents import text_columns
from ldmkit.data.shard_file import open_shard
from ldmkit.data.sources import scan_source
from ldmkit.data.tar_members import tar_members
from ldmkit.data_configs import SourceConfig
from ldmkit.digests import file_digest
from ldmkit.errors import LdmkitError
from ldmkit.facts import Manifest, SampleFacts, ShardEntry, Whitening
from ldmkit.manifest import read_manifest, write_manifest
from ldmkit.modelfile import load, write_message
from ldmkit.options import resolve
from ldmkit.sample_blocks import read_sample_stream

FOLDER = Path(tempfile.mkdtemp(prefix="ldmkit-fuzz-"))
LATENTS = torch.arange(24, dtype=torch.float32).reshape(2, 3, 2, 2)


class Target(NamedTuple):
    """A reader."""

    seeds: list[bytes]
    read: Callable[[bytes], object]
    """Raises nothing but errors of ldmkit's."""
    words: list[bytes]
    """What its format is made of."""


def message(kind: str, tensors: dict[str, torch.Tensor], facts: dict) -> bytes:
    buffer = io.BytesIO()
    write_message(buffer, tensors, kind=kind, config={}, facts=facts)
    return buffer.getvalue()


def unsealed(block: bytes) -> bytes:
    """The same as an earlier version wrote it, so that mutations reach what is behind the digest."""
    length = int.from_bytes(block[:8], "little")
    table = json.loads(block[8 : 8 + length])
    value = json.loads(table["__metadata__"]["ldmkit"])
    del value["digest"], value["crc32"]
    table["__metadata__"]["ldmkit"] = json.dumps(value)
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + block[8 + length :]


SHARD = message(
    "latents",
    {
        "mean": LATENTS,
        "label": torch.tensor([0, 1]),
        **text_columns("key", ["a.png", "b.png"]),
        **text_columns("caption", ["", "a cat"]),
    },
    {"fingerprint": ""},
)


def manifest_of(shard: bytes) -> Manifest:
    (FOLDER / "00000.safetensors").write_bytes(shard)
    entry = ShardEntry(
        name="00000.safetensors",
        start=0,
        stop=2,
        count=2,
        bytes=len(shard),
        sha256=file_digest(FOLDER / "00000.safetensors"),
    )
    return Manifest(
        format=f"ldmkit.latents/{FORMAT_VERSIONS['latents']}",
        recipe={"autoencoder": "0" * 64, "preprocessing": {"size": 32}},
        items="",
        count=2,
        latent_shape=(3, 2, 2),
        columns=("mean", "key", "label", "caption"),
        class_names=("cat", "dog"),
        whitening=Whitening(mean=(0.0,) * 3, std=(1.0,) * 3),
        shards=(entry,),
        skipped=(("c.png", "it is damaged"),),
        converted={"palette": (1, ("a.png",))},
        versions={"torch": "2"},
    )


def samples() -> bytes:
    facts = SampleFacts(
        fingerprint="", autoencoder="a", diffusion="d", total=2, first=0, versions={}
    )
    tensors = {
        "latents": LATENTS,
        "seed": torch.tensor([4, 5]),
        **text_columns("told", ['{"class": "cat"}', "{}"]),
    }
    return message("samples", tensors, facts.model_dump(mode="json"))


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in (("a.png", b"\x89PNG"), ("a.txt", b"cat"), ("long" * 60 + ".cls", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def read_shard(data: bytes) -> None:
    path = FOLDER / "00000.safetensors"
    path.write_bytes(data)
    with contextlib.suppress(LdmkitError):
        load(path, kind="latents")
    manifest = manifest_of(data)  # which knows the damaged bytes: the header alone is looked at
    shard = open_shard(FOLDER, manifest.shards[0], manifest)
    for name in ("key", "caption"):
        list(shard.texts(name))
        shard.text(name, 1)


def read_manifest_of(data: bytes) -> None:
    (FOLDER / "set").mkdir(exist_ok=True)
    (FOLDER / "set/manifest.json").write_bytes(data)
    read_manifest(FOLDER / "set")


def read_tar(data: bytes) -> None:
    list(tar_members(io.BytesIO(data), "it"))
    (FOLDER / "it.tar").write_bytes(data)
    scan_source(SourceConfig(data=str(FOLDER / "it.tar")))


def read_config(data: bytes) -> None:
    path = FOLDER / "config.toml"
    path.write_bytes(data)
    for command, config in (("train-ae", TrainAEConfig), ("train-diffusion", TrainDiffusionConfig)):
        try:
            resolve(command, config, None, path, {})
        except LdmkitError:
            continue


def read_captions(data: bytes) -> None:
    list(read_jsonl(io.BytesIO(data), "it", []))
    for name in ("metadata.csv", "metadata.jsonl"):
        (FOLDER / name).write_bytes(data)
        try:
            read_table(FOLDER / name, [])
        except LdmkitError:
            continue
    text_of(data, "it")


def manifest_bytes() -> list[bytes]:
    write_manifest(FOLDER, manifest_of(SHARD))
    text = (FOLDER / "manifest.json").read_text()
    page = json.loads(text)
    del page["digest"]
    return [text.encode(), json.dumps(page).encode(), json.dumps(page, indent=1).encode()]


def configs() -> list[bytes]:
    ae = TrainAEConfig(data="photos", out=Path("run"))
    ldm = TrainDiffusionConfig(latents=Path("latents"), out=Path("run"))
    return [to_toml(ae).encode(), to_toml(ldm).encode()]


JSON = [
    b"{",
    b"}",
    b"[",
    b'"',
    b"\\ud800",
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
    b"[" * 3000,
    b"9" * 40,
]
TARGETS: dict[str, Target] = {
    "shard": Target([SHARD, unsealed(SHARD)], read_shard, [*JSON, b"data_offsets", b"U8", b"I64"]),
    "stream": Target(
        [samples(), unsealed(samples()), samples() + unsealed(samples())],
        lambda data: [*read_sample_stream(io.BytesIO(data), "it")],
        [*JSON, b"shape", b"\xff" * 8, b"BOOL"],
    ),
    "manifest": Target(manifest_bytes(), read_manifest_of, [*JSON, b"../", b"shards", b"true"]),
    "tar index": Target(
        [tar()], read_tar, [b"ustar\0", b"\x80" + b"\xff" * 11, b"30 path=", b"size=9", bytes(512)]
    ),
    "config": Target(
        configs(), read_config, [b"[[", b"]]", b"= ", b'"""', b"inf", b"1979-05-27", b"[" * 3000]
    ),
    "captions": Target(
        [
            b'{"file_name": "a.png", "text": "a cat", "label": 1}\n{"file_name": "b.png"}\n',
            'file_name,text\na.png,"eine Katze, groß"\nb.png,\n'.encode(),
        ],
        read_captions,
        [*JSON, b'"', b",", b"\r\n", b"\0", b"\xff\xfe", b"\xef\xbb\xbf"],
    ),
}
