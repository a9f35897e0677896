from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lite.config import RunConfig, load_config
from megatron_lite.models.families import parameter_table
from megatron_lite.verify.layouts import ProofLayout, default_layouts, layout_of_config, legal, parse, pipeline_matrix
from megatron_lite.verify.shrink import SMALL, shrink

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MODELS = sorted((CONFIGS / "models").glob("*.yaml"))
RUNS = sorted((CONFIGS / "runs").glob("*.yaml"))
KEYS = ("train.seq_len=128", "train.global_batch_size=64", "train.num_steps=1000")


def of_model(path: Path, *keys: str) -> RunConfig:
    return load_config(None, [f"model={path}", *KEYS, *keys])


def check(whole: RunConfig, small: RunConfig) -> None:
    """What parallelism can get wrong is still there, and a process runs it in seconds."""
    before, after = whole.model, small.model
    for kept in ("family", "num_heads", "num_kv_heads", "tie_embeddings", "norm_eps", "rope_theta", "init_std"):
        assert getattr(after, kept) == getattr(before, kept), kept
    assert (after.rope_scaling is None) == (before.rope_scaling is None)
    if before.rope_scaling is not None and after.rope_scaling is not None:
        assert after.rope_scaling.type == before.rope_scaling.type
        assert after.rope_scaling.factor == before.rope_scaling.factor
    assert (after.sliding_window is None) == (before.sliding_window is None)
    if after.sliding_window is not None:
        assert after.sliding_window < small.train.seq_len, "a window that hides nothing proves nothing"
    assert parameter_table(after).num_parameters <= SMALL
    assert small.train.global_batch_size * small.train.seq_len <= 256
    assert (small.data.train, small.data.valid, small.data.tokenizer, small.init.from_hf) == ((), (), None, None)
    assert small.train.eval_interval == 0 and small.train.threads == 1
    assert small.optim.weight_decay == whole.optim.weight_decay and small.optim.lr == whole.optim.lr
    # The keys of the copy, read anew, are a config: no rule is broken, and no value is out of range.
    RunConfig.model_validate(small.model_dump())
    ProofLayout().apply(small)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_every_shipped_model(path: Path, dtype: str) -> None:
    whole = of_model(path)
    small = shrink(whole, dtype)
    check(whole, small)
    assert small.train.precision == {"float64": "fp64", "float32": "fp32"}[dtype]
    assert small.model == whole.model or small.model.vocab_size % 2 == 1, "no tp divides the vocabulary of a copy"
    texts = {str(layout) for layout in default_layouts(small)}
    expected = {"tp=2", "tp=2,sp", "tp=2,pp=2", "tp=2,pp=2,dp=2,sp", "pp=2", "pp=4", "dp=2"}
    if whole.model.num_heads % 2:
        expected = {"pp=2", "pp=4", "dp=2"}
    assert expected <= texts


def test_a_batch_that_grows_has_one_size_in_a_proof() -> None:
    """The batches of a proof are its own; the factor on the embedding's gradient is what a layout can get wrong."""
    path = MODELS[0]
    keys = ("train.batch_rampup=[64,32,1000]", "train.global_batch_size=128", "train.embedding_gradient_scale=0.1")
    whole = of_model(path, *keys)
    small = shrink(whole, "float64")
    assert whole.train.batch_rampup is not None and small.train.batch_rampup is None
    assert small.train.embedding_gradient_scale == 0.1
    check(whole, small)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_shipped_run_can_be_proven_in_its_own_layout(path: Path) -> None:
    whole = load_config(path)
    small = shrink(whole, "float64")
    check(whole, small)
    own = layout_of_config(whole)
    assert own is not None
    assert own in default_layouts(small)
    assert len(default_layouts(small)) >= 8


def test_there_are_configs_to_shrink() -> None:
    assert len(MODELS) >= 11 and len(RUNS) >= 4


# (model, keys, the own layout): rules that hold for the whole have to hold for the copy.
OWN_LAYOUTS = {
    "as many stages as a proof runs": ("llama3-8b", ("parallel.pp=8",), "pp=8"),
    "an odd number of heads over tp": ("gpt2-xl", ("parallel.tp=5",), "tp=5"),
    "a dp that is no power of two": ("llama3-8b", ("parallel.dp=3", "train.global_batch_size=66"), "dp=3"),
    "sequence parallel and a short sequence": (
        "llama3-8b",
        ("parallel.tp=8", "parallel.sequence_parallel=true", "train.seq_len=20", "train.micro_batch_size=2"),
        "tp=8,sp",
    ),
    "a chunk for each layer that a copy has": (
        "llama3-8b",
        ("parallel.pp=4", "parallel.schedule=interleaved", "parallel.virtual_stages=4"),
        "pp=4,v=4,dp=2,interleaved",
    ),
    "a schedule of many microbatches": (
        "llama3-8b",
        ("parallel.pp=4", "parallel.schedule=dualpipe-v", "parallel.dp=2"),
        "pp=4,dp=2,dualpipe-v",
    ),
    "recompute of some stages": (
        "llama3-8b",
        ("parallel.pp=2", "parallel.dp=1", "parallel.recompute=[full,selective]", "parallel.recompute_layers=8"),
        "pp=2,recompute=full+selective",
    ),
    "a schedule from a file": (
        "llama3-8b",
        ("parallel.pp=4", "parallel.schedule=own.csv", "parallel.virtual_stages=2", "parallel.dp=2"),
        "pp=4,v=2,dp=2,own.csv",
    ),
    "wsd with warm-up": ("llama3-8b", ("optim.schedule=wsd", "optim.warmup_steps=10"), "dp=8"),
}


@pytest.mark.parametrize("case", OWN_LAYOUTS)
def test_the_copy_allows_the_layout_of_the_whole(case: str) -> None:
    model, keys, text = OWN_LAYOUTS[case]
    config = of_model(CONFIGS / "models" / f"{model}.yaml", *keys)
    assert text in [str(layout) for layout in default_layouts(shrink(config, "float64"))]


def test_a_small_model_is_proven_as_it_is() -> None:
    whole = load_config(CONFIGS / "runs" / "tiny-proof.yaml")
    assert shrink(whole, "float64").model == whole.model
    large = of_model(CONFIGS / "models" / "llama3-8b.yaml")
    assert shrink(large, "float64").model != large.model


def test_layers_without_a_window_stay_without_it() -> None:
    window = ("model.sliding_window=64", "model.sliding_window_from=14")
    small = shrink(of_model(CONFIGS / "models" / "qwen2-7b.yaml", *window), "float64").model
    assert [small.window_of_layer(layer) for layer in range(small.num_layers)] == [None, None, 16, 16]
    tiny = ("model.family=qwen2", "model.hidden_size=64", "model.num_heads=4", "model.vocab_size=97")
    keys = (*tiny, *KEYS, "model.num_layers=3", "model.max_seq_len=128", "model.sliding_window=5")
    small = shrink(load_config(None, [*keys, "model.sliding_window_from=1"]), "float64").model
    assert [small.window_of_layer(layer) for layer in range(3)] == [None, 5, 5]


def test_a_split_by_hand_stays_where_the_depth_does() -> None:
    widths = ("model.hidden_size=64", "model.num_heads=4", "model.vocab_size=97", "model.max_seq_len=64")
    tiny = ("model.family=llama", *widths)
    keys = (*KEYS, "train.seq_len=32", "model.num_layers=5", "parallel.pp=2", "parallel.stage_layers=[1,4]")
    assert shrink(load_config(None, [*tiny, *keys]), "float64").parallel.stage_layers == (1, 4)
    deep = of_model(CONFIGS / "models" / "llama3-8b.yaml", "parallel.pp=2", "parallel.stage_layers=[15,17]")
    assert shrink(deep, "float64").parallel.stage_layers is None


def test_a_measured_split_is_left_out_where_the_depth_changes() -> None:
    for given, expected in (("costs.json", "even"), ("cost", "cost")):
        deep = of_model(CONFIGS / "models" / "llama3-8b.yaml", "parallel.pp=2", f"parallel.partition={given}")
        assert shrink(deep, "float64").parallel.partition == expected


def test_the_copy_has_room_for_the_layouts_that_are_asked_for() -> None:
    whole = of_model(CONFIGS / "models" / "llama3-8b.yaml")
    assert shrink(whole, "float64").model.num_layers == 4, "and no more without them"
    small = shrink(whole, "float64", pipeline_matrix())
    assert legal(small, pipeline_matrix()) == pipeline_matrix()
    assert small.model.num_layers == 16
    assert parameter_table(small.model).num_parameters <= SMALL
    one = [parse("pp=4,zb-v")]
    assert shrink(whole, "float64", one).model.num_layers == 8 and legal(shrink(whole, "float64", one), one) == one


def test_the_copy_of_a_schedule_file_keeps_its_microbatches() -> None:
    keys = ("parallel.pp=4", "parallel.schedule=own.csv", "train.micro_batch_size=2", "train.global_batch_size=60")
    for dp, microbatches in ((1, 30), (2, 15)):
        small = shrink(of_model(CONFIGS / "models" / "llama3-8b.yaml", *keys, f"parallel.dp={dp}"), "float64")
        own = layout_of_config(small)
        assert own is not None and own.apply(small).num_microbatches == microbatches
