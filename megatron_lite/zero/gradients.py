"""Where autograd's gradients of a bucket's parameters go: flat memory, of the whole step or of one microbatch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lite.ops.accumulate import accumulate
from megatron_lite.zero.partition import BucketLayout

STEP = -1  # in the place of a microbatch's number: the sum over all of them


class Gradients:
    """This rank's whole gradients of a bucket, before they are summed over ranks.

    dtype: of the sums. Where it is the parameters' own, autograd adds to the flat memory in place; else a hook does.
    A buffer is there from ``open`` to ``take``; a kept one stays, and ``reset`` makes it zero.

    on_complete: called, inside a backward, when the last of the parameters has its gradient: the ``num_expected``-th.
    """

    def __init__(
        self,
        layout: BucketLayout,
        parameters: Mapping[str, nn.Parameter],
        dtype: torch.dtype,
        device: torch.device,
        *,
        is_kept: bool,
    ) -> None:
        self._layout, self._parameters, self._dtype, self._device = layout, parameters, dtype, device
        self._slots = {slot.name: slot for slot in layout.slots}
        self._is_kept = is_kept
        self._buffers: dict[int, Tensor] = {}
        # Of each buffer, the parameters of which nothing has been copied into it; for those that a hook adds up.
        self._missing: dict[int, set[str]] = {}
        self._open: int | None = None
        self._num_arrived, self.num_expected = 0, len(parameters)
        self.on_complete: Callable[[], None] = lambda: None
        self._copies = {name for name, parameter in parameters.items() if parameter.dtype != dtype}
        # Python cannot see through a tensor to the hooks on it: by a strong reference nothing here would ever be free.
        arrived = weakref.WeakMethod(self._arrived)
        for name, parameter in parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(_call, arrived, name))
        if is_kept:
            self.open(STEP)

    @property
    def kept(self) -> Tensor:
        """The buffer that stays."""
        return self._buffers[STEP]

    def reset(self) -> None:
        """Makes the kept buffer zero, and forgets others."""
        if not self._is_kept:
            self.close()
            self._buffers.clear()
            return
        if len(self._copies) < len(self._parameters):
            self.kept.zero_()
        self._missing[STEP] = set(self._copies)

    def open(self, key: int) -> None:
        """From now on gradients are added to the buffer of ``key``: a microbatch's number, or STEP."""
        if self._open == key:
            return
        if key not in self._buffers:
            self._buffers[key] = self._new_buffer()
            self._missing[key] = set(self._copies)
        self._open = key
        for slot in self._layout.slots:
            if slot.name not in self._copies:
                self._parameters[slot.name].grad = self._view(key, slot.name)

    def close(self) -> None:
        """Until the next ``open`` no gradient may come."""
        if self._is_kept:
            return
        self._open = None
        for parameter in self._parameters.values():
            parameter.grad = None

    def expect(self) -> None:
        """A backward begins: counts from zero how many parameters have their gradient."""
        self._num_arrived = 0

    def take(self, key: int) -> Tensor:
        """The finished buffer, ``[size]``; it is not held any longer, unless it is kept."""
        if key not in self._buffers:
            self.open(key)
        buffer = self._buffers[key]
        for name in self._missing[key]:
            self._view(key, name).zero_()
        self._missing[key] = set()
        if not self._is_kept:
            if self._open == key:
                self.close()
            del self._buffers[key], self._missing[key]
        return buffer

    @property
    def held(self) -> list[int]:
        """Keys of the buffers that are there and have not been taken."""
        return list(self._buffers)

    def _new_buffer(self) -> Tensor:
        """Zero, but where a first copy or `take` fills it."""
        if len(self._copies) < len(self._parameters):
            return torch.zeros(self._layout.size, dtype=self._dtype, device=self._device)
        buffer = torch.empty(self._layout.size, dtype=self._dtype, device=self._device)
        end = 0
        for slot in self._layout.slots:
            buffer[end : slot.start].zero_()
            end = slot.interval.stop
        buffer[end:].zero_()
        return buffer

    def _view(self, key: int, name: str) -> Tensor:
        slot = self._slots[name]
        return self._buffers[key][slot.interval.start : slot.interval.stop].view(slot.shape)

    def _arrived(self, name: str, parameter: Tensor) -> None:
        # Autograd runs hooks also where a backward has left a gradient for later: ops/linear.py.
        if name in self._copies and parameter.grad is not None:
            assert self._open is not None, f"a gradient of {name} came where none was expected"
            view = self._view(self._open, name)
            if name in self._missing[self._open]:
                view.copy_(parameter.grad)
                self._missing[self._open].discard(name)
            else:
                accumulate(view, parameter.grad)
            parameter.grad = None
        self._num_arrived += 1
        if self._num_arrived == self.num_expected:
            self.on_complete()


def _call(method: weakref.WeakMethod[Any], name: str, parameter: Tensor) -> None:
    found = method()
    assert found is not None, f"a gradient of {name} came when its bucket was gone"
    found(name, parameter)
