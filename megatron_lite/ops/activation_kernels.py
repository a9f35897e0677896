"""What SwiGLU and GELU share: the activations by number, and their operators, with fake and autograd registrations.

The operators are `megatron_lite::<op>_<backend>` and the same with `_backward`, where <op> is swiglu or gelu:

    forward   (input, form) -> out
    backward  (d_out, input, form) -> gradient of the input

The form is a string, which each op spells in its own way; the kernels take one of ACTIVATIONS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_lite.ops import native

ACTIVATIONS = ("silu", "gelu", "relu", "gelu_erf")
"""In the order of csrc/common/activation.h."""


def bare_cpu(name: str, activation: str, *tensors: Tensor) -> Tensor:
    """The kernel without the operator around it, for where native.runs_bare() holds."""
    return getattr(torch.ops.megatron_lite_cpu, name)(*tensors, ACTIVATIONS.index(activation))


def _cuda(name: str, activation: str, *tensors: Tensor) -> Tensor:
    return native.run_cuda(name, *tensors, ACTIVATIONS.index(activation))


def _triton(name: str, activation: str, *tensors: Tensor) -> Tensor:
    op = name.removesuffix("_backward")
    return native.run_triton(op, "forward" if op == name else "backward", *tensors, activation)


def register(
    op: str, parameters: str, activation_of: Mapping[str, str], fake_forward: Callable[[Tensor, str], Tensor]
) -> None:
    """Defines the operators of `op` for every backend.

    `parameters` are the input and the form as a schema has them ("Tensor x, str approximate"), `activation_of` has the
    activation of each form, and `fake_forward` makes a tensor of the result's shape.
    """

    def fake_backward(d_out: Tensor, x: Tensor, form: str) -> Tensor:
        return x.new_empty(x.shape)

    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.form = inputs[1]

    def define(backend: str, dispatch_key: str, run: Callable[..., Tensor]) -> None:
        name = f"{op}_{backend}"

        def forward(x: Tensor, form: str) -> Tensor:
            return run(op, activation_of[form], x)

        def backward(d_out: Tensor, x: Tensor, form: str) -> Tensor:
            return run(f"{op}_backward", activation_of[form], d_out, x)

        def gradient(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
            backward_operator = getattr(torch.ops.megatron_lite, f"{name}_backward")
            return backward_operator(d_out, *ctx.saved_tensors, ctx.form), None

        schema = f"{name}({parameters}) -> Tensor"
        native.define_operator(schema, dispatch_key, forward, fake_forward, gradient, setup_context)
        schema = f"{name}_backward(Tensor d_out, {parameters}) -> Tensor"
        native.define_operator(schema, dispatch_key, backward, fake_backward)

    define("cpu", "CPU", bare_cpu)
    define("cuda", "CUDA", _cuda)
    define("triton", "CUDA", _triton)
