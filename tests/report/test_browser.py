"""report.html as a person sees it: in a real browser, without a network, with and without its script."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lite.report.page import write_page
from megatron_lite.report.run import read_run
from megatron_lite.report.summary import facts_of
from tests.report.browser import NAMES, Browser, coloured, curve_heights, find_browser, misfit
from tests.report.run_folder import NUM_STEPS, SHAPES, record, write_run

LIGHT, DARK = "#0969da", "#58a6ff"  # of the first curve of each chart
PLOTS = """[...document.querySelectorAll(".plots")].map((plots) => {
  const box = plots.getBoundingClientRect();
  return [box.left, box.top, box.width, box.height];
})"""
# What the browser asks for on its own account. That the page names no host at all is test_page's.
OWN_HOSTS = (b"google.com", b"googleapis.com", b"gvt1.com")
# The charts in the order of the page, by the key of their metric.
ORDER = ("loss", "lr", "grad_norm", "tokens_per_s", "mfu", "step_time_s", "peak_memory_bytes")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    program = find_browser()
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on PATH")
    return Browser(program, tmp_path_factory.mktemp("profile"))


def report_of(folder: Path) -> Path:
    run = read_run(folder)
    return write_page(run, facts_of(run))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report_of(write_run(tmp_path_factory.mktemp("run")))


def plots(browser: Browser, page: Path, *options: str) -> list[np.ndarray]:
    """The pixels of each plotting area, its frame included."""
    pixels = browser.screenshot(page, *options)
    found = []
    for left, top, width, height in browser.ask(page, PLOTS):
        assert width > 300 and height > 100
        found.append(pixels[round(top) : round(top + height) + 1, round(left) : round(left + width)])
    return found


def expected(name: str, columns: int) -> list[float]:
    first, last = 1 / NUM_STEPS, 1.0
    return [SHAPES[name](first + (last - first) * (i + 0.5) / columns) for i in range(columns)]


def without_script(page: Path) -> Path:
    """A copy of a page that lets no script run."""
    text, found = re.subn(r"script-src &#x27;[^;]*&#x27;", "script-src 'none'", page.read_text(encoding="utf-8"))
    assert found == 1
    copy = page.with_name("without-script.html")
    copy.write_text(text, encoding="utf-8")
    return copy


@pytest.mark.parametrize("way", ["light", "dark", "without script"])
def test_every_chart_shows_its_curve(browser: Browser, page: Path, way: str) -> None:
    """In each column of pixels the curve is where the metric is, within 4 pixels: 2 for the width of the stroke, and 2
    because a moving average lags behind at the last step."""
    colour, options = (DARK, ["--blink-settings=preferredColorScheme=0"]) if way == "dark" else (LIGHT, [])
    page = without_script(page) if way == "without script" else page
    assert ('class="scripted"' in browser.dom(page)) == (way != "without script")
    charts = plots(browser, page, *options)
    assert len(charts) == len(ORDER)
    heights = {name: curve_heights(coloured(chart, colour)) for name, chart in zip(ORDER, charts, strict=True)}
    for name, found in heights.items():
        assert misfit(found, expected(name, len(found))) < 4, name
    third = len(heights["loss"]) // 3
    assert np.nanmean(heights["loss"][:third]) < np.nanmean(heights["loss"][-third:]) - 20, "a falling loss falls"
    # Negative controls: the curve of another metric does not fit, nor does the same curve upside down.
    for name, other in zip(ORDER, (*ORDER[1:], ORDER[0]), strict=True):
        assert misfit(heights[name], expected(other, len(heights[name]))) > 8, (name, other)
        assert misfit(-heights[name], expected(name, len(heights[name]))) == float("inf")


def test_an_empty_series_has_no_curve(browser: Browser, tmp_path: Path) -> None:
    """The negative control of the pixels that count as a curve: a loss that never was a number."""
    records = [record(step) | {"loss": float("nan")} for step in range(1, NUM_STEPS + 1)]
    without = [{key: value for key, value in one.items() if not key.startswith("valid")} for one in records]
    page = report_of(write_run(tmp_path, without))
    loss, lr, *_ = plots(browser, page)
    assert not coloured(loss, LIGHT).any()
    assert coloured(lr, LIGHT).any()
    assert "data-error" not in browser.dom(page)


def test_a_run_of_one_step_is_shown(browser: Browser, tmp_path: Path) -> None:
    page = report_of(write_run(tmp_path, [record(1)]))
    for chart in plots(browser, page):
        assert coloured(chart, LIGHT).any(), "a dot"


def test_the_script_runs(browser: Browser, page: Path) -> None:
    dumped = browser.dom(page)
    assert 'class="scripted"' in dumped and "data-error" not in dumped
    # Negative control: a script that its policy does not name, or that is wrong, is seen to fail.
    broken = page.with_name("broken.html")
    broken.write_text(page.read_text(encoding="utf-8").replace('"use strict";', '"use strict"; ', 1), encoding="utf-8")
    assert 'class="scripted"' not in browser.dom(broken)


READ = """(() => {
  const legends = () => [...document.querySelectorAll(".legend output")].map((value) => value.textContent);
  const shown = () => [document.querySelector("#reader output").textContent, ...legends()];
  const seen = (selector) => getComputedStyle(document.querySelector(selector)).visibility === "visible";
  const plots = document.querySelector(".plots"), box = plots.getBoundingClientRect();
  const before = shown();
  const at = { clientX: box.left + box.width * 9 / 39, clientY: box.top + 20, bubbles: true };
  plots.dispatchEvent(new PointerEvent("pointermove", at));
  const pointed = shown(), cursor = seen(".cursor");
  plots.dispatchEvent(new PointerEvent("pointerleave"));
  const after = shown(), gone = !seen(".cursor");
  const slider = document.querySelector("#step");
  slider.value = 20;
  slider.dispatchEvent(new Event("input"));
  return { before, pointed, cursor, after, gone, slid: shown() };
})()"""


def test_values_are_read_out_of_the_charts(browser: Browser, page: Path) -> None:
    """Under the pointer at 9/39 of the way from step 1 to step 40, and at the slider's step; the end comes back."""
    answer = browser.ask(page, READ)
    loss, lr = (lambda step: SHAPES["loss"](step / NUM_STEPS)), (lambda step: SHAPES["lr"](step / NUM_STEPS))
    assert answer["before"][0] == answer["after"][0] == "40" and answer["before"] == answer["after"]
    assert answer["cursor"] and answer["gone"]
    for values, step in ((answer["pointed"], 10), (answer["slid"], 20)):
        shown_step, training, smoothed, validation, rate = values[:5]
        assert shown_step == str(step)
        assert float(training) == pytest.approx(loss(step), rel=1e-3)
        assert float(smoothed) == pytest.approx(loss(step), rel=1e-2)
        assert float(validation) == 4.5
        assert float(rate) == pytest.approx(lr(step), rel=1e-3)


SWITCH = """(() => {
  const shown = (selector) => getComputedStyle(document.querySelector(selector)).display !== "none";
  const state = () => [shown(".plots .linear"), shown(".plots .log"), shown(".what"),
    [...document.querySelectorAll(".config tr")].filter((row) => row.offsetHeight > 0).length];
  const states = [state()];
  for (const selector of [".to-log", "#explain", "#only-changed"]) {
    document.querySelector(selector).click();
    states.push(state());
  }
  return [states, document.querySelectorAll(".config .changed").length];
})()"""


def test_switches_need_no_script(browser: Browser, page: Path) -> None:
    """They are style sheets: the states follow the inputs, whatever the script does."""
    states, changed = browser.ask(page, SWITCH)
    (linear, log, what, rows), *later = states
    assert (linear, log, what) == (True, False, False) and 0 < changed < rows
    assert later == [[False, True, False, rows], [False, True, True, rows], [False, True, True, changed]]


@contextmanager
def listening() -> Iterator[tuple[str, list[bytes]]]:
    """A proxy that takes every request down and answers none."""
    requests: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(5)
                    requests.append(connection.recv(4096).split(b"\r\n")[0])

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", requests
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_nothing_leaves_the_page(browser: Browser, page: Path, tmp_path: Path) -> None:
    """Negative controls: an image on another host is asked for where no policy forbids it, and only there."""
    image = '<img src="http://elsewhere.test/image.png">'
    bare, guarded = tmp_path / "bare.html", tmp_path / "guarded.html"
    bare.write_text(f"<!doctype html><title>t</title>{image}", encoding="utf-8")
    guarded.write_text(page.read_text(encoding="utf-8").replace("</main>", f"{image}</main>"), encoding="utf-8")
    asked: dict[str, Any] = {}
    for name, path in (("report", page), ("bare", bare), ("guarded", guarded)):
        with listening() as (proxy, requests):
            browser.run(path, "--dump-dom", proxy=proxy)
        asked[name] = [request for request in requests if not any(host in request for host in OWN_HOSTS)]
    assert any(b"elsewhere.test" in request for request in asked["bare"]), asked
    assert not asked["report"] and not asked["guarded"], asked
