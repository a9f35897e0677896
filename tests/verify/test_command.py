"""What a proof says while it goes on."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_lite.verify import command
from megatron_lite.verify.layouts import layouts_asked_for
from megatron_lite.verify.proof import Verdict


class NoProof:
    """Judges without proving: the 21st layout is broken."""

    def __init__(self, *_: Any) -> None:
        pass

    def run(self, layouts: list[Any], on_verdict: Any) -> list[Verdict]:
        verdicts = []
        for number, layout in enumerate(layouts):
            verdicts.append(Verdict(layout, broken="the loss" if number == 20 else ""))
            on_verdict(verdicts[-1])
        return verdicts


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_long_proof_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    """In plain lines where there is no terminal, and by its bar alone where there is one."""
    out = io.StringIO()
    monkeypatch.setattr(command, "Proof", NoProof)
    monkeypatch.setattr(command, "Console", lambda: Console(file=out, force_terminal=is_terminal, width=200))
    keys = ["model.num_layers=8", "model.num_kv_heads=4", "parallel.tp=1", "run.name=x"]
    assert not command.prove(Path("configs/runs/tiny-proof.yaml"), keys, "zero", "float64")
    total, said = len(layouts_asked_for("zero")), out.getvalue()
    assert f"20 of {total} layouts, all of them hold" in said or is_terminal
    assert f"40 of {total} layouts, 1 of them broken" in said or is_terminal
    assert said.count(" of them ") == (0 if is_terminal else total // 20)
