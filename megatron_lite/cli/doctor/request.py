"""What the doctor is asked for. Crosses to ranks by pickle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_lite.config.cluster import ClusterConfig
    from megatron_lite.config.schema import RunConfig


@dataclass(frozen=True)
class Request:
    """devices: those whose kernels are shown. cluster, layout: as the user wrote them; empty for none."""

    devices: Sequence[str]
    config: Path | None
    overrides: Sequence[str]
    verbose: bool
    as_json: bool = False
    cluster: str = ""
    layout: str = ""
    timeout_s: float = 60.0

    def load_config(self, world_size: int | None = None) -> RunConfig | None:
        """Raises ConfigError."""
        from megatron_lite.config import load_config

        return None if self.config is None else load_config(self.config, self.overrides, world_size=world_size)

    def load_cluster(self) -> ClusterConfig | None:
        """Raises ConfigError."""
        from megatron_lite.config.cluster import load_cluster

        return load_cluster(self.cluster) if self.cluster else None
