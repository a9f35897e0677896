"""Models that are refused, for test_errors.py: (overrides, world size, key, one fix that is offered)."""

from __future__ import annotations

BROKEN_MODELS: list[tuple[str, int | None, str, str]] = [
    ("parallel.tp=8 model.ffn_hidden_size=100", None, "model.ffn_hidden_size", "model.ffn_hidden_size=104"),
    ("model.hidden_size=60", None, "model.hidden_size", "model.hidden_size=64"),
    ("model.hidden_size=72", None, "model.head_dim", "model.head_dim=8"),
    ("model.head_dim=7", None, "model.head_dim", "model.head_dim=8"),
    ("model.num_kv_heads=3", None, "model.num_kv_heads", "model.num_kv_heads=4"),
    ("model.num_kv_heads=16", None, "model.num_kv_heads", "model.num_kv_heads=8"),
    ("model.family=gpt2", None, "model.num_kv_heads", "model.num_kv_heads=8"),
    ("model.family=gpt2 model.num_kv_heads=8 model.head_dim=16", None, "model.head_dim", "model.head_dim=8"),
    ("model.family=gpt2 model.num_kv_heads=8 model.hidden_size=60", None, "model.hidden_size", "model.hidden_size=56"),
    (
        "model.family=gpt2 model.num_kv_heads=8 model.rope_scaling.type=linear model.rope_scaling.factor=2",
        None,
        "model.rope_scaling",
        "model.rope_scaling=null",
    ),
    ("model.activation=gelu", None, "model.activation", "model.activation=swiglu"),
    (
        "model.family=gpt2 model.num_kv_heads=8 model.activation=reglu",
        None,
        "model.activation",
        "model.activation=gelu",
    ),
    (
        "model.rope_scaling.type=yarn model.rope_scaling.factor=2 model.rope_scaling.beta_slow=40",
        None,
        "model.rope_scaling.beta_slow",
        "model.rope_scaling.beta_slow=1.0",
    ),
    (
        "model.rope_scaling.type=ntk model.rope_scaling.factor=2 model.rope_theta=1.0",
        None,
        "model.rope_theta",
        "model.rope_theta=10000.0",
    ),
    (
        "model.rope_scaling.type=llama3 model.rope_scaling.factor=2 model.rope_scaling.low_freq_factor=8",
        None,
        "model.rope_scaling.low_freq_factor",
        "model.rope_scaling.low_freq_factor=1.0",
    ),
    ("model.sliding_window=0", None, "model.sliding_window", "model.sliding_window=1"),
    ("model.sliding_window=8", None, "model.sliding_window", "model.sliding_window=null"),
    ("model.sliding_window=8", None, "model.sliding_window", "model.family=mistral"),
    (
        "model.family=mistral model.sliding_window=8 model.sliding_window_from=1",
        None,
        "model.sliding_window_from",
        "model.sliding_window_from=0",
    ),
    (
        "model.family=qwen2 model.sliding_window_from=1",
        None,
        "model.sliding_window_from",
        "model.sliding_window_from=0",
    ),
    (
        "model.family=qwen2 model.sliding_window=8 model.sliding_window_from=4",
        None,
        "model.sliding_window_from",
        "model.sliding_window_from=3",
    ),
]
