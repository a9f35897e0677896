"""Buckets of one process, for tests that need no engine around them."""

from __future__ import annotations

from typing import Any

import torch

from megatron_lite.zero.bucket import Bucket, MemoryPlan
from megatron_lite.zero.partition import BucketLayout


def memory_plan(dtype: torch.dtype = torch.float64, dp: tuple[int, int] = (1, 0), **fields: Any) -> MemoryPlan:
    """That of rank ``dp[1]`` of ``dp[0]``; master weights and gradients of bf16 in fp32."""
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    defaults = {
        "stage": 1,
        "num_shards": dp[0],
        "shard_index": dp[1],
        "share_index": dp[1],
        "param_dtype": dtype,
        "master_dtype": wide,
        "grad_dtype": wide,
    }
    return MemoryPlan(**(defaults | fields))


def bucket_of(layout: BucketLayout, plan: MemoryPlan, shared_with: Bucket | None = None) -> Bucket:
    return Bucket(layout, plan, device=torch.device("cpu"), shared_with=shared_with)
