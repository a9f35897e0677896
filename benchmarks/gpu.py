"""All that a GPU can say of this package in one go; run it by `bash benchmarks/gpu.sh --help`.

Every part works in processes of its own and may fail, or be cut off by its limit: that is then in the report, and the
other parts run. Only the standard library is imported here, so that there is a report whatever is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TAIL_CHARACTERS = 2000
SEQUENCES = (8, 4, 2, 1)  # microbatches that the training step tries
ENVIRONMENT = """
import json, platform, torch
from megatron_lite.ops import survey
gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
print(json.dumps({"packages": survey.environment(), "device": gpu.name if gpu else platform.machine(),
    "memory_bytes": gpu.total_memory if gpu else None}))
"""


class PartFailed(RuntimeError):
    """What a part ran failed; the message is the end of what it printed."""


@dataclass
class Session:
    """One run of this script: where it writes, what it may take, and what it has found."""

    out: Path
    smoke: bool
    deadline: float
    report: dict[str, Any] = field(default_factory=lambda: {"parts": {}})

    @property
    def device(self) -> str:
        return "cpu" if self.smoke else "cuda"

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def python(self, *arguments: str, limit_s: float, **environment: str) -> str:
        return self.run([sys.executable, *arguments], limit_s=limit_s, **environment)

    def run(self, command: Sequence[str], *, limit_s: float, **environment: str) -> str:
        """What the command prints. Raises PartFailed when it fails, or does not end within the limit."""
        limit = min(limit_s, self.left())
        if limit <= 1:
            raise PartFailed("left out: the time of the whole run is up")
        everything = {**os.environ, **environment}
        pipe = subprocess.PIPE
        try:  # a session of its own: what it starts, such as the workers of torch.compile, ends with it
            started = subprocess.Popen(
                command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=everything, start_new_session=True
            )
        except OSError as error:
            raise PartFailed(f"{command[0]} does not run: {error.strerror}") from error
        try:
            printed, complained = started.communicate(timeout=limit)
        except subprocess.TimeoutExpired as error:
            os.killpg(started.pid, signal.SIGKILL)
            started.communicate()
            raise PartFailed(f"cut off after {limit:.0f} s: {' '.join(command[1:])}") from error
        if started.returncode != 0:
            tail = (printed + complained).strip()[-TAIL_CHARACTERS:]
            raise PartFailed(f"exit code {started.returncode}: {' '.join(command[1:])}\n{tail}")
        return printed


def attempt(function: Callable[[], Any]) -> dict[str, Any]:
    """{"ok", "seconds", and "result" or "error"} of a call that may fail in any way."""
    started = time.monotonic()
    try:
        result = {"ok": True, "result": function()}
    except PartFailed as error:
        result = {"ok": False, "error": str(error)}
    except Exception as error:
        result = {"ok": False, "error": f"{type(error).__name__}: {error}"}
    return {**result, "seconds": round(time.monotonic() - started, 1)}


def each(names: Sequence[str], function: Callable[[str], Any], workers: int) -> dict[str, Any]:
    """`attempt` for every name, some at a time."""
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(names, pool.map(lambda name: attempt(lambda: function(name)), names), strict=True))


# ---- the parts


def environment(session: Session) -> Any:
    found = json.loads(session.python("-c", ENVIRONMENT, limit_s=60).splitlines()[-1])
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm", "--format=csv"]
    return {**found, "nvidia_smi": attempt(lambda: session.run(query, limit_s=20))}


def build(session: Session) -> Any:
    """The compiled kernels beside the sources, and csrc where the package looks for its Triton kernels."""
    link = ROOT / "megatron_lite/_csrc"
    if not session.smoke:
        session.python("setup.py", "build_ext", "--inplace", limit_s=240)
        if not link.exists():
            link.symlink_to("../csrc")
    report = ROOT / "megatron_lite/ops/_native_build.json"
    return json.loads(report.read_text()) if report.exists() else "not built"


def cuda_numbers(session: Session) -> Any:
    """Every CUDA C++ kernel in fp32, bf16 and fp16 against float64."""
    ops = case_names("tests/ops/cuda_cases")
    where = "0" if session.smoke else "cuda"
    return each(ops, lambda op: session.python("-m", "tests.ops.cuda_cases.runner", op, where, limit_s=90), 3)


def triton_numbers(session: Session) -> Any:
    """Every Triton kernel against float64, in bf16 too."""
    ops = case_names("tests/ops/triton_cases")
    extra = [] if session.smoke else ["cuda"]
    interpret = "1" if session.smoke else "0"

    def check(op: str) -> str:
        command = ("-m", "tests.ops.triton_cases.runner", "numbers", op, *extra)
        return session.python(*command, limit_s=120, TRITON_INTERPRET=interpret)

    return each(ops, check, 3)


def ceilings(session: Session) -> Any:
    """Bandwidth of a copy, rate of products of matrices."""
    out = session.out / "ceilings.json"
    rounds = "2" if session.smoke else "20"
    command = ["-m", "benchmarks.kernel_timing", "ceilings", "--device", session.device, "--out", str(out)]
    session.python(*command, "--rounds", rounds, *(["--dtype", "fp32"] if session.smoke else []), limit_s=60)
    return json.loads(out.read_text())


def kernels(session: Session) -> Any:
    """Every kernel case beside PyTorch. Once in parallel, which fills the caches of the compilers, then one by one."""
    ops = case_names("benchmarks/kernel_cases")

    def measure(op: str, rounds: int, limit_s: float) -> Any:
        out = session.out / f"kernels_{op}.json"
        out.unlink(missing_ok=True)
        command = ["-m", "benchmarks.kernel_timing", op, "--device", session.device, "--out", str(out)]
        try:
            session.python(*command, "--rounds", str(rounds), *(["--dtype", "bf16"] * session.smoke), limit_s=limit_s)
        except PartFailed as error:
            if not out.exists():
                raise
            return [*json.loads(out.read_text()), {"stopped": str(error)}]  # behind the cases that it got to
        return json.loads(out.read_text())

    if not session.smoke:
        each(ops, lambda op: measure(op, 0, 80), 4)
    return each(ops, lambda op: measure(op, 1 if session.smoke else 20, 45), 1)


def training(session: Session) -> Any:
    """A step of a slice of Llama that fills the card, with the largest microbatch that fits."""
    out, failures = session.out / "train.json", {}
    for sequences in SEQUENCES[-1:] if session.smoke else SEQUENCES:
        command = ["-m", "benchmarks.gpu_train", "--device", session.device, "--sequences", str(sequences)]
        try:
            session.python(*command, "--out", str(out), limit_s=120)
        except PartFailed as error:
            if "OutOfMemoryError" not in str(error) or sequences == SEQUENCES[-1]:
                raise
            failures[sequences] = "out of memory"
        else:
            return {**json.loads(out.read_text()), "did_not_fit": list(failures)}
    raise AssertionError("unreachable: the last one returns or raises")


def memcheck(session: Session) -> Any:
    """Whether the CUDA C++ kernels stay within their tensors, on the shapes of their tests."""
    return _sanitized(session, "memcheck")


def racecheck(session: Session) -> Any:
    """Whether threads of a block read shared memory that others are writing."""
    return _sanitized(session, "racecheck")


def _sanitized(session: Session, check: str) -> Any:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    tool = shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")
    if tool is None:
        raise PartFailed("left out: compute-sanitizer is not installed")
    command = [tool, "--tool", check, "--error-exitcode", "9", "--print-limit", "10", sys.executable]

    def run(op: str) -> str:
        return session.run([*command, "-m", "tests.ops.cuda_cases.runner", op, "cuda"], limit_s=90)[-TAIL_CHARACTERS:]

    return each(case_names("tests/ops/cuda_cases"), run, 3)


def tests(session: Session) -> Any:
    """The tests of the public functions in bf16, on the implementation that `auto` chooses on the GPU."""
    plugin = [] if session.smoke else ["-p", "tests.ops.on_gpu"]
    kinds = "zeros" if session.smoke else "error_is_at_most or large or zeros or strided or compiles_without_a_graph"
    chosen = ["-q", "-k", f"bfloat16 and ({kinds})", "tests/ops", "-p", "no:cacheprovider"]
    return session.python("-m", "pytest", *plugin, *chosen, limit_s=120)[-TAIL_CHARACTERS:]


# In this order: what is worth most comes first, should the time not be enough.
PARTS: dict[str, Callable[[Session], Any]] = {
    "build": build,
    "environment": environment,
    "cuda_numbers": cuda_numbers,
    "ceilings": ceilings,
    "kernels": kernels,
    "triton_numbers": triton_numbers,
    "training": training,
    "memcheck": memcheck,
    "tests": tests,
    "racecheck": racecheck,
}


def case_names(folder: str) -> list[str]:
    """The ops of a folder of cases."""
    others = {"__init__", "case", "runner"}
    return sorted(path.stem for path in (ROOT / folder).glob("*.py") if path.stem not in others)


# ---- the report


def failures_of(report: dict[str, Any]) -> list[str]:
    """What failed, with the first line of its message; a part of several counts each of them."""
    found = []
    for part, state in report["parts"].items():
        inner = state.get("result")
        several = isinstance(inner, dict) and all(isinstance(one, dict) and "ok" in one for one in inner.values())
        named = {f"{part}/{name}": one for name, one in inner.items()} if several and inner else {part: state}
        found += [f"{name}: {_first_line(one['error'])}" for name, one in named.items() if not one["ok"]]
        for name, one in named.items():
            cases = one.get("result") if isinstance(one.get("result"), list) else []
            found += [f"{name}: {_first_line(case['stopped'])}" for case in cases if "stopped" in case]
            found += [f"{name}: {who}: {why}" for case in cases for who, why in case.get("failed", {}).items()]
    return found


def _first_line(message: str) -> str:
    return message.splitlines()[0]


def table_of(report: dict[str, Any]) -> str:
    """The report as a page of Markdown: the machine, the kernels beside PyTorch, the training step, what failed."""
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
    return "\n".join([*lines, "", *(f"failed: {failure}" for failure in failures_of(report)), ""])


def write(session: Session) -> None:
    (session.out / "gpu.json").write_text(json.dumps(session.report, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu")
    parser.add_argument("--limit", type=float, default=525.0, help="seconds for everything")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--smoke", action="store_true", help="on the CPU, small: what can be tried without a GPU")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    session = Session(given.out.resolve(), given.smoke, time.monotonic() + given.limit)
    session.report["date"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    session.report["smoke"] = given.smoke
    for name in (name for name in PARTS if name in given.only):
        state = attempt(lambda name=name: PARTS[name](session))  # type: ignore[misc]
        session.report["parts"][name] = state
        print(f"{name}: {'done' if state['ok'] else 'FAILED'} in {state['seconds']} s", flush=True)
        write(session)
    session.report["failures"] = failures_of(session.report)
    write(session)
    sys.path.insert(0, str(ROOT))
    page = attempt(lambda: table_of(session.report))
    text = page["result"] if page["ok"] else f"no table: {page['error']}\n"
    (session.out / "gpu.md").write_text(text, encoding="utf-8")
    print(text)
    return 1 if session.report["failures"] or not page["ok"] else 0


if __name__ == "__main__":
    sys.exit(main())
