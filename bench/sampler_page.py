"""The tables and figures of docs/sampler-choice.md from what `bench/samplers.py` measured."""

import json
from pathlib import Path
from typing import Any


def measured(results: Path, num: int) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The cells that were measured with so many samples, by sampler, grid and calls."""
    if not results.exists():
        return {}
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    return {(r["sampler"], r["grid"], r["calls"]): r for r in rows if r["num"] == num}


def write(out: Path) -> None:
    """Not there yet."""
    raise SystemExit(f"nothing for {out} yet")
