import os

import pytest

from ldmkit.durable import atomic_directory, atomic_file, sweep_temporaries, write_text
from ldmkit.errors import StorageError


def names(directory):
    return [path.name for path in directory.iterdir()]


def test_a_file_is_old_or_new_never_between(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]
    write_text(path, "new")
    assert path.read_text() == "new"


def test_permissions_follow_the_umask(tmp_path):
    former = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
    finally:
        os.umask(former)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_directory_appears_whole(tmp_path):
    target = tmp_path / "checkpoint"
    with pytest.raises(RuntimeError), atomic_directory(target) as temporary:
        (temporary / "a").write_text("a")
        raise RuntimeError
    assert names(tmp_path) == []
    with atomic_directory(target) as temporary:
        (temporary / "a").write_text("a")
        assert not target.exists()
    assert (target / "a").read_text() == "a"


def test_a_full_disk_is_a_storage_error(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    write_text(tmp_path / "file", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_leftovers_of_a_killed_process_are_swept(tmp_path):
    (tmp_path / "x.safetensors.tmp-12345678").write_text("half")
    (tmp_path / "step-000000001.tmp-12345678").mkdir()
    (tmp_path / "kept").write_text("whole")
    sweep_temporaries(tmp_path)
    assert names(tmp_path) == ["kept"]
