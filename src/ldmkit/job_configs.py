"""Options by which many samples are drawn: parts of a job, batches, what is kept on the way. No torch."""

from typing import Literal

from ldmkit.data_configs import Job
from ldmkit.fields import Config, Count, Positive, field

USUAL_BATCH = 16


class SampleJobConfig(Config):
    """How the samples of one command are divided."""

    batch_size: Positive | Literal["auto"] = field(
        USUAL_BATCH,
        "Samples in a message and, but on the CPU, drawn at once; the result does not depend on it. auto = as"
        " many as have room in the device's memory (on the CPU 16)",
    )
    jobs: Job | None = field(
        None,
        "I/N: draw the I-th of N fixed ranges of the samples (I from 1), for array jobs: to one OUT, which the"
        " last of them completes, or to pipes and files that `cat` joins",
    )
    keep_path: Count = field(
        0,
        "Clean estimates to keep of each sample, of calls evenly spread over the way; `decode --animate` shows"
        " them",
    )

    @property
    def part(self) -> tuple[int, int]:
        """Which part of the samples to draw, from 1, and of how many."""
        part, _, count = (self.jobs or "1/1").partition("/")
        return int(part), int(count)
