"""The place of a process, from the environments that launchers leave; nothing is started."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.distributed.environments import (
    FIRST_PORT,
    NUM_PORTS,
    MpiPlace,
    Place,
    WorldError,
    expand_hosts,
    expand_tasks,
    find_place,
    has_own_device,
    is_launched,
    own_rank,
)
from tests.distributed.test_rendezvous import TORCHRUN as OF_FIRST_START

TORCHRUN = {**OF_FIRST_START, "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
DEEPSPEED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29501",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",  # not what RANK would make one think
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-node1-20628@1",
    "PMIX_RANK": "1",
}
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "17",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_NODELIST": "node[1-2]",
}
SRUN = BATCH_SCRIPT | {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "node[1-2]",
}


def test_without_a_launcher_a_process_is_alone() -> None:
    assert find_place({}) == Place() == find_place({"HOME": "/", "MASTER_ADDR": "head", "MASTER_PORT": "1"})
    assert find_place(BATCH_SCRIPT) == Place(), "a batch script is no task of a step"
    assert not is_launched({}) and not is_launched(BATCH_SCRIPT)


def test_torchrun() -> None:
    expected = Place(5, 8, 1, 4, "torchrun", "head", 29500, store_is_served=True, attempt=2)
    assert find_place(TORCHRUN) == expected
    place = find_place(TORCHRUN | SRUN | {"SLURM_RESTART_COUNT": "3"})
    assert (place.launcher, place.rank, place.attempt, place.job) == ("torchrun", 5, 5, "job 17"), "srun torchrun"
    assert find_place(TORCHRUN | {"MEGATRON_LITE_LAUNCHED": "1"}).launcher == "--nproc"
    own = {name: value for name, value in TORCHRUN.items() if not name.startswith("TORCHELASTIC")}
    assert find_place(own) == Place(5, 8, 1, 4, "the environment", "head", 29500)
    assert is_launched(TORCHRUN)


def test_deepspeed_says_the_number_of_local_ranks_in_its_own_variable() -> None:
    assert find_place(DEEPSPEED) == Place(3, 4, 1, 2, "deepspeed", "10.0.0.1", 29501)


def test_mpirun_of_open_mpi() -> None:
    place = find_place(OPEN_MPI)
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (1, 4, 2, 4)
    assert (place.launcher, place.host) == ("mpirun", "127.0.0.1")
    assert FIRST_PORT <= place.port < FIRST_PORT + NUM_PORTS
    assert find_place(OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "2"}).port == place.port
    assert find_place(OPEN_MPI | {"PMIX_NAMESPACE": "prterun-node1-20629@1"}).port != place.port
    assert find_place(OPEN_MPI | {"MASTER_ADDR": "h1", "MASTER_PORT": "7"}).address == "h1:7"
    assert find_place(OPEN_MPI | SRUN).launcher == "mpirun", "mpirun starts its daemons by srun"
    with pytest.raises(
        ValueError, match=r"more than one host, and MASTER_ADDR does not say where they meet.*-x MASTER"
    ):
        find_place(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "3"})


def test_srun() -> None:
    place = find_place(SRUN)
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (3, 4, 1, 2)
    assert (place.launcher, place.host, place.job, place.node) == ("srun", "node1", "job 17 step 0", "node2")
    assert find_place(SRUN | {"SLURM_STEP_ID": "1"}).port != place.port
    again = find_place(SRUN | {"SLURM_RESTART_COUNT": "1"})
    assert again.attempt == 1 and again.port != place.port, "a requeued job has its number again"
    assert find_place(SRUN | {"MASTER_ADDR": "10.0.0.7"}).address == f"10.0.0.7:{place.port}"
    on_one = {"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_STEP_NODELIST": "node7", "SLURM_NODEID": "0"}
    assert find_place(SRUN | on_one).host == "127.0.0.1", "the name of the only host need not lead anywhere"
    uneven = {"SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_LOCALID": "0"}
    assert find_place(SRUN | uneven).local_world_size == 1


def test_another_mpi_is_asked() -> None:
    asked = MpiPlace(2, 4, 0, 2, "node1.77")
    place = find_place({"PMI_RANK": "2", "MASTER_ADDR": "node1"}, lambda: asked)
    assert (place.rank, place.world_size, place.local_rank, place.launcher) == (2, 4, 0, "mpi4py")

    def missing() -> MpiPlace:
        raise ValueError("pip install mpi4py")

    with pytest.raises(ValueError, match="pip install mpi4py"):
        find_place({"PMIX_RANK": "0"}, missing)


@pytest.mark.parametrize("environ", [{"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, {"OMPI_COMM_WORLD_SIZE": "1"}])
def test_a_step_of_one_task_is_a_place_to_start_processes_in(environ: dict[str, str]) -> None:
    assert not is_launched(environ)
    assert is_launched({name: value.replace("1", "2") for name, value in environ.items()})


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (TORCHRUN | {"LOCAL_RANK": ""}, r"RANK=5.*but not LOCAL_RANK; start the ranks with torchrun"),
        ({"WORLD_SIZE": "4"}, r"has WORLD_SIZE=4 but not RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR"),
        (TORCHRUN | {"RANK": "8"}, "RANK=8 does not fit WORLD_SIZE=8"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK=4 does not fit LOCAL_WORLD_SIZE=4"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9 does not fit WORLD_SIZE=8"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT='http' is not an integer"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": ""}, "but not OMPI_COMM_WORLD_LOCAL_SIZE"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "5", "MASTER_ADDR": "h"}, "ranks on its host=5 does not fit"),
        (SRUN | {"SLURM_STEP_NODELIST": "node[1-3]"}, "do not fit SLURM_STEP_NUM_TASKS=4; start the ranks with srun"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2,1"}, "do not fit SLURM_STEP_NUM_TASKS=4"),
        (SRUN | {"SLURM_LOCALID": ""}, "without SLURM_LOCALID"),
    ],
)
def test_an_environment_that_makes_no_sense_is_explained(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_place(environ)


ALONE = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("around", "message"),
    [
        (
            SRUN,
            r"WORLD_SIZE=1, but this is one of 4 tasks of a Slurm step \(SLURM_PROCID=3\): each of them would train",
        ),
        (OPEN_MPI, r"WORLD_SIZE=1, but this is one of 4 processes of an mpirun \(OMPI_COMM_WORLD_RANK=1\)"),
    ],
)
def test_a_world_of_one_for_each_of_several_tasks_is_refused(around: dict[str, str], message: str) -> None:
    """What a launcher leaves that takes each task for a world."""
    with pytest.raises(ValueError, match=message):
        find_place(around | ALONE)
    assert find_place(around | ALONE | {"MEGATRON_LITE_WORLD_SIZE": "1"}).world_size == 1, "that may be meant"
    assert find_place(ALONE).world_size == 1, "without the tasks around it is what torchrun makes of one process"
    assert own_rank(around | ALONE) in (1, 3), "one of them says it, and that is not the RANK that all have"


def test_a_world_size_of_a_script_beside_srun_has_to_fit() -> None:
    assert find_place(SRUN | {"WORLD_SIZE": "4"}).launcher == "srun"
    with pytest.raises(ValueError, match="WORLD_SIZE=1, but srun has started 4 ranks; unset WORLD_SIZE"):
        find_place(SRUN | {"WORLD_SIZE": "1"})


@pytest.mark.parametrize(
    ("environ", "asked", "is_refused"),
    [
        (TORCHRUN, "8", False),
        (TORCHRUN, "16", True),
        (TORCHRUN, "4:8", False),
        (TORCHRUN, "9:16", True),
        (SRUN, "4", False),
        (SRUN, "8", True),
        ({}, "4", True),
        ({}, "1", False),
        (TORCHRUN, "", False),
    ],
)
def test_a_world_of_another_size_than_a_script_asked_for_is_refused(
    environ: dict[str, str], asked: str, is_refused: bool
) -> None:
    environ = environ | {"MEGATRON_LITE_WORLD_SIZE": asked}
    if not is_refused:
        find_place(environ)
        return
    with pytest.raises(ValueError, match=f"MEGATRON_LITE_WORLD_SIZE={asked}, but this is rank . in a world of"):
        find_place(environ)


def test_what_a_script_asks_for_has_to_be_a_number() -> None:
    with pytest.raises(ValueError, match="MEGATRON_LITE_WORLD_SIZE='all' is not a number of ranks; write 8, or 4:8"):
        find_place({"MEGATRON_LITE_WORLD_SIZE": "all"})


def test_a_gpu_for_each_task_of_slurm() -> None:
    given = SRUN | {"SLURM_GPUS_ON_NODE": "2"}
    assert has_own_device(given, find_place(given), 1)
    assert not has_own_device(given, find_place(given), 2), "each sees all of them"
    assert not has_own_device(SRUN, find_place(SRUN), 1), "two ranks, and one GPU for both"
    assert not has_own_device(TORCHRUN, find_place(TORCHRUN), 1)


WORDS = st.text("abcxyz-_.", min_size=1, max_size=4)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A part of a bracket, and the numbers that it stands for."""
    width, first = draw(st.integers(1, 4)), draw(st.integers(0, 120))
    written = f"{first:0{width}}"
    if draw(st.booleans()):
        return written, [written]
    last = first + draw(st.integers(0, 5))
    return f"{written}-{last:0{width}}", [str(number).rjust(len(written), "0") for number in range(first, last + 1)]


@st.composite
def host_names(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A name with up to two brackets, and the hosts that it stands for."""
    text, hosts = draw(WORDS), [""]
    hosts = [text]
    for _ in range(draw(st.integers(0, 2))):
        parts = draw(st.lists(ranges(), min_size=1, max_size=3))
        after = draw(st.sampled_from(["", "-ib", "x"]))
        text += f"[{','.join(written for written, _ in parts)}]{after}"
        hosts = [f"{host}{number}{after}" for host in hosts for _, numbers in parts for number in numbers]
    return text, hosts


@settings(deadline=None)  # the machine that tests it may be busy
@given(st.lists(host_names(), min_size=1, max_size=4))
def test_host_lists(names: list[tuple[str, list[str]]]) -> None:
    assert expand_hosts(",".join(text for text, _ in names)) == [host for _, hosts in names for host in hosts]


def test_host_lists_by_hand() -> None:
    assert expand_hosts("node[1-3,07-09],login") == ["node1", "node2", "node3", "node07", "node08", "node09", "login"]
    assert expand_hosts("r[0-1]n[8-10]") == ["r0n8", "r0n9", "r0n10", "r1n8", "r1n9", "r1n10"]


@pytest.mark.parametrize(
    "text", ["", "node[1-3", "node1-3]", "node[3-1]", "node[a]", "a,,b", "node[]", "node[[1]]", ","]
)
def test_what_is_no_host_list(text: str) -> None:
    with pytest.raises(ValueError, match="is not a host list"):
        expand_hosts(text)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 64), st.integers(1, 20)), min_size=1, max_size=6))
def test_tasks_on_nodes(runs: list[tuple[int, int]]) -> None:
    text = ",".join(f"{tasks}(x{nodes})" if nodes > 1 else str(tasks) for tasks, nodes in runs)
    assert expand_tasks(text) == [tasks for tasks, nodes in runs for _ in range(nodes)]


@pytest.mark.parametrize("text", ["", "2(x", "2x3", "2(x3)1", "-1"])
def test_what_is_no_list_of_tasks(text: str) -> None:
    with pytest.raises(ValueError, match="is not a list of tasks"):
        expand_tasks(text)


HYDRA = {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2", "PMI_RANK": "6", "PMI_SIZE": "8"}


def test_ranks_that_an_mpi_starts_from_a_slurm_step_are_those_of_the_mpi() -> None:
    """srun has started its daemons, one on each node; their variables are not those of the ranks."""
    found = MpiPlace(rank=6, size=8, local_rank=2, local_size=4, key="job")
    place = find_place({**HYDRA, "MASTER_ADDR": "node1"}, lambda: found)
    assert (place.rank, place.world_size, place.local_rank, place.launcher) == (6, 8, 2, "mpi4py")


def test_a_world_of_one_under_another_mpi_is_refused() -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    meeting = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    with pytest.raises(WorldError, match="WORLD_SIZE=1, but this is one of 4 processes of an MPI"):
        find_place({**alone, **meeting, "PMI_RANK": "3", "PMI_SIZE": "4"})


def test_starts_that_torch_does_not_count() -> None:
    """Where machines come and go; a run that was begun goes on then."""
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "node1"}
    environ = {**torchrun, "MASTER_PORT": "29500", "TORCHELASTIC_RESTART_COUNT": "0"}
    assert find_place(environ).attempt == 0
    assert find_place({**environ, "MEGATRON_LITE_ATTEMPT": "2"}).attempt == 2
