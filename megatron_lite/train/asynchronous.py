"""PipeDream's asynchronous updates with weight stashing (Narayanan et al. 2019, section 3.3).

Each rank updates its weights right after the backward of a microbatch, without a word from the others. A forward uses
the newest weights of its rank; the backward of the same microbatch uses the weights of that forward, which are kept
until then. This changes the mathematics: a gradient is of weights that are some updates old (under 1F1B up to
``pp - 1``, another number on each rank), so the result depends on the number of stages, on the schedule and on the
microbatches.

At the end of a step the pipeline is empty, so checkpoints and evaluations see every update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from megatron_lite.zero.engine import ZeroEngine


class AsynchronousUpdates:
    """What a runner calls around forwards and backwards of a rank that holds one chunk.

    update: reduces this rank's gradients over the other axes, and changes its weights by them.
    """

    def __init__(self, engine: ZeroEngine, update: Callable[[], None]) -> None:
        self._engine, self._update = engine, update
        self._version = 0  # of the weights: how often they have been updated
        self._version_of: dict[int, int] = {}  # microbatches between forward and backward
        self._stashed: dict[int, list[Tensor]] = {}  # weights of versions that a backward still needs

    def before_forward(self, microbatch: int) -> None:
        self._version_of[microbatch] = self._version

    @contextmanager
    def around_backward(self, microbatch: int) -> Iterator[None]:
        """Within it the weights are those of the microbatch's forward; at its end they are updated."""
        version = self._version_of.pop(microbatch)
        self._engine.zero_gradients()
        with self._weights_of(version):
            yield
        if version not in self._version_of.values():
            self._stashed.pop(version, None)
        if self._version in self._version_of.values():
            self._stashed[self._version] = [weights.clone() for weights in self._engine.resident_parameters()]
        self._update()
        self._version += 1

    @contextmanager
    def _weights_of(self, version: int) -> Iterator[None]:
        if version == self._version:
            yield
            return
        newest = [weights.clone() for weights in self._engine.resident_parameters()]
        try:
            self._write(self._stashed[version])
            yield
        finally:
            self._write(newest)

    def _write(self, weights: list[Tensor]) -> None:
        for memory, values in zip(self._engine.resident_parameters(), weights, strict=True):
            memory.copy_(values)
        self._engine.parameters_changed()
