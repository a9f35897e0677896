"""The scale as a function of which steps overflowed."""

from __future__ import annotations

import json

import pytest

from megatron_lite.config.loss_scale import LARGEST_SCALE, LossScaleConfig
from megatron_lite.optim.loss_scale import LossScale

GOOD, OVERFLOW = False, True


def scales(config: LossScaleConfig, steps: list[bool]) -> list[float]:
    """The scale of each step, and of the one after the last."""
    scale, values = LossScale.first(config), []
    for overflowed in steps:
        values.append(scale.value)
        scale.update(overflowed)
    return [*values, scale.value]


def test_it_grows_after_so_many_good_steps_in_a_row() -> None:
    config = LossScaleConfig(initial=8, growth_interval=3)
    assert scales(config, [GOOD] * 7) == [8, 8, 8, 16, 16, 16, 32, 32]
    assert scales(config, [GOOD, GOOD, OVERFLOW, GOOD, GOOD, GOOD]) == [8] * 6 + [16], "an overflow begins anew"


def test_it_backs_off_after_as_many_overflows_as_hysteresis_says() -> None:
    config = LossScaleConfig(initial=64, growth_interval=3, hysteresis=2)
    assert scales(config, [OVERFLOW, OVERFLOW, OVERFLOW]) == [64, 64, 32, 16], "the first one alone is let pass"
    assert scales(config, [OVERFLOW, GOOD, OVERFLOW]) == [64, 64, 64, 32], "good steps between them change nothing"
    grown = [OVERFLOW, GOOD, GOOD, GOOD, OVERFLOW, OVERFLOW]
    assert scales(config, grown) == [64, 64, 64, 64, 128, 128, 64], "growth forgets overflows"
    assert scales(LossScaleConfig(initial=64, hysteresis=1, backoff=0.25), [OVERFLOW]) == [64, 16]


def test_it_stays_within_its_bounds() -> None:
    low = LossScaleConfig(initial=3, minimum=2, hysteresis=1)
    assert scales(low, [OVERFLOW] * 3) == [3, 2, 2, 2]
    high = LossScaleConfig(initial=LARGEST_SCALE / 2, growth_interval=1)
    assert scales(high, [GOOD] * 3) == [LARGEST_SCALE / 2, *[LARGEST_SCALE] * 3]


def test_skipped_steps_are_counted_and_a_row_of_them_has_an_end() -> None:
    scale = LossScale.first(LossScaleConfig(max_skips=2))
    hopeless = []
    for overflowed in (OVERFLOW, OVERFLOW, GOOD, OVERFLOW, OVERFLOW, OVERFLOW):
        scale.update(overflowed)
        hopeless.append(scale.is_hopeless)
    assert hopeless == [False] * 5 + [True]
    assert (scale.skipped_steps, scale.skips_in_a_row) == (5, 3)


@pytest.mark.parametrize("at", range(8))
def test_a_scale_that_is_kept_goes_on_as_if_nothing_had_been(at: int) -> None:
    config = LossScaleConfig(initial=256, growth_interval=3, hysteresis=2)
    steps = [GOOD, OVERFLOW, GOOD, GOOD, GOOD, OVERFLOW, OVERFLOW, GOOD]
    whole, before = LossScale.first(config), LossScale.first(config)
    for overflowed in steps:
        whole.update(overflowed)
    for overflowed in steps[:at]:
        before.update(overflowed)
    after = LossScale.first(config)
    after.restore(json.loads(json.dumps(before.state())))
    for overflowed in steps[at:]:
        after.update(overflowed)
    assert after.state() == whole.state()
    assert before.state() != whole.state(), "negative control: the steps after matter"
