"""Plots of an autoencoder's report as PNG files (matplotlib, from the extra `eval`)."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from ldmkit.durable import atomic_file
from ldmkit.metrics.latents import LatentHealth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MANY_CHANNELS = 16
"""Above this, channels get no line of their own in a legend."""


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def plot_report(
    directory: Path, decibels: Float[Tensor, " pictures"], health: LatentHealth
) -> list[str]:
    """Write the four plots and return their file names.

    Args:
        directory: where to.
        decibels: PSNR of each picture, dB.
        health: of the latents.
    """
    plots: dict[str, Callable[[Any], None]] = {
        "plot-psnr.png": lambda axes: _histogram(axes, decibels),
        "plot-spectrum.png": lambda axes: _spectrum(axes, health),
        "plot-channels.png": lambda axes: _channels(axes, health),
        "plot-correlation.png": lambda axes: _correlation(axes, health),
    }
    for name, draw in plots.items():
        _write(directory / name, draw)
    return list(plots)


def _write(path: Path, draw: Callable[[Any], None]) -> None:
    # a figure with its own canvas: no window system, no state shared with the caller's pyplot
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.0), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.add_subplot())
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")


def _histogram(axes: "Axes", decibels: Tensor) -> None:
    values = decibels.tolist()
    axes.hist(values, bins=min(40, max(5, len(values) // 4)))
    mean = sum(values) / len(values)
    axes.axvline(mean, color="black", linestyle="--", label=f"mean {mean:.2f} dB")
    axes.set(xlabel="PSNR, dB", ylabel="pictures", title="Reconstructions")
    axes.legend()


def _spectrum(axes: "Axes", health: LatentHealth) -> None:
    frequency = health.frequency.tolist()
    labelled = len(health.spectrum) <= MANY_CHANNELS
    for channel, power in enumerate(health.spectrum.tolist()):
        axes.plot(frequency, power, marker=".", label=f"channel {channel}" if labelled else None)
    axes.axhline(1.0, color="black", linestyle="--", label="white noise")
    if frequency and bool((health.spectrum > 0).any()):
        axes.set_yscale("log")
    axes.set(xlabel="frequency, cycles for each latent pixel", ylabel="power / variance")
    axes.set_title("Spectrum of the latents")
    axes.legend(fontsize="small")


def _channels(axes: "Axes", health: LatentHealth) -> None:
    places = range(len(health.std))
    bars = {"std of the means": health.std}
    if health.noise_std is not None and health.kl is not None:
        bars |= {
            "std of the noise": health.noise_std,
            "KL, nats per value": health.kl,
        }
    width = 0.8 / len(bars)
    for number, (label, values) in enumerate(bars.items()):
        left = [place + (number - (len(bars) - 1) / 2) * width for place in places]
        axes.bar(left, values.tolist(), width, label=label)
    if bool((health.std > 0).any()):
        axes.set_yscale("log")
    axes.set(xlabel="latent channel", title="Channels of the latents")
    if len(places) <= MANY_CHANNELS:
        axes.set_xticks(list(places))
    axes.margins(y=0.3)  # room for the legend
    axes.legend(fontsize="small", loc="upper center", ncols=len(bars))


def _correlation(axes: "Axes", health: LatentHealth) -> None:
    matrix = health.correlation.tolist()
    image = axes.imshow(matrix, cmap="RdBu_r", vmin=-1.0, vmax=1.0)
    assert axes.figure is not None  # noqa: S101 - a subplot has one
    axes.figure.colorbar(image, ax=axes)
    axes.set(xlabel="latent channel", ylabel="latent channel", title="Correlation of channels")
    if len(matrix) <= MANY_CHANNELS:
        axes.set_xticks(range(len(matrix)))
        axes.set_yticks(range(len(matrix)))
    if len(matrix) <= 8:
        for row, values in enumerate(matrix):
            for column, value in enumerate(values):
                colour = "white" if abs(value) > 0.6 else "black"  # on dark red and blue
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
