"""Rules that span several keys, as pure functions of their values.

A rule yields a `Problem` with the nearest legal values, computed and not guessed: each fix, given as overrides,
removes the problem. `check` runs them all. Files are looked for in `megatron_lite.config.files`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from megatron_lite.config.problems import Fix, Problem, override
from megatron_lite.config.values import Unreadable, Values

Rule = Callable[[Values], Iterator[Problem]]

MAX_FIXES = 2
"""Alternatives that one message offers: the nearest below and above, or the two nearest layouts."""


def check(values: Values) -> list[Problem]:
    """All broken rules, in the order of the schema; a rule that reads an invalid key is left out."""
    problems: list[Problem] = []
    for rule in RULES:
        try:
            problems.extend(rule(values))
        except Unreadable:
            continue
    return problems


def around(value: int, legal: Iterable[int]) -> list[int]:
    """The nearest legal number below and the nearest above ``value``, the nearer one first."""
    numbers = set(legal)
    below = [number for number in numbers if number < value]
    above = [number for number in numbers if number > value]
    pair = sorted(below)[-1:] + sorted(above)[:1]
    return sorted(pair, key=lambda number: abs(number - value))


def multiples_around(value: int, unit: int, *, most: int | None = None) -> list[int]:
    """The nearest positive multiples of ``unit`` below and above ``value``, none greater than ``most``."""
    down = value // unit * unit
    return around(value, (n for n in (down, down + unit) if n > 0 and (most is None or n <= most)))


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def even_stages(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers per stage, as even as can be; the first stages take the remainder, since the last has the head as well.

    Raises ValueError where there are fewer layers than stages.
    """
    if num_layers < num_stages:
        raise ValueError(f"{num_layers} layers cannot fill {num_stages} pipeline stages: use parallel.pp={num_layers}")
    share, remainder = divmod(num_layers, num_stages)
    return tuple(share + (stage < remainder) for stage in range(num_stages))


def fixes(key: str, legal: Iterable[object]) -> tuple[Fix, ...]:
    """One fix for each legal value of a key."""
    return tuple((override(key, value),) for value in legal)


# The model


def heads_divide_hidden(v: Values) -> Iterator[Problem]:
    hidden, heads = v["model.hidden_size"], v["model.num_heads"]
    gpt2 = v["model.family"] == "gpt2"
    if v.given("model.head_dim") and not gpt2:
        return
    if hidden % heads:
        unit = heads if gpt2 else 2 * heads  # rotary pairs the halves of a head
        rule = f"must be divisible by model.num_heads = {heads}"
        remedy = "" if gpt2 else "or give model.head_dim"
        yield Problem(
            "model.hidden_size", hidden, rule, remedy, fixes("model.hidden_size", multiples_around(hidden, unit))
        )
    elif gpt2 and v["model.head_dim"] != hidden // heads:
        rule = f"must be hidden_size / num_heads = {hidden} / {heads} for gpt2"
        yield Problem("model.head_dim", v["model.head_dim"], rule, "", fixes("model.head_dim", [hidden // heads]))


def head_dim_is_even(v: Values) -> Iterator[Problem]:
    head_dim = v["model.head_dim"]
    if v["model.family"] != "llama" or head_dim % 2 == 0:
        return
    if not v.given("model.head_dim") and v["model.hidden_size"] % v["model.num_heads"]:
        return  # a default that rests on a division that does not come out; that rule speaks
    rule = "must be even, because rotary positions pair the two halves of a head"
    yield Problem("model.head_dim", head_dim, rule, "", fixes("model.head_dim", multiples_around(head_dim, 2)))


def kv_heads_divide_heads(v: Values) -> Iterator[Problem]:
    heads, kv_heads = v["model.num_heads"], v["model.num_kv_heads"]
    key = "model.num_kv_heads"
    if v["model.family"] == "gpt2":
        if kv_heads != heads:
            rule = f"must equal model.num_heads = {heads}: GPT-2 has no grouped-query attention"
            yield Problem(key, kv_heads, rule, "", fixes(key, [heads]))
    elif heads % kv_heads:
        legal = [n for n in divisors(heads) if _divides_either_way(n, v["parallel.tp"])] or divisors(heads)
        rule = f"must divide model.num_heads = {heads}, so that each group of query heads shares one"
        yield Problem(key, kv_heads, rule, "", fixes(key, around(kv_heads, legal)))


def rope_scaling_fits(v: Values) -> Iterator[Problem]:
    scaling, key = v["model.rope_scaling"], "model.rope_scaling"
    if scaling is None:
        return
    if v["model.family"] == "gpt2":
        rule = "must be null for gpt2, which has learned positions and no rotary ones"
        yield Problem(key, scaling.model_dump(), rule, "", fixes(key, [None]))
    elif scaling.type == "llama3" and scaling.low_freq_factor >= scaling.high_freq_factor:
        rule = f"must be less than {key}.high_freq_factor = {scaling.high_freq_factor}"
        legal = [min(1.0, scaling.high_freq_factor / 2)]
        low = f"{key}.low_freq_factor"
        yield Problem(low, scaling.low_freq_factor, rule, "", fixes(low, legal))


# The layout


def _divides_either_way(kv_heads: int, tp: int) -> bool:
    """Each tp rank holds whole kv heads, or each kv head is held by whole ranks."""
    return kv_heads % tp == 0 or tp % kv_heads == 0


def _tp_conditions(v: Values) -> Iterator[Callable[[int], bool]]:
    """What tensor parallelism asks of tp, as far as the keys it depends on are valid."""
    if heads := _readable(v, "model.num_heads"):
        yield lambda tp: heads % tp == 0
    if kv_heads := _readable(v, "model.num_kv_heads"):
        yield lambda tp: _divides_either_way(kv_heads, tp)
    if ffn := _readable(v, "model.ffn_hidden_size"):
        yield lambda tp: ffn % tp == 0


def _readable(v: Values, key: str) -> int | None:
    try:
        return int(v[key])
    except Unreadable:
        return None


def model_tps(v: Values) -> list[int]:
    """Every tp that the model admits."""
    conditions = list(_tp_conditions(v))
    most = _readable(v, "model.num_heads") or _readable(v, "model.ffn_hidden_size") or 1
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
    if heads % tp == 0 and heads % kv_heads == 0 and not _divides_either_way(kv_heads, tp):
        rule = f"must divide model.num_kv_heads = {kv_heads}, or be a multiple of it"
        yield Problem("parallel.tp", tp, rule, "", fixes("parallel.tp", around(tp, legal_tps(v))))


def tp_divides_ffn(v: Values) -> Iterator[Problem]:
    tp, ffn, key = v["parallel.tp"], v["model.ffn_hidden_size"], "model.ffn_hidden_size"
    heads = _readable(v, "model.num_heads")
    if ffn % tp == 0 or (heads is not None and heads % tp):
        return  # a tp that does not divide the heads changes anyway
    legal = multiples_around(ffn, tp)
    yield Problem(key, ffn, f"must be divisible by parallel.tp = {tp}", "", fixes(key, legal))


def cp_is_one(v: Values) -> Iterator[Problem]:
    if v["parallel.cp"] != 1:
        rule = "must be 1: context parallelism is not in this version"
        remedy = "long sequences are split over tp with parallel.sequence_parallel=true"
        yield Problem("parallel.cp", v["parallel.cp"], rule, remedy, fixes("parallel.cp", [1]))


def stages_have_layers(v: Values) -> Iterator[Problem]:
    pp, layers = v["parallel.pp"], v["model.num_layers"]
    if pp > layers:
        rule = f"must be at most model.num_layers = {layers}: each stage holds at least one layer"
        legal = range(1, layers + 1)
        yield Problem("parallel.pp", pp, rule, "", fixes("parallel.pp", around(pp, filling(v, "pp", legal) or legal)))


def stage_layers_add_up(v: Values) -> Iterator[Problem]:
    stages, pp, layers = v["parallel.stage_layers"], v["parallel.pp"], v["model.num_layers"]
    key = "parallel.stage_layers"
    if stages is None or pp > layers:
        return
    broken = []
    if len(stages) != pp:
        broken.append(f"must have parallel.pp = {pp} entries, has {len(stages)}")
    if any(count < 1 for count in stages):
        broken.append("must have entries of at least 1: a stage without layers is not allowed")
    if sum(stages) != layers:
        broken.append(f"must add up to model.num_layers = {layers}, adds up to {sum(stages)}")
    if broken:
        legal = [list(even_stages(layers, pp))]
        yield Problem(key, list(stages), "; ".join(broken), "or leave it out for this split", fixes(key, legal))


def world_is_filled(v: Values) -> Iterator[Problem]:
    tp, pp, cp, dp = (v[f"parallel.{axis}"] for axis in ("tp", "pp", "cp", "dp"))
    heads, layers = _readable(v, "model.num_heads"), _readable(v, "model.num_layers")
    if cp != 1 or (heads and heads % tp and filling(v, "tp", model_tps(v))):
        return  # the axis that is wrong in itself changes first, and then the processes are filled
    if layers and layers < pp and filling(v, "pp", range(1, layers + 1)):
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
    if (heads and heads % tp) or (layers and layers < pp):
        remedy = ""  # more processes do not help an axis that is wrong in itself
    yield Problem(key, value, rule, remedy, _layouts_near(v, tp, pp, dp))


def _layouts_near(v: Values, tp: int, pp: int, dp: int | None) -> tuple[Fix, ...]:
    """The layouts nearest to (tp, pp, dp) that fill the processes, by the factors that each axis changes."""
    layers = _readable(v, "model.num_layers") or pp
    pinned = _readable_stages(v)  # a split that is given by hand fixes the number of stages
    conditions = list(_tp_conditions(v))
    options = [
        (new_tp, new_pp, v.world // (new_tp * new_pp))
        for new_tp in divisors(v.world)
        if all(condition(new_tp) for condition in conditions)
        for new_pp in divisors(v.world // new_tp)
        if new_pp <= layers and (pinned is None or new_pp == pinned)
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


def _readable_stages(v: Values) -> int | None:
    try:
        stages = v["parallel.stage_layers"]
    except Unreadable:
        return None
    return None if stages is None else len(stages)


def _batch_divides(v: Values, dp: int) -> bool:
    batch, micro = _readable(v, "train.global_batch_size"), _readable(v, "train.micro_batch_size")
    return batch is None or micro is None or batch % (micro * dp) == 0


def sequence_splits_over_tp(v: Values) -> Iterator[Problem]:
    tp, micro, seq_len = v["parallel.tp"], v["train.micro_batch_size"], v["train.seq_len"]
    if not v["parallel.sequence_parallel"] or micro * seq_len % tp == 0:
        return
    rule = f"micro_batch_size * seq_len = {micro} * {seq_len} must be divisible by parallel.tp = {tp} under "
    unit = tp // math.gcd(tp, micro)
    legal = multiples_around(seq_len, unit, most=_readable(v, "model.max_seq_len"))
    alternatives = fixes("train.seq_len", legal) + fixes("parallel.sequence_parallel", [False])
    yield Problem("train.seq_len", seq_len, rule + "parallel.sequence_parallel", "", alternatives)


# The steps


def sequence_fits_model(v: Values) -> Iterator[Problem]:
    seq_len, most = v["train.seq_len"], v["model.max_seq_len"]
    if seq_len > most:
        rule = f"must be at most model.max_seq_len = {most}"
        yield Problem("train.seq_len", seq_len, rule, "", fixes("train.seq_len", [most]))


def batch_is_whole_microbatches(v: Values) -> Iterator[Problem]:
    batch, micro = v["train.global_batch_size"], v["train.micro_batch_size"]
    key = "train.global_batch_size"
    try:
        dp = v.dp
        rule = f"must be divisible by train.micro_batch_size * dp = {micro} * {dp} = {micro * dp}"
    except Unreadable:
        dp = 1
        rule = f"must be divisible by train.micro_batch_size = {micro}"
    if batch % (micro * dp):
        yield Problem(key, batch, rule, "", fixes(key, multiples_around(batch, micro * dp)))


def warmup_ends(v: Values) -> Iterator[Problem]:
    warmup, steps, key = v["optim.warmup_steps"], v["train.num_steps"], "optim.warmup_steps"
    if warmup > steps:
        rule = f"must be at most train.num_steps = {steps}"
        yield Problem(key, warmup, rule, "", fixes(key, [steps]))


def decay_fits(v: Values) -> Iterator[Problem]:
    schedule, key = v["optim.schedule"], "optim.decay_steps"
    decay, warmup, steps = v[key], v["optim.warmup_steps"], v["train.num_steps"]
    if warmup > steps or schedule == "constant":
        return
    if schedule == "wsd" and warmup + decay > steps:
        rule = f"with optim.warmup_steps = {warmup} must be at most train.num_steps = {steps}"
        room = steps - warmup
        alternatives = fixes(key, [room]) if room else fixes("optim.warmup_steps", [max(0, steps - decay)])
        if not room and decay > steps:
            alternatives = (alternatives[0] + (override(key, steps),),)
        yield Problem(key, decay, rule, "", alternatives)
    elif schedule != "wsd" and decay < warmup:
        rule = f"must be at least optim.warmup_steps = {warmup}"
        yield Problem(key, decay, rule, "", fixes(key, [warmup]))


def min_lr_below_lr(v: Values) -> Iterator[Problem]:
    lr, min_lr, key = v["optim.lr"], v["optim.min_lr"], "optim.min_lr"
    if min_lr > lr:
        yield Problem(key, min_lr, f"must be at most optim.lr = {lr}", "", fixes(key, [lr]))


def evaluation_has_data(v: Values) -> Iterator[Problem]:
    interval, key = v["train.eval_interval"], "train.eval_interval"
    if interval and not v["data.valid"]:
        rule = "asks for evaluations, but data.valid is empty"
        yield Problem(key, interval, rule, "or give data.valid", fixes(key, [0]))


def kernel_fits_device(v: Values) -> Iterator[Problem]:
    kernel, device, key = v["kernels.rms_norm"], v["run.device"], "kernels.rms_norm"
    if (kernel, device) in (("cuda", "cpu"), ("cpu", "cuda")):
        rule = f"cannot run with run.device = {device}"
        yield Problem(key, kernel, rule, "", fixes(key, ["auto"]) + fixes("run.device", [kernel]))


RULES: tuple[Rule, ...] = (
    heads_divide_hidden,
    head_dim_is_even,
    kv_heads_divide_heads,
    rope_scaling_fits,
    tp_divides_heads,
    tp_fits_kv_heads,
    tp_divides_ffn,
    cp_is_one,
    stages_have_layers,
    stage_layers_add_up,
    world_is_filled,
    sequence_splits_over_tp,
    sequence_fits_model,
    batch_is_whole_microbatches,
    warmup_ends,
    decay_fits,
    min_lr_below_lr,
    evaluation_has_data,
    kernel_fits_device,
)
