"""How much the forwards of a step keep for its backwards, measured as it happens."""

from __future__ import annotations

import contextlib
import json
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_lite.distributed import collectives
from megatron_lite.planner.amounts import Amount
from megatron_lite.train.build import Training
from megatron_lite.train.folder import run_folder
from megatron_lite.utils import run_files


class _Saved:
    """What autograd keeps in place of a tensor; when it goes, the tensor is no longer kept."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class SavedTensors:
    """Bytes of the storages that autograd keeps, each once, and the most so far. without: storages that do not count.

    The head keeps its own gradients, of which autograd knows nothing: ``hold`` is told of them.
    """

    def __init__(self, without: Iterator[Tensor]) -> None:
        self._without = {tensor.untyped_storage()._cdata for tensor in without}
        self._uses = Counter[int]()
        self.num_bytes = self.most = 0

    def pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        self.hold(saved, tensor)
        return saved

    @staticmethod
    def unpack(saved: _Saved) -> Tensor:
        return saved.tensor

    def hold(self, owner: object, *tensors: Tensor) -> None:
        """Counts the tensors for as long as the owner is there."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._without:
                continue
            self.num_bytes += size if self._uses[key] == 0 else 0
            self._uses[key] += 1
            weakref.finalize(owner, self._release, key, size).atexit = False
        self.most = max(self.most, self.num_bytes)

    def _release(self, key: int, size: int) -> None:
        self._uses[key] -= 1
        self.num_bytes -= size if self._uses[key] == 0 else 0

    def after_head(self, _module: Any, _inputs: Any, loss: Tensor) -> None:
        """A forward hook of the head."""
        gradients = getattr(loss.grad_fn, "gradients", None)
        if gradients is not None:
            self.hold(gradients, gradients.x, gradients.weight)


@contextlib.contextmanager
def saved_tensors_measured(training: Training, number: int) -> Iterator[None]:
    """Around a step: in the first one the activations are measured, and written beside their prediction.

    number: of the step, counted from the start or the resume of the run. Every rank enters it. What only a closure of
    recomputation keeps (positions, the rotary table) is not seen; the token ids that the embedding keeps are. An
    account that cannot be written is no reason to end a run: a line says so.
    """
    if number != 1:
        yield
        return
    meter = SavedTensors(parameter for _, parameter in training.named_parameters())
    heads = [chunk.head for chunk in training.chunks.values() if chunk.head is not None]
    hooks = [head.register_forward_hook(meter.after_head) for head in heads]
    try:
        with saved_tensors_hooks(meter.pack, meter.unpack):
            yield
    finally:
        for hook in hooks:
            hook.remove()
    mesh = training.mesh
    sizes = torch.zeros(mesh.pp.size, dtype=torch.int64, device=mesh.device)
    sizes[mesh.pp.index] = meter.most
    stages = collectives.all_reduce(sizes, mesh.world, "max").tolist()
    if mesh.world.is_first:
        _write(training, stages)


def _write(training: Training, stages: list[int]) -> None:
    path = run_folder(training.config) / run_files.UTILISATION
    try:
        account = json.loads(path.read_text(encoding="utf-8"))
        for measured, num_bytes in zip(account["memory"]["measured"], stages, strict=True):
            measured["activations"] = vars(Amount(num_bytes))
        path.write_text(json.dumps(account, indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"the measured activations are not written: {error}", file=sys.stderr, flush=True)
