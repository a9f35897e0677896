"""mpirun of Open MPI 4 (Debian's) and 5 (pip's), on one host and over two by ssh: the bits of one machine."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from megatron_lite.distributed.rank import EXIT_REQUEUE
from tests.cluster.commands import ROOT, Command, Ended, run
from tests.cluster.hosts import Host, network
from tests.cluster.runs import SMALL, differences, run_of, write_run
from tests.train.commands import PROGRAM

pytestmark = pytest.mark.cluster("ip", "nsenter", "setpriv", "sshd", "ssh", "ssh-keygen", "ompi_info")

SCRIPT = ROOT / "launch/mpi/train.sh"
PYTHON = {"PYTHON": sys.executable}
MPIRUN = {"4": Path("/usr/bin/mpirun"), "5": Path(sys.executable).parent / "mpirun"}


@pytest.mark.parametrize("version", MPIRUN)
def test_one_host(reference: Path, corpus: Path, tmp_path: Path, version: str) -> None:
    config = write_run(tmp_path, corpus)
    ended = run(["bash", SCRIPT, "--mpirun", MPIRUN[version], "--nproc", 4, config], environment=PYTHON)
    assert ended.code == 0, ended.said
    assert "4 ranks on 1 host, found by mpirun; gloo over lo; they meet at 127.0.0.1:" in ended.said, ended.said
    assert differences(run_of(config), reference) == []


def test_the_launch_command(reference: Path, corpus: Path, tmp_path: Path) -> None:
    """And a stop leaves time for a checkpoint."""
    config = write_run(tmp_path, corpus)
    launch = [*PROGRAM, "launch", config, "--on", "mpi", "--nproc-per-node", 4, "run.device=cpu"]
    settings = {"PATH": f"{MPIRUN['4'].parent}:{os.environ['PATH']}"}
    ended = run(launch, environment=settings)
    assert ended.code == 0, ended.said
    assert differences(run_of(config), reference) == []

    endless = write_run(
        tmp_path, corpus, *SMALL, "train.num_steps=100000", "parallel.dp=1", "train.eval_interval=0", name="endless"
    )
    launch = [
        *PROGRAM,
        "launch",
        endless,
        "--on",
        "mpi",
        "--nproc-per-node",
        2,
        "checkpoint.interval=0",
        "run.device=cpu",
    ]
    with Command(launch, log=tmp_path / "log", environment=settings) as command:
        metrics = run_of(endless) / "metrics.jsonl"
        command.wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 3, "the third step")
        os.kill(command.process.pid, signal.SIGTERM)
        assert command.wait_for_all() == EXIT_REQUEUE, command.said()
    assert len(list((run_of(endless) / "checkpoints").glob("step-*"))) == 1


def over_two(hosts: list[Host], version: str, *arguments: object) -> Ended:
    options = ("--mpirun", MPIRUN[version], "--hosts", f"{hosts[0].name}:2,{hosts[1].name}:2")
    return hosts[0].run(["bash", SCRIPT, *options, "--interface", "eth0", *arguments], environment=PYTHON)


@pytest.mark.parametrize("version", MPIRUN)
def test_two_hosts(reference: Path, corpus: Path, tmp_path: Path, version: str) -> None:
    """And more ranks than slots, or a host that nobody knows, are refused before anything starts."""
    config = write_run(tmp_path, corpus)
    with network(2, sshd=True) as hosts:
        ended = over_two(hosts, version, config)
        assert ended.code == 0, ended.said
        assert "4 ranks on 2 hosts, found by mpirun; gloo over eth0; they meet at 10.77.0.1:" in ended.said, ended.said
        assert differences(run_of(config), reference) == []

        too_many = over_two(hosts, version, "--nproc", 5, config)
        assert too_many.code == 2 and "--nproc 5: --hosts host1:2,host2:2 has 4 slots" in too_many.said
        unknown = hosts[0].run(["bash", SCRIPT, "--hosts", "host1:2,host9:2", config], environment=PYTHON)
        assert unknown.code == 2 and "nobody knows the host host9" in unknown.said


def test_ranks_of_which_each_would_be_alone(corpus: Path, tmp_path: Path) -> None:
    """As where mpirun has started processes that another MPI, or none, takes for worlds of one."""
    config = write_run(tmp_path, corpus)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    settings = [f"{name}={value}" for name, value in {**alone, "MASTER_PORT": "29999"}.items()]
    mpirun = [MPIRUN["4"], "--allow-run-as-root", "--oversubscribe", "-n", 2]
    ended = run([*mpirun, "env", *settings, sys.executable, "-m", "megatron_lite", "train", config])
    assert ended.code == 2, ended.said
    assert ended.said.count("WORLD_SIZE=1, but this is one of 2 processes of an mpirun") == 1, ended.said
    assert not run_of(config).exists()
