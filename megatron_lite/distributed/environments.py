"""Which launcher started this process, and as which rank of how many: a function of the environment alone.

    launcher                     what it leaves in the environment
    torchrun                     RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_*, TORCHELASTIC_*
    deepspeed                    the same, but LOCAL_SIZE and CROSS_SIZE in place of LOCAL_WORLD_SIZE
    mpirun of Open MPI           OMPI_COMM_WORLD_RANK, .._SIZE, .._LOCAL_RANK, .._LOCAL_SIZE
    srun of Slurm                SLURM_PROCID, SLURM_LOCALID, SLURM_NODEID and SLURM_STEP_*
    mpirun of another MPI        PMI_RANK, PMIX_RANK or MV2_COMM_WORLD_RANK: mpi4py is asked for the rest
    a script of one's own        what torchrun leaves
    nothing                      none of these: one process

The first that fits is taken: torchrun may run under srun, and mpirun starts its daemons by srun. LOCAL_RANK is never
derived from RANK: nothing says how ranks are laid over hosts.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Launcher = Literal["", "--nproc", "torchrun", "deepspeed", "mpirun", "srun", "mpi4py", "the environment"]

# Set in the ranks that `launch.launch_local` has started, through torchrun's agent.
HERE_VARIABLE = "MEGATRON_LITE_LAUNCHED"

# A launch script sets it to the number of ranks that it means to start, or to MIN:MAX where that may change.
ASKED_VARIABLE = "MEGATRON_LITE_WORLD_SIZE"
# How often the launcher's agent has started ranks on this machine before (`agent.Agent`).
ATTEMPT_VARIABLE = "MEGATRON_LITE_ATTEMPT"
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
LOCAL_SIZE_VARIABLES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
OPEN_MPI = "OMPI_COMM_WORLD_"
OTHER_MPI_VARIABLES = ("PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK")
OTHER_MPI_SIZES = ("PMI_SIZE", "MV2_COMM_WORLD_SIZE")
# What names the job of an mpirun, by the version of Open MPI: 5, then 4.
MPI_JOB_VARIABLES = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")
# Below the range that systems take ports of outgoing connections from (Linux: 32768 and up).
FIRST_PORT, NUM_PORTS = 20000, 12000


@dataclass(frozen=True)
class Place:
    """This process's place in the world, and where the ranks meet (nowhere, for one process).

    launcher: what started it; empty for nothing. job, node: its names for the job and this host, for people.
    store_is_served: the launcher's agent serves the store at the address; if not, rank 0 does. attempt: how often the
    launcher has started this world again, as far as this process knows.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: Launcher = ""
    host: str = ""
    port: int = 0
    store_is_served: bool = False
    attempt: int = 0
    job: str = ""
    node: str = ""

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


class WorldError(ValueError):
    """What is wrong with the world, and so the same on every rank."""

    is_agreed = True


@dataclass(frozen=True)
class MpiPlace:
    """What MPI says of this process. key: the same on all ranks, and that of no other job on this host."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    key: str


def ask_mpi() -> MpiPlace:
    """This process's place in the world of MPI, of mpi4py. Raises ValueError without that package."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ValueError(
            f"an MPI has started this process, and only mpi4py can tell its place there, but cannot be imported "
            f"({error}); pip install mpi4py, or start the ranks with torchrun"
        ) from None
    world = MPI.COMM_WORLD
    here = world.Split_type(MPI.COMM_TYPE_SHARED)
    key = world.bcast(f"{socket.gethostname()}.{os.getpid()}")
    return MpiPlace(world.Get_rank(), world.Get_size(), here.Get_rank(), here.Get_size(), key)


def find_place(environ: Mapping[str, str], ask_mpi: Callable[[], MpiPlace] = ask_mpi) -> Place:
    """The place that `environ` gives this process. `ask_mpi` is called where only MPI itself can tell.

    Raises ValueError where the variables are incomplete or contradict one another; where they give a world of one to
    each of several tasks, which would all write the results of one run; and where MEGATRON_LITE_WORLD_SIZE asks for a
    world of another size.
    """
    if "RANK" in environ:
        place = _from_rank_variables(environ)
    elif f"{OPEN_MPI}RANK" in environ:
        place = _from_open_mpi(environ)
    elif _is_slurm_task(environ):
        place = _from_slurm(environ)
    elif any(name in environ for name in OTHER_MPI_VARIABLES):
        place = _from_mpi(environ, ask_mpi())
    elif any(name in environ for name in (*RANK_VARIABLES, LOCAL_SIZE_VARIABLES[0])):
        place = _from_rank_variables(environ)  # to say what is missing
    else:
        place = Place()
    _check_ranges(place)
    _refuse_other_world(place, environ)
    return place


def _is_slurm_task(environ: Mapping[str, str]) -> bool:
    """Whether srun has started this process; not so where its tasks are the daemons of an MPI, which start the ranks.

    A batch script has SLURM_PROCID too, and no step.
    """
    tasks = environ.get("SLURM_STEP_NUM_TASKS")
    return "SLURM_PROCID" in environ and all(environ.get(name, tasks) == tasks is not None for name in OTHER_MPI_SIZES)


def is_launched(environ: Mapping[str, str]) -> bool:
    """Whether something else decides how many ranks there are. For a look: no world is refused.

    A Slurm step or an mpirun of one process is just a place to run in, where `--nproc` may start more.
    """
    if "RANK" in environ:
        return True
    sizes = (environ.get(f"{OPEN_MPI}SIZE"), environ.get("SLURM_STEP_NUM_TASKS"), environ.get("PMI_SIZE"))
    if any(size not in (None, "1") for size in sizes):
        return True
    return all(size is None for size in sizes) and any(name in environ for name in OTHER_MPI_VARIABLES)


def own_rank(environ: Mapping[str, str]) -> int:
    """Which rank this process is, or would be if the rest of the environment made sense: not all of them need speak."""
    for name in (f"{OPEN_MPI}RANK", *OTHER_MPI_VARIABLES, "SLURM_PROCID", "RANK"):
        if environ.get(name, "").isdecimal():
            return int(environ[name])
    return 0


def has_own_device(environ: Mapping[str, str], place: Place, num_cuda_devices: int) -> bool:
    """Whether Slurm shows each task a GPU of its own, and not all tasks of a host all of its GPUs."""
    given = _integer(environ, "SLURM_GPUS_ON_NODE", 0)
    return place.launcher == "srun" and num_cuda_devices < place.local_world_size <= given


def _from_rank_variables(environ: Mapping[str, str]) -> Place:
    local_size = next((name for name in LOCAL_SIZE_VARIABLES if environ.get(name)), LOCAL_SIZE_VARIABLES[0])
    wanted = (*RANK_VARIABLES, local_size, "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in wanted if not environ.get(name)]
    if missing:
        present = ", ".join(f"{name}={environ[name]}" for name in wanted[:4] if environ.get(name))
        raise ValueError(
            f"the environment has {present or 'empty rank variables'} but not {', '.join(missing)}; start the ranks "
            f"with torchrun, which sets them all, or unset {', '.join(wanted[:4])} to run one process"
        )
    launcher: Launcher = "the environment"
    if HERE_VARIABLE in environ:
        launcher = "--nproc"
    elif "TORCHELASTIC_RUN_ID" in environ:
        launcher = "torchrun"
    elif "CROSS_SIZE" in environ:
        launcher = "deepspeed"
    rank, world_size, local_rank, local_world_size = (_integer(environ, name) for name in wanted[:4])
    return Place(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        launcher=launcher,
        host=environ["MASTER_ADDR"],
        port=_integer(environ, "MASTER_PORT"),
        store_is_served=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=_starts_before(environ) + _integer(environ, "SLURM_RESTART_COUNT", 0),
        job=f"job {environ['SLURM_JOB_ID']}" if environ.get("SLURM_JOB_ID") else "",
    )


def _starts_before(environ: Mapping[str, str]) -> int:
    """Torch does not count a start for which machines came or went."""
    return max(_integer(environ, name, 0) for name in ("TORCHELASTIC_RESTART_COUNT", ATTEMPT_VARIABLE))


def _from_open_mpi(environ: Mapping[str, str]) -> Place:
    names = [f"{OPEN_MPI}{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
    missing = [name for name in names if not environ.get(name)]
    if missing:
        raise ValueError(
            f"mpirun has set {names[0]} but not {', '.join(missing)}; start the ranks with Open MPI 4 or 5"
        )
    rank, size, local_rank, local_size = (_integer(environ, name) for name in names)
    key = next((environ[name] for name in MPI_JOB_VARIABLES if environ.get(name)), "")
    return _from_mpi(environ, MpiPlace(rank, size, local_rank, local_size, key), "mpirun")


def _from_mpi(environ: Mapping[str, str], found: MpiPlace, launcher: Launcher = "mpi4py") -> Place:
    on_one_host = found.local_size == found.size
    host = environ.get("MASTER_ADDR") or ("127.0.0.1" if on_one_host else "")
    if not host:
        raise WorldError(
            f"MPI has started {found.size} ranks on more than one host, and MASTER_ADDR does not say where they meet; "
            "set it to the address of the host of rank 0, on every rank (Open MPI: mpirun -x MASTER_ADDR=ADDRESS)"
        )
    return Place(
        rank=found.rank,
        world_size=found.size,
        local_rank=found.local_rank,
        local_world_size=found.local_size,
        launcher=launcher,
        host=host,
        port=_port(environ, found.key),
    )


def _from_slurm(environ: Mapping[str, str]) -> Place:
    names = ("SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
    missing = [name for name in names if not environ.get(name)]
    if missing:
        raise ValueError(f"this is a task of a Slurm step without {', '.join(missing)}; start the ranks with srun")
    rank, world_size = _integer(environ, "SLURM_PROCID"), _integer(environ, "SLURM_STEP_NUM_TASKS")
    tasks = expand_tasks(environ["SLURM_STEP_TASKS_PER_NODE"])
    hosts = expand_hosts(environ["SLURM_STEP_NODELIST"])
    node = _integer(environ, "SLURM_NODEID")
    if sum(tasks) != world_size or len(tasks) != len(hosts) or not 0 <= node < len(tasks):
        raise ValueError(
            f"SLURM_STEP_TASKS_PER_NODE={environ['SLURM_STEP_TASKS_PER_NODE']}, "
            f"SLURM_STEP_NODELIST={environ['SLURM_STEP_NODELIST']} and SLURM_NODEID={node} do not fit "
            f"SLURM_STEP_NUM_TASKS={world_size}; start the ranks with srun, in an environment without variables of "
            "another step"
        )
    job, step = environ["SLURM_JOB_ID"], environ.get("SLURM_STEP_ID", "0")
    attempt = _integer(environ, "SLURM_RESTART_COUNT", 0)
    return Place(
        rank=rank,
        world_size=world_size,
        local_rank=_integer(environ, "SLURM_LOCALID"),
        local_world_size=tasks[node],
        launcher="srun",
        host=environ.get("MASTER_ADDR") or (hosts[0] if len(hosts) > 1 else "127.0.0.1"),
        port=_port(environ, f"{job}.{step}.{attempt}"),
        attempt=attempt,
        job=f"job {job} step {step}",
        node=hosts[node],
    )


def _port(environ: Mapping[str, str], key: str) -> int:
    """MASTER_PORT, or one that follows from the name of the job, so that jobs on one host do not meet in one place."""
    if environ.get("MASTER_PORT"):
        return _integer(environ, "MASTER_PORT")
    return FIRST_PORT + zlib.crc32(key.encode()) % NUM_PORTS


def _check_ranges(place: Place) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if place.launcher in ("srun", "mpirun", "mpi4py"):
        names = ("the rank", "the number of ranks", "the rank on its host", "the number of ranks on its host")
    rank, size, local_rank, local_size = names
    for name, value, size_name, number in (
        (rank, place.rank, size, place.world_size),
        (local_rank, place.local_rank, local_size, place.local_world_size),
        (local_size, place.local_world_size - 1, size, place.world_size),
    ):
        if not 0 <= value < number:
            shown = place.local_world_size if name == local_size else value
            launcher = "torchrun" if place.launcher == "the environment" else place.launcher
            raise ValueError(f"{name}={shown} does not fit {size_name}={number}; start the ranks with {launcher}")


def _refuse_other_world(place: Place, environ: Mapping[str, str]) -> None:
    asked = environ.get(ASKED_VARIABLE)
    if asked:
        least, most = _asked_sizes(asked)
        if not least <= place.world_size <= most:
            found = f"found by {place.launcher}" if place.launcher else "as no launcher is in the environment"
            raise WorldError(
                f"{ASKED_VARIABLE}={asked}, but this is rank {place.rank} in a world of {place.world_size}, {found}; "
                "each process would train alone, or with too few: start the ranks as one job (srun, mpirun, torchrun "
                f"with the same --rdzv-endpoint on every host), or correct {ASKED_VARIABLE}"
            )
        return
    given = _integer(environ, "WORLD_SIZE", place.world_size)
    if given != place.world_size:  # beside variables of another launcher, which say how many there are
        raise WorldError(
            f"WORLD_SIZE={given}, but {place.launcher} has started {place.world_size} ranks; unset WORLD_SIZE, or "
            "start as many"
        )
    if place.world_size > 1:
        return
    for name, what, number in (
        (f"{OPEN_MPI}SIZE", "processes of an mpirun", f"{OPEN_MPI}RANK"),
        ("SLURM_STEP_NUM_TASKS", "tasks of a Slurm step", "SLURM_PROCID"),
        ("PMI_SIZE", "processes of an MPI", "PMI_RANK"),
        ("MV2_COMM_WORLD_SIZE", "processes of an MPI", "MV2_COMM_WORLD_RANK"),
    ):
        size = _integer(environ, name, 1)
        if size > 1:
            raise WorldError(
                f"WORLD_SIZE=1, but this is one of {size} {what} ({number}={environ.get(number, '?')}): each of them "
                "would train alone, into the same folder; start `python -m megatron_lite` itself by srun or mpirun, "
                "without RANK and WORLD_SIZE, or torchrun with --nnodes and one --rdzv-endpoint for all; "
                f"{ASKED_VARIABLE}=1 says that it is meant"
            )


def _asked_sizes(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text.strip())
    if match is None:
        raise ValueError(f"{ASKED_VARIABLE}={text!r} is not a number of ranks; write 8, or 4:8 for 4 to 8 of them")
    return int(match[1]), int(match[2] or match[1])


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if not text and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ValueError(f"{name}={text!r} is not an integer; let the launcher set it") from None


def expand_hosts(text: str) -> list[str]:
    """The names in a host list of Slurm, in order: ``node[1-2,07],login`` is node1, node2, node07 and login.

    A range is as wide as its first number. Several brackets in a name: the last one changes fastest. Raises ValueError.
    """
    return [host for name in _split_outside_brackets(text) for host in _expand_name(name, text)]


def expand_tasks(text: str) -> list[int]:
    """Tasks on each node, of Slurm's short form: ``2(x3),1`` is 2, 2, 2, 1. Raises ValueError."""
    tasks = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ValueError(
                f"{text!r} is not a list of tasks on each node, such as 2(x3),1: {part!r} is not understood"
            )
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def _split_outside_brackets(text: str) -> list[str]:
    names = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if not names or ",".join(names) != text:
        raise ValueError(f"{text!r} is not a host list: brackets do not match, or a name is missing")
    return names


def _expand_name(name: str, text: str) -> list[str]:
    """``rack[0-1]node[3,5]`` is a product: fixed parts between lists of numbers."""
    fixed_and_ranges = re.split(r"\[([^\[\]]*)\]", name)
    choices = [[part] if index % 2 == 0 else _expand_ranges(part, text) for index, part in enumerate(fixed_and_ranges)]
    return ["".join(parts) for parts in itertools.product(*choices)]


def _expand_ranges(ranges: str, text: str) -> list[str]:
    numbers = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"{text!r} is not a host list: [{ranges}] is not numbers and ranges, such as 1-3,07")
        first, last, width = int(match[1]), int(match[2] or match[1]), len(match[1])
        numbers += [f"{number:0{width}}" for number in range(first, last + 1)]
    return numbers
