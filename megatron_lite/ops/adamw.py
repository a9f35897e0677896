"""AdamW over flat memory, in place and in one pass (Loshchilov and Hutter 2019, algorithm 2).

At step t, with g = factor * gradient, the moments m and v corrected for their start at zero:

    m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
    w = w - lr weight_decay w - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

The corrections are computed once, in float64, and folded into the step size and eps: with c = sqrt(1 - beta2^t) the
last term is (lr c / (1 - beta1^t)) m / (sqrt(v) + c eps). Each operation on an element rounds once, in the order that
csrc/adamw/update.h gives, so an element's bits depend on that element alone, and the kernels and the reference agree
in every bit. PyTorch's and apex's kernels round at other places.

The kernels are operators `megatron_lite::adamw_<backend>`; they change their arguments, so they have no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torchs_adamw

from megatron_lite.ops import dispatch, native
from megatron_lite.ops.checks import FLOATS, require, require_apart, require_float, require_number

Slices = Sequence[tuple[int, int]]
_GRADIENT_FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})
_APEX_CHUNK = 2048 * 32  # elements that a block of apex's kernel takes: what apex itself passes


@dataclass(frozen=True)
class AdamWStep:
    """What one update is told. step: its number, from 1. factor: what gradients are multiplied by first (clipping, and
    one over the loss scale); 1 changes no bit."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    factor: float = 1.0

    def coefficients(self) -> tuple[float, ...]:
        """factor, mean_weight, square_keep, square_weight, step_size, eps, decay: what the kernels are given."""
        root = math.sqrt(1 - self.beta2**self.step)
        step_size = self.lr * root / (1 - self.beta1**self.step)
        decay = self.lr * self.weight_decay
        mean_weight = 1 - self.beta1 if self.beta1 > 0.5 else -self.beta1
        return (self.factor, mean_weight, self.beta2, 1 - self.beta2, step_size, self.eps * root, decay)


def adamw(
    weights: Tensor,
    first: Tensor,
    second: Tensor,
    gradients: Tensor,
    step: AdamWStep,
    *,
    undecayed: Slices = (),
    parameters: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Updates ``weights``, ``first`` and ``second`` in place, and fills ``parameters`` with the rounded weights.

    weights, first, second: ``[n]``, contiguous, fp32 (any float dtype with the torch and reference backends).
    gradients: ``[n]``, in the dtype of the weights, fp32, bf16 or fp16; they are not changed. parameters: None, or
    contiguous ``[n]`` in any float dtype. undecayed: elements ``[start, stop)`` without weight decay, in order. No two
    of the tensors share memory.

    Raises ValueError for anything else, and for a backend that cannot run.
    """
    _check_step(step)
    _check(weights, first, second, gradients, undecayed, parameters)
    choice = dispatch.select("adamw", backend, weights.dtype, weights.device.type).backend
    in_fp64 = any(t is not None and t.dtype == torch.float64 for t in (gradients, parameters))
    if choice in _OPERATORS and weights.dtype == torch.float32 and in_fp64:
        require(backend == "auto", "adamw", "gradients or parameters", torch.float64, f"up to fp32 with {choice}")
        choice = "reference"
    if choice in _OPERATORS:
        flat = [position for pair in undecayed for position in pair]
        operator = getattr(torch.ops.megatron_lite, f"adamw_{choice}")
        operator(weights, first, second, gradients.contiguous(), parameters, flat, *step.coefficients())
    else:
        _IN_PYTHON[choice](weights, first, second, gradients, step, undecayed, parameters)
        if not torch.compiler.is_compiling():  # which PyTorch's kernel and apex's do not do
            torch.autograd.graph.increment_version((weights, first, second))


def _check_step(step: AdamWStep) -> None:
    """All but the factor: an overflow makes it NaN, which is to show in the weights."""
    is_count = isinstance(step.step, int) and not isinstance(step.step, bool) and step.step >= 1
    require(is_count, "adamw", "step.step", step.step, "the number of the update, 1 or more")
    for name, high in (("beta1", 1), ("beta2", 1), ("lr", math.inf), ("eps", math.inf), ("weight_decay", math.inf)):
        require_number("adamw", f"step.{name}", getattr(step, name), 0, high)


def _check(
    weights: Tensor, first: Tensor, second: Tensor, gradients: Tensor, undecayed: Slices, parameters: Tensor | None
) -> None:
    op, size = "adamw", weights.numel()
    require(weights.dim() == 1, op, "weights", weights, "flat memory, [n]")
    written = {"weights": weights, "first": first, "second": second}
    alike = {weights.dtype}
    dtypes = {"first": alike, "second": alike, "gradients": alike | _GRADIENT_FLOATS}
    for name, tensor in (*written.items(), ("gradients", gradients), ("parameters", parameters)):
        if tensor is not None:
            require_float(op, name, tensor, dtypes.get(name, FLOATS))
            require(tensor.shape == (size,), op, name, tensor, f"[n] like weights = [{size}]")
            require(name == "gradients" or tensor.is_contiguous(), op, name, tensor, "contiguous memory, to write to")
            require(tensor.device == weights.device, op, name, tensor, f"the device of weights, {weights.device}")
    if not native.is_traced():
        require_apart(op, **written, gradients=gradients, parameters=parameters)
    takes = f"pairs of whole numbers [start, stop) in order, up to n = {size}"
    require(isinstance(undecayed, Sequence) and all(map(_is_pair, undecayed)), op, "undecayed", undecayed, takes)
    positions = [0, *(position for pair in undecayed for position in pair), size]
    require(positions == sorted(positions), op, "undecayed", undecayed, takes)


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(number, int) for number in value)


def adamw_reference(
    weights: Tensor,
    first: Tensor,
    second: Tensor,
    gradients: Tensor,
    step: AdamWStep,
    undecayed: Slices = (),
    parameters: Tensor | None = None,
) -> None:
    """The specification of `adamw`, in plain torch, in the dtype of the weights."""
    factor, mean_weight, square_keep, square_weight, step_size, eps, decay = step.coefficients()
    g = gradients.to(weights.dtype) * factor
    first.copy_((first if mean_weight > 0 else g) + mean_weight * (g - first))
    second.copy_(square_keep * second + square_weight * (g * g))
    decayed = weights - decay * weights
    for start, stop in undecayed:
        decayed[start:stop] = weights[start:stop]
    root = second.double().sqrt().to(weights.dtype)  # PyTorch's root in fp32 is not always rounded right
    weights.copy_(decayed - (step_size * first) / (root + eps))
    if parameters is not None:
        parameters.copy_(weights)


def runs(size: int, undecayed: Slices) -> list[tuple[slice, bool]]:
    """The memory cut into slices that decay and slices that do not, in order; none is empty."""
    cut, at = [], 0
    for start, stop in undecayed:
        cut += [(slice(at, start), True), (slice(start, stop), False)]
        at = stop
    cut.append((slice(at, size), True))
    return [(where, decays) for where, decays in cut if where.start < where.stop]


def _torch(
    weights: Tensor,
    first: Tensor,
    second: Tensor,
    gradients: Tensor,
    step: AdamWStep,
    undecayed: Slices,
    parameters: Tensor | None,
) -> None:
    """PyTorch's fused AdamW. The factor and the parameters take a pass each."""
    gradients = _scaled(gradients, weights.dtype, step.factor)
    for where, decays in runs(weights.numel(), undecayed):
        torchs_adamw(
            [weights[where]],
            [gradients[where]],
            [first[where]],
            [second[where]],
            [],
            [torch.tensor(step.step - 1.0, dtype=torch.float32, device=weights.device)],  # it counts this step itself
            fused=True,
            amsgrad=False,
            beta1=step.beta1,
            beta2=step.beta2,
            lr=step.lr,
            weight_decay=step.weight_decay if decays else 0.0,
            eps=step.eps,
            maximize=False,
        )
    if parameters is not None:
        parameters.copy_(weights)


def _apex(
    weights: Tensor,
    first: Tensor,
    second: Tensor,
    gradients: Tensor,
    step: AdamWStep,
    undecayed: Slices,
    parameters: Tensor | None,
) -> None:
    """apex.optimizers.FusedAdam's kernel. The factor and the parameters take a pass each."""
    import amp_C

    gradients = _scaled(gradients, weights.dtype, step.factor)
    overflow = torch.zeros(1, dtype=torch.int32, device=weights.device)  # set by a scaler that found one: never here
    for decays in (True, False):
        slices = [where for where, run_decays in runs(weights.numel(), undecayed) if run_decays is decays]
        if not slices:
            continue
        amp_C.multi_tensor_adam(
            _APEX_CHUNK,
            overflow,
            [[tensor[where] for where in slices] for tensor in (gradients, weights, first, second)],
            step.lr,
            step.beta1,
            step.beta2,
            step.eps,
            step.step,
            1,  # decoupled decay: AdamW
            1,  # with bias corrections
            step.weight_decay if decays else 0.0,
        )
    if parameters is not None:
        parameters.copy_(weights)


def _scaled(gradients: Tensor, dtype: torch.dtype, factor: float) -> Tensor:
    gradients = gradients.to(dtype)
    return gradients if factor == 1.0 else gradients * factor


_IN_PYTHON = {"torch": _torch, "apex": _apex, "reference": adamw_reference}


def _cpu(weights: Tensor, *arguments: object) -> None:
    torch.ops.megatron_lite_cpu.adamw(weights, *arguments)


def _cuda(weights: Tensor, *arguments: object) -> None:
    native.run_cuda("adamw", weights, *arguments)


def _triton(
    weights: Tensor,
    first: Tensor,
    second: Tensor,
    gradients: Tensor,
    parameters: Tensor | None,
    undecayed: Sequence[int],
    *coefficients: float,
) -> None:
    slices = list(zip(undecayed[::2], undecayed[1::2], strict=True))
    for where, decays in runs(weights.numel(), slices):
        memory = (weights[where], first[where], second[where], gradients[where])
        rounded = None if parameters is None else parameters[where]
        decay = coefficients[-1] if decays else 0.0
        native.run_triton("adamw", "update", *memory, rounded, *coefficients[:-1], decay)


_OPERATORS: dict[str, tuple[str, Callable[..., None]]] = {
    "cpu": ("CPU", _cpu),
    "cuda": ("CUDA", _cuda),
    "triton": ("CUDA", _triton),
}

for _name, (_key, _kernel) in _OPERATORS.items():
    native.define_in_place_operator(
        f"adamw_{_name}(Tensor(a!) weights, Tensor(b!) first, Tensor(c!) second, Tensor gradients, "
        "Tensor(d!)? parameters, int[] undecayed, float factor, float mean_weight, float square_keep, "
        "float square_weight, float step_size, float eps, float decay) -> ()",
        _key,
        _kernel,
    )
