"""A run's weights: the same tensors from every layout, for every layout, whole or not at all."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_lite.checkpoint.tensor_files import CheckpointError
from megatron_lite.checkpoint.weights import iterate_weights, load_weights
from megatron_lite.config.load import load_config
from megatron_lite.config.schema import ModelConfig, RunConfig
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.models.families import parameter_table
from megatron_lite.models.initial import initial_shard
from megatron_lite.train.build import Training, build, layout_of
from megatron_lite.train.loop import save

LAYOUTS = {
    "single": (1, []),
    "pp2": (2, ["parallel.pp=2"]),
    "tp4": (4, ["parallel.tp=4"]),
    "tp2-pp2-dp2": (8, ["parallel.tp=2", "parallel.pp=2", "parallel.dp=2"]),
}
FAMILIES = {
    "llama-tied": ["model.family=llama", "model.num_kv_heads=1", "model.tie_embeddings=true"],
    "llama": ["model.family=llama", "model.num_kv_heads=2"],
    "gpt2": ["model.family=gpt2"],
}
BASE = [
    "model.vocab_size=101", "model.hidden_size=32", "model.num_layers=3", "model.num_heads=4",
    "model.ffn_hidden_size=48", "model.max_seq_len=16", "train.seq_len=16", "train.global_batch_size=8",
    "train.num_steps=1", "train.seed=3",
]  # fmt: skip


def make(overrides: list[str]) -> Training:
    config = load_config(None, overrides, world_size=torch.distributed.get_world_size())
    return build(config, mesh=build_mesh(layout_of(config), device=torch.device("cpu")))


def save_job(overrides: list[str], folder: Path) -> None:
    save(make(overrides), folder)


def load_job(overrides: list[str], folder: Path) -> dict[str, Tensor]:
    """This rank's parameters, from the weights in ``folder`` and not from the seed."""
    config = load_config(None, [*overrides, "train.seed=4"], world_size=torch.distributed.get_world_size())
    mesh = build_mesh(layout_of(config), device=torch.device("cpu"))
    model, weights = load_weights(folder, torch.float64)
    assert ModelConfig(**model) == config.model
    training = build(config, mesh=mesh, weights=weights)
    tp = mesh.tp
    for name, parameter in training.stage.named_parameters(remove_duplicate=False):
        expected = initial_shard(training.table[name], 3, tp.size, tp.index, torch.float32)
        assert torch.equal(parameter, expected), name
    return {name: parameter.detach() for name, parameter in training.stage.named_parameters()}


def config_of(overrides: list[str], world_size: int = 1) -> RunConfig:
    return load_config(None, overrides, world_size=world_size)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_writes_the_initial_weights_whole(
    pool: WorkerPool, family: str, layout: str, tmp_path: Path
) -> None:
    world_size, parallel = LAYOUTS[layout]
    pool.run(save_job, world_size, [*BASE, *FAMILIES[family], *parallel], tmp_path / "weights")
    table = parameter_table(config_of(BASE + FAMILIES[family]).model)
    stored = list(iterate_weights(tmp_path / "weights"))
    assert [name for name, _ in stored] == [spec.name for spec in table if spec.tied_to is None]
    for name, tensor in stored:
        assert torch.equal(tensor, initial_shard(table[name], 3, 1, 0, torch.float32)), name
    files = sorted(path.name for path in (tmp_path / "weights").glob("*"))
    stages = 2 if "pp2" in layout else 1
    assert files == [*(f"stage-{s:05d}-of-{stages:05d}.safetensors" for s in range(stages)), "weights.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_layouts_with_the_same_stages_write_the_same_bytes(pool: WorkerPool, tmp_path: Path) -> None:
    for layout in ("pp2", "tp2-pp2-dp2"):
        world_size, parallel = LAYOUTS[layout]
        pool.run(save_job, world_size, [*BASE, *FAMILIES["llama"], *parallel], tmp_path / layout)
    one, other = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("pp2", "tp2-pp2-dp2"))
    assert one == other


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_reads_what_another_wrote(pool: WorkerPool, family: str, layout: str, tmp_path: Path) -> None:
    overrides = BASE + FAMILIES[family]
    pool.run(save_job, 8, [*overrides, *LAYOUTS["tp2-pp2-dp2"][1]], tmp_path / "weights")
    world_size, parallel = LAYOUTS[layout]
    pool.run(load_job, world_size, [*overrides, *parallel], tmp_path / "weights")


def disagreeing_job(overrides: list[str], folder: Path) -> str:
    """One tp rank holds another copy of a norm: a bug that must not be written over."""
    training = make(overrides)
    if training.mesh.tp.index == 1 and training.mesh.pp.is_first:
        with torch.no_grad():
            training.stage.layers["0"].attention_norm.weight[0] += 1
    return error_of(training, folder)


def full_disk_job(overrides: list[str], folder: Path, failing_rank: int) -> str:
    """The disk is full for one rank, after it has written a part of its file."""
    training = make(overrides)
    if training.mesh.rank == failing_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        return error_of(training, folder)
    finally:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def error_of(training: Training, folder: Path) -> str:
    try:
        save(training, folder)
    except CheckpointError as error:
        return str(error)
    return ""


def test_copies_that_differ_are_not_written(pool: WorkerPool, tmp_path: Path) -> None:
    overrides = [*BASE, *FAMILIES["llama"], *LAYOUTS["tp2-pp2-dp2"][1]]
    messages = pool.run(disagreeing_job, 8, overrides, tmp_path / "weights")
    assert all("attention_norm.weight: tp ranks 0 and 1 hold different copies" in text for text in messages)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_on_one_rank_is_said_by_all_and_spoils_nothing(pool: WorkerPool, tmp_path: Path) -> None:
    overrides = [*BASE, *FAMILIES["llama"], *LAYOUTS["tp2-pp2-dp2"][1]]
    pool.run(save_job, 8, overrides, tmp_path / "weights")
    before = {path.name: path.read_bytes() for path in (tmp_path / "weights").iterdir()}
    # rank 4 is the first of the second stage
    messages = pool.run(full_disk_job, 8, overrides, tmp_path / "weights", 4)
    assert len(set(messages)) == 1
    assert "stage-00001-of-00002.safetensors: no space left to write it" in messages[0]
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "weights").iterdir()} == before


def test_new_weights_replace_old_ones(pool: WorkerPool, tmp_path: Path) -> None:
    overrides = [*BASE, *FAMILIES["llama"]]
    pool.run(save_job, 2, [*overrides, "parallel.pp=2"], tmp_path / "weights")
    pool.run(save_job, 1, [*overrides, "train.seed=9"], tmp_path / "weights")
    assert len(list((tmp_path / "weights").glob("*.safetensors"))) == 1
    table = parameter_table(config_of(overrides).model)
    stored = dict(iterate_weights(tmp_path / "weights"))
    assert torch.equal(stored["head.weight"], initial_shard(table["head.weight"], 9, 1, 0, torch.float32))
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_a_folder_that_is_incomplete_or_of_something_else(pool: WorkerPool, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    with pytest.raises(CheckpointError, match=r"weights\.json: there is no such file"):
        load_weights(folder, torch.float32)
    pool.run(save_job, 2, [*BASE, *FAMILIES["gpt2"], "parallel.pp=2"], folder)
    last = folder / "stage-00001-of-00002.safetensors"
    content = last.read_bytes()
    assert "final_norm.weight" in load_file(last)
    last.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=f"{last.name}: is truncated"):
        load_weights(folder, torch.float32)
    last.unlink()
    with pytest.raises(CheckpointError, match=f"{last.name}: there is no such file"):
        iterate_weights(folder)
    description = json.loads((folder / "weights.json").read_text())
    description["files"] = {name: file for name, file in description["files"].items() if file != last.name}
    (folder / "weights.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="tensors are missing"):
        load_weights(folder, torch.float32)
    (folder / "weights.json").write_text(json.dumps(description | {"format": 2}))
    with pytest.raises(CheckpointError, match="not of a version"):
        load_weights(folder, torch.float32)
    (folder / "weights.json").write_text(json.dumps(description | {"model": {"family": "llama"}}))
    with pytest.raises(CheckpointError, match="does not describe a model"):
        load_weights(folder, torch.float32)
