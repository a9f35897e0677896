"""`megatron-lite launch`: the command that it prints for each launcher, what it refuses, and how it starts."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_lite.cli import app
from megatron_lite.cli.launch import checks
from megatron_lite.cli.launch import hostfile as hostfiles
from megatron_lite.cli.launch.checks import SCRIPTS
from megatron_lite.cli.launch.ways import WAYS
from megatron_lite.config import shipped
from megatron_lite.utils import run_files

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs/runs/quickstart.yaml"
BIG = ROOT / "configs/runs/llama3-8b-64xa100.yaml"


def launch(*arguments: object, dry_run: bool = True) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    words = [*map(str, arguments), *(["--dry-run"] if dry_run else [])]
    result = CliRunner().invoke(app, ["launch", *words], env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, result.stderr


def command(*arguments: object) -> tuple[dict[str, str], list[str]]:
    """What it prints, as a shell would read it: the variables, and the words."""
    code, output, errors = launch(*arguments)
    assert code == 0, errors
    *_, line = output.splitlines()
    plus, *words = shlex.split(line)
    assert plus == "+"
    variables = [word for word in words if "=" in word and word.split("=")[0].isupper() and not word.startswith("-")]
    assert words[: len(variables)] == variables
    return dict(word.split("=", 1) for word in variables), words[len(variables) :]


def write_hosts(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder without runs, on a machine without GPUs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "_gpus_here", lambda: 0)


@pytest.fixture
def known_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """node1 to node9 resolve."""

    def look_up(name: str, port: None) -> list[str]:
        if name.startswith("node") or name == "localhost":
            return ["10.0.0.1"]
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr(hostfiles.socket, "getaddrinfo", look_up)


def test_local() -> None:
    variables, words = command(QUICKSTART, "optim.lr=1e-3", "--nproc-per-node", 4)
    assert variables == {"PYTHON": sys.executable}
    assert words == ["bash", f"{ROOT}/launch/local.sh", "--nproc", "4", str(QUICKSTART), "optim.lr=1e-3"]


def test_slurm() -> None:
    """Nodes, processes, GPUs and cores of a node as the cluster has them, and the run's own log."""
    variables, words = command(
        BIG, "--on", "slurm", "--nodes", 8, "--cluster", "dgx-a100", "--time", "4:00:00", "--partition", "a100"
    )
    assert variables == {"MEGATRON_LITE_ROOT": str(ROOT), "PYTHON": sys.executable}
    assert words == [
        "sbatch",
        "--job-name=llama3-8b-64xa100",
        "--nodes=8",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--cpus-per-task=16",
        "--output=runs/llama3-8b-64xa100/slurm-%j.out",
        "--time=4:00:00",
        "--partition=a100",
        f"{ROOT}/launch/slurm/train_srun.sbatch",
        str(BIG),
    ]


def test_slurm_on_nodes_without_gpus_and_in_a_container() -> None:
    wish = (QUICKSTART, "run.device=cpu", "--on", "slurm", "--nodes", 2)
    _, words = command(*wish)
    assert {"--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1"} <= set(words), "the layout has 4 processes"
    _, words = command(*wish, "--cluster", "cpu", "--nproc-per-node", 4)
    assert {"--ntasks-per-node=4", "--gpus-per-node=0", "--cpus-per-task=4"} <= set(words)
    variables, _ = command(*wish, "--container", "registry/image:1")
    assert variables == {"MEGATRON_LITE_ROOT": str(ROOT), "CONTAINER_IMAGE": "registry/image:1"}


def test_deepspeed(tmp_path: Path, known_hosts: None) -> None:
    hosts = write_hosts(tmp_path, "node1 slots=8\nnode2 slots=4  # older\n\nnode3 slots=4\n")
    wish = (QUICKSTART, f"run.dir={tmp_path}", "--on", "deepspeed", "--hostfile", hosts)
    own = tmp_path / "quickstart" / run_files.HOSTFILE
    _, words = command(*wish, "--nodes", 2)
    script = ["bash", f"{ROOT}/launch/deepspeed/train.sh", "--hostfile", str(own), "--nproc", "4"]
    assert words == [*script, str(QUICKSTART), f"run.dir={tmp_path}"]
    _, words = command(*wish, "--nodes", 1)
    assert words[3:9] == [str(own), "--nproc", "8", "--no-ssh", "--node-rank", "0"]


def test_mpi(tmp_path: Path, known_hosts: None) -> None:
    hosts = write_hosts(tmp_path, "node1 slots=4\nnode2 slots=4\n")
    _, words = command(QUICKSTART, "run.network_interface=ib0", "--on", "mpi", "--hostfile", hosts)
    script = ["bash", f"{ROOT}/launch/mpi/train.sh", "--hosts", "node1:4,node2:4", "--interface", "ib0"]
    assert words == [*script, str(QUICKSTART), "run.network_interface=ib0"]
    _, words = command(QUICKSTART, "--on", "mpi")
    assert words[1:4] == [f"{ROOT}/launch/mpi/train.sh", "--nproc", "4"]


def test_options_of_train_are_handed_on() -> None:
    _, words = command(QUICKSTART, "--overwrite", "--resume", "none")
    assert words[-3:] == ["--resume", "none", "--overwrite"]


def test_what_a_shell_would_read_is_quoted() -> None:
    _, words = command(QUICKSTART, "model.rope_theta=10000.0", "parallel.recompute=[none, full]")
    assert words[-1] == "parallel.recompute=[none, full]"


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (("--on", "mpi", "--nodes", 2), "give --hostfile FILE"),
        (("--on", "mpi", "--hostfile", "{folder}/none"), "there is no such file"),
        (("--on", "mpi", "--hostfile", "{folder}/hots"), "did you mean {folder}/hosts?"),
        (("--on", "mpi", "--hostfile", "{folder}/hosts", "--nodes", 3), "has 2: node1, node2"),
        (("--on", "mpi", "--hostfile", "{folder}/hosts", "--nproc-per-node", 8), "gives node1 4 slots"),
        (("--on", "deepspeed", "--hostfile", "{folder}/unknown"), "unknown: elsewhere: Name or service not known"),
        (("--on", "mpi", "--hostfile", "{folder}/broken"), "broken:2: 'node2 slots' is not understood"),
        (("--on", "mpi", "--hostfile", "{folder}/twice"), "twice:2: node1 is there twice"),
        (("--on", "mpi", "--hostfile", "{folder}/empty"), "names no host"),
        (("--on", "slurm", "--nodes", 2), "give --cluster NAME, or --nproc-per-node"),
        (
            ("--on", "slurm", "--nodes", 3, "run.device=cpu"),
            "the layout has 4 processes, which 3 nodes cannot share evenly",
        ),
        (("--on", "slurm", "--nodes", 2, "--nproc-per-node", 3), "parallel.tp"),
        (("--on", "slurm", "--cluster", "dgx-a100", "--nproc-per-node", 16), "has 8 GPUs"),
        (("--on", "slurm", "--cluster", "dgx-a10"), "did you mean dgx-a100?"),
        (("--nodes", 2), "--on local is this machine"),
        (("--hostfile", "{folder}/hosts"), "--hostfile is read by --on mpi and deepspeed"),
        (("--container", "image"), "--container is read by --on slurm"),
        (("--on", "mpi", "--time", "1:00"), "--time is read by --on slurm"),
        (("parallel.tp=3",), "parallel.tp"),
    ],
)
def test_what_it_refuses(arguments: tuple[object, ...], mentions: str, tmp_path: Path, known_hosts: None) -> None:
    for name, text in {
        "hosts": "node1 slots=4\nnode2 slots=2\n",
        "unknown": "node1 slots=2\nelsewhere slots=2\n",
        "broken": "node1 slots=4\nnode2 slots\n",
        "twice": "node1 slots=4\nnode1 slots=4\n",
        "empty": "# nobody\n",
    }.items():
        (tmp_path / name).write_text(text)
    words = [str(argument).replace("{folder}", str(tmp_path)) for argument in arguments]
    code, output, errors = launch(QUICKSTART, *words)
    assert code == 2 and output == "", output
    assert mentions.replace("{folder}", str(tmp_path)) in errors and errors.startswith("error: ")


def test_memory_is_judged_where_the_cluster_is_known() -> None:
    wish = (
        BIG,
        "--on",
        "slurm",
        "--nodes",
        8,
        "--nproc-per-node",
        8,
        "train.micro_batch_size=8",
        "parallel.recompute=none",
    )
    assert launch(*wish)[0] == 0, "nobody knows the limit"
    code, _, errors = launch(*wish, "--cluster", "a100-40gb")
    assert code == 2 and "one on a100-40gb has 39.4 GiB" in errors and "with parallel." in errors


def test_tensor_parallelism_across_nodes_is_warned_of() -> None:
    code, output, errors = launch(QUICKSTART, "--on", "slurm", "--nodes", 4, "--nproc-per-node", 1)
    assert code == 0 and output.startswith("+ ")
    assert "warning: parallel.tp=2 does not divide the 1 processes of a node" in errors
    assert "warning" not in launch(QUICKSTART, "--on", "slurm", "--nodes", 2, "--nproc-per-node", 2)[2]


def test_data_and_launcher_have_to_be_there_to_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_data = ("run.device=cpu", "data.train=[]", "data.valid=[]", "data.tokenizer=null", "train.eval_interval=0")
    code, _, errors = launch(QUICKSTART, *no_data, "--on", "slurm", dry_run=False)
    assert code == 2 and "data.train" in errors
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("train.bin", "train.idx"):
        (tmp_path / name).write_bytes(b"x")
    data = (*no_data[2:], "run.device=cpu", f"data.train={tmp_path}/train")
    code, _, errors = launch(QUICKSTART, *data, "--on", "slurm", dry_run=False)
    assert code == 2 and "needs sbatch, which is not on the PATH" in errors and "--on local" in errors


def test_a_run_that_is_there_is_not_lost(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    folder.mkdir()
    (folder / run_files.METRICS).write_text(json.dumps({"step": 1}) + "\n")
    code, _, errors = launch(QUICKSTART, f"run.dir={tmp_path}")
    assert code == 2 and "--overwrite" in errors
    assert launch(QUICKSTART, f"run.dir={tmp_path}", "--overwrite")[0] == 0


def test_it_starts_what_it_prints(tmp_path: Path) -> None:
    """With a program in the place of sbatch that tells how it was called; its exit code is the command's."""
    for name in ("train.bin", "train.idx"):
        (tmp_path / name).write_bytes(b"x")
    program = tmp_path / "sbatch"
    program.write_text('#!/bin/sh\necho "called from $(pwd) for $MEGATRON_LITE_ROOT: $*"\nexit 7\n')
    program.chmod(0o755)
    data = ("data.valid=[]", "data.tokenizer=null", "train.eval_interval=0", "data.train=train", "run.device=cpu")
    words = ["launch", str(QUICKSTART), *data, "--on", "slurm", "run.name=here"]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_lite", *words],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 7, done.stderr
    made, printed, called = done.stdout.splitlines()
    assert made == "+ mkdir -p runs/here"
    assert called.startswith(f"called from {tmp_path} for {ROOT}: --job-name=here --nodes=1 --ntasks-per-node=4")
    script = tmp_path / "runs/here" / run_files.LAUNCH
    assert script.read_text().splitlines()[-2:] == ["mkdir -p runs/here", f"exec env {printed.removeprefix('+ ')}"]
    again = subprocess.run(["bash", script], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True)
    assert again.stdout.splitlines() == [called], "the file starts it again, from anywhere"


def test_the_host_file_of_a_run(tmp_path: Path, known_hosts: None) -> None:
    hosts = hostfiles.read_hostfile(write_hosts(tmp_path, "node1\nnode2   slots = 4\n"))
    assert hosts == [hostfiles.Host("node1", 1), hostfiles.Host("node2", 4)]


@pytest.mark.parametrize("way", WAYS)
def test_the_scripts_are_there(way: str) -> None:
    assert shipped.shipped(f"launch/{SCRIPTS[way]}").is_file()
