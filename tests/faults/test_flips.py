"""One flipped bit anywhere in anything that was written is found by `verify`, and refused on use."""

import io
import random
import shutil
import time

import pytest
from artefact_kit import make_artefacts

from ldmkit import terminal
from ldmkit.artefacts import check_path
from ldmkit.care_configs import VerifyConfig
from ldmkit.container import parse_header, read_header
from ldmkit.errors import DataError
from ldmkit.recipes.verify import as_text, verify

KINDS = (
    *("autoencoder", "diffusion model", "snapshot", "checkpoint", "reference", "config", "metrics"),
    *("survey", "setback", "evaluation", "report", "preview", "manifest", "shard"),
    *("stream of latents", "sample file", "stream of samples"),
    *("picture (png)", "picture (jpg)", "picture (npy)", "list", "sheet", "tar"),
)
SHORT, FULL = 60, 1000
HEADER = 2000
"""Bytes at the beginning that half of the flips go to: headers, and what says that there is a digest."""


@pytest.fixture(scope="module")
def artefacts(pipeline, tmp_path_factory):
    terminal.be_quiet(True)
    made = make_artefacts(pipeline, tmp_path_factory.mktemp("artefacts"))
    assert set(made) == set(KINDS)
    return made


def problems_around(path):
    """What verify says of all that lies beside a file."""
    where = path.parent.parent if path.parent.name.startswith("step-") else path.parent
    return [text for checked in check_path(where) for text in checked.problems]


def problems_of(artefact, kind):
    """What verify says of a file; of a picture, by its directory's list."""
    beside = ("picture", "shard", "manifest", "list")
    found = check_path(artefact.path) if not kind.startswith(beside) else None
    if found is None:
        return problems_around(artefact.path)
    return [text for checked in found for text in checked.problems]


def refused(artefact):
    try:
        artefact.use()
    except DataError:
        return True
    return False


def flip_and_look(artefact, kind, count):
    """Flips that verify missed, flips that were used, and seconds that verify took for each."""
    whole = artefact.path.read_bytes()
    draw = random.Random(kind)
    missed, used, seconds = [], [], 0.0
    for number in range(count):
        most = min(len(whole), HEADER) if number % 2 else len(whole)
        place, bit = draw.randrange(most), draw.randrange(8)
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        artefact.path.write_bytes(damaged)
        started = time.perf_counter()
        if not problems_of(artefact, kind):
            missed.append((place, bit))
        seconds += time.perf_counter() - started
        if artefact.use is not None and not refused(artefact):
            used.append((place, bit))
    artefact.path.write_bytes(whole)
    return missed, used, seconds / count


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_are_whole_and_flipped_bits_are_found(kind, artefacts):
    artefact = artefacts[kind]
    assert problems_of(artefact, kind) == []
    if artefact.use is not None:
        artefact.use()
    missed, used, _ = flip_and_look(artefact, kind, 12 if "latents" in kind else SHORT // 2)
    assert (missed, used) == ([], [])


@pytest.mark.faults
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_flipped_bits_are_found(kind, artefacts, capsys):
    artefact = artefacts[kind]
    missed, used, seconds = flip_and_look(artefact, kind, FULL)
    size = artefact.path.stat().st_size
    with capsys.disabled():
        print(
            f"\n{kind}: {size:,} bytes, {FULL} flips, {len(missed)} missed by verify, "
            f"{'-' if artefact.use is None else len(used)} used, {seconds * 1000:.1f} ms a verify"
        )
    assert (missed, used) == ([], [])


def test_every_bit_of_a_header_counts(artefacts):
    """Every one of them, because a header tells where everything else lies."""
    path = artefacts["checkpoint"].path
    start = bytearray(path.read_bytes()[: read_header(path).payload_start])
    missed = []
    for place in range(len(start)):
        for bit in range(8):
            start[place] ^= 1 << bit
            try:
                parse_header(io.BytesIO(start), "it")
            except DataError:
                pass
            else:
                missed.append((place, bit))
            start[place] ^= 1 << bit
    assert missed == []


def test_verify_names_file_and_tensor_and_ends_with_3(artefacts, run, tmp_path):
    path = tmp_path / "x.safetensors"
    shutil.copy(artefacts["autoencoder"].path, path)
    assert run("verify", path).returncode == 0
    header = read_header(path)
    name, entry = max(header.tensors.items())
    damaged = bytearray(path.read_bytes())
    damaged[header.payload_start + entry.start] ^= 4
    path.write_bytes(damaged)
    done = run("verify", path, "--json")
    assert done.returncode == 3
    assert f"x.safetensors is damaged: tensor {name} does not".encode() in done.stdout
    assert done.stderr.count(b"\n") == 2  # what was checked, and the complaint
    done = run("verify", path)
    assert f"damaged: {path} is damaged: tensor {name}".encode() in done.stdout


def test_a_directory_is_checked_with_all_that_lies_in_it(artefacts, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(artefacts["diffusion model"].path.parent, root)
    (root / "notes.txt").write_text("mine")
    report = verify(VerifyConfig(path=(root,)))
    assert report["problems"] == []
    assert report["notes"] == []
    assert report["unknown"] == [str(root / "notes.txt")]
    assert report["files"]["checkpoint"] == 2
    (root / "checkpoints/step-000000004").rename(root / "checkpoints/step-000000009")
    (root / "samples/samples-000000002.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    texts = [problem["text"] for problem in verify(VerifyConfig(path=(root,)))["problems"]]
    assert len(texts) == 2
    assert "is of step 4, and its name says 9" in texts[0]
    assert "damaged or cut off" in texts[1]
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nothing", root / "notes.txt"):
        with pytest.raises(DataError, match=path.name):
            verify(VerifyConfig(path=(path,)))


def test_a_set_lacking_a_shard_or_its_manifest_is_named(artefacts, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(artefacts["shard"].path.parent, root)
    (root / "00001.safetensors").unlink()
    report = verify(VerifyConfig(path=(root,)))
    assert "00001.safetensors is missing" in report["problems"][0]["text"]
    (root / "manifest.json").unlink()
    report = verify(VerifyConfig(path=(root,)))
    assert "belongs to a set without manifest.json" in as_text(report)


def test_files_of_earlier_versions_are_taken_and_said(artefacts, tmp_path):
    root = tmp_path / "run"
    root.mkdir()
    former = artefacts["config"].path.parent
    (root / "config.toml").write_text((former / "config.toml").read_text().split("\n", 1)[1])
    (root / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    (root / "setback.json").write_text('{"step": 5, "failed": 9, "reason": "too strong"}')
    report = verify(VerifyConfig(path=(root,)))
    assert report["problems"] == []
    assert len(report["notes"]) == 3
    assert all("by an earlier version: no digest covers" in note for note in report["notes"])
