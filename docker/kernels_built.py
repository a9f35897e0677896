"""Ends the build of an image that lacks kernels, which an install on a user's machine would only note.

    python kernels_built.py REPORT PART...     PART is cpu, cuda or index

REPORT is the _native_build.json that setup.py leaves beside the kernels. Exits 1 with the reason for what is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description="Fail where kernels were left out.")
    parser.add_argument("report", type=Path)
    parser.add_argument("parts", nargs="+", choices=("cpu", "cuda", "index"))
    options = parser.parse_args()
    try:
        report = json.loads(options.report.read_text(encoding="utf-8"))
    except FileNotFoundError:
        print(f"error: {options.report}: no such file: setup.py built nothing", file=sys.stderr)
        return 1
    missing = [f"{part}: {report.get(part, 'not built')}" for part in options.parts if report.get(part, "") is not None]
    for line in missing:
        print(f"error: kernels were left out: {line}", file=sys.stderr)
    print(f"kernels: {', '.join(options.parts)}; {report.get('cpu_sets')}; {report.get('cuda_archs', 'no CUDA')}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
