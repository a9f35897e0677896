"""Every pipeline schedule gives the bits of no pipeline: a spread of cases in every run, and all by ``-m matrix``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from megatron_lite.config import RunConfig, load_config
from megatron_lite.config.schedules import SCHEDULE_RULES
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.models.families import parameter_table
from megatron_lite.models.identity import same_bits
from megatron_lite.pipeline.instructions import Instruction, InstructionList, Kind
from megatron_lite.train.build import Training, build, layout_of
from megatron_lite.train.step import compute_gradients
from megatron_lite.verify.layouts import RECOMPUTES, ProofLayout, legal, parse, pipeline_matrix
from megatron_lite.verify.proof import Proof, Verdict, differing_values
from megatron_lite.verify.shrink import shrink
from megatron_lite.verify.table import complaints, verdict_table
from megatron_lite.verify.trial import perturbed_weights, proof_batch
from tests.parity import zero_cases

NUM_LAYERS = "model.num_layers=16"  # as many as the largest case has chunks
MODELS = {
    "gpt2-tied": zero_cases.MODELS["tied"],
    "llama-untied": zero_cases.MODELS["untied"],
    "llama-tied": zero_cases.MODELS["llama-tied"],
}
SIZES = (2, 4, 8)
# A proof's own 8 samples are 4 microbatches where dp is 2: too few for a schedule of 8 chunks to leave its warm-up.
NUM_SAMPLES = 16


def pipeline_config(model: str, dtype: str, precision: str | None = None) -> RunConfig:
    config = shrink(load_config(None, [NUM_LAYERS, *zero_cases.NARROW, *MODELS[model]]), dtype)
    update = {"global_batch_size": NUM_SAMPLES, "precision": precision or config.train.precision}
    return config.model_copy(update={"train": config.train.model_copy(update=update)})


def spread() -> list[tuple[str, ProofLayout]]:
    """Every schedule with every number of chunks that it takes, tied and untied; the sizes, ZeRO stages and recomputes
    go around beside them, each in its own rhythm."""
    whole = pipeline_matrix(SIZES)
    schedules = dict.fromkeys((layout.schedule, layout.virtual_stages) for layout in whole)
    cases = []
    for n, (model, wanted) in enumerate(product(("gpt2-tied", "llama-untied"), schedules)):
        beside = SIZES[n % 3], n % 2, RECOMPUTES[(n // 3 + n // 9) % 3]
        (layout,) = (
            one
            for one in whole
            if (one.schedule, one.virtual_stages) == wanted and (one.pp, one.zero_stage, one.recompute) == beside
        )
        cases.append((model, layout))
    return cases


def test_the_spread_has_every_schedule_and_every_pair_of_settings() -> None:
    cases = spread()
    found = {(model, layout.schedule, layout.virtual_stages) for model, layout in cases}
    assert {(model, schedule) for model, schedule, _ in found} == set(
        product(("gpt2-tied", "llama-untied"), SCHEDULE_RULES)
    )
    settings = {"pp": SIZES, "virtual_stages": (1, 2), "zero_stage": (0, 1), "recompute": RECOMPUTES}
    for (one, ones), (other, others) in combinations(settings.items(), 2):
        pairs = {(getattr(layout, one), getattr(layout, other)) for _, layout in cases}
        assert pairs == set(product(ones, others)), (one, other)


def check(verdict: Verdict) -> None:
    assert verdict.holds, complaints([verdict])
    assert verdict.bitwise is True  # it was compared, and not left out


@pytest.fixture(scope="module")
def proofs(pool: WorkerPool) -> dict[str, Proof]:
    """One of each model, so that what all its cases are compared with is run once."""
    dtypes = {"gpt2-tied": "float32", "llama-untied": "float64", "llama-tied": "float32"}
    return {model: Proof(pipeline_config(model, dtype), dtype, pool) for model, dtype in dtypes.items()}


@pytest.mark.parametrize(("model", "layout"), spread(), ids=str)
def test_a_schedule_changes_no_bit(proofs: dict[str, Proof], model: str, layout: ProofLayout) -> None:
    check(proofs[model].judge(layout))


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("llama-tied", "pp=2,dp=2,zb-v"),  # both uses of the table on the first stage, its optimizer state sliced
        ("llama-tied", "tp=2,pp=2,dp=2,sp,zb-v,zero=0"),
        ("gpt2-tied", "tp=2,pp=2,sp,zb-h1"),
        ("llama-untied", "tp=2,pp=4,sp,zb-h2,recompute=full"),
    ],
)
def test_nor_does_it_over_other_axes(proofs: dict[str, Proof], model: str, text: str) -> None:
    check(proofs[model].judge(parse(text)))


@pytest.mark.parametrize("model", ["llama-tied", "llama-untied"])
def test_nor_does_it_in_bf16(pool: WorkerPool, model: str) -> None:
    proof = Proof(pipeline_config(model, "float32", "bf16"), "float32", pool)
    expected = proof.outcome(parse("dp=2"))
    for text in ("pp=2,dp=2,v=2,interleaved", "pp=4,dp=2,zb-h2,zero=0", "pp=2,dp=2,zb-v,recompute=selective"):
        assert differing_values(proof.outcome(parse(text)), expected) == [], text


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("model", "dtype"), [("gpt2-tied", "float32"), ("llama-untied", "float32"), ("llama-tied", "float64")]
)
def test_whole_pipeline_matrix(pool: WorkerPool, model: str, dtype: str, request: pytest.FixtureRequest) -> None:
    """Schedules x {2, 4, 8} stages x virtual stages {1, 2} x ZeRO {0, 1} x recompute; writes its table to runs/."""
    config = pipeline_config(model, dtype)
    layouts = pipeline_matrix(SIZES)
    assert legal(config, layouts) == layouts and len(layouts) == 216
    verdicts = Proof(config, dtype, pool).run(layouts)
    table = Path(request.config.rootpath, "runs", "matrix", f"pipeline-{model}-{dtype}.txt")
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w") as file:
        Console(file=file, width=160).print(verdict_table(verdicts, dtype))
    for verdict in verdicts:
        check(verdict)


# Negative controls: a step of a run that is changed after it was built.


def nothing(training: Training) -> None:
    """A change that changes nothing."""


def weights_last(training: Training, *, reverse: bool = False) -> None:
    """All weight halves after everything else, in the order of microbatches or in the opposite one."""

    def moved(instructions: InstructionList) -> list[Instruction]:
        halves = [one for one in instructions if one.kind is Kind.BACKWARD_WEIGHT]
        others = [one for one in instructions if one.kind is not Kind.BACKWARD_WEIGHT]
        assert halves and others[-1].kind is Kind.REDUCE_GRADIENTS
        return [*others[:-1], *sorted(halves, key=lambda one: one.microbatch, reverse=reverse), others[-1]]

    lists = tuple(map(moved, training.schedule.lists))
    training.schedule = dataclasses.replace(training.schedule, lists=lists)


def weights_last_reversed(training: Training) -> None:
    weights_last(training, reverse=True)


def without_the_tied_sum(training: Training) -> None:
    assert training.engine.tied_pairs
    training.engine.tied_pairs = []


def changed_step(config: RunConfig, change: Callable[[Training], None]) -> dict[str, Tensor]:
    """This rank's gradients of step 1."""
    mesh = build_mesh(layout_of(config), device=torch.device("cpu"))
    training = build(config, mesh=mesh, weights=perturbed_weights(config))
    change(training)
    compute_gradients(training, list(proof_batch(config, 0, mesh.dp.index)))
    return {name: training.engine.whole_gradient(name) for name, _ in training.named_parameters()}


def differing_gradients(proof: Proof, layout: ProofLayout, change: Callable[[Training], None]) -> set[str]:
    """The parameters whose gradients are not those of the layout's base."""
    expected = proof.outcome(layout.base()).gradients
    ranks = proof.pool.run(changed_step, layout.world_size, layout.apply(proof.config), change)
    assert {name for rank in ranks for name in rank} >= {spec.name for spec in parameter_table(proof.config.model)}
    return {
        name
        for rank in ranks
        for name, gradient in rank.items()
        if name in expected and not same_bits(gradient, expected[name])
    }


@pytest.mark.parametrize("text", ["pp=2,zb-h1", "pp=2,zb-v"])
def test_weight_halves_in_another_order_give_other_bits(proofs: dict[str, Proof], text: str) -> None:
    """Negative control: when they run does not matter, the order of a chunk's microbatches does."""
    proof, layout = proofs["gpt2-tied"], parse(text)
    assert differing_gradients(proof, layout, weights_last) == set()
    differing = differing_gradients(proof, layout, weights_last_reversed)
    weights = {name for name, value in proof.reference().gradients.items() if value.ndim == 2 and "layers." in name}
    assert weights and differing == weights


@pytest.mark.parametrize("text", ["pp=2,zb-v", "pp=2,dualpipe-v", "pp=2,dp=2,zb-v"])
def test_a_vee_without_the_tied_sum_is_caught(proofs: dict[str, Proof], text: str) -> None:
    """Negative control: both uses of the table are on one rank, where nothing is sent, and still are to be added."""
    proof, layout = proofs["gpt2-tied"], parse(text)
    assert differing_gradients(proof, layout, nothing) == set()
    assert differing_gradients(proof, layout, without_the_tied_sum) == {"embedding.tokens.weight", "head.weight"}
