"""What a run says of itself as it starts."""

from __future__ import annotations

from pathlib import Path

from megatron_lite.config.schema import RunConfig
from megatron_lite.train.build import Training


def start_line(training: Training, device: str, gathered: str, folder: Path) -> str:
    """Model, precision, layout, length and what of the optimizer and of ZeRO is not as it usually is.

    device: its name. gathered: in words, as `megatron_lite.train.memory.gathering` has it. folder: of the results.
    """
    config, mesh = training.config, training.mesh
    up_to = "up to " if config.train.batch_rampup is not None else ""
    offload = f"offloaded: {config.offload.in_words}" if config.offload.in_words else ""
    parts = [
        f"{config.model.family}, {training.table.num_parameters / 1e6:,.1f} M weights, {config.train.precision}"
        + ("" if config.optim.name == "adamw" else f", {config.optim.name}"),
        f"{mesh.layout} on {device}",
        *filter(None, [zero_in_words(config, gathered), offload]),
        f"{config.train.num_steps} steps of {up_to}{config.tokens_per_step:,} tokens",
        f"results in {folder}",
    ]
    return "; ".join(parts)


def zero_in_words(config: RunConfig, gathered: str) -> str:
    """``ZeRO 3 in groups of 4, parameters kept for the step``; empty where there is nobody to share slices with."""
    if config.dp == 1:
        return ""
    parallel = config.parallel
    group = f" in groups of {parallel.zero_group}" if parallel.zero_group not in (None, config.dp) else ""
    return f"ZeRO {parallel.zero_stage}{group}" + (f", {gathered}" if gathered else "")
