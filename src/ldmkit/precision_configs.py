"""How precisely networks are run that learn nothing any more. Imports no torch."""

from typing import Literal

from ldmkit.fields import Config, field

Precision = Literal["auto", "fp32", "bf16"]


class InferencePrecisionConfig(Config):
    """For commands whose networks are run without gradients."""

    precision: Precision = field(
        "auto",
        "bf16 computes networks in bfloat16, all else in float32; auto = where the hardware is fast at it and"
        " pictures have 8 bits",
    )
