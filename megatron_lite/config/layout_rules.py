"""Rules of the layout: what a model and a number of processes ask of the parallel section."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from megatron_lite.config.nearest import (
    MAX_FIXES,
    Rule,
    around,
    divides_either_way,
    divisors,
    fixes,
    multiples_around,
    readable,
)
from megatron_lite.config.problems import Fix, Problem, override
from megatron_lite.config.values import Unreadable, Values


def even_stages(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers per stage, or per chunk, as even as can be; the first ones take the remainder, since the last has the
    head as well.

    Raises ValueError where there are fewer layers than stages.
    """
    if num_layers < num_stages:
        raise ValueError(f"{num_layers} layers cannot fill {num_stages} pipeline stages: use parallel.pp={num_layers}")
    share, remainder = divmod(num_layers, num_stages)
    return tuple(share + (stage < remainder) for stage in range(num_stages))


def _tp_conditions(v: Values) -> Iterator[Callable[[int], bool]]:
    """What tensor parallelism asks of tp, as far as the keys it depends on are valid."""
    if heads := readable(v, "model.num_heads"):
        yield lambda tp: heads % tp == 0
    if kv_heads := readable(v, "model.num_kv_heads"):
        yield lambda tp: divides_either_way(kv_heads, tp)
    if ffn := readable(v, "model.ffn_hidden_size"):
        yield lambda tp: ffn % tp == 0


def model_tps(v: Values) -> list[int]:
    """Every tp that the model admits."""
    conditions = list(_tp_conditions(v))
    most = readable(v, "model.num_heads") or readable(v, "model.ffn_hidden_size") or 1
    return [tp for tp in divisors(most) if all(condition(tp) for condition in conditions)]


def filling(v: Values, axis: str, sizes: Iterable[int]) -> list[int]:
    """Those sizes of ``axis`` (tp or pp) that fill the processes when the other axes stay as they are."""
    try:
        others = math.prod(v[f"parallel.{other}"] for other in ("tp", "pp", "cp") if other != axis)
        dp = v["parallel.dp"]
        return [n for n in sizes if (v.world == n * others * dp if dp is not None else v.world % (n * others) == 0)]
    except Unreadable:
        return []


def legal_tps(v: Values) -> list[int]:
    """Every tp that the model admits; only those that also fill the processes, if any does and it is known."""
    tps = model_tps(v)
    return filling(v, "tp", tps) or tps


def tp_divides_heads(v: Values) -> Iterator[Problem]:
    tp, heads = v["parallel.tp"], v["model.num_heads"]
    if heads % tp:
        rule = f"must divide model.num_heads = {heads}"
        yield Problem("parallel.tp", tp, rule, "", fixes("parallel.tp", around(tp, legal_tps(v))))


def tp_fits_kv_heads(v: Values) -> Iterator[Problem]:
    tp, heads, kv_heads = v["parallel.tp"], v["model.num_heads"], v["model.num_kv_heads"]
    if heads % tp == 0 and heads % kv_heads == 0 and not divides_either_way(kv_heads, tp):
        rule = f"must divide model.num_kv_heads = {kv_heads}, or be a multiple of it"
        yield Problem("parallel.tp", tp, rule, "", fixes("parallel.tp", around(tp, legal_tps(v))))


def tp_divides_ffn(v: Values) -> Iterator[Problem]:
    tp, ffn, key = v["parallel.tp"], v["model.ffn_hidden_size"], "model.ffn_hidden_size"
    heads = readable(v, "model.num_heads")
    if ffn % tp == 0 or (heads is not None and heads % tp):
        return  # a tp that does not divide the heads changes anyway
    legal = multiples_around(ffn, tp)
    yield Problem(key, ffn, f"must be divisible by parallel.tp = {tp}", "", fixes(key, legal))


def _virtual_stages(v: Values) -> int:
    """Chunks of a rank, or 1 where the key has no valid value."""
    return readable(v, "parallel.virtual_stages") or 1


def most_stages(v: Values) -> int | None:
    """The most stages that the layers fill, each of their chunks with at least one; 0 if there is no such number."""
    layers = readable(v, "model.num_layers")
    return layers and layers // _virtual_stages(v)


def cp_is_one(v: Values) -> Iterator[Problem]:
    if v["parallel.cp"] != 1:
        rule = "must be 1: context parallelism is not in this version"
        remedy = "long sequences are split over tp with parallel.sequence_parallel=true"
        yield Problem("parallel.cp", v["parallel.cp"], rule, remedy, fixes("parallel.cp", [1]))


def world_is_filled(v: Values) -> Iterator[Problem]:
    tp, pp, cp, dp = (v[f"parallel.{axis}"] for axis in ("tp", "pp", "cp", "dp"))
    heads, most = readable(v, "model.num_heads"), most_stages(v)
    if cp != 1 or (heads and heads % tp and filling(v, "tp", model_tps(v))):
        return  # the axis that is wrong in itself changes first, and then the processes are filled
    if most and most < pp and filling(v, "pp", range(1, most + 1)):
        return
    product = tp * pp * (dp or 1)
    if (v.world == product) if dp is not None else (v.world % product == 0):
        return
    if dp is not None:
        key, value = "parallel.dp", dp
        rule = f"tp * pp * cp * dp = {tp} * {pp} * {cp} * {dp} = {product} must be the number of processes, {v.world}"
        remedy = f"or start {product} processes (--nproc {product})"
    else:
        key, value = ("parallel.pp", pp) if v.world % tp == 0 else ("parallel.tp", tp)
        rule = f"tp * pp * cp = {tp} * {pp} * {cp} = {product} must divide the number of processes, {v.world}"
        counts = sorted({max(1, v.world // product), -(-v.world // product)})
        remedy = "or start " + " or ".join(f"{n * product} (--nproc {n * product})" for n in counts) + " processes"
    if (heads and heads % tp) or (most and most < pp):
        remedy = ""  # more processes do not help an axis that is wrong in itself
    yield Problem(key, value, rule, remedy, _layouts_near(v, tp, pp, dp))


def _layouts_near(v: Values, tp: int, pp: int, dp: int | None) -> tuple[Fix, ...]:
    """The layouts nearest to (tp, pp, dp) that fill the processes, by the factors that each axis changes."""
    most = most_stages(v) or pp
    pinned = _readable_chunks(v)  # a split that is given by hand fixes the number of chunks
    chunks = _virtual_stages(v)
    conditions = list(_tp_conditions(v))
    options = [
        (new_tp, new_pp, v.world // (new_tp * new_pp))
        for new_tp in divisors(v.world)
        if all(condition(new_tp) for condition in conditions)
        for new_pp in divisors(v.world // new_tp)
        if new_pp <= most and (pinned is None or new_pp * chunks == pinned)
    ]
    batched = [option for option in options if _batch_divides(v, option[2])]

    def distance(option: tuple[int, int, int]) -> tuple[float, int]:
        pairs = [(option[0], tp), (option[1], pp)] + ([(option[2], dp)] if dp is not None else [])
        return sum(abs(math.log(new / old)) for new, old in pairs), sum(new != old for new, old in pairs)

    found = []
    for new_tp, new_pp, new_dp in sorted(batched or options, key=distance)[:MAX_FIXES]:
        changes = [("tp", new_tp, tp), ("pp", new_pp, pp)] + ([("dp", new_dp, dp)] if dp is not None else [])
        found.append(tuple(override(f"parallel.{axis}", new) for axis, new, old in changes if new != old))
    return tuple(found)


def _readable_chunks(v: Values) -> int | None:
    try:
        stages = v["parallel.stage_layers"]
    except Unreadable:
        return None
    return None if stages is None else len(stages)


def _batch_divides(v: Values, dp: int) -> bool:
    batch, micro = readable(v, "train.global_batch_size"), readable(v, "train.micro_batch_size")
    return batch is None or micro is None or all(size % (micro * dp) == 0 for size in (batch, *_rampup_sizes(v)))


def _rampup_sizes(v: Values) -> tuple[int, ...]:
    """Start and increment of a batch that grows."""
    try:
        return (v["train.batch_rampup"] or ())[:2]
    except Unreadable:
        return ()


def sequence_splits_over_tp(v: Values) -> Iterator[Problem]:
    tp, micro, seq_len = v["parallel.tp"], v["train.micro_batch_size"], v["train.seq_len"]
    if not v["parallel.sequence_parallel"] or micro * seq_len % tp == 0:
        return
    rule = f"micro_batch_size * seq_len = {micro} * {seq_len} must be divisible by parallel.tp = {tp} under "
    unit = tp // math.gcd(tp, micro)
    legal = multiples_around(seq_len, unit, most=readable(v, "model.max_seq_len"))
    alternatives = fixes("train.seq_len", legal) + fixes("parallel.sequence_parallel", [False])
    yield Problem("train.seq_len", seq_len, rule + "parallel.sequence_parallel", "", alternatives)


def zero_group_divides_dp(v: Values) -> Iterator[Problem]:
    group, dp, key = v["parallel.zero_group"], v.dp, "parallel.zero_group"
    if group is not None and dp % group:
        rule = f"must divide the data-parallel size, dp = {dp}: its groups hold the same slices"
        yield Problem(key, group, rule, "", fixes(key, around(group, divisors(dp))))


def zero_group_needs_slices(v: Values) -> Iterator[Problem]:
    group, stage, key = v["parallel.zero_group"], v["parallel.zero_stage"], "parallel.zero_group"
    if group is not None and stage == 0:
        rule = "shares slices, and parallel.zero_stage = 0 has none: it has no effect but on the order of additions"
        yield Problem(key, group, rule, "", fixes("parallel.zero_stage", [1]) + fixes(key, [None]))


def gather_policy_needs_slices(v: Values) -> Iterator[Problem]:
    policy, stage, key = v["parallel.gather_policy"], v["parallel.zero_stage"], "parallel.gather_policy"
    if policy != "auto" and stage < 3:
        rule = f"concerns parallel.zero_stage = 3: at stage {stage} parameters are always whole"
        yield Problem(key, policy, rule, "", fixes("parallel.zero_stage", [3]) + fixes(key, ["auto"]))


RULES: tuple[Rule, ...] = (
    tp_divides_heads,
    tp_fits_kv_heads,
    tp_divides_ffn,
    cp_is_one,
    world_is_filled,
    sequence_splits_over_tp,
    zero_group_divides_dp,
    zero_group_needs_slices,
    gather_policy_needs_slices,
)
