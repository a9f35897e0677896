"""The model of a source in a layout of processes, for forward passes only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch

from megatron_lite.config.layout_rules import even_stages
from megatron_lite.config.nearest import divides_either_way, divisors
from megatron_lite.config.schema import KernelsConfig, ModelConfig
from megatron_lite.distributed.mesh import Mesh, build_mesh
from megatron_lite.distributed.rendezvous import world
from megatron_lite.distributed.topology import Layout
from megatron_lite.inference.packed import can_pack, pack_weights
from megatron_lite.inference.source import Source
from megatron_lite.models.transformer import LossHead, Transformer
from megatron_lite.optim.precision import Precision
from megatron_lite.train.build import build_chunk


class LayoutError(ValueError):
    """A layout that the model or the number of processes does not admit."""


def choose_layout(model: ModelConfig, *, tp: int, pp: int, world_size: int) -> Layout:
    """The layout with these sizes over ``world_size`` processes; dp takes the rest. Raises LayoutError."""
    tps = [n for n in divisors(model.num_heads) if divides_either_way(model.num_kv_heads, n)]
    tps = [n for n in tps if model.ffn_hidden_size % n == 0]
    if tp not in tps:
        raise LayoutError(
            f"--tp {tp}: this model, with {model.num_heads} heads, {model.num_kv_heads} key-value heads and a "
            f"feed-forward width of {model.ffn_hidden_size}, can be sliced over {', '.join(map(str, tps))}"
        )
    if not 1 <= pp <= model.num_layers:
        raise LayoutError(f"--pp {pp}: the {model.num_layers} layers of this model fill 1 to {model.num_layers} stages")
    if world_size % (tp * pp):
        started = "1 process was" if world_size == 1 else f"{world_size} processes were"
        raise LayoutError(
            f"--tp {tp} and --pp {pp} need {tp * pp} processes, or a multiple of it, and {started} started: "
            f"use --nproc {tp * pp}, or other sizes"
        )
    return Layout(pp=pp, dp=world_size // (tp * pp), tp=tp)


@contextlib.contextmanager
def joined_mesh(
    model: ModelConfig,
    *,
    tp: int,
    pp: int,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    timeout_s: float = 600.0,
) -> Iterator[Mesh]:
    """Joins the world that the launcher described in the environment, or makes one of this process alone.

    timeout_s: longest wait of a rank for the others.

    Raises LayoutError, and what `rendezvous.world` raises.
    """
    with world(device=device, timeout_s=timeout_s) as rendezvous:
        layout = choose_layout(model, tp=tp, pp=pp, world_size=rendezvous.world_size)
        yield build_mesh(layout, device=rendezvous.device, timeout_s=timeout_s)


def load_stage(
    source: Source, *, mesh: Mesh, dtype: torch.dtype, kernels: KernelsConfig | None = None, packs: bool = True
) -> Transformer:
    """This rank's part of the model, in ``dtype`` on its device, without gradients. Reads only this rank's slices.

    packs: the weights of products, where that makes them faster; they are no parameters then, and cannot be looked at.
    """
    stage = build_chunk(
        source.model,
        kernels or KernelsConfig(),
        mesh=mesh,
        precision=Precision(compute=dtype, master=dtype, gradients=dtype),
        chunk_layers=even_stages(source.model.num_layers, mesh.pp.size),
        chunk=mesh.pp.index,
        sequence_parallel=False,
        weights=source.weights(dtype),
    )
    stage.requires_grad_(False).eval()
    if packs and can_pack(dtype, mesh.device):
        if source.model.tie_embeddings and stage.embedding is not None and isinstance(stage.head, LossHead):
            stage.head.weight = stage.embedding.tokens.weight  # one table where two were read: packing adds another
        pack_weights(stage)
    return stage
