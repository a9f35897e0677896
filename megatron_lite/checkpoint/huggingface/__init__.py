"""Hugging Face checkpoints of the Llama and GPT-2 families, in and out."""

from __future__ import annotations

from megatron_lite.checkpoint.huggingface.config import check_matches, config_from_hf, config_to_hf
from megatron_lite.checkpoint.huggingface.export import export_huggingface
from megatron_lite.checkpoint.huggingface.names import huggingface_parts
from megatron_lite.checkpoint.huggingface.reader import huggingface_weights

__all__ = [
    "check_matches",
    "config_from_hf",
    "config_to_hf",
    "export_huggingface",
    "huggingface_parts",
    "huggingface_weights",
]
