"""The parts of a page that are no charts: the numbers, the layout of the ranks, the config, a table of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from megatron_lite.config import RunConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.distributed.topology import Layout
from megatron_lite.pipeline.partition import chunk_layers_of, layers_of_chunk
from megatron_lite.pipeline.schedules import schedule_of
from megatron_lite.report.markup import Markup, tag, together
from megatron_lite.report.run import Run
from megatron_lite.report.series import is_drawable, number
from megatron_lite.report.settings import Setting, settings_of
from megatron_lite.report.summary import Fact

MAX_RANKS = 64  # more are no picture
MAX_ROWS = 20  # of the table of steps, beside those with an evaluation
COLUMNS = (
    ("tokens", "tokens"),
    ("loss", "loss"),
    ("valid_loss", "validation loss"),
    ("valid_bits_per_byte", "bits per byte"),
    ("grad_norm", "gradient norm"),
    ("lr", "learning rate"),
    ("tokens_per_s", "tokens/s"),
    ("step_time_s", "step time, s"),
)


def facts_section(facts: Sequence[Fact]) -> Markup:
    tiles = []
    for fact in facts:
        value = together([fact.value, *([" ", tag("small", fact.unit)] if fact.unit else [])])
        note = " · ".join(part for part in (f"from {fact.before}" if fact.before else "", fact.note) if part)
        lines = [tag("dt", fact.name), tag("dd", value, class_="value")]
        tiles.append(tag("div", *lines, *([tag("dd", note, class_="note")] if note else [])))
    return tag("dl", *tiles, class_="facts card", aria_label="Summary")


def layout_section(config: RunConfig) -> Markup:
    parallel = config.parallel
    rows = [
        ("processes", f"{config.world_size:,}", ""),
        ("tensor parallel", str(parallel.tp), "with sequence parallel" if parallel.sequence_parallel else ""),
        ("pipeline stages", str(parallel.pp), _pipeline_note(parallel)),
        ("data parallel", str(config.dp), _zero_note(config)),
        ("context parallel", str(parallel.cp), ""),
        (
            "batch",
            f"{config.train.global_batch_size:,}",
            f"sequences of {config.train.seq_len:,} tokens{_rampup_note(config)}",
        ),
        ("microbatches", f"{config.num_microbatches:,}", f"of {config.train.micro_batch_size:,} in each data rank"),
        ("precision", config.train.precision, ""),
        ("offloaded", config.offload.in_words, ""),
    ]
    facts = []
    for name, value, note in rows:
        if value and (name != "context parallel" or parallel.cp > 1):
            small = [" ", tag("small", note)] if note else []
            facts += [tag("dt", name), tag("dd", value, *small)]
    picture = [] if config.world_size == 1 else [_ranks(config)]
    return _section("Layout", tag("div", tag("dl", *facts), *picture, class_="layout card"))


def _zero_note(config: RunConfig) -> str:
    """The stage, and what of ZeRO is not as it is by default."""
    parallel = config.parallel
    if config.dp == 1:
        return ""
    parts = [f"ZeRO stage {parallel.zero_stage}"]
    if parallel.zero_group not in (None, config.dp):
        parts[0] += f" in groups of {parallel.zero_group}"
    if parallel.gather_policy != "auto":
        parts.append(f"gather_policy={parallel.gather_policy}")
    if parallel.reduce_policy != "step":
        parts.append(f"reduce_policy={parallel.reduce_policy}")
    return ", ".join(parts)


def _rampup_note(config: RunConfig) -> str:
    if config.train.batch_rampup is None:
        return ""
    start, increment, samples = config.train.batch_rampup
    return f", from {start:,} on by {increment:,} more over {samples:,} samples"


def _pipeline_note(parallel: ParallelConfig) -> str:
    chunks = f", {parallel.virtual_stages} chunks each" if parallel.virtual_stages > 1 else ""
    return f"{parallel.schedule}{chunks}" if parallel.pp > 1 else ""


def _layers_of_stages(config: RunConfig) -> list[str]:
    """The layers that each stage holds, in words; empty ones where the file that says it is no longer there."""
    try:
        placement = schedule_of(config).placement
        chunk_layers = chunk_layers_of(config.model, config.parallel, config.train.seq_len, placement)
    except (OSError, ValueError):
        return [""] * config.parallel.pp
    stages = []
    for stage in range(config.parallel.pp):
        runs = [layers_of_chunk(chunk_layers, chunk) for chunk in placement.chunks_of(stage)]
        texts = [f"{run.start}–{run.stop - 1}" if len(run) > 1 else str(run.start) for run in runs if run]
        several = sum(map(len, runs)) > 1
        stages.append(f"layer{'s' if several else ''} {', '.join(texts)}" if texts else "no layer")
    return stages


def _ranks(config: RunConfig) -> Markup:
    """A row for each copy of the model, a column for each stage, in it the ranks that share the stage's weights."""
    parallel = config.parallel
    layout = Layout(pp=parallel.pp, dp=config.dp, cp=parallel.cp, tp=parallel.tp)
    ranks_per_copy = layout.world_size // layout.dp
    if ranks_per_copy > MAX_RANKS:
        return tag("p", f"A copy of the model is spread over {ranks_per_copy:,} processes.", class_="soft")
    shown = min(layout.dp, MAX_RANKS // ranks_per_copy)
    head = [tag("td", hidden=True)]
    for stage, layers in enumerate(_layers_of_stages(config)):
        head.append(tag("th", tag("b", f"stage {stage}"), layers, scope="col"))
    rows = []
    for copy in range(shown):
        cells = [tag("th", f"copy {copy}", scope="row")] if layout.dp > 1 else []
        for stage in range(layout.pp):
            ranks = [layout.rank(pp=stage, dp=copy, cp=cp, tp=tp) for cp in range(layout.cp) for tp in range(layout.tp)]
            cells.append(tag("td", *(tag("i", str(rank)) for rank in ranks)))
        rows.append(tag("tr", *cells))
    corner = [tag("th", tag("span", "copy of the model", class_="unseen"))] if layout.dp > 1 else []
    caption = tag("caption", "Ranks by stage and copy of the model", class_="unseen")
    table = tag("table", caption, tag("thead", tag("tr", *corner, *head[1:])), tag("tbody", *rows), class_="ranks")
    more = layout.dp - shown
    return tag("div", table, *([tag("p", f"and {more:,} more copies", class_="soft")] if more else []))


def config_section(config: RunConfig) -> Markup:
    settings = settings_of(config)
    changed = sum(setting.is_changed for setting in settings)
    switches = tag(
        "div",
        tag("label", tag("input", type="checkbox", id="only-changed"), f"only the {changed} that differ from defaults"),
        tag("label", tag("input", type="checkbox", id="explain"), "explain the keys"),
        tag("span", "differs from the default", class_="key"),
        class_="switches",
    )
    cards = []
    for name, group in groupby(settings, key=lambda setting: setting.key.partition(".")[0]):
        rows = [_setting_row(setting) for setting in group]
        cards.append(tag("div", tag("table", tag("caption", name), tag("tbody", *rows)), class_="card"))
    bar = tag("div", tag("h2", "Config"), switches, class_="bar")
    return tag("section", bar, tag("div", *cards, class_="config"))


def _setting_row(setting: Setting) -> Markup:
    about = f"{setting.description} ({setting.type}; default: {setting.default or 'empty'})"
    differs = [tag("span", " (differs from the default)", class_="unseen")] if setting.is_changed else []
    name = setting.key.partition(".")[2]
    return tag(
        "tr",
        tag("th", name, scope="row"),
        tag("td", setting.value, *differs, tag("span", about, class_="what")),
        class_="changed" if setting.is_changed else None,
        title=about,
    )


def steps_section(run: Run) -> Markup:
    """Some of the records as a table: what the charts show, for those who cannot see them."""
    shown = [(key, name) for key, name in COLUMNS if any(key in record for record in run.records)]
    count = len(run.records)
    picked = {round(i * (count - 1) / (MAX_ROWS - 1)) for i in range(MAX_ROWS)}
    evaluated = [i for i, record in enumerate(run.records) if "valid_loss" in record]
    picked |= set(evaluated if len(evaluated) <= MAX_ROWS else ())
    head = [tag("th", name, scope="col") for name in ("step", *(name for _, name in shown))]
    rows = []
    for i in sorted(picked):
        record = run.records[i]
        cells = [tag("td", _cell(record, key)) for key, _ in shown]
        rows.append(tag("tr", tag("th", f"{record['step']:,}", scope="row"), *cells))
    caption = tag("caption", f"{len(rows)} of {count:,} steps", class_="unseen")
    table = tag("table", caption, tag("thead", tag("tr", *head)), tag("tbody", *rows))
    return _section("Steps", tag("div", table, class_="numbers card"))


def _cell(record: Mapping[str, float], key: str) -> str:
    if key not in record:
        return ""
    value = record[key]
    if not is_drawable(value):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if "loss" in key else number(value)


def _section(title: str, *children: str) -> Markup:
    return tag("section", tag("h2", title), *children)
