"""Which curves a run's numbers make, with a sentence each on what to look for."""

from collections.abc import Sequence
from typing import NamedTuple

from ldmkit.metrics.curves import Axes, Curve, Point, bar_plot, line_plot, log_helps, smoothed
from ldmkit.pages.markup import figure, printable
from ldmkit.pages.reading import Log, Subject

STEP = "training step"
LEVELS = 10
"""Tenths of the noise schedule that losses are kept apart for."""
MOST_OTHERS = 12
SAME = 1e-4
"""Relative difference below which two baselines are one line."""


class Shown(NamedTuple):
    """One figure of curves over training steps."""

    title: str
    names: tuple[tuple[str, str], ...]
    """Name in the log, and in the legend."""
    y: str
    """Quantity and unit."""
    caption: str


AUTOENCODER = (
    Shown(
        "Difference of pixels",
        (("pixel", "training pictures"),),
        "mean difference, range is 2",
        "Falls fast, then slowly; a floor that comes early means too few channels or too strong a KL weight.",
    ),
    Shown(
        "Perceptual distance",
        (("perceptual", "training pictures"),),
        "distance, own scale",
        "Should go on falling after the pixels have stopped: this is texture and edges.",
    ),
    Shown(
        "Frequency term",
        (("frequency", "training pictures"),),
        "squared difference",
        "Absent detail shows here even where pixels look right.",
    ),
    Shown(
        "Regularization of the latents",
        (("regularization", "training pictures"),),
        "penalty (KL: nats of a picture)",
        "Of a KL autoencoder this rises while it learns to use its latents, then levels off; a fall to 0 is a collapse.",
    ),
    Shown(
        "Total loss",
        (("total", "training pictures"),),
        "loss of a picture",
        "Jumps where the adversarial phase begins are expected: a term is added.",
    ),
    Shown(
        "Adversarial terms",
        (("adversarial", "adversarial loss"), ("disc_loss", "discriminator's loss")),
        "loss",
        "Neither should run away: the discriminator's loss near 0 means it has won, and teaches nothing.",
    ),
    Shown(
        "Accuracy of the discriminator",
        (("accuracy", "pictures told apart"),),
        "share, 0.5 is chance",
        "Good between 0.5 and 0.9; near 1 for long the discriminator is too strong.",
    ),
    Shown(
        "Logits of the discriminator",
        (("logits_real", "real"), ("logits_fake", "reconstructed")),
        "mean logit",
        "Both lines should stay near each other; a gap that widens without end comes before a collapse.",
    ),
    Shown(
        "Adaptive weight",
        (("adaptive", "weight"),),
        "weight of the adversarial term",
        "Ratio of gradients that balances both terms; it says nothing by itself unless it sticks to its limit.",
    ),
    Shown(
        "Gradient penalty",
        (("r1", "R1"),),
        "squared gradient norm",
        "A rise says that the discriminator grows steep around real pictures.",
    ),
    Shown(
        "Use of the codebook",
        (("usage", "share of codes used"),),
        "share of codes",
        "Should stay high; a share that falls means idle codes.",
    ),
    Shown(
        "Perplexity of the codebook",
        (("perplexity", "perplexity"),),
        "codes",
        "The higher, the more evenly the codes are used.",
    ),
)
DIFFUSION = (
    Shown(
        "Loss",
        (
            ("loss", "training"),
            ("validation_loss", "validation (held back)"),
            ("validation_linear", "linear predictor"),
            ("validation_zero", "zero predictor"),
        ),
        "loss, of whitened latents",
        "Validation must fall below the dashed line: the linear predictor knows the scale of the latents and nothing "
        "else. It goes on falling very slowly; what it gains late shows in the pictures more than here.",
    ),
    Shown(
        "Gradient norm",
        (("gradient_norm", "before clipping"),),
        "norm of the gradient",
        "Spikes that come back down are harmless; a steady rise asks for a lower learning rate or --clip-norm.",
    ),
    Shown(
        "Learning rate",
        (("learning_rate", "learning rate"),),
        "learning rate",
        "Warm-up, plateau, cooldown: as configured.",
    ),
    Shown(
        "Updates left out",
        (("skipped_updates", "so far"),),
        "updates",
        "Flat is good. A staircase names steps at which loss or gradient was no finite number.",
    ),
)
RATE = Shown(
    "Throughput",
    (("images_per_second", "samples each second"),),
    "samples per second",
    "Dips are checkpoints, previews and validation, or a busy machine; a lasting fall is worth a look.",
)
QUALITY = Shown(
    "Held-back pictures",
    (("held_back_psnr", "PSNR"),),
    "PSNR, dB",
    "Measured on pictures that were not trained on; higher is better.",
)
EMPTY_IF_ZERO = ("frequency", "adversarial", "adaptive", "skipped_updates")
"""Terms that are logged though they are not in use: flat at 0, they are not drawn."""
NEVER_LOG = ("learning_rate",)
"""A cooldown ends at 0, which would fill a log axis."""
SECOND = ("held_back_vgg16", "set_back_from")
"""Names that are told in words, not drawn."""


def run_figures(subject: Subject) -> list[str]:
    """The figures of a run as markup; those without numbers are left out."""
    log = subject.log
    known = DIFFUSION if subject.kind == "diffusion" else AUTOENCODER
    made = [_over_steps(one, log) for one in known[:1]]
    if subject.kind == "diffusion":
        made += [noise_curves(log), noise_profile(log)]
    quality = (QUALITY,) if len(log.series.get("held_back_psnr", [])) > 1 else ()
    made += [_over_steps(one, log) for one in (*known[1:], *quality, RATE)]
    return [one for one in (*made, *_others(log, known)) if one]


def noise_curves(log: Log) -> str:
    """The training loss of each tenth of the noise levels over the steps."""
    curves = []
    for level in range(LEVELS):
        points = log.series.get(f"loss_by_noise_{level}", [])
        ends = {0: " (least noise)", LEVELS - 1: " (most noise)"}
        label = f"tenth {level + 1}{ends.get(level, '')}"
        curves.append(Curve(label, smoothed(points, window_of(points)), "line", f"n{level}"))
    values = [value for curve in curves for _, value in curve.points]
    axes = Axes(STEP, "training loss, smoothed", log_helps(values), log.last_step)
    caption = (
        "All ten should fall and then lie apart, each at its own height. One that does not move is a noise level "
        "that is not learnt: look at the schedule, the weighting and the parameterization."
    )
    return figure(
        "Loss by noise level", line_plot("Loss by noise level over steps", curves, axes), caption
    )


def noise_profile(log: Log) -> str:
    """The newest losses over the noise levels, of training and of validation, and early ones."""
    early, training, validation = [], [], []
    for level in range(LEVELS):
        points = log.series.get(f"loss_by_noise_{level}", [])
        mean = smoothed(points, window_of(points))
        place = level + 1.0
        early += [(place, mean[len(mean) // 4][1])] if len(mean) >= 8 else []
        training += [(place, _recent(points))] if points else []
        held = log.series.get(f"validation_loss_by_noise_{level}", [])
        validation += [(place, held[-1][1])] if held else []
    curves = [
        Curve("training, first quarter", early, "dashed", "c2"),
        Curve("training, newest", training, "marked", "c0"),
        Curve("validation, newest", validation, "marked", "c1"),
    ]
    values = [value for curve in curves for _, value in curve.points]
    axes = Axes("tenth of the noise schedule, 1 = least noise", "loss", log_helps(values))
    caption = (
        "Where along the noise the loss sits. Validation far above training at the low levels is memorizing; "
        "training is of the model that learns, validation of its average."
    )
    return figure(
        "Loss over the noise levels", line_plot("Loss over the noise levels", curves, axes), caption
    )


def channel_figures(mean: Sequence[float], std: Sequence[float]) -> list[str]:
    """Mean and standard deviation of a latent set's channels."""
    axes = Axes("latent channel", "units of raw latents")
    bars = bar_plot("Channels of the latents", (("mean", mean), ("standard deviation", std)), axes)
    caption = (
        "The second stage takes the mean away and divides by the standard deviation. Channels of very different "
        "size then weigh the same; one near 0 would be blown-up noise."
    )
    return [one for one in (figure("Channels of the latents", bars, caption),) if one]


def window_of(points: Sequence[Point]) -> int:
    """Neighbours to average over for a smooth line: a fifteenth of them, 1 for a few."""
    return 2 * (len(points) // 30) + 1


def _recent(points: Sequence[Point]) -> float:
    newest = points[-max(1, len(points) // 10) :]
    return sum(value for _, value in newest) / len(newest)


def _over_steps(shown: Shown, log: Log) -> str:
    caption = shown.caption
    found = [(name, label, log.series.get(name, [])) for name, label in shown.names]
    found = [entry for entry in found if entry[2]]
    if shown.names[0][0] in EMPTY_IF_ZERO and not any(v for *_, points in found for _, v in points):
        return ""
    if _same_baselines(log) and shown.names[0][0] == "loss":
        found = [entry for entry in found if entry[0] != "validation_zero"]
        caption += " Here the zero predictor is the linear one, by the parameterization."
    curves: list[Curve] = []
    for number, (name, label, points) in enumerate(found):
        curves += _curves(name, label, points, f"c{number % 4}")
    values = [value for _, _, points in found for _, value in points]
    log_axis = log_helps(values) and shown.names[0][0] not in NEVER_LOG
    axes = Axes(STEP, shown.y, log_axis, log.last_step)
    if len(found) == 1:
        curves = [curve._replace(label="") for curve in curves]
    return figure(shown.title, line_plot(f"{shown.title} over steps", curves, axes), caption)


def _curves(name: str, label: str, points: Sequence[Point], colour: str) -> list[Curve]:
    if name in ("validation_linear", "validation_zero"):
        return [Curve(label, points, "dashed", colour)]
    if name in ("learning_rate", "skipped_updates"):
        return [Curve(label, points, "line", colour)]
    window = window_of(points)
    if window == 1:
        return [Curve(label, points, "marked" if len(points) <= 60 else "line", colour)]
    return [
        Curve("", points, "faint", colour),
        Curve(f"{label}, smoothed", smoothed(points, window), "line", colour),
    ]


def _same_baselines(log: Log) -> bool:
    linear, zero = (log.series.get(f"validation_{name}", []) for name in ("linear", "zero"))
    return len(linear) == len(zero) > 0 and all(
        abs(a - b) <= SAME * abs(a) for (_, a), (_, b) in zip(linear, zero, strict=True)
    )


def _others(log: Log, known: Sequence[Shown]) -> list[str]:
    """Numbers that this page has no words for, each drawn by itself."""
    told = {name for one in (*known, RATE, QUALITY) for name, _ in one.names} | set(SECOND)
    rest = [
        name
        for name in sorted(log.series)
        if name not in told and not name.startswith(("loss_by_noise_", "validation_loss_by_noise_"))
    ]
    made = []
    for name in rest[:MOST_OTHERS]:
        title = printable(name)[:80]
        more = len(rest) - MOST_OTHERS
        words = "As the log has it; this page knows no more of it."
        if name == rest[MOST_OTHERS - 1 :][:1] and more:
            words += f" {more} more are not drawn."
        made.append(_over_steps(Shown(title, ((name, title),), title, words), log))
    return made
