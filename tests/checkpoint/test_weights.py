"""The weights in a checkpoint: the same shards for every layout, from whatever folder a user names."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_lite.checkpoint.chunks import Chunk, GlobalTensor, chunks_of
from megatron_lite.checkpoint.store import save
from megatron_lite.checkpoint.tensor_files import CheckpointError
from megatron_lite.checkpoint.weights import find_checkpoint, iterate_weights, open_weights
from megatron_lite.config.schema import ModelConfig
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.models.families import parameter_table
from megatron_lite.models.identity import ParameterSpec
from megatron_lite.models.initial import initial_shard
from tests.checkpoint.pure import tiny_model, world

FAMILIES = {
    "llama": tiny_model(),
    "llama-tied": tiny_model(tie_embeddings=True),
    "gpt2": tiny_model(family="gpt2", num_kv_heads=4),
}


def value(spec: ParameterSpec) -> Tensor:
    """Whole, and random in norms and biases too."""
    return initial_shard(dataclasses.replace(spec, init="normal"), 3, 1, 0, torch.float32)


def save_job(model: ModelConfig, folder: Path) -> None:
    """Weights and a moment, each rank of a tensor-parallel world its own."""
    axis, tensors = world(), []
    for spec in parameter_table(model):
        if spec.tied_to is not None:
            continue
        local = spec.take_shard(value(spec), axis.size, axis.index).flatten()
        chunks = tuple(chunks_of(spec, axis.size, axis.index, local, 0, owned_only=True))
        moments = tuple(Chunk(chunk.offsets, chunk.values * 0) for chunk in chunks)
        tensors.append(GlobalTensor(f"weights/{spec.name}", spec.shape, torch.float32, chunks))
        tensors.append(GlobalTensor(f"adamw.first/{spec.name}", spec.shape, torch.float32, moments))
    save(folder, tensors, state={}, model=model, axis=axis)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> ModelConfig:
    return FAMILIES[request.param]


def test_every_rank_of_every_layout_gets_its_shards(pool: WorkerPool, family: ModelConfig, tmp_path: Path) -> None:
    pool.run(save_job, 4, family, tmp_path / "step-00000001")
    model, weights = open_weights(tmp_path / "step-00000001")
    assert model == family
    table = parameter_table(model)
    for dtype in (torch.float32, torch.float64):
        source = weights(dtype)
        for spec in table:
            whole = value(table[spec.tied_to] if spec.tied_to else spec).to(dtype)
            for tp in (1, 2, 4):
                for index in range(tp):
                    assert torch.equal(source(spec, tp, index), spec.take_shard(whole, tp, index)), (spec.name, tp)


def test_the_whole_weights_in_the_order_of_the_table(family: ModelConfig, tmp_path: Path) -> None:
    save_job(family, tmp_path / "step-00000001")
    stored = list(iterate_weights(tmp_path))
    specs = [spec for spec in parameter_table(family) if spec.tied_to is None]
    assert [name for name, _ in stored] == [spec.name for spec in specs]
    assert all(torch.equal(tensor, value(spec)) for (_, tensor), spec in zip(stored, specs, strict=True))


def test_an_untied_model_gets_the_tied_values_for_its_head(tmp_path: Path) -> None:
    save_job(FAMILIES["llama-tied"], tmp_path / "step-00000001")
    table = parameter_table(FAMILIES["llama"])
    head = open_weights(tmp_path)[1](torch.float32)(table["head.weight"], 1, 0)
    assert torch.equal(head, value(table["embedding.tokens.weight"]))


def test_the_folder_may_be_a_run_its_checkpoints_or_one_of_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    first, last = (run / "checkpoints" / f"step-{step:08d}" for step in (9, 10))
    save_job(FAMILIES["llama"], first)
    shutil.copytree(first, last)
    shutil.copytree(first, last.with_name(".step-00000011.partial"))
    assert find_checkpoint(run) == find_checkpoint(run / "checkpoints") == find_checkpoint(last) == last
    assert find_checkpoint(first) == first
    (last / "rank-00000.safetensors").write_bytes(b"")
    assert find_checkpoint(run) == first, "truncated"
    with pytest.raises(CheckpointError, match="has 0 bytes"):
        open_weights(last)
    assert [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()] == [
        f"warning: skipped {last.name}: {last / 'rank-00000.safetensors'}: has 0 bytes and was written with "
        f"{(first / 'rank-00000.safetensors').stat().st_size:,}"
    ]
    shutil.rmtree(first)
    with pytest.raises(CheckpointError, match=r"none of its 1 checkpoints is whole; step-00000010: .* has 0 bytes"):
        open_weights(run)
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="has no checkpoint; name the folder of a run"):
            open_weights(folder)


def test_what_is_missing_or_damaged(tmp_path: Path) -> None:
    folder, model = tmp_path / "step-00000001", FAMILIES["gpt2"]
    save_job(model, folder)
    path = folder / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    _, weights = open_weights(folder)
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors: is damaged"):
        weights(torch.float32)(parameter_table(model)["embedding.tokens.weight"], 1, 0)
    # the tensors of one model under the name of another
    table = parameter_table(model)
    part = [
        GlobalTensor(f"weights/{spec.name}", spec.shape, torch.float32, (Chunk((0,) * len(spec.shape), value(spec)),))
        for spec in table
        if spec.tied_to is None and spec.name != "final_norm.weight"
    ]
    save(folder, part, state={}, model=model, axis=world())
    with pytest.raises(CheckpointError, match=r"another model: it lacks 1 of .* weights/final_norm\.weight"):
        open_weights(folder)
    save(folder, part, state={}, model=FAMILIES["llama"], axis=world())
    with pytest.raises(CheckpointError, match=r"another model: it lacks .* it has .* that this model has not"):
        open_weights(folder)
