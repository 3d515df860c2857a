"""Fuzz one reader with coverage: `python tests/faults/fuzz_atheris.py "tar index" -max_total_time=600`.

Needs the extra `fuzz` (Linux and macOS). What it finds is written to `crash-*`; add it to `test_fuzz.py`.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(  # pyright: ignore[reportAttributeAccessIssue]
    include=["ldmkit", "json", "tomllib", "csv"]
):
    from fuzz_targets import TARGETS

import contextlib

from ldmkit.errors import LdmkitError


def main() -> None:
    name = sys.argv.pop(1)
    target = TARGETS[name]
    corpus = Path(tempfile.mkdtemp(prefix="ldmkit-corpus-"))
    for number, seed in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(seed)
    limits = ["-rss_limit_mb=1024", "-timeout=10", "-max_len=65536", "-verbosity=0"]

    def one(data: bytes) -> None:
        with contextlib.suppress(LdmkitError):
            target.read(data)

    atheris.Setup([sys.argv[0], *limits, *sys.argv[1:], str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
