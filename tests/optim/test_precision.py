from __future__ import annotations

import pytest
import torch

from megatron_lite.config.schema import TrainConfig
from megatron_lite.optim.precision import precision_of

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# keys; compute, master, gradients, moments
CASES: list[tuple[dict[str, object], tuple[torch.dtype, ...]]] = [
    ({}, (FP32, FP32, FP32, FP32)),
    ({"precision": "bf16"}, (BF16, FP32, FP32, FP32)),
    ({"precision": "fp16"}, (FP16, FP32, FP32, FP32)),
    ({"precision": "fp64"}, (FP64, FP64, FP64, FP64)),
    ({"precision": "fp16", "grad_dtype": "param"}, (FP16, FP32, FP16, FP32)),
    ({"precision": "fp64", "grad_dtype": "param"}, (FP64, FP64, FP64, FP64)),
    ({"precision": "bf16", "stochastic_rounding": True}, (BF16, BF16, FP32, FP32)),
    ({"precision": "bf16", "stochastic_rounding": True, "grad_dtype": "param"}, (BF16, BF16, BF16, FP32)),
]


@pytest.mark.parametrize(("keys", "expected"), CASES)
def test_which_dtype_holds_what(keys: dict[str, object], expected: tuple[torch.dtype, ...]) -> None:
    train = TrainConfig.model_validate({"seq_len": 8, "global_batch_size": 1, "num_steps": 1, **keys})
    found = precision_of(train)
    assert (found.compute, found.master, found.gradients, found.moments) == expected
    assert found.rounds_stochastically is bool(keys.get("stochastic_rounding", False))
