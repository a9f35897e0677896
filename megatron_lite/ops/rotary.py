"""Rotary position embedding (arXiv:2104.09864, section 3.4.2) of queries and keys in one pass.

forward          (a, b) -> (a cos - b sin, b cos + a sin)   for the pairs (a, b) of a head
gradient of x    the same rotation by the opposite angle: the rotation is linear and orthogonal
cos and sin      take no gradient; they are all that is saved

Each kernel is an operator `megatron_lite::rotary_<backend>` with fake and autograd registrations, so torch.compile
takes it as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_lite.ops import checks, dispatch, native
from megatron_lite.ops.precision import wide_dtype
from megatron_lite.ops.split_projections import split_projections_reference

_Pair = tuple[Tensor, Tensor]


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> _Pair:
    """Rotates q[B, S, Hq, D] and k[B, S, Hk, D] by the angles of cos and sin, both [B or 1, S, R/2] with R <= D.

    Dimension i is paired with i + R/2 or, with `interleaved`, 2i with 2i + 1; the dimensions from R on are passed
    through. The angles are those of the tokens' positions, whatever these are. fp32, bf16 and fp16 with fp32 cos and
    sin, fp64 with fp64; the products are taken in the precision of cos and sin and rounded once. Returns (q, k)
    rotated, in their dtypes: new tensors or, with `inplace`, q and k themselves (dense heads, no expanded dimension,
    and no gradient asked for: `rotary_projections` is for that). `backend` is one of auto, reference, cpu, triton,
    cuda. Raises ValueError for other shapes and dtypes, for cos or sin that require a gradient, and for a backend that
    cannot run.
    """
    _check(q, k, cos, sin)
    choice = dispatch.select("rotary", backend, q.dtype, q.device.type)
    cos, sin = cos.contiguous(), sin.contiguous()
    if inplace:
        has_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
        checks.require(not has_gradient, "rotary", "inplace", True, "False where q or k has a gradient")
        for name, x in (("q", q), ("k", k)):
            _check_writable("rotary", name, x)
        if not torch.compiler.is_compiling():
            _into(choice.backend, q, k, cos, sin, interleaved, False, q, k)
            torch.autograd.graph.increment_version((q, k))
            return q, k
        rotated = rotary_reference(q, k, cos, sin, interleaved)
        return q.copy_(rotated[0]), k.copy_(rotated[1])
    if choice.backend != "reference":
        if choice.backend == "cpu" and native.runs_bare():
            return _rotated("cpu", q, k, cos, sin, interleaved, False)
        return getattr(torch.ops.megatron_lite, f"rotary_{choice.backend}")(q, k, cos, sin, interleaved, False)
    if torch.compiler.is_compiling():  # the compiler fuses the plain form, and chooses itself what to keep
        return rotary_reference(q, k, cos, sin, interleaved)
    return _Rotate.apply(q, k, cos, sin, interleaved)


def rotary_projections(
    qkv: Tensor,
    shapes: Sequence[tuple[int, ...]],
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`split_projections` of qkv[T, widths of q, k and v] to q, k and v of the given shapes, and `rotary` of q and k.

    The gradients are rotated back on their way into the one gradient of qkv. With `inplace` q and k are rotated where
    they lie in qkv, under autograd too: for a caller who does not look at qkv again. An operation that has saved qkv
    for its backward finds out there (autograd counts the versions); the projection that made it has not. Raises
    ValueError as `rotary` does.
    """
    _check_projections(qkv, shapes, inplace)
    parts = split_projections_reference(qkv, shapes)
    _check(parts[0], parts[1], cos, sin)
    if torch.compiler.is_compiling():
        q, k, v = parts
        return *rotary(q, k, cos, sin, interleaved, backend=backend), v
    choice = dispatch.select("rotary", backend, qkv.dtype, qkv.device.type)
    cos, sin = cos.contiguous(), sin.contiguous()
    if not torch.is_grad_enabled() or not qkv.requires_grad:
        return _rotated_parts(qkv, tuple(shapes), cos, sin, choice.backend, interleaved, inplace)
    return _RotateProjections.apply(qkv, tuple(shapes), cos, sin, choice.backend, interleaved, inplace)


def rotary_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> _Pair:
    """The specification of `rotary`, in plain torch."""
    return _rotate_reference(q, cos, sin, interleaved), _rotate_reference(k, cos, sin, interleaved)


def _rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    num_rotated = 2 * cos.shape[-1]
    turning = x[..., :num_rotated].to(cos.dtype)
    a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
    rotated = (a * cos - b * sin, b * cos + a * sin)
    whole = torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)
    return torch.cat((whole.to(x.dtype), x[..., num_rotated:]), dim=-1)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    checks.require_float("rotary", "q", q)
    for name, x in (("q", q), ("k", k)):
        is_alike = x.dim() == 4 and x.shape[:2] == q.shape[:2] and x.shape[-1] == q.shape[-1]
        checks.require(is_alike, "rotary", name, x, "[B, S, heads, D], with B, S and D the same in q and k")
    checks.require_alike("rotary", "q", q, k=k)
    wide = wide_dtype(q.dtype)
    for name, angles in (("cos", cos), ("sin", sin)):
        batch, tokens, _, dim = q.shape
        fits = angles.dim() == 3 and angles.shape[0] in (1, batch) and angles.shape[1] == tokens
        fits = fits and angles.shape == cos.shape and 2 * angles.shape[2] <= dim
        takes = f"[B or 1, S, R/2] = [{batch} or 1, {tokens}, at most {dim // 2}], the same for cos and sin"
        checks.require(fits, "rotary", name, angles, takes)
        checks.require(angles.dtype == wide, "rotary", name, angles, checks.short(wide))
        if torch.is_grad_enabled() and angles.requires_grad:
            got = f"{checks.described(angles)} and requires a gradient"
            raise ValueError(f"rotary: {name} is {got}, which it would not get; it takes angles without one: detach it")
    checks.require_device("rotary", "q", q, cos=cos, sin=sin)


def _check_projections(qkv: Tensor, shapes: Sequence[tuple[int, ...]], inplace: bool) -> None:
    op = "rotary_projections"
    checks.require(
        len(shapes) == 3 and all(len(shape) == 4 for shape in shapes), op, "shapes", shapes, "three of [B, S, heads, D]"
    )
    width = sum(heads * dim for _, _, heads, dim in shapes)
    fits = qkv.dim() == 2 and qkv.shape[1] == width and all(b * s == qkv.shape[0] for b, s, _, _ in shapes)
    checks.require(fits, op, "qkv", qkv, f"[T, W] with T = B * S and W = {width}, of the shapes {list(shapes)}")
    if inplace:
        _check_writable(op, "qkv", qkv)


def _check_writable(op: str, argument: str, x: Tensor) -> None:
    is_whole = x.numel() == 0 or (0 not in x.stride() and x.stride(-1) == 1)
    checks.require(is_whole, op, argument, x, "dense heads and no expanded dimension, to be written in place")


def _into(
    backend: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool, *outputs: Tensor
) -> None:
    """Writes q and k, rotated, into the two `outputs`, which have dense heads and any other strides."""
    if backend == "reference":
        for out, rotated in zip(
            outputs, rotary_reference(q, k, cos, -sin if inverse else sin, interleaved), strict=True
        ):
            out.copy_(rotated)
        return
    if q.numel() + k.numel() == 0:
        return  # the strides of an empty tensor are anything
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    arguments = (q, k, cos, sin, interleaved, inverse, *outputs)
    if backend == "cpu":
        torch.ops.megatron_lite_cpu.rotary(*arguments)
    elif backend == "triton":
        native.run_triton("rotary", "rotate", *arguments)
    else:
        native.run_cuda("rotary", *arguments)


def _rotated(backend: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> _Pair:
    outputs = _new(q), _new(k)
    _into(backend, q, k, cos, sin, interleaved, inverse, *outputs)
    return outputs


def _new(like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """A contiguous tensor of `shape` or that of `like`, in huge pages where that pays."""
    out = like.new_empty(like.shape if shape is None else shape)
    if out.device.type == "cpu" and native.missing_cpu() is None:
        torch.ops.megatron_lite_cpu.use_huge_pages(out)
    return out


class _Rotate(torch.autograd.Function):
    """The reference with the backward written out, so that only cos and sin are kept between the two."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> _Pair:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return rotary_reference(q, k, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        dq, dk = grads
        return *rotary_reference(dq, dk, cos, -sin, ctx.interleaved), None, None, None


def _rotated_parts(
    qkv: Tensor,
    shapes: tuple[tuple[int, ...], ...],
    cos: Tensor,
    sin: Tensor,
    backend: str,
    interleaved: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = split_projections_reference(qkv, shapes)
    q_out, k_out = (q, k) if inplace else (_new(q), _new(k))
    _into(backend, q, k, cos, sin, interleaved, False, q_out, k_out)
    if inplace:
        torch.autograd.graph.increment_version(qkv)
    return q_out, k_out, v


class _RotateProjections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        shapes: tuple[tuple[int, ...], ...],
        cos: Tensor,
        sin: Tensor,
        backend: str,
        interleaved: bool,
        inplace: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.shapes, ctx.input_shape, ctx.backend, ctx.interleaved = shapes, qkv.shape, backend, interleaved
        return _rotated_parts(qkv, shapes, cos, sin, backend, interleaved, inplace)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        whole = _new(grads[0], ctx.input_shape)
        dq, dk, dv = split_projections_reference(whole, ctx.shapes)
        _into(ctx.backend, grads[0], grads[1], cos, sin, ctx.interleaved, True, dq, dk)
        dv.copy_(grads[2])
        return whole, *(None,) * 6


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> _Pair:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _register(backend: str, dispatch_key: str) -> None:
    """Defines the operator rotary_<backend>."""
    name = f"rotary_{backend}"

    def kernel(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> _Pair:
        return _rotated(backend, q, k, cos, sin, interleaved, inverse)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Pair) -> None:
        ctx.save_for_backward(inputs[2], inputs[3])
        ctx.interleaved, ctx.inverse = inputs[4], inputs[5]

    def gradient(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        operator = getattr(torch.ops.megatron_lite, name)
        return *operator(dq, dk, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse), None, None, None, None

    schema = f"{name}(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> (Tensor, Tensor)"
    native.define_operator(schema, dispatch_key, kernel, _fake, gradient, setup_context)


_register("cpu", "CPU")
_register("cuda", "CUDA")
_register("triton", "CUDA")
