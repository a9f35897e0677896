"""A tiny model on the flat bucket that training has, run over microbatches, with its backward whole or split."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_lite.config.schema import ModelConfig
from megatron_lite.models.recompute import Recompute
from megatron_lite.models.transformer import Transformer
from megatron_lite.ops.linear import WeightGradients, defer_weight_gradients
from megatron_lite.zero.bucket import Bucket
from megatron_lite.zero.gradients import STEP
from megatron_lite.zero.partition import lay_out
from tests.models.tiny import filled, token_ids
from tests.zero.buckets import bucket_of, memory_plan

MICROBATCHES = 3
WHOLE = tuple(f"B{m}" for m in range(MICROBATCHES))
SPLIT = ("I0", "I1", "W0", "I2", "W1", "W2")  # weight halves come late, two microbatches at a time are owed
BATCH, LENGTH = 2, 12
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [1] * 3])


def on_bucket(model: nn.Module) -> Bucket:
    """Puts the gradients into flat fp32 memory (or fp64, as the model): bf16 gradients come there by a hook."""
    values = dict(model.named_parameters())
    dtype = next(iter(values.values())).dtype
    layout = lay_out("all", [(name, tuple(p.shape)) for name, p in values.items()], 1)
    bucket = bucket_of(layout, memory_plan(dtype))
    bucket.fill(lambda name: values[name].detach())
    for name, parameter in bucket.parameters.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, parameter)
    bucket.gradients.reset()
    return bucket


def forward(model: Transformer, m: int, is_packed: bool = True) -> Tensor:
    tokens, targets = token_ids(BATCH, LENGTH, seed=2 * m), token_ids(BATCH, LENGTH, seed=2 * m + 1)
    like = next(model.parameters())
    sequences = model.sequences(BATCH, LENGTH, None, DOCUMENTS if is_packed else None, like)
    output: Tensor = model(tokens, sequences, targets)
    return output


def gradients(
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    recompute: Recompute | None = None,
    order: Iterable[str] = WHOLE,
    is_packed: bool = True,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """Those of a whole model in one process, see `gradients_of`."""
    model = filled(config, dtype, backend)
    model.recompute = recompute or Recompute()
    return gradients_of(model, order, is_packed)


def gradients_of(model: Transformer, order: Iterable[str], is_packed: bool = True) -> dict[str, Tensor]:
    """The sums over three microbatches. ``order``: B a whole backward, I and W its halves, and the microbatch."""
    bucket, store = on_bucket(model), WeightGradients()
    defer_weight_gradients(model, store)
    losses = {m: forward(model, m, is_packed) for m in range(MICROBATCHES)}
    for instruction in order:
        half, m = instruction[0], int(instruction[1:])
        if half == "B":
            losses.pop(m).backward()
        elif half == "I":
            with store.collecting(m):
                losses.pop(m).backward()
        else:
            store.run(m)
    total = bucket.gradients.take(STEP)
    slots = ((slot.name, slot.interval) for slot in bucket.layout.slots)
    return {name: total[where.start : where.stop].clone() for name, where in slots}


def differing(own: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of the parameters whose gradients differ in a bit; each must have a gradient to compare."""
    assert own.keys() == expected.keys() and all(value.any() for value in expected.values())
    return [name for name in expected if not torch.equal(own[name], expected[name])]


class Allocations(TorchDispatchMode):
    """Remembers all memory that operators return while it is entered, and says which of it is alive."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._seen[storage._cdata] = (weakref.ref(storage), storage.nbytes())
        return result

    def alive(self, besides: Iterable[Tensor] = ()) -> int:
        """Bytes."""
        known = {tensor.untyped_storage()._cdata for tensor in besides}
        return sum(size for key, (ref, size) in self._seen.items() if key not in known and ref() is not None)


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of each storage that is saved for backward while this is entered, parameters aside, by its address."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor.detach())
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes
