"""The command line as a person uses it: in processes of its own where processes are what is tested."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from megatron_lite.cli import app
from megatron_lite.config import key_help
from megatron_lite.utils import run_files
from tests.train.commands import PROGRAM, write_config
from tests.train.tiny_run import NUM_STEPS, make_corpus, read_metrics


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def command(*args: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own."""
    return subprocess.run([*PROGRAM, *map(str, args)], capture_output=True, text=True, timeout=180)


def invoke(*args: object) -> Result:
    """In this process, which has imported torch already."""
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200"})


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from megatron_lite.cli import app; "
        "assert CliRunner().invoke(app, ['train', '--help']).exit_code == 0; "
        "print([name for name in ('torch', 'tokenizers', 'megatron_lite.config') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_names_every_command_and_key() -> None:
    runner = CliRunner()
    shown = runner.invoke(app, ["--help"]).output
    for name in ("train", "verify", "data", "convert", "generate", "report"):
        assert name in shown
        assert "Example" in runner.invoke(app, [name, "--help"]).output
    listed = runner.invoke(app, ["train", "--keys"], env={"COLUMNS": "200"})
    assert listed.exit_code == 0
    for entry in key_help():
        assert entry.key in listed.output


def test_from_text_to_a_model_that_transformers_loads(tmp_path: Path) -> None:
    """data, train with processes of its own, report, convert."""
    text = tmp_path / "verse.txt"
    text.write_text("".join(f"the {i % 7} cats of number {i} sit on {i % 5} mats; " for i in range(600)))
    made = invoke("data", text, "--out", tmp_path / "data", "--vocab-size", 300, "--valid-fraction", 0.1)
    assert made.exit_code == 0, made.stderr
    assert "train CONFIG model.vocab_size=300" in made.stdout
    config = write_config(tmp_path, tmp_path / "data")
    trained = command("train", config, "--nproc", 2, "parallel.tp=2", "train.log_interval=4", "train.eval_batches=99")
    assert trained.returncode == 0, trained.stderr
    folder = tmp_path / "runs" / "tiny"
    lines = [line for line in trained.stdout.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == [f"{step}/{NUM_STEPS}" for step in (1, 4, 5, 8, 10, 12)]
    metrics = read_metrics(folder)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.5
    assert "valid loss" in lines[-1] and "bits per byte" in trained.stdout and "xz -9" in trained.stdout
    assert ElementTree.parse(folder / run_files.PICTURE).getroot().tag.endswith("svg")
    assert f"report: {folder / run_files.REPORT}" in trained.stdout
    assert "</html>" in (folder / run_files.REPORT).read_text(encoding="utf-8")
    assert (folder / run_files.LOGS / "rank1.log").read_text() == "", "a second rank has nothing to say"
    again = invoke("train", config, "--nproc", 2, "parallel.tp=2")
    assert again.exit_code == 2
    assert again.stderr.count("\n") == 1 and "holds a run already" in again.stderr
    assert read_metrics(folder) == metrics

    converted = invoke("convert", folder, tmp_path / "hf", "--dtype", "bfloat16")
    assert converted.exit_code == 0, converted.stderr
    described = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (described["model_type"], described["torch_dtype"]) == ("llama", "bfloat16")
    transformers = pytest.importorskip("transformers")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.vocab_size == 300


def test_under_torchrun_it_joins(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    more = ["train", str(config), "train.num_steps=2", "optim.warmup_steps=1", "parallel.pp=2"]
    done = subprocess.run([*launcher, "-m", "megatron_lite", *more], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 1/2") == 1, "only the first rank speaks"
    assert len(read_metrics(tmp_path / "runs" / "tiny")) == 2


def test_a_killed_rank_ends_the_run(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus)
    run = subprocess.Popen(
        [*PROGRAM, "train", str(config), "--nproc", "2", "train.num_steps=100000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        metrics = tmp_path / "runs" / "tiny" / run_files.METRICS
        wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
        ranks = ranks_of(run.pid)
        assert len(ranks) == 2
        started = time.monotonic()
        os.kill(ranks[1], signal.SIGKILL)
        _, said = run.communicate(timeout=60)
        assert time.monotonic() - started < 20
    finally:
        run.kill()
    assert run.returncode == 1
    found = [
        line for line in said.splitlines() if line.startswith("rank 1 of 2 failed: the process was killed by SIGKILL")
    ]
    assert len(found) == 1, said
    assert "Traceback" not in said
    wait_for(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks))


def wait_for(condition: object, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    assert callable(condition)
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def ranks_of(parent: int) -> list[int]:
    """Process ids of the ranks, in order: grandchildren that the fork server has made."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environ = (folder / "environ").read_bytes()
            ancestors, pid = [], int(folder.name)
            while pid > 1:
                pid = int((Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[1])
                ancestors.append(pid)
        except OSError:
            continue
        if parent in ancestors[1:]:
            found[int(folder.name)] = environ
    return sorted(found)


def test_a_port_in_use_is_said_before_anything_starts(corpus: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = command("train", write_config(tmp_path, corpus), "--nproc", 2, "--port", port)
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: port {port} is in use; choose another with --port, or leave it out: a free one is taken\n"
    )


def test_a_port_without_nproc_is_refused(corpus: Path, tmp_path: Path) -> None:
    done = invoke("train", write_config(tmp_path, corpus), "--port", 29511)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: --port is 29511") and "there is no --nproc; add it" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_run_folder_that_cannot_be_made_is_one_message(corpus: Path, tmp_path: Path, nproc: int) -> None:
    """Whoever notices: the process that launches the ranks, or the only one."""
    (tmp_path / "runs").write_text("a file where the folder of the runs should be")
    processes = ["--nproc", nproc] if nproc > 1 else []
    done = invoke("train", write_config(tmp_path, corpus), *processes)
    assert done.exit_code == 2
    assert done.stderr == (
        f"error: {tmp_path / 'runs' / 'tiny'}: cannot be written: Not a directory; choose another folder with run.dir\n"
    )


def test_verify_holds_and_breaks(tmp_path: Path) -> None:
    config = Path(__file__).parents[1] / "configs" / "runs" / "tiny-proof.yaml"
    good = invoke("verify", config, "--layouts", "tp=2,sp;pp=2,gpipe")
    assert good.exit_code == 0, good.stdout + good.stderr
    assert good.stdout.count("holds") == 2
    assert good.stdout.startswith("the model as it is (llama, 4 layers, hidden 64")
    bad = invoke("verify", config, "--layouts", "dp=2", "--without", "data-parallel")
    assert bad.exit_code == 1
    assert "broken" in bad.stdout
    assert "first parameter: embedding.tokens.weight; axis: dp" in bad.stdout
