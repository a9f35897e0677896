"""The three batch sizes: train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * dp."""

from __future__ import annotations

from typing import Any

from megatron_lite.config.deepspeed.translation import AUTO, Fields, Line, Status, Translation
from megatron_lite.config.problems import ABSENT, override

TRAIN, MICRO, STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
GLOBAL, OURS_MICRO = "train.global_batch_size", "train.micro_batch_size"
INTEGER = "an integer"


def read_batch(top: Fields) -> None:
    """Takes what is given, infers the rest as DeepSpeed does, and refuses sizes that contradict one another.

    DeepSpeed's number of GPUs is the data-parallel size. A size on the command line replaces that of the file, and
    the accumulation then follows from the other two.
    """
    t = top.translation
    sizes = {name: top.get(name, INTEGER) for name in (TRAIN, MICRO, STEPS)}
    bad = [name for name in sizes if _is_number(sizes[name]) and sizes[name] < 1]
    for name in bad:
        t.refuse(name, sizes[name], "must be at least 1")
    if bad or not any(map(top.gives, sizes)):
        return
    taken = dict(sizes)
    for name, ours in ((TRAIN, GLOBAL), (MICRO, OURS_MICRO)):
        if t.ours.on_command_line(ours):
            taken[name] = AUTO
    train, micro, steps = taken.values()
    if t.ours.on_command_line(GLOBAL) or (t.ours.on_command_line(OURS_MICRO) and _is_number(train)):
        steps = AUTO
    dp, source = t.ours.dp()
    if all(map(_is_number, (train, micro, steps))) and train != micro * steps * dp:
        _contradict(t, train, micro, steps, dp, source)
        return
    for name, factor in ((MICRO, micro), (STEPS, steps)):
        if _is_number(train) and _is_number(factor) and train % (factor * dp):
            _leave_a_rest(t, train, (name, factor), (dp, source))
            return
    global_size, micro_size = _solve(t, train, micro, steps, dp)
    _write(top, sizes, {TRAIN: train, MICRO: micro, STEPS: steps}, (global_size, micro_size), (dp, source))


def _is_number(value: Any) -> bool:
    return isinstance(value, int)


def _solve(t: Translation, train: Any, micro: Any, steps: Any, dp: int) -> tuple[int | None, int]:
    """Global and micro batch. What is left out is inferred (runtime/config.py, _set_batch_related_parameters);
    "auto" keeps ours where the other two do not settle it. A batch that does not divide is left to our rules."""
    ours_global, ours_micro = t.ours.value(GLOBAL), t.ours.value(OURS_MICRO) or 1
    if _is_number(train) and _is_number(micro):
        return train, micro
    if _is_number(train):
        if not _is_number(steps) and AUTO in (micro, steps):
            return train, ours_micro
        steps = steps if _is_number(steps) else 1
        return train, max(1, train // (steps * dp))
    if train == AUTO and not (_is_number(steps) and not t.ours.on_command_line(GLOBAL)):
        return ours_global, micro if _is_number(micro) else ours_micro
    micro = micro if _is_number(micro) else ours_micro
    if steps == AUTO:
        return ours_global, micro
    return micro * (steps if _is_number(steps) else 1) * dp, micro


def _write(
    top: Fields, given: dict[str, Any], used: dict[str, Any], result: tuple[int | None, int], dp: tuple[int, str]
) -> None:
    """A line for each of the three, inferred ones among them."""
    t = top.translation
    for name, ours, value in ((TRAIN, GLOBAL, result[0]), (MICRO, OURS_MICRO, result[1])):
        if _is_number(given[name]):
            t.take(name, given[name], {ours: given[name]})
        elif value is None or value == t.ours.value(ours) or t.ours.on_command_line(ours):
            if given[name] == AUTO:
                top.keep_ours(name, ours)
        else:
            t.take(name, given[name], {ours: value}, _inferred(t, name, used, dp[1]))
    if given[STEPS] is ABSENT:
        return
    if not _is_number(used[STEPS]):
        t.lines.append(_steps_line(t, given[STEPS]))
        return
    count = f"{STEPS} is {GLOBAL} / ({OURS_MICRO} * dp)"
    t.take(STEPS, given[STEPS], {}, f"{count} here, and no key: {result[0]} / ({result[1]} * {dp[0]})")


def _inferred(t: Translation, name: str, used: dict[str, Any], dp: str) -> str:
    """What a size that the file leaves out is inferred from."""
    sizes = [other for other in used if other != name and _is_number(used[other])]
    ours = OURS_MICRO if name == TRAIN and MICRO not in sizes else None
    words = [f"inferred from {' and '.join(sizes)}"]
    if ours is not None:
        where = "the command line" if t.ours.on_command_line(ours) else "the YAML"
        given = f"of {where}" if ours in t.ours.origins else "which is the default"
        words.append(f"with {override(ours, t.ours.value(ours) or 1)} {given}")
    return ", ".join([*words, f"with {dp}"])


def _steps_line(t: Translation, value: Any) -> Line:
    if value == AUTO:
        return Line(Status.KEPT, STEPS, value, (), f"auto: follows from {GLOBAL}, {OURS_MICRO} and dp")
    have = [key for key in (GLOBAL, OURS_MICRO) if t.ours.on_command_line(key)]
    told = " and ".join(override(key, t.ours.value(key)) for key in have)
    return Line(Status.IGNORED, STEPS, value, (), f"the command line has {told}, from which it follows")


def _contradict(t: Translation, train: int, micro: int, steps: int, dp: int, source: str) -> None:
    """The one error of sizes that do not multiply."""
    product, unit = micro * steps * dp, micro * dp
    near = _nearest(train, unit, product)
    fits = [f"{size} with {STEPS} {size // unit}" for size in near]
    rule = f"must be {MICRO} * {STEPS} * dp = {micro} * {steps} * {dp} = {product}; {source}"
    remedy = f"in the file, {TRAIN} {' or '.join(fits)} fits"
    t.refuse(TRAIN, train, rule, remedy, tuple((override(GLOBAL, size),) for size in near))


def _leave_a_rest(t: Translation, train: int, given: tuple[str, int], dp: tuple[int, str]) -> None:
    """The one error of a batch from which, with one of the other two, the third cannot be inferred."""
    name, factor = given
    unit = factor * dp[0]
    rule = f"must be divisible by {name} * dp = {factor} * {dp[0]} = {unit}; {dp[1]}"
    near = _nearest(train, unit)
    remedy = f"in the file, {TRAIN} {' or '.join(map(str, near))} fits"
    t.refuse(TRAIN, train, rule, remedy, tuple((override(GLOBAL, size),) for size in near))


def _nearest(size: int, unit: int, *others: int) -> list[int]:
    """The two sizes nearest to ``size`` among its neighbouring multiples of ``unit`` and the others."""
    legal = {size // unit * unit, -(-size // unit) * unit, *others} - {0}
    return sorted(legal, key=lambda other: abs(other - size))[:2]
