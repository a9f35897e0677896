"""megatron-lite launch"""

from __future__ import annotations

from megatron_lite.cli.launch.command import launch

__all__ = ["launch"]
