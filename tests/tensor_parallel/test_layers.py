"""Parallel layers on 2 and 4 ranks against the same layers in one process, in float64.

The inputs are small integers, which float64 adds without rounding: equal means bitwise, whatever the order of a sum.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.distributed.mesh import Axis, build_mesh
from megatron_lite.distributed.topology import Layout
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.models.families import parameter_table
from megatron_lite.models.identity import ParameterSpec, assemble
from megatron_lite.tensor_parallel.layers import (
    ColumnParallelLinear,
    ParallelModule,
    RowParallelLinear,
    TokenShardedEmbedding,
)
from megatron_lite.tensor_parallel.vocab import VocabParallelEmbedding
from tests.models.tiny import model_config

TOKENS, SHIFT = 8, 3
CONFIG = model_config("gpt2", vocab_size=17, hidden_size=16, ffn_hidden_size=24)
QKV, OUT = "layers.0.attention.qkv", "layers.0.attention.out"
Results = dict[str, Tensor]


def integers(seed: int, *shape: int) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).double()


def value_of(spec: ParameterSpec) -> Tensor:
    return integers(sum(spec.name.encode()), *spec.shape)


def specs_of(name: str) -> dict[str, ParameterSpec]:
    """The identities of a module's parameters, by the parameter's name in the module."""
    return {
        spec.name.rpartition(".")[2]: spec for spec in parameter_table(CONFIG) if spec.name.rpartition(".")[0] == name
    }


def parallel(kind: type[ParallelModule], name: str, axis: Axis, is_sequence: bool) -> ParallelModule:
    module = kind(specs_of(name), axis, is_sequence).double().to_empty(device="cpu")
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            spec = specs_of(name)[key]
            parameter.copy_(spec.take_shard(value_of(spec), axis.size, axis.index))
    return module


def tokens_of(x: Tensor, axis: Axis, is_sequence: bool) -> Tensor:
    return x.chunk(axis.size)[axis.index].clone() if is_sequence else x


def attention_like(mixed: Tensor) -> Tensor:
    """Something between the two linear layers that needs every channel's place."""
    return mixed.clamp(-40, 40)


def column_then_row(is_sequence: bool, fault: str = "") -> Results:
    """x -> qkv -> the queries -> out. Returns this rank's output and gradients."""
    size = torch.distributed.get_world_size()
    axis = build_mesh(Layout(tp=size), device=torch.device("cpu")).tp
    column = parallel(ColumnParallelLinear, QKV, axis, is_sequence)
    row = parallel(RowParallelLinear, OUT, axis, is_sequence)
    if fault:
        faulty = {"column": column, "row": row}[fault]
        faulty.axis = dataclasses.replace(axis, size=1)
    x = tokens_of(integers(1, TOKENS, 16), axis, is_sequence).requires_grad_()
    assert isinstance(column, ColumnParallelLinear)
    queries, keys, values = column(x).split(column.split_sizes, dim=-1)
    y = row(attention_like(queries + keys - 2 * values))
    y.backward(tokens_of(integers(2, TOKENS, 16), axis, is_sequence))
    assert x.grad is not None
    results = {"y": y.detach(), "x": x.grad}
    for name, module in ((QKV, column), (OUT, row)):
        for key, parameter in module.named_parameters():
            assert parameter.grad is not None
            results[f"{name}.{key}"] = parameter.grad
    return results


def dense_column_then_row() -> Results:
    leaves = {spec.name: value_of(spec).requires_grad_() for name in (QKV, OUT) for spec in specs_of(name).values()}
    x = integers(1, TOKENS, 16).requires_grad_()
    mixed = F.linear(x, leaves[f"{QKV}.weight"], leaves[f"{QKV}.bias"])
    queries, keys, values = mixed.chunk(3, dim=-1)
    y = F.linear(attention_like(queries + keys - 2 * values), leaves[f"{OUT}.weight"], leaves[f"{OUT}.bias"])
    y.backward(integers(2, TOKENS, 16))
    gradients = {"x": x.grad, **{name: leaf.grad for name, leaf in leaves.items()}}
    return {"y": y.detach(), **{name: grad for name, grad in gradients.items() if grad is not None}}


def mistakes(results: list[Results], expected: Results, is_sequence: bool) -> list[str]:
    """Names of what is not equal to the dense computation."""
    wrong, size = [], len(results)
    table = parameter_table(CONFIG)
    for name, exact in expected.items():
        parts = [result[name] for result in results]
        if name in ("y", "x"):
            equal = torch.equal(torch.cat(parts), exact) if is_sequence else all(torch.equal(p, exact) for p in parts)
        elif table[name].shard_dim is None and is_sequence:  # each rank saw its own tokens
            equal = torch.equal(torch.stack(parts).sum(dim=0), exact)
        else:
            try:
                equal = torch.equal(assemble(table[name], parts), exact)
            except ValueError:
                equal = False
        wrong += [] if equal else [name]
    assert size > 1 and len(expected) == 6
    return wrong


@pytest.mark.parametrize("is_sequence", [False, True], ids=["whole tokens", "sequence parallel"])
@pytest.mark.parametrize("size", [2, 4])
def test_column_and_row(pool: WorkerPool, size: int, is_sequence: bool) -> None:
    expected = dense_column_then_row()
    assert expected["y"].abs().max() < 2**50  # exact in float64
    assert mistakes(pool.run(column_then_row, size, is_sequence), expected, is_sequence) == []


@pytest.mark.parametrize(
    ("fault", "wrong"),
    [
        ("column", ["x"]),  # the gradient of the input is one rank's part; all else is local
        ("row", ["y"]),  # the output is one rank's part, and gradients pass through unchanged
    ],
)
def test_a_forgotten_sum_is_noticed(pool: WorkerPool, fault: str, wrong: list[str]) -> None:
    assert mistakes(pool.run(column_then_row, 2, False, fault), dense_column_then_row(), False) == wrong


def embed(is_sequence: bool) -> Results:
    """Token and position embeddings of one batch."""
    size = torch.distributed.get_world_size()
    axis = build_mesh(Layout(tp=size), device=torch.device("cpu")).tp
    tokens = parallel(VocabParallelEmbedding, "embedding.tokens", axis, is_sequence)
    positions = parallel(TokenShardedEmbedding, "embedding.positions", axis, is_sequence)
    y = tokens(TOKEN_IDS) + positions(torch.arange(TOKENS))
    y.backward(tokens_of(integers(2, TOKENS, 16), axis, is_sequence))
    grads: dict[str, Any] = {"tokens": tokens.weight.grad, "positions": positions.weight.grad}
    return {"y": y.detach(), **grads}


TOKEN_IDS = torch.tensor([0, 16, 7, 8, 0, 16, 15, 3])  # of 17; rows of every rank that has any, two of them twice


@pytest.mark.parametrize("is_sequence", [False, True], ids=["whole tokens", "sequence parallel"])
@pytest.mark.parametrize("size", [2, 4])
def test_embeddings(pool: WorkerPool, size: int, is_sequence: bool) -> None:
    """17 rows over 4 ranks: 8, 8, 1 and none. Rows that pad have no gradient."""
    specs = [specs_of(f"embedding.{name}")["weight"] for name in ("tokens", "positions")]
    leaves = [value_of(spec).requires_grad_() for spec in specs]
    y = F.embedding(TOKEN_IDS, leaves[0]) + leaves[1][:TOKENS]
    y.backward(integers(2, TOKENS, 16))
    results = pool.run(embed, size, is_sequence)
    outputs = [result["y"] for result in results]
    assert leaves[0].grad is not None and leaves[1].grad is not None
    if is_sequence:
        assert torch.equal(torch.cat(outputs), y)
        assert torch.equal(torch.stack([r["positions"] for r in results]).sum(dim=0), leaves[1].grad)
    else:
        assert all(torch.equal(output, y) for output in outputs)
        assert all(torch.equal(r["positions"], leaves[1].grad) for r in results)
    for index, result in enumerate(results):
        assert torch.equal(result["tokens"], specs[0].take_shard(leaves[0].grad, size, index))
    if size == 4:
        assert results[3]["tokens"].shape == (8, 16) and not results[3]["tokens"].any()
