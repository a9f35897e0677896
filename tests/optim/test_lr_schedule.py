from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from megatron_lite.config.schema import OptimConfig, default_decay_steps
from megatron_lite.optim.lr_schedule import learning_rate

N = 100


def config(schedule: str, **changes: Any) -> OptimConfig:
    decay_steps = default_decay_steps(schedule, N)
    settings = {"schedule": schedule, "lr": 3e-4, "min_lr": 2e-5, "warmup_steps": 7, "decay_steps": decay_steps}
    return OptimConfig.model_validate({**settings, **changes})


def rates(optim: OptimConfig, num_steps: int = N) -> list[float]:
    """Of steps 1 .. num_steps."""
    return [learning_rate(optim, step, num_steps) for step in range(1, num_steps + 1)]


of_every_schedule = pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])


@of_every_schedule
@pytest.mark.parametrize("warmup", [1, 3, 7, 33])
def test_warm_up_is_a_line_from_step_one(schedule: str, warmup: int) -> None:
    """Exactly lr * t / warmup_steps; counted from 0 the first step would do nothing."""
    optim = config(schedule, warmup_steps=warmup)
    assert rates(optim)[:warmup] == [3e-4 * t / warmup for t in range(1, warmup + 1)]
    assert rates(optim)[warmup - 1] == 3e-4


@of_every_schedule
def test_after_warm_up_the_rate_never_rises_and_stays_in_bounds(schedule: str) -> None:
    for warmup in (0, 7):
        after = rates(config(schedule, warmup_steps=warmup))[max(warmup - 1, 0) :]
        ulp = 3e-4 * 2**-52  # a line from high to low rounds at its ends
        assert all(one >= other for one, other in itertools.pairwise(after))
        assert all(2e-5 - ulp <= rate <= 3e-4 + ulp for rate in after)


@of_every_schedule
def test_the_last_step_has_the_lowest_rate_and_it_stays_there(schedule: str) -> None:
    expected = 3e-4 if schedule == "constant" else 2e-5
    for step in (N, N + 1, 2 * N):
        assert learning_rate(config(schedule), step, N) == pytest.approx(expected, rel=1e-14)


def test_shapes() -> None:
    """Against formulas of their own, over all steps after warm-up."""
    share = [(t - 7) / (N - 7) for t in range(8, N + 1)]
    cosine = [2e-5 + (3e-4 - 2e-5) * 0.5 * (1 + math.cos(math.pi * s)) for s in share]
    linear = [3e-4 - (3e-4 - 2e-5) * s for s in share]
    wsd = [3e-4 if t <= 80 else 3e-4 - (3e-4 - 2e-5) * (t - 80) / 20 for t in range(8, N + 1)]
    for schedule, expected in {"cosine": cosine, "linear": linear, "constant": [3e-4] * 93, "wsd": wsd}.items():
        assert rates(config(schedule))[7:] == pytest.approx(expected, rel=1e-12)
    # Negative control: the decay begun at step 0, or over one step less, is far from this.
    late = [3e-4 - (3e-4 - 2e-5) * (t / N) for t in range(8, N + 1)]
    assert rates(config("linear"))[7:] != pytest.approx(late, rel=1e-3)
    assert rates(config("linear", decay_steps=N - 1))[7:] != pytest.approx(linear, rel=1e-3)


def test_wsd_falls_only_in_the_last_steps() -> None:
    found = rates(config("wsd", decay_steps=10))
    assert found[7:90] == [3e-4] * 83
    assert found[90] < 3e-4 and found[89] == 3e-4


def test_a_decay_may_end_before_the_run() -> None:
    for schedule in ("cosine", "linear"):
        found = rates(config(schedule, decay_steps=50))
        assert found[48] > found[49] == pytest.approx(2e-5, rel=1e-14)
        assert len(set(found[49:])) == 1


def test_degenerate_lengths() -> None:
    """Warm-up that is the whole run, decay that begins where it ends, a single step."""
    assert rates(config("cosine", warmup_steps=N, decay_steps=N))[-1] == 3e-4
    assert learning_rate(config("linear", warmup_steps=5, decay_steps=5), 6, N) == pytest.approx(2e-5, rel=1e-14)
    assert learning_rate(config("wsd", warmup_steps=0, decay_steps=1), 1, 1) == pytest.approx(2e-5, rel=1e-14)
    assert learning_rate(config("cosine", warmup_steps=0, decay_steps=1), 1, 1) == 2e-5


@pytest.mark.parametrize("step", [0, -3])
def test_steps_count_from_one(step: int) -> None:
    with pytest.raises(ValueError, match=f"step {step}: steps count from 1"):
        learning_rate(config("cosine"), step, N)
