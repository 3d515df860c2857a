"""Trading time for memory, and start for speed: activations computed again, networks compiled."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ldmkit.errors import UsageError


def recompute(modules: Iterable[nn.Module]) -> None:
    """Let each of these modules keep only its input, and run again in the backward pass.

    Names of weights and results stay; random numbers (dropout) are the same both times.
    """
    for module in modules:
        module.forward = partial(_checkpointed, module.forward)


def _checkpointed(forward: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401
    if not torch.is_grad_enabled():
        return forward(*arguments)
    return checkpoint(forward, *arguments, use_reentrant=False)


@contextmanager
def compilation_explained() -> Iterator[None]:
    """Turn a failure of torch.compile, which shows when a network is first used, into a sentence.

    Raises:
        UsageError: the network could not be compiled.
    """
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2]) or type(error).__name__
        raise UsageError(
            f"--compile: torch could not compile the network ({reason}); run again with --no-compile"
        ) from error
