"""A model that memory does not hold: a run is told before it starts what would make it fit, and with that it trains.

The limit is `ulimit -d`, on the launcher and on each rank: what a process may hold of private memory that it can write
to. Pages of files that are cached or mapped do not count, as they would not where memory is short: the kernel may drop
them. A cgroup would take rights that a test has nowhere for sure.
"""

from __future__ import annotations

import math
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megatron_lite.checkpoint.store import read_manifest
from megatron_lite.config import RunConfig, load_config
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.models.families import parameter_table
from megatron_lite.train.build import build, layout_of
from megatron_lite.train.checkpoints import Checkpointer, Position, restore, tensors_to_save
from megatron_lite.utils.memory import return_freed_memory
from tests.ops.oracle import ROOT
from tests.train.commands import PROGRAM, write_config
from tests.train.tiny_run import make_corpus, read_metrics, same_numbers, tiny_config

# A process with PyTorch and gloo has 410 MiB of it before there is a model, 130 of them for stacks of threads.
LIMIT = 704 << 20
NUM_RANKS, NUM_STEPS = 2, 2
SLACK = 16 << 20  # a thread's stack (8 MiB), a block of a checkpoint, some chunks
# One microbatch a rank, so that the order of additions is the same at all stages.
MODEL = (
    "model.hidden_size=384",
    "model.ffn_hidden_size=1536",
    "model.num_layers=41",
    "model.num_heads=6",
    "model.num_kv_heads=6",
    "train.micro_batch_size=1",
    f"train.global_batch_size={NUM_RANKS}",
    f"train.num_steps={NUM_STEPS}",
    "optim.warmup_steps=1",
    "train.eval_interval=0",
    "train.collective_timeout_s=300.0",
    "checkpoint.interval=0",
    "checkpoint.save_last=false",
    "parallel.zero_stage=1",
)
MODEL_IN_FILES = ("model.hidden_size=512", "model.num_layers=4")  # of 5 MiB at most a slice of a bucket's moments
UNCHECKED = """
import sys
from pathlib import Path
from megatron_lite.config import load_config
from megatron_lite.distributed.launch import launch_local
config = load_config(Path(sys.argv[1]), sys.argv[2:], world_size=2, files_exist=True)
sys.exit(launch_local("tests.zero.unchecked:run", (config,), {"resume": "none", "overwrite": True}, nproc=2))
"""


def limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))


def execute(command: list[str], *, limited: bool) -> subprocess.CompletedProcess[str]:
    limit = limit_memory if limited else None
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, preexec_fn=limit, cwd=ROOT)


def train(config: Path, *overrides: str, limited: bool = True) -> subprocess.CompletedProcess[str]:
    return execute([*PROGRAM, "train", str(config), "--nproc", str(NUM_RANKS), *overrides], limited=limited)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module", autouse=True)
def limits_hold() -> None:
    """Memory beyond the limit is refused, and as much in a mapped file is not: else these tests show nothing."""
    code = f"""
import tempfile, mmap, torch
file = tempfile.TemporaryFile()
file.truncate({2 * LIMIT})
pages = mmap.mmap(file.fileno(), {2 * LIMIT})
try:
    torch.ones({LIMIT})
except RuntimeError:
    print("refused")
"""
    done = execute([sys.executable, "-c", code], limited=True)
    if done.stdout != "refused\n":
        pytest.skip(f"ulimit -d does not limit memory here, and a cgroup is not ours to make: {done.stderr[-300:]}")


def state_bytes(config: Path) -> int:
    """Of a rank at stage 3: fp32 parameters, gradients and two moments, its share of each."""
    table = parameter_table(load_config(config, world_size=NUM_RANKS).model)
    return sum(math.prod(spec.shape) for spec in table) * 16 // NUM_RANKS


def overrides_in(message: str, folder: Path) -> list[str]:
    """What a message says would make the run fit."""
    found = re.search(r"; with (.*?) it would be", message)
    assert found is not None, message
    return found[1].replace("FOLDER", str(folder)).split()


@pytest.mark.slow
def test_it_is_told_what_it_takes_and_trains_with_that(corpus: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    config = write_config(tmp_path, corpus, "tiny", *MODEL)
    assert state_bytes(config) > LIMIT, "even in slices of all there is"

    done = train(config)
    said = done.stdout + done.stderr
    assert done.returncode == 2 and "Traceback" not in said, said
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert re.search(
        r"rank 0 needs \S+ \wiB for its state, the process itself holds \S+ \wiB, and the limit is \S+ \wiB \(", line
    ), line
    assert "the limit is 704 MiB (ulimit -d)" in line, line
    assert not (tmp_path / "runs/tiny/metrics.jsonl").exists(), "no step was taken"

    overrides = overrides_in(line, scratch)
    places = [f"offload.{what}=nvme" for what in ("optimizer", "gradients", "parameters")]
    assert {"parallel.zero_stage=3", *places} <= set(overrides), overrides
    done = train(config, *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(read_metrics(tmp_path / "runs/tiny")) == NUM_STEPS
    assert list(scratch.iterdir()) == []

    done = train(config, "run.name=whole", limited=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert same_numbers(tmp_path / "runs/tiny", tmp_path / "runs/whole") == []


@pytest.mark.slow
def test_without_files_and_checks_it_dies(corpus: Path, tmp_path: Path) -> None:
    """Negative control: what is refused could not have run; and it is not the limit alone that stops a run."""
    config = write_config(tmp_path, corpus, "tiny", *MODEL, "parallel.zero_stage=3")
    done = execute([sys.executable, "-c", UNCHECKED, str(config)], limited=True)
    assert done.returncode not in (0, 2), done.stdout + done.stderr
    assert re.search("alloc|memory", done.stderr), done.stderr
    assert not (tmp_path / "runs/tiny/metrics.jsonl").exists() or not read_metrics(tmp_path / "runs/tiny")

    done = execute([sys.executable, "-c", UNCHECKED, str(config), "model.num_layers=2"], limited=True)
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """This process may hold so much more than it does."""
    return_freed_memory()
    found = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(found[1]) * 1024 + num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def save_and_restore(config: RunConfig) -> tuple[int, bool]:
    """Bytes of this rank's state in files, and whether a checkpoint gives it back; both within the limit."""
    training = build(config, mesh=build_mesh(layout_of(config), device=torch.device("cpu")))
    try:
        files = Path(str(config.offload.dir)).glob(f"*-rank{training.mesh.rank:05d}-*/*.offload")
        size = sum(path.stat().st_size for path in files)
        with room_for(SLACK):
            with pytest.raises(RuntimeError, match=r"alloc|memory"):  # negative control: all of it at once
                [chunk.values.clone() for tensor in tensors_to_save(training) for chunk in tensor.chunks]
            folder = Checkpointer(training).save(Position(), wait=True)
            kept = training.engine.whole_master("head.weight")
            for bucket in training.engine.updated_buckets():
                bucket.master.zero_()
            restore(training, read_manifest(folder))
        return size, torch.equal(training.engine.whole_master("head.weight"), kept) and bool(kept.any())
    finally:
        training.memory.close()


@pytest.mark.parametrize(
    "keys",
    [("train.precision=bf16",), ("train.precision=fp32", "offload.gradients=nvme", "offload.parameters=nvme")],
    ids=["optimizer", "all"],
)
def test_a_checkpoint_of_files_takes_little_memory(
    pool: WorkerPool, corpus: Path, tmp_path: Path, keys: tuple[str, ...]
) -> None:
    places = ("parallel.zero_stage=3", "offload.optimizer=nvme", f"offload.dir={tmp_path}")
    config = tiny_config(corpus, tmp_path, "tiny", *MODEL_IN_FILES, *places, *keys, world_size=NUM_RANKS)
    for size, is_restored in pool.run(save_and_restore, NUM_RANKS, config):
        assert size > 4 * SLACK and is_restored
