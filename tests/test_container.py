import io
import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldmkit.container import METADATA_KEY, read_header, read_messages
from ldmkit.errors import DataError
from ldmkit.modelfile import fingerprint, load, load_messages, save, write_message

TENSORS = {"weight": torch.arange(6.0).view(2, 3), "steps": torch.tensor([1, 2, 3])}


def write(path, tensors=None, **changes):
    settings = {"kind": "autoencoder", "config": {"a": 1}, "facts": {"b": "ü"}} | changes
    return save(path, TENSORS if tensors is None else tensors, **settings)


def test_round_trip(tmp_path):
    digest = write(tmp_path / "x.safetensors")
    header, tensors = load(tmp_path / "x.safetensors", kind="autoencoder")
    assert header.config == {"a": 1}
    assert header.facts == {"b": "ü", "fingerprint": digest}
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_fingerprint_depends_on_names_dtypes_shapes_and_values():
    base = fingerprint(TENSORS)
    assert base == fingerprint(dict(reversed(TENSORS.items())))
    w = TENSORS["weight"]
    for other in (
        {"weigth": w},
        {"weight": w.double()},
        {"weight": w.view(3, 2)},
        {"weight": w + 1},
    ):
        assert fingerprint(other | {"steps": TENSORS["steps"]}) != base


def test_fingerprint_survives_a_rewritten_header(tmp_path):
    one = write(tmp_path / "a.safetensors", facts={})
    two = write(tmp_path / "b.safetensors", facts={"more": "words"}, config={})
    assert one == two


def test_every_flipped_byte_of_the_payload_is_found(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path)
    whole = path.read_bytes()
    start = read_header(path).payload_start
    for position in range(start, len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="damaged"):
            load(path, kind="autoencoder")


def test_every_truncation_is_found(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError):
            load(path, kind="autoencoder")
    path.write_bytes(whole + b"\0")
    with pytest.raises(DataError, match="bytes too many"):
        load(path, kind="autoencoder")


def test_another_kind_and_a_missing_file_are_named(tmp_path):
    write(tmp_path / "x.safetensors", kind="diffusion")
    with pytest.raises(DataError, match=r"holds diffusion; autoencoder is needed"):
        load(tmp_path / "x.safetensors", kind="autoencoder")
    with pytest.raises(DataError, match=r"cannot read .*nothing"):
        load(tmp_path / "nothing.safetensors", kind="autoencoder")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"format": "ldmkit.autoencoder/2", "config": {}, "facts": {}}, "update ldmkit"),
        ({"format": "ldmkit.cake/1", "config": {}, "facts": {}}, "unknown format"),
        ({"config": {}, "facts": {}}, "not understood"),
    ],
)
def test_headers_of_the_future_and_of_others_are_refused(tmp_path, metadata, words):
    text = json.dumps({"__metadata__": {METADATA_KEY: json.dumps(metadata)}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(DataError, match=words):
        read_header(path)


@given(st.binary(max_size=200))
def test_garbage_is_an_error_and_nothing_else(data):
    if data:
        with pytest.raises(DataError):
            list(read_messages(io.BytesIO(data), "garbage"))


@given(st.lists(st.integers(0, 5), max_size=4))
def test_messages_follow_one_another_in_a_pipe(lengths):
    pipe = io.BytesIO()
    for length in lengths:
        tensors = {"x": torch.arange(length, dtype=torch.float32)}
        write_message(pipe, tensors, kind="samples", config={}, facts={})
    pipe.seek(0)
    found = [tensors["x"].tolist() for _, tensors in load_messages(pipe, "pipe", kind="samples")]
    assert found == [list(range(length)) for length in lengths]


def test_a_message_without_tensors_is_one():
    pipe = io.BytesIO()
    write_message(pipe, {}, kind="manifest", config={}, facts={"count": 3})
    pipe.seek(0)
    [(header, tensors)] = load_messages(pipe, "pipe", kind="manifest")
    assert header.facts["count"] == 3
    assert tensors == {}


def test_a_pipe_cut_within_a_message_is_an_error():
    pipe = io.BytesIO()
    for _ in range(2):
        write_message(pipe, TENSORS, kind="samples", config={}, facts={})
    with pytest.raises(DataError, match="ends in the middle"):
        list(load_messages(io.BytesIO(pipe.getvalue()[:-1]), "pipe", kind="samples"))
