"""The scripts that start ranks, without starting any: the command that each would run, and what each refuses."""

from __future__ import annotations

import itertools
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCAL, TORCHRUN = "launch/local.sh", "launch/torchrun.sh"
DEEPSPEED, MPI = "launch/deepspeed/train.sh", "launch/mpi/train.sh"
CONFIG = "configs/runs/quickstart.yaml"
USER_ERROR = 2


def bash(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def command_of(*arguments: str | Path, **environment: str) -> list[str]:
    """What the script says that it would run."""
    result = bash(arguments[0], "--dry-run", *arguments[1:], **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("+ ")]
    return shlex.split(line.removeprefix("+ "))


def pretend_mpirun(folder: Path, says: str) -> Path:
    folder.mkdir(exist_ok=True)
    program = folder / "mpirun"
    program.write_text(f"#!/bin/sh\necho '{says}'\n")
    program.chmod(0o755)
    return program


def pretend_deepspeed(folder: Path) -> str:
    """Value of PYTHONPATH for a Python that finds a module of that name, which is never imported."""
    (folder / "deepspeed").mkdir(exist_ok=True)
    (folder / "deepspeed" / "__init__.py").touch()
    return os.pathsep.join([str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])


def value_of(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


@pytest.mark.parametrize("script", [LOCAL, TORCHRUN, DEEPSPEED, MPI])
def test_help(script: str) -> None:
    result = bash(script, "--help")
    assert result.returncode == 0 and result.stdout.startswith(f"usage: bash {script} "), result.stdout + result.stderr
    assert "--dry-run" in result.stdout and "PYTHON names" in result.stdout


TRAINS = ["-m", "megatron_lite", "train", CONFIG, "run.name=a b", "--overwrite"]


def test_one_machine() -> None:
    command = command_of(LOCAL, "--nproc", "3", CONFIG, "run.name=a b", "--overwrite")
    assert command[:3] == ["env", "MEGATRON_LITE_WORLD_SIZE=3", sys.executable] and command[-len(TRAINS) :] == TRAINS
    assert value_of(command, "--nproc-per-node") == "3" and "--standalone" in command


def test_the_head_serves_the_store() -> None:
    """Whatever its address: 127.0.0.1 is this machine, and 192.0.2.1, of the range for documents, is not."""
    arguments = ("--nodes", "1:4", "--nproc", "2", CONFIG, "run.name=a b", "--overwrite")
    for head, is_host in (("127.0.0.1", "1"), ("localhost:29555", "1"), ("192.0.2.1", "0")):
        result = bash(TORCHRUN, "--dry-run", "--head", head, *arguments)
        if is_host == "0" and "there is no way" in result.stderr:  # a machine without a network
            continue
        command = command_of(TORCHRUN, "--head", head, *arguments)
        assert f"is_host={is_host}," in value_of(command, "--rdzv-conf")
        assert value_of(command, "--rdzv-endpoint") == (head if ":" in head else f"{head}:29400")
        assert value_of(command, "--nnodes") == "1:4" and command[-len(TRAINS) :] == TRAINS


def test_deepspeed_over_a_hostfile(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# machines\n\n127.0.0.1 slots=2\nlocalhost slots=4  # the larger one, without an end of line")
    path = pretend_deepspeed(tmp_path)
    options = ("--hostfile", hostfile, "--head", "10.0.0.1", "--no-ssh", "--node-rank", "1")
    command = command_of(DEEPSPEED, *options, CONFIG, "run.name=a b", "--overwrite", PYTHONPATH=path)
    assert command[-len(TRAINS) :] == TRAINS and "MEGATRON_LITE_WORLD_SIZE=6" in command
    assert (value_of(command, "--node_rank"), value_of(command, "--master_addr")) == ("1", "10.0.0.1")
    command = command_of(DEEPSPEED, *options, "--nproc", "1", CONFIG, PYTHONPATH=path)
    assert "MEGATRON_LITE_WORLD_SIZE=2" in command and value_of(command, "--num_gpus") == "1"


@pytest.mark.parametrize(
    ("says", "interface"), [("mpirun (Open MPI) 4.1.4", "oob_tcp_if_include"), ("mpirun (Open MPI) 5.0.11", "prte_")]
)
def test_mpirun_of_either_version(tmp_path: Path, says: str, interface: str) -> None:
    mpirun = pretend_mpirun(tmp_path / "bin", says)
    options = ("--mpirun", mpirun, "--hosts", "127.0.0.1:2,localhost:2", "--head", "10.0.0.1", "--interface", "eth7")
    command = command_of(MPI, *options, CONFIG, "run.name=a b", "--overwrite", NCCL_DEBUG="WARN", GREETING="hello")
    assert command[-len(TRAINS) - 1 :] == [*TRAINS, "run.network_interface=eth7"]
    assert value_of(command, "-n") == "4" and any(interface in word for word in command)
    handed_on = [after for before, after in itertools.pairwise(command) if before == "-x"]
    assert {"MASTER_ADDR=10.0.0.1", "MEGATRON_LITE_WORLD_SIZE=4", "NCCL_DEBUG"} <= set(handed_on)
    assert "GREETING" not in handed_on


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((LOCAL,), "there is no CONFIG"),
        ((LOCAL, "--nproc", "0", CONFIG), "--nproc '0': give a number of 1 or more"),
        ((LOCAL, "--nproc"), "--nproc '': give a number of 1 or more"),
        ((LOCAL, "--overwrite", CONFIG), "--overwrite: no such option; those of megatron-lite train come after CONFIG"),
        ((TORCHRUN, "--head", "localhost", CONFIG), "--nodes '': give a number of machines, like 2, or 1:4"),
        ((TORCHRUN, "--nodes", "2:1", "--head", "localhost", CONFIG), "the first number is the larger one"),
        ((TORCHRUN, "--nodes", "2", CONFIG), "--head is missing"),
        ((TORCHRUN, "--nodes", "2", "--head", "localhost:0", CONFIG), "port '0': give a port"),
        ((TORCHRUN, "--nodes", "2", "--head", "no-such-host.invalid", CONFIG), "error: --head no-such-host.invalid: "),
        ((DEEPSPEED, "--hostfile", "nowhere", CONFIG), "--hostfile nowhere: no such file; write a line like"),
        ((MPI, "--mpirun", "no-such-mpirun", CONFIG), "no-such-mpirun is not Open MPI's (it cannot be run)"),
    ],
)
def test_misuse(arguments: tuple[str, ...], complaint: str) -> None:
    result = bash(*arguments)
    assert result.returncode == USER_ERROR, result.stdout + result.stderr
    assert complaint in result.stderr and result.stderr.count("error: ") == 1, result.stderr


@pytest.mark.parametrize(
    ("text", "arguments", "complaint"),
    [
        ("", (), "names no machine"),
        ("node1 8\n", (), "'node1 8' is not like 'node1 slots=8'"),
        ("no-such-host.invalid slots=2\n", (), "nobody knows the host no-such-host.invalid"),
        ("localhost slots=2\n", ("--nproc", "3"), "--nproc 3: {} gives localhost 2 slots"),
        ("localhost slots=2\n127.0.0.2 slots=2\n", (), "localhost is 127.0.0.1 here, where the others cannot reach it"),
        ("localhost slots=2\n", ("--no-ssh", "--head", "10.0.0.1", "--node-rank", "1"), "names 1 machines, from 0"),
    ],
)
def test_hostfiles_that_cannot_be(tmp_path: Path, text: str, arguments: tuple[str, ...], complaint: str) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text(text)
    result = bash(DEEPSPEED, "--hostfile", hostfile, *arguments, CONFIG, PYTHONPATH=pretend_deepspeed(tmp_path))
    assert result.returncode == USER_ERROR, result.stdout + result.stderr
    assert complaint.format(hostfile) in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("hosts", "complaint"),
    [
        ("node1", "'node1' is not like node1:8"),
        ("no-such-host.invalid:2", "nobody knows the host no-such-host.invalid"),
        ("localhost:2,127.0.0.2:2", "the first host is 127.0.0.1 here, where the others cannot reach it"),
        ("localhost:2", "--nproc 3: --hosts localhost:2 has 2 slots"),
    ],
)
def test_hosts_of_an_mpirun_that_cannot_be(tmp_path: Path, hosts: str, complaint: str) -> None:
    mpirun = pretend_mpirun(tmp_path / "bin", "mpirun (Open MPI) 4.1.4")
    result = bash(MPI, "--mpirun", mpirun, "--hosts", hosts, "--nproc", "3", CONFIG)
    assert result.returncode == USER_ERROR, result.stdout + result.stderr
    assert complaint in result.stderr, result.stderr


def test_another_mpi() -> None:
    result = bash(MPI, "--mpirun", "true", CONFIG)
    assert result.returncode == USER_ERROR and "true is not Open MPI's" in result.stderr


def test_a_port_of_the_head_that_is_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = bash(TORCHRUN, "--nodes", "2", "--head", f"127.0.0.1:{port}", CONFIG)
    assert result.returncode == USER_ERROR, result.stdout + result.stderr
    assert f"port {port} of this machine cannot be used (Address already in use)" in result.stderr


def test_a_python_without_the_package(tmp_path: Path) -> None:
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -S -E -P "$@"\n')
    (tmp_path / "python").chmod(0o755)
    result = bash(LOCAL, CONFIG, PYTHON=str(tmp_path / "python"))
    assert result.returncode == USER_ERROR and "has no module megatron_lite" in result.stderr, result.stderr
