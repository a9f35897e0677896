"""What RMSNorm and LayerNorm share: their operators, with fake and autograd registrations, and the checks of arguments.

The operators are `megatron_lite::[add_]<norm>_<backend>` and the same with `_backward`, where <norm> is rms_norm or
layer_norm. With `add_` they take a residual behind x and return x + residual before y. Only LayerNorm has a bias, and
the mean among its numbers of a row:

    forward   (x, [residual], weight, [bias], eps) -> ([sum], y, [mean], rstd)
    backward  (dy, [dsum], input, weight, [mean], rstd) -> (dx, dweight, [dbias])    input: x, or the sum

dx is the gradient of x and of the residual; dsum, the gradient of the sum, is added to it in fp32.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_lite.ops import checks, native

APEX = "apex.normalization.fused_layer_norm"


def check(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float) -> None:
    """Raises ValueError unless the arguments of a norm over the last dimension fit each other."""
    checks.require_float(op, "x", x)
    checks.require(x.dim() >= 1 and x.shape[-1] > 0, op, "x", x, "[..., D] with D > 0")
    checks.require_number(op, "eps", eps, 0, math.inf)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        is_right = parameter.shape == x.shape[-1:] and parameter.dtype in (x.dtype, torch.float32)
        takes = f"[D] = [{x.shape[-1]}] in x's dtype or fp32"
        checks.require(is_right, op, name, parameter, takes)
        checks.require_device(op, "x", x, **{name: parameter})
    checks.require_alike(op, "weight", weight, bias=bias)
    if residual is not None:
        checks.require_shape(op, "residual", residual, tuple(x.shape), "the shape of x")
        checks.require_alike(op, "x", x, residual=residual)


def apex_function(norm: str, x: Tensor, weight: Tensor) -> Callable[..., Tensor]:
    """apex's function of (x, weight, [bias], shape, eps). The mixed one returns the weight's dtype."""
    name = f"fused_{norm}_affine" if x.dtype == weight.dtype else f"mixed_dtype_fused_{norm}_affine"
    return getattr(importlib.import_module(APEX), name)


def bare_cpu(name: str, *arguments: Any) -> tuple[Tensor, ...]:
    """The kernel without the operator around it, for where native.runs_bare() holds."""
    return getattr(torch.ops.megatron_lite_cpu, name)(*arguments)


def _triton(name: str, *arguments: Any) -> tuple[Tensor, ...]:
    return native.run_triton("layer_norm" if "layer_norm" in name else "rms_norm", name, *arguments)


def register(norm: str, adds: bool) -> None:
    """Defines the operators of `norm` (rms_norm or layer_norm), with an addition or without, for every backend."""
    parameters, statistics = (["weight"], ["rstd"]) if norm == "rms_norm" else (["weight", "bias"], ["mean", "rstd"])
    name = f"add_{norm}" if adds else norm
    inputs, results = (["x", "residual"], ["sum", "y"]) if adds else (["x"], ["y"])
    upward = ["dy", "dsum", "sum"] if adds else ["dy", "x"]

    def fake_forward(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
        rows = x.shape[:-1].numel()
        rowwise = [x.new_empty(rows, dtype=torch.float32) for _ in statistics]
        return (*(x.new_empty(x.shape) for _ in results), *rowwise)

    def fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
        x, weight = arguments[len(upward) - 1 : len(upward) + 1]
        return (x.new_empty(x.shape), *(weight.new_empty(weight.shape) for _ in parameters))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(output[0] if adds else inputs[0], inputs[2 if adds else 1], *output[len(results) :])
        ctx.mark_non_differentiable(*output[len(results) :])

    def define(backend: str, dispatch_key: str, run: Callable[..., tuple[Tensor, ...]]) -> None:
        def gradient(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
            d_results = reversed(d_outputs[: len(results)])  # dy, then dsum
            backward = getattr(torch.ops.megatron_lite, f"{name}_{backend}_backward")
            dx, *d_parameters = backward(*d_results, *ctx.saved_tensors)
            return (*(dx for _ in inputs), *d_parameters, None)

        schema = f"{name}_{backend}({_tensors(inputs + parameters)}, float eps) -> ({_tensors(results + statistics)})"
        forward_kernel = _named(run, name)
        native.define_operator(schema, dispatch_key, forward_kernel, fake_forward, gradient, setup_context)
        gradients = _tensors(["dx", *(f"d{parameter}" for parameter in parameters)])
        schema = f"{name}_{backend}_backward({_tensors([*upward, 'weight', *statistics])}) -> ({gradients})"
        native.define_operator(schema, dispatch_key, _named(run, f"{name}_backward"), fake_backward)

    define("cpu", "CPU", bare_cpu)
    define("cuda", "CUDA", native.run_cuda)
    define("triton", "CUDA", _triton)


def _named(run: Callable[..., tuple[Tensor, ...]], name: str) -> Callable[..., tuple[Tensor, ...]]:
    def kernel(*arguments: Any) -> tuple[Tensor, ...]:
        return run(name, *arguments)

    return kernel


def _tensors(names: list[str]) -> str:
    return ", ".join(f"Tensor {name}" for name in names)
