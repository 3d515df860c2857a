"""The state of a training run on disk, so that a run continues to the same bytes.

`RUN/checkpoints/step-000012000/state.safetensors` holds weights, averages and optimizer moments of
the moment before step 12000, by name. Randomness and the order of data need no state: they are
functions of (seed, step). A checkpoint is renamed into place when it is whole, and carries the
fingerprint of its tensors. Of several processes the first one writes and all read, so that a checkpoint says
nothing of how many there were.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldmkit.durable import atomic_directory, drop_directory, require_room, sweep_temporaries
from ldmkit.errors import DataError, NonFiniteError
from ldmkit.modelfile import load, require_tensors, save
from ldmkit.terminal import say
from ldmkit.training import ranks
from ldmkit.training.optimizers import parameters_of
from ldmkit.training.sharding import as_held, gathered

KEEP = 2
STATE = "state.safetensors"


class TrainingState:
    """Saves and restores named modules and optimizers.

    Args:
        run: the run directory.
        modules: everything with weights or buffers.
        optimizers: over parameters of those modules; their settings are the config's business.
        lasting: a step whose checkpoint stays, however many come after it.
    """

    def __init__(
        self,
        run: Path,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        *,
        lasting: int | None = None,
    ) -> None:
        self.directory = run / "checkpoints"
        self.modules, self.optimizers, self.lasting = modules, optimizers, lasting
        self.saved_step: int | None = None

    def require_room(self, moments: int) -> None:
        """Refuse a run whose checkpoints the disk has no room for.

        Args:
            moments: bytes of what the optimizers will remember.

        Raises:
            StorageError: there is less room than for the checkpoints that are yet to come.
        """
        weights = sum(
            value.nbytes
            for module in self.modules.values()
            for value in module.state_dict().values()
        )
        to_come = max(KEEP + 1 - len(saved_checkpoints(self.directory)), 1)
        require_room(
            self.directory.parent, to_come * (weights + moments), "the checkpoints to come"
        )

    def save(self, step: int) -> None:
        """Commit the state before `step`, then drop all but the newest checkpoints.

        That is the first process's work; the others give it their parts of what is divided.

        Raises:
            NonFiniteError: a weight or moment is not a finite number; nothing is saved or dropped.
            StorageError: it cannot be written; the former checkpoints stay.
            LostProcessError: another process of the run ended.
        """
        if step != self.saved_step:
            tensors = gathered(self._tensors())
            if ranks.first():
                self._write(step, tensors)
            self.saved_step = step
        if ranks.first():
            self._drop_old(step)

    def _drop_old(self, step: int) -> None:
        """Also where this very step was loaded: who saved it may have been killed before this."""
        for old in saved_checkpoints(self.directory)[:-KEEP]:
            # what is newer than a state that was saved or read may be damaged
            if step_of(old) < step and step_of(old) != self.lasting:
                drop_directory(old)

    def _write(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        target = self.directory / f"step-{step:09d}"
        _require_finite(tensors, step)
        if target.exists():  # this run passed it over on loading, so it could not be read
            drop_directory(target)
        with atomic_directory(target) as temporary:
            save(
                temporary / STATE,
                tensors,
                kind="checkpoint",
                config={},
                facts={"step": step},
            )

    def load_latest(self, device: torch.device) -> int:
        """Restore the newest whole checkpoint; returns the step to go on with, 0 for a new run.

        Of several processes all restore the one that the first could read.

        Raises:
            DataError: there are checkpoints, but none can be read: never start over silently.
        """
        step = self._load_newest(device) if ranks.first() else 0
        step = int(ranks.from_first(torch.tensor(step)))
        if step and not ranks.first():
            path = self.directory / f"step-{step:09d}"
            self._restore(load(path / STATE, kind="checkpoint")[1], str(path), device)
        self.saved_step = step or None
        return step

    def _load_newest(self, device: torch.device) -> int:
        sweep_temporaries(self.directory)
        found = saved_checkpoints(self.directory)
        for path in reversed(found):
            try:
                header, tensors = load(path / STATE, kind="checkpoint")
            except DataError as error:
                say(f"skipping a checkpoint: {error}")
                continue
            self._restore(tensors, str(path), device)
            return int(header.facts["step"])
        if found:
            raise DataError(f"none of the {len(found)} checkpoints in {self.directory} can be read")
        return 0

    def drop_after(self, step: int) -> int | None:
        """Remove all checkpoints of later steps; returns the newest step that is left."""
        with ranks.first_before_others():
            return self._drop_after(step)

    def _drop_after(self, step: int) -> int | None:
        found = saved_checkpoints(self.directory)
        for path in reversed(found):
            if step_of(path) > step:
                drop_directory(path)
        self.saved_step = max((step_of(path) for path in found if path.exists()), default=None)
        return self.saved_step

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            for index, moments in optimizer.state_dict()["state"].items():
                tensors |= {
                    f"optimizer.{name}.{index}.{key}": value for key, value in moments.items()
                }
        return tensors

    def _restore(self, tensors: dict[str, Tensor], source: str, device: torch.device) -> None:
        moments = {
            name: tensors.pop(name) for name in list(tensors) if name.startswith("optimizer.")
        }
        expected = {
            f"{name}.{key}": value
            for name, module in self.modules.items()
            for key, value in module.state_dict().items()
        }
        require_tensors(expected, tensors, source)
        for name, module in self.modules.items():
            held = module.state_dict().items()
            module.load_state_dict({k: as_held(tensors[f"{name}.{k}"], x) for k, x in held})
        for name, optimizer in self.optimizers.items():
            state: dict[int, dict[str, Tensor]] = {}
            weights = parameters_of([optimizer])
            for key, value in moments.items():
                _, owner, index, moment = key.split(".")
                if owner == name:
                    weight = weights[int(index)]
                    alike = (
                        value.shape == weight.shape
                    )  # others are as whole as the number of steps
                    value_ = as_held(value, weight) if alike else value.to(device)
                    state.setdefault(int(index), {})[moment] = value_
            groups: Any = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})


def _require_finite(tensors: Mapping[str, Tensor], step: int) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise NonFiniteError(
                f"{name} is not finite before step {step}; the last checkpoint is from before: "
                "lower --lr, or look at the data, and run again"
            )


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's directory is named after."""
    return int(checkpoint.name.removeprefix("step-"))


def saved_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first."""
    return sorted(p for p in directory.glob("step-*") if re.fullmatch(r"step-\d{9}", p.name))
