"""The job scripts of launch/slurm under a real Slurm: the bits of one machine, pre-emption, sweeps, and every end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cluster.commands import ROOT, run
from tests.cluster.runs import NUM_STEPS, differences, run_of, write_run
from tests.cluster.slurm import NODES, PROGRAMS, Cluster, Job, slurm_cluster
from tests.train.commands import PROGRAM
from tests.train.tiny_run import read_metrics

pytestmark = pytest.mark.cluster(*PROGRAMS)

FOLDER = ROOT / "launch" / "slurm"
# Script -> what makes two processes on each of two nodes of it.
SCRIPTS: dict[str, tuple[str, ...]] = {
    "train.sbatch": ("--nodes=2", "--gpus-per-node=2"),
    "train_srun.sbatch": ("--nodes=2", "--gpus-per-node=2", "--ntasks-per-node=2"),
}
ENDLESS = ("train.num_steps=100000", "optim.decay_steps=12", "train.eval_interval=0", "checkpoint.interval=0")
STOPPED = 75


@pytest.fixture(scope="module")
def running_cluster() -> Iterator[Cluster]:
    with slurm_cluster() as up:
        yield up


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """Idle. A test that fails leaves no job to the next one."""
    yield running_cluster
    running_cluster.clear()


def submit(
    cluster: Cluster, script: str, config: Path, *arguments: str, options: Sequence[str] | None = None, **more: str
) -> int:
    """The script with this Python, over two nodes with two processes each unless the options say otherwise."""
    return cluster.submit(
        FOLDER / script,
        config,
        *arguments,
        options=SCRIPTS[script] if options is None else options,
        output=config.parent,
        **{"PYTHON": sys.executable, **more},
    )


def until(happened: Callable[[], Any], job: Callable[[], Job], timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, f"{job()}:\n{job().said()}"
        time.sleep(0.02)


def num_records(config: Path) -> int:
    metrics = run_of(config) / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def errors(job: Job) -> list[str]:
    return [line for line in job.said().splitlines() if line.startswith("error:")]


def test_nothing_is_left_of_a_cluster(tmp_path: Path) -> None:
    """Jobs, the daemons that watch over them, and the folder: also where a test fails while they are busy."""
    script = tmp_path / "sleep.sbatch"
    script.write_text("#!/bin/bash\nsetsid sleep 600 &\nsrun sleep 600\n")
    with pytest.raises(RuntimeError, match="the test fails"), slurm_cluster() as cluster:
        tag = f"SLURM_CONF={cluster.environment['SLURM_CONF']}"
        number = cluster.submit(script, options=["--nodes=2"], output=tmp_path)
        until(lambda: len(processes_of(tag, b"sleep")) == 3, lambda: cluster.job(number))
        assert len(processes_of(tag, b"slurmd")) == len(NODES)
        raise RuntimeError("the test fails")
    assert processes_of(tag, b"") == []
    assert not Path(cluster.environment["SLURM_CONF"]).parent.exists()


def processes_of(tag: str, name: bytes) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and tag.encode() in (entry / "environ").read_bytes():
                found += [int(entry.name)] if name in (entry / "cmdline").read_bytes().partition(b"\0")[0] else []
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_slurm_takes_the_script_as_it_is(cluster: Cluster, script: str) -> None:
    """With the nodes, GPUs, cores and memory that its #SBATCH lines ask for."""
    result = cluster.call("sbatch", "--test-only", FOLDER / script, "CONFIG")
    assert result.returncode == 0, result.stderr
    assert f"{2 * 64} processors on nodes node[1-2]" in result.stderr
    control = cluster.call("sbatch", "--test-only", "--nodes=3", FOLDER / script, "CONFIG")
    assert control.returncode == 1, "this cluster has two"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_job_computes_what_one_machine_does(
    cluster: Cluster, script: str, corpus: Path, reference: Path, tmp_path: Path
) -> None:
    """In every bit; and it is one run to wandb and TensorBoard, with the numbers of metrics.jsonl."""
    config = write_run(tmp_path, corpus, "run.wandb=offline", "run.tensorboard=true")
    (job,) = cluster.wait(submit(cluster, script, config))
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.said()
    assert differences(reference, run_of(config)) == []
    (command,) = job.lines("+ srun --")
    assert "--wait=120" in command
    assert len(job.lines("megatron_lite.distributed.agent")) == (script == "train.sbatch")
    assert len(job.lines(f"step {NUM_STEPS}/{NUM_STEPS}")) == 1, "one rank speaks"
    expected = read_metrics(run_of(config))
    assert read_wandb(run_of(config)) == expected
    check_tensorboard(run_of(config), expected)


def test_srun_alone_starts_a_run(cluster: Cluster, corpus: Path, reference: Path, tmp_path: Path) -> None:
    """Without a script: the ranks find one another by the list of the step's nodes."""
    config = write_run(tmp_path, corpus)
    srun = ["srun", "--nodes=2", "--ntasks-per-node=2", sys.executable, "-m", "megatron_lite", "train", config]
    ended = run(srun, environment=cluster.environment, timeout_s=180)
    assert ended.code == 0, ended.said
    assert differences(reference, run_of(config)) == []


def test_the_launch_command_submits_a_job(cluster: Cluster, corpus: Path, reference: Path, tmp_path: Path) -> None:
    config = write_run(tmp_path, corpus)
    launch = [*PROGRAM, "launch", config, "--on", "slurm", "--nodes", 2, "--nproc-per-node", 2]
    ended = run(launch, environment=cluster.environment)
    assert ended.code == 0, ended.said
    number = int(ended.said.partition("Submitted batch job ")[2].split()[0])
    (job,) = cluster.wait(number)
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.said()
    assert job.output.parent == run_of(config)
    assert differences(reference, run_of(config)) == []


def test_the_doctor_looks_at_two_nodes(cluster: Cluster) -> None:
    ended = run([*PROGRAM, "doctor", "--nodes", 2, "--json"], environment=cluster.environment)
    report = json.loads(ended.said[ended.said.index("{\n") : ended.said.rindex("}") + 1])
    assert ended.code in (0, 2), ended.said  # 2: this machine is what it is
    assert {row["link"] for row in report["links between hosts"]["rows"]} == {"node1 -> node2", "node2 -> node1"}


def read_wandb(folder: Path) -> list[dict[str, float]]:
    """The records in the only log of wandb there. It is a log of LevelDB behind a header of seven bytes: blocks of 32
    KiB, in them pieces with a checksum, a length and a kind (1: whole, 2, 3, 4: first, middle and last of several)."""
    from wandb.proto.wandb_internal_pb2 import Record

    (log,) = folder.glob("wandb/offline-run-*/*.wandb")
    content, at, message, records = log.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        left_in_block = -at % 32768 or 32768
        if left_in_block < 7:
            at += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        message += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record.FromString(message)
            if record.HasField("history"):
                items = record.history.item
                values = {item.key or ".".join(item.nested_key): float(item.value_json) for item in items}
                records.append({"step": values["_step"], **{k: v for k, v in values.items() if not k.startswith("_")}})
            message = b""
    return records


def check_tensorboard(folder: Path, expected: list[dict[str, float]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert len(list((folder / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    names = {name for record in expected for name in record} - {"step"}
    assert set(events.Tags()["scalars"]) == names
    for name in names:
        wanted = {record["step"]: float(np.float32(record[name])) for record in expected if name in record}
        assert {event.step: event.value for event in events.Scalars(name)} == wanted, name


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_job_that_is_warned_is_queued_again_and_ends_with_the_same_bits(
    cluster: Cluster, script: str, corpus: Path, reference: Path, tmp_path: Path
) -> None:
    config = write_run(tmp_path, corpus)
    number = submit(cluster, script, config)

    def job() -> Job:
        return cluster.job(number)

    until(lambda: 3 in ranks_of(cluster, number), job)
    rank = ranks_of(cluster, number)[3]
    until(lambda: num_records(config), job)
    os.kill(rank, signal.SIGSTOP)  # holds the run where it is
    try:
        assert num_records(config) < NUM_STEPS - 1, "it went on too far to be stopped"
        cluster.ask("scancel", "--batch", "--signal=USR1", number)  # as Slurm itself does before the limit
        until(lambda: job().lines("SIGUSR1: stopping"), job)
    finally:
        os.kill(rank, signal.SIGCONT)
    until(lambda: job().restarts == 1, job)
    assert (run_of(config) / "requeue").read_text().startswith("SIGUSR1 ")
    (ended,) = cluster.wait(number)
    assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", 0, 1), ended.said()
    (stopped,) = ended.lines("the run was stopped by SIGUSR1 after step")
    step = int(stopped.partition("after step ")[2].partition(";")[0])
    assert 0 < step < NUM_STEPS
    assert len(ended.lines("going on from", f"after step {step}")) == 1
    assert not (run_of(config) / "requeue").exists()
    assert differences(reference, run_of(config)) == []


def ranks_of(cluster: Cluster, number: int) -> dict[int, int]:
    """The process id of each rank of a job, as this host counts."""
    job = {"SLURM_JOB_ID": str(number), "SLURM_CONF": cluster.environment["SLURM_CONF"]}
    found: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if not entry.name.isdigit() or b"distributed.agent" in (command := (entry / "cmdline").read_bytes()):
                continue
            pairs = (pair.partition(b"=") for pair in (entry / "environ").read_bytes().split(b"\0"))
            environment = {name.decode(): value.decode() for name, _, value in pairs}
            if b"-m\0megatron_lite\0train" in command and job.items() <= environment.items():
                rank = environment.get("RANK", environment.get("SLURM_PROCID", ""))
                found[int(rank)] = int(entry.name)
    return found


# A training of which only the ends matter. Its first argument that is a file is where it notes that it has begun.
PRETENDED = """#!/bin/bash
trap 'exit 75' USR1 TERM
echo "began as $SLURM_PROCID, start $SLURM_RESTART_COUNT" >>"$4"
while true; do sleep 0.1; done
"""


def test_slurm_warns_before_the_limit_and_a_cancelled_job_stays_away(cluster: Cluster, tmp_path: Path) -> None:
    """The first life ends by the time limit, with a warning; the second by scancel, with the same exit code."""
    python, notes = tmp_path / "python", tmp_path / "notes"
    python.write_text(PRETENDED)
    python.chmod(0o755)
    # A minute is the shortest limit; Slurm looks every half minute, and so warns up to a minute too early.
    options = (*SCRIPTS["train_srun.sbatch"], "--time=1", "--signal=B:USR1@10")
    number = submit(cluster, "train_srun.sbatch", notes, options=options, PYTHON=str(python))

    def job() -> Job:
        return cluster.job(number)

    until(lambda: (job().restarts, job().state) == (1, "PENDING"), job)  # COMPLETING before, while its first life ends
    assert notes.read_text().count("began") == 4
    cluster.hurry(number, "TimeLimit=5")
    until(lambda: notes.read_text().count("began") == 8, job)
    cluster.ask("scancel", number)
    (ended,) = cluster.wait(number)
    assert (ended.state, ended.restarts) == ("CANCELLED", 1), ended.said()
    assert len(ended.lines("the job goes back into the queue")) == 1, "the first time"


def test_each_task_of_an_array_has_a_line_of_the_sweep(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    config = write_run(tmp_path, corpus, "parallel.dp=1")
    sweep = tmp_path / "rates.txt"
    sweep.write_text("optim.lr=1e-3\noptim.lr=2e-3 'optim.beta2=0.9'\n")
    options = ("--array=1-2", "--nodes=1", "--gpus-per-node=2")
    number = submit(cluster, "train.sbatch", config, options=options, SWEEP=str(sweep))
    jobs = cluster.wait(number)
    assert [(job.index, job.state) for job in jobs] == [(1, "COMPLETED"), (2, "COMPLETED")], [j.said() for j in jobs]
    folders = [tmp_path / "runs" / f"rates-{job.index}" for job in jobs]
    highest = [max(record["lr"] for record in read_metrics(folder)) for folder in folders]
    assert highest == [1e-3, 2e-3]
    assert not run_of(config).exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_job_of_which_a_rank_is_killed_has_failed(
    cluster: Cluster, script: str, corpus: Path, tmp_path: Path
) -> None:
    config = write_run(tmp_path, corpus, *ENDLESS)
    number = submit(cluster, script, config)
    until(lambda: num_records(config), lambda: cluster.job(number))
    os.kill(ranks_of(cluster, number)[3], signal.SIGKILL)
    killed = time.monotonic()
    (job,) = cluster.wait(number)
    assert time.monotonic() - killed < 30
    assert job.state == "FAILED" and job.exit_code not in (0, STOPPED), job.said()
    assert job.restarts == 0


BAD: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], str]] = {
    "too many tasks for the layout": (
        "train_srun.sbatch",
        ("--ntasks-per-node=3",),
        (),
        "the number of processes, 6",
    ),
    "a layout for more nodes": ("train.sbatch", (), ("parallel.tp=4", "parallel.pp=2"), "the number of processes, 4"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_layout_that_does_not_fit_is_said_once(cluster: Cluster, case: str, corpus: Path, tmp_path: Path) -> None:
    script, options, overrides, complaint = BAD[case]
    config = write_run(tmp_path, corpus)
    (job,) = cluster.wait(submit(cluster, script, config, *overrides, options=(*SCRIPTS[script], *options)))
    assert job.state == "FAILED" and job.exit_code not in (0, STOPPED), job.said()
    assert len(errors(job)) == 1 and complaint in job.said(), job.said()


@pytest.mark.parametrize("script", SCRIPTS)
def test_another_config_on_another_node_is_one_line(
    cluster: Cluster, script: str, corpus: Path, tmp_path: Path
) -> None:
    """In a folder that each node has for itself."""
    for node, folder in cluster.disks.items():
        text = write_run(tmp_path, corpus, *(["optim.lr=0.5"] if node == NODES[1] else [])).read_text()
        (folder / "tiny.yaml").write_text(text)
    number = cluster.submit(
        FOLDER / script,
        cluster.disk / "tiny.yaml",
        options=SCRIPTS[script],
        output=tmp_path,
        PYTHON=sys.executable,
    )
    (job,) = cluster.wait(number)
    assert job.state == "FAILED" and job.exit_code not in (0, STOPPED), job.said()
    (line,) = errors(job)
    assert "optim.lr (0.5, not 0.01)" in line and NODES[1] in line, line


def test_tasks_that_think_they_are_alone_are_refused(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    """What a variable that was left over makes of srun: each task would train the whole run by itself."""
    config = write_run(tmp_path, corpus)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    meeting = {"MASTER_ADDR": NODES[0], "MASTER_PORT": "29500"}
    srun = ["srun", "--nodes=2", "--ntasks-per-node=2", sys.executable, "-m", "megatron_lite", "train", config]
    ended = run(srun, environment={**cluster.environment, **alone, **meeting})
    assert ended.code == 2, ended.said
    (line,) = [line for line in ended.said.splitlines() if line.startswith("error:")]
    assert "WORLD_SIZE=1, but this is one of 4 tasks of a Slurm step" in line
    assert not run_of(config).exists()
