"""What one layout saved, another loads: 50 random pairs of layouts, and what is special about tied embeddings.

Layout A takes two steps, saves, and takes two more. Layout B loads and takes the same two. What was loaded is compared
in every bit, as whole tensors put together from the engine's memory, not from what the checkpoint code says of it; the
steps after it within the design's bounds, and in every bit where tp and dp agree.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.config import RunConfig, load_config
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.worker_pool import WorkerError, WorkerPool
from megatron_lite.models.families import parameter_table
from megatron_lite.models.identity import assemble, same_bits
from megatron_lite.optim.state_sizes import state_kinds
from megatron_lite.train.build import Training, build, layout_of
from megatron_lite.train.checkpoints import Checkpointer, Position, blank_weights, restore
from megatron_lite.train.step import train_step
from megatron_lite.verify.layouts import ZERO_STAGES, ProofLayout, matrix
from megatron_lite.verify.proof import BOUNDS, relative_difference
from megatron_lite.verify.trial import perturbed_weights, proof_batch
from megatron_lite.zero.bucket import Bucket

NUM_PAIRS, SEED = 50, 3
STEPS = 2
# 37 words divide by no tp. Fewer key-value heads than tp = 4, and than tp = 2.
_COMMON = (
    "model.hidden_size=32", "model.num_layers=4", "model.num_heads=4", "model.max_seq_len=8", "model.vocab_size=37",
    "train.seq_len=8", "train.global_batch_size=8", "train.num_steps=8", "train.precision=fp64", "optim.lr=1e-2",
    "run.name=saved",
)  # fmt: skip
MODELS = {
    "llama-2kv": ("model.family=llama", "model.ffn_hidden_size=48", "model.num_kv_heads=2"),
    "llama-1kv-tied": (
        "model.family=llama", "model.ffn_hidden_size=48", "model.num_kv_heads=1", "model.tie_embeddings=true",
    ),
    # Biases of a key-value head that ranks hold more than once.
    "qwen2-1kv": ("model.family=qwen2", "model.ffn_hidden_size=48", "model.num_kv_heads=1"),
    "gpt2-tied": ("model.family=gpt2",),
    "gpt2-untied": ("model.family=gpt2", "model.tie_embeddings=false"),
}  # fmt: skip


def config_of(model: str, folder: Path, *more: str) -> RunConfig:
    return load_config(None, [*_COMMON, *MODELS[model], f"run.dir={folder}", *more])


def random_pairs() -> list[tuple[str, ProofLayout, ProofLayout]]:
    """One of the two layouts has at most four ranks, so that the test takes seconds. Every model takes all of them."""
    chance, layouts = random.Random(SEED), matrix()
    small = [layout for layout in layouts if layout.world_size <= 4]
    pairs = []
    for _ in range(NUM_PAIRS):
        sides = [chance.choice(layouts), chance.choice(small)]
        chance.shuffle(sides)
        pairs.append((chance.choice(list(MODELS)), sides[0], sides[1]))
    return pairs


@dataclass(frozen=True)
class Report:
    """What one rank of a job has: its shards, whole over dp, after loading or before saving, and two steps later."""

    tp_index: int
    dp_index: int
    shards: dict[str, Tensor]
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    later: dict[str, Tensor]


def shards_of(training: Training) -> dict[str, Tensor]:
    """Weights and state of every parameter on this stage, from the engine's memory."""
    engine, optim, shards = training.engine, training.config.optim, {}
    for name, parameter in training.named_parameters():
        shards[f"weights/{name}"] = engine.whole_master(name)
        for kind in state_kinds(optim, name, parameter.shape):
            shards[f"{optim.name}.{kind}/{name}"] = engine._whole(name, functools.partial(state_in, training, kind))
        if training.config.parallel.zero_stage < 3:  # else it is there only while it is used
            assert same_bits(parameter.detach(), shards[f"weights/{name}"].to(parameter.dtype)), "not gathered"
    return shards


def state_in(training: Training, kind: str, bucket: Bucket) -> Tensor:
    """A kind of state as long as the bucket's region, with zeros where there is none of it."""
    values, region = torch.zeros_like(bucket.master), bucket.region
    for start, held in training.optimizer_states[bucket.layout.name].parts(kind, region.start, region.stop):
        values[start - region.start :][: held.numel()] = held
    return values


def take_steps(training: Training, first: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    config, mesh = training.config, training.mesh
    steps = range(first, first + STEPS)
    results = [train_step(training, list(proof_batch(config, step, mesh.dp.index))) for step in steps]
    return tuple(result.loss for result in results), tuple(result.grad_norm for result in results)


def save_job(config: RunConfig) -> Report:
    mesh = build_mesh(layout_of(config), device=torch.device("cpu"))
    training = build(config, mesh=mesh, weights=perturbed_weights(config))
    take_steps(training, 0)
    shards = shards_of(training)
    with Checkpointer(training) as checkpoints:
        checkpoints.save(Position(STEPS, STEPS * config.train.global_batch_size, 0), wait=True)
    losses, grad_norms = take_steps(training, STEPS)
    return Report(mesh.tp.index, mesh.dp.index, shards, losses, grad_norms, shards_of(training))


def load_job(config: RunConfig, folder: Path, forgets: str = "") -> Report:
    mesh = build_mesh(layout_of(config), device=torch.device("cpu"))
    training = build(config, mesh=mesh, weights=blank_weights(torch.float64))
    position = restore(training, read_manifest(folder))
    assert position == Position(STEPS, STEPS * config.train.global_batch_size, 0)
    for state in training.optimizer_states.values():
        if forgets == "moments":
            state.tensors["first"].zero_()
        elif forgets == "steps":
            state.num_steps = 0
    shards = shards_of(training)
    losses, grad_norms = take_steps(training, position.step)
    return Report(mesh.tp.index, mesh.dp.index, shards, losses, grad_norms, shards_of(training))


def whole(config: RunConfig, reports: list[Report], what: str) -> dict[str, Tensor]:
    """Global tensors from the shards of all ranks; data-parallel replicas have to agree in every bit."""
    tensors = {}
    for spec in parameter_table(config.model):
        kinds = [f"{config.optim.name}.{kind}" for kind in state_kinds(config.optim, spec.name, spec.shape)]
        for kind in ("weights", *kinds):
            key = f"{kind}/{spec.name}"
            by_tp: dict[int, Tensor] = {}
            for report in reports:
                shard = getattr(report, what).get(key)
                if shard is not None:
                    assert same_bits(by_tp.setdefault(report.tp_index, shard), shard), f"replicas of {key} differ"
            tensors[key] = assemble(spec, [by_tp[index] for index in sorted(by_tp)])
    return tensors


def save_and_load(
    pool: WorkerPool,
    folder: Path,
    model: str,
    saved: ProofLayout,
    loaded: ProofLayout,
    forgets: str = "",
    more: tuple[str, ...] = (),
) -> tuple[RunConfig, list[Report], list[Report]]:
    config = config_of(model, folder, *more)
    before = pool.run(save_job, saved.world_size, saved.apply(config), timeout_s=120, threads=1)
    checkpoint = folder / "saved" / "checkpoints" / f"step-{STEPS:08d}"
    after = pool.run(load_job, loaded.world_size, loaded.apply(config), checkpoint, forgets, timeout_s=120, threads=1)
    return config, before, after


PAIRS = random_pairs()


def test_the_pairs_have_every_kind_of_layout_on_both_sides() -> None:
    assert len(PAIRS) == NUM_PAIRS
    assert {model for model, _, _ in PAIRS} == set(MODELS)
    for side in (1, 2):
        layouts = [pair[side] for pair in PAIRS]
        assert isinstance(layouts[0], ProofLayout)
        for axis in ("tp", "pp", "dp"):
            assert {getattr(layout, axis) for layout in layouts} == {1, 2, 4}, axis
        assert {layout.schedule for layout in layouts} == {"1f1b", "gpipe"}
        assert {layout.zero_stage for layout in layouts if layout.dp > 1} == set(ZERO_STAGES)
        assert {layout.sequence_parallel for layout in layouts} == {False, True}
        assert max(layout.world_size for layout in layouts) == 8


@pytest.mark.slow
@pytest.mark.parametrize(("model", "saved", "loaded"), PAIRS, ids=lambda value: str(value))
def test_another_layout_goes_on(
    pool: WorkerPool, tmp_path: Path, model: str, saved: ProofLayout, loaded: ProofLayout
) -> None:
    config, before, after = save_and_load(pool, tmp_path, model, saved, loaded)
    expected, found = whole(config, before, "shards"), whole(config, after, "shards")
    assert [name for name in expected if not same_bits(expected[name], found[name])] == []
    assert all(value.abs().max() > 0 for value in found.values()), "zeros prove nothing"

    is_bitwise = loaded.base() == saved.base()
    expected, found = whole(config, before, "later"), whole(config, after, "later")
    expected["losses"], found["losses"] = (torch.tensor(reports[0].losses) for reports in (before, after))
    expected["norms"], found["norms"] = (torch.tensor(reports[0].grad_norms) for reports in (before, after))
    for name, value in expected.items():
        if is_bitwise:
            assert same_bits(value, found[name]), name
        else:
            assert relative_difference(found[name], value) < BOUNDS["float64"], name


@pytest.mark.parametrize("forgets", ["moments", "steps"])
def test_what_is_forgotten_shows(pool: WorkerPool, tmp_path: Path, forgets: str) -> None:
    """Negative control: a load that leaves out the first moments, or how many steps their bias is corrected for."""
    layout = ProofLayout(tp=2)
    config, before, after = save_and_load(pool, tmp_path, "llama-2kv", layout, layout, forgets)
    expected, found = whole(config, before, "later"), whole(config, after, "later")
    differing = [name for name in expected if not same_bits(expected[name], found[name])]
    assert len(differing) == len(expected), "every tensor of the steps after it"


@pytest.mark.parametrize("layout", [ProofLayout(), ProofLayout(pp=2, dp=2), ProofLayout(tp=2)], ids=str)
def test_a_tied_checkpoint_gives_an_untied_head_the_values_of_the_embedding(
    pool: WorkerPool, tmp_path: Path, layout: ProofLayout
) -> None:
    tied = config_of("llama-1kv-tied", tmp_path)
    before = pool.run(save_job, 4, ProofLayout(pp=2, dp=2).apply(tied), timeout_s=120, threads=1)
    checkpoint = tmp_path / "saved" / "checkpoints" / f"step-{STEPS:08d}"
    untied = config_of("llama-1kv-tied", tmp_path, "model.tie_embeddings=false")
    after = pool.run(load_job, layout.world_size, layout.apply(untied), checkpoint, timeout_s=120, threads=1)
    expected, found = whole(tied, before, "shards"), whole(untied, after, "shards")
    assert not any("head" in name for name in read_manifest(checkpoint).tensors)
    for name, value in found.items():
        assert same_bits(value, expected[name]), name
    later = whole(untied, after, "later")
    assert not same_bits(later["weights/head.weight"], later["weights/embedding.tokens.weight"]), "two tables now"


def test_an_untied_checkpoint_is_refused_by_a_tied_model(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(save_job, 1, ProofLayout().apply(config_of("gpt2-untied", tmp_path)), timeout_s=120, threads=1)
    checkpoint = tmp_path / "saved" / "checkpoints" / f"step-{STEPS:08d}"
    with pytest.raises(WorkerError, match=r"it has 3 that this model has not: .*head\.weight"):
        pool.run(load_job, 1, ProofLayout().apply(config_of("gpt2-tied", tmp_path)), checkpoint, timeout_s=120)
