"""All that a GPU can say of this package in one go; run it by `bash benchmarks/gpu.sh --help`.

Every part works in processes of its own and has a share of the time. One that fails or is cut off is in the report, and
the other parts run. What the package does not bring and this machine does not have is "not here", which is no failure.
Only the standard library is imported here, so that there is a report whatever is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the repository, not this folder, is where `benchmarks` is found
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.gpu_report import failures_of, not_here_in, table_of
from benchmarks.gpu_session import ROOT, TAIL_CHARACTERS, NotHere, PartFailed, Session, attempt, each

SEQUENCES = (8, 4, 2, 1)  # microbatches that the training step tries
WORKERS = max(1, min(8, (os.cpu_count() or 1) // 2))  # processes at a time, where nothing is timed
WARM_SHARE = 0.4  # of the time for the kernels: filling the caches of the compilers
ENVIRONMENT = """
import json, platform, torch
from megatron_lite.ops import survey
gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
print(json.dumps({"packages": survey.environment(), "device": gpu.name if gpu else platform.machine(),
    "memory_bytes": gpu.total_memory if gpu else None}))
"""


# ---- the parts


def environment(session: Session) -> Any:
    """What is installed, and which GPU there is."""
    found = json.loads(session.python("-c", ENVIRONMENT).splitlines()[-1])
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm", "--format=csv"]
    return {**found, "nvidia_smi": attempt(lambda: session.run(query))}


def build(session: Session) -> Any:
    """The compiled kernels beside the sources, and csrc where the package looks for its Triton kernels."""
    link = ROOT / "megatron_lite/_csrc"
    if not session.smoke:
        session.python("setup.py", "build_ext", "--inplace")
        if not os.path.lexists(link):
            link.symlink_to("../csrc")
    report = ROOT / "megatron_lite/ops/_native_build.json"
    return json.loads(report.read_text()) if report.exists() else "not built"


def cuda_numbers(session: Session) -> Any:
    """Every CUDA C++ kernel in fp32, bf16 and fp16 against float64."""
    where = "0" if session.smoke else "cuda"
    if session.smoke:  # the emulation, once and not in each of the processes
        session.python("-c", "from tests.ops.emulation import build; build.build()")

    def check(op: str, limit_s: float) -> str:
        return checked(session.python("-m", "tests.ops.cuda_cases.runner", op, where, limit_s=limit_s))

    return each(session, case_names("tests/ops/cuda_cases"), check, WORKERS)


def triton_numbers(session: Session) -> Any:
    """Every Triton kernel against float64, in bf16 too."""
    extra, interpret = ([], "1") if session.smoke else (["cuda"], "0")

    def check(op: str, limit_s: float) -> str:
        command = ("-m", "tests.ops.triton_cases.runner", "numbers", op, *extra)
        return checked(session.python(*command, limit_s=limit_s, TRITON_INTERPRET=interpret))

    return each(session, case_names("tests/ops/triton_cases"), check, WORKERS)


def checked(printed: str) -> str:
    """What a runner of cases printed: [caught, wrong, ...], how many deliberately wrong results its checks caught, and
    how many there were. Raises PartFailed where one went through: then the checks that passed say nothing."""
    last = printed.strip().splitlines()[-1]
    caught, wrong = json.loads(last)[:2]
    if not caught == wrong > 0:
        raise PartFailed(f"only {caught} of {wrong} deliberately wrong results were caught")
    return last


def ceilings(session: Session) -> Any:
    """Bandwidth of a copy, rate of products of matrices."""
    out = session.out / "ceilings.json"
    rounds = "2" if session.smoke else "20"
    command = ["-m", "benchmarks.kernel_timing", "ceilings", "--device", session.device, "--out", str(out)]
    session.python(*command, "--rounds", rounds, *(["--dtype", "fp32"] if session.smoke else []))
    return json.loads(out.read_text())


def kernels(session: Session) -> Any:
    """Every kernel case beside PyTorch. Once in parallel, which fills the caches of the compilers, then one by one."""
    ops = case_names("benchmarks/kernel_cases")

    def measure(op: str, rounds: int, limit_s: float) -> Any:
        out = session.out / f"kernels_{op}.json"
        out.unlink(missing_ok=True)
        command = ["-m", "benchmarks.kernel_timing", op, "--device", session.device, "--out", str(out)]
        command += ["--rounds", str(rounds), *(["--dtype", "bf16"] * session.smoke)]
        try:
            session.python(*command, limit_s=limit_s)
        except PartFailed as error:
            if not out.exists():
                raise
            # behind the cases that it got to
            return [*json.loads(out.read_text()), {"stopped": str(error), "state": error.state}]
        return json.loads(out.read_text())

    if not session.smoke:
        with session.within(WARM_SHARE * session.left()):
            each(session, ops, lambda op, limit_s: measure(op, 0, limit_s), WORKERS)
    return each(session, ops, lambda op, limit_s: measure(op, 1 if session.smoke else 20, limit_s), 1)


def training(session: Session) -> Any:
    """A step of a slice of Llama that fills the card, with the largest microbatch that fits."""
    out, failures = session.out / "train.json", {}
    for sequences in SEQUENCES[-1:] if session.smoke else SEQUENCES:
        command = ["-m", "benchmarks.gpu_train", "--device", session.device, "--sequences", str(sequences)]
        try:
            session.python(*command, "--out", str(out))
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
    if session.smoke:
        raise NotHere("compute-sanitizer looks at what runs on a GPU, and --smoke is for a machine without one")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    tool = shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")
    if tool is None:
        raise NotHere("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    command = [tool, "--tool", check, "--error-exitcode", "9", "--print-limit", "10", sys.executable]

    def run(op: str, limit_s: float) -> str:
        printed = session.run([*command, "-m", "tests.ops.cuda_cases.runner", op, "cuda"], limit_s=limit_s)
        return printed[-TAIL_CHARACTERS:]

    return each(session, case_names("tests/ops/cuda_cases"), run, WORKERS)


def tests(session: Session) -> Any:
    """The tests of the public functions in bf16, on the implementation that `auto` chooses on the GPU."""
    plugin = [] if session.smoke else ["-p", "tests.ops.on_gpu"]
    kinds = "zeros" if session.smoke else "error_is_at_most or large or zeros or strided or compiles_without_a_graph"
    chosen = ["-q", "-k", f"bfloat16 and ({kinds})", "tests/ops", "-p", "no:cacheprovider"]
    return session.python("-m", "pytest", *plugin, *chosen)[-TAIL_CHARACTERS:]


# In this order: what is worth most comes first. With each its share of the time; in seconds where that is 525.
PARTS: dict[str, tuple[Callable[[Session], Any], float]] = {
    "build": (build, 140),
    "environment": (environment, 15),
    "cuda_numbers": (cuda_numbers, 35),
    "ceilings": (ceilings, 20),
    "kernels": (kernels, 115),
    "triton_numbers": (triton_numbers, 40),
    "training": (training, 75),
    "memcheck": (memcheck, 25),
    "tests": (tests, 40),
    "racecheck": (racecheck, 20),
}


def case_names(folder: str) -> list[str]:
    """The ops of a folder of cases: of its modules, those that have what a case has to have."""
    marks = re.compile(r"^(NUM_CONTROLS\b|def cases\()", re.MULTILINE)
    return sorted(path.stem for path in (ROOT / folder).glob("*.py") if marks.search(path.read_text()))


# ---- the run


def allowances(shares: Sequence[float], left: Callable[[], float]) -> Callable[[int], float]:
    """Seconds for part i, asked for when it begins: its share of what is left for it and those behind it. A part that
    ends early leaves its time to the others, and none takes theirs."""
    return lambda i: left() * shares[i] / sum(shares[i:])


def run_parts(session: Session, names: Sequence[str]) -> None:
    """Runs these parts; gpu.json is complete as far as they got, after each of them."""
    allowance = allowances([PARTS[name][1] for name in names], session.left)
    for i, name in enumerate(names):
        allowed = max(0.0, allowance(i))
        session.report["parts"][name] = {"ok": False, "state": "cut off", "error": "the run ended within this part"}
        session.write()
        with session.within(allowed):
            state = attempt(lambda name=name: PARTS[name][0](session))  # type: ignore[misc]
        session.report["parts"][name] = {**state, "allowed_s": round(allowed, 1)}
        session.report |= {"failures": failures_of(session.report), "not_here": not_here_in(session.report)}
        session.write()
        print(f"{name}: {state['state']} in {state['seconds']} s of {allowed:.0f}", flush=True)
        if session.stopped:
            return


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    shares = "\n".join(f"  {name:15}{share:4.0f} s  {function.__doc__}" for name, (function, share) in PARTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"the parts, and their shares of 525 s (what one leaves goes to those behind it):\n{shares}\n\n"
        "exit codes: 0 all is well, 1 something failed or was cut off (gpu.json, gpu.md say what), 2 an argument is "
        "wrong,\n143 it was ended by SIGTERM (gpu.json, gpu.md have what was done until then)\n\n"
        "a dry run of a minute on any machine:\n  bash benchmarks/gpu.sh --smoke --only environment ceilings training",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu", help="folder for gpu.json and gpu.md")
    parser.add_argument("--limit", type=float, default=525.0, help="seconds for everything (525)")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, small: what can be tried without a GPU")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    session = Session(given.out.resolve(), given.smoke, time.monotonic() + given.limit)
    session.report["date"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    session.report["smoke"] = given.smoke

    # It raises nothing: an exception in the middle of starting a process would leave that process behind.
    before = signal.signal(signal.SIGTERM, lambda number, frame: session.stop())
    try:
        run_parts(session, [name for name in PARTS if name in given.only])
    finally:
        signal.signal(signal.SIGTERM, before)
        page = attempt(lambda: table_of(session.report))
        text = page["result"] if page["ok"] else f"no table: {page['error']}\n"
        (session.out / "gpu.md").write_text(text, encoding="utf-8")
    print(text)
    if session.stopped:
        return 128 + signal.SIGTERM
    return 1 if session.report["failures"] or not page["ok"] else 0


if __name__ == "__main__":
    sys.exit(main())
