from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_lite.distributed.worker import pack, unpack
from megatron_lite.distributed.worker_pool import WorkerError, WorkerPool, WorkerTimeout


def sum_of_ranks(offset: float = 0.0) -> tuple[int, int, float, int]:
    total = torch.tensor([dist.get_rank() + offset], dtype=torch.float64)
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item(), torch.get_num_threads()


def broadcast_from_last(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    last = dist.get_world_size() - 1
    mine = tensor.clone() if dist.get_rank() == last else torch.zeros_like(tensor)
    dist.broadcast(mine, src=last)
    return {"tensor": mine, "row": mine[1]}


def own_pid() -> int:
    return os.getpid()


def raise_in_rank(failing: int) -> None:
    if dist.get_rank() == failing:
        print("printed before the end")
        raise ValueError(f"rank {failing} dislikes this")
    dist.barrier()


def raise_everywhere() -> None:
    raise ValueError("nobody likes this")


def die_in_rank(failing: int) -> None:
    if dist.get_rank() == failing:
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def exit_in_rank(failing: int) -> None:
    if dist.get_rank() == failing:
        os._exit(7)
    dist.barrier()


def wait_for_godot(hanging: int) -> None:
    if dist.get_rank() == hanging:
        time.sleep(600)


def mismatched_barrier() -> None:
    if dist.get_rank() != 0:
        dist.barrier()


def return_lambda() -> Callable[[], int]:
    return lambda: 1


def assert_usable(pool: WorkerPool) -> None:
    for world_size in (4, 2, 1):
        assert [result[2] for result in pool.run(sum_of_ranks, world_size)] == [sum(range(world_size))] * world_size


def test_results_come_in_rank_order_from_worlds_of_any_size(pool: WorkerPool) -> None:
    for world_size in (1, 2, 4, 8, 3):
        expected = [(rank, world_size, sum(range(world_size)) + world_size * 0.5, 1) for rank in range(world_size)]
        assert pool.run(sum_of_ranks, world_size, offset=0.5) == expected


def test_threads_are_set(pool: WorkerPool) -> None:
    assert [result[3] for result in pool.run(sum_of_ranks, 2, threads=2)] == [2, 2]
    assert [result[3] for result in pool.run(sum_of_ranks, 2)] == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_tensors_travel_bit_for_bit(pool: WorkerPool, dtype: torch.dtype) -> None:
    tensor = (torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 100).to(dtype)
    for result in pool.run(broadcast_from_last, 2, tensor):
        assert result["tensor"].dtype == dtype
        assert torch.equal(result["tensor"], tensor)
        assert torch.equal(result["row"], tensor[1])


def test_packing_a_view_costs_its_own_size_only() -> None:
    whole = torch.zeros(1_000_000)
    assert len(pack(whole[:10])) < 1000
    for tensor in (torch.tensor(3.0), torch.zeros(0, 4), torch.tensor([True, False]), torch.arange(6).reshape(2, 3).T):
        copy = unpack(pack(tensor))
        assert copy.shape == tensor.shape and copy.dtype == tensor.dtype and torch.equal(copy, tensor)
    copy += 1  # what arrives can be written to


def test_workers_are_reused_after_success_and_replaced_after_failure(pool: WorkerPool) -> None:
    before = pool.run(own_pid, 2)
    assert pool.run(own_pid, 2) == before
    with pytest.raises(WorkerError):
        pool.run(raise_everywhere, 2)
    assert not set(pool.run(own_pid, 2)) & set(before)


def test_a_rank_that_raises_is_named_with_its_traceback_at_once(pool: WorkerPool) -> None:
    start = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        pool.run(raise_in_rank, 4, 2)
    assert time.monotonic() - start < 10
    message = str(caught.value)
    assert message.startswith("rank 2 of 4 failed in raise_in_rank: ValueError: rank 2 dislikes this")
    assert "in raise_in_rank" in message.split("\n", 1)[1]
    assert [failure.rank for failure in caught.value.failures] == [2]  # its peers only waited for it
    assert_usable(pool)


def test_ranks_that_all_raise_are_all_listed(pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match="nobody likes this") as caught:
        pool.run(raise_everywhere, 4)
    assert sorted(failure.rank for failure in caught.value.failures) == [0, 1, 2, 3]
    assert_usable(pool)


def test_a_killed_rank_is_the_root_cause_and_its_last_words_are_shown(pool: WorkerPool) -> None:
    start = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        pool.run(die_in_rank, 4, 3)
    assert time.monotonic() - start < 10
    assert caught.value.rank == 3
    assert "rank 3 of 4 failed in die_in_rank: the process was killed by SIGKILL\nlast words" in str(caught.value)
    assert all(failure.is_consequence for failure in caught.value.failures[1:])
    assert_usable(pool)


def test_a_rank_that_exits_is_named_with_its_status(pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match="rank 1 of 2 failed in exit_in_rank: the process ended with status 7"):
        pool.run(exit_in_rank, 2, 1)
    assert_usable(pool)


def test_a_hang_shows_where_the_rank_is(pool: WorkerPool) -> None:
    start = time.monotonic()
    with pytest.raises(WorkerTimeout) as caught:
        pool.run(wait_for_godot, 4, 1, timeout_s=2)
    assert time.monotonic() - start < 10
    assert "wait_for_godot did not end within 2 s; still running of 4 ranks: 1\n" in str(caught.value)
    assert "in wait_for_godot" in caught.value.failures[0].details
    assert_usable(pool)


def test_a_hang_in_a_collective_shows_each_rank_that_waits(pool: WorkerPool) -> None:
    with pytest.raises(WorkerTimeout) as caught:
        pool.run(mismatched_barrier, 4, timeout_s=2)
    assert [failure.rank for failure in caught.value.failures] == [1, 2, 3]
    assert all("in mismatched_barrier" in failure.details for failure in caught.value.failures)
    assert_usable(pool)


def test_what_cannot_be_sent_is_refused(pool: WorkerPool) -> None:
    with pytest.raises(ValueError, match="top level of a module"):
        pool.run(lambda: 1, 1)
    with pytest.raises(ValueError, match=r"world_size is 9; this pool has 1 .. 8 workers"):
        pool.run(own_pid, 9)
    with pytest.raises(WorkerError, match="return_lambda"):
        pool.run(return_lambda, 1)
    closed = WorkerPool(1)
    closed.close()
    with pytest.raises(ValueError, match="closed"):
        closed.run(own_pid, 1)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_worker_outlives_its_pool(tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(
        "import os, sys, time\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from megatron_lite.distributed.worker_pool import WorkerPool\n"
        "from test_worker_pool import own_pid, wait_for_godot\n"
        "pool = WorkerPool(2)\n"
        "print(*pool.run(own_pid, 2), pool._folder, flush=True)\n"
        "if sys.argv[1] == 'kill':\n"
        "    pool.run(wait_for_godot, 2, 0, timeout_s=600)\n"
    )
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
    for how in ("exit", "kill"):
        command = [sys.executable, str(script), how]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as owner:
            assert owner.stdout is not None
            *pids, folder = owner.stdout.readline().split()
            if how == "kill":
                owner.kill()
            owner.wait(timeout=30)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and (any(is_alive(int(pid)) for pid in pids) or Path(folder).exists()):
            time.sleep(0.05)
        assert not any(is_alive(int(pid)) for pid in pids), how
        assert not Path(folder).exists(), how
