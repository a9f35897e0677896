"""report.html as text: well-formed, escaped, self-contained, small, and right about the config."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_lite.config import key_help, load_config
from megatron_lite.planner.memory import CATEGORIES
from megatron_lite.report.chart import DARK_STYLE, STYLE
from megatron_lite.report.markup import VOID, Markup, tag
from megatron_lite.report.memory import memory_rows
from megatron_lite.report.page import page
from megatron_lite.report.run import Run, read_run
from megatron_lite.report.settings import settings_of
from megatron_lite.report.summary import facts_of
from megatron_lite.utils import run_files
from tests.report.run_folder import KEYS, NUM_STEPS, record, write_run

EVIL = """</script><script>alert("1")</script>'&amp;<img src=x onerror=alert(2)>"""


class Reader(HTMLParser):
    """The elements and the text of a page; complaints about what is not well-formed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.complaints: list[str] = []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        if len(dict(attributes)) != len(attributes):
            self.complaints.append(f"an attribute twice in <{name}>")
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        if "svg" not in self.open:
            self.complaints.append(f"<{name}/> outside of an svg")

    def handle_endtag(self, name: str) -> None:
        if not self.open or self.open.pop() != name:
            self.complaints.append(f"</{name}> closes nothing")

    def handle_data(self, text: str) -> None:
        self.texts.append(text)

    @classmethod
    def of(cls, text: str) -> Reader:
        reader = cls()
        reader.feed(text)
        reader.close()
        reader.complaints += [f"<{name}> is not closed" for name in reader.open]
        outside = re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL)
        reader.complaints += re.findall(r"&(?!amp;|lt;|gt;|quot;|#x27;).{,9}", outside)
        ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
        reader.complaints += [f"id {one} twice" for one in ids if ids.count(one) > 1]
        targets = [attributes["for"] for _, attributes in reader.elements if "for" in attributes]
        reader.complaints += [f"a label for {one}" for one in targets if one not in ids]
        return reader


def page_of(folder: Path) -> str:
    run = read_run(folder)
    return page(run, facts_of(run))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(write_run(tmp_path_factory.mktemp("run")))


def test_the_page_is_well_formed(text: str) -> None:
    reader = Reader.of(text)
    assert not reader.complaints
    assert text.startswith("<!doctype html>") and len(reader.elements) > 300
    assert [name for name, _ in reader.elements if name in ("h1", "main", "header", "footer")] == [
        "header", "h1", "main", "footer",
    ]  # fmt: skip


@pytest.mark.parametrize("broken", ["<p>", "</p>", "AT&T", '<i id="step"></i>', '<p class="a" class="b"></p>'])
def test_control_of_the_reader(text: str, broken: str) -> None:
    assert Reader.of(text.replace("</main>", f"{broken}</main>")).complaints


def test_the_page_needs_nothing_else(text: str) -> None:
    reader = Reader.of(text)
    loads = {"src", "href", "srcset", "data", "action", "poster", "background", "xlink:href", "style"}
    for name, attributes in reader.elements:
        found = {key: value for key, value in attributes.items() if key in loads or key.startswith("on")}
        assert found in ({}, {"href": "data:,"}), (name, found)
    assert not re.search(r"https?:|url\(|@import|\bimport\(|fetch\(|XMLHttpRequest|\beval\(", text)
    policy = next(attributes["content"] for _, attributes in reader.elements if attributes.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'") and "unsafe" not in policy


def test_charts_are_named_and_described(text: str) -> None:
    reader = Reader.of(text)
    described = [attributes["aria-label"] for _, attributes in reader.elements if attributes.get("role") == "img"]
    assert len(described) == 9, "seven charts, two of them on two scales"
    assert described[0] == (
        "loss in nats per token: training 4.95 at step 1 to 3 at step 40, between 3 and 4.95; "
        "validation 4.5 at step 20 to 4.5 at step 40, between 4.5 and 4.5"
    )


def test_the_numbers_are_there(text: str) -> None:
    texts = Reader.of(text).texts
    for wanted in ("tiny", "finished", "3.0000", "from 4.9500", "2.125", "tokens/s", "384"):
        assert wanted in texts, wanted
    assert "2 of 1 in each data rank" not in texts and "layers 0–1" in texts


def amounts(**places: int) -> dict[str, int]:
    return {"device": 0, "host": 0, "disk": 0} | places


def test_the_memory_of_the_largest_stage_is_there(tmp_path: Path, text: str) -> None:
    small = {name: amounts(device=1 << 20) for name in (*CATEGORIES, "total")}
    large = small | {"total": amounts(device=7 << 20, disk=9 << 20), "moments": amounts(disk=9 << 20)}
    measured = {"parameters": amounts(device=3 << 20), "moments": amounts(disk=9 << 20)}
    folder = write_run(tmp_path)
    account = {"memory": {"predicted": [small, large], "measured": [{}, measured]}}
    (folder / run_files.UTILISATION).write_text(json.dumps(account))
    reader = Reader.of(page_of(folder))
    assert not reader.complaints and "of a rank of stage 1, the largest" in reader.texts
    found = memory_rows(folder)
    assert found is not None and found[0] == 1
    rows = {name: values for name, *values in found[1]}
    assert rows["parameters"] == ["1.00 MiB", "3.00 MiB"] and rows["moments in files"] == ["9.00 MiB", "9.00 MiB"]
    assert rows["total"] == ["7.00 MiB", ""] and rows["total in files"] == ["9.00 MiB", ""]
    assert "Memory " not in Reader.of(text).texts, "a run that left no account has no table"
    for broken in ("{", '{"memory": 5}', '{"memory": {"predicted": [], "measured": []}}', "[" * 100_000):
        (folder / run_files.UTILISATION).write_text(broken)
        assert memory_rows(folder) is None and "Memory " not in Reader.of(page_of(folder)).texts


def test_the_layout_names_what_of_zero_is_not_usual(tmp_path: Path, text: str) -> None:
    zero = ["parallel.tp=1", "parallel.dp=2", "train.global_batch_size=8"]
    keys = [*zero, "parallel.zero_stage=3", "parallel.zero_group=1", "parallel.gather_policy=keep"]
    keys += ["parallel.reduce_policy=microbatch", "offload.optimizer=cpu"]
    texts = Reader.of(page_of(write_run(tmp_path / "zero", None, *keys))).texts
    assert "ZeRO stage 3 in groups of 1, gather_policy=keep, reduce_policy=microbatch" in texts
    assert "offloaded" in texts and "optimizer in main memory" in texts
    usual = Reader.of(page_of(write_run(tmp_path / "usual", None, *zero))).texts
    assert "ZeRO stage 1" in usual and "offloaded" not in usual


def test_whatever_comes_from_the_disk_is_escaped(tmp_path: Path) -> None:
    evil = json.dumps(f"data/{EVIL}")
    keys = [f"data.train=[{evil}]", f"data.tokenizer={evil}", f"run.dir={evil}"]
    reader = Reader.of(page_of(write_run(tmp_path, None, *keys)))
    assert not reader.complaints
    assert [attributes.get("type") for name, attributes in reader.elements if name == "script"] == [
        "application/json",
        None,
    ]
    assert not [name for name, _ in reader.elements if name == "img"]
    assert sum(EVIL in piece for piece in reader.texts) == 4, "shown as it is written: three keys, and where from"


def test_tags_escape_what_is_not_markup() -> None:
    assert tag("p", "a < b", tag("i", "&"), class_="x", title='"<', hidden=True, id=None) == (
        '<p class="x" title="&quot;&lt;" hidden>a &lt; b<i>&amp;</i></p>'
    )
    assert tag("p", Markup("<b>")) == "<p><b></p>"
    assert tag("input", type="radio", checked=False) == '<input type="radio">'


def test_the_config_is_shown_with_what_was_changed() -> None:
    config = load_config(
        None, [*KEYS, "train.num_steps=9", "optim.lr=1e-3", "optim.min_lr=1e-4", "optim.warmup_steps=0"], world_size=2
    )
    settings = {setting.key: setting for setting in settings_of(config)}
    known = {entry.key for entry in key_help() if not entry.key.startswith("model.rope_scaling.")}
    assert set(settings) == known, "every key; what rope_scaling would hold is not there while it is null"
    changed = {key for key, setting in settings.items() if setting.is_changed}
    # Given at their defaults, derived or not: min_lr, warmup_steps. Required: the sizes. Filled in: dp, decay_steps.
    assert changed == {"parallel.tp", "optim.lr"}
    assert settings["optim.lr"].value == "0.001" and settings["optim.lr"].default.startswith("0.0003; ")
    assert settings["parallel.dp"].value == "1" and settings["optim.decay_steps"].value == "9"


def test_a_nested_section_is_shown_by_its_keys() -> None:
    scaling = "model.rope_scaling={type: linear, factor: 8.0}"
    config = load_config(None, [*KEYS, "train.num_steps=9", scaling], world_size=2)
    settings = {setting.key: setting for setting in settings_of(config)}
    assert settings["model.rope_scaling.factor"].value == "8.0" and "model.rope_scaling" not in settings


def test_a_long_run_is_a_small_page_with_its_spikes(tmp_path: Path) -> None:
    count, spikes = 100_000, (20_001, 77_777)
    folder = write_run(tmp_path, [record(1, count)], num_steps=count)
    config = load_config(folder / "config.yaml")
    records = [record(step, count) for step in range(1, count + 1)]
    for spike in spikes:
        records[spike - 1] |= {"loss": 9.5, "step_time_s": 7.0}
    run = Run(folder, config, tuple(records))
    text = page(run, facts_of(run))
    assert len(text) < 1_000_000
    curves = json.loads(re.findall(r'id="curves">(.*?)</script>', text)[0])
    for panel, value in ((0, 9.5), (5, 7000.0)):
        shown = curves["panels"][panel]["series"][0]
        tall = [x for x, y in zip(shown["x"], shown["y"], strict=True) if y == value]
        assert tall == list(spikes), "a spike of one step stays, at its step"
    path = re.findall(r'<path class="line faint c0"[^>]* d="M([^"]*)"', text)[0].split("L")
    assert sum(float(point.split(",")[1]) < 15 for point in path) == 2, "and it is drawn, near the upper edge"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_a_step_without_a_number_is_a_gap(tmp_path: Path, value: float) -> None:
    records = [record(step) for step in range(1, NUM_STEPS + 1)]
    records[10]["loss"] = records[11]["loss"] = value
    text = page_of(write_run(tmp_path, records))
    assert not Reader.of(text).complaints
    faint = re.findall(r'<path class="line faint c0"[^>]* d="([^"]*)"', text)[0]
    assert faint.count("M") == 2 and "nan" not in faint and "inf" not in faint
    assert "Not a number at 2 steps" in text and text.count('class="bad"') == 4, "on both scales"


def test_what_the_metrics_do_not_hold_is_left_out(tmp_path: Path) -> None:
    bare = [{"step": step, "loss": 3.0 - step / 100, "mfu": None, "note": "x"} for step in range(1, 6)]
    text = page_of(write_run(tmp_path, bare))
    assert not Reader.of(text).complaints
    assert text.count("<figure") == 1 and "step 5 of 40" in text and "not finished" in text


def test_a_batch_that_grows_is_shown_with_its_sizes(tmp_path: Path) -> None:
    ramp = page_of(write_run(tmp_path / "ramp", None, "train.batch_rampup=[4,2,100]"))
    plain = page_of(write_run(tmp_path / "plain"))
    for words in ("up to 128 tokens a step", "sequences of 16 tokens, from 4 on by 2 more over 100 samples"):
        assert words in ramp and words not in plain


def test_a_resumed_run_is_marked(tmp_path: Path) -> None:
    text = page_of(write_run(tmp_path, [*map(record, range(1, 31)), *map(record, range(21, 41))]))
    assert text.count('class="mark"') == 9, "in every chart"
    assert 'class="mark"' not in page_of(write_run(tmp_path))


def colours(css: str) -> dict[str, str]:
    return dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", css))


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, contrast ratio: (L1 + 0.05) / (L2 + 0.05) of the relative luminances."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_apart(text: str, scheme: str) -> None:
    """WCAG 2.2, 1.4.3 and 1.4.11: text 4.5, what else carries meaning 3."""
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    before, _, after = text.partition("@media screen and (prefers-color-scheme: dark)")
    css, charts = (before, STYLE) if scheme == "light" else (after.partition("}")[0], DARK_STYLE)
    named = colours(css)
    for behind in ("card", "page"):
        for ink in ("ink", "soft"):
            assert contrast(named[ink], named[behind]) >= 4.5, (ink, behind)
    assert contrast(named["good"], named["good-wash"]) >= 4.5 and contrast(named["wait"], named["wait-wash"]) >= 4.5
    assert contrast(re.findall(r"text \{[^}]*fill: (#[0-9a-f]{6})", charts)[0], named["card"]) >= 4.5
    for number in (0, 1):
        (line,) = re.findall(rf"\.c{number} {{ stroke: (#[0-9a-f]{{6}})", charts)
        assert line == named[f"c{number}"] and contrast(line, named["card"]) >= 3
