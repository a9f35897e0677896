"""Which implementation of each operation runs here, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_lite.cli.doctor.report import Section
from megatron_lite.cli.doctor.request import Request

if TYPE_CHECKING:
    from megatron_lite.ops.dispatch import Explanation


def kernels(request: Request) -> Section:
    """One row for each op, device and backend that runs, with the dtypes for which it is the same for one reason."""
    from megatron_lite.ops import dispatch

    groups: dict[tuple[str, str, str, str], list[Explanation]] = {}
    for line in (line for device in request.devices or devices_here() for line in dispatch.table(device)):
        reason = _why(line)
        groups.setdefault((line.op, line.device, line.choice.backend, reason), []).append(line)
    rows = []
    for (op, device, backend, reason), lines in groups.items():
        dtypes = ", ".join(_short(line.dtype) for line in lines)
        row: dict[str, Any] = {"op": op, "device": device, "dtypes": dtypes, "runs": backend, "why": reason}
        if request.verbose:
            obstacles = {name: why for line in lines for name, why in line.obstacles.items()}
            row["cannot run"] = "\n".join(f"{name}: {why}" for name, why in obstacles.items()) or "-"
        rows.append(row)
    return Section("kernels", rows)


def devices_here() -> list[str]:
    import torch

    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def kernels_of_config(request: Request) -> Section | None:
    """What the section `kernels` of a config runs, in its precision and on its device."""
    config = request.load_config()
    if config is None:
        return None
    from megatron_lite.ops import dispatch
    from megatron_lite.optim.precision import precision_of

    chosen = config.run.device
    device = devices_here()[-1] if chosen == "auto" else chosen
    precision = precision_of(config.train)
    rows: list[dict[str, Any]] = []
    problems = []
    for op, requested in config.kernels:
        # The optimizer computes in fp32, whatever the parameters are.
        dtype = precision.moments if op == "adamw" else precision.compute
        row = {"key": f"kernels.{op}", "value": requested, "dtype": _short(dtype), "device": device}
        try:
            choice = dispatch.select(op, requested, dtype, device)
        except ValueError as error:
            problems.append(str(error))
            rows.append({**row, "runs": "nothing", "why": str(error)})
        else:
            why = _why(dispatch.explain(op, dtype, device)) if requested == "auto" else choice.reason
            rows.append({**row, "runs": choice.backend, "why": why})
    return Section("config", rows, problems)


def _short(dtype: Any) -> str:
    from megatron_lite.ops import checks

    return checks.short(dtype)


def _why(line: Explanation) -> str:
    """Why this backend and none before it in the table, of those for the device; and which calls go elsewhere."""
    from megatron_lite.ops import checks, dispatch

    backends = [b for b in dispatch.BACKENDS[line.op] if b.devices is None or line.device in b.devices]
    names = [backend.name for backend in backends]
    reasons = []
    for backend in backends[: names.index(line.choice.backend)]:
        if line.dtype in backend.dtypes:
            reasons.append(f"{backend.name}: {line.obstacles[backend.name]}")
        else:
            reasons.append(f"{backend.name} takes {', '.join(sorted(map(checks.short, backend.dtypes)))} only")
    if not reasons:
        reasons = [dispatch.first_reason(line.device) if len(backends) > 1 else f"the only one for {line.device}"]
    if exception := backends[names.index(line.choice.backend)].exception:
        reasons.append(exception)
    return "; ".join(reasons)
