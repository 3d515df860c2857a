"""The tests notice when a safety is taken away: each record in `mutations/` removes one."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORDS = sorted((ROOT / "tests/faults/mutations").glob("*.toml"))


class Mutation(NamedTuple):
    """A text of the package, what it becomes, and the test that must fail then."""

    what: str
    file: str
    old: str
    new: str
    test: str


def read(record: Path) -> Mutation:
    return Mutation(**tomllib.loads(record.read_text()))


def outcome(test: str, source: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a test with the package from another directory."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--timeout=500"]
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", f"--basetemp={directory / 'tests'}", test],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.stem)
def test_a_mutation_changes_one_place(record):
    mutation = read(record)
    text = (ROOT / "src/ldmkit" / mutation.file).read_text()
    assert text.count(mutation.old) == 1
    assert mutation.old != mutation.new
    assert (ROOT / mutation.test.partition("::")[0]).is_file()


def test_there_are_ten_mutations():
    assert len({read(record).what for record in RECORDS}) >= 10


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.stem)
def test_a_mutation_is_caught(record, tmp_path, capfd):
    mutation = read(record)
    source = tmp_path / "src"
    shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
    whole = outcome(mutation.test, source, tmp_path)
    assert whole.returncode == 0, whole.stdout
    file = source / "ldmkit" / mutation.file
    file.write_text(file.read_text().replace(mutation.old, mutation.new))
    mutated = outcome(mutation.test, source, tmp_path)
    assert mutated.returncode == 1, mutated.stdout  # other codes: no test was run
    last = mutated.stdout.strip().splitlines()[-1]
    assert " failed" in last, mutated.stdout  # and not stopped before the test
    assert all(word not in mutated.stdout for word in ("ImportError", "SyntaxError", "Timeout"))
    with capfd.disabled():
        print(f"\n{record.stem}: {last}")
