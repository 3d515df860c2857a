"""What a directory holds, read leniently: a run may be at work, stopped or damaged, and is shown all the same.

What cannot be read becomes a sentence. Needs no torch.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ldmkit.configfile import read_run_config
from ldmkit.container import Header, read_header
from ldmkit.errors import DataError, UsageError
from ldmkit.facts import Manifest
from ldmkit.manifest import MANIFEST, read_manifest
from ldmkit.metrics.curves import Point
from ldmkit.seals import line_state, read_page
from ldmkit.training.setback import Setback, read_setback

Kind = Literal["autoencoder", "diffusion", "latents", "evaluation", "run"]
MOST_REPORT_BYTES = 20_000_000
CONFIG, METRICS, SHARDS = "config.toml", "metrics.jsonl", "[0-9]*.safetensors"


class Log(NamedTuple):
    """The numbers of a run over its steps."""

    series: dict[str, list[Point]]
    """Name -> (step, value), finite values only."""
    unreadable: int
    """Lines in the middle that are no JSON objects with a step."""
    cut: bool
    """Whether the last line is unfinished: the run is writing, or was killed."""
    not_finite: dict[str, float]
    """Name -> the first step at which it was no finite number."""

    @property
    def last_step(self) -> int:
        """The newest step of any number; 0 without any."""
        return int(max((points[-1][0] for points in self.series.values() if points), default=0))


class Evaluation(NamedTuple):
    """What `eval-ae`, `check` or another command measured."""

    file: Path
    report: dict[str, Any]


class Subject(NamedTuple):
    """One directory of a report."""

    path: Path
    kind: Kind
    config: dict[str, Any]
    config_text: str
    log: Log
    models: dict[str, Header]
    """Header of each model file, by file name; the run's own first."""
    checkpoints: tuple[int, ...]
    """Steps of the checkpoints that are there."""
    samples: tuple[Path, ...]
    manifest: Manifest | None
    shards: int
    """Shards of a latent set that lie there."""
    evaluations: tuple[Evaluation, ...]
    setback: Setback | None
    problems: tuple[str, ...]
    """What cannot be read, in sentences."""

    @property
    def facts(self) -> dict[str, Any]:
        """Of the run's own model file; {} before there is one."""
        return next((header.facts for header in self.models.values()), {})


def read_subject(path: Path) -> Subject:
    """Read what there is.

    Raises:
        DataError: it is no directory of ldmkit's.
    """
    problems: list[str] = []
    config, text = _config(path, problems)
    log = read_log(path / METRICS, problems)
    manifest = _manifest(path, problems)
    shards = len(list(path.glob(SHARDS)))
    evaluations = _evaluations(path, problems)
    models = _models(path, problems) if not shards else {}
    kind = _kind(path, config, models, log)
    return Subject(
        path=path,
        kind=kind,
        config=config,
        config_text=text,
        log=log,
        models=models,
        checkpoints=tuple(_steps(path / "checkpoints", "step-*")),
        samples=tuple(sorted((path / "samples").glob("*.png"))),
        manifest=manifest,
        shards=shards,
        evaluations=evaluations,
        setback=_setback(path, problems),
        problems=tuple(problems),
    )


def read_log(path: Path, problems: list[str]) -> Log:
    """The numbers in a `metrics.jsonl`; an empty log if there is none.

    Args:
        path: of the file.
        problems: gets a sentence for what is damaged.
    """
    log = Log({}, 0, False, {})
    try:
        with path.open("rb") as file:
            for line in file:
                log = _with_line(log, line)
    except FileNotFoundError:
        return log
    except OSError as error:
        problems.append(f"{METRICS} cannot be read ({error.strerror}), so there are no curves")
    if log.unreadable:
        problems.append(f"{log.unreadable} line(s) of {METRICS} are damaged and left out")
    if log.cut:
        problems.append(
            f"the last line of {METRICS} is cut off and left out: the run is writing, or was killed"
        )
    return log._replace(series={name: sorted(points) for name, points in log.series.items()})


def _with_line(log: Log, line: bytes) -> Log:
    """The log with one more line; its dictionaries are filled in place."""
    step, numbers = _line(line)
    if step is None or line_state(line.removesuffix(b"\n")) == "damaged":
        whole = line.endswith(b"\n")
        damaged = whole and bool(line.strip())
        return log._replace(unreadable=log.unreadable + damaged, cut=not whole)
    for name, value in numbers.items():
        if math.isfinite(value):
            log.series.setdefault(name, []).append((step, value))
        else:
            log.not_finite.setdefault(name, step)
    return log


def _line(line: bytes) -> tuple[float | None, dict[str, float]]:
    """The step and the numbers of a line; None if it is none of a log's."""
    try:
        value = json.loads(line.decode("utf-8", "replace"))
        step = float(value.pop("step"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return None, {}
    if not math.isfinite(step):
        return None, {}
    numbers = {}
    for name, number in value.items():
        if (isinstance(number, int | float) and abs(number) < 1e300) or number != number:
            numbers[name] = float(number)
        elif isinstance(number, float):
            numbers[name] = math.inf
    return step, numbers


def _config(path: Path, problems: list[str]) -> tuple[dict[str, Any], str]:
    file = path / CONFIG
    if not file.is_file():
        return {}, ""
    text = ""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
        return read_run_config(file), text
    except (UsageError, DataError, OSError) as error:
        problems.append(f"its settings cannot be read: {error}")
        return {}, text


def _manifest(path: Path, problems: list[str]) -> Manifest | None:
    if not (path / MANIFEST).is_file():
        return None
    try:
        return read_manifest(path)
    except DataError as error:
        problems.append(str(error))
        return None


def _models(path: Path, problems: list[str]) -> dict[str, Header]:
    own = ("autoencoder.safetensors", "diffusion.safetensors")
    files = sorted(path.glob("*.safetensors"), key=lambda file: (file.name not in own, file.name))
    models: dict[str, Header] = {}
    for file in files:
        try:
            models[file.name] = read_header(file)
        except DataError as error:
            problems.append(str(error))
    if models or not (snapshots := sorted((path / "averages").glob("step-*.safetensors"))):
        return models
    # a run at work with snapshots: what they say of their model tells of what it is derived
    try:
        header = read_header(snapshots[-1])
        model = header.facts.get("model")
        facts = model if isinstance(model, dict) else {}
        return {f"averages/{snapshots[-1].name}": header._replace(facts=facts)}
    except DataError as error:
        problems.append(str(error))
        return {}


def _evaluations(path: Path, problems: list[str]) -> tuple[Evaluation, ...]:
    found = []
    for file in sorted((*path.glob("*.json"), *path.glob("*/report.json"))):
        if file.name == MANIFEST:
            continue
        try:
            if file.stat().st_size > MOST_REPORT_BYTES:
                raise ValueError(f"more than {MOST_REPORT_BYTES // 1_000_000} MB")
            report, _ = read_page(file)
        except (OSError, ValueError, DataError) as error:
            problems.append(f"{file.relative_to(path)} cannot be read: {error}")
            continue
        if "schema_version" in report:
            found.append(Evaluation(file, report))
    return tuple(found)


def _setback(path: Path, problems: list[str]) -> Setback | None:
    try:
        return read_setback(path)
    except (DataError, ValueError, OSError) as error:
        problems.append(f"setback.json cannot be read: {error}")
        return None


def _steps(directory: Path, pattern: str) -> list[int]:
    names = [found.name.removeprefix("step-") for found in directory.glob(pattern)]
    return sorted(int(name) for name in names if name.isdecimal())


def _kind(path: Path, config: Mapping[str, Any], models: Mapping[str, Header], log: Log) -> Kind:
    """What a directory is, by what lies in it.

    Raises:
        DataError: nothing of ldmkit's.
    """
    if (path / MANIFEST).is_file() or (any(path.glob(SHARDS)) and not config):
        return "latents"
    stages = {header.kind for header in models.values()}
    if "latents" in config or stages & {"diffusion", "averages"}:
        return "diffusion"
    if "autoencoder" in config or "autoencoder" in stages:
        return "autoencoder"
    if (path / CONFIG).is_file() or (path / METRICS).is_file():
        return (
            "autoencoder"
            if "pixel" in log.series
            else "diffusion"
            if "loss" in log.series
            else "run"
        )
    if any(path.glob("report.json")):
        return "evaluation"
    raise DataError(
        f"{path} is no directory of train-ae, encode, train-diffusion or eval-ae: name one that is"
        if path.is_dir()
        else f"{path}: no such directory"
    )
