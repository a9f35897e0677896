"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from megatron_lite.config.schema import OptimConfig


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Learning rate of ``step``, counted from 1.

    Warm-up: ``lr * step / warmup_steps`` while ``step <= warmup_steps``. Then, by ``config.schedule``:
    constant; linear or cosine down to ``min_lr`` at the end of the decay; or wsd (warm-up, stable, decay), which holds
    ``lr`` and falls linearly to ``min_lr`` over the last ``decay_steps`` steps (Hu et al. 2024, MiniCPM, section 4).
    ``decay_steps`` is the step at which linear and cosine end.
    """
    if step < 1:
        raise ValueError(f"step {step}: steps count from 1")
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    low, high, decay_steps = config.min_lr, config.lr, config.decay_steps
    assert decay_steps is not None, "a RunConfig fills decay_steps in"
    if config.schedule == "constant":
        return high
    if config.schedule == "wsd":
        progress = (step - (num_steps - decay_steps)) / decay_steps
    else:
        progress = (step - config.warmup_steps) / max(1, decay_steps - config.warmup_steps)
    progress = min(max(progress, 0.0), 1.0)
    if config.schedule == "cosine":
        return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2
    return high + (low - high) * progress
