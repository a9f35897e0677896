"""Records, and where they are written."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from megatron_lite.train.metrics import MetricsError, MetricsFile, StepRecord, check_extras, open_sinks
from megatron_lite.utils import run_files
from tests.train.tiny_run import tiny_config

RECORD = StepRecord(
    step=3, tokens=768, loss=5.5, grad_norm=1.25, lr=1e-3, loss_scale=1.0, step_time_s=0.5, tokens_per_s=512.0,
    mfu=0.4, peak_memory_bytes=2**30,
)  # fmt: skip


class Recorder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines_seen: list[int] = []
        self.ended_well: bool | None = None

    def write(self, record: StepRecord) -> None:
        self.lines_seen.append(len(self.path.read_text().splitlines()))

    def close(self, succeeded: bool) -> None:
        self.ended_well = succeeded


def test_every_line_is_on_the_disk_when_its_step_ends(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for written in (1, 2):
        file.write(RECORD)
        lines = file.path.read_text().splitlines()
        assert [json.loads(line)["loss"] for line in lines] == [5.5] * written
    file.close(succeeded=True)


def test_a_full_disk_is_said_in_words() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    file = MetricsFile(Path("/dev/full"))
    with pytest.raises(MetricsError, match=r"/dev/full: no space left to write it at step 3.*run\.dir"):
        file.write(RECORD)
    file.close(succeeded=False)


def test_a_folder_that_is_not_there_is_said_in_words(tmp_path: Path) -> None:
    with pytest.raises(MetricsError, match=r"cannot be written before the first step.*check the folder"):
        MetricsFile(tmp_path / "nowhere" / "metrics.jsonl")


@pytest.mark.parametrize("fails", [False, True])
def test_sinks_hear_how_the_run_ended(corpus: Path, tmp_path: Path, fails: bool) -> None:
    config = tiny_config(corpus, tmp_path)
    recorder = Recorder(tmp_path / run_files.METRICS)
    try:
        with open_sinks(config, tmp_path, recorder) as sinks:
            for sink in sinks:
                sink.write(RECORD)
            if fails:
                raise KeyError("a bug")
    except KeyError:
        assert fails
    assert recorder.ended_well is not fails


@pytest.mark.parametrize(
    ("key", "package", "off"), [("run.wandb=offline", "wandb", "off"), ("run.tensorboard=true", "tensorboard", "false")]
)
def test_a_missing_package_is_named(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, package: str, off: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        MetricsError, match=rf"{package}.*pip install 'megatron-lite\[{package}\]'.*run.{package}={off}"
    ):
        check_extras(tiny_config(corpus, tmp_path, "tiny", key))
    check_extras(tiny_config(corpus, tmp_path))
