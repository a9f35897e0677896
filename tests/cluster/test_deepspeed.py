"""DeepSpeed's launcher over the machines of a hostfile: without ssh, by pdsh, and as the worlds of one it can make."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest

from tests.cluster.commands import ROOT, run
from tests.cluster.hosts import Host, network
from tests.cluster.runs import differences, run_of, write_run
from tests.cluster.slurm import NODES, PROGRAMS, slurm_cluster
from tests.train.commands import PROGRAM

pytestmark = pytest.mark.cluster("ip", "nsenter", "setpriv", "sshd", "ssh", "ssh-keygen", "pdsh")

SCRIPT = ROOT / "launch/deepspeed/train.sh"


def environment(folder: Path) -> dict[str, str]:
    """Where DeepSpeed compiles an operation of its own, should it ever: nothing here may need one."""
    extensions = folder / "extensions"
    return {"PYTHON": sys.executable, "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(extensions)}


def nothing_compiled(folder: Path) -> bool:
    return not (folder / "extensions").exists() or not any((folder / "extensions").rglob("*.o"))


def write_hostfile(hosts: list[Host], folder: Path, slots: int = 2) -> Path:
    path = folder / "hosts"
    path.write_text("# two machines\n" + "".join(f"{host.name} slots={slots}\n" for host in hosts))
    return path


def test_two_hosts_without_ssh(reference: Path, corpus: Path, tmp_path: Path) -> None:
    config = write_run(tmp_path, corpus)
    with network(2) as hosts, contextlib.ExitStack() as stack:
        arguments = ["bash", SCRIPT, "--hostfile", write_hostfile(hosts, tmp_path), "--no-ssh", config]
        commands = [
            stack.enter_context(
                host.command(arguments, log=tmp_path / f"{host.name}.log", environment=environment(tmp_path))
            )
            for host in hosts
        ]
        codes = [command.wait() for command in commands]
    said = commands[0].said() + commands[1].said()
    assert codes == [0, 0], said
    assert "4 ranks on 2 hosts, found by deepspeed; gloo over eth0; they meet at 10.77.0.1:29500" in said
    assert differences(run_of(config), reference) == []
    assert nothing_compiled(tmp_path)


def test_two_hosts_by_pdsh(reference: Path, corpus: Path, tmp_path: Path) -> None:
    config = write_run(tmp_path, corpus)
    with network(2, sshd=True) as hosts:
        hostfile = write_hostfile(hosts, tmp_path)
        (tmp_path / "settings").write_text(f"DS_ACCELERATOR=cpu\nTORCH_EXTENSIONS_DIR={tmp_path}/extensions\n")
        settings = {**environment(tmp_path), "DS_ENV_FILE": str(tmp_path / "settings")}
        launch = [*PROGRAM, "launch", config, "--on", "deepspeed", "--hostfile", hostfile]
        ended = hosts[0].run(launch, environment=settings)
        assert ended.code == 0, ended.said
        assert "4 ranks on 2 hosts, found by deepspeed; gloo over eth0" in ended.said, ended.said
        assert differences(run_of(config), reference) == []
        assert nothing_compiled(tmp_path)

        refused = hosts[0].run(["bash", SCRIPT, "--hostfile", hostfile, config, "parallel.tp=3"], environment=settings)
        assert refused.code != 0 and "error: " in refused.said, refused.said


BATCH = """#!/bin/bash
exec "$PYTHON" -m deepspeed.launcher.runner --launcher slurm --no_ssh_check --hostfile {folder}/hosts \\
  --master_addr node1 {folder}/train.py train {config}
"""


@pytest.mark.cluster(*PROGRAMS)
def test_the_tasks_that_it_starts_by_srun(reference: Path, corpus: Path, tmp_path: Path) -> None:
    """With no word of their ranks, which Slurm has told them all the same."""
    config = write_run(tmp_path, corpus)
    (tmp_path / "hosts").write_text("".join(f"{node} slots=2\n" for node in NODES))
    (tmp_path / "train.py").write_text("from megatron_lite.cli import main\n\nmain()\n")
    script = tmp_path / "train.sbatch"
    script.write_text(BATCH.format(folder=tmp_path, config=config))
    with slurm_cluster() as cluster:
        settings = {**environment(tmp_path), "MEGATRON_LITE_WORLD_SIZE": "4"}
        options = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2")
        number = cluster.submit(script, options=options, output=tmp_path, **settings)
        (job,) = cluster.wait(number)
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.said()
    assert "4 ranks on 2 hosts, found by srun" in job.said(), job.said()
    assert differences(run_of(config), reference) == []


def test_a_task_that_takes_itself_for_the_world(corpus: Path, tmp_path: Path) -> None:
    """`deepspeed --launcher slurm` starts tasks of a Slurm step with no word of their ranks, and DeepSpeed then makes
    each of them a world of one. All four would train the same run and write to one folder."""
    config = write_run(tmp_path, corpus)
    train = [sys.executable, "-m", "megatron_lite", "train", config]
    step = {
        "SLURM_JOB_ID": "17", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "node[1-2]",
    }  # fmt: skip
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "CROSS_SIZE": "1"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    ended = run(train, environment={**step, **alone, **meeting})
    assert ended.code == 2, ended.said
    assert "WORLD_SIZE=1, but this is one of 4 tasks of a Slurm step" in ended.said
    assert not run_of(config).exists()
