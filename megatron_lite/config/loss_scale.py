"""The loss_scale section: how fp16 keeps small gradients above zero."""

from __future__ import annotations

from pydantic import Field

from megatron_lite.config.section import Section

# Gradients are divided by the scale in fp32, so that it and its reciprocal have to be numbers that fp32 has.
LARGEST_SCALE = 2.0**100


class LossScaleConfig(Section):
    """Dynamic loss scaling (Micikevicius et al. 2018, section 3.2), with train.precision=fp16 alone."""

    initial: float = Field(default=2.0**16, gt=0, le=LARGEST_SCALE, description="factor on the loss in the first step")
    growth_interval: int = Field(
        default=1000, ge=1, description="steps without an overflow after which the scale doubles"
    )
    backoff: float = Field(default=0.5, gt=0, lt=1, description="what an overflow multiplies the scale by")
    hysteresis: int = Field(default=2, ge=1, description="overflows since the last growth that it takes to back off")
    minimum: float = Field(default=1.0, ge=1 / LARGEST_SCALE, description="smallest scale")
    max_skips: int = Field(default=50, ge=1, description="most skipped steps in a row; one more ends the run")
