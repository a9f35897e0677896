"""How long the contenders of a kernel case take, and what the machine could do: bandwidth of a copy, rate of products.

`python -m benchmarks.kernel_timing rms_norm --device cuda --out rms_norm.json` measures one op, and `ceilings` in its
place what the machine could do, in a process of its own with nothing but torch and the kernels: a kernel that takes the
process with it leaves the others alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.kernel_cases.case import KernelCase

Run = Callable[[], object]
OURS = "ours"
CPU_SAMPLE_S = 0.02  # a shorter sample says more of the clock than of the kernel
ENQUEUE_CYCLES = 4_000_000  # some 2 ms: Python and autograd take a good part of one
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
PRODUCT_SIZE = {"cpu": 1536, "cuda": 8192}
# What PyTorch says of a kernel that it does not have, and ops/dispatch.py of a backend that is not installed.
NOT_HERE = ("No available kernel", "not implemented for", "cannot run for")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Timing:
    """Seconds of one run of each contender, round by round; why one failed; and why one of the others is not here: it
    is not installed, or does not have this kernel on this device."""

    op: str
    label: str
    dtype: str
    bytes_moved: int
    flops: int
    seconds: Mapping[str, Sequence[float]]
    failed: Mapping[str, str]
    not_here: Mapping[str, str]

    def median_s(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    @property
    def ours(self) -> list[str]:
        """Those of ours that ran, the one that `auto` chooses first."""
        return [name for name in self.seconds if name.startswith(OURS)]

    @property
    def best_other(self) -> str | None:
        others = [name for name in self.seconds if not name.startswith(OURS)]
        return min(others, key=self.median_s, default=None)

    def ratio(self, name: str) -> float | None:
        """The best other's time by that of `name`: above 1 `name` is faster."""
        return None if self.best_other is None else self.median_s(self.best_other) / self.median_s(name)


def case_modules() -> list[str]:
    """The ops that have a benchmark."""
    folder = Path(__file__).parent / "kernel_cases"
    return sorted(path.stem for path in folder.glob("*.py") if path.stem not in ("__init__", "case"))


def cases_of(op: str, device: str, dtypes: Sequence[str] = ()) -> Iterator[KernelCase]:
    """The cases of an op, of these dtypes (all when empty). Each is let go of before the next one is handed out."""
    cases = importlib.import_module(f"benchmarks.kernel_cases.{op}").cases(device)
    while cases:
        case = cases.pop(0)
        if not dtypes or case.dtype in dtypes:
            yield case


def measure(case: KernelCase, device: str, rounds: int) -> Timing:
    """Runs all contenders in turn, round after round, after a first run of each that is not measured."""
    torch._dynamo.reset()
    failed: dict[str, str] = {}
    not_here: dict[str, str] = {}
    warm: dict[str, Run] = {}
    for name, run in case.contenders.items():
        try:
            run()
            run()
            warm[name] = run
        except Exception as error:  # Triton's, of a kernel that does not compile, are of no other kind
            which = not_here if is_not_here(error) and not name.startswith(OURS) else failed
            which[name] = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    time_one = _cuda_timer() if device == "cuda" else _cpu_time
    seconds: dict[str, list[float]] = {name: [] for name in warm}
    for _ in range(rounds):
        for name, run in warm.items():
            seconds[name].append(time_one(run))
    return Timing(case.op, case.label, case.dtype, case.bytes_moved, case.flops, seconds, failed, not_here)


def is_not_here(error: Exception) -> bool:
    """Whether a contender says that this machine does not have it. All else, such as too little memory, is a fault."""
    if isinstance(error, ImportError | NotImplementedError):
        return True
    return isinstance(error, RuntimeError | ValueError) and any(words in str(error) for words in NOT_HERE)


def _cpu_time(run: Run) -> float:
    """Mean over as many runs as fill a sample."""
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < CPU_SAMPLE_S or count == 0:
        run()
        count += 1
    return passed / count


def _cuda_timer() -> Callable[[Run], float]:
    """By events around one run. Before it the cache is emptied, and the GPU waits until all of the run is enqueued."""
    flush = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")

    def time_one(run: Run) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        torch.cuda._sleep(ENQUEUE_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return time_one


def copy_bandwidth(device: str, rounds: int = 10) -> float:
    """Bytes per second of a copy, what it reads and what it writes."""
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.zeros_like(source)
    case = KernelCase("copy", "", "fp32", {OURS: lambda: target.copy_(source)}, 2 * source.nbytes)
    timing = measure(case, device, rounds)
    return timing.bytes_moved / timing.median_s(OURS)


def product_rate(device: str, dtype: str, rounds: int = 10) -> float:
    """FLOP/s of a product of two square matrices."""
    size = PRODUCT_SIZE[device]
    a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    timing = measure(KernelCase("matmul", "", dtype, {OURS: lambda: a @ b}, 0, 2 * size**3), device, rounds)
    return timing.flops / timing.median_s(OURS)


def ceilings(device: str, dtypes: Sequence[str], rounds: int) -> dict[str, object]:
    """What the device can do: bytes per second of a copy, FLOP/s of products of matrices of each dtype."""
    rates = {dtype: product_rate(device, dtype, rounds) for dtype in dtypes}
    return {"copy_bytes_per_s": copy_bandwidth(device, rounds), "matmul_flops_per_s": rates}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("op", help="an op, or 'ceilings'")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", action="append", default=[])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.op == "ceilings":
        given.out.write_text(json.dumps(ceilings(given.device, given.dtype or list(DTYPES), given.rounds)))
        return
    timings = []
    for case in cases_of(given.op, given.device, given.dtype):
        timings.append(asdict(measure(case, given.device, given.rounds)))
        given.out.write_text(json.dumps(timings))  # after each case: the next one may end the process


if __name__ == "__main__":
    main()
