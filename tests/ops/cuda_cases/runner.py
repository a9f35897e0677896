"""Run by test_cuda_kernels.py: `python -m tests.ops.cuda_cases.runner rms_norm 0` checks an op's emulated CUDA kernels.

Prints, as JSON, how many wrong results were caught, how many there were, and a hash of all results of the kernels. The
number is the order in which threads run. With 'cuda' in its place the package's own library runs, on the GPU.

An op brings tests/ops/cuda_cases/<op>.py with

    check_numbers() -> int  checks the raw operators torch.ops.megatron_lite_cuda.<op>(..., stream=0) in fp32, bf16 and
                            fp16 on tensors of torch's default device (raises where one is wrong); returns how many
                            deliberately wrong results were caught
    NUM_CONTROLS: int       what check_numbers has to return
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from megatron_lite.ops import native
from tests.ops.emulation import build


class Recorder(TorchDispatchMode):
    """Hashes what the operators of megatron_lite_cuda return: the bits may not depend on the order of threads."""

    def __init__(self) -> None:
        super().__init__()
        self.hash = hashlib.sha256()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "megatron_lite_cuda":
            for tensor in tree_flatten((result, args))[0]:  # the arguments too: some operators write to them
                if isinstance(tensor, torch.Tensor):
                    self.hash.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return result


def main(op: str, order: str) -> None:
    if order == "cuda":
        assert native.missing_cuda() is None, native.missing_cuda()
        torch.set_default_device("cuda")
    else:
        build.load().ml_emulation_order(int(order))
        torch.use_deterministic_algorithms(True)  # new tensors are NaN until they are written
    cases = importlib.import_module(f"tests.ops.cuda_cases.{op}")
    check: Callable[[], int] = cases.check_numbers
    with Recorder() as recorder:
        caught = check()
    print(json.dumps([caught, cases.NUM_CONTROLS, recorder.hash.hexdigest()]))


if __name__ == "__main__":
    main(*sys.argv[1:])
