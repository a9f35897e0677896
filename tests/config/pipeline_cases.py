"""Layouts of a pipeline that are refused, for test_errors.py: (overrides, world size, key, one fix that is offered)."""

from __future__ import annotations

BROKEN_PIPELINES: list[tuple[str, int | None, str, str]] = [
    ("parallel.pp=5", None, "parallel.pp", "parallel.pp=4"),
    ("parallel.pp=7", 6, "parallel.pp", "parallel.pp=3"),
    ("parallel.pp=2 parallel.stage_layers=[1,2]", None, "parallel.stage_layers", "parallel.stage_layers=[2,2]"),
    ("parallel.pp=3 parallel.stage_layers=[4,0,0]", None, "parallel.stage_layers", "parallel.stage_layers=[2,1,1]"),
    ("parallel.pp=2 parallel.stage_layers=[1,1,2]", None, "parallel.stage_layers", "parallel.stage_layers=[2,2]"),
    ("parallel.stage_layers=4", None, "parallel.stage_layers", "parallel.stage_layers=[4]"),
    (
        "parallel.pp=2 parallel.schedule=zb-v parallel.stage_layers=[2,2]",
        None,
        "parallel.stage_layers",
        "parallel.stage_layers=[1,1,1,1]",
    ),
    (
        "parallel.pp=2 parallel.schedule=zb-v parallel.stage_layers=[3,0,1,0]",
        None,
        "parallel.stage_layers",
        "parallel.stage_layers=[1,1,1,1]",
    ),
    # the schedule and its virtual stages
    ("parallel.schedule=1F1B", None, "parallel.schedule", "parallel.schedule=1f1b"),
    ("parallel.schedule=zb_v", None, "parallel.schedule", "parallel.schedule=zb-v"),
    ("parallel.schedule=own.csw", None, "parallel.schedule", "parallel.schedule=1f1b"),
    ("parallel.pp=2 parallel.virtual_stages=2", None, "parallel.virtual_stages", "parallel.schedule=interleaved"),
    ("parallel.pp=2 parallel.virtual_stages=2", None, "parallel.virtual_stages", "parallel.virtual_stages=1"),
    (
        "parallel.pp=2 parallel.schedule=zb-v parallel.virtual_stages=1",
        None,
        "parallel.virtual_stages",
        "parallel.virtual_stages=2",
    ),
    (
        "parallel.pp=2 parallel.schedule=zb-v parallel.virtual_stages=1",
        None,
        "parallel.virtual_stages",
        "parallel.schedule=zb-h1",
    ),
    ("parallel.pp=2 parallel.virtual_stages=0", None, "parallel.virtual_stages", "parallel.virtual_stages=1"),
    # too few layers for the chunks
    (
        "parallel.pp=2 parallel.schedule=interleaved parallel.virtual_stages=3",
        None,
        "parallel.virtual_stages",
        "parallel.virtual_stages=2",
    ),
    (
        "parallel.pp=2 parallel.schedule=interleaved parallel.virtual_stages=4",
        None,
        "parallel.virtual_stages",
        "parallel.pp=1",
    ),
    ("parallel.pp=4 parallel.schedule=zb-v", None, "parallel.pp", "parallel.pp=2"),
    ("parallel.pp=4 parallel.schedule=zb-v", None, "parallel.pp", "parallel.schedule=zb-h1"),
    (
        "parallel.pp=4 parallel.schedule=zb-v parallel.virtual_stages=2",
        None,
        "parallel.pp",
        "parallel.schedule=zb-h1 parallel.virtual_stages=1",
    ),
    ("parallel.pp=3 parallel.schedule=zb-v", 8, "parallel.pp", "parallel.pp=2"),
    # the split
    ("parallel.pp=2 parallel.partition=costs", None, "parallel.partition", "parallel.partition=cost"),
    (
        "parallel.pp=2 parallel.partition=cost parallel.stage_layers=[3,1]",
        None,
        "parallel.partition",
        "parallel.partition=even",
    ),
    (
        "parallel.pp=2 parallel.partition=cost parallel.stage_layers=[3,1]",
        None,
        "parallel.partition",
        "parallel.stage_layers=null",
    ),
    # recompute
    ("parallel.recompute=Full", None, "parallel.recompute", "parallel.recompute=full"),
    ("parallel.pp=2 parallel.recompute=[ful,none]", None, "parallel.recompute", "parallel.recompute=[full,none]"),
    ("parallel.pp=2 parallel.recompute=[full,none,full]", None, "parallel.recompute", "parallel.recompute=[full,none]"),
    (
        "parallel.pp=4 parallel.recompute=[full,none]",
        None,
        "parallel.recompute",
        "parallel.recompute=[full,none,none,none]",
    ),
    ("parallel.pp=4 parallel.recompute=[full,full]", None, "parallel.recompute", "parallel.recompute=full"),
    ("parallel.recompute=[]", None, "parallel.recompute", "parallel.recompute=none"),
    ("parallel.recompute_layers=2", None, "parallel.recompute_layers", "parallel.recompute=full"),
    ("parallel.recompute_layers=2", None, "parallel.recompute_layers", "parallel.recompute_layers=1"),
    (
        "parallel.recompute=full parallel.recompute_layers=9",
        None,
        "parallel.recompute_layers",
        "parallel.recompute_layers=4",
    ),
]
