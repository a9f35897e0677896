"""Records, and where they are written."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from megatron_lite.config.schema import TrainConfig
from megatron_lite.train.metrics import MetricsError, MetricsFile, StepRecord, check_extras, open_sinks
from megatron_lite.train.progress import ConsoleSink
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


def test_what_is_no_number_is_left_out() -> None:
    """JSON has no NaN: a reader that is not Python's would stop there."""
    skipped = dataclasses.replace(RECORD, loss=math.inf, grad_norm=math.nan, skipped_steps=4)
    assert skipped.was_skipped and not RECORD.was_skipped
    assert skipped.as_dict().keys() ^ RECORD.as_dict().keys() == {"loss", "grad_norm", "skipped_steps"}
    assert skipped.as_dict()["skipped_steps"] == 4
    json.dumps(skipped.as_dict(), allow_nan=False)


def test_every_skipped_step_is_said() -> None:
    """Also one that has no line of its own, and one that has: by one line, and none of its numbers that are none."""
    for log_interval in (10, 1):
        out = io.StringIO()
        train = TrainConfig(seq_len=8, global_batch_size=4, num_steps=20, log_interval=log_interval)
        sink = ConsoleSink(train, Console(file=out), steps_before=1)
        skipped = dataclasses.replace(RECORD, step=4, grad_norm=math.nan, loss_scale=65536.0, skipped_steps=2)
        lost = dataclasses.replace(skipped, step=5, loss=math.inf, skipped_steps=3)
        for record in (RECORD, skipped, lost, dataclasses.replace(RECORD, step=6)):
            sink.write(record)
        lines = out.getvalue().splitlines()
        assert len(lines) == (2 if log_interval == 10 else 4), lines
        said = [line for line in lines if "skipped" in line]
        assert said == [
            "step 4: skipped, as a gradient overflowed in fp16 at a loss scale of 65536; 2 of the run's steps are "
            "skipped so far",
            "step 5: skipped, as the loss overflowed in fp16 at a loss scale of 65536; 3 of the run's steps are "
            "skipped so far",
        ]


def test_a_step_that_ends_a_run_without_a_loss_scale_is_not_called_skipped() -> None:
    out = io.StringIO()
    ConsoleSink(TrainConfig(seq_len=8, global_batch_size=4, num_steps=20, log_interval=1), Console(file=out)).write(
        dataclasses.replace(RECORD, grad_norm=math.nan)
    )
    assert "skipped" not in out.getvalue() and "grad norm nan" in out.getvalue()
