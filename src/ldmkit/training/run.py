"""The run directory: one config, kept; the same command again goes on with it."""

from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError

from ldmkit.configfile import config_page, first_difference, read_run_config
from ldmkit.configs import TrainingConfig
from ldmkit.container import read_header
from ldmkit.durable import TEMPORARY_MARK, make_directory, sweep_temporaries, write_text
from ldmkit.errors import UsageError
from ldmkit.fields import seconds
from ldmkit.ownership import LOCK, owned
from ldmkit.terminal import say
from ldmkit.training import ranks
from ldmkit.training.interruption import Interruption

CONFIG_FILE = "config.toml"
AUTO = "auto"
AnyTraining = TypeVar("AnyTraining", bound=TrainingConfig)


def open_run(config: TrainingConfig) -> None:
    """Make the run directory and keep the config in it, or check that it is the same run.

    Of several processes that is the first one's work.

    Raises:
        UsageError: the directory holds a run with other settings; the message names the first.
        DataError: the config that the directory keeps is damaged.
    """
    if not ranks.first():
        return
    make_directory(config.out)
    sweep_temporaries(config.out, "**/*")
    require_same_run(config)
    write_text(config.out / CONFIG_FILE, config_page(config))


def as_begun(config: AnyTraining) -> AnyTraining:
    """The config; `--batch-size auto` becomes the number that was found when the run in OUT began.

    Raises:
        UsageError: that number does not go with the other settings.
    """
    file = config.out / CONFIG_FILE
    if config.batch_size != AUTO or not file.exists():
        return config
    return with_batch_size(config, read_run_config(file).get("batch_size", AUTO))


def with_batch_size(config: AnyTraining, size: int | Literal["auto"]) -> AnyTraining:
    """A config with another batch size, checked like any other.

    Raises:
        UsageError: it does not go with the other settings.
    """
    try:
        return config.model_validate(config.model_dump() | {"batch_size": size})
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UsageError(f"--batch-size auto stands for {size} here: {reason}") from error


def require_same_run(config: TrainingConfig) -> None:
    """Raise UsageError, naming the first setting that differs, if OUT holds another run."""
    file = config.out / CONFIG_FILE
    if file.exists():
        free = set(config.FREE_TO_CHANGE) - ({"steps"} if config.steps_shape_the_run else set())
        stored = read_run_config(file)
        if stored.get("batch_size") == AUTO:  # stopped before it was known, so before any step
            free |= {"batch_size"}
        difference = first_difference(config, stored, ignore=free)
        if difference:
            name, ours, theirs = difference
            raise UsageError(
                f"{config.out} holds a run with {name} = {theirs}, not {ours}: "
                "give the same settings to resume it, or another --out"
            )


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now."""
    return step == last or (step > 0 and step % every == 0)


def finished(config: TrainingConfig, result: Path) -> bool:
    """Whether this very run has already been carried through to its last step.

    Raises:
        UsageError: the directory holds another run.
    """
    if not result.exists():
        return False
    require_same_run(config)
    steps = read_header(result).facts["trained"]["steps"]
    if steps == config.steps:
        say(f"{result} is complete ({steps} steps)")
        sweep_if_free(config.out)
    return steps == config.steps


def sweep_if_free(run: Path) -> None:
    """Remove what a process left that was killed when its last file was whole, unless one is at work there."""
    if any(run.glob(f"*{TEMPORARY_MARK}*")) or (run / LOCK).exists():
        with suppress(UsageError, OSError), owned(run, patience=0.0):
            sweep_temporaries(run)


def interruption(config: TrainingConfig) -> Interruption:
    """What may end or save this run from outside."""
    limit = None if config.time_limit is None else seconds(config.time_limit)
    return Interruption(config.out, time_limit=limit, stall_timeout=seconds(config.stall_timeout))
