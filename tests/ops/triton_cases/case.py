"""What tests/ops/triton_cases/<op>.py hands to the tests: the kernels of csrc/<op>/triton.py as they are compiled.

Such a module has

    compile_cases() -> Iterator[Case]  every kernel for fp32, bf16 and fp16, at the block sizes that it is launched with
    check_numbers() -> int             checks results (raises where one is wrong) in number_dtypes() on torch's default
                                       device; returns how many deliberately wrong results were caught
    NUM_CONTROLS: int                  what check_numbers has to return
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

POINTERS = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16"}  # what compile_cases goes through
ONES = ", integers 1"  # ends the name of a case that is compiled for them


def number_dtypes() -> tuple[torch.dtype, ...]:
    """fp32 and fp16, and bf16 on a GPU: the interpreter computes it wrongly."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.float32, torch.float16
    return torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One compilation of a kernel.

    `types` are those of its arguments as Triton spells them: '*bf16', 'i32', 'i64', 'fp32'; ':16' behind an integer
    ('i32:16') says that it is a multiple of 16, which Triton finds out at a launch. Pointers are taken to be multiples
    of 16 bytes. `types` may name arguments that this kernel lacks; an argument in neither `types` nor `constants`
    makes the compilation fail. With `sm` the case is compiled for that compute capability alone.

    A launch makes a constant of an integer that is 1, another compilation: the tests do that to one case of each
    kernel.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    sm: int | None = None

    def with_ones(self) -> Case | None:
        """The case as a launch compiles it whose integers, but for the multiples of 16, are all 1; None where Triton
        makes no constant of any."""
        integers = {name for name, kind in self.types.items() if kind in ("i32", "i64") and name not in self.constants}
        ones = {p.name: 1 for p in self.kernel.params if p.name in integers and not p.do_not_specialize}
        if not ones:
            return None
        return dataclasses.replace(self, name=self.name + ONES, constants={**self.constants, **ones})
