"""One public function per kernel. Each op lives in the file of its name, beside its reference."""

from __future__ import annotations

from megatron_lite.ops.attention import attention
from megatron_lite.ops.gelu import gelu
from megatron_lite.ops.layer_norm import add_layer_norm, layer_norm
from megatron_lite.ops.rms_norm import add_rms_norm, rms_norm
from megatron_lite.ops.rotary import rotary
from megatron_lite.ops.swiglu import swiglu

__all__ = ["add_layer_norm", "add_rms_norm", "attention", "gelu", "layer_norm", "rms_norm", "rotary", "swiglu"]
