"""A run read back from its folder, its numbers and its picture."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from rich.console import Console

from megatron_lite.data.prepare import prepare_corpus
from megatron_lite.report.chart import Line, Panel, draw
from megatron_lite.report.curves import write_picture
from megatron_lite.report.page import page
from megatron_lite.report.run import ReportError, read_run
from megatron_lite.report.series import log_ticks, number, smoothed, thinned, ticks
from megatron_lite.report.summary import facts_of, summary_table
from megatron_lite.utils import run_files
from megatron_lite.utils.files import DataError
from tests.report.run_folder import NUM_STEPS, record, write_run

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path)


def shown(folder: Path) -> str:
    console = Console(width=120, file=io.StringIO(), record=True)
    run = read_run(folder)
    console.print(summary_table(run, facts_of(run)))
    return console.export_text()


def test_the_summary_has_the_numbers(folder: Path) -> None:
    text = shown(folder)
    for part in (
        f"{NUM_STEPS} of {NUM_STEPS}",
        "4.9500 -> 3.0000",
        "4.5000 -> 4.5000",
        "2.125",
        "1,592 tokens/s",
        "19%",
    ):
        assert part in text, text
    assert "384 MiB" in text and "not finished" not in text


def test_skipped_steps_are_said(tmp_path: Path, folder: Path) -> None:
    """A loss that is no number is not in its line, which is a record all the same."""
    records = [record(step) | {"skipped_steps": min(step, 3)} for step in range(1, 31)]
    for one in records[:3]:
        del one["loss"], one["grad_norm"]
    skipping = write_run(tmp_path / "skipping", records)
    text = shown(skipping)
    assert re.search(r"skipped steps +3 of 30 +\(a gradient overflowed in fp16\)", text), text
    assert re.search(r"training loss +4\.8000 -> 3\.5000", text), text
    assert "skipped steps" not in shown(folder)
    assert "not a number" in page(read_run(skipping), []).lower()
    write_picture(read_run(skipping))
    only = write_run(tmp_path / "only", records[:1])
    assert re.search(r"training loss +nan", shown(only))
    page(read_run(only), [])


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
    write_run(folder, None, *more)
    text = shown(folder)
    assert all(part in text for part in parts) and absent not in text, text


def test_a_run_that_is_under_way_can_be_read(folder: Path) -> None:
    metrics = folder / run_files.METRICS
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join(lines[:10]) + "\n" + lines[10][:50])
    run = read_run(folder)
    assert len(run.records) == 10, "a line that was cut short does not count"
    assert "not finished" in shown(folder)
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
    (path,) = re.findall(rf'<path class="line {colour}"[^>]* d="M([^"]*)"', svg)
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in path.removesuffix("h0").split("L"))]


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


ODD = [
    [(1.0, 2.0)], [(1.0, 0.0), (2.0, 0.0)], [(1.0, float("nan")), (2.0, 1.0)], [(1.0, float("inf"))],
    [(1.0, 1e300), (2.0, -1e300)], [(1.0, 1e-320), (2.0, 0.0)], [(1.0, 1e29), (2.0, -1e29)],
    [(1.0, 1.0), (2.0, 1.0 + 1e-15)],
]  # fmt: skip


@pytest.mark.parametrize("values", ODD)
@pytest.mark.parametrize("from_zero", [True, False])
def test_odd_series_are_drawn(values: list[tuple[float, float]], from_zero: bool) -> None:
    line = Line("x", values, smooth=True, marked=True)
    svg = draw("a < b & c", "s", [Panel("p", [line], height=90, from_zero=from_zero, limit=("l", 1.0))])
    ElementTree.fromstring(svg)
    assert not re.search(r"\b(nan|inf)\b", svg) and "a &lt; b &amp; c" in svg


def test_a_long_run_gives_a_small_file() -> None:
    values = [(float(step), 1.0 / step) for step in range(1, 200_001)]
    svg = draw("t", "s", [Panel("p", [Line("", values)], height=90)])
    drawn = points(svg, "c0")
    assert 500 < len(drawn) <= 2002 and len(svg) < 40_000
    assert drawn[-1][0] == max(x for x, _ in drawn), "the last step is kept"


def test_thinning_keeps_ends_spikes_and_gaps() -> None:
    values = [(float(step), 1.0 + 1e-3 * (step % 7)) for step in range(100_000)]
    values[0], values[-1] = (0.0, 1.0015), (99_999.0, 1.0015)
    values[12_345], values[54_321] = (12_345.0, 50.0), (54_321.0, -50.0)
    values[70_000:71_000] = [(float(step), float("nan")) for step in range(70_000, 71_000)]
    kept = thinned(values, 500)
    assert len(kept) <= 1002 and [x for x, _ in kept] == sorted({x for x, _ in kept}), "in order, none twice"
    assert {values[0], values[-1], values[12_345], values[54_321]} <= set(kept)
    assert set(kept[:400]) <= set(values), "nothing is made up"
    gap = [y for x, y in kept if 70_200 < x < 70_800]
    assert gap and all(y != y for y in gap), "the curve is interrupted where there is no number"
    few = values[:1000]
    assert thinned(few, 500) == few


def test_a_moving_average_begins_and_ends_with_the_points() -> None:
    values = [(float(step), 3.0 * step) for step in range(200)]
    line = smoothed(values)
    assert [x for x, _ in line] == [x for x, _ in values]
    assert all(y == pytest.approx(3.0 * x) for x, y in line[:-3]), "a straight line stays one"
    line = Line("", [(1.0, 2.0), (2.0, float("nan")), (3.0, 2.0), (4.0, 2.0)], smooth=True)
    assert line.shown == [(1.0, 2.0), (3.0, 2.0), (4.0, 2.0)]


def test_ticks_are_round() -> None:
    assert ticks(0, 10, 5) == (0, 2, 4, 6, 8, 10)
    assert ticks(0.1, 0.42, 4) == (0.1, 0.2, 0.3, 0.4)
    assert ticks(1e-5, 3e-4, 3) == (1e-4, 2e-4, 3e-4)
    assert ticks(1, 4, 10, whole=True) == (1, 2, 3, 4)
    assert log_ticks(2, 8.5, 8) == (2, 3, 4, 5, 6, 7, 8)
    assert log_ticks(0.9, 150, 8) == (1, 2, 5, 10, 20, 50, 100)
    assert 2 <= len(log_ticks(1e-9, 2e9, 4)) <= 5, "some of the powers of ten"
    assert len(log_ticks(2.001, 2.0011, 4)) >= 2, "a narrow range has labels too"
    shown = [number(value) for value in (0, 3.0, 0.25, 1234.5, 2e-4, 1e-10, 0.000123, 12_345_678, -0.5)]
    assert shown == ["0", "3", "0.25", "1,234", "2e-4", "1e-10", "1.23e-4", "1.23e7", "-0.5"]


def test_a_run_that_goes_on_is_read_as_one(tmp_path: Path) -> None:
    """The later record of a step counts; processes that have used less memory are others than before."""
    late = [record(step) | {"loss": 2.0} for step in range(11, 31)]
    run = read_run(write_run(tmp_path, [*map(record, range(1, 16)), *late]))
    assert [one["step"] for one in run.records] == list(range(1, 31))
    assert run.series("loss")[10:] == [(step, 2.0) for step in range(11, 31)] and run.resumes == (11,)
    cut = [record(step) for step in range(1, 31)]
    cut[20:] = [one | {"peak_memory_bytes": 2**27} for one in cut[20:]]
    assert read_run(write_run(tmp_path, cut)).resumes == (21,)
    assert read_run(write_run(tmp_path)).resumes == ()


@pytest.mark.parametrize(
    "line", ["[1]", "5", '{"step": 3}', '{"step": "3", "loss": 1}', '{"step": 1e3, "loss": 1}', "\udcff", "[" * 100_000]
)
def test_a_line_that_is_no_record_is_named(folder: Path, line: str) -> None:
    path = folder / run_files.METRICS
    lines = path.read_bytes().splitlines()
    lines[2] = line.encode("utf-8", "surrogateescape")
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ReportError, match=r"metrics\.jsonl:3: is no record"):
        read_run(folder)


def test_a_folder_that_cannot_be_written_is_named(folder: Path) -> None:
    (folder / run_files.PICTURE).mkdir()
    with pytest.raises(DataError, match=r"loss\.svg: cannot be written"):
        write_picture(read_run(folder))
    assert not list(folder.glob("*.tmp")), "nothing half-written is left"
