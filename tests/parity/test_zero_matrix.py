"""Every ZeRO stage with every other axis against one process in float64: a spread always, all by ``-m matrix``."""

from __future__ import annotations

import math
from itertools import combinations, product
from pathlib import Path

import pytest

from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.verify.layouts import ProofLayout
from megatron_lite.verify.proof import BOUNDS, Outcome, Proof, differing_values, relative_difference
from tests.parity.zero_cases import PRECISIONS, SCHEDULES, product_of_axes, zero_config, zero_proof

MODELS = ("tied", "untied")
_PLAIN = dict.fromkeys(
    ("rms_norm", "layer_norm", "rotary", "swiglu", "gelu", "attention", "cross_entropy", "adamw"), "reference"
)


def largest_errors(found: Outcome, exact: Outcome) -> dict[str, float]:
    """Of gradients and of parameters: the largest difference, relative to the largest entry of its tensor."""
    return {
        what: max(relative_difference(value, getattr(exact, what)[name]) for name, value in tensors.items())
        for what, tensors in (("gradients", found.gradients), ("parameters", found.parameters))
    }


def bounds_of(proof: Proof, plain: Proof) -> dict[str, float]:
    """float32: those of a proof. 16 bits: twice the error of one process in plain torch, in the same dtype. The order
    of its roundings is one of many, and another one is about as far off, not many times as far."""
    if proof.config.train.precision == "fp32":
        return dict.fromkeys(("gradients", "parameters"), BOUNDS["float32"])
    return {what: 2 * error for what, error in largest_errors(plain.outcome(ProofLayout()), proof.reference()).items()}


def complaint(proof: Proof, layout: ProofLayout, bounds: dict[str, float]) -> str:
    """What is wrong with a layout; empty if it holds."""
    found = proof.outcome(layout)
    errors = largest_errors(found, proof.reference())
    too_large = [f"{what} {error:.1e}" for what, error in errors.items() if not error <= bounds[what]]
    if not all(map(math.isfinite, found.grad_norms)):
        too_large.append(f"a step was skipped: norms {found.grad_norms}")
    bits = differing_values(found, proof.outcome(layout.base()))
    return ", ".join(too_large + [f"{len(bits)} values have other bits than {layout.base()}"] * bool(bits))


@pytest.fixture(scope="module")
def proofs(pool: WorkerPool) -> dict[tuple[str, str], tuple[Proof, Proof]]:
    """One of each model and precision, and one in plain torch; so what cases are compared with is run once."""
    return {
        (model, precision): (
            zero_proof(model, precision, pool),
            Proof(zero_config(model, precision, **_PLAIN), "float32", pool),
        )
        for model, precision in product(MODELS, PRECISIONS)
    }


def spread() -> list[tuple[str, str, ProofLayout]]:
    """Cases in which every two settings meet, and every schedule every stage."""
    whole = list(product(MODELS, PRECISIONS, product_of_axes()))
    chosen: list[tuple[str, str, ProofLayout]] = []
    unseen = {pair for case in whole for pair in _pairs(case)}
    while unseen:
        best = max(whole, key=lambda case: (len(unseen & _pairs(case)), -case[2].world_size))
        chosen.append(best)
        unseen -= _pairs(best)
    return chosen


def _pairs(case: tuple[str, str, ProofLayout]) -> set[tuple[object, ...]]:
    model, precision, one = case
    settings = {
        "model": model,
        "precision": precision,
        "stage": one.zero_stage,
        "tp": one.tp,
        "pp": one.pp,
        "dp": one.dp,
        "schedule": (one.schedule, one.virtual_stages),
    }
    return set(combinations(settings.items(), 2))


def test_the_product_is_whole() -> None:
    layouts = product_of_axes()
    # pp 1: tp and dp freely; pp 2: but for tp = 2 and dp = 4; pp 4: tp = 1, dp = 2.
    assert len(layouts) == len(set(layouts)) == 4 * (4 + 3 * len(SCHEDULES) + len(SCHEDULES))
    assert {one.world_size for one in layouts} == {2, 4, 8}
    assert len(spread()) < 70


@pytest.mark.parametrize(("model", "precision", "layout"), spread(), ids=str)
def test_a_zero_stage_is_as_near_to_float64(
    proofs: dict[tuple[str, str], tuple[Proof, Proof]], model: str, precision: str, layout: ProofLayout
) -> None:
    proof, plain = proofs[model, precision]
    assert complaint(proof, layout, bounds_of(proof, plain)) == ""


@pytest.mark.matrix
@pytest.mark.parametrize(("model", "precision"), list(product(MODELS, PRECISIONS)))
def test_whole_zero_matrix(
    proofs: dict[tuple[str, str], tuple[Proof, Proof]], model: str, precision: str, request: pytest.FixtureRequest
) -> None:
    """ZeRO 0 to 3 x tp x pp by every schedule x dp; notes in runs/ what each is found to be, as it goes on."""
    proof, plain = proofs[model, precision]
    bounds, broken = bounds_of(proof, plain), {}
    path = Path(request.config.rootpath, "runs", "matrix", f"zero-{model}-{precision}.txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", buffering=1) as file:
        for layout in product_of_axes():
            if said := complaint(proof, layout, bounds):
                broken[str(layout)] = said
            file.write(f"{layout}: {said or 'holds'}\n")
    assert broken == {}


def test_sixteen_bits_are_not_float64(proofs: dict[tuple[str, str], tuple[Proof, Proof]]) -> None:
    """Negative control: the bound of 16 bits is far above that of float32, and a gradient twice as large breaks it."""
    proof, plain = proofs["untied", "bf16"]
    bounds, exact = bounds_of(proof, plain), proof.reference()
    assert all(BOUNDS["float32"] < bound < 0.5 for bound in bounds.values()), bounds
    doubled = Outcome(exact.losses, exact.grad_norms, {n: 2 * g for n, g in exact.gradients.items()}, exact.parameters)
    assert largest_errors(doubled, exact)["gradients"] > bounds["gradients"]
