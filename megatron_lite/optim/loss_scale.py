"""Dynamic loss scaling (Micikevicius et al. 2018, section 3.2): keeps gradients within what fp16 can hold.

The loss is multiplied by the scale before backward, and gradients are divided by it in the optimizer's step. A scale
that is too high makes some gradient infinite: that step is skipped, and after some of them the scale is lowered. Steps
without an overflow raise it again, so that it stays near the largest that works.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_lite.config.loss_scale import LARGEST_SCALE, LossScaleConfig

_GROWTH = 2.0


@dataclass
class LossScale:
    """The scale, and what decides when it changes. Every rank has one, is told the same, and so holds the same.

    value: the factor on the loss of the next step. good_steps: steps without an overflow since the scale last grew or
    a step overflowed. overflows: since the scale last grew. skips_in_a_row: steps skipped just now, one after another.
    skipped_steps: of the whole run.
    """

    config: LossScaleConfig
    value: float
    good_steps: int = 0
    overflows: int = 0
    skips_in_a_row: int = 0
    skipped_steps: int = 0

    @classmethod
    def first(cls, config: LossScaleConfig) -> LossScale:
        """The scale of the first step."""
        return cls(config, config.initial)

    @property
    def is_hopeless(self) -> bool:
        """Whether more steps in a row have been skipped than the config allows."""
        return self.skips_in_a_row > self.config.max_skips

    def update(self, overflowed: bool) -> None:
        """Takes note of a step: the scale of the next one."""
        if overflowed:
            self.skipped_steps += 1
            self.skips_in_a_row += 1
            self.overflows += 1
            self.good_steps = 0
            if self.overflows >= self.config.hysteresis:
                self.value = max(self.value * self.config.backoff, self.config.minimum)
            return
        self.skips_in_a_row = 0
        self.good_steps += 1
        if self.good_steps == self.config.growth_interval:
            self.good_steps = self.overflows = 0
            self.value = min(self.value * _GROWTH, LARGEST_SCALE)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps, as JSON."""
        return {name: getattr(self, name) for name in _STATE}

    def restore(self, state: Mapping[str, float]) -> None:
        """Goes on from ``state()``. Raises KeyError where a part of it is missing."""
        for name in _STATE:
            setattr(self, name, state[name])


_STATE = tuple(field.name for field in dataclasses.fields(LossScale) if field.name != "config")
