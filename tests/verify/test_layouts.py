from __future__ import annotations

import re
from collections import Counter

import pytest

from megatron_lite.config import RunConfig, load_config
from megatron_lite.config.problems import ConfigError
from megatron_lite.config.schedules import SCHEDULE_RULES
from megatron_lite.verify.layouts import (
    MAX_RANKS,
    ProofLayout,
    choose_layouts,
    default_layouts,
    layout_of_config,
    layouts_asked_for,
    legal,
    matrix,
    parse,
    pipeline_matrix,
    zero_matrix,
)

EVERY = [*matrix(), *pipeline_matrix(), *zero_matrix()]

KEYS = (
    "model.family=llama",
    "model.vocab_size=97",
    "model.hidden_size=64",
    "model.num_layers=4",
    "model.num_heads=8",
    "model.num_kv_heads=2",
    "model.max_seq_len=32",
    "train.seq_len=32",
    "train.global_batch_size=8",
    "train.num_steps=4",
)


def config(*keys: str) -> RunConfig:
    return load_config(None, [*KEYS, *keys])


@pytest.mark.parametrize("layout", EVERY, ids=str)
def test_text_and_back(layout: ProofLayout) -> None:
    assert parse(str(layout)) == layout


def test_texts_are_short() -> None:
    for text in ("single", "pp=2,zb-h1", "pp=2,v=2,interleaved", "pp=4,zb-v", "pp=2,v=2,zb-h1,recompute=full",
                 "dp=2,zero=2", "dp=4,group=2,zero=3,keep,reduce=microbatch", "dp=2,reduce=microbatch"):  # fmt: skip
        assert str(parse(text)) == text
    assert str(parse("pp=2,interleaved,v=1")) == "pp=2,v=1,interleaved"
    assert str(parse("interleaved,pp=2")) == "pp=2,v=2,interleaved"


def test_texts_differ_where_layouts_do() -> None:
    layouts = set(EVERY)
    assert len({str(layout) for layout in layouts}) == len(layouts)


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("single", ProofLayout()),
        ("tp=2", ProofLayout(tp=2)),
        (" dp=2, tp=2 ,sp", ProofLayout(tp=2, dp=2, sequence_parallel=True)),
        ("pp=4,gpipe", ProofLayout(pp=4, schedule="gpipe")),
        ("pp=2,1f1b,zero=0", ProofLayout(pp=2, zero_stage=0)),
        ("tp=1,pp=1,dp=8", ProofLayout(dp=8)),
        ("pp=2,v=2,interleaved", ProofLayout(pp=2, schedule="interleaved", virtual_stages=2)),
        ("pp=2,interleaved", ProofLayout(pp=2, schedule="interleaved", virtual_stages=2)),
        ("pp=2,interleaved,v=1", ProofLayout(pp=2, schedule="interleaved")),
        ("pp=2,v=2,zb-h1", ProofLayout(pp=2, schedule="zb-h1", virtual_stages=2)),
        ("pp=2,interleaved,v=3", ProofLayout(pp=2, schedule="interleaved", virtual_stages=3)),
        ("pp=4,zb-v", ProofLayout(pp=4, schedule="zb-v", virtual_stages=2)),
        ("pp=2,zb-h1,recompute=full", ProofLayout(pp=2, schedule="zb-h1", recompute="full")),
        ("dp=2,zero=2", ProofLayout(dp=2, zero_stage=2)),
        ("dp=2,zero=2,reduce=microbatch", ProofLayout(dp=2, zero_stage=2, reduce_policy="microbatch")),
        ("dp=2,reduce=step", ProofLayout(dp=2)),
        ("keep,dp=4,group=2,zero=3", ProofLayout(dp=4, zero_stage=3, zero_group=2, gather_policy="keep")),
        ("dp=4,group=1", ProofLayout(dp=4, zero_group=1)),
        ("dp=4,group=4", ProofLayout(dp=4)),
        ("pp=2,recompute=none+selective", ProofLayout(pp=2, recompute="none+selective")),
        ("tp=2,pp=2,my/own.csv,v=2", ProofLayout(tp=2, pp=2, schedule="my/own.csv", virtual_stages=2)),
    ],
)
def test_parse(text: str, layout: ProofLayout) -> None:
    assert parse(text) == layout


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("tp=2,xp=2", "xp=2"),
        ("tp=0", "tp=0"),
        ("tp=-1", "tp=-1"),
        ("tp=two", "tp=two"),
        ("tp", "tp"),
        ("zero=4", "zero=4"),
        ("dp=2,zero=3,regather", "regather"),
        ("dp=2,reduce=both", "reduce=both"),
        ("dp=2,group=0", "group=0"),
        ("sp=1", "sp=1"),
        ("pp=2,GPipe", "GPipe"),
        ("pp=2,gpipe=1", "gpipe=1"),
        ("pp=2,v=0", "v=0"),
        ("pp=2,zbv", "zbv"),
        ("recompute=all", "recompute=all"),
        ("pp=2,recompute=full+", "recompute=full+"),
        ("recompute", "recompute"),
        ("", ""),
        ("tp=2,,dp=2", ""),
    ],
)
def test_errors_name_the_part_that_is_not_understood(text: str, part: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(text)
    message = str(caught.value)
    assert f"{part!r} is not understood" in message and repr(text) in message
    assert "tp=2,pp=2,dp=2,sp,gpipe,zero=0" in message  # an example of what is
    assert "'default', 'all', 'pipeline', 'zero'" in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("pp=2,v=2", "v=2 is not what 1f1b takes; leave it out for v=1"),
        ("pp=2,v=1,zb-v", "v=1 is not what zb-v takes; leave it out for v=2"),
        ("pp=2,pp=4", "'pp=4' contradicts"),
        ("pp=2,gpipe,zb-h1", "'zb-h1' contradicts"),
        ("pp=2,single", "'single' contradicts"),
        ("dp=2,zero=2,keep", "keep concerns zero=3; leave it out, or add zero=3"),
        ("dp=2,zero=2,zero=3", "'zero=3' contradicts"),
    ],
)
def test_errors_say_what_does_not_go_together(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        parse(text)


def test_a_layout_that_is_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'tp=4,pp=4' needs 16 processes; a proof runs at most 8"):
        parse("tp=4,pp=4")


def test_the_matrix_is_the_cross_product_of_what_differs() -> None:
    layouts = matrix()
    assert len(layouts) >= 50
    assert len(layouts) == len(set(layouts))
    assert max(layout.world_size for layout in layouts) == MAX_RANKS == 8
    assert ProofLayout() in layouts and ProofLayout(tp=2, pp=2, dp=2) in layouts
    for axis in ("tp", "pp", "dp"):
        assert {getattr(layout, axis) for layout in layouts} == {1, 2, 4}
    for what, values in (
        ("schedule", {"1f1b", "gpipe"}),
        ("zero_stage", {0, 1, 2, 3}),
        ("sequence_parallel", {False, True}),
    ):
        assert {getattr(layout, what) for layout in layouts if layout.world_size == 8} == values


def test_no_two_layouts_of_the_matrix_say_the_same() -> None:
    """A schedule means something over stages only, a ZeRO stage over dp only, sequence parallelism over tp only."""
    meanings = Counter(
        (
            layout.tp,
            layout.pp,
            layout.dp,
            layout.schedule if layout.pp > 1 else "",
            layout.zero_stage if layout.dp > 1 else -1,
            layout.sequence_parallel and layout.tp > 1,
        )
        for layout in matrix()
    )
    assert set(meanings.values()) == {1}
    # And none is missing: per (tp, pp, dp) two schedules, four ZeRO stages and two of sequence parallelism, where each
    # means something.
    sizes = {(layout.tp, layout.pp, layout.dp) for layout in matrix()}
    assert sizes == {(t, p, d) for t in (1, 2, 4) for p in (1, 2, 4) for d in (1, 2, 4) if t * p * d <= 8}
    assert sum(2 ** (t > 1) * 2 ** (p > 1) * 4 ** (d > 1) for t, p, d in sizes) == len(matrix())


def test_smaller_matrices() -> None:
    assert [str(layout) for layout in matrix((1,))] == ["single"]
    assert {layout.world_size for layout in matrix((1, 3))} == {1, 3}


def test_the_base_keeps_what_may_change_bits_and_nothing_else() -> None:
    assert str(parse("tp=2,pp=2,dp=2,sp,gpipe,zero=0").base()) == "tp=2,dp=2,sp"
    assert parse("pp=4,gpipe").base() == parse("pp=8,zb-v,recompute=full").base() == ProofLayout()
    assert str(parse("pp=2,dp=4,group=2,zero=3,keep,reduce=microbatch").base()) == "dp=4,group=2,reduce=microbatch"
    assert parse("dp=2,zero=3,keep,reduce=step").base() == parse("dp=2,zero=0").base() == parse("dp=2")
    for layout in EVERY:
        base = layout.base()
        assert base.base() == base
        assert (base.tp, base.dp, base.sequence_parallel) == (layout.tp, layout.dp, layout.sequence_parallel)
        assert (base.pp, base.schedule, base.zero_stage) == (1, "1f1b", 1)
        assert (base.virtual_stages, base.recompute, base.gather_policy) == (1, "none", "regather")
        assert (base.zero_group, base.reduce_policy) == (layout.zero_group, layout.reduce_policy)


def test_each_axis_alone() -> None:
    found = {name: str(layout) for name, layout in parse("tp=2,pp=2,dp=2,sp,gpipe,zero=0").single_axes()}
    assert found == {"tp": "tp=2,sp,zero=0", "pp": "pp=2,gpipe,zero=0", "dp": "dp=2,zero=0"}
    found = {name: str(layout) for name, layout in parse("tp=2,pp=2,zb-v,recompute=none+selective").single_axes()}
    assert found == {"tp": "tp=2", "pp": "pp=2,zb-v", "recompute": "recompute=selective"}
    assert [name for name, _ in parse("v=2,interleaved").single_axes()] == ["pp"]
    found = {
        name: str(layout) for name, layout in parse("pp=2,dp=4,group=2,zero=3,keep,reduce=microbatch").single_axes()
    }
    assert found == {"pp": "pp=2,zero=3,keep,reduce=microbatch", "dp": "dp=4,group=2,zero=3,keep,reduce=microbatch"}
    assert list(ProofLayout().single_axes()) == []


def test_apply() -> None:
    applied = parse("tp=2,pp=2,dp=2,sp,gpipe,zero=0").apply(config())
    p = applied.parallel
    assert (p.tp, p.pp, p.dp, p.sequence_parallel, p.schedule, p.zero_stage) == (2, 2, 2, True, "gpipe", 0)
    assert applied.num_microbatches == 4
    by_hand = config("parallel.pp=2", "parallel.stage_layers=[1,3]")
    assert parse("pp=2").apply(by_hand).parallel.stage_layers == (1, 3)
    assert parse("pp=4").apply(by_hand).parallel.stage_layers is None
    assert parse("pp=2,v=2,interleaved").apply(by_hand).parallel.stage_layers is None
    p = parse("pp=2,zb-v,recompute=none+full").apply(config()).parallel
    assert (p.schedule, p.virtual_stages, p.recompute) == ("zb-v", 2, ("none", "full"))
    saves_less = config("parallel.recompute=full", "parallel.recompute_layers=2")
    assert parse("pp=2,recompute=full").apply(saves_less).parallel.recompute_layers == 2
    assert parse("pp=2").apply(saves_less).parallel.recompute_layers == 1
    p = parse("dp=4,group=2,zero=3,keep,reduce=step").apply(config()).parallel
    assert (p.zero_stage, p.zero_group, p.gather_policy, p.reduce_policy) == (3, 2, "keep", "step")
    p = parse("dp=4,zero=1").apply(config("parallel.zero_stage=3", "parallel.zero_group=2", "parallel.dp=4",
                                          "parallel.gather_policy=keep")).parallel  # fmt: skip
    assert (p.zero_stage, p.zero_group, p.gather_policy, p.reduce_policy) == (1, None, "auto", "step")
    refusals = {
        "dp=4,group=3": "model.num_heads=8",
        "tp=8": "model.num_heads=4",
        "pp=8": "model.num_layers=7",
        "dp=8": "train.global_batch_size=4",
        "pp=4,zb-v": "model.num_layers=7",
        "pp=2,recompute=none+full+none": "model.num_layers=4",
    }
    for text, key in refusals.items():
        with pytest.raises(ConfigError):
            parse(text).apply(config(*key.split()))


def test_legal_leaves_out_what_the_model_or_the_batch_does_not_allow() -> None:
    layouts = [parse(text) for text in ("tp=2", "tp=8", "pp=4", "pp=8", "dp=3", "dp=8")]
    assert [str(layout) for layout in legal(config(), layouts)] == ["tp=2", "tp=8", "pp=4", "dp=8"]
    assert len(legal(config(), matrix())) == len(matrix())


def test_the_layout_of_a_config() -> None:
    own = layout_of_config(config("parallel.tp=2", "parallel.pp=2", "parallel.zero_stage=0"))
    assert own == ProofLayout(2, 2, 2, zero_stage=0), "dp fills the processes"
    assert layout_of_config(config("parallel.dp=64", "train.global_batch_size=64")) == ProofLayout(dp=8)
    assert layout_of_config(config("parallel.sequence_parallel=true")) == ProofLayout(dp=8)
    assert layout_of_config(config("parallel.tp=8", "parallel.pp=2")) is None
    keys = ("parallel.zero_stage=3", "parallel.zero_group=2", "parallel.gather_policy=keep", "parallel.dp=4")
    assert str(layout_of_config(config(*keys))) == "dp=4,group=2,zero=3,keep"
    assert str(layout_of_config(config(*keys, "parallel.zero_group=4"))) == "dp=4,zero=3,keep"
    keys = ("parallel.pp=2", "parallel.schedule=interleaved", "parallel.virtual_stages=2", "parallel.dp=1")
    own = layout_of_config(config(*keys, "parallel.recompute=[full,full]"))
    assert str(own) == "pp=2,v=2,interleaved,recompute=full"
    own = layout_of_config(config(*keys, "parallel.recompute=[full,none]"))
    assert own is not None and own.recompute == "full+none"
    assert own.apply(config()).parallel.recompute == ("full", "none")


def test_default_layouts_have_the_own_first_each_axis_and_no_repeats() -> None:
    layouts = default_layouts(config("parallel.tp=2", "parallel.pp=2", "parallel.dp=2"))
    assert str(layouts[0]) == "tp=2,pp=2,dp=2"
    assert len(layouts) == len(set(layouts)) > 8
    texts = {str(layout) for layout in layouts}
    assert {"tp=2", "pp=2", "dp=2", "tp=2,sp", "pp=2,gpipe", "dp=2,zero=0"} <= texts
    assert {"pp=2,zb-h1", "pp=2,v=2,interleaved", "pp=2,zb-v", "pp=2,recompute=full"} <= texts
    assert {layout.zero_stage for layout in layouts} == {0, 1, 2, 3}


def test_the_pipeline_matrix_has_every_combination() -> None:
    layouts = pipeline_matrix()
    assert len(layouts) == len(set(layouts)) and max(layout.world_size for layout in layouts) == MAX_RANKS
    kinds = {(layout.schedule, layout.virtual_stages) for layout in layouts}
    assert {schedule for schedule, _ in kinds} == set(SCHEDULE_RULES)
    assert {("1f1b", 1), ("interleaved", 2), ("zb-h1", 1), ("zb-h1", 2), ("zb-v", 2)} <= kinds
    assert not {("1f1b", 2), ("zb-v", 1)} & kinds
    combinations = {
        (kind, pp, zero, recompute)
        for kind in kinds
        for pp in (2, 4, 8)
        for zero in (0, 1)
        for recompute in ("none", "selective", "full")
    }
    assert combinations == {
        ((layout.schedule, layout.virtual_stages), layout.pp, layout.zero_stage, layout.recompute) for layout in layouts
    }
    assert all(layout.dp == 2 for layout in layouts if layout.pp < 8), "over one rank a ZeRO stage says nothing"
    assert {layout.tp for layout in layouts} == {1}


def test_the_zero_matrix_has_every_stage_with_every_policy() -> None:
    layouts = zero_matrix()
    assert len(layouts) == len(set(layouts)) and max(layout.world_size for layout in layouts) == MAX_RANKS
    policies = {(one.zero_stage, one.gather_policy, one.reduce_policy) for one in layouts}
    regathered = {(stage, "regather", reduce) for stage in (0, 1, 2, 3) for reduce in ("step", "microbatch")}
    assert policies == regathered | {(3, "keep", "step"), (3, "keep", "microbatch")}
    for policy in policies:
        alike = [one for one in layouts if (one.zero_stage, one.gather_policy, one.reduce_policy) == policy]
        assert {one.dp for one in alike} == {2, 4} and {one.zero_group for one in alike} == (
            {0, 2} if policy[0] else {0}
        )
        assert {one.schedule for one in alike} == {"1f1b", "interleaved", "zb-h1", "zb-v"}
        assert {one.recompute for one in alike} == {"none", "selective", "full"}
    assert {one.schedule for one in zero_matrix(SCHEDULE_RULES)} == set(SCHEDULE_RULES)


def test_what_a_layout_asks_of_a_model() -> None:
    assert parse("pp=4,dp=2,zb-v").num_chunks == 8


def test_the_words_that_stand_for_layouts() -> None:
    deep = config("model.num_layers=16", "train.global_batch_size=16")
    assert layouts_asked_for("default") == [] and choose_layouts("default", deep) == default_layouts(deep)
    assert choose_layouts("all", deep) == layouts_asked_for("all") == matrix()
    assert choose_layouts("pipeline", deep) == layouts_asked_for("pipeline") == pipeline_matrix()
    assert choose_layouts("zero", deep) == layouts_asked_for("zero") == zero_matrix()
    assert 0 < len(choose_layouts("pipeline", config())) < len(pipeline_matrix()), "of four layers"
    named = "pp=4,zb-v; pp=2,recompute=full;pp=4,zb-v"
    assert [str(layout) for layout in choose_layouts(named, deep)] == ["pp=4,zb-v", "pp=2,recompute=full"]
    with pytest.raises(ConfigError):
        choose_layouts(named, config())
    with pytest.raises(ValueError, match="names no layout; write 'default', 'all', 'pipeline', 'zero', or layouts"):
        layouts_asked_for(" ; ")
    with pytest.raises(ValueError, match="'zeros' is not understood; --layouts takes 'default', 'all', 'pipeline'"):
        layouts_asked_for("zeros")
