"""What a run's numbers mean, in sentences: is it learning, and where does it stand?"""

from collections.abc import Sequence
from statistics import median
from typing import Literal, NamedTuple

from ldmkit.metrics.curves import Point
from ldmkit.pages.reading import Log, Subject
from ldmkit.terminal import format_duration

RISING, SPIKE, FLAT = 1.02, 10.0, 0.005
TOO_STRONG = 0.98
"""Accuracy of a discriminator from which it teaches nothing."""
UNEVEN = 10.0
TINY = 1e-3


class Finding(NamedTuple):
    """A sentence, and whether it is good or bad news."""

    mood: Literal["good", "bad", "plain"]
    head: str
    """A word or two in bold."""
    text: str


def findings_of(subject: Subject) -> list[Finding]:
    """All that can be said of one directory by itself."""
    found = [Finding("bad", "damaged", problem) for problem in subject.problems]
    if subject.kind in ("latents", "evaluation"):
        return found + (_of_latents(subject) if subject.kind == "latents" else [])
    found += _progress(subject)
    if subject.kind == "diffusion":
        found += _learning(subject.log)
    if subject.kind == "autoencoder":
        found += _autoencoder(subject)
    return found + _troubles(subject)


def steps_of(subject: Subject) -> int:
    """How many steps the run is to have, by its config; 0 if that does not say."""
    steps = subject.config.get("steps")
    return steps if isinstance(steps, int) and steps > 0 else 0


def seconds_per_step(subject: Subject) -> float | None:
    """Seconds that a step takes, by the newest lines of the log (median); None if it does not say."""
    size = subject.config.get("batch_size")
    rates = [rate for _, rate in subject.log.series.get("images_per_second", [])[-10:] if rate > 0]
    return size / median(rates) if rates and isinstance(size, int) and size > 0 else None


def trained_steps(subject: Subject) -> int | None:
    """Steps that the run's model file was trained for; None before there is one."""
    trained = subject.facts.get("trained")
    steps = trained.get("steps") if isinstance(trained, dict) else None
    own = any(not name.startswith("averages/") for name in subject.models)
    return steps if own and isinstance(steps, int) else None


def _progress(subject: Subject) -> list[Finding]:
    steps, done = steps_of(subject), trained_steps(subject)
    pace = seconds_per_step(subject)
    each = f"{pace:.3g} s for each step" if pace else "the log says nothing of its speed"
    if done == 0:
        return [Finding("good", "finished", "there is nothing to train in it")]
    if done is not None and done >= steps:
        return [Finding("good", "finished", f"after {done} steps; {each}")]
    at = max(subject.log.last_step, *subject.checkpoints, 0)
    if not at and not steps:
        return [Finding("plain", "not begun", "there are neither numbers nor checkpoints yet")]
    total = f" of {steps} ({100 * at / steps:.0f} %)" if steps else ""
    rest = ""
    if pace and steps > at:
        rest = f", so about {format_duration((steps - at) * pace)} more if it goes on at this pace"
    saved = (
        f"its newest checkpoint is of step {subject.checkpoints[-1]}"
        if subject.checkpoints
        else "there is no checkpoint, so it would begin anew"
    )
    return [Finding("plain", "unfinished", f"at step {at}{total}; {each}{rest}; {saved}")]


def _learning(log: Log) -> list[Finding]:
    """The validation loss beside what learns nothing."""
    held, linear = log.series.get("validation_loss", []), log.series.get("validation_linear", [])
    if not held or not linear:
        falls = _fall(log.series.get("loss", []))
        text = "no validation loss in the log (--holdout keeps latents back for it)"
        return [Finding("plain", "learning?", f"{text}; {falls}" if falls else text)]
    step, value = held[-1]
    base = linear[-1][1]
    below = 100 * (1 - value / base) if base > 0 else 0.0
    if value < base:
        found = [
            Finding(
                "good",
                "learning",
                f"the validation loss {value:.4g} at step {step:.0f} lies {below:.0f} % below the linear predictor's {base:.4g}",
            )
        ]
    else:
        found = [
            Finding(
                "bad",
                "not learning yet",
                f"the validation loss {value:.4g} at step {step:.0f} is not below the linear predictor's {base:.4g}: early in a run, with a slow average, this is normal; later look at the learning rate and the latents",
            )
        ]
    best_step, best = min(held, key=lambda point: point[1])
    if value > RISING * best:
        found.append(
            Finding(
                "bad",
                "rising",
                f"the validation loss was lowest ({best:.4g}) at step {best_step:.0f} and has risen by {100 * (value / best - 1):.0f} % since: it may be memorizing; more data, dropout or fewer steps help",
            )
        )
    falls = _fall(held) if len(held) >= 4 else ""
    return [*found, Finding("plain", "trend", f"{falls} (validation)")] if falls else found


def _fall(points: Sequence[Point]) -> str:
    """How much the newest fifth of a curve lies below the fifth before it."""
    if len(points) < 4:
        return ""
    part = max(1, len(points) // 5)
    newest = sum(value for _, value in points[-part:]) / part
    before = sum(value for _, value in points[-2 * part : -part]) / part
    if before <= 0:
        return ""
    change = newest / before - 1
    if abs(change) < FLAT:
        return "the loss of the newest fifth of the steps is that of the fifth before"
    return f"the loss of the newest fifth of the steps is {100 * abs(change):.1f} % {'below' if change < 0 else 'above'} that of the fifth before"


def _autoencoder(subject: Subject) -> list[Finding]:
    log, found = subject.log, []
    quality = {name: log.series.get(f"held_back_{name}", []) for name in ("psnr", "vgg16")}
    if quality["psnr"]:
        also = f", VGG16 distance {quality['vgg16'][-1][1]:.3g}" if quality["vgg16"] else ""
        found.append(
            Finding(
                "plain",
                "held back",
                f"reconstructions have a PSNR of {quality['psnr'][-1][1]:.2f} dB{also}, on pictures that were not trained on",
            )
        )
    accuracy = log.series.get("accuracy", [])
    if accuracy:
        newest = [value for _, value in accuracy[-5:]]
        mean = sum(newest) / len(newest)
        mood = "bad" if mean > TOO_STRONG else "plain"
        advice = (
            ": it is too strong; a smaller --disc.weight or learning rate helps"
            if mood == "bad"
            else ""
        )
        found.append(
            Finding(
                mood,
                "discriminator",
                f"at work since step {accuracy[0][0]:.0f} or a little before; lately it tells {100 * mean:.0f} % of the pictures apart{advice}",
            )
        )
    elif log.series.get("pixel"):
        found.append(Finding("plain", "discriminator", "has not been at work in these steps"))
    return found


def _troubles(subject: Subject) -> list[Finding]:
    log, found = subject.log, []
    skipped = log.series.get("skipped_updates", [])
    if skipped and skipped[-1][1]:
        found.append(
            Finding(
                "bad",
                "skipped",
                f"{skipped[-1][1]:.0f} update(s) were left out, as loss or gradient was no finite number",
            )
        )
    elif skipped:
        found.append(Finding("good", "sound", "no update had to be left out"))
    for name, step in sorted(log.not_finite.items())[:5]:
        found.append(
            Finding(
                "bad", "not finite", f"{name} is no finite number in the line of step {step:.0f}"
            )
        )
    norms = [value for _, value in log.series.get("gradient_norm", [])]
    if len(norms) >= 10 and max(norms) > SPIKE * median(norms):
        step, norm = max(log.series["gradient_norm"], key=lambda point: point[1])
        found.append(
            Finding(
                "plain",
                "spike",
                f"the gradient norm reached {norm:.3g} before step {step:.0f}, {norm / max(median(norms), 1e-30):.0f} times its median",
            )
        )
    if subject.setback is not None:
        back = subject.setback
        found.append(
            Finding(
                "bad",
                "set back",
                f"once, from step {back.failed} to step {back.step}: {back.reason}",
            )
        )
    return found


def _of_latents(subject: Subject) -> list[Finding]:
    manifest = subject.manifest
    if manifest is None:
        text = f"there is no readable manifest, and {subject.shards} shard(s) lie there: run `ldmkit encode` again"
        return [Finding("bad", "unfinished", text)]
    found = [
        Finding("good", "complete", f"{manifest.count} latents in {len(manifest.shards)} shard(s)")
    ]
    for entry in manifest.shards:
        file = subject.path / entry.name
        size = file.stat().st_size if file.is_file() else None
        if size != entry.bytes:
            word = "is missing" if size is None else f"has {size} bytes, not {entry.bytes}"
            found = [
                *(one for one in found if one.head != "complete"),
                Finding("bad", "damaged", f"shard {entry.name} {word}: run `ldmkit encode` again"),
            ]
    std = manifest.whitening.std
    low, high = min(std), max(std)
    if low <= TINY * high:
        found.append(
            Finding(
                "bad",
                "dead channel",
                f"channel {std.index(low)} hardly varies (standard deviation {low:.2g}, the largest {high:.2g}): stage 2 would learn noise of it",
            )
        )
    elif high > UNEVEN * low:
        found.append(
            Finding(
                "plain",
                "uneven",
                f"the strongest channel varies {high / low:.0f} times as much as the weakest; whitening evens this out",
            )
        )
    if manifest.skipped:
        share = 100 * len(manifest.skipped) / (manifest.count + len(manifest.skipped))
        found.append(
            Finding(
                "bad",
                "skipped",
                f"{len(manifest.skipped)} picture(s), {share:.1f} %, could not be used",
            )
        )
    return found
