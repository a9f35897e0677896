"""The checkpoint section: when the state of a run is written, and which of these states stay."""

from __future__ import annotations

from pydantic import Field

from megatron_lite.config.section import Section


class CheckpointConfig(Section):
    """When the state of a run is written, to dir/name/checkpoints, and which of these states stay."""

    interval: int = Field(default=500, ge=0, description="optimizer steps between checkpoints; 0: none on the way")
    keep_last: int = Field(default=2, ge=1, description="number of newest checkpoints that stay")
    keep_every: int | None = Field(
        default=None,
        ge=1,
        description="optimizer steps; checkpoints of multiples of it stay for good",
        json_schema_extra={"default": "none stays but the newest"},
    )
    asynchronous: bool = Field(
        default=True,
        description="whether a checkpoint is copied in memory and written while training goes on, for one copy of this "
        "rank's part of it in main memory; false: training waits for the disk",
    )
    save_last: bool = Field(
        default=True,
        description="whether the state after the last step is written, which holds the weights that the run is for; "
        "with interval=0 and save_last=false nothing is ever written",
    )
