"""Checks of what a user hands to an op. Each raises ValueError that names the op, the argument, what it got and what it
takes."""

from __future__ import annotations

from collections.abc import Collection

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


def require_float(op: str, argument: str, tensor: Tensor, dtypes: Collection[torch.dtype] = FLOATS) -> None:
    if tensor.dtype not in dtypes:
        takes = " or ".join(sorted(short(dtype) for dtype in dtypes))
        raise ValueError(f"{op}: {argument} is {described(tensor)}; it takes {takes}")


def require_shape(op: str, argument: str, tensor: Tensor, shape: tuple[int, ...], names: str) -> None:
    """`names` says what the shape is made of, '[D]' or '[B, S, H, D]'."""
    if tensor.shape != shape:
        raise ValueError(f"{op}: {argument} is {described(tensor)}; it takes {names} = {list(shape)}")


def require_alike(op: str, first: str, one: Tensor, **others: Tensor | None) -> None:
    """All of `others` have the dtype and device of `one`, the argument named `first`; None is passed over."""
    for argument, tensor in others.items():
        if tensor is not None and (tensor.dtype != one.dtype or tensor.device != one.device):
            takes = f"the dtype and device of {first}, {short(one.dtype)} on {one.device}"
            raise ValueError(f"{op}: {argument} is {described(tensor)}; it takes {takes}")


def require_device(op: str, first: str, one: Tensor, **others: Tensor | None) -> None:
    """All of `others` lie on the device of `one`; None is passed over."""
    for argument, tensor in others.items():
        if tensor is not None and tensor.device != one.device:
            takes = f"the device of {first}, {one.device}"
            raise ValueError(f"{op}: {argument} is {described(tensor)}; it takes {takes}")
