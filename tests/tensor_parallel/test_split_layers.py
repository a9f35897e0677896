"""Split backwards and recomputation over the tensor-parallel axis: the bits of an undivided backward on every rank."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.config.schema import KernelsConfig
from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import Axis, build_mesh
from megatron_lite.distributed.topology import Layout
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.models.families import parameter_table
from megatron_lite.models.recompute import Recompute
from megatron_lite.models.transformer import Transformer
from megatron_lite.ops.linear import WeightGradients, _Product, defer_weight_gradients
from megatron_lite.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_lite.tensor_parallel.plan import apply_tensor_parallel
from tests.models.backwards import DOCUMENTS, SPLIT, WHOLE, differing, gradients_of, saved_bytes
from tests.models.tiny import model_config, some_values
from tests.tensor_parallel.test_layers import OUT, QKV, TOKENS, parallel

HIDDEN = 16
of_both = pytest.mark.parametrize("is_sequence", [False, True], ids=["whole tokens", "sequence parallel"])


class Traffic:
    """Bytes that this rank's collectives were called with while it is entered, by name of the collective."""

    def __enter__(self) -> dict[str, int]:
        self.bytes: dict[str, int] = {}
        self.patch = pytest.MonkeyPatch()
        for name in ("start_all_gather", "start_reduce_scatter", "start_all_reduce"):
            self._count(name, getattr(collectives, name))
        return self.bytes

    def _count(self, name: str, original: Any) -> None:
        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.bytes[name] = self.bytes.get(name, 0) + tensor.nbytes
            return original(tensor, *args, **kwargs)

        self.patch.setattr(collectives, name, counted)

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


def tp_axis() -> Axis:
    return build_mesh(Layout(tp=torch.distributed.get_world_size()), device=torch.device("cpu")).tp


def layers_apart_and_together(is_sequence: bool, dtype: torch.dtype, fault: bool) -> dict[str, Any]:
    """Column and row layer, with a backward that is whole and one that is split; what differs, is held and is sent."""
    axis = tp_axis()
    results, traffic = [], []
    for is_split in (False, True):
        column = parallel(ColumnParallelLinear, QKV, axis, is_sequence).to(dtype)
        row = parallel(RowParallelLinear, OUT, axis, is_sequence).to(dtype)
        assert isinstance(column, ColumnParallelLinear)
        store = WeightGradients()
        for module in (column, row):
            defer_weight_gradients(module, store)
        num_tokens = TOKENS // axis.size if is_sequence else TOKENS
        noise = torch.Generator().manual_seed(axis.index if is_sequence else 0)
        x = torch.randn(num_tokens, HIDDEN, generator=noise).to(dtype).requires_grad_()
        grad = torch.randn(num_tokens, HIDDEN, generator=noise).to(dtype)
        queries, keys, values = column(x).split(column.split_sizes, dim=-1)
        y = row(queries + keys - 2 * values)
        with Traffic() as sent:
            if is_split:
                with store.collecting(0):
                    y.backward(grad)
                assert column.weight.grad is None and row.weight.grad is None
                held = list(store._owed[0])
                if fault:
                    held[-1] = _Product(column.weight, held[-1]._grad, held[-1]._x.repeat(axis.size, 1))
                    store._owed[0] = deque(held)
                first = dict(sent)
                store.run(0)
            else:
                y.backward(grad)
        traffic.append(sent)
        leaves = {"x": x, "column": column.weight, "column bias": column.bias, "row": row.weight, "row bias": row.bias}
        results.append({name: leaf.grad for name, leaf in leaves.items() if leaf is not None})
    assert len(results[0]) == 5
    wrong = [name for name, value in results[0].items() if not torch.equal(value, results[1][name])]
    shapes = [(tuple(product._x.shape), tuple(product._grad.shape)) for product in held]
    return {"wrong": wrong, "whole": traffic[0], "split": traffic[1], "first half": first, "held": shapes}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@of_both
def test_parallel_layers_split(pool: WorkerPool, is_sequence: bool, dtype: torch.dtype) -> None:
    for result in pool.run(layers_apart_and_together, 2, is_sequence, dtype, False):
        assert result["wrong"] == []
        # What the table in layers.py says is held, of 8 tokens on 2 ranks: the row layer's comes first.
        tokens = TOKENS // 2 if is_sequence else TOKENS
        assert result["held"] == [
            ((TOKENS, HIDDEN // 2), (TOKENS, HIDDEN)),
            ((tokens, HIDDEN), (TOKENS, 3 * HIDDEN // 2)),
        ]
        assert result["whole"] and result["split"] == result["whole"], "the same volume"
        second = {name: size - result["first half"].get(name, 0) for name, size in result["split"].items()}
        late = tokens * HIDDEN * dtype.itemsize if is_sequence else 0  # x of the column layer, once more
        assert sum(second.values()) == second.get("start_all_gather", 0) == late


def test_a_weight_half_without_the_other_ranks_tokens_is_noticed(pool: WorkerPool) -> None:
    for result in pool.run(layers_apart_and_together, 2, True, torch.float32, True):
        assert result["wrong"] == ["column"]


def parallel_model(family: str, axis: Axis, is_sequence: bool, dtype: torch.dtype) -> Transformer:
    config = model_config(family)
    table = parameter_table(config)
    with torch.device("meta"):
        model = Transformer(config, KernelsConfig())
    apply_tensor_parallel(model, table, tp=axis, sequence_parallel=is_sequence)
    model = model.to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(table[name].take_shard(some_values(table[name], dtype), axis.size, axis.index))
    return model


def modes_and_orders(family: str, is_sequence: bool, dtype: torch.dtype) -> dict[str, Any]:
    """What differs from the gradients of a whole backward without recomputation, and bytes saved of two layers."""
    axis = tp_axis()
    wrong, saved = [], {}
    expected = gradients_of(parallel_model(family, axis, is_sequence, dtype), WHOLE)
    tokens = DOCUMENTS.numel() // (axis.size if is_sequence else 1)
    for mode in (Recompute(), Recompute("selective"), Recompute("full"), Recompute("full", 2)):
        model = parallel_model(family, axis, is_sequence, dtype)
        model.recompute = mode
        for order in (WHOLE, SPLIT) if mode.mode != "none" else (SPLIT,):
            bare = parallel_model(family, axis, is_sequence, dtype)
            bare.recompute = mode
            wrong += [(mode, order, name) for name in differing(gradients_of(bare, order), expected)]
        model.embedding = model.final_norm = model.head = None
        sequences = model.sequences(*DOCUMENTS.shape, None, DOCUMENTS, next(model.parameters()))
        with saved_bytes(model) as sizes:
            model(torch.zeros(tokens, 32, dtype=dtype, requires_grad=True), sequences)
        saved[mode.mode, mode.every_layers] = sum(sizes.values())
    return {"wrong": wrong, "saved": saved, "shard": tokens * 32 * dtype.itemsize}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@of_both
def test_a_parallel_model_split_and_recomputed(
    pool: WorkerPool, family: str, is_sequence: bool, dtype: torch.dtype
) -> None:
    for result in pool.run(modes_and_orders, 2, family, is_sequence, dtype):
        assert result["wrong"] == []
        saved, shard = result["saved"], result["shard"]
        # Two layers: two inputs or one, of this rank's tokens only under sequence parallelism.
        assert (saved["full", 1], saved["full", 2]) == (2 * shard, shard)
        assert saved["full", 1] < saved["selective", 1] < saved["none", 1]


def traffic_of_a_backward(mode: Recompute) -> dict[str, int]:
    """Bytes by collective, of a backward through two layers under sequence parallelism."""
    axis = tp_axis()
    model = parallel_model("llama", axis, True, torch.float32)
    model.recompute = mode
    model.embedding = model.final_norm = model.head = None
    sequences = model.sequences(*DOCUMENTS.shape, None, DOCUMENTS, torch.empty(()))
    y = model(torch.ones(DOCUMENTS.numel() // axis.size, 32, requires_grad=True), sequences)
    with Traffic() as sent:
        y.sum().backward()
    return sent


def test_recomputation_repeats_the_collectives_of_a_group_but_for_the_last(pool: WorkerPool) -> None:
    """A layer gathers twice and scatters twice; what it scatters last, its output, is not needed again."""
    none, by_one, by_two = (
        pool.run(traffic_of_a_backward, 2, mode) for mode in (Recompute(), Recompute("full"), Recompute("full", 2))
    )
    whole = DOCUMENTS.numel() * 32 * 4
    for before, one, two in zip(none, by_one, by_two, strict=True):
        assert {name: one[name] - before[name] for name in before} == {
            "start_all_gather": 4 * whole // 2,  # counted by what goes in: a shard
            "start_reduce_scatter": 2 * whole,
        }
        assert two["start_all_gather"] == one["start_all_gather"]
        assert two["start_reduce_scatter"] == one["start_reduce_scatter"] + whole
