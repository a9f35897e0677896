"""The pipeline of report.html as a person sees it, in a real browser."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.pipeline.instructions import Kind
from megatron_lite.pipeline.schedules import make_schedule
from megatron_lite.pipeline.simulate import Costs, Links, simulate
from megatron_lite.pipeline.timeline import Timeline, write_timeline
from megatron_lite.report.page import write_page
from megatron_lite.report.pipeline_picture import ACROSS, DARK_STYLE, MARGIN, STYLE, WIDTH
from megatron_lite.report.run import read_run
from megatron_lite.report.summary import facts_of
from megatron_lite.utils import run_files
from tests.report.browser import NAMES, Browser, coloured, find_browser
from tests.report.run_folder import write_run

NUM_RANKS = 4
BOX = """(() => {
  const box = document.querySelector("#pipeline .scroll svg").getBoundingClientRect();
  return [box.left, box.top, box.width, box.height, document.documentElement.scrollWidth];
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    program = find_browser()
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on PATH")
    return Browser(program, tmp_path_factory.mktemp("profile"))


@pytest.fixture(scope="module")
def timeline() -> Timeline:
    costs = Costs({Kind.FORWARD: 0.010, Kind.BACKWARD: [0.02, 0.02, 0.02, 0.03]})
    return replace(
        simulate(make_schedule("1f1b", NUM_RANKS, 1, 8), costs, Links(latency_s=0.004)),
        step=3,
        chunk_layers=(1,) * NUM_RANKS,
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, timeline: Timeline) -> Path:
    folder = write_run(tmp_path_factory.mktemp("run"))
    write_timeline(folder / run_files.PIPELINE, timeline)
    run = read_run(folder)
    path = write_page(run, facts_of(run))
    # The section comes first, so that it is on the picture of the window.
    text = path.read_text(encoding="utf-8")
    (section,) = re.findall(r'<section id="pipeline">.*?</section>', text, flags=re.DOTALL)
    path.write_text(text.replace(section, "").replace("<main>", f"<main>{section}"), encoding="utf-8")
    return path


def shares(seen: np.ndarray, timeline: Timeline, rank: int, kind: Kind) -> tuple[float, float]:
    """The part of the columns with the colour, of those inside of boxes of the kind, and of all others."""
    columns = (np.arange(ACROSS) + 0.5) / ACROSS * timeline.makespan
    inside = np.zeros(ACROSS, dtype=bool)
    for span in timeline.ranks[rank]:
        if span.instruction.kind is kind:
            inside |= (columns > span.began) & (columns < span.end)
    return float(seen[inside].mean()), float(seen[~inside].mean())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_boxes_are_seen_where_their_times_are(browser: Browser, page: Path, timeline: Timeline, scheme: str) -> None:
    """Near the upper edge of each row, where no number stands, each kind's colour is in its boxes and nowhere else,
    except for the pixel between neighbours."""
    style, options = (DARK_STYLE, ["--blink-settings=preferredColorScheme=0"]) if scheme == "dark" else (STYLE, [])
    pixels = browser.screenshot(page, *options)
    left, top, width, height, page_width = browser.ask(page, BOX)
    assert abs(width - WIDTH) < 3, "one to one on a wide page"
    assert page_width <= 1280
    svg = pixels[round(top) : round(top + height), round(left) + MARGIN : round(left) + MARGIN + ACROSS]
    for kind, name in ((Kind.FORWARD, "f0"), (Kind.BACKWARD, "b0")):
        (colour,) = re.findall(rf"\.pl-{name} \{{ fill: (#[0-9a-f]{{6}})", style)
        mask = coloured(svg, colour, tolerance=12)
        edges = np.flatnonzero(np.diff(mask.any(axis=1).astype(int)) == 1) + 1
        assert len(edges) == 2 * NUM_RANKS, "a row a rank, simulated and recorded"
        for place, edge in enumerate(edges):
            inside, outside = shares(mask[edge + 3], timeline, place % NUM_RANKS, kind)
            assert inside > 0.85 and outside < 0.02, (scheme, name, place, inside, outside)
            other = shares(mask[edge + 3], timeline, (place + 2) % NUM_RANKS, kind)
            assert other[1] > 0.05, "negative control: another rank's row"


def test_idle_time_is_hatched(browser: Browser, page: Path) -> None:
    pixels = browser.screenshot(page)
    left, top, width, height, _ = browser.ask(page, BOX)
    svg = pixels[round(top) : round(top + height), round(left) : round(left + width)]
    for cause in ("ramp", "imbalance", "communication"):
        (wash,) = re.findall(rf"\.pl-{cause} \{{ fill: (#[0-9a-f]{{6}})", STYLE)
        assert coloured(svg, wash, tolerance=3).sum() > 200, cause
    bare = page.with_name("bare.html")
    text = re.sub(r'<path class="pl-(imbalance|communication)"', "<path", page.read_text(encoding="utf-8"))
    bare.write_text(text, encoding="utf-8")
    for cause in ("imbalance", "communication"):
        (wash,) = re.findall(rf"\.pl-{cause} \{{ fill: (#[0-9a-f]{{6}})", STYLE)
        left, top, width, height, _ = browser.ask(bare, BOX)
        without = browser.screenshot(bare)[round(top) : round(top + height), round(left) : round(left + width)]
        assert coloured(without, wash, tolerance=3).sum() < 100, "negative control"


def test_the_script_still_reads_the_charts(browser: Browser, page: Path) -> None:
    dumped = browser.dom(page)
    assert 'class="scripted"' in dumped and "data-error" not in dumped
