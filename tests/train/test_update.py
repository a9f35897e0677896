"""The optimizer inside of training: every stage gives the same bits, and the update leaves what it only reads."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.train.step import compute_gradients
from megatron_lite.train.update import OPTIMIZERS, _update_bucket, update
from tests.zero.test_engine import batches, config_of, same_bits, start, train


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zero_stages_agree_in_every_bit(pool: WorkerPool, name: str, precision: str) -> None:
    """And padding stays zero, in the weights, the gradients and the state."""
    runs = []
    for stage in (0, 1):
        keys = (f"optim.name={name}", f"parallel.zero_stage={stage}", f"train.precision={precision}")
        first, second = pool.run(train, 2, config_of(*keys, world_size=2))
        assert same_bits(first, second) and first["dirty padding"] == 0 < first["padding"]
        runs.append(first)
    assert same_bits(*runs)
    assert runs[1]["state"] * 2 == runs[0]["state"]


def one_update(name: str, precision: str) -> dict[str, Any]:
    config = config_of(f"optim.name={name}", f"train.precision={precision}", world_size=1)
    trainings = [start(config) for _ in range(2)]
    told: list[str] = []
    for training, factor in zip(trainings, (1.0, 0.5), strict=True):
        training.before_update = lambda: told.append("before")
        compute_gradients(training, batches(training, 0))
        buckets = list(training.engine.updated_buckets())
        if factor == 1.0:  # the same gradients, halved before and not while they are read
            for bucket in buckets:
                bucket.sums.mul_(0.5)
        before = [bucket.sums.clone() for bucket in buckets]
        update(training, 0.01, factor)
        assert all(torch.equal(b.sums, kept) for b, kept in zip(buckets, before, strict=True))
    masters = [[b.master for b in training.engine.updated_buckets()] for training in trainings]
    states = [list(training.optimizer_states.values()) for training in trainings]
    return {
        "told": told,
        "updates": {state.num_steps for state in states[0]},
        "same weights": all(torch.equal(a, b) for a, b in zip(*masters, strict=True)),
        "same state": all(
            torch.equal(a.tensors[kind], b.tensors[kind]) for a, b in zip(*states, strict=True) for kind in a.tensors
        ),
        "moved": all(
            not torch.equal(training.engine.whole_master(n), start(config).engine.whole_master(n))
            for training in trainings
            for n in ("head.weight", "layers.0.mlp.up.weight")
        ),
    }


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_factor_is_applied_while_gradients_are_read(pool: WorkerPool, name: str, precision: str) -> None:
    (found,) = pool.run(one_update, 1, name, precision)
    assert found == {
        "told": ["before", "before"], "updates": {1}, "same weights": True, "same state": True, "moved": True
    }  # fmt: skip


# Where state lies: a device that is made up, since a test may have no other than the CPU.

THERE = torch.device("meta")


class Remote(Tensor):
    """Lies ``THERE``, it says, and keeps its values in a tensor of the CPU."""

    held: Tensor

    @staticmethod
    def of(values: Tensor) -> Remote:
        made: Remote = Tensor._make_wrapper_subclass(Remote, values.shape, dtype=values.dtype, device=THERE)
        made.held = values
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError("used where no TwoDevices is")


class TwoDevices(TorchDispatchMode):
    """Copies go over from one to the other; nothing else has operands on both."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        on = {one.device for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor) and one.dim()}
        assert len(on) == 1 or function is torch.ops.aten.copy_.default, f"{function} of tensors on {on}"
        is_remote = torch.device(kwargs.get("device", args[0].device)) == THERE
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        inner = tree_map(lambda one: one.held if isinstance(one, Remote) else one, (args, kwargs))
        result = function(*inner[0], **inner[1])
        if result is inner[0][0]:
            return args[0]  # it was changed in place
        return Remote.of(result) if is_remote else result


class Momentum:
    """As simple as an optimizer can be, and particular about where it computes."""

    def __init__(self) -> None:
        self.home: list[torch.device] = []

    def step(
        self, weights: Tensor, gradient: Tensor, state: Any, lr: float, *, factor: float, parameters: Tensor | None
    ) -> None:
        moments: Mapping[str, Tensor] = state.tensors
        used = (weights, gradient, parameters, *moments.values())
        (home,) = {one.device for one in used if one is not None and one.numel()}
        self.home.append(home)
        direction = gradient * factor
        if "first" in moments:
            direction = moments["first"].add_(direction)
        weights.sub_(direction * lr)
        if parameters is not None:
            parameters.copy_(weights)


def values_of(kinds: tuple[str, ...]) -> dict[str, Tensor]:
    """Of a bucket, in fp32; beside master weights the parameters in bf16."""
    generator = torch.Generator().manual_seed(1)
    made = {kind: torch.rand(0 if kind == "empty" else 8, generator=generator) for kind in kinds}
    return made | ({"values": made["values"].bfloat16()} if "master" in kinds else {})


@pytest.mark.parametrize("weights", ["master", "values"])
@pytest.mark.parametrize("moments", [("empty", "first"), ()], ids=["moments", "none"])
def test_it_is_computed_where_the_moments_are(weights: str, moments: tuple[str, ...]) -> None:
    """Without any, where the weights are; wherever the weights, the parameters and the gradients lie."""
    kinds = ("sums", *moments, *dict.fromkeys((weights, "values")))
    expected = values_of(kinds)
    direction = expected["sums"] * 0.5
    if moments:
        direction = expected["first"].add_(direction)
    expected[weights].sub_(direction * 0.1)
    expected["values"].copy_(expected[weights])
    for is_remote in product((False, True), repeat=len(kinds)):
        memory, optimizer = values_of(kinds), Momentum()
        tensors = {
            kind: Remote.of(memory[kind]) if remote else memory[kind]
            for kind, remote in zip(kinds, is_remote, strict=True)
        }
        kept = dict.fromkeys(moments, torch.empty(0))  # not what is computed on: the stream brings that
        training: Any = SimpleNamespace(
            optimizer=optimizer,
            optimizer_states={"unit": SimpleNamespace(tensors=kept)},
            precision=SimpleNamespace(rounds_stochastically=False),
        )
        bucket: Any = SimpleNamespace(layout=SimpleNamespace(name="unit"), weights_kind=weights)
        with TwoDevices():
            _update_bucket(training, bucket, tensors, 0.1, 0.5)
        assert optimizer.home == [tensors["first" if moments else weights].device]
        assert training.optimizer_states["unit"].tensors is kept
        assert [kind for kind in kinds if not torch.equal(memory[kind], expected[kind])] == []


def test_two_devices_are_not_one() -> None:
    """Negative control: what the test above would see of a tensor that was not brought over."""
    here = torch.ones(8)
    there = Remote.of(torch.ones(8))
    with TwoDevices(), pytest.raises(AssertionError, match=r"tensors on"):
        here.add_(there)
    with TwoDevices():
        moved = here.to(THERE).add_(there)
        back = moved.to("cpu")
    assert moved.device == THERE
    assert torch.equal(here, torch.ones(8)) and torch.equal(back, torch.full((8,), 2.0))
