"""State: prediction equals allocation, byte for byte; and table 1 of the ZeRO paper, computed by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_lite.config import RunConfig, load_config
from megatron_lite.config.problems import override
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.models.families import parameter_table
from megatron_lite.planner.amounts import Amount
from megatron_lite.planner.memory import STATE, Plan, predict, stage_of
from megatron_lite.train.build import build, layout_of
from megatron_lite.train.memory import account, measured_state
from tests.models.tiny import FAMILIES
from tests.ops.oracle import ROOT

ALIGNMENT = 256
STAGES = [0, 1, 2, 3]
DTYPES = ["train.precision=fp32", "train.precision=bf16", "train.precision=fp64", "train.precision=fp16"]
LAYOUTS = {
    "one": (1, ()),
    "dp": (2, ()),
    "dp, tied": (4, ("model.tie_embeddings=true",)),
    "tp": (2, ("parallel.tp=2", "model.tie_embeddings=true")),
    "pp": (2, ("parallel.pp=2",)),
    "pp, tied": (2, ("parallel.pp=2", "model.tie_embeddings=true")),
    "vee, tied on one rank": (2, ("parallel.pp=2", "parallel.schedule=zb-v", "model.tie_embeddings=true")),
    "all": (8, ("parallel.pp=2", "parallel.tp=2", "parallel.sequence_parallel=true")),
}


CASES = [(layout, stage) for layout in LAYOUTS for stage in STAGES]


def config_of(*keys: str, family: str = "llama", world_size: int = 1) -> RunConfig:
    model = [override(f"model.{key}", value) for key, value in {**FAMILIES[family], "num_layers": 4}.items()]
    train = ["train.seq_len=8", "train.global_batch_size=8", "train.num_steps=1"]
    return load_config(None, [*model, *train, *keys], world_size=world_size)


def _state(config: RunConfig) -> tuple[dict[str, Amount], dict[str, Amount], list[int]]:
    """Of this rank: measured, predicted; and what all ranks agree on for each stage."""
    mesh = build_mesh(layout_of(config), device=torch.device("cpu"), zero_group=config.parallel.zero_group)
    training = build(config, mesh=mesh)
    prediction = predict(config, mesh.rank, "cpu")
    stages = account(training).measured
    totals = [sum((amount for amount in stage.values()), Amount()).device for stage in stages]
    return measured_state(training), {name: prediction.of(name) for name in STATE}, totals


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("layout", "zero_stage"), CASES)
def test_prediction_equals_allocation(pool: WorkerPool, layout: str, zero_stage: int, dtypes: str) -> None:
    world_size, keys = LAYOUTS[layout]
    config = config_of(*keys, dtypes, f"parallel.zero_stage={zero_stage}", world_size=world_size)
    should = [stage.state.device for stage in Plan.of(config, "cpu").stages()]
    for rank, (measured, predicted, of_stages) in enumerate(pool.run(_state, world_size, config)):
        assert measured == predicted, f"rank {rank} of stage {stage_of(config, rank)}"
        assert of_stages == should and min(should) > 0


@pytest.mark.parametrize("optimizer", ["adafactor", "sgd", "lion", "muon"])
@pytest.mark.parametrize("zero_stage", [0, 3])
def test_optimizers(pool: WorkerPool, optimizer: str, zero_stage: int) -> None:
    """Muon keeps more for some parameters than for others, so that the ranks of a stage differ."""
    config = config_of(f"optim.name={optimizer}", f"parallel.zero_stage={zero_stage}", world_size=4)
    for measured, predicted, _ in pool.run(_state, 4, config):
        assert measured == predicted


@pytest.mark.parametrize("keys", [("train.grad_dtype=param",), ("train.stochastic_rounding=true",)])
@pytest.mark.parametrize("zero_stage", STAGES)
def test_dtypes(pool: WorkerPool, keys: tuple[str, ...], zero_stage: int) -> None:
    config = config_of("train.precision=bf16", *keys, f"parallel.zero_stage={zero_stage}", world_size=2)
    for measured, predicted, _ in pool.run(_state, 2, config):
        assert measured == predicted


@pytest.mark.parametrize(
    "keys",
    [
        ("parallel.zero_stage=1", "parallel.reduce_policy=microbatch"),
    ],
)
def test_policies(pool: WorkerPool, keys: tuple[str, ...]) -> None:
    config = config_of(*keys, "train.precision=bf16", world_size=4)
    for measured, predicted, _ in pool.run(_state, 4, config):
        assert measured == predicted


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_families(pool: WorkerPool, family: str) -> None:
    config = config_of("parallel.tp=2", "train.precision=bf16", family=family, world_size=4)
    for measured, predicted, _ in pool.run(_state, 4, config):
        assert measured == predicted


def test_another_slice_is_noticed(pool: WorkerPool) -> None:
    """The negative control: the prediction of another stage, or of another world, is not what is allocated."""
    config = config_of("parallel.zero_stage=1", world_size=2)
    measured, predicted, _ = pool.run(_state, 2, config)[0]
    other = config.model_copy(update={"parallel": config.parallel.model_copy(update={"zero_stage": 0})})
    assert measured == predicted
    assert measured["moments"] != predict(other, 0, "cpu").moments
    wider = config_of("parallel.zero_stage=1", "parallel.dp=4", world_size=4)
    assert measured["moments"] != predict(wider, 0, "cpu").moments


@pytest.mark.parametrize("dp", [2, 4, 8])
def test_table_1_of_the_paper(dp: int) -> None:
    """Rajbhandari et al. 2020: 2P + 2P + 12P bytes with gradients in bf16, of which stages cut the last, the last two
    and all by dp."""
    keys = ("train.precision=bf16", "train.grad_dtype=param")
    weights = parameter_table(config_of().model).num_parameters
    by_hand = {
        0: (2, 2, 12),
        1: (2, 2, 12 / dp),
        2: (2, 2 / dp, 12 / dp),
        3: (2 / dp, 2 / dp, 12 / dp),
    }
    for zero_stage, (parameters, gradients, optimizer) in by_hand.items():
        config = config_of(*keys, f"parallel.zero_stage={zero_stage}", world_size=dp)
        got = predict(config, 0, "cuda")
        padded = got.parameters.device * (dp if zero_stage == 3 else 1) // 2
        # Each of 4 layers, the embedding and the head end at a multiple of 256 dp elements, a parameter at one of 256.
        tensors = len(list(parameter_table(config.model)))
        assert weights <= padded < weights + ALIGNMENT * tensors + ALIGNMENT * dp * (4 + 2)
        assert got.parameters.device == parameters * padded
        assert got.gradients.device == gradients * padded
        assert got.master.device + got.moments.device == optimizer * padded


def test_slices_of_a_group_are_larger() -> None:
    """With groups of 2 of 8 ranks a slice is half; the padding is that of 8."""
    keys = ("train.precision=bf16", "parallel.zero_stage=3")
    whole = predict(config_of("train.precision=bf16", "parallel.zero_stage=0", world_size=8), 0, "cuda").state.device
    grouped = predict(config_of(*keys, "parallel.zero_group=2", world_size=8), 0, "cuda").state.device
    assert grouped * 2 == whole
    assert predict(config_of(*keys, world_size=8), 0, "cuda").state.device * 8 == whole


def test_gradients_are_of_either_dtype() -> None:
    wide, narrow = (
        predict(config_of("train.precision=bf16", f"train.grad_dtype={dtype}"), 0, "cuda")
        for dtype in ("fp32", "param")
    )
    assert wide.gradients.device == 2 * narrow.gradients.device and wide.master == narrow.master


def test_stochastic_rounding_has_no_master_weights() -> None:
    got = predict(config_of("train.precision=bf16", "train.stochastic_rounding=true"), 0, "cuda")
    assert got.master == Amount() and got.moments.device == 4 * got.parameters.device


def test_offload_moves_bytes_and_needs_buffers() -> None:
    keys = ("train.precision=bf16", "parallel.zero_stage=3")
    plain = predict(config_of(*keys, world_size=2), 0, "cuda")
    places = {"cpu": "host", "nvme": "disk"}
    for place, where in places.items():
        moved = ("offload.optimizer", "offload.gradients", "offload.parameters")
        extra = [f"{key}={place}" for key in moved] + ["offload.dir=/tmp"] * (place == "nvme")
        got = predict(config_of(*keys, *extra, world_size=2), 0, "cuda")
        assert got.state.device == 0 and getattr(got.state, where) == plain.state.device
        assert got.buffers.device > plain.buffers.device
    on_cpu = predict(config_of(*keys, "offload.optimizer=cpu", world_size=2), 0, "cpu")
    assert on_cpu == predict(config_of(*keys, world_size=2), 0, "cpu"), "on a CPU main memory is the device"


WITHOUT_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("torch is not for the planner")

sys.meta_path.insert(0, Blocked())
sys.argv = ["megatron-lite", *{arguments!r}]
{before}
from megatron_lite.cli import main
main()
"""
PLAN = ("plan", "configs/runs/llama3-8b-64xa100.yaml", "--memory", "--world", "128", "--limit")


def _without_torch(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    code = WITHOUT_TORCH.format(arguments=list(arguments), before=before)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


def test_without_torch() -> None:
    fits = _without_torch(*PLAN, "80GiB")
    assert fits.returncode == 0 and "fits: " in fits.stdout, fits.stdout + fits.stderr
    too_small = _without_torch(*PLAN, "8GiB")
    assert too_small.returncode == 1 and "does not fit: " in too_small.stdout, too_small.stderr
    # The negative control: torch cannot be imported there.
    assert "torch is not for the planner" in _without_torch(*PLAN, "80GiB", before="import torch").stderr
