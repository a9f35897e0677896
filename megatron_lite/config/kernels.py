"""The `kernels` section: which implementation of an operation runs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_lite.config.section import Section

_Own = Literal["auto", "reference", "cpu", "triton", "cuda"]
_OwnOrApex = Literal["auto", "reference", "cpu", "triton", "cuda", "apex"]


class KernelsConfig(Section):
    """Which implementation of an operation runs. One that is asked for by name and cannot run is an error.

    auto is the fastest, as measured, that runs on the device in the dtype; `megatron-lite doctor` says which it is.
    """

    rms_norm: _OwnOrApex = Field(default="auto", description="implementation of RMSNorm, alone and after an addition")
    layer_norm: Literal["auto", "reference", "cpu", "triton", "cuda", "torch", "apex"] = Field(
        default="auto", description="implementation of LayerNorm, the same way; torch: PyTorch's kernel"
    )
    rotary: _Own = Field(default="auto", description="implementation of the rotary embedding")
    swiglu: _Own = Field(default="auto", description="implementation of the gated activations: SwiGLU and its like")
    gelu: Literal["auto", "reference", "cpu", "triton", "cuda", "torch"] = Field(
        default="auto", description="implementation of GELU; torch: PyTorch's kernel"
    )
    attention: Literal["auto", "reference", "cpu", "triton", "cuda", "sdpa"] = Field(
        default="auto", description="implementation of attention; sdpa: the fused attention of PyTorch"
    )
    cross_entropy: _Own = Field(default="auto", description="implementation of softmax and loss over the vocabulary")
    adamw: Literal["auto", "reference", "cpu", "triton", "cuda", "torch", "apex"] = Field(
        default="auto", description="implementation of the optimizer's update; torch: the fused AdamW of PyTorch"
    )
