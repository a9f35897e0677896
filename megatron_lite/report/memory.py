"""The memory of a run, as it left it: predicted and measured, of the pipeline stage that has most."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_lite.planner.amounts import Amount
from megatron_lite.planner.memory import CATEGORIES
from megatron_lite.planner.table import rows_of
from megatron_lite.report.markup import Markup, tag
from megatron_lite.utils import run_files

HEAD = ("", "predicted", "measured")


def memory_rows(folder: Path) -> tuple[int, list[list[str]]] | None:
    """The stage, -1 where there is only one, and its rows: what, predicted, measured (empty where it was not).

    None where the folder has no such account, as that of an older run, or a broken one.
    """
    try:
        account = json.loads((folder / run_files.UTILISATION).read_text(encoding="utf-8"))["memory"]
        predicted, measured = account["predicted"], account["measured"]
        stage = max(range(len(predicted)), key=lambda one: predicted[one]["total"]["device"])
        rows = list[list[str]]()
        for name in (*CATEGORIES, "total"):
            found = measured[stage].get(name)
            rows += rows_of(name, (Amount(**predicted[stage][name]), None if found is None else Amount(**found)))
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return None
    return (stage if len(predicted) > 1 else -1), rows


def memory_section(folder: Path) -> Markup | None:
    """A small table, or None where there is nothing to show."""
    found = memory_rows(folder)
    if found is None:
        return None
    stage, rows = found
    where = "of a rank" if stage < 0 else f"of a rank of stage {stage}, the largest"
    head = tag("tr", *(tag("th", name, scope="col") for name in HEAD))
    body = [tag("tr", tag("th", name, scope="row"), *(tag("td", value) for value in values)) for name, *values in rows]
    caption = tag("caption", f"Bytes {where}", class_="unseen")
    table = tag("table", caption, tag("thead", head), tag("tbody", *body))
    title = tag("h2", "Memory ", tag("small", where))
    return tag("section", title, tag("div", table, class_="numbers card"))
