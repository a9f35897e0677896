"""The job scripts of launch/slurm without a Slurm: programs of its names that note how they were called."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "launch" / "slurm"
SCRIPTS = ("train.sbatch", "train_srun.sbatch")
USER_ERROR, STOPPED, WARNED_EARLY = 2, 75, 138
CONFIG = "configs/runs/quickstart.yaml"

# What Slurm tells the script of a job of two nodes with two tasks or GPUs each.
JOB = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_NTASKS": "4",
    "SLURM_GPUS_ON_NODE": "2",
    "SLURM_CPUS_PER_TASK": "8",
}
PROGRAMS = {
    "scontrol": 'echo "scontrol $*" >>calls; [ "$1 $2" != "show hostnames" ] || printf "gpu07\\ngpu08\\n"',
    "scancel": 'echo "scancel $*" >>calls; touch cancelled',
    "squeue": "cat state",
    "srun": 'for word; do printf "%s\\n" "$word"; done >srun; env >environment; cat script | sh',
}


class Slurm:
    """A folder with the pretended programs. Each test says what srun does, and what state the job is in after it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, body in PROGRAMS.items():
            program = folder / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(f"#!/bin/sh\n{body}\n")
            program.chmod(0o755)
        self.says("exit 0", state="RUNNING")

    def says(self, script: str, *, state: str) -> None:
        (self.folder / "script").write_text(f"{script}\n")
        (self.folder / "state").write_text(f"{state}\n")

    def start(self, script: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        """Of variables that tests are themselves run with, only the path."""
        return subprocess.Popen(
            ["bash", str(FOLDER / script), *map(str, arguments)],
            cwd=self.folder,
            env={"PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "MEGATRON_LITE_ROOT": str(ROOT)}
            | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(script, *arguments, **environment)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def calls(self) -> list[str]:
        found = (self.folder / "calls").read_text().splitlines() if (self.folder / "calls").exists() else []
        return [call for call in found if not call.startswith("scontrol show hostnames")]

    def srun(self) -> list[str]:
        return (self.folder / "srun").read_text().splitlines()

    def environment(self) -> dict[str, str]:
        lines = (self.folder / "environment").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


def words_of(said: str) -> list[str]:
    """The command that a script has printed, as a shell reads it."""
    (line,) = [line for line in said.splitlines() if line.startswith("+ ")]
    return shlex.split(line[2:])


def test_each_gpu_is_a_task(slurm: Slurm) -> None:
    result = slurm.run("train_srun.sbatch", CONFIG, "train.num_steps=5", "--overwrite", PYTHON="py", **JOB)
    assert result.returncode == 0, result.stderr
    command = ["py", "-m", "megatron_lite", "train", CONFIG, "train.num_steps=5", "--overwrite"]
    assert slurm.srun() == ["--kill-on-bad-exit=0", "--wait=120", "--cpus-per-task=8", "--ntasks=4", *command]
    assert words_of(result.stdout) == ["srun", *slurm.srun()], "what is printed is what runs"
    given = slurm.environment()
    assert (given["MEGATRON_LITE_WORLD_SIZE"], given["MASTER_ADDR"]) == ("4", "gpu07")
    assert slurm.calls() == []


def test_each_node_has_one_agent(slurm: Slurm) -> None:
    result = slurm.run("train.sbatch", CONFIG, "run.name=a b", PYTHON="py", **JOB)
    assert result.returncode == 0, result.stderr
    command = ["bash", str(FOLDER / "agent.sh"), CONFIG, "run.name=a b"]
    assert slurm.srun()[-6:] == ["--ntasks=2", "--ntasks-per-node=1", *command]
    assert words_of(result.stdout) == ["srun", *slurm.srun()]
    given = slurm.environment()
    assert (given["NPROC_PER_NODE"], given["MEGATRON_LITE_WORLD_SIZE"]) == ("2", "4")
    slurm.run("train.sbatch", CONFIG, NPROC_PER_NODE="3", **JOB)
    assert slurm.environment()["MEGATRON_LITE_WORLD_SIZE"] == "6"


def test_jobs_and_their_restarts_meet_on_ports_of_their_own(slurm: Slurm) -> None:
    ports = []
    for job, restarts in ((1, 0), (1, 1), (2, 0), (399, 2)):
        told = {**JOB, "SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(restarts), "DRY_RUN": "1"}
        said = slurm.run("train_srun.sbatch", CONFIG, **told).stdout
        ports.append(int(said.partition("gpu07:")[2].split()[0]))
    assert len(set(ports)) == 4 and all(20000 <= port < 32000 for port in ports)
    assert "gpu07:1234\n" in slurm.run("train_srun.sbatch", CONFIG, **JOB, MASTER_PORT="1234", DRY_RUN="1").stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_container_sees_the_folder_of_the_job(slurm: Slurm, script: str) -> None:
    """A dry run: the printed command has what pyxis takes, and nothing is started."""
    more = {"CONTAINER_IMAGE": "registry#megatron-lite:1", "DRY_RUN": "1", **JOB}
    result = slurm.run(script, CONFIG, **more)
    assert result.returncode == 0, result.stderr
    words = words_of(result.stdout)
    own = [f"--container-mounts={slurm.folder}:{slurm.folder}", f"--container-workdir={slurm.folder}"]
    assert ["--container-image=registry#megatron-lite:1", *own] == [word for word in words if "--container" in word]
    assert words[0] == "srun" and not (slurm.folder / "srun").exists()
    words = words_of(slurm.run(script, CONFIG, CONTAINER_MOUNTS="/data:/data,/runs:/runs", **more).stdout)
    assert "--container-mounts=/data:/data,/runs:/runs" in words
    assert not any("--container" in word for word in words_of(slurm.run(script, CONFIG, DRY_RUN="1", **JOB).stdout))


def test_the_python_of_a_container_is_its_own(slurm: Slurm) -> None:
    """And outside the one of .venv, where there is one."""
    project = slurm.folder / "project"
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / "launch").symlink_to(ROOT / "launch")
    python = project / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    told = {**JOB, "MEGATRON_LITE_ROOT": str(project), "DRY_RUN": "1"}
    assert str(python) in words_of(slurm.run("train_srun.sbatch", CONFIG, **told).stdout)
    assert "python3" in words_of(slurm.run("train_srun.sbatch", CONFIG, CONTAINER_IMAGE="i", **told).stdout)


def test_a_task_of_an_array_takes_its_line(slurm: Slurm) -> None:
    (slurm.folder / "lr.txt").write_text("optim.lr=1e-3\noptim.lr=2e-3 'optim.betas=[0.8, 0.9]' data.train=$HOME/*\n")
    told = {**JOB, "SWEEP": "lr.txt", "SLURM_ARRAY_TASK_ID": "2"}
    assert slurm.run("train_srun.sbatch", CONFIG, **told).returncode == 0
    line = ["optim.lr=2e-3", "optim.betas=[0.8, 0.9]", "data.train=$HOME/*"]
    assert slurm.srun()[-5:] == [CONFIG, *line, "run.name=lr-2"]
    slurm.run("train_srun.sbatch", CONFIG, "run.name=mine", **told)
    assert slurm.srun()[-6:] == [CONFIG, "run.name=mine", *line, "run.name=mine-2"]


@pytest.mark.parametrize(
    ("arguments", "environment", "complaint"),
    [
        ([], JOB, "the first argument is the config"),
        (["--overwrite"], JOB, "the first argument is the config"),
        ([CONFIG], {}, "this is a job of Slurm: sbatch launch/slurm/"),
        ([CONFIG], {**JOB, "SLURM_ARRAY_TASK_ID": "1"}, "would train the same run; give SWEEP=FILE"),
        ([CONFIG], {**JOB, "SWEEP": "lr.txt"}, "sbatch --array=1-N"),
        ([CONFIG], {**JOB, "SWEEP": "lr.txt", "SLURM_ARRAY_TASK_ID": "0"}, "count from 1"),
        ([CONFIG], {**JOB, "SWEEP": "no.txt", "SLURM_ARRAY_TASK_ID": "1"}, "SWEEP=no.txt: no such file"),
        ([CONFIG], {**JOB, "SWEEP": "lr.txt", "SLURM_ARRAY_TASK_ID": "3"}, "lr.txt: line 3 is empty; it has 2"),
        ([CONFIG], {**JOB, "SWEEP": "lr.txt", "SLURM_ARRAY_TASK_ID": "2"}, "line 2 has a quote that does not end"),
        ([CONFIG], {**JOB, "MEGATRON_LITE_ROOT": "/"}, "submit from its folder"),
    ],
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_misuse_is_one_line(
    slurm: Slurm, script: str, arguments: list[str], environment: dict[str, str], complaint: str
) -> None:
    (slurm.folder / "lr.txt").write_text("optim.lr=1e-3\noptim.lr='2e-3\n")
    result = slurm.run(script, *arguments, **environment)
    assert result.returncode == USER_ERROR, result.stdout + result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert complaint in line
    assert not (slurm.folder / "srun").exists()


def test_without_gpus_the_processes_have_to_be_counted(slurm: Slurm) -> None:
    told = {name: value for name, value in JOB.items() if name != "SLURM_GPUS_ON_NODE"}
    result = slurm.run("train.sbatch", CONFIG, **told)
    assert result.returncode == USER_ERROR and "NPROC_PER_NODE=4" in result.stderr
    assert slurm.run("train.sbatch", CONFIG, NPROC_PER_NODE="4", **told).returncode == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_job(slurm: Slurm, script: str) -> None:
    result = slurm.run(script, "--help")
    assert result.returncode == 0
    for word in (script, "PYTHON", "SWEEP", "CONTAINER_IMAGE", "CONTAINER_MOUNTS", "MASTER_PORT", "DRY_RUN"):
        assert word in result.stdout, word


REQUEUE = ["scontrol requeue 17"]


@pytest.mark.parametrize(
    ("code", "state", "calls"),
    [
        (0, "RUNNING", []),
        (1, "RUNNING", []),
        (137, "RUNNING", []),
        (STOPPED, "RUNNING", REQUEUE),
        (WARNED_EARLY, "RUNNING", REQUEUE),
        (STOPPED, "CANCELLED", []),
        (STOPPED, "COMPLETING", []),
        (STOPPED, "", []),
    ],
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_job_ends_as_the_training_does(slurm: Slurm, script: str, code: int, state: str, calls: list[str]) -> None:
    """And goes back into the queue if it was stopped, unless it is the user who has cancelled it."""
    slurm.says(f"exit {code}", state=state)
    result = slurm.run(script, CONFIG, **JOB)
    assert result.returncode == code, result.stderr
    assert slurm.calls() == calls


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_task_of_an_array_speaks_of_itself_alone(slurm: Slurm, script: str) -> None:
    """One of them has the number of the array as its own, which to Slurm means all of its tasks."""
    (slurm.folder / "lr.txt").write_text("optim.lr=1e-3\noptim.lr=2e-3\n")
    told = {**JOB, "SWEEP": "lr.txt", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2"}
    slurm.says(f"touch began; while [ ! -f cancelled ]; do sleep 0.05; done; exit {STOPPED}", state="RUNNING")
    process = slurm.start(script, CONFIG, **told)
    wait_for(slurm.folder / "began")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=300)
    assert process.returncode == STOPPED
    assert slurm.calls() == ["scancel --signal=USR1 17_2", "scontrol requeue 17_2"]


@pytest.mark.parametrize(("number", "calls"), [(signal.SIGUSR1, ["scancel --signal=USR1 17"]), (signal.SIGTERM, [])])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_signal_finds_the_script_waiting(slurm: Slurm, script: str, number: signal.Signals, calls: list[str]) -> None:
    """Slurm warns the script alone, which tells the step at once, and is still there when it ends."""
    slurm.says(f"touch began; while [ ! -f go ]; do sleep 0.05; done; exit {STOPPED}", state="RUNNING")
    process = slurm.start(script, CONFIG, **JOB)
    wait_for(slurm.folder / "began")
    process.send_signal(number)
    if calls:
        wait_for(slurm.folder / "cancelled")
    time.sleep(0.2)
    assert process.poll() is None and slurm.calls() == calls
    (slurm.folder / "go").touch()
    process.communicate(timeout=300)
    assert process.returncode == STOPPED
    assert slurm.calls() == [*calls, *REQUEUE]


NODE = {"SLURM_NODEID": "0", "NPROC_PER_NODE": "2", "MASTER_ADDR": "gpu07", "MASTER_PORT": "20017"}


@pytest.mark.parametrize(("does", "code"), [("exit 0", 0), ("exit 75", STOPPED), ("kill -USR1 $$; exit 3", 3)])
def test_a_node_ends_as_its_agent_does_which_hears_no_warning(slurm: Slurm, does: str, code: int) -> None:
    python = slurm.folder / "bin" / "py"
    python.write_text(f'#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done >agent\nenv >environment\n{does}\n')
    python.chmod(0o755)
    overrides = ["run.name=a b", "--resume=none"]
    result = slurm.run("agent.sh", CONFIG, *overrides, **JOB, **NODE, PYTHON="py")
    assert result.returncode == code, result.stdout + result.stderr
    words = (slurm.folder / "agent").read_text().splitlines()
    assert words_of(result.stdout) == ["py", *words]
    assert words[:2] == ["-m", "megatron_lite.distributed.agent"]
    assert words[-5:] == ["megatron_lite", "train", CONFIG, *overrides]
    assert {"--nnodes=2", "--nproc-per-node=2", "--rdzv-id=17-0", "--rdzv-conf=is_host=1,read_timeout=30"} <= set(words)
    assert "USR1" not in slurm.environment()["PET_SIGNALS_TO_HANDLE"]


def test_the_agents_of_a_job_that_is_started_again_do_not_meet_those_of_before(slurm: Slurm) -> None:
    python = slurm.folder / "bin" / "py"
    python.write_text("#!/bin/sh\nprintf '%s ' \"$@\"\n")
    python.chmod(0o755)
    told = {**JOB, **NODE, "PYTHON": "py", "SLURM_RESTART_COUNT": "2", "SLURM_NODEID": "1"}
    said = slurm.run("agent.sh", CONFIG, **told).stdout
    assert "--rdzv-id=17-2 --rdzv-conf=is_host=0,read_timeout=30 " in said
    assert "+ py" not in said, "the first node says it for all"


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)
