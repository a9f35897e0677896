"""Checks of what a user hands to an op. Each raises ValueError that names the op, the argument, what it got and what it
takes."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
FLOATS = frozenset(_SHORT)


def short(dtype: torch.dtype) -> str:
    """'bf16' for torch.bfloat16, 'int64' for torch.int64."""
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))


def described(value: object) -> str:
    """'[2, 8] fp16 on cpu' for a tensor, its repr for anything else."""
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {short(value.dtype)} on {value.device}"
    return repr(value)


def require(condition: bool, op: str, argument: str, got: object, takes: str) -> None:
    """Raises '<op>: <argument> is <got>; it takes <takes>' unless `condition` holds. `got` may be a tensor."""
    if not condition:
        raise ValueError(f"{op}: {argument} is {described(got)}; it takes {takes}")


def is_number(value: object) -> bool:
    """A finite number that a kernel can be given: no text, truth value or tensor, and no integer beyond the floats."""
    if isinstance(value, bool) or not isinstance(value, float | numbers.Real):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def require_number(op: str, argument: str, value: object, low: float, high: float) -> None:
    """A finite number from `low` to below `high`, which may be infinity."""
    takes = f"a finite number, {low} or more" if high == math.inf else f"a number from {low} to below {high}"
    require(is_number(value) and low <= value < high, op, argument, value, takes)  # type: ignore[operator]


def require_dense(op: str, argument: str, tensor: Tensor) -> None:
    """Not a sparse tensor, nor one of another layout that has no strides. All checks of tensors below begin with it."""
    if tensor.layout != torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        raise ValueError(f"{op}: {argument} is {described(tensor)}, {layout}; it takes a dense tensor")


def require_float(op: str, argument: str, tensor: Tensor, dtypes: Collection[torch.dtype] = FLOATS) -> None:
    require_dense(op, argument, tensor)
    if tensor.dtype not in dtypes:
        takes = " or ".join(sorted(short(dtype) for dtype in dtypes))
        raise ValueError(f"{op}: {argument} is {described(tensor)}; it takes {takes}")


def require_shape(op: str, argument: str, tensor: Tensor, shape: tuple[int, ...], names: str) -> None:
    """`names` says what the shape is made of, '[D]' or '[B, S, H, D]'."""
    require_dense(op, argument, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{op}: {argument} is {described(tensor)}; it takes {names} = {list(shape)}")


def require_alike(op: str, first: str, one: Tensor, **others: Tensor | None) -> None:
    """All of `others` have the dtype and device of `one`, the argument named `first`; None is passed over."""
    for argument, tensor in _dense(op, others):
        if tensor.dtype != one.dtype or tensor.device != one.device:
            takes = f"the dtype and device of {first}, {short(one.dtype)} on {one.device}"
            raise ValueError(f"{op}: {argument} is {described(tensor)}; it takes {takes}")


def require_device(op: str, first: str, one: Tensor, **others: Tensor | None) -> None:
    """All of `others` lie on the device of `one`; None is passed over."""
    for argument, tensor in _dense(op, others):
        if tensor.device != one.device:
            takes = f"the device of {first}, {one.device}"
            raise ValueError(f"{op}: {argument} is {described(tensor)}; it takes {takes}")


def require_apart(op: str, **tensors: Tensor | None) -> None:
    """No two of `tensors`, which have numbers to look at, share memory; None is passed over."""
    spans = []
    for argument, tensor in _dense(op, tensors):
        if tensor.numel() > 0 and tensor.device.type != "meta":
            reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            begin = tensor.data_ptr()
            spans.append((begin, begin + reach * tensor.element_size(), argument, tensor))
    spans.sort(key=lambda span: span[:2])
    for (_, end, one, _), (begin, _, other, tensor) in itertools.pairwise(spans):
        require(end <= begin, op, other, tensor, f"memory apart from that of {one}")


def _dense(op: str, tensors: Mapping[str, Tensor | None]) -> Iterator[tuple[str, Tensor]]:
    for argument, tensor in tensors.items():
        if tensor is not None:
            require_dense(op, argument, tensor)
            yield argument, tensor
