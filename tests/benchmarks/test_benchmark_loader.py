"""The loader benchmark reads what it says it reads, and its goal is one that can be missed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks import loader
from megatron_lite.data import IndexedReader

ROOT = Path(__file__).resolve().parents[2]


def test_the_pair_is_sound(tmp_path: Path) -> None:
    reader = IndexedReader(loader.write_pair(tmp_path / "a", 100_000, "int32"))
    assert reader.num_tokens == 100_000 and reader.dtype == np.int32 and reader.is_contiguous
    assert 150 < reader.num_documents <= 200
    assert reader.tokens.max() > 40_000


def test_the_cases_are_the_promised_ones() -> None:
    assert {(case.dtype, case.seq_len, case.isolate_documents) for case in loader.CASES} == {
        (dtype, seq_len, isolated) for dtype in ("uint16", "int32") for seq_len in (256, 2048) for isolated in (0, 1)
    }
    assert loader.GOAL_TOKENS_PER_S == 10e6


def test_a_rate_is_measured(tmp_path: Path) -> None:
    prefix = loader.write_pair(tmp_path / "a", 2_000_000, "uint16")
    for isolated in (False, True):
        assert loader.measure(prefix, loader.Case("uint16", 256, isolated), 0.05) > 1e5


def test_index_rows(tmp_path: Path) -> None:
    rows = list(loader.index_rows(tmp_path, 1_000_000, 128))
    assert len(rows) == 4 and all(build_s > 0 and open_s > 0 for _, build_s, open_s in rows)
    kinds = {path.name.partition("-")[0] for path in (tmp_path / "index").glob("*.idx")}
    assert kinds == {"documents", "order", "blend"}


def test_the_help(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/loader.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert result.returncode == 0 and "--index-tokens" in result.stdout
