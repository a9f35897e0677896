"""A run read back from its folder, its numbers and its picture."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_lite.config import load_config
from megatron_lite.config.load import to_yaml
from megatron_lite.data.prepare import prepare_corpus
from megatron_lite.report.chart import Line, Panel, draw
from megatron_lite.report.run import ReportError, read_run
from megatron_lite.report.summary import summary_table, write_picture
from megatron_lite.utils import run_files

NUM_STEPS = 40
KEYS = [
    "model.family=llama", "model.vocab_size=97", "model.hidden_size=32", "model.num_layers=2", "model.num_heads=4",
    "model.max_seq_len=32", "train.seq_len=16", "train.global_batch_size=8", f"train.num_steps={NUM_STEPS}",
    "parallel.tp=2",
]  # fmt: skip
SVG = "{http://www.w3.org/2000/svg}"


def record(step: int) -> dict[str, Any]:
    values = {
        "step": step, "tokens": step * 128, "loss": 5.0 - 0.05 * step, "grad_norm": 1.5, "lr": 1e-3 * step,
        "loss_scale": 1.0, "step_time_s": 0.1, "tokens_per_s": 1280.0, "mfu": 0.25, "peak_memory_bytes": 2**28,
    }  # fmt: skip
    return values | ({"valid_loss": 4.5, "valid_bits_per_byte": 2.125} if step % 20 == 0 else {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = load_config(None, KEYS, world_size=2)
    (tmp_path / run_files.CONFIG).write_text(to_yaml(config))
    lines = [json.dumps(record(step)) for step in range(1, NUM_STEPS + 1)]
    (tmp_path / run_files.METRICS).write_text("\n".join(lines) + "\n")
    return tmp_path


def shown(folder: Path) -> str:
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(summary_table(read_run(folder)))
    return console.export_text()


def test_the_summary_has_the_numbers(folder: Path) -> None:
    text = shown(folder)
    for part in (
        f"{NUM_STEPS} of {NUM_STEPS}",
        "4.9500 -> 3.0000",
        "4.5000 -> 4.5000",
        "2.125",
        "1,280 tokens/s",
        "25%",
    ):
        assert part in text, text
    assert "256 MiB" in text and "not finished" not in text


@pytest.mark.parametrize(
    ("num_batches", "parts", "absent"),
    [
        (1, ["2.125", "the first 12% of the validation text", "train.eval_batches"], "xz -9"),
        (8, ["2.125   (xz -9 on the same text: "], "the first"),
    ],
)
def test_a_compressor_is_named_only_beside_the_same_text(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, num_batches: int, parts: list[str], absent: str
) -> None:
    corpus = tmp_path_factory.mktemp("corpus")
    (corpus / "verse.txt").write_text("".join(f"the {i % 7} cats of number {i}; " for i in range(600)))
    summary = prepare_corpus([corpus / "verse.txt"], corpus, vocab_size=257, valid_fraction=0.1, progress=False)
    assert summary.valid is not None
    # 8 samples a batch: one batch is an eighth of the samples, eight are all but the last tokens.
    seq_len = (summary.valid.tokens - 1) // 64
    more = [f"data.valid={corpus / 'valid'}", f"train.seq_len={seq_len}", f"train.eval_batches={num_batches}"]
    config = load_config(None, [*KEYS, "model.max_seq_len=64", *more], world_size=2)
    (folder / run_files.CONFIG).write_text(to_yaml(config))
    text = shown(folder)
    assert all(part in text for part in parts) and absent not in text, text


def test_a_run_that_is_under_way_can_be_read(folder: Path) -> None:
    metrics = folder / run_files.METRICS
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join(lines[:10]) + "\n" + lines[10][:50])
    run = read_run(folder)
    assert len(run.records) == 10, "a line that was cut short does not count"
    assert "(not finished)" in shown(folder)
    metrics.write_text("\n".join([*lines[:3], "{broken", *lines[4:]]))
    with pytest.raises(ReportError, match=r"metrics\.jsonl:4: is no record"):
        read_run(folder)


def test_the_picture_shows_every_series(folder: Path) -> None:
    root = ElementTree.parse(write_picture(read_run(folder))).getroot()
    texts = [element.text for element in root.iter(f"{SVG}text")]
    for wanted in ("loss, nats per token", "learning rate", "gradient norm", "training 3", "validation 4.5"):
        assert any((text or "").startswith(wanted) for text in texts), texts
    assert len(list(root.iter(f"{SVG}circle"))) == 2, "one dot for each evaluation"


def points(svg: str, colour: str) -> list[tuple[float, float]]:
    (path,) = re.findall(rf'<path class="line {colour}" d="M([^"]*)"', svg)
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in path.split("L"))]


def test_points_are_where_their_values_are() -> None:
    values = [(1.0, 2.0), (5.0, 4.0), (9.0, 3.0)]
    svg = draw("t", "s", [Panel("p", [Line("", values)], height=100)])
    (x1, y1), (x2, y2), (x3, y3) = points(svg, "c0")
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2), "equal steps are equally far apart"
    assert y2 < y3 < y1, "more is higher up"
    assert (y1 - y3) == pytest.approx((y1 - y2) / 2, abs=0.2), "half the value is half the way"
    grid = [float(y) for y in re.findall(r'<line class="grid"[^>]* y1="([0-9.]+)"', svg)]
    labels = re.findall(r'text-anchor="end">([^<]*)</text>', svg)
    assert grid[labels.index("3")] == pytest.approx(y3, abs=0.2), "the grid line of a value goes through its point"


@pytest.mark.parametrize("values", [[(1.0, 2.0)], [(1.0, 0.0), (2.0, 0.0)], [(1.0, float("nan")), (2.0, 1.0)]])
def test_odd_series_are_drawn(values: list[tuple[float, float]]) -> None:
    svg = draw("a < b & c", "s", [Panel("p", [Line("x", values, smooth=True, marked=True)], height=90, from_zero=True)])
    ElementTree.fromstring(svg)
    assert "nan" not in svg and "a &lt; b &amp; c" in svg


def test_a_long_run_gives_a_small_file() -> None:
    values = [(float(step), 1.0 / step) for step in range(1, 200_001)]
    svg = draw("t", "s", [Panel("p", [Line("", values)], height=90)])
    drawn = points(svg, "c0")
    assert 500 < len(drawn) <= 1201 and len(svg) < 40_000
    assert drawn[-1][0] == max(x for x, _ in drawn), "the last step is kept"
