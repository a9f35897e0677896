"""Run by test_triton_kernels.py, in processes of their own: TRITON_INTERPRET is read when Triton is imported.

`python -m tests.ops.triton_cases.runner compile rms_norm 80` prints, as JSON, what each kernel takes on that GPU;
`python -m tests.ops.triton_cases.runner numbers rms_norm` prints how many wrong results were caught, and how many
there were; with `cuda` behind it the kernels run on a GPU.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.ops.triton_cases.case import Case


def compiled(case: Case, sm: int) -> Any:
    """The kernel of `case` for compute capability `sm` / 10."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(case.kernel.arg_names)
    types = {name: kind for name, kind in case.types.items() if name in names and name not in case.constants}
    missing = [name for name in names if name not in types and name not in case.constants]
    assert not missing, f"{case.name}: no type and no value for {', '.join(missing)}"
    signature = {name: types[name].partition(":")[0] if name in types else "constexpr" for name in names}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    divisible = [name for name, kind in types.items() if kind.startswith("*") or kind.endswith(":16")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(case.kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def usage(binary: Any) -> dict[str, int]:
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        dump = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    fields = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump.stdout)}
    return {
        "registers": fields["REG"],
        "local_bytes": fields["STACK"] + fields["LOCAL"],
        "shared_bytes": binary.metadata.shared,
    }


def with_ones(cases: Iterable[Case], sm: int) -> Iterator[Case]:
    """The cases for this compute capability, and behind the first of each kernel that has integers to make constants of
    the same with these."""
    seen = set()
    for case in cases:
        if case.sm not in (None, sm):
            continue
        yield case
        if case.kernel not in seen and (ones := case.with_ones()) is not None:
            seen.add(case.kernel)
            yield ones


def compile_all(op: str, sm: int) -> dict[str, Any]:
    report = []
    for case in with_ones(importlib.import_module(f"tests.ops.triton_cases.{op}").compile_cases(), sm):
        report.append({"name": case.name, "kernel": case.kernel.__name__, **usage(compiled(case, sm))})
    return {"ceilings": importlib.import_module(f"megatron_lite._csrc.{op}.triton").CEILINGS, "cases": report}


def main(action: str, op: str, *arguments: str) -> None:
    if action == "compile":
        print(json.dumps(compile_all(op, *map(int, arguments))))
    else:
        import torch

        torch.set_default_device(arguments[0] if arguments else "cpu")
        cases = importlib.import_module(f"tests.ops.triton_cases.{op}")
        print(json.dumps([cases.check_numbers(), cases.NUM_CONTROLS]))


if __name__ == "__main__":
    main(*sys.argv[1:])
