"""Run by test_cuda_kernels.py: `python -m tests.ops.cuda_cases.runner rms_norm 0` checks an op's emulated CUDA kernels.

Prints, as JSON, how many wrong results were caught, how many there were, a hash of all results of the kernels, and how
many launches each operator makes, of which each was refused once. The number is the order in which threads run. With
'cuda' in its place the package's own library runs, on the GPU, where nothing is refused.

An op brings tests/ops/cuda_cases/<op>.py with

    check_numbers() -> int  checks the raw operators torch.ops.megatron_lite_cuda.<op>(..., stream=0) in fp32, bf16 and
                            fp16 on tensors of torch's default device (raises where one is wrong); returns how many
                            deliberately wrong results were caught
    NUM_CONTROLS: int       what check_numbers has to return
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from megatron_lite.ops import native
from tests.ops.emulation import build


class Recorder(TorchDispatchMode):
    """Hashes what the operators of megatron_lite_cuda return: the bits may not depend on the order of threads.

    Before it calls an operator for the first time it calls it with what has to be refused.
    """

    def __init__(self, emulation: ctypes.CDLL | None) -> None:
        super().__init__()
        self.hash = hashlib.sha256()
        self.emulation = emulation
        self.launches: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.__name__
        if func.namespace == "megatron_lite_cuda" and self.emulation is not None and not self.launches.get(name):
            self.launches[name] = refuse_launches(self.emulation, func, args)  # 0 where there are no numbers
            if self.launches[name]:
                refuse_other_devices(func, args)
        result = func(*args, **(kwargs or {}))
        if func.namespace == "megatron_lite_cuda":
            for tensor in tree_flatten((result, args))[0]:  # the arguments too: some operators write to them
                if isinstance(tensor, torch.Tensor):
                    self.hash.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return result


def refuse_launches(emulation: ctypes.CDLL, func: Any, args: Sequence[Any]) -> int:
    """Calls `func` once for each of the kernels that it launches, whose launch fails; returns their number."""
    for number in itertools.count():
        emulation.ml_emulation_refuse(number)
        try:
            func(*tree_map_only(torch.Tensor, torch.clone, args))
        except RuntimeError as error:
            assert "on CUDA: invalid configuration" in str(error), error
        else:
            assert emulation.ml_emulation_refuse(-1) >= 0, f"{func} does not notice that launch {number} failed"
            return number
    raise AssertionError


def refuse_other_devices(func: Any, args: Sequence[Any]) -> None:
    """Hands `func` tensors of which one has no memory on its device, each in turn: what the dispatcher lets through."""
    here = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    places = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
    for place in places if len(places) > 1 else []:
        elsewhere = [arg.to("meta") if i == place else arg for i, arg in enumerate(args)]
        try:
            func.redispatch(here, *elsewhere)
        except RuntimeError as error:
            assert " takes " in str(error), f"{func}, argument {place}: {error}"
        else:
            raise AssertionError(f"{func} takes argument {place} on another device")


def main(op: str, order: str) -> None:
    emulation = None
    if order == "cuda":
        assert native.missing_cuda() is None, native.missing_cuda()
        torch.set_default_device("cuda")
    else:
        emulation = build.load()
        emulation.ml_emulation_order(int(order))
        torch.use_deterministic_algorithms(True)  # new tensors are NaN until they are written
    cases = importlib.import_module(f"tests.ops.cuda_cases.{op}")
    check: Callable[[], int] = cases.check_numbers
    with Recorder(emulation) as recorder:
        caught = check()
    print(json.dumps([caught, cases.NUM_CONTROLS, recorder.hash.hexdigest(), recorder.launches]))


if __name__ == "__main__":
    main(*sys.argv[1:])
