"""Storages that are alive: what was made since a moment and is still held by somebody."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Sees every tensor that an operation returns while it is entered, that of a custom operator too.

    Unlike hooks on saved tensors it sees what is held by other means: by a closure, by an attribute of a context.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def num_bytes(self, *, without: Iterable[Tensor] = ()) -> int:
        """Of the storages that are still there, each once, those of ``without`` left out."""
        known = {tensor.untyped_storage()._cdata for tensor in without}
        return sum(size for key, (ref, size) in self._seen.items() if not ref.expired() and key not in known)


class Peak(Alive):
    """The most that was alive after any operation. without: tensors whose storages do not count."""

    def __init__(self, without: Iterable[Tensor]) -> None:
        super().__init__()
        self._without, self.most = list(without), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.most = max(self.most, self.num_bytes(without=self._without))
        return result
