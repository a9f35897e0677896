"""What any layout saves, any other loads, bit by bit; and what does not fit is refused before anything is read."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_lite.checkpoint import shards, store
from megatron_lite.checkpoint.chunks import Chunk, GlobalTensor
from megatron_lite.checkpoint.manifest import MANIFEST_FILE
from megatron_lite.checkpoint.store import load, read_manifest, save
from megatron_lite.checkpoint.tensor_files import CheckpointError
from megatron_lite.distributed.worker_pool import WorkerPool
from tests.checkpoint.pure import (
    SPECS,
    Memory,
    PureLayout,
    global_value,
    load_job,
    random_layout,
    save_job,
    tiny_model,
    world,
)

RNG = random.Random(7)
PAIRS = [(random_layout(RNG), random_layout(RNG)) for _ in range(12)]
EVERYTHING = PureLayout(tp=4, dp=2, pp=1)


def one(name: str, values: Tensor) -> GlobalTensor:
    return GlobalTensor(name, tuple(values.shape), values.dtype, (Chunk((0,) * values.ndim, values),))


def save_here(folder: Path, *tensors: GlobalTensor, state: Any = None) -> None:
    save(folder, tensors, state=state or {}, model=tiny_model(), axis=world())


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=lambda layout: "-".join(map(str, dataclasses.astuple(layout))))
def test_any_layout_loads_what_another_saved(
    pool: WorkerPool, one: PureLayout, other: PureLayout, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints" / "step-00000003"
    pool.run(save_job, one.world_size, one, folder, seed=3)
    pool.run(load_job, other.world_size, other, folder, seed=3)
    names = [path.name for path in sorted((tmp_path / "checkpoints").rglob("*"))]
    assert names[:2] == ["step-00000003", MANIFEST_FILE] and len(names) == 2 + one.world_size


def test_what_was_loaded_is_compared(pool: WorkerPool, tmp_path: Path) -> None:
    """Negative control: the job that compares sees another seed's values."""
    pool.run(save_job, 2, PureLayout(tp=2), tmp_path / "step-00000001", seed=1)
    with pytest.raises(RuntimeError, match="differ"):
        pool.run(load_job, 2, PureLayout(dp=2), tmp_path / "step-00000001", seed=2)


def test_the_files_are_safetensors_that_anyone_reads(pool: WorkerPool, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    pool.run(save_job, 8, EVERYTHING, folder)
    manifest = read_manifest(folder)
    files = {name: load_file(folder / name) for name in manifest.files}
    assert len(files) == 8
    for spec in SPECS:
        whole = torch.full(spec.shape, float("nan"))
        for chunk in manifest.tensors[f"weights/{spec.name}"].chunks:
            stored = files[chunk.file].pop(f"weights/{spec.name}@{','.join(map(str, chunk.offsets))}")
            whole[tuple(slice(o, e) for o, e in zip(chunk.box.offsets, chunk.box.ends, strict=True))] = stored
        assert torch.equal(whole, global_value(spec, 1).float()), spec.name
    assert all(name.startswith("adamw.first/") for file in files.values() for name in file)


def test_the_manifest_gives_back_state_and_model(tmp_path: Path) -> None:
    state = {"samples": 12, "lr": 0.1, "random": [1, 2**63], "name": "ü", "none": None}
    save_here(tmp_path / "step-00000001", one("weights/a", torch.ones(3)), state=state)
    manifest = read_manifest(tmp_path / "step-00000001")
    assert manifest.state == state and manifest.model == tiny_model()
    assert manifest.tensors["weights/a"].shape == (3,)
    with pytest.raises(ValueError, match="JSON compliant"):
        save_here(tmp_path / "step-00000002", one("weights/a", torch.ones(3)), state={"loss": float("nan")})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float64])
def test_dtypes_are_converted(stored: torch.dtype, wanted: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(9, 5, dtype=torch.float64).to(stored)
    save_here(tmp_path / "s", one("a", values), one("b", torch.randn(3, dtype=torch.float64)), one("c", values[:3]))
    target, c = torch.empty(9, 5, dtype=wanted), torch.empty(3, 5, dtype=stored)
    load(tmp_path / "s", [one("a", target), one("b", torch.empty(3)), one("c", c)], axis=world())
    assert torch.equal(target, values.to(wanted)) and torch.equal(c, values[:3])


def test_memory_that_is_not_contiguous(tmp_path: Path) -> None:
    values, target = torch.randn(6, 10), torch.zeros(10, 12)
    save_here(tmp_path / "s", one("a", values[:, 2:7].t()), one("scalar", torch.tensor(2.0)))
    scalar = torch.zeros(())
    load(tmp_path / "s", [one("a", target[::2, 6:]), one("scalar", scalar)], axis=world())
    assert torch.equal(target[::2, 6:], values[:, 2:7].t()) and scalar == 2
    target[::2, 6:] = 0
    assert not target.any(), "nothing beside the target was written"


def test_one_name_may_fill_two_places(tmp_path: Path) -> None:
    """A tied table that is loaded into a model with an embedding and a head of its own."""
    values, embedding, head = torch.randn(4, 4), torch.zeros(4, 4), torch.zeros(2, 4)
    save_here(tmp_path / "s", one("table", values))
    head_tensor = GlobalTensor("table", (4, 4), torch.float32, (Chunk((2, 0), head),))
    load(tmp_path / "s", [one("table", embedding), head_tensor], axis=world())
    assert torch.equal(embedding, values) and torch.equal(head, values[2:])


def test_a_checkpoint_of_another_model_is_refused_before_a_byte_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_here(tmp_path / "s", one("same", torch.ones(2)), one("wide", torch.ones(4, 6)), one("theirs", torch.ones(1)))
    mine = [one("same", torch.zeros(2)), one("wide", torch.zeros(4, 8)), one("ours", torch.zeros(3))]
    monkeypatch.setattr(shards, "VerifiedFile", None)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "s", mine, axis=world())
    message = str(caught.value)
    assert "another model" in message and "lacks 1 of this model's 3 tensors: ours" in message
    assert "1 that this model has not: theirs" in message and "wide is [4, 6] there and [4, 8] here" in message
    assert "same" not in message.replace("same_", "")
    assert not mine[0].chunks[0].values.any()


def mismatch_job(folder: Path) -> str:
    axis = world()
    try:
        load(folder, [one(f"only-{axis.index}", torch.zeros(3))], axis=axis)
    except CheckpointError as error:
        return str(error)
    return ""


def test_every_rank_says_what_all_ranks_lack(pool: WorkerPool, tmp_path: Path) -> None:
    save_here(tmp_path / "s", one("only-0", torch.ones(3)), one("more", torch.ones(3)))
    messages = pool.run(mismatch_job, 2, tmp_path / "s")
    assert messages[0] == messages[1] and "only-1" in messages[0] and "more" in messages[0]


def test_all_tensors_of_a_tied_model_are_not_enough_for_extra_ones(tmp_path: Path) -> None:
    """Untied into tied: what the head was would be lost."""
    save_here(tmp_path / "s", one("embedding", torch.ones(3)), one("head", torch.ones(3)))
    with pytest.raises(CheckpointError, match="has 1 that this model has not: head"):
        load(tmp_path / "s", [one("embedding", torch.zeros(3))], axis=world())


def reading_job(folder: Path) -> tuple[int, int]:
    """(bytes read, bytes wanted) by this rank."""
    axis, read, preadv = world(), [0], os.preadv

    def count(*arguments: Any) -> int:
        read.append(preadv(*arguments))
        return read[-1]

    os.preadv = count
    try:
        rows = torch.zeros(1024 // axis.size, 4096)
        chunk = Chunk((axis.index * len(rows), 0), rows)
        load(folder, [GlobalTensor("big", (1024, 4096), torch.float32, (chunk,))], axis=axis)
    finally:
        os.preadv = preadv
    assert bool((rows == 1).all())
    return sum(read), rows.nbytes


def test_a_rank_reads_only_what_it_needs(pool: WorkerPool, tmp_path: Path) -> None:
    """Up to the blocks that a slice begins and ends in."""
    save_here(tmp_path / "s", one("big", torch.ones(1024, 4096)))
    for read, wanted in pool.run(reading_job, 2, tmp_path / "s"):
        assert wanted <= read <= wanted + 2 * shards.BLOCK_BYTES < 2 * wanted


def overlapping_job(folder: Path, is_hole: bool) -> str:
    axis = world()
    rows = torch.zeros(2, 3)
    first = axis.index * (3 if is_hole else 1)
    tensor = GlobalTensor("a", (5 if is_hole else 3, 3), torch.float32, (Chunk((first, 0), rows),))
    try:
        save(folder, [tensor], state={}, model=tiny_model(), axis=axis)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("is_hole", [True, False])
def test_ranks_that_do_not_have_a_tensor_exactly_once(pool: WorkerPool, is_hole: bool, tmp_path: Path) -> None:
    messages = pool.run(overlapping_job, 2, tmp_path / "checkpoints" / "s", is_hole)
    assert messages[0] == messages[1] and ("12 of its 15" if is_hole else "overlap") in messages[0]
    assert not (tmp_path / "checkpoints").exists(), "nothing was written"


def test_a_step_is_replaced_by_a_later_save_of_it(pool: WorkerPool, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    pool.run(save_job, 4, PureLayout(dp=4), folder, seed=1)
    pool.run(save_job, 2, PureLayout(tp=2), folder, seed=2)
    pool.run(load_job, 1, PureLayout(), folder, seed=2)
    assert len(list(folder.iterdir())) == 3 and [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_save_removes_what_killed_ones_left(tmp_path: Path) -> None:
    for name in (".step-00000001.partial", ".step-00000002.old", ".step-00000002.partial", "step-00000002", ".mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / ".step-00000004.old").mkdir()
    save_here(tmp_path / "step-00000005", one("a", torch.ones(1)))
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".mine", "step-00000002", "step-00000004", "step-00000005"], "4 had lost its name, and has it again"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_is_replaced_where_the_system_cannot_exchange(
    can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_lite.checkpoint import folders

    if not can_exchange:
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    for value in (1.0, 2.0):
        save_here(tmp_path / "step-00000001", one("a", torch.full((3,), value)))
    target = torch.zeros(3)
    load(tmp_path / "step-00000001", [one("a", target)], axis=world())
    assert target[0] == 2 and [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_exchange_works_here(tmp_path: Path) -> None:
    """The case above would not notice if it never did."""
    from megatron_lite.checkpoint.folders import _exchange

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not _exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system or file system does not exchange folders")
    assert (tmp_path / "a" / "b").exists() and (tmp_path / "b" / "a").exists()


def test_weights_that_are_not_numbers_are_neither_saved_nor_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = torch.ones(4, 300_000)
    for value in (float("nan"), float("inf"), -float("inf")):
        bad[3, 7] = value
        with pytest.raises(CheckpointError, match=r"weights/bad holds values that are not numbers .* lower optim\.lr"):
            save_here(tmp_path / "s", one("weights/good", torch.ones(3)), one("weights/bad", bad))
        assert list(tmp_path.iterdir()) == []
    huge = one("weights/huge", torch.full((8,), 3e38))
    save_here(tmp_path / "huge", huge)  # the sum is infinite, the values are not
    load(tmp_path / "huge", [huge], axis=world())
    monkeypatch.setattr(shards, "is_finite", lambda values: True)
    save_here(tmp_path / "s", one("weights/bad", bad))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"bad holds values that are not numbers .* an earlier checkpoint"):
        load(tmp_path / "s", [one("weights/bad", torch.zeros(4, 300_000))], axis=world())


def test_the_manifest_is_all_that_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill before the rename leaves a folder that is no checkpoint: it has no manifest until the files are safe."""
    seen: list[list[str]] = []
    monkeypatch.setattr(
        store.FolderWriter, "_check_visible", lambda self, files: seen.append(os.listdir(self._pending.path))
    )
    save_here(tmp_path / "step-00000001", one("a", torch.ones(1)))
    assert seen == [["rank-00000.safetensors"]]
    assert json.loads((tmp_path / "step-00000001" / MANIFEST_FILE).read_text())["format"] == 1


def test_memory_of_the_tests_has_gaps() -> None:
    """NaN lies between the parameters: a save that took a gap along would be refused, a load would show."""
    assert Memory(EVERYTHING, 0).filled(1).isnan().any()
