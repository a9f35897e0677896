"""The FLOPs of a model against torch's own count of what a forward and backward pass executes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_lite.config.schema import KernelsConfig, ModelConfig
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.topology import Layout
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.models.flops import model_flops_per_token
from megatron_lite.models.transformer import Transformer
from megatron_lite.train import utilisation
from megatron_lite.train.utilisation import Peak, find_peak

BATCH, SEQ_LEN = 2, 16
SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_seq_len": 32}
MODELS = {
    "llama": {"family": "llama", "num_kv_heads": 2},
    "tied": {"family": "llama", "tie_embeddings": True, "head_dim": 16},
    "qwen2": {"family": "qwen2", "num_kv_heads": 2},
    "gpt2": {"family": "gpt2"},
}


def executed_flops(model: ModelConfig) -> int:
    torch.manual_seed(0)
    transformer = Transformer(model, KernelsConfig(attention="reference"))
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    tokens = torch.randint(0, model.vocab_size, (BATCH, SEQ_LEN))
    sequences = transformer.sequences(BATCH, SEQ_LEN, None, None, torch.empty(()))
    with FlopCounterMode(display=False) as counter:
        transformer(tokens, sequences, tokens).backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    """The reference attention also computes what the causal mask then hides: seq_len instead of (seq_len + 1) / 2."""
    model = ModelConfig(**{**SIZES, **MODELS[name]})
    masked = 6 * model.num_layers * model.num_heads * model.head_dim * (2 * SEQ_LEN - (SEQ_LEN + 1))
    expected = (model_flops_per_token(model, SEQ_LEN) + masked) * BATCH * SEQ_LEN
    assert executed_flops(model) == expected
    wider = model.model_copy(update={"ffn_hidden_size": model.ffn_hidden_size + 1})
    assert model_flops_per_token(wider, SEQ_LEN) > model_flops_per_token(model, SEQ_LEN), "it counts the model's sizes"


@pytest.mark.parametrize("window", [1, 5, SEQ_LEN, SEQ_LEN + 1])
def test_a_layer_with_a_sliding_window_needs_what_its_tokens_see(window: int) -> None:
    whole = ModelConfig(**{**SIZES, "family": "qwen2"})
    model = whole.model_copy(update={"sliding_window": window, "sliding_window_from": 1})
    hidden = sum(max(0, seen - window) for seen in range(1, SEQ_LEN + 1)) / SEQ_LEN  # of one of the two layers
    saved = model_flops_per_token(whole, SEQ_LEN) - model_flops_per_token(model, SEQ_LEN)
    assert saved == 12 * model.num_heads * model.head_dim * hidden


def measure() -> Peak:
    mesh = build_mesh(Layout(dp=torch.distributed.get_world_size()), device=torch.device("cpu"))
    return find_peak(mesh, torch.float32)


def test_a_cpu_without_products_in_fp16_has_the_peak_of_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run in fp16 would use several times what there is."""
    speeds = {torch.float16: 1e9, torch.float32: 1e11, torch.bfloat16: 2e9}
    monkeypatch.setattr(utilisation, "_measure", lambda mesh, dtype: speeds[dtype])
    monkeypatch.setattr(utilisation.collectives, "all_reduce", lambda tensor, axis, op="sum": tensor)
    mesh: Any = SimpleNamespace(device=torch.device("cpu"), world=None)
    assert find_peak(mesh, torch.float16) == Peak("CPU", "float32", "measured matmul", 1e11)
    speeds[torch.float16] = 4e11
    assert find_peak(mesh, torch.float16) == Peak("CPU", "float16", "measured matmul", 4e11)
    assert find_peak(mesh, torch.bfloat16) == Peak("CPU", "bfloat16", "measured matmul", 2e9)


def test_the_peak_is_of_all_ranks_together(pool: WorkerPool) -> None:
    peaks = pool.run(measure, 2)
    assert peaks[0] == peaks[1], "a rank has measured for itself alone"
    assert peaks[0].source == "measured matmul"
    assert 1e8 < peaks[0].total_flops_per_s < 1e14
