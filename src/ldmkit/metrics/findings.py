"""What the numbers of an autoencoder mean for the second stage, in sentences."""

from ldmkit.metrics.latents import DEAD_NATS, DEAD_STD, CodebookUsage, LatentHealth

FAR_FROM_UNIT = 1.5
"""Ratio to a standard deviation of 1 from which latents are called far from a unit Gaussian."""
UNEVEN, HEAVY_TAILS, CORRELATED = 10.0, 3.0, 0.7
LOUD_NOISE, QUIET_NOISE = 0.1, 1e-4
"""Shares of the noise in a channel's variance."""
ROUGH = 0.5
"""Power of the fastest waves relative to white noise from which latents are called rough."""
VISIBLE_BIAS = 1.0
"""Percent of the value range."""
FEW_CODES = 0.5


def latent_findings(health: LatentHealth) -> list[str]:
    """Sentences on the latents: always what scale they have, else only what stands out."""
    alive = [channel for channel in range(len(health.std)) if channel not in health.dead]
    if not alive:
        return [
            "no latent channel carries anything: the decoder works without the picture; lower "
            "--loss.kl-weight or train longer"
        ]
    return [
        *_scale(health, alive),
        *_dead(health),
        *_noise(health, alive),
        *_shape(health, alive),
        *_correlations(health, alive),
        *_spectrum(health, alive),
    ]


def codebook_findings(usage: CodebookUsage) -> list[str]:
    """A sentence on how much of a codebook is in use."""
    share, size = usage.share_used(), len(usage.counts)
    text = (
        f"{100 * share:.0f} % of the {size} codes are used, as evenly as {usage.perplexity():.0f} "
        "codes chosen equally often"
    )
    if share < FEW_CODES:
        text += ": the rest is idle on this data; a smaller codebook would do, or longer training"
    return [text]


def bias_findings(percent_of_range: list[float]) -> list[str]:
    """A sentence where reconstructions are visibly brighter, darker or tinted."""
    worst = max(percent_of_range, key=abs)
    if abs(worst) < VISIBLE_BIAS:
        return []
    channel = percent_of_range.index(worst)
    return [
        f"reconstructions are shifted by {worst:+.1f} % of the value range in picture channel {channel}: "
        "train longer, or give group normalisations fewer groups"
    ]


def _scale(health: LatentHealth, alive: list[int]) -> list[str]:
    std = health.std[alive]
    low, high = std.min().item(), std.max().item()
    sentences = []
    if low < 1 / FAR_FROM_UNIT or high > FAR_FROM_UNIT:
        sentences.append(
            f"latents have a standard deviation of {low:.3g} to {high:.3g}, far from the unit Gaussian's 1: "
            "expected of small KL weights and of bottlenecks without one; stage 2 whitens them"
        )
    else:
        sentences.append(
            f"latents have a standard deviation of {low:.3g} to {high:.3g}, near the unit Gaussian's 1"
        )
    if high / low > UNEVEN:
        sentences.append(
            f"the strongest channel varies {high / low:.0f} times as much as the weakest: whitening evens "
            "this out, and with it what the channels matter to the picture"
        )
    return sentences


def _dead(health: LatentHealth) -> list[str]:
    if not health.dead:
        return []
    criterion = (
        f"below {DEAD_STD:g} of the largest standard deviation"
        if health.information is None
        else f"under {DEAD_NATS:g} nats for each value"
    )
    return [
        f"{_listed(health.dead)} without content ({criterion}), of which stage 2 would learn noise: "
        "take fewer --autoencoder.latent-channels or a smaller --loss.kl-weight"
    ]


def _noise(health: LatentHealth, alive: list[int]) -> list[str]:
    if health.noise_std is None:
        return ["the bottleneck adds no noise: latents are what the encoder says"]
    noise = health.noise_std[alive].square()
    share = (noise / (noise + health.std[alive].square())).max().item()
    if share > LOUD_NOISE:
        return [
            f"the posterior's noise is up to {100 * share:.0f} % of a channel's variance: it takes detail "
            "from what stage 2 learns; a smaller --loss.kl-weight leaves less of it"
        ]
    if share < QUIET_NOISE:
        return [
            f"the posterior's noise is at most {100 * share:.1g} % of a channel's variance: nearly a "
            "plain autoencoder, so latents are not smoothed; a larger --loss.kl-weight would"
        ]
    return []


def _shape(health: LatentHealth, alive: list[int]) -> list[str]:
    heavy = [channel for channel in alive if health.excess_kurtosis[channel] > HEAVY_TAILS]
    if not heavy:
        return []
    worst = health.excess_kurtosis[heavy].max().item()
    return [
        f"{_listed(heavy)} with rare extreme values (excess kurtosis up to {worst:.1f}, a Gaussian's "
        "is 0): whitening keeps them, and they are what stage 2 gets wrong first; pictures with flat "
        "backgrounds cause this too"
    ]


def _correlations(health: LatentHealth, alive: list[int]) -> list[str]:
    pairs = [
        (abs(value), value, a, b)
        for a in alive
        for b in alive
        if a < b and abs(value := health.correlation[a, b].item()) > CORRELATED
    ]
    if not pairs:
        return []
    _, value, a, b = max(pairs)
    more = f", and {len(pairs) - 1} more pairs" if len(pairs) > 1 else ""
    return [
        f"channels {a} and {b} are correlated by {value:+.2f}{more}: fewer --autoencoder.latent-channels "
        "might hold the same; whitening works on each channel alone and keeps this"
    ]


def _spectrum(health: LatentHealth, alive: list[int]) -> list[str]:
    if health.spectrum.shape[1] < 2:
        return []
    fastest = health.spectrum[alive, -1]
    rough = [
        channel for channel, power in zip(alive, fastest.tolist(), strict=True) if power > ROUGH
    ]
    if rough:
        return [
            f"{_listed(rough)} with rough content: the finest detail has up to {100 * fastest.max().item():.0f} % of "
            "white noise's power, which stage 2 has to learn as if it were structure; more training, a "
            "larger KL weight or a smaller down-sampling factor makes latents smoother"
        ]
    return [
        f"latents are smooth like pictures: their finest detail has {100 * fastest.max().item():.0f} % of white "
        "noise's power or less"
    ]


def _listed(channels: list[int] | tuple[int, ...]) -> str:
    shown = ", ".join(str(channel) for channel in channels[:8])
    word = "channel" if len(channels) == 1 else "channels"
    return f"{word} {shown}" + (f" and {len(channels) - 8} more" if len(channels) > 8 else "")
