"""`ldmkit ema`: averaged weights of another width, after training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldmkit.assembly import save_diffusion
from ldmkit.configs import EMAConfig
from ldmkit.errors import UsageError
from ldmkit.frechet_score import frechet_score
from ldmkit.held_back import validation_of
from ldmkit.latent_diffusion import LatentDiffusion
from ldmkit.modelfile import require_tensors
from ldmkit.terminal import say, track
from ldmkit.training.averages import Reconstruction
from ldmkit.training.snapshots import Snapshot, combined, find_snapshots, fits

SCHEMA_VERSION = 1
Score = Callable[[LatentDiffusion], float]


def ema(config: EMAConfig, score: Score | None = None) -> dict[str, Any]:
    """Make power-function averages of any width from a run's snapshots (Karras et al. 2024, Alg. 3).

    Args:
        config: of which run, which widths, to where.
        score: a number for a model, smaller is better (default: the Fréchet distance to
            `config.reference`, else the validation loss of the run, if it measured one).

    Returns:
        `{"schema_version": 1, "models"}`; each model has path, width, step, error (share of the
        profile that is missed), and score if there is one.

    Raises:
        UsageError: a width or step that the snapshots do not give, or an --out that does not fit.
        DataError: a snapshot is damaged, or there are none.
    """
    snapshots = find_snapshots(config.run, config.step)
    widths = config.sweep or (config.width,)
    solutions = fits(snapshots, widths)
    paths = [path_for(config, width, snapshots[-1].facts.step) for width in widths]
    if score is None and config.reference is not None:
        shape = snapshots[-1].facts.model.latent_shape
        score = frechet_score(config, config.reference, shape)
    score = score or validation_of(config.run)
    models: list[dict[str, Any]] = []
    with track("ema", len(widths), unit="model") as progress:
        for width, fit, path in zip(widths, solutions, paths, strict=True):
            model = average_of(snapshots, width, fit, path)
            step = snapshots[-1].facts.step
            models.append({"path": str(path), "width": width, "step": step, "error": fit.error})
            if score is not None:
                models[-1]["score"] = score(model)
            progress.advance()
    for line in table(models):
        say(line)
    return {"schema_version": SCHEMA_VERSION, "models": models}


def average_of(
    snapshots: list[Snapshot], width: float, fit: Reconstruction, path: Path
) -> LatentDiffusion:
    """Make one average and write its file, like that of `train-diffusion`."""
    last = snapshots[-1]
    model = LatentDiffusion(last.config)
    tensors = combined(snapshots, fit)
    require_tensors(model.state_dict(), tensors, str(last.path))
    model.load_state_dict(tensors)
    average = {
        "kind": "power",
        "width": width,
        "snapshots": [one.facts.step for one in snapshots],
        "error": fit.error,
    }
    trained = last.facts.model.trained | {"average": average}
    save_diffusion(path, model, last.facts.model.model_copy(update={"trained": trained}))
    return model.eval().requires_grad_(False)


def path_for(config: EMAConfig, width: float, step: int) -> Path:
    """Where the model of a width goes.

    Raises:
        UsageError: --out names a file where a directory is needed, or the other way round.
    """
    name = f"ema-{width:g}-step-{step:09d}.safetensors"
    if config.out is None:
        return config.run / name
    if config.sweep:
        if config.out.is_file():
            raise UsageError(f"--out {config.out} is a file: with --sweep it names a directory")
        return config.out / name
    if config.out.is_dir():
        raise UsageError(f"--out {config.out} is a directory: name the model file")
    return config.out


def table(models: list[dict[str, Any]]) -> list[str]:
    """Width, share of the profile that is missed, and score of each model, in lines."""
    scored = any("score" in model for model in models)
    lines = ["width   missed" + ("   score" if scored else "")]
    for model in models:
        score = f"   {model['score']:.5g}" if scored else ""
        lines.append(f"{model['width']:<7g} {model['error']:6.2%}{score}")
    return lines


def as_text(report: dict[str, Any]) -> str:
    """The paths, for a shell."""
    return "\n".join(model["path"] for model in report["models"])
