"""One layout's run of a few steps, as each rank sees it. This is what the processes of a proof execute."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_lite.config.schema import RunConfig
from megatron_lite.data.loader import Microbatch
from megatron_lite.data.order import batch_indices
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.models.families import parameter_table
from megatron_lite.models.identity import ParameterSpec, WeightSource, assemble
from megatron_lite.models.initial import initial_shard
from megatron_lite.ops.cross_entropy_shard import IGNORED_TARGET
from megatron_lite.train.build import build, layout_of
from megatron_lite.train.faults import remove_reduction
from megatron_lite.train.step import apply_gradients, compute_gradients, loss_scale
from megatron_lite.utils.random import generator, standard_normal

IGNORED_SHARE = 0.2


@dataclass(frozen=True)
class RankReport:
    """What one rank knows at the end. Shards are by global name; only the first data-parallel rank sends them.

    losses, grad_norms: by step. gradients: of step 1, of the loss itself, not clipped. digest: of all parameters and
    gradients of this rank, for comparing data-parallel replicas.
    """

    tp_index: int
    pp_index: int
    dp_index: int
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    digest: str


def run_trial(config: RunConfig, num_steps: int, without: str | None = None) -> RankReport:
    """Trains ``num_steps`` steps of ``config`` (its ``parallel.dp`` is known) on generated tokens."""
    mesh = build_mesh(layout_of(config), device=torch.device("cpu"), zero_group=config.parallel.zero_group)
    training = build(config, mesh=mesh, weights=perturbed_weights(config))
    if without is not None:
        remove_reduction(training, without)
    names = [name for name, _ in training.named_parameters()]
    losses, grad_norms, gradients = [], [], {}
    for step in range(num_steps):
        loss, _ = compute_gradients(training, list(proof_batch(config, step, mesh.dp.index)))
        if step == 0:
            gradients = {name: training.engine.whole_gradient(name) / loss_scale(training) for name in names}
        norm, _ = apply_gradients(training)
        losses.append(loss)
        grad_norms.append(norm)
    parameters = {name: training.engine.whole_master(name) for name in names}
    training.memory.close()
    digest = hashlib.sha256()
    for tensor in (*gradients.values(), *parameters.values()):
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    sends = mesh.dp.is_first
    return RankReport(
        mesh.tp.index,
        mesh.pp.index,
        mesh.dp.index,
        tuple(losses),
        tuple(grad_norms),
        gradients if sends else {},
        parameters if sends else {},
        digest.hexdigest(),
    )


def perturbed_weights(config: RunConfig) -> WeightSource:
    """Initial weights with noise on top of what starts at one or zero: a norm that is all ones hides mistakes.

    They are rounded to float32, so that a float32 run starts from exactly what the float64 reference starts from.
    """
    seed, dtype = config.train.seed, torch.float32

    def source(spec: ParameterSpec, tp: int, index: int) -> Tensor:
        shard = initial_shard(spec, seed, tp, index, dtype)
        if spec.init == "normal":
            return shard
        noise = standard_normal(seed, f"{spec.name}/noise", 0, spec.numel).reshape(spec.shape)
        return shard + spec.take_shard(torch.from_numpy(0.1 * noise).to(dtype), tp, index)

    return source


def proof_batch(config: RunConfig, step: int, dp_index: int) -> Iterator[Microbatch]:
    """This data-parallel rank's microbatches of generated tokens: a function of the seed and the sample's number.

    A share of the targets, different in each sample, is ignored, so that a mean of means is not the mean. With
    ``data.isolate_documents`` each sample is cut into three documents.
    """
    train = config.train
    rows = batch_indices(
        step * train.global_batch_size, train.global_batch_size, config.dp, dp_index, train.micro_batch_size
    )
    for samples in rows:
        parts = [_proof_sample(config, sample) for sample in samples]
        tokens, targets, documents, positions = (torch.from_numpy(np.stack(part)) for part in zip(*parts, strict=True))
        isolated = config.data.isolate_documents
        yield Microbatch(tokens, targets, documents if isolated else None, positions if isolated else None)


def _proof_sample(config: RunConfig, sample: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    length = config.train.seq_len
    random = generator(config.train.seed, "proof tokens", sample)
    tokens = random.integers(0, config.model.vocab_size, length + 1)
    targets = tokens[1:].copy()
    targets[random.random(length) < IGNORED_SHARE * 2 * random.random()] = IGNORED_TARGET
    starts = np.sort(random.integers(0, length, 2))
    documents = np.searchsorted(starts, np.arange(length), side="right").astype(np.int32)
    first = np.concatenate(([0], starts))[documents]
    return tokens[:-1], targets, documents, np.arange(length) - first


class InconsistentRanks(ValueError):
    """Ranks that should hold the same values do not. ``parameter``: of which parameter, if one is known."""

    def __init__(self, message: str, parameter: str = "") -> None:
        super().__init__(message)
        self.parameter = parameter


def global_tensors(config: RunConfig, reports: list[RankReport], what: str) -> dict[str, Tensor]:
    """The global ``gradients`` or ``parameters`` from the shards of all ranks, in the order of the model's table.

    Raises InconsistentRanks if copies of the same values differ between ranks.
    """
    by_place = {(r.pp_index, r.tp_index): r for r in reports if r.dp_index == 0}
    for report in reports:
        if report.digest != by_place[report.pp_index, report.tp_index].digest:
            raise InconsistentRanks(f"data-parallel ranks 0 and {report.dp_index} hold different values")
    tensors = {}
    for spec in parameter_table(config.model):
        holders = sorted((r for r in by_place.values() if spec.name in r.parameters), key=lambda r: r.tp_index)
        try:
            tensors[spec.name] = assemble(spec, [getattr(r, what)[spec.name] for r in holders])
        except ValueError as error:
            raise InconsistentRanks(f"{what.removesuffix('s')} of {error}", spec.name) from error
    return tensors
