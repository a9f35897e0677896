"""A DeepSpeed config as overrides of a run's keys, and a line for each of its keys: what became of it, and why.

What DeepSpeed's keys mean, and which it refuses, is that of DeepSpeed 0.19.6: runtime/config.py, runtime/engine.py,
runtime/zero/config.py, runtime/zero/offload_config.py, runtime/precision_config.py and runtime/lr_schedules.py.
"""

from __future__ import annotations

from megatron_lite.config.deepspeed.read import Reading, RefusedError, read_deepspeed
from megatron_lite.config.deepspeed.translation import Line, Ours, Status, Translation

__all__ = ["Line", "Ours", "Reading", "RefusedError", "Status", "Translation", "read_deepspeed"]
