"""What benchmarks/gpu.py found, in words: what failed, what was not there, and a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def failures_of(report: dict[str, Any]) -> list[str]:
    """What failed or was cut off, with the first line of its message; a part of several counts each of them."""
    return [f"{where}: {why}" for where, state, why in _troubles(report) if state != "not here"]


def not_here_in(report: dict[str, Any]) -> list[str]:
    """What this machine does not have: tools, and kernels of others to measure beside."""
    return list(dict.fromkeys(f"{where}: {why}" for where, state, why in _troubles(report) if state == "not here"))


def _troubles(report: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(where, state, why) of all that was not done."""
    for part, state in report["parts"].items():
        inner = state.get("result")
        several = isinstance(inner, dict) and all(isinstance(one, dict) and "ok" in one for one in inner.values())
        named = {f"{part}/{name}": one for name, one in inner.items()} if several and inner else {part: state}
        for name, one in named.items():
            if not one["ok"]:
                yield name, one["state"], _first_line(one["error"])
            for case in one["result"] if isinstance(one.get("result"), list) else []:
                if "stopped" in case:
                    yield name, case["state"], _first_line(case["stopped"])
                yield from ((f"{name}: {who}", "failed", why) for who, why in case.get("failed", {}).items())
                yield from ((f"{name}: {who}", "not here", why) for who, why in case.get("not_here", {}).items())


def _first_line(message: str) -> str:
    return message.splitlines()[0]


def table_of(report: dict[str, Any]) -> str:
    """The report as a page of Markdown: the machine, the kernels beside PyTorch, the training step, the parts, what
    failed and what was not there."""
    from benchmarks.kernel_table import markdown, rows_of
    from benchmarks.kernel_timing import Timing

    def result(part: str) -> Any:
        return report["parts"].get(part, {}).get("result")

    def product(dtype: str) -> float:
        return limits["matmul_flops_per_s"].get(dtype, float("nan"))

    limits = result("ceilings") or {"copy_bytes_per_s": float("nan"), "matmul_flops_per_s": {}}
    lines = [f"{report['date']}, {(result('environment') or {}).get('device', 'unknown device')}"]
    lines.append(f"copy {limits['copy_bytes_per_s'] / 1e9:,.0f} GB/s")
    lines += [f"matmul {dtype} {rate / 1e12:,.2f} TFLOP/s" for dtype, rate in limits["matmul_flops_per_s"].items()]
    rows: list[tuple[str, ...]] = []
    for state in (result("kernels") or {}).values():
        for timing in (Timing(**case) for case in state.get("result") or [] if "stopped" not in case):
            rows += rows_of(timing, limits["copy_bytes_per_s"], product)
    lines += ["", markdown(rows), ""]
    if (train := result("training")) is not None:
        lines.append(
            f"training: {train['num_parameters'] / 1e9:.2f} B parameters, {train['sequences']} x {train['seq_len']} "
            f"tokens a step, {train['tokens_per_s']:,.0f} tokens/s, MFU {train['mfu']:.1%}"
        )
    lines += ["", "| part | | s | of |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {part} | {state['state']} | {state.get('seconds', '-')} | {state.get('allowed_s', '-')} |"
        for part, state in report["parts"].items()
    ]
    lines += ["", *(f"failed: {failure}" for failure in failures_of(report))]
    return "\n".join([*lines, *(f"not here: {missing}" for missing in not_here_in(report)), ""])
