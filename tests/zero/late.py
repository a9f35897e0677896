"""Collectives and messages that begin late and end late, by times drawn for each of them.

`late` replaces what starts communication in `megatron_lite.distributed.collectives`. A call returns at once, and what
it was to do begins some time later, in a thread of its process group, in the order of the calls; ``wait`` returns
some time after the end. Who reads before the data are there, or writes to a buffer or frees it while it is still to be
sent, computes with something else than without `late`, as it would on a slow network, and much more often.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

import torch
from torch import Tensor

from megatron_lite.distributed import collectives
from megatron_lite.distributed.collectives import Pending, Transfer
from megatron_lite.distributed.mesh import Axis


class Late(Pending):
    """What begins when its group's thread comes to it."""

    def __init__(self, begin: Callable[[], Pending], delay_s: Callable[[], float]) -> None:
        self._begin, self._delay_s = begin, delay_s
        self._begun, self._pending, self._error = Event(), Pending(torch.empty(0)), None

    @torch.no_grad()
    def begin(self) -> None:
        try:
            time.sleep(self._delay_s())
            self._pending = self._begin()
        except BaseException as error:
            self._error = error
        self._begun.set()

    def wait(self) -> Tensor:
        self._begun.wait()
        if self._error is not None:
            raise self._error
        result = self._pending.wait()
        time.sleep(self._delay_s())
        return result

    def is_done(self) -> bool:
        return self._begun.is_set() and self._pending.is_done()


class _Group:
    """Begins what is given to it, one after the other."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Late | None] = SimpleQueue()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (one := self._queue.get()) is not None:
            one.begin()

    def put(self, one: Late) -> Late:
        self._queue.put(one)
        return one

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()


class _Groups:
    def __init__(self, seed: str, longest_s: float) -> None:
        self._random, self._lock = random.Random(seed), Lock()
        self._slow = self._random.choice((0.1, 1.0))  # so that some ranks lag behind others
        self._longest_s = longest_s
        self._groups: dict[int, _Group] = {}
        self.num_delayed = 0

    def delay_s(self) -> float:
        with self._lock:
            self.num_delayed += 1
            # Half of them come at once: a race may need one early call and one late one.
            return self._random.choice((0.0, self._random.random())) * self._slow * self._longest_s

    def start(self, axis: Axis, begin: Callable[[], Pending]) -> Pending:
        if axis.size == 1:
            return begin()
        key = id(axis.group)
        if key not in self._groups:
            self._groups[key] = _Group()
        return self._groups[key].put(Late(begin, self.delay_s))

    def close(self) -> None:
        for group in self._groups.values():
            group.close()


_STARTS = ("start_all_reduce", "start_all_gather", "start_reduce_scatter")
_AT_ONCE = ("broadcast", "gather_objects", "barrier")


@contextmanager
def late(seed: str, longest_s: float = 0.003) -> Iterator[_Groups]:
    """Within it everything that goes over an axis is late. seed: another one on each rank, and in each run."""
    groups, originals = _Groups(seed, longest_s), vars(collectives).copy()

    def late_start(name: str) -> Callable[..., Pending]:
        def start(tensor: Tensor, axis: Axis, *args: Any, **kwargs: Any) -> Pending:
            return groups.start(axis, lambda: originals[name](tensor, axis, *args, **kwargs))

        return start

    def late_call(name: str) -> Callable[..., Any]:
        def call(value: Any, axis: Axis | None = None, *args: Any, **kwargs: Any) -> Any:
            on = axis or value  # a barrier has nothing but an axis
            given = (value,) if axis is None else (value, axis)
            results: list[Any] = []
            groups.start(on, lambda: Pending(_keep(results, originals[name](*given, *args, **kwargs)))).wait()
            return results[0]

        return call

    def late_transfers(transfers: list[Transfer]) -> list[Pending]:
        return [groups.start(one.axis, lambda one=one: originals["start_transfers"]([one])[0]) for one in transfers]  # type: ignore[misc]

    replaced: dict[str, Any] = {name: late_start(name) for name in _STARTS}
    replaced |= {name: late_call(name) for name in _AT_ONCE} | {"start_transfers": late_transfers}
    try:
        for name, function in replaced.items():
            setattr(collectives, name, function)
        yield groups
    finally:
        groups.close()
        for name in replaced:
            setattr(collectives, name, originals[name])


def _keep(results: list[Any], result: Any) -> Tensor:
    results.append(result)
    return torch.empty(0)
