from __future__ import annotations

import os
import socket
import time

import pytest
import torch
import torch.distributed as dist

from megatron_lite.distributed.hosts import num_cores
from megatron_lite.distributed.meeting import MeetingError
from megatron_lite.distributed.rendezvous import Rendezvous, RendezvousError, discover, world
from megatron_lite.distributed.worker_pool import WorkerPool

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environ_of(rank: int, world_size: int, port: int) -> dict[str, str]:
    sizes = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), **sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def test_nothing_in_the_environment_is_a_world_of_one() -> None:
    expected = Rendezvous(0, 1, 0, 1, "", device=torch.device("cpu"))
    assert discover({}) == expected
    assert discover({"MASTER_ADDR": "head", "MASTER_PORT": "1", "HOME": "/"}) == expected
    assert discover({}, num_cuda_devices=2).device == torch.device("cuda", 0)


def test_torchrun_variables_are_taken_as_they_are() -> None:
    assert discover(TORCHRUN) == Rendezvous(5, 8, 1, 4, "torchrun", "head", 29500)
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "3"}
    found = discover(TORCHRUN | agent, num_cuda_devices=4)
    assert (found.store_is_served, found.attempt) == (True, 3)
    assert (found.backend, found.device) == ("nccl", torch.device("cuda", 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"LOCAL_RANK": None}, r"RANK=5.*but not LOCAL_RANK; start the ranks with torchrun"),
        ({"MASTER_ADDR": None, "MASTER_PORT": ""}, "but not MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "8"}, "RANK=8 does not fit WORLD_SIZE=8"),
        ({"RANK": "-1"}, "RANK=-1 does not fit"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4 does not fit LOCAL_WORLD_SIZE=4"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9 does not fit WORLD_SIZE=8"),
        ({"WORLD_SIZE": "eight"}, "WORLD_SIZE='eight' is not an integer"),
    ],
)
def test_an_environment_that_makes_no_sense_is_explained(changes: dict[str, str | None], message: str) -> None:
    environ = {name: value for name, value in (TORCHRUN | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        discover(environ)


def test_more_ranks_than_devices_is_explained() -> None:
    with pytest.raises(ValueError, match=r"LOCAL_RANK=1, but this host shows 1 CUDA device.*CUDA_VISIBLE_DEVICES="):
        discover(TORCHRUN, num_cuda_devices=1)


def test_a_world_of_one_has_a_group_needs_no_port_and_restores_the_threads() -> None:
    threads = torch.get_num_threads()
    for requested, expected in ((None, num_cores()), (3, 3)):  # twice: the second world is a fresh one
        with world({}, threads=requested, device="cpu") as rendezvous:
            assert torch.get_num_threads() == expected
            value = torch.ones(3)
            dist.all_reduce(value)
            assert (rendezvous.world_size, dist.get_world_size(), value.tolist()) == (1, 1, [1.0, 1.0, 1.0])
        assert not dist.is_initialized()
        assert torch.get_num_threads() == threads


def test_the_group_is_gone_after_an_error_and_the_error_is_not_masked() -> None:
    with pytest.raises(KeyError, match="mine"), world({}, device="cpu"):
        raise KeyError("mine")
    assert not dist.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a host without CUDA")
def test_asking_for_cuda_where_there_is_none_is_explained() -> None:
    with pytest.raises(ValueError, match="finds no CUDA device"), world({}, device="cuda"):
        pass


def test_a_port_in_use_is_named_with_the_remedy() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(RendezvousError, match=rf"127.0.0.1:{port}: the port is in use; choose another"),
            world(environ_of(0, 2, port), timeout_s=5, device="cpu"),
        ):
            pass


def test_a_rank_that_never_comes_ends_the_wait_and_says_what_to_check() -> None:
    start = time.monotonic()
    with (
        pytest.raises(MeetingError, match=r"rank 0 of 2 waited 1 s at 127.0.0.1:\d+ for rank 1; look at"),
        world(environ_of(0, 2, free_port()), timeout_s=1, device="cpu"),
    ):
        pass
    assert time.monotonic() - start < 20
    assert not dist.is_initialized()


def join_and_leave(port: int, fail: bool) -> tuple[float, float]:
    """Runs inside a rank of the pool, whose own group steps aside for one made from an environment."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.barrier()  # a rank that leaves while another still connects to it is an error there
    dist.destroy_process_group()
    start = time.monotonic()
    total = torch.tensor([rank + 1.0])
    try:
        with world(environ_of(rank, world_size, port), timeout_s=20, device="cpu"):
            if rank == 0:
                time.sleep(0.2)  # the others must not be gone when this rank comes
            if fail and rank == 1:
                raise ArithmeticError("rank 1 fails")
            dist.all_reduce(total)
    except ArithmeticError:
        pass
    except RuntimeError as error:
        assert fail and any(sign in str(error).lower() for sign in ("closed by peer", "reset by peer"))
    assert not dist.is_initialized()
    return total.item(), time.monotonic() - start


def test_ranks_meet_reduce_and_leave(pool: WorkerPool) -> None:
    assert [total for total, _ in pool.run(join_and_leave, 3, free_port(), False)] == [6.0, 6.0, 6.0]


def test_peers_of_a_rank_that_fails_end_at_once(pool: WorkerPool) -> None:
    assert all(seconds < 10 for _, seconds in pool.run(join_and_leave, 2, free_port(), True))


def test_environ_is_the_process_environment_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="but not WORLD_SIZE"), world(device="cpu"):
        pass
    assert "LOCAL_RANK" not in os.environ


@pytest.mark.parametrize(("num_devices", "expected"), [(1, "cpu"), (2, "cuda")])
def test_auto_takes_devices_where_there_is_one_for_each_rank_here(
    num_devices: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none where some rank would be left without."""

    class Joining(Exception):
        pass

    def join(rendezvous: Rendezvous, timeout_s: float, **more: object) -> None:
        raise Joining(rendezvous.device.type)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_devices)
    monkeypatch.setattr("megatron_lite.distributed.rendezvous.init_process_group", join)
    with pytest.raises(Joining, match=expected), world(environ_of(0, 2, 1)):
        pass
