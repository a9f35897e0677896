"""megatron-lite doctor"""

from __future__ import annotations

from megatron_lite.cli.doctor.command import doctor

__all__ = ["doctor"]
