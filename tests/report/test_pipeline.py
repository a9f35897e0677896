"""The pipeline on a run's page, as text for a console, and as a trace; what a user who recorded nothing is told."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_lite.cli import app
from megatron_lite.pipeline.communication import with_communication
from megatron_lite.pipeline.idle import Cause, facts_of, idle_times
from megatron_lite.pipeline.instructions import RECEIVES, SENDS, Instruction, Kind, Schedule, loop
from megatron_lite.pipeline.schedules import make_schedule
from megatron_lite.pipeline.simulate import Costs, Links, simulate
from megatron_lite.pipeline.timeline import Span, Timeline, write_timeline
from megatron_lite.report.pipeline import in_unit, recorded_step
from megatron_lite.report.pipeline_picture import ACROSS, DARK_STYLE, MARGIN, STYLE, picture
from megatron_lite.report.pipeline_rows import Box, picked, rows_of
from megatron_lite.report.pipeline_text import text_picture
from megatron_lite.report.pipeline_trace import chrome_trace
from megatron_lite.utils import run_files
from tests.report.run_folder import write_run
from tests.report.test_page import Reader, contrast, page_of

F, B, BI, BW = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT
COSTS = Costs({F: 0.010, B: [0.02, 0.02, 0.02, 0.03], Kind.REDUCE_GRADIENTS: 0.012})


def step(num_ranks: int = 4, num_microbatches: int = 8, latency_s: float = 0.002) -> Timeline:
    costs = COSTS if num_ranks == 4 else Costs({F: 0.010, B: 0.02, Kind.REDUCE_GRADIENTS: 0.012})
    schedule = make_schedule("1f1b", num_ranks, 1, num_microbatches)
    return replace(simulate(schedule, costs, Links(latency_s)), step=3, chunk_layers=(1,) * num_ranks)


def every_kind() -> Timeline:
    """Two chunks a rank, split backwards, a late host, an unequal chunk, slow messages."""
    placement = loop(2, 2)
    orders = [
        [
            *(Instruction(F, chunk, m) for chunk in placement.chunks_of(rank) for m in range(2)),
            *(Instruction(BI, chunk, m) for chunk in reversed(placement.chunks_of(rank)) for m in range(2)),
            *(Instruction(BW, chunk, m) for chunk in reversed(placement.chunks_of(rank)) for m in range(2)),
        ]
        for rank in range(2)
    ]
    schedule = Schedule("halves", placement, 2, with_communication(orders, placement))
    costs = Costs({F: [1, 2, 1, 1], BI: 1, BW: 1, Kind.REDUCE_GRADIENTS: 1})
    first, last = simulate(schedule, costs, Links(latency_s=1)).ranks
    late = [span._replace(start=span.start + 1, end=span.end + 1) for span in last[-2:]]
    return Timeline("halves", placement, 2, (first, (*last[:-2], *late)), step=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_run(tmp_path / "run")
    write_timeline(folder / run_files.PIPELINE, step())
    return folder


def test_the_page_has_both_timelines(folder: Path) -> None:
    reader = Reader.of(page_of(folder))
    assert not reader.complaints
    text = " ".join(reader.texts)
    assert "Step 3: 1f1b, 8 microbatches on 4 ranks." in text and "2 ms for a message that is waited for" in text
    shown = f"{in_unit(step().makespan)}, bubble {float(facts_of(step()).bubble_share):.1%}"
    assert f"simulated: {shown}" in text and f"recorded: {shown}" in text, "what ran like its simulation"
    for cause in (Cause.RAMP, Cause.IMBALANCE, Cause.COMMUNICATION):
        assert text.count(f"idle: {cause.value}") == 2, "in the legend and in the table"
    assert f"idle: {Cause.HOST.value}" not in text and "drawn as a stack" not in text and "Drawn are" not in text
    described = [attributes["aria-label"] for _, attributes in reader.elements if attributes.get("role") == "img"]
    assert described[-1] == f"What each pipeline rank does over time; simulated: {shown}; recorded: {shown}"
    found = recorded_step(folder)
    assert found is not None and found.simulated.makespan == pytest.approx(step().makespan, abs=1e-8)


def test_a_page_without_a_record_has_no_such_section(tmp_path: Path) -> None:
    text = page_of(write_run(tmp_path))
    assert "<h2>Pipeline</h2>" not in text and 'class="pl-' not in text


def test_the_page_needs_nothing_else(folder: Path) -> None:
    text = page_of(folder)
    assert "<h2>Pipeline</h2>" in text
    assert not re.search(r"https?:|url\(|@import", text)
    assert not [name for name, attributes in Reader.of(text).elements if "style" in attributes]


def test_what_comes_from_the_disk_is_escaped(folder: Path) -> None:
    evil = "</svg><script>alert(1)</script>"
    write_timeline(folder / run_files.PIPELINE, replace(step(), schedule=evil))
    reader = Reader.of(page_of(folder))
    assert not reader.complaints and any(evil in text for text in reader.texts)


def boxes_of(svg: str, look: str) -> list[tuple[float, float, float]]:
    """(left, right, top) of the boxes of a class, as they are drawn."""
    paths = "".join(re.findall(rf'<path class="pl-{look}" d="([^"]*)"', svg))
    found = re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)V[\d.]+H[\d.]+z", paths)
    return [(float(x), float(x) + float(width), float(y)) for x, y, width in found]


def test_boxes_are_where_their_times_are() -> None:
    timeline = step()
    pixels = ACROSS / timeline.makespan
    svg = picture([("one", timeline)], "a picture")
    for kind, look in ((F, "f0"), (B, "b0"), (Kind.REDUCE_GRADIENTS, "r0")):
        boxes = boxes_of(svg, look)
        tops = sorted({top for _, _, top in boxes})
        assert len(tops) == 4, "a row a rank"
        for rank, spans in enumerate(timeline.ranks):
            drawn = sorted((left, right) for left, right, top in boxes if top == tops[rank])
            wanted = [(span.began, span.end) for span in spans if span.instruction.kind is kind]
            assert len(drawn) == len(wanted)
            for (left, right), (start, end) in zip(drawn, wanted, strict=True):
                assert left == pytest.approx(MARGIN + start * pixels, abs=0.1)
                assert right == pytest.approx(MARGIN + end * pixels, abs=1.2), "a pixel tells neighbours apart"
    idle = sorted(boxes_of(svg, "ramp") + boxes_of(svg, "imbalance") + boxes_of(svg, "communication"))
    assert len(idle) == sum(map(len, idle_times(timeline)))
    assert re.findall(r">(\d)</text>", re.findall(r'<g class="pl-n">.*?</g>', svg)[0]).count("5") == 8


def test_two_timelines_have_one_scale() -> None:
    """The same forward is as wide in a step that takes longer."""
    svg = picture([("fast", step()), ("slow", step(latency_s=0.1))], "a picture")
    widths = {round(right - left, 0) for left, right, _ in boxes_of(svg, "f0")}
    assert len(widths) <= 2 and max(widths) - min(widths) <= 1
    alone = {round(right - left, 0) for left, right, _ in boxes_of(picture([("fast", step())], "a"), "f0")}
    assert min(alone) > 2 * max(widths), "negative control: on a scale of its own it is wider"


def test_hatching_stays_in_its_box() -> None:
    svg = picture([("one", step())], "a picture")
    for look in ("ramp", "imbalance", "communication"):
        inside = [(left - 0.11, right + 0.11) for left, right, _ in boxes_of(svg, look)]
        path = "".join(re.findall(rf'<path class="pl-line {look}" d="([^"]*)"', svg))
        lines = re.findall(r"M([\d.]+) ([\d.]+)l(-?[\d.]+) ([\d.]+)", path)
        assert len(lines) > len(inside) / 2 > 1
        for x, _, dx, dy in lines:
            ends = sorted((float(x), float(x) + float(dx)))
            assert abs(abs(float(dx)) - float(dy)) < 0.11, "at 45 degrees"
            assert any(left <= ends[0] and ends[1] <= right for left, right in inside), (look, ends)


@pytest.mark.parametrize("exact", [1, Fraction(1, 3)])
def test_every_kind_and_cause_has_its_look(exact: Any, tmp_path: Path) -> None:
    timeline = every_kind()
    assert {idle.cause for row in idle_times(timeline) for idle in row} == set(Cause)
    assert {box.what for row in rows_of(timeline) for box in row} == {F, BI, BW, Kind.REDUCE_GRADIENTS, *Cause}
    svg = picture([("one", timeline)], "a picture")
    looks = set(re.findall(r'class="pl-([a-z0-9 ]+)"', svg))
    assert {"f0", "f1", "i0", "i1", "w0", "w1", "r0", "ramp", "imbalance", "communication", "host"} < looks
    for look in looks - {"n"}:
        selector = f".pl-{look.replace(' ', '.')} {{"
        assert selector in STYLE and selector in DARK_STYLE
    scaled = tuple(
        tuple(Span(one, start * exact, end * exact, waited * exact) for one, start, end, waited in spans)
        for spans in timeline.ranks
    )
    assert text_picture(replace(timeline, ranks=scaled)) == text_picture(timeline), "whatever numbers the times are"
    assert chrome_trace(timeline)["traceEvents"]


def test_many_ranks_and_microbatches_stay_small(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    before = len(page_of(folder))
    write_timeline(folder / run_files.PIPELINE, step(32, 128))
    text = page_of(folder)
    assert len(text) - before < 250_000
    assert "Drawn are 16 of 32 ranks" in text and "drawn as a stack, in which heights are shares of the time" in text
    assert text.count(">rank 31</text>") == 2 and text.count(">rank 0</text>") == 2
    assert (
        picked(32, 16)[0] == 0 and picked(32, 16)[-1] == 31 and len(picked(32, 16)) == 16 and picked(3, 16) == [0, 1, 2]
    )


def test_stacks_hold_the_time_of_their_boxes() -> None:
    """Whatever is drawn together, each kind and cause keeps its time, and the rows stay filled."""

    def times(boxes: list[Box]) -> dict[Kind | Cause, float]:
        found = dict.fromkeys((*Kind, *Cause), 0.0)
        for box in boxes:
            found[box.what] += (box.end - box.start) * (box.bottom - box.top)
        return found

    timeline = step(8, 64)
    for apart, together in zip(rows_of(timeline), rows_of(timeline, 0.05), strict=True):
        assert len(together) < len(apart) / 4
        assert times(together) == pytest.approx(times(apart))
        assert any(box.top > 0 for box in together) and not any(box.top > 0 for box in apart)


def test_the_picture_for_a_console() -> None:
    """At unit costs, and two columns for each unit of time: 15 units for p = 3, m = 3."""
    timeline = simulate(make_schedule("1f1b", 3, 1, 3), Costs.unit())
    assert timeline.makespan == 15
    assert text_picture(timeline, 7 + 30 + 1).splitlines() == [
        "rank 0 0▀1▀2▀········0▄▄▄··1▄▄▄··2▄▄▄",
        "rank 1 ··0▀1▀····0▄▄▄2▀1▄▄▄··2▄▄▄····",
        "rank 2 ····0▀0▄▄▄1▀1▄▄▄2▀2▄▄▄········",
        "▀ forward   ▄ backward",
        "· warm-up and cool-down",
    ]


@pytest.mark.parametrize("width", [1, 40, 80, 200])
def test_no_line_is_wider_than_the_console(width: int) -> None:
    for timeline in (step(), every_kind(), step(32, 64)):
        lines = text_picture(timeline, width).splitlines()
        assert max(map(len, lines)) <= max(width, 7 + 24 + 1), lines
        assert sum(line.startswith("rank ") for line in lines) == min(16, len(timeline.ranks))


def test_short_boxes_are_told_as_a_mixture() -> None:
    text = text_picture(step(2, 400), 80)
    assert "█ work, mixed" in text and text.count("█") > 100
    assert "█" not in text_picture(step(2, 4), 80)


def test_the_trace_has_what_perfetto_reads() -> None:
    """Trace Event Format: complete events with microseconds, on one thread a rank, nested or apart."""
    timeline = every_kind()
    trace = json.loads(json.dumps(chrome_trace(timeline)))
    events = trace["traceEvents"]
    about = [event for event in events if event["ph"] == "M"]
    assert [event["args"]["name"] for event in about if event["name"] == "thread_name"] == [
        "rank 0 (chunk 0, 2)", "rank 1 (chunk 1, 3)",
    ]  # fmt: skip
    complete = [event for event in events if event["ph"] == "X"]
    assert len(about) + len(complete) == len(events)
    for rank, spans in enumerate(timeline.ranks):
        row = [event for event in complete if event["tid"] == rank]
        for cat, kinds in (("compute", set(Kind) - SENDS - RECEIVES), ("message", SENDS | RECEIVES)):
            found = [(event["ts"] / 1e6, event["dur"] / 1e6) for event in row if event["cat"] == cat]
            wanted = [(span.began, span.end - span.began) for span in spans if span.instruction.kind in kinds]
            assert sorted(found) == sorted(wanted)
        assert sum(event["dur"] for event in row if event["cat"] != "message") == pytest.approx(timeline.makespan * 1e6)
    one = next(event for event in complete if event["name"] == "backward for the input 1")
    assert one["args"]["microbatch"] == 1 and one["args"]["chunk"] in (2, 3) and one["pid"] == 0
    assert {event["name"] for event in complete if event["cat"] == "idle"} == {cause.value for cause in Cause}


def test_the_command_draws_and_writes(folder: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(folder), "--pipeline"])
    assert done.exit_code == 0, done.output
    assert "rank 3" in done.stdout and "imbalance" in done.stdout and "simulated" in done.stdout
    assert f"trace: {folder / run_files.PIPELINE_TRACE}" in done.stdout.replace("\n", "")
    trace = json.loads((folder / run_files.PIPELINE_TRACE).read_bytes())
    assert len(trace["traceEvents"]) > 100
    assert "<h2>Pipeline</h2>" in (folder / run_files.REPORT).read_text(encoding="utf-8")


def test_a_run_that_recorded_nothing_is_told_how(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    done = CliRunner().invoke(app, ["report", str(folder), "--pipeline"])
    assert done.exit_code == 2
    assert "recorded no step of a pipeline" in done.stderr and "run.record_pipeline=3" in done.stderr
    assert CliRunner().invoke(app, ["report", str(folder)]).exit_code == 0, "without the option nothing is missing"


def test_a_broken_record_is_one_error(folder: Path) -> None:
    (folder / run_files.PIPELINE).write_text("{", encoding="utf-8")
    done = CliRunner().invoke(app, ["report", str(folder)])
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and "pipeline.json: is no record" in done.stderr


@pytest.mark.parametrize(("style", "card"), [(STYLE, "#ffffff"), (DARK_STYLE, "#0d1117")])
def test_colours_can_be_told_apart(style: str, card: str) -> None:
    """WCAG 2.2: the numbers in boxes 4.5, boxes 3 against the page, hatching of a cause that can be mended 3."""
    (ink,) = re.findall(r"\.pl-n text \{[^}]*fill: (#[0-9a-f]{6})", style)
    boxes = re.findall(r"\.pl-([fbiwr]\d) \{ fill: (#[0-9a-f]{6})", style)
    assert len(boxes) == 17
    for name, colour in boxes:
        assert contrast(colour, ink) >= 4.5, name
        assert contrast(colour, card) >= 3, name
    assert len({colour for _, colour in boxes}) == 17
    for cause in ("communication",):
        (line,) = re.findall(rf"\.pl-line\.{cause} \{{ stroke: (#[0-9a-f]{{6}})", style)
        (wash,) = re.findall(rf"\.pl-{cause} \{{ fill: (#[0-9a-f]{{6}})", style)
        assert contrast(line, wash) >= 3


def test_times_in_their_unit() -> None:
    values = [in_unit(value) for value in (0.0, 1e-5, 0.00099999, 0.0123456, 0.9999, 12.0)]
    assert values == ["0 µs", "10 µs", "1 ms", "12.3 ms", "1 s", "12 s"]
