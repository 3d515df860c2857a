"""The command line: a table of commands, and what surrounds each of them.

Standard output is for data alone: the path of what was made, or its bytes. While a command runs,
file descriptor 1 points at standard error, so that no library can write a stray line into a pipe.
"""

import contextlib
import errno
import json
import keyword
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from io import BufferedIOBase
from pathlib import Path
from typing import Annotated, Any

import typer

import ldmkit
from ldmkit import (
    care_configs,
    configs,
    data_configs,
    decode_configs,
    evaluation_configs,
    generation_configs,
    interchange_configs,
    inversion_configs,
    measures_configs,
    report_configs,
    terminal,
    tuning_configs,
)
from ldmkit.configfile import to_toml
from ldmkit.errors import (
    DataError,
    InterruptedRun,
    LdmkitError,
    OutOfMemoryError,
    StorageError,
    UsageError,
)
from ldmkit.heap import keep_heap
from ldmkit.options import command_function

BROKEN_PIPE, CTRL_C = 141, 130
DISK_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS, errno.ESTALE}
"""What an OSError says that is no fault of the command: no room, or a disk that fails."""
COMMANDS: dict[str, type[configs.Config]] = {
    "check": data_configs.CheckConfig,
    "split": data_configs.SplitConfig,
    "train-ae": configs.TrainAEConfig,
    "eval-ae": configs.EvalAEConfig,
    "encode": data_configs.EncodeConfig,
    "train-diffusion": configs.TrainDiffusionConfig,
    "ema": configs.EMAConfig,
    "tune-steps": tuning_configs.TuneStepsConfig,
    "sample": generation_configs.SampleConfig,
    "invert": inversion_configs.InvertConfig,
    "decode": decode_configs.DecodeConfig,
    "spread": measures_configs.SpreadConfig,
    "anomaly": measures_configs.AnomalyConfig,
    "evaluate": evaluation_configs.EvaluateConfig,
    "likelihood": measures_configs.LikelihoodConfig,
    "rate-distortion": measures_configs.RateDistortionConfig,
    "inspect": configs.InspectConfig,
    "verify": care_configs.VerifyConfig,
    "doctor": care_configs.DoctorConfig,
    "report": report_configs.ReportConfig,
    "presets": configs.PresetsConfig,
    "import": interchange_configs.ImportConfig,
    "export": interchange_configs.ExportConfig,
}
"""Command -> its config; the function of the same name in `ldmkit` does the work."""
KEEP_HEAP = {"train-ae", "train-diffusion", "encode", "decode"}
"""Commands whose every step takes and frees as much memory as the one before (docs/performance.md)."""
INPUTS = {"train-diffusion": "latents"}
"""Commands that can read standard input -> the field that says so; some others can too."""
REPORTS_ON = {"inspect": "path", "spread": "samples"}
"""Commands that give a report on what they read, perhaps from standard input -> the field that says so."""
SWITCHES: dict[str, Any] = {
    "quiet": typer.Option("--quiet", "-q", help="Say nothing but errors"),
    "debug": typer.Option("--debug", help="Show the traceback of an error"),
}
DRY_RUN: dict[str, Any] = {
    "dry_run": typer.Option("--dry-run", help="Print the resolved config and estimates, and stop")
}
JSON: dict[str, Any] = {"as_json": typer.Option("--json", help="Print one JSON document")}
EXTRA_SWITCHES: dict[str, dict[str, Any]] = {
    "check": JSON,
    "split": JSON,
    "train-ae": DRY_RUN,
    "encode": DRY_RUN,
    "train-diffusion": DRY_RUN,
    "ema": JSON,
    "inspect": JSON,
    "verify": JSON,
    "doctor": JSON,
    "presets": JSON,
    "eval-ae": JSON,
    "evaluate": JSON,
    **dict.fromkeys(("spread", "anomaly", "likelihood", "rate-distortion"), JSON),
}

app = typer.Typer(
    name="ldmkit",
    help="Train latent diffusion models on your own pictures: files in between, one command each.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def function_name(command: str) -> str:
    """The Python name of a command: underscores for hyphens, one more after a word of Python's."""
    name = command.replace("-", "_")
    return f"{name}_" if keyword.iskeyword(name) else name


def _print_version(wanted: bool | None) -> None:
    if wanted:
        print(ldmkit.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool | None,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version"),
    ] = None,
) -> None:
    del version  # its callback did the work


def run_command(
    name: str,
    resolve: Callable[[], configs.Config],
    *,
    quiet: bool,
    debug: bool,
    dry_run: bool = False,
    as_json: bool = False,
) -> None:
    """Run a command with errors turned into sentences and exit codes.

    Args:
        name: of the command.
        resolve: makes the config.
        quiet: no talk on standard error.
        debug: tracebacks too.
        dry_run: print the resolved config (standard output) and estimates (standard error) only.
        as_json: print the report as JSON.
    """
    terminal.be_quiet(quiet)
    if name in KEEP_HEAP:
        keep_heap()
    code = 0
    with _guarded_stdout() as output:
        try:
            config = resolve()
            if dry_run:
                from ldmkit.recipes.plan import plan

                terminal.say(plan(config))
                output.write(to_toml(config).encode())
            else:
                text = _call(name, config, output, as_json)
                output.write(text.encode() if terminal.speaks_for_all() else b"")
            output.flush()
        except BaseException as error:
            if debug:
                traceback.print_exc()
            code = _explain(error)
    raise typer.Exit(code)


def _call(name: str, config: Any, output: BufferedIOBase, as_json: bool) -> str:  # noqa: ANN401
    """Do the work; returns the text for standard output ("" where bytes went there)."""
    work = getattr(ldmkit, function_name(name))
    if name in REPORTS_ON:
        with _stdin_for(getattr(config, REPORTS_ON[name])) as stream:
            return _printed(name, work(config, stream), as_json)
    if name in ("presets", "split", "ema", "anomaly", "likelihood", "rate-distortion"):
        return _printed(name, work(config), as_json)
    if name in ("check", "verify", "doctor"):
        return _checked(name, work(config), output, as_json)
    if name == "decode":
        with _stdin_for(config.samples) as stream:
            path = work(config, stream, _stdout_for(config.tar, output, name, "--tar FILE"))
        return f"{path}\n" if path is not None else ""
    if name in INPUTS:
        with _stdin_for(getattr(config, INPUTS[name])) as stream:
            return f"{work(config, stream)}\n"
    if name == "sample":
        with _stdin_for(config.prompts or config.conditions) as source:
            path = work(config, _stdout_for(config.out, output, name), source)
        return f"{path}\n" if path is not None else ""
    if name == "encode":
        path = work(config, _stdout_for(config.out, output, name))
        return f"{path}\n" if path is not None else ""
    path = work(config)
    if name in ("eval-ae", "evaluate") and as_json:
        report = path / "report.json"  # not there yet while other jobs are at work
        return report.read_text(encoding="utf-8") if report.exists() else ""
    if name == "import" and path.is_dir():  # a whole model: a line for each of its files
        return "".join(f"{file}\n" for file in sorted(path.glob("*.safetensors")))
    return f"{path}\n"


def _printed(name: str, report: dict[str, Any], as_json: bool) -> str:
    """A report as its recipe words it for people, or as JSON."""
    as_text = import_module(f"ldmkit.recipes.{function_name(name)}").as_text
    return (json.dumps(report, ensure_ascii=False) if as_json else as_text(report)) + "\n"


def _checked(name: str, report: dict[str, Any], output: BufferedIOBase, as_json: bool) -> str:
    """Print the report; what is wrong ends the command as any such trouble does, but after it."""
    output.write(_printed(name, report, as_json).encode())
    output.flush()
    sentence = import_module(f"ldmkit.recipes.{name}").complaint(report)
    if sentence is not None:
        raise UsageError(sentence) if name == "doctor" else DataError(sentence)
    return ""


def _stdout_for(
    out: Path | None, output: BufferedIOBase, name: str, option: str = "--out"
) -> BufferedIOBase | None:
    if out != configs.STREAM:
        return None
    if output.isatty():
        raise UsageError(
            f"{name} would write binary data to the terminal: pipe it on, or give {option}"
        )
    return output


@contextlib.contextmanager
def _stdin_for(source: Path | None) -> Iterator[BufferedIOBase | None]:
    if source != configs.STREAM:
        yield None
        return
    if os.isatty(0):
        raise UsageError(
            "nothing is piped in: name a file, or pipe `ldmkit sample` or `encode` into this"
        )
    with os.fdopen(os.dup(0), "rb") as stream:
        yield stream


@contextlib.contextmanager
def _guarded_stdout() -> Iterator[BufferedIOBase]:
    """The real standard output as bytes; all else that prints in the block goes to stderr."""
    sys.stdout.flush()
    real = os.dup(1)
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield output
    finally:
        os.dup2(real, 1)
        os.close(real)
        with contextlib.suppress(BrokenPipeError):  # the exit code tells it already
            output.close()


def _explain(error: BaseException) -> int:
    """Say what happened in one sentence and choose the exit code."""
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE
    if isinstance(error, KeyboardInterrupt):
        return CTRL_C
    known = _as_known(error)
    if known is None:
        traceback.print_exception(error)
        return LdmkitError.exit_code
    if known.alike and not terminal.speaks_for_all():
        return known.exit_code
    word = "" if isinstance(known, InterruptedRun) else "error: "
    terminal.complain(word + " ".join(str(known).split()))
    return known.exit_code


def _as_known(error: BaseException) -> LdmkitError | None:
    text = str(error)
    if isinstance(error, LdmkitError):
        return error
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in text
    ):
        return OutOfMemoryError(
            "out of memory: lower --batch-size, the picture size or the widths; "
            "encode and decode also work in tiles (--tile)"
        )
    if isinstance(error, PermissionError | IsADirectoryError | FileNotFoundError):
        return DataError(f"{error.filename}: {error.strerror}")
    if isinstance(error, OSError) and error.errno in DISK_TROUBLE:
        return StorageError(f"{error.filename or 'writing'}: {error.strerror}")
    return None


for _name, _config in COMMANDS.items():
    _switches = SWITCHES | EXTRA_SWITCHES.get(_name, {})

    def _body(resolve: Callable[[], configs.Config], _name: str = _name, **switches: bool) -> None:
        run_command(_name, resolve, **switches)

    app.command(_name, help=_config.__doc__)(command_function(_name, _config, _body, _switches))
