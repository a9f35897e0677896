from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_lite.verify.layouts import ProofLayout, parse
from megatron_lite.verify.proof import BOUNDS, Outcome, Proof, Verdict, differing_values, relative_difference
from megatron_lite.verify.table import complaints, verdict_table


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def outcome(loss: float = 2.0, norm: float = 1.0, gradient: float = 0.5, weight: float = 0.25) -> Outcome:
    return Outcome((loss, 1.5), (norm, 0.9), {"w": tensor(gradient, 1.0)}, {"w": tensor(weight, -1.0)})


class Recorded(Proof):
    """A proof whose runs have been made already."""

    def _run(self, config, layout, without):  # type: ignore[no-untyped-def]
        raise AssertionError(f"{layout} was not recorded")


def proof(outcomes: dict[str, Outcome], dtype: str = "float64", reference: Outcome | None = None) -> Proof:
    recorded = Recorded(config=None, dtype=dtype, pool=None)  # type: ignore[arg-type]
    recorded._reference = reference or outcome()
    recorded._outcomes = {parse(text): one for text, one in {"single": outcome(), **outcomes}.items()}
    return recorded


# Differences


def test_differences_are_relative_to_the_largest_entry() -> None:
    assert relative_difference(tensor(1.0, -4.0), tensor(1.0, -4.0)) == 0.0
    assert relative_difference(tensor(1.0, 2.0), tensor(1.0, 4.0)) == 0.5
    assert relative_difference(tensor(-8.0, 0.0), tensor(8.0, 0.0)) == 2.0
    assert relative_difference(tensor(1e-20, 1e10), tensor(2e-20, 1e10)) == pytest.approx(1e-30)


def test_where_all_is_zero_the_difference_is_absolute() -> None:
    assert relative_difference(tensor(0.0, 0.25), tensor(0.0, 0.0)) == 0.25
    assert relative_difference(tensor(0.0), tensor(0.0)) == 0.0


def test_the_difference_is_taken_in_float64() -> None:
    """A float32 value is not first made the reference's, nor the reference float32: 0.1 is neither."""
    found = relative_difference(torch.tensor([0.1], dtype=torch.float32), tensor(0.1))
    assert found == abs(float(torch.tensor(0.1)) - 0.1) / 0.1 > 0


@pytest.mark.parametrize(
    ("value", "exact"),
    [
        (math.nan, 1.0),
        (1.0, math.nan),
        (math.nan, math.nan),
        (math.inf, 1.0),
        (1.0, math.inf),
        (math.inf, math.inf),
        (math.nan, 0.0),
    ],
)
def test_what_is_not_a_number_holds_no_bound(value: float, exact: float) -> None:
    found = relative_difference(tensor(0.0, value), tensor(0.0, exact))
    assert not found <= max(BOUNDS.values())


def test_other_shapes_are_refused() -> None:
    """Also those that broadcast."""
    with pytest.raises(ValueError, match=r"shapes \(1,\) and \(2,\) differ"):
        relative_difference(tensor(1.0), tensor(1.0, 1.0))
    with pytest.raises(ValueError):
        relative_difference(tensor(1.0, 1.0)[:, None], tensor(1.0, 1.0))


def test_differing_values_are_named() -> None:
    assert differing_values(outcome(), outcome()) == []
    assert differing_values(outcome(), outcome(gradient=math.nextafter(0.5, 1))) == ["gradient of w"]
    assert differing_values(outcome(), outcome(weight=math.nextafter(0.25, 1))) == ["parameter w"]
    assert differing_values(outcome(), outcome(loss=2.5, norm=3.0)) == ["loss of step 1", "grad_norm of step 1"]
    assert differing_values(outcome(gradient=math.nan), outcome(gradient=math.nan)), "a NaN is never a proof"


def test_the_sign_of_zero_is_a_bit() -> None:
    assert differing_values(outcome(gradient=0.0), outcome(gradient=-0.0)) == ["gradient of w"]


def test_every_value_of_an_outcome_is_compared() -> None:
    """Loss and norm of the first and of later steps, every gradient and every parameter, each by its name."""
    names = [name for name, _ in outcome().values()]
    assert names == [
        "loss of step 1",
        "gradient of w",
        "grad_norm of step 1",
        "parameter w",
        "loss of later steps",
        "grad_norm of later steps",
    ]
    later = Outcome((2.0, 1.25), (1.0, 0.9), {"w": tensor(0.5, 1.0)}, {"w": tensor(0.25, -1.0)})
    assert differing_values(outcome(), later) == ["loss of later steps"]


# Verdicts


def test_what_equals_the_reference_and_its_base_holds() -> None:
    verdict = proof({"pp=2": outcome(), "tp=2": outcome(gradient=0.5 + 4e-11)}).judge(parse("pp=2"))
    assert verdict.holds and verdict.bitwise is True and verdict.gradient == 0.0
    close = proof({"tp=2": outcome(gradient=0.5 + 4e-11)}).judge(parse("tp=2"))
    assert close.holds and close.bitwise is None and close.gradient == pytest.approx(4e-11)


@pytest.mark.parametrize(
    ("change", "kind", "first", "parameter"),
    [
        ({"loss": 2.0 + 4e-10}, "loss", "loss of step 1", ""),
        ({"norm": 1.0 + 2e-10}, "grad_norm", "grad_norm of step 1", ""),
        ({"gradient": 0.5 + 2e-10}, "gradient", "gradient of w", "w"),
        ({"weight": 0.25 + 2e-10}, "parameter", "parameter w", "w"),
        ({"gradient": math.nan}, "gradient", "gradient of w", "w"),
        ({"loss": math.inf}, "loss", "loss of step 1", ""),
    ],
)
def test_each_kind_of_value_has_to_hold(change: dict[str, float], kind: str, first: str, parameter: str) -> None:
    broken = outcome(**change)
    verdict = proof({"tp=2": broken}).judge(parse("tp=2"))
    assert not verdict.holds
    assert (verdict.broken, verdict.broken_parameter, verdict.axis) == (first, parameter, "tp")
    assert not getattr(verdict, kind) <= 1e-10
    assert first in complaints([verdict])[0] and "axis: tp" in complaints([verdict])[0]
    # The wider bound of float32 admits the small ones, and never what is no number.
    admitted = proof({"tp=2": broken}, dtype="float32").judge(parse("tp=2")).holds
    assert admitted == all(math.isfinite(value) for value in change.values())


def test_what_holds_the_bound_and_not_the_bits_is_broken() -> None:
    verdict = proof({"pp=2": outcome(weight=math.nextafter(0.25, 1))}).judge(parse("pp=2"))
    assert not verdict.holds and verdict.bitwise is False
    assert verdict.broken == "parameter w (not bitwise equal to single)" and verdict.axis == "pp"


def test_the_parameter_of_a_broken_bit_is_named() -> None:
    verdict = proof({"pp=2": outcome(weight=math.nextafter(0.25, 1))}).judge(parse("pp=2"))
    assert verdict.broken_parameter == "w"


def test_the_axis_is_the_first_that_breaks_alone() -> None:
    wrong = outcome(gradient=0.75)
    everything = {"tp=2,pp=2,dp=2": wrong, "tp=2,dp=2": wrong, "tp=2": outcome(), "pp=2": outcome(), "dp=2": wrong}
    assert proof(everything).judge(parse("tp=2,pp=2,dp=2")).axis == "dp"
    together = {**everything, "dp=2": outcome()}
    assert proof(together).judge(parse("tp=2,pp=2,dp=2")).axis == "only in combination"
    alone = proof({**together, "single": wrong}).judge(parse("tp=2,pp=2,dp=2"))
    assert alone.axis == "none, one process breaks it too"


def test_a_table_has_a_row_for_each_verdict_and_complaints_for_the_broken() -> None:
    verdicts = [
        Verdict(ProofLayout()),
        Verdict(
            parse("tp=2"),
            gradient=math.nan,
            broken="gradient of w",
            broken_parameter="w",
            difference=math.nan,
            axis="tp",
        ),
        Verdict(parse("dp=2"), broken="data-parallel ranks 0 and 1 hold different values", axis="dp"),
    ]
    assert verdict_table(verdicts, "float64").row_count == 3
    lines = complaints(verdicts)
    assert len(lines) == 2
    assert "gradient of w differs by nan" in lines[0] and "first parameter: w" in lines[0]
    assert "ranks 0 and 1 hold different values" in lines[1]
