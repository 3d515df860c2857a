"""How a sample came out of the noise, as an animated picture."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageSequence

from ldmkit.decode_configs import AnimationFormat
from ldmkit.output.contact_sheet import Small

SHOWN_MS, LAST_MS = 120, 1500
"""Milliseconds for a frame, and for the last one."""
MAX_PICTURES = 64
"""Of a moving sheet: all frames of all of them are in memory."""
Frame = Small
"""8-bit pixels, grey or RGB."""


def animation(frames: Sequence[Frame], form: AnimationFormat, quality: int) -> bytes:
    """Frames as the bytes of a file that repeats without end.

    Args:
        frames: of one size, at least one.
        form: webp, or gif with its 256 colours a frame.
        quality: of WebP, percent; at 100 nothing is lost.
    """
    images = [Image.fromarray(x[:, :, 0] if x.shape[2] == 1 else x) for x in frames]
    times = [SHOWN_MS] * (len(images) - 1) + [LAST_MS]
    options = {"quality": quality, "lossless": quality == 100} if form == "webp" else {}
    file = io.BytesIO()
    images[0].save(
        file,
        form.upper(),
        save_all=True,
        append_images=images[1:],
        duration=times,
        loop=0,
        **options,
    )
    return file.getvalue()


def frames_of(data: bytes) -> list[Frame]:
    """The frames of an animation, in RGB."""
    with Image.open(io.BytesIO(data)) as image:
        return [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
