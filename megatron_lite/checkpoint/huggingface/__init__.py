"""Hugging Face checkpoints of the Llama, Mistral, Qwen2 and GPT-2 families, in and out."""

from __future__ import annotations

from megatron_lite.checkpoint.huggingface.config import config_from_hf, config_to_hf, read_model
from megatron_lite.checkpoint.huggingface.differences import check_matches
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
    "read_model",
]
