"""Which layer of the model becomes which parallel layer: a table, and the function that applies it."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from megatron_lite.distributed.mesh import Axis
from megatron_lite.models.identity import ParameterTable
from megatron_lite.models.transformer import Transformer
from megatron_lite.tensor_parallel.layers import (
    ColumnParallelLinear,
    ParallelModule,
    RowParallelLinear,
    TokenShardedEmbedding,
)
from megatron_lite.tensor_parallel.vocab import VocabParallelEmbedding, VocabParallelLossHead

# Pattern of the module's name -> what replaces it. Modules that match nothing (the norms) hold whole parameters.
PLAN: tuple[tuple[str, type[ParallelModule]], ...] = (
    ("embedding.tokens", VocabParallelEmbedding),
    ("embedding.positions", TokenShardedEmbedding),
    ("layers.*.attention.qkv", ColumnParallelLinear),
    ("layers.*.attention.out", RowParallelLinear),
    ("layers.*.mlp.up", ColumnParallelLinear),
    ("layers.*.mlp.down", RowParallelLinear),
    ("head", VocabParallelLossHead),
)


def apply_tensor_parallel(model: Transformer, table: ParameterTable, *, tp: Axis, sequence_parallel: bool) -> None:
    """Replaces the modules of ``model`` (on the meta device) that the plan names by their parallel counterparts."""
    if tp.size == 1:
        return
    specs = {spec.name: spec for spec in table}
    for name, plain in list(model.named_modules()):
        for pattern, replacement in PLAN:
            if fnmatchcase(name, pattern):
                own = {key: specs[f"{name}.{key}"] for key, _ in plain.named_parameters(recurse=False)}
                _replace(model, name, replacement(own, tp, sequence_parallel))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
