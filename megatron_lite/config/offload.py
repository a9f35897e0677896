"""The offload section: what leaves the device between its uses."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_lite.config.section import Section

Place = Literal["none", "cpu", "nvme"]
_IN_WORDS: dict[Place, str] = {"none": "on the device", "cpu": "in main memory", "nvme": "in files"}


class OffloadConfig(Section):
    """What leaves the device between its uses. It changes no bit of a result."""

    optimizer: Place = Field(
        default="none",
        description="where moments and master weights are kept, and the optimizer's step is computed: none: on the "
        "device; cpu: main memory, by the CPU; nvme: files in dir, read ahead and written behind",
    )
    gradients: Place = Field(
        default="none", description="where the slices of gradients wait for the step; needs parallel.zero_stage >= 2"
    )
    parameters: Place = Field(
        default="none", description="where the slices of parameters wait for their use; needs parallel.zero_stage = 3"
    )
    dir: str | None = Field(
        default=None, min_length=1, description="folder for the files of nvme, on a disk of each machine's own"
    )

    @property
    def in_words(self) -> str:
        """``optimizer in files, gradients in main memory``; empty where nothing leaves the device."""
        places = {"optimizer": self.optimizer, "gradients": self.gradients, "parameters": self.parameters}
        return ", ".join(f"{what} {_IN_WORDS[place]}" for what, place in places.items() if place != "none")
