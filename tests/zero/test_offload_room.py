"""Whether the disk has room for a run's files is found before any is made, host by host, and every rank is told."""

from __future__ import annotations

import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_lite.config import RunConfig
from megatron_lite.distributed.agreement import together
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.train.build import layout_of
from megatron_lite.train.loop import RunError
from megatron_lite.train.offload import check_room
from tests.zero.test_engine import config_of, start


def config(folder: Path) -> RunConfig:
    """Two pipeline stages, of which the second has three of four layers."""
    places = (f"offload.{what}=nvme" for what in ("optimizer", "gradients", "parameters"))
    return config_of(
        *("model.num_layers=4", "parallel.pp=2", "parallel.stage_layers=[1,3]", "parallel.zero_stage=3"),
        *("train.precision=bf16", *places, f"offload.dir={folder}"),
        world_size=2,
    )


def made_bytes(config: RunConfig) -> int:
    """Of the files that this rank's part of the run makes."""
    memory = start(config).memory
    try:
        own = Path(str(config.offload.dir)).glob(f"*-rank{torch.distributed.get_rank():05d}-*/*.offload")
        return sum(path.stat().st_size for path in own)
    finally:
        memory.close()


def said(config: RunConfig, free: int, hosts: tuple[str, str]) -> str:
    """What this rank's run says where so much is free on the disk of each host. hosts: of the ranks."""
    mesh = build_mesh(layout_of(config), device=torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: hosts[mesh.rank])
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        try:
            together(lambda: check_room(config, mesh), mesh.world, RunError)
        except RunError as error:
            return str(error)
    return ""


def test_stages_of_different_sizes_on_one_disk_and_on_two(pool: WorkerPool, tmp_path: Path) -> None:
    run = config(tmp_path)
    small, large = pool.run(made_bytes, 2, run)
    assert 0 < small < large - 1
    one, two = ("a", "a"), ("a", "b")

    def message(free: int, hosts: tuple[str, str]) -> str:
        first, second = pool.run(said, 2, run, free, hosts)
        assert first == second
        return str(first)

    assert message(small + large, one) == message(large, two) == ""
    on_one, on_two, on_both = message(small + large - 1, one), message(large - 1, two), message(small - 1, two)
    start = re.escape(f"offload.dir = {tmp_path}: the run needs")
    assert re.match(rf"{start} {small + large:,} bytes there \(for 2 ranks\), [\d,]+ bytes are free; free 1 b", on_one)
    assert re.match(rf"on b: {start} {large:,} bytes there, {large - 1:,} bytes are free; free 1 bytes, name", on_two)
    assert re.match(rf"on a: {start} {small:,} bytes there, {small - 1:,} bytes are free; free 1 bytes, name", on_both)
