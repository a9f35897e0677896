"""Megatron Lite: 3D-parallel training of transformers, with the proof that every layout computes the same thing."""

from __future__ import annotations

__version__ = "0.1.0"
