"""What every optimizer is told, what it keeps, and how the elementwise ones pass over flat memory.

An optimizer updates regions: a slice of a bucket, or the whole of it (ZeRO 0). Elements of a region belong to
parameters, of which a tensor-parallel rank may hold a part; what pads between them has gradients, weights and state
of zero, and keeps them. The bits of an element depend on its parameter alone, never on how buckets are sliced.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.config.optim import OptimConfig
from megatron_lite.distributed.mesh import Axis
from megatron_lite.models.identity import ParameterSpec
from megatron_lite.optim.state_sizes import state_intervals

# Elements worked on at once: on a CPU their temporaries stay in cache, on a GPU a launch pays. Whole cache lines, so
# that vectorised code never treats an element as the rest of a vector in one slicing and not in another.
_BLOCK, _DEVICE_BLOCK = 1 << 16, 1 << 24


@dataclass(frozen=True)
class Axes:
    """What an optimizer may communicate over. slices: the ranks that hold the slices of a bucket; tp: of a parameter.
    device: on which they communicate, also where the state is offloaded.

    All ranks of both call `step` for the same buckets in the same order.
    """

    slices: Axis
    tp: Axis
    device: torch.device


@dataclass(frozen=True)
class Parameter:
    """A parameter in a bucket: its identity, the local shape, and its first element."""

    spec: ParameterSpec
    shape: tuple[int, ...]
    start: int

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True)
class Region:
    """The elements ``[start, stop)`` of a bucket of ``size`` elements in ``num_slices`` slices: the whole, or a slice.

    parameters: of the bucket, in order. undecayed: elements of the region without weight decay, in order, counted from
    its start; they begin and end at multiples of 256, or with it.
    """

    parameters: tuple[Parameter, ...]
    start: int
    stop: int
    size: int
    num_slices: int
    undecayed: tuple[tuple[int, int], ...]

    @property
    def is_whole(self) -> bool:
        return self.stop - self.start == self.size

    def slice(self, index: int) -> tuple[int, int]:
        """The elements of the bucket in a slice."""
        share = self.size // self.num_slices
        return index * share, (index + 1) * share

    def clip(self, start: int, stop: int) -> tuple[int, int]:
        """Elements of the bucket as elements of the region, as far as they lie in it; else ``stop <= start``."""
        return max(start, self.start) - self.start, min(stop, self.stop) - self.start

    def runs(self) -> Iterator[tuple[int, int, bool]]:
        """The region cut into runs ``[start, stop)`` that decay, or do not."""
        at = 0
        for start, stop in self.undecayed:
            yield from ((begin, end, decays) for begin, end, decays in ((at, start, True), (start, stop, False)))
            at = stop
        yield at, self.stop - self.start, True


@dataclass
class OptimizerState:
    """What an optimizer keeps for a region.

    tensors: flat, by kind, in the dtype of master weights. intervals: the elements of the bucket that each of them
    holds, one behind the other. num_steps: updates made.
    """

    region: Region
    tensors: Mapping[str, Tensor]
    intervals: Mapping[str, tuple[tuple[int, int], ...]]
    num_steps: int = 0

    def parts(self, kind: str, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """(first element, state) of the elements ``[start, stop)`` of the bucket that a kind of state holds: views."""
        offset = 0
        for begin, end in self.intervals.get(kind, ()):
            first, last = max(begin, start), min(end, stop)
            if first < last:
                yield first, self.tensors[kind][offset + first - begin : offset + last - begin]
            offset += end - begin

    def part(self, kind: str, start: int, stop: int) -> Tensor:
        """The state of elements that lie in one run of it."""
        ((_, found),) = self.parts(kind, start, stop)
        assert found.numel() == stop - start
        return found


@dataclass(frozen=True)
class Update:
    """One step of one region: what `Optimizer.step` is given, all tensors ``[n]``."""

    weights: Tensor
    gradients: Tensor
    state: OptimizerState
    lr: float
    factor: float
    parameters: Tensor | None


class Optimizer(ABC):
    """Makes the updates of all regions of a rank, one after the other."""

    def __init__(self, config: OptimConfig, axes: Axes, backend: str = "auto") -> None:
        """backend: of the kernel, where there is one (``kernels.adamw``)."""
        self.config, self.axes, self.backend = config, axes, backend

    def init_state(
        self,
        region: Region,
        dtype: torch.dtype,
        device: torch.device,
        make: Callable[[Mapping[str, int]], Mapping[str, Tensor]] | None = None,
    ) -> OptimizerState:
        """State of zeros; `state_elements` says how much of it. dtype: that of master weights. make: from numbers of
        elements, by kind, to the tensors; None: they lie on the device."""
        intervals = state_intervals(self.config, region.parameters, region.start, region.stop)
        sizes = {kind: sum(stop - start for start, stop in held) for kind, held in intervals.items()}
        if make is not None:
            return OptimizerState(region, make(sizes), intervals)
        tensors = {kind: torch.zeros(size, dtype=dtype, device=device) for kind, size in sizes.items()}
        return OptimizerState(region, tensors, intervals)

    def step(
        self,
        weights: Tensor,
        gradients: Tensor,
        state: OptimizerState,
        lr: float,
        *,
        factor: float = 1.0,
        parameters: Tensor | None = None,
    ) -> None:
        """Updates a region's ``weights`` and ``state`` in place, and fills ``parameters`` with the weights, rounded.

        weights: ``[n]``, in the dtype of the state. gradients: ``[n]``, any float dtype; they are not changed.
        parameters: None, or ``[n]`` in any float dtype. factor: what gradients are multiplied by before anything else
        (clipping, and one over a loss scale); one that is not a number makes weights that are none.
        """
        state.num_steps += 1
        self._step(Update(weights, gradients, state, lr, factor, parameters))

    @abstractmethod
    def _step(self, update: Update) -> None:
        """`step`, whose number is ``update.state.num_steps``."""


class Elementwise(Optimizer):
    """An optimizer whose state covers the region, and whose elements do not meet. Goes over blocks of fixed size.

    Every operation on an element is one multiplication, addition, division or root that rounds once: fused ones round
    otherwise at the end of a vector than inside of it.
    """

    def _step(self, update: Update) -> None:
        weights, state, lr = update.weights, update.state, update.lr
        scales = self._scales(weights, state.region)
        for run_start, run_stop, decays in state.region.runs():
            kept = 1 - lr * self.config.decay_rate(lr) if decays else 1.0
            for start, stop in blocks(run_start, run_stop, weights.device):
                gradient = update.gradients[start:stop].to(weights.dtype, copy=True).mul_(update.factor)
                own = {kind: tensor[start:stop] for kind, tensor in state.tensors.items()}
                direction = self._direction(gradient, own, state.num_steps)
                for begin, end, scale in scales:
                    direction[max(begin - start, 0) : max(end - start, 0)].mul_(scale)
                weights[start:stop].mul_(kept).sub_(direction.mul_(lr))
                if update.parameters is not None:
                    update.parameters[start:stop].copy_(weights[start:stop])

    def _scales(self, weights: Tensor, region: Region) -> list[tuple[int, int, float]]:
        """(start, stop, scale) of elements of the region whose update is multiplied by a scale."""
        return []

    @abstractmethod
    def _direction(self, gradient: Tensor, state: Mapping[str, Tensor], step: int) -> Tensor:
        """What, times the learning rate, is subtracted; changes the state. gradient: a copy, to be used up."""


def blocks(start: int, stop: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """``[start, stop)`` in pieces of a fixed number of elements."""
    size = _BLOCK if device.type == "cpu" else _DEVICE_BLOCK
    for begin in range(start, stop, size):
        yield begin, min(begin + size, stop)
