"""Checkpoints that are not what they were, and files that never were: refused with a message that names the file."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lite.checkpoint import manifest as manifest_module
from megatron_lite.checkpoint.manifest import MANIFEST_FILE, read_manifest
from megatron_lite.checkpoint.retention import find_newest
from megatron_lite.checkpoint.store import load, save
from megatron_lite.checkpoint.tensor_files import CheckpointError
from megatron_lite.checkpoint.weights import open_weights
from tests.checkpoint.pure import Memory, PureLayout, save_job, tiny_model, world

LAYOUT = PureLayout()
SHARD = "rank-00000.safetensors"


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "step-00000001"
    save_job(LAYOUT, folder, seed=1)
    return folder


@pytest.fixture
def checkpoint(good: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(good, tmp_path / "run" / good.name))


def load_it(folder: Path) -> None:
    memory = Memory(LAYOUT, 0)
    tensors = memory.to_load(memory.blank()) + memory.to_load(memory.blank(), "adamw.first")
    load(folder, tensors, axis=world())


def refusals(folder: Path) -> list[str]:
    """What `load` says, and what `find_newest` warns of."""
    with pytest.raises(CheckpointError) as caught:
        load_it(folder)
    warnings: list[str] = []
    assert find_newest(folder.parent, axis=world(), warn=warnings.append) is None
    assert len(warnings) == 1 and folder.name in warnings[0]
    return [str(caught.value), warnings[0]]


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_the_undamaged_one_loads(checkpoint: Path) -> None:
    """Negative control of all that follows."""
    load_it(checkpoint)
    assert find_newest(checkpoint.parent, axis=world(), warn=pytest.fail) == checkpoint


@pytest.mark.parametrize("where", [0, 9, 0.3, 0.6, 0.9, -1], ids=str)
def test_a_flipped_bit_in_a_file(checkpoint: Path, where: float) -> None:
    path = checkpoint / SHARD
    flip(path, int(where * path.stat().st_size) if isinstance(where, float) else where, bit=3)
    for message in refusals(checkpoint):
        assert str(path) in message and "damaged: bytes" in message and "do not match their checksum" in message


def test_a_flipped_bit_is_found_before_its_block_is_used(tmp_path: Path) -> None:
    """Of several blocks: a reader of the first does not see the damage in the last; whoever checks all of them does."""
    from megatron_lite.checkpoint.chunks import Chunk, GlobalTensor

    rows = torch.ones(1024, 1024)
    names = ("first", "last")
    save(
        tmp_path / "step-00000001",
        [GlobalTensor(name, (1024, 1024), torch.float32, (Chunk((0, 0), rows),)) for name in names],
        state={},
        model=tiny_model(),
        axis=world(),
    )
    flip(tmp_path / "step-00000001" / SHARD, -1)
    warnings: list[str] = []
    assert find_newest(tmp_path, axis=world(), warn=warnings.append) is None
    assert "bytes 8,388,608 to 8,388," in warnings[0]
    target = torch.zeros(1024, 1024)
    both = [GlobalTensor(name, (1024, 1024), torch.float32, (Chunk((0, 0), target),)) for name in names]
    with pytest.raises(CheckpointError, match="damaged"):
        load(tmp_path / "step-00000001", both, axis=world())
    only_first = [both[0], GlobalTensor("last", (1024, 1024), torch.float32, (Chunk((0, 0), target[:512]),))]
    load(tmp_path / "step-00000001", only_first, axis=world())


def test_every_bit_of_the_manifest_counts(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flipped bit is refused, or it changed nothing (an exponent's e to E)."""
    path = checkpoint / MANIFEST_FILE
    content, expected = path.read_bytes(), read_manifest(checkpoint)
    refused = 0
    for position in range(0, len(content), 7):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        try:
            assert read_manifest(checkpoint) == expected
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 0.95 * len(range(0, len(content), 7))


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_manifest(checkpoint: Path, keep: int) -> None:
    path = checkpoint / MANIFEST_FILE
    path.write_bytes(path.read_bytes()[:keep].rstrip(b"}\n"))
    for message in refusals(checkpoint):
        assert f"{path}: is not JSON" in message


def test_no_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST_FILE).unlink()
    for message in refusals(checkpoint):
        assert f"{MANIFEST_FILE}: there is no such file" in message


@pytest.mark.parametrize("change", [-1, -1000, 1])
def test_a_file_of_another_size(checkpoint: Path, change: int) -> None:
    path = checkpoint / SHARD
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + b"\0")
    for message in refusals(checkpoint):
        assert f"{path}: has {len(content) + change:,} bytes and was written with {len(content):,}" in message


def test_a_missing_and_an_extra_file(checkpoint: Path) -> None:
    path = checkpoint / SHARD
    shutil.copy(path, checkpoint / "rank-00001.safetensors")
    for message in refusals(checkpoint):
        assert "rank-00001.safetensors: does not belong to the checkpoint" in message
    (checkpoint / "rank-00001.safetensors").unlink()
    (checkpoint / ".DS_Store").touch()
    load_it(checkpoint)
    path.unlink()
    for message in refusals(checkpoint):
        assert f"{path}: is missing" in message


def test_a_disk_that_cannot_be_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    for message in refusals(checkpoint):
        assert "rank-00000.safetensors: cannot be read at byte 0: Input/output error" in message


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", [MANIFEST_FILE, SHARD])
@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
def test_a_pickle_is_refused_and_not_executed(checkpoint: Path, name: str, kind: str, tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    path = checkpoint / name
    size = path.stat().st_size
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(proof)).ljust(size, b"\0"))
    else:
        torch.save(Bomb(proof), path)
    with pytest.raises(CheckpointError, match=f"{name}: is a pickle"):
        load_it(checkpoint)
    with pytest.raises(CheckpointError, match="pickle" if name == SHARD else "has no checkpoint|pickle"):
        open_weights(checkpoint)
    assert find_newest(checkpoint.parent, axis=world(), warn=str) is None
    assert not proof.exists()
    pickle.loads(pickle.dumps(Bomb(proof)))
    assert proof.exists(), "negative control: unpickling it does leave a trace"


def test_safetensors_that_begin_like_a_pickle(tmp_path: Path) -> None:
    """A header of 896 bytes: its length begins with the two bytes of a pickle of protocol 3."""
    from megatron_lite.checkpoint.chunks import Chunk, GlobalTensor

    tensor = GlobalTensor("a" * 805, (2,), torch.float32, (Chunk((0,), torch.ones(2)),))
    save(tmp_path / "s", [tensor], state={}, model=tiny_model(), axis=world())
    assert (tmp_path / "s" / SHARD).read_bytes()[:2] == b"\x80\x03"
    load(tmp_path / "s", [tensor], axis=world())


def rewritten(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the manifest, with a checksum that is right: what only a forger or a bug would write."""
    path = checkpoint / MANIFEST_FILE
    description = json.loads(path.read_text())
    del description["checksum"]
    change(description)
    description["checksum"] = manifest_module._checksum(copy.deepcopy(description))
    path.write_text(json.dumps(description))


NORM = "weights/norm"


def swap(where: dict[str, Any], old: str, new: str) -> None:
    where[new] = where.pop(old)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda d: d.update(format=2), "is not a checkpoint of format 1"),
        (lambda d: d.pop("files"), "files: Field required"),
        (lambda d: d.update(files=[]), "files: "),
        (lambda d: d.update(surprise=1), "surprise: Extra inputs"),
        (lambda d: d.update(block_bytes=0), "block_bytes: "),
        (lambda d: d["model"].pop("family"), "family: "),
        (lambda d: d["model"].update(num_layers="2"), "num_layers: "),
        (lambda d: d["tensors"][NORM].update(dtype="I8"), "tensors.weights/norm.dtype: "),
        (lambda d: d["tensors"][NORM].update(shape=[-12]), "shape"),
        (lambda d: d["tensors"][NORM].update(shape=[10**30]), "shape"),
        (lambda d: d["tensors"][NORM].update(shape=[1 << 40]), "12 of its 1,099,511,627,776 elements"),
        (lambda d: d["tensors"][NORM].update(shape=[12.0]), "shape"),
        (lambda d: d["tensors"][NORM].update(shape=[3, 4]), "is not of a tensor of"),
        (lambda d: d["tensors"][NORM].update(chunks=[]), "0 of its 12"),
        (lambda d: d["tensors"][NORM]["chunks"][0].update(offsets=[1]), "ends outside"),
        (lambda d: d["tensors"][NORM]["chunks"].append(d["tensors"][NORM]["chunks"][0]), "overlap"),
        (lambda d: d["tensors"][NORM]["chunks"][0].update(start=10**9), "are not in the rank-00000"),
        (lambda d: d["tensors"][NORM]["chunks"][0].update(start=1), "are not in the rank-00000"),
        (lambda d: d["tensors"][NORM]["chunks"][0].update(start=1200), "share bytes of rank-00000"),
        (lambda d: d["tensors"][NORM]["chunks"][0].update(file="else"), "which is not among its files"),
        (lambda d: d["tensors"][NORM]["chunks"][0].update(sizes=[3, 4]), "1 offsets and 2 sizes"),
        (lambda d: swap(d["files"], SHARD, "../../secret"), "outside of its folder: '../../secret'"),
        (lambda d: swap(d["files"], SHARD, "/etc/passwd"), "outside of its folder"),
        (lambda d: swap(d["files"], SHARD, ".."), "outside of its folder"),
        (lambda d: d["files"][SHARD].update(bytes=1 << 61), "checksums for the"),
        (lambda d: d["files"][SHARD].update(checksums=[]), "0 checksums for the"),
        (lambda d: d["files"][SHARD].update(checksums=[-1]), "checksums"),
    ],
)
def test_a_manifest_that_contradicts_itself(
    checkpoint: Path, change: Callable[[dict[str, Any]], Any], problem: str
) -> None:
    rewritten(checkpoint, change)
    with pytest.raises(CheckpointError) as caught:
        read_manifest(checkpoint)
    assert str(caught.value).startswith(str(checkpoint / MANIFEST_FILE)) and problem in str(caught.value)


def test_a_manifest_that_was_rewritten_as_it_was(checkpoint: Path) -> None:
    """Negative control: `rewritten` itself breaks nothing."""
    rewritten(checkpoint, lambda description: None)
    load_it(checkpoint)


@pytest.mark.parametrize("text", ["[]", "7", "null", '"checkpoint"', "{}", "[" * 200_000, "\xff", "{" * 10])
def test_json_that_is_no_manifest(checkpoint: Path, text: str) -> None:
    (checkpoint / MANIFEST_FILE).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=MANIFEST_FILE):
        read_manifest(checkpoint)
