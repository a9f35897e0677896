"""The command in environments that launchers make; real ones are started in tests/cluster."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.train.commands import PROGRAM, write_config
from tests.train.tiny_run import make_corpus, read_metrics

SHORT = ("train.num_steps=2", "optim.warmup_steps=1", "train.eval_interval=0", "run.record_pipeline=0")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def task_of_srun(rank: int, job: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "node1",
    }


def train_tasks(
    config: Path, environ: dict[str, str] | None = None, keys: tuple[str, str] = ("", "")
) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of two tasks of a step; keys: an argument of each."""
    tasks = [
        subprocess.Popen(
            [*PROGRAM, "train", str(config), *filter(None, [keys[rank]])],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | task_of_srun(rank, os.getpid()) | (environ or {}),
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [task.communicate(timeout=600) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    return [(task.returncode, out, err) for task, (out, err) in zip(tasks, said, strict=True)]


def test_tasks_of_srun_train_together_and_the_first_says_what_it_found(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus, "tiny", *SHORT)
    (code, out, err), (other_code, other_out, other_err) = train_tasks(config, {"MEGATRON_LITE_WORLD_SIZE": "2"})
    assert (code, other_code) == (0, 0), err + other_err
    found = f"2 ranks on 1 host, found by srun (job {os.getpid()} step 0); gloo over lo; they meet at 127.0.0.1:"
    assert out.startswith(found) and out.count("they meet at") == 1
    assert other_out == ""
    assert len(read_metrics(tmp_path / "runs" / "tiny")) == 2


def test_ranks_with_different_configs_all_end_and_one_says_which_key(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus, "tiny", *SHORT)
    ends = train_tasks(config, keys=("train.seed=1", "train.seed=2"))
    assert [code for code, _, _ in ends] == [2, 2]
    assert ends[0][2].startswith("error: rank 1 on ") and " in train.seed (2, not 1); start every" in ends[0][2]
    assert ends[0][2].count("\n") == 1 and ends[1][2] == "" and ends[0][1] == ends[1][1] == ""


def test_a_config_that_one_rank_cannot_use_ends_both(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus, "tiny", *SHORT)
    ends = train_tasks(config, keys=("", "run.network_interface=ib9"))
    assert [code for code, _, _ in ends] == [2, 2]
    assert "rank 1 on " in ends[0][2] and "has no such interface; it has " in ends[0][2]
    assert ends[0][2].count("\n") == 1 and ends[1][2] == ""


def test_an_interface_of_another_name_on_a_host_is_no_difference(corpus: Path, tmp_path: Path) -> None:
    """Negative control: not every key has to be the same."""
    config = write_config(tmp_path, corpus, "tiny", *SHORT)
    ends = train_tasks(config, keys=("run.network_interface=lo", "train.threads=2"))
    assert [code for code, _, _ in ends] == [0, 0], ends


def test_a_world_of_one_in_each_task_is_refused_once(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus, "tiny", *SHORT)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    ends = train_tasks(config, alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
    assert [code for code, _, _ in ends] == [2, 2]
    assert ends[0][2].startswith("error: WORLD_SIZE=1, but this is one of 2 tasks of a Slurm step (SLURM_PROCID=0)")
    assert ends[1][2] == "" and not (tmp_path / "runs").exists()


def test_nproc_inside_several_tasks_is_refused(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus, "tiny", *SHORT)
    done = subprocess.run(
        [*PROGRAM, "train", str(config), "--nproc", "2"],
        capture_output=True, text=True, timeout=120, env=os.environ | task_of_srun(0, 1),
    )  # fmt: skip
    assert done.returncode == 2 and "this one was started by a launcher already (torchrun, srun" in done.stderr
