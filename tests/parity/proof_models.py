"""The models of the parity tests: small, and each with something that a layout can get wrong."""

from __future__ import annotations

from megatron_lite.config import RunConfig, load_config
from megatron_lite.verify.shrink import shrink

_COMMON = (
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "model.max_seq_len=32",
    "train.seq_len=16",
    "train.global_batch_size=8",
    "train.num_steps=4",
    "optim.lr=1e-3",
    "optim.warmup_steps=2",
)
_LLAMA = ("model.family=llama", "model.num_heads=8")
_GPT2 = ("model.family=gpt2", "model.num_heads=8")

# 1009 is prime: no tp divides it. 5 layers divide by no number of stages.
MODELS = {
    "llama-2kv": (*_LLAMA, "model.num_kv_heads=2", "model.num_layers=4", "model.vocab_size=97"),
    "llama-1kv-tied-1009": (
        *_LLAMA,
        "model.num_kv_heads=1",
        "model.num_layers=5",
        "model.vocab_size=1009",
        "model.tie_embeddings=true",
    ),
    "llama-documents": (
        *_LLAMA,
        "model.num_kv_heads=4",
        "model.num_layers=5",
        "model.vocab_size=128",
        "data.isolate_documents=true",
    ),
    # A window shorter than the sequence, on all layers; fewer key-value heads than tp=4.
    "mistral-2kv": (
        "model.family=mistral",
        "model.num_heads=8",
        "model.num_kv_heads=2",
        "model.num_layers=4",
        "model.vocab_size=97",
        "model.sliding_window=6",
    ),
    # Biases of key-value heads that ranks hold more than once; a window on the last layers, in isolated documents.
    "qwen2-1kv-documents": (
        "model.family=qwen2",
        "model.num_heads=8",
        "model.num_kv_heads=1",
        "model.num_layers=5",
        "model.vocab_size=128",
        "model.sliding_window=3",
        "model.sliding_window_from=2",
        "data.isolate_documents=true",
    ),
    "gpt2-tied": (*_GPT2, "model.num_layers=4", "model.vocab_size=1009"),
    "gpt2-untied": (*_GPT2, "model.num_layers=5", "model.vocab_size=97", "model.tie_embeddings=false"),
}


def proof_config(model: str, dtype: str) -> RunConfig:
    return shrink(load_config(None, [*_COMMON, *MODELS[model]]), dtype)
