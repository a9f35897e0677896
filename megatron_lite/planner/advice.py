"""What to change where a run does not fit: the settings that cost least among those with which it does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megatron_lite.config.problems import override
from megatron_lite.config.schema import RunConfig
from megatron_lite.planner.memory import Plan, stage_of
from megatron_lite.utils.memory import readable_bytes

# What it costs to take a value in place of the one before it in its row, in no unit: communication and copies that a
# step has more of. A file is slower than main memory, to compute twice is slower than to send.
Value = int | str
COSTS: dict[str, dict[Value, float]] = {
    "parallel.zero_stage": {0: 0, 1: 0.5, 2: 1, 3: 2},
    "parallel.gather_policy": {"keep": 0, "regather": 0.2},
    "parallel.reduce_policy": {"step": 0, "microbatch": 0.3},
    "parallel.recompute": {"none": 0, "selective": 1.5, "full": 4},
    "offload.optimizer": {"none": 0, "cpu": 5, "nvme": 8},
    "offload.gradients": {"none": 0, "cpu": 2, "nvme": 4},
    "offload.parameters": {"none": 0, "cpu": 6, "nvme": 9},
}
# What a process comes to hold beside a model after its start: stacks of threads (8 MiB each of what is limited), and
# what the system's allocator keeps.
PROCESS_BYTES = 128 << 20
FOLDER = "FOLDER"  # where the user is to put a path


@dataclass(frozen=True)
class Advice:
    """overrides: as one types them. fits: whether the run does with them; if not they are those that need least.
    num_bytes: on the device of the largest rank."""

    overrides: tuple[str, ...]
    fits: bool
    num_bytes: int

    def __str__(self) -> str:
        size, changes = readable_bytes(self.num_bytes), " ".join(self.overrides)
        if self.fits:
            return f"with {changes} it would be {size}" if changes else f"{size} fit"
        least = f"even with {changes} it would be {size}" if changes else "no setting makes it less"
        return f"{least}: take more processes (parallel.dp, tp, pp), a smaller batch or a smaller model"


def advise(plan: Plan, limit_bytes: int) -> Advice:
    """The cheapest settings with which every rank has room in ``limit_bytes`` on its device.

    Settings are only ever moved towards less memory, from where the config has them.
    """
    least: Advice | None = None
    for overrides, config in _variants(plan):
        changed = plan.with_config(config)
        needed = max(stage.total.device for stage in changed.stages())
        advice = Advice(overrides, needed <= limit_bytes, needed)
        if advice.fits:
            return advice
        if least is None or needed < least.num_bytes:
            least = advice
    assert least is not None, "the config as it is comes first"
    return least


def why_not(
    config: RunConfig,
    rank: int,
    limit_bytes: int,
    *,
    device: str | None = None,
    source: str = "",
    used_bytes: int = 0,
) -> str:
    """One sentence: why the state of this rank alone does not fit under a limit, and what would make it. Empty if it
    fits.

    What would make it does so with activations and buffers, too. limit_bytes: of the device's memory. used_bytes: of
    that, what the process holds before it has a model. source: what sets the limit, in words. device: as `Plan.of`
    takes it.
    """
    plan = Plan.of(config, device)
    state = plan.stage(stage_of(config, rank)).state.device
    if state + used_bytes <= limit_bytes:
        return ""
    limit = readable_bytes(limit_bytes) + (f" ({source})" if source else "")
    advice = advise(plan, limit_bytes - used_bytes - (PROCESS_BYTES if used_bytes else 0))
    process = f", the process itself holds {readable_bytes(used_bytes)}" if used_bytes else ""
    return f"rank {rank} needs {readable_bytes(state)} for its state{process}, and the limit is {limit}; {advice}"


def _variants(plan: Plan) -> Iterator[tuple[tuple[str, ...], RunConfig]]:
    """The config, then what is cheapest first: (overrides, changed config)."""
    config = plan.config
    now: dict[str, Value] = {
        "parallel.zero_stage": config.parallel.zero_stage,
        # What auto takes fits, and is predicted as if it took the lesser one.
        "parallel.gather_policy": "keep" if config.parallel.gather_policy == "keep" else "regather",
        "parallel.reduce_policy": config.parallel.reduce_policy,
        "parallel.recompute": min(config.parallel.recompute, key=list(COSTS["parallel.recompute"]).index),
        "offload.optimizer": config.offload.optimizer,
        "offload.gradients": config.offload.gradients,
        "offload.parameters": config.offload.parameters,
    }
    onward = [list(costs)[list(costs).index(now[key]) :] for key, costs in COSTS.items()]
    combinations = [dict(zip(COSTS, values, strict=True)) for values in product(*onward)]

    def cost(values: dict[str, Value]) -> float:
        return sum(COSTS[key][value] for key, value in values.items())

    for values in sorted((one for one in combinations if _is_of_use(one, now, plan)), key=cost):
        yield _changed(config, {key: value for key, value in values.items() if value != now[key]})


def _is_of_use(values: dict[str, Value], now: dict[str, Value], plan: Plan) -> bool:
    """Whether the config takes these together, and none is without effect: on a CPU main memory is the device."""
    zero, moved = values["parallel.zero_stage"], [key for key, value in values.items() if value != now[key]]
    if values["offload.gradients"] != "none" and zero not in (2, 3):
        return False
    if values["offload.parameters"] != "none" and zero != 3:
        return False
    if "parallel.gather_policy" in moved and zero != 3:
        return False
    # Until the last microbatch a rank has its gradients whole, where they are summed once a step.
    if "parallel.reduce_policy" in moved and (zero not in (2, 3) or plan.config.num_microbatches == 1):
        return False
    return plan.device != "cpu" or not any(values[key] == "cpu" for key in moved)


def _changed(config: RunConfig, values: dict[str, Value]) -> tuple[tuple[str, ...], RunConfig]:
    parallel, offload = dict[str, object](), dict[str, object]()
    for key, value in values.items():
        section, _, name = key.partition(".")
        (parallel if section == "parallel" else offload)[name] = (value,) if name == "recompute" else value
    overrides = [override(key, value) for key, value in values.items()]
    if "nvme" in values.values() and config.offload.dir is None:
        overrides.append(f"offload.dir={FOLDER}")
    changed = config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=parallel),
            "offload": config.offload.model_copy(update=offload),
        }
    )
    return tuple(overrides), changed
