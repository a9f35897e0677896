"""Collectives against a dense computation in one process. Integers in float64 add exactly, so equal means bitwise."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import Axis, build_mesh
from megatron_lite.distributed.topology import Layout
from megatron_lite.distributed.worker_pool import WorkerPool
from tests.utils.meshes import axis as axis_without_group

SHAPE = (8, 3)
DUALS: dict[str, Callable[[Tensor, Axis], Tensor]] = {
    "copy_to": collectives.copy_to,
    "reduce_from": collectives.reduce_from,
    "gather_tokens": collectives.gather_tokens,
    "scatter_sum_tokens": collectives.scatter_sum_tokens,
}
# What the same region looks like with its reduction or its dual forgotten.
FORGOTTEN: dict[str, Callable[[Tensor, Axis], Tensor]] = {
    "copy_to": lambda x, axis: x * 1,
    "reduce_from": lambda x, axis: x * 1,
    "gather_tokens": lambda x, axis: _own_shard_alone(x, axis),
    "scatter_sum_tokens": lambda x, axis: x.chunk(axis.size)[axis.index] * 1,
}


def _own_shard_alone(x: Tensor, axis: Axis) -> Tensor:
    shards = list(collectives.all_gather(x.detach(), axis).chunk(axis.size))
    shards[axis.index] = x
    return torch.cat(shards)


def integers(seed: int, *shape: int) -> Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).double()


def tp_axis() -> Axis:
    size = torch.distributed.get_world_size()
    return build_mesh(Layout(tp=size), device=torch.device("cpu")).tp


def inputs_of(name: str, size: int) -> list[Tensor]:
    """What each rank puts in: the same where the region is entered with a whole tensor, else something of its own."""
    return [integers(0 if name == "copy_to" else 1 + rank, *SHAPE) for rank in range(size)]


def gradients_of(name: str, size: int, shape: torch.Size) -> list[Tensor]:
    """Each rank's gradient of its output: the same where the output is whole on every rank, else its own."""
    return [integers(50 if name == "reduce_from" else 51 + rank, *shape) for rank in range(size)]


def run_duals(functions: str) -> dict[str, tuple[Tensor, Tensor]]:
    axis, results = tp_axis(), {}
    for name, function in (DUALS if functions == "DUALS" else FORGOTTEN).items():
        x = inputs_of(name, axis.size)[axis.index].requires_grad_()
        y = function(x, axis)
        # Transposed twice, so that the gradient that arrives is not contiguous.
        gradient = gradients_of(name, axis.size, y.shape)[axis.index].t().contiguous().t()
        y.backward(gradient)
        assert x.grad is not None
        results[name] = (y.detach(), x.grad)
    return results


def dense(name: str, size: int) -> list[tuple[Tensor, Tensor]]:
    """(output, gradient of the input) of every rank, by autograd over all ranks' tensors in one process."""
    inputs = [x.requires_grad_() for x in inputs_of(name, size)]
    if name == "copy_to":
        inputs = [inputs[0]] * size
        outputs = [x * 1 for x in inputs]
    elif name == "reduce_from":
        outputs = [torch.stack(inputs).sum(dim=0)]
    elif name == "gather_tokens":
        outputs = [torch.cat(inputs)] * size
    else:
        outputs = list(torch.stack(inputs).sum(dim=0).chunk(size))
    gradients = gradients_of(name, size, outputs[0].shape)[: len(outputs)]
    loss = torch.stack([(y * g).sum() for y, g in zip(outputs, gradients, strict=True)]).sum()
    grads = torch.autograd.grad(loss, inputs)
    return [(outputs[rank % len(outputs)].detach(), grads[rank]) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 4])
def test_duals_equal_the_dense_computation(pool: WorkerPool, size: int) -> None:
    results = pool.run(run_duals, size, "DUALS")
    for name in DUALS:
        for rank, (output, gradient) in enumerate(dense(name, size)):
            assert torch.equal(results[rank][name][0], output), (name, rank)
            assert torch.equal(results[rank][name][1], gradient), (name, rank)


def test_a_forgotten_reduction_does_not_equal_it(pool: WorkerPool) -> None:
    results = pool.run(run_duals, 2, "FORGOTTEN")
    for name in DUALS:
        output, gradient = dense(name, 2)[0]
        seen = results[0][name]
        assert not (torch.equal(seen[0], output) and torch.equal(seen[1], gradient)), name
    for name in ("copy_to", "gather_tokens"):  # right in forward, and only the gradient says so
        assert torch.equal(results[0][name][0], dense(name, 2)[0][0])


# Four numbers of which every order of addition that matters rounds differently.
ADVERSARIAL = ((1e16, 1.0, -1e16, 1.0), (1.0, 1e16, 1.0, -1e16), (0.1, 0.2, 0.3, 1e15), (3e-300, 1e300, -1e300, 1e-16))


def added_in_order(row: tuple[float, ...]) -> float:
    total = row[0]
    for value in row[1:]:
        total += value
    return total


def test_slices_are_added_in_rank_order(pool: WorkerPool) -> None:
    expected = [added_in_order(row) for row in ADVERSARIAL]
    for row, total in zip(ADVERSARIAL, expected, strict=True):  # the control: these numbers tell orders apart
        assert any(added_in_order(order) != total for order in itertools.permutations(row))
    slices = pool.run(scatter_adversarial, 4)
    assert [float(part) for part in slices] == expected


def scatter_adversarial() -> Tensor:
    axis = tp_axis()
    mine = torch.tensor([row[axis.index] for row in ADVERSARIAL], dtype=torch.float64)
    return collectives.reduce_scatter(mine, axis)


def the_rest() -> dict[str, Any]:
    axis = tp_axis()
    i = axis.index
    seen: dict[str, Any] = {}
    for op in ("sum", "max", "min"):
        values = integers(i, 5)
        reduced = collectives.all_reduce(values, axis, op)
        assert reduced is values, "all_reduce works in place"
        seen[op] = reduced.clone()
    out = torch.empty(4 * axis.size)
    gathered = collectives.all_gather(torch.full((4,), float(i)), axis, out=out)
    assert gathered.data_ptr() == out.data_ptr()
    seen["gathered"] = out
    # A strided shard, and one of several dimensions.
    seen["strided"] = collectives.all_gather(integers(i, 2, 3).t(), axis)
    seen["objects"] = collectives.gather_objects({"rank": i}, axis)
    collectives.barrier(axis)
    # Around the ring, two tensors under way at once.
    to, of = (i + 1) % axis.size, (i - 1) % axis.size
    receiving = [collectives.start_receive(torch.empty(3), axis, of, tag=tag) for tag in (5, 6)]
    sending = [collectives.start_send(torch.full((3,), 10.0 * i + tag), axis, to, tag=tag) for tag in (5, 6)]
    seen["ring"] = [pending.wait() for pending in receiving]
    for pending in sending:
        pending.wait()
        assert pending.is_done()
    return seen


def test_reductions_gathers_and_messages(pool: WorkerPool) -> None:
    size = 3
    results = pool.run(the_rest, size)
    stacked = torch.stack([integers(rank, 5) for rank in range(size)])
    for rank, seen in enumerate(results):
        assert torch.equal(seen["sum"], stacked.sum(dim=0))
        assert torch.equal(seen["max"], stacked.amax(dim=0))
        assert torch.equal(seen["min"], stacked.amin(dim=0))
        assert torch.equal(seen["gathered"], torch.arange(float(size)).repeat_interleave(4))
        assert torch.equal(seen["strided"], torch.cat([integers(r, 2, 3).t() for r in range(size)]))
        assert seen["objects"] == [{"rank": r} for r in range(size)]
        before = (rank - 1) % size
        assert [part.tolist() for part in seen["ring"]] == [[10.0 * before + tag] * 3 for tag in (5, 6)]


def test_an_axis_of_one_rank_costs_nothing() -> None:
    """No group, no copy: the tensor itself comes back."""
    alone, x = axis_without_group("tp"), integers(0, 4)
    for function in DUALS.values():
        assert function(x, alone) is x
    assert collectives.all_reduce(x, alone) is x
    assert collectives.all_gather(x, alone) is x
    assert collectives.reduce_scatter(x, alone) is x
    assert collectives.gather_objects(x, alone)[0] is x
    collectives.barrier(alone)
    out = torch.empty_like(x)
    assert collectives.all_gather(x, alone, out=out) is out and torch.equal(out, x)
