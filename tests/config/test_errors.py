"""What a user is told: everything at once, each with its place, its rule and a legal value that is really legal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_lite.config import ConfigError, Problem, load_config
from megatron_lite.config.keys import leaf_fields
from megatron_lite.config.yaml_text import dump, flow, parse
from tests.config.model_cases import BROKEN_MODELS
from tests.config.pipeline_cases import BROKEN_PIPELINES

GOOD = """\
model: {family: llama, vocab_size: 97, hidden_size: 64, num_layers: 4, num_heads: 8, num_kv_heads: 4, max_seq_len: 64}
train: {seq_len: 32, micro_batch_size: 2, global_batch_size: 8, num_steps: 50}
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD, encoding="utf-8")
    return path


def problems_of(path: Path | None, overrides: Sequence[str] = (), world_size: int | None = None) -> list[Problem]:
    try:
        load_config(path, overrides, world_size=world_size)
    except ConfigError as error:
        return list(error.problems)
    return []


def test_the_good_one_is_good(good: Path) -> None:
    assert problems_of(good, world_size=2) == []


# (overrides, world size, key, one fix that must be offered)
BROKEN: list[tuple[str, int | None, str, str]] = [
    ("parallel.tp=3", None, "parallel.tp", "parallel.tp=4"),
    ("parallel.tp=3", None, "parallel.tp", "parallel.tp=2"),
    ("parallel.tp=16", None, "parallel.tp", "parallel.tp=8"),
    ("parallel.tp=5 model.num_heads=7 model.head_dim=8 model.num_kv_heads=7", None, "parallel.tp", "parallel.tp=1"),
    (
        "parallel.tp=3 model.num_heads=6 model.head_dim=8 model.num_kv_heads=2 model.ffn_hidden_size=192",
        None,
        "parallel.tp",
        "parallel.tp=2",
    ),
    ("parallel.cp=2", None, "parallel.cp", "parallel.cp=1"),
    ("parallel.tp=2 parallel.pp=3", 8, "parallel.pp", "parallel.pp=4"),
    ("parallel.tp=8", 4, "parallel.tp", "parallel.tp=4"),
    ("parallel.tp=2 parallel.pp=2 parallel.dp=3", 8, "parallel.dp", "parallel.dp=2"),
    ("parallel.tp=3 parallel.pp=3", 8, "parallel.tp", "parallel.tp=2 parallel.pp=4"),
    (
        "parallel.tp=8 parallel.sequence_parallel=true train.seq_len=31 train.micro_batch_size=2",
        None,
        "train.seq_len",
        "train.seq_len=32",
    ),
    ("train.seq_len=65", None, "train.seq_len", "train.seq_len=64"),
    ("checkpoint.keep_every=150 checkpoint.interval=100", None, "checkpoint.keep_every", "checkpoint.keep_every=200"),
    ("checkpoint.keep_every=150 checkpoint.interval=0", None, "checkpoint.keep_every", "checkpoint.interval=150"),
    ("checkpoint.keep_every=150 checkpoint.interval=0", None, "checkpoint.keep_every", "checkpoint.keep_every=null"),
    ("checkpoint.keep_last=0", None, "checkpoint.keep_last", "checkpoint.keep_last=1"),
    ("train.global_batch_size=30 train.micro_batch_size=4", 2, "train.global_batch_size", "train.global_batch_size=32"),
    ("train.global_batch_size=30 train.micro_batch_size=4", 2, "train.global_batch_size", "train.global_batch_size=24"),
    ("train.global_batch_size=9", None, "train.global_batch_size", "train.global_batch_size=8"),
    ("train.global_batch_size=1", 2, "train.global_batch_size", "train.global_batch_size=4"),
    ("optim.warmup_steps=51", None, "optim.warmup_steps", "optim.warmup_steps=50"),
    ("optim.warmup_steps=20 optim.decay_steps=10", None, "optim.decay_steps", "optim.decay_steps=20"),
    (
        "optim.schedule=wsd optim.warmup_steps=20 optim.decay_steps=40",
        None,
        "optim.decay_steps",
        "optim.decay_steps=30",
    ),
    (
        "optim.schedule=wsd optim.warmup_steps=50 optim.decay_steps=60",
        None,
        "optim.decay_steps",
        "optim.warmup_steps=0 optim.decay_steps=50",
    ),
    ("optim.lr=1e-3 optim.min_lr=1e-2", None, "optim.min_lr", "optim.min_lr=0.001"),
    ("train.eval_interval=5", None, "train.eval_interval", "train.eval_interval=0"),
    ("kernels.rms_norm=cuda run.device=cpu", None, "kernels.rms_norm", "kernels.rms_norm=auto"),
    ("kernels.rms_norm=cuda run.device=cpu", None, "kernels.rms_norm", "run.device=cuda"),
    # one key alone
    ("parallel.tp=0", None, "parallel.tp", "parallel.tp=1"),
    ("parallel.tp='2'", None, "parallel.tp", "parallel.tp=2"),
    ("parallel.dp=-1", None, "parallel.dp", "parallel.dp=1"),
    ("train.num_steps=1e3", None, "train.num_steps", "train.num_steps=1000"),
    ("train.precision=bfloat16", None, "train.precision", "train.precision=bf16"),
    ("parallel.zero_stage=4", None, "parallel.zero_stage", "parallel.zero_stage=3"),
    ("parallel.zero_group=3", 4, "parallel.zero_group", "parallel.zero_group=2"),
    ("parallel.zero_group=3", 4, "parallel.zero_group", "parallel.zero_group=4"),
    ("parallel.zero_group=8 parallel.tp=2", 4, "parallel.zero_group", "parallel.zero_group=2"),
    ("parallel.zero_group=0", None, "parallel.zero_group", "parallel.zero_group=1"),
    ("parallel.zero_group=2 parallel.zero_stage=0", 4, "parallel.zero_group", "parallel.zero_stage=1"),
    ("parallel.zero_group=2 parallel.zero_stage=0", 4, "parallel.zero_group", "parallel.zero_group=null"),
    ("parallel.gather_policy=keep", None, "parallel.gather_policy", "parallel.zero_stage=3"),
    (
        "parallel.gather_policy=regather parallel.zero_stage=2",
        None,
        "parallel.gather_policy",
        "parallel.gather_policy=auto",
    ),
    ("parallel.gather_policy=kept", None, "parallel.gather_policy", "parallel.gather_policy=keep"),
    ("parallel.reduce_policy=steps", None, "parallel.reduce_policy", "parallel.reduce_policy=step"),
    ("parallel.sequence_parallel=yes", None, "parallel.sequence_parallel", "parallel.sequence_parallel=true"),
    ("optim.lr=fast", None, "optim.lr", "optim.lr=0.0003"),
    ("optim.beta1=1", None, "optim.beta1", "optim.beta1=0.9"),
    ("optim.lr=.inf", None, "optim.lr", "optim.lr=0.0003"),
    ("run.name='my run'", None, "run.name", "run.name=my-run"),
    ("run.wandb=false", None, "run.wandb", "run.wandb='off'"),
]


@pytest.mark.parametrize(("overrides", "world_size", "key", "fix"), BROKEN + BROKEN_MODELS + BROKEN_PIPELINES)
def test_the_nearest_legal_value_is_legal(
    good: Path, overrides: str, world_size: int | None, key: str, fix: str
) -> None:
    given = _split(overrides)
    found = [problem for problem in problems_of(good, given, world_size) if problem.key == key]
    assert found, f"{overrides} is not refused for {key}"
    offered = [" ".join(option) for problem in found for option in problem.fixes]
    assert fix in offered, f"{fix} is not among {offered}"
    for problem in found:
        assert problem.rule
        assert problem.origin == "command line" or key not in overrides
        for option in problem.fixes:
            left = problems_of(good, [*given, *option], world_size)
            assert (problem.key, problem.rule) not in {(other.key, other.rule) for other in left}
            assert not _same_rule(problem, left), f"{option} does not remove: {problem}"


def _split(overrides: str) -> list[str]:
    """At the spaces that begin a key: values in quotes may hold spaces."""
    parts: list[str] = []
    for word in overrides.split(" "):
        if "=" in word:
            parts.append(word)
        else:
            parts[-1] += " " + word
    return parts


def _same_rule(problem: Problem, others: Sequence[Problem]) -> bool:
    """The numbers in a rule change with the fix; its words do not."""
    words = "".join(char for char in problem.rule if not char.isdigit())
    return any(
        other.key == problem.key and "".join(char for char in other.rule if not char.isdigit()) == words
        for other in others
    )


def test_the_property_test_sees_a_wrong_fix(good: Path) -> None:
    """Negative control: a fix that does not help is seen by the check above."""
    (problem,) = problems_of(good, ["parallel.tp=3"])
    assert _same_rule(problem, problems_of(good, ["parallel.tp=3", "parallel.tp=5"]))
    assert not _same_rule(problem, problems_of(good, ["parallel.tp=3", "parallel.tp=2"]))


def test_every_layout_that_is_refused_comes_with_one_that_loads(good: Path) -> None:
    refused = 0
    for tp in (1, 2, 3, 5, 8, 16):
        for pp in (1, 2, 3, 4, 5):
            for dp in (None, 2, 3):
                given = [f"parallel.tp={tp}", f"parallel.pp={pp}"] + [f"parallel.dp={dp}"] * (dp is not None)
                given.append("train.global_batch_size=96")
                found = problems_of(good, given, 8)
                refused += bool(found)
                for problem in found:
                    assert problem.fixes, str(problem)
                    for option in problem.fixes:
                        assert not _same_rule(problem, problems_of(good, [*given, *option], 8)), str(problem)
                world = [problem for problem in found if "number of processes" in problem.rule]
                for option in world[0].fixes if len(found) == 1 and world else ():
                    assert problems_of(good, [*given, *option], 8) == []
    assert refused > 50


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        GOOD.replace("num_layers: 4", "num_layers: four").replace("seq_len: 32", "seq_len: 128")
        + "paralel: {tp: 2}\nparallel:\n  tp: 3\n  pp: 2\n  pp: 9\n  num_microbatches: 4\noptim: {lr: -1, min_lr: 1}\n",
        encoding="utf-8",
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["tp=2", "train.stepz=3", "oops"])
    expected = {
        "override", "tp", "parallel.pp", "model.num_layers", "parallel.num_microbatches", "paralel", "train.stepz",
        "optim.lr", "parallel.tp", "train.seq_len",
    }  # fmt: skip
    assert {problem.key for problem in caught.value.problems} == expected
    text = str(caught.value)
    assert text.startswith(f"10 problems in {path}:")
    assert "num_layers" in text and f"{path}:1" in text and "parallel.tp=2 or parallel.tp=4" in text
    assert isinstance(caught.value, ValueError)


def test_rules_that_rest_on_an_invalid_value_are_silent(good: Path) -> None:
    assert [p.key for p in problems_of(good, ["parallel.tp=3", "model.num_heads=x"])] == ["model.num_heads"]
    assert [p.key for p in problems_of(good, ["optim.min_lr=1", "optim.lr=0"])] == ["optim.lr"]
    # and those that do not are heard
    assert [p.key for p in problems_of(good, ["optim.min_lr=1", "model.num_heads=x"])] == [
        "model.num_heads",
        "optim.min_lr",
    ]


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("parallel.tpp=2", "parallel.tp"),
        ("parallel.sequence_paralel=true", "parallel.sequence_parallel"),
        ("train.lr=1", "optim.lr"),
        ("lr=1", "optim.lr"),
        ("model.n_layers=1", "model.num_layers"),
        ("optim.warmup=1", "optim.warmup_steps"),
        ("modle.num_layers=1", "model.num_layers"),
        ("model.rope_scaling.typ=linear", "model.rope_scaling.type"),
        ("train.global_batch=1", "train.global_batch_size"),
        ("trian.steps=3", "train.num_steps"),
        ("modle.hidden=1", "model.hidden_size"),
        ("modle.rope_scalling.factr=2", "model.rope_scaling.factor"),
        ("optm.eps=1", "optim.eps"),
    ],
)
def test_unknown_key_suggestion(good: Path, override: str, near: str) -> None:
    found = [p for p in problems_of(good, [override]) if p.rule == "is not a key"]
    assert len(found) == 1 and f"did you mean {near}?" in found[0].advice
    assert near in leaf_fields()


def test_a_key_like_no_other_lists_the_keys(good: Path) -> None:
    for section in ("parallel", "paralel"):
        (problem,) = problems_of(good, [f"{section}.zzzzzz=2"])
        assert problem.advice.startswith("the keys are parallel.tp, ") and "train." not in problem.advice
    (problem,) = problems_of(good, ["zzzzzz.zzzzzz=2"])
    assert problem.advice.startswith("the sections are model, ")


def test_num_microbatches_is_explained(good: Path) -> None:
    (problem,) = problems_of(good, ["parallel.num_microbatches=4"])
    assert "derived" in problem.rule and "train.global_batch_size / (train.micro_batch_size * dp)" in problem.rule


def test_broken_yaml_names_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("train:\n  seq_len: [1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"x\.yaml:3:1.*\n.*is not YAML"):
        load_config(path)


@pytest.mark.parametrize("text", ["", "- 1\n", "words\n"])
def test_a_file_without_keys(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    assert problems_of(path)


def test_missing_file_names_its_neighbours(good: Path) -> None:
    (problem,) = problems_of(good.with_name("goood.yaml"))
    assert "no such file" in problem.rule and str(good) in problem.advice
    (problem,) = problems_of(good, [f"model={good.parent}/gud.yaml"])
    assert problem.key == "model" and str(good) in problem.advice
    (problem,) = problems_of(good.parent / "nowhere" / "x.yaml")
    assert "does not exist" in problem.advice


@pytest.mark.parametrize("content", [None, "- 1\n", "", "a: [1\n"], ids=["missing", "a list", "empty", "not YAML"])
def test_a_model_file_that_cannot_be_read_hides_nothing_else(tmp_path: Path, content: str | None) -> None:
    model, run = tmp_path / "model.yaml", tmp_path / "run.yaml"
    if content is not None:
        model.write_text(content, encoding="utf-8")
    train = GOOD.splitlines()[1].replace("seq_len: 32", "seq_len: 0")
    run.write_text(f"model: model.yaml\n{train}\noptim: {{min_lr: 1}}\n", encoding="utf-8")
    found = problems_of(run, ["parallel.tp=3", "model.num_layerz=4", "model.num_heads=-1", "modle.x=1"])
    assert "model.yaml" in str(found[0])
    assert [problem.key for problem in found[1:]] == [
        "modle.x", "model.num_heads", "model.num_layerz", "train.seq_len", "optim.min_lr",
    ]  # fmt: skip
    # and one that can be read in its place: what it holds is judged as well, and parallel.tp with it
    model.write_text(dump(parse(GOOD).value["model"]), encoding="utf-8")
    assert [problem.key for problem in problems_of(run, ["parallel.tp=3"])] == [
        "train.seq_len", "parallel.tp", "optim.min_lr",
    ]  # fmt: skip


def test_files_are_looked_for_when_asked(good: Path, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        (tmp_path / f"tokens{suffix}").touch()
    here, absent = f"data.train={tmp_path}/tokens", f"data.train={tmp_path}/tokenz"
    (tmp_path / "tokenizer.json").touch()
    (tmp_path / "empty").mkdir()
    for prefix in (here, here + ".bin", here + ".idx"):
        for tokenizer in (tmp_path, tmp_path / "tokenizer.json"):
            load_config(good, [prefix, f"data.tokenizer={tokenizer}"], files_exist=True)
    load_config(good, [absent])
    with pytest.raises(ConfigError, match=r"or a folder that holds one; there is no .*empty.tokenizer\.json"):
        load_config(good, [here, f"data.tokenizer={tmp_path}/empty"], files_exist=True)
    for bad in (absent, absent + ".bin"):
        with pytest.raises(ConfigError) as caught:
            load_config(good, [bad, f"init.from_hf={tmp_path}/hf", f"data.tokenizer={tmp_path}/t"], files_exist=True)
        keys = {problem.key: problem for problem in caught.value.problems}
        assert set(keys) == {"data.train", "init.from_hf", "data.tokenizer"}
        assert keys["data.train"].fixes == ((f"data.train=[{tmp_path}/tokens]",),)
    with pytest.raises(ConfigError, match="at least one data set"):
        load_config(good, files_exist=True)


def test_model_file_is_relative_to_the_config(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "runs").mkdir()
    model, train = GOOD.splitlines()
    (tmp_path / "models" / "m.yaml").write_text(dump(parse(model).value["model"]), encoding="utf-8")
    run = tmp_path / "runs" / "r.yaml"
    run.write_text(f"model: ../models/m.yaml\n{train}\n", encoding="utf-8")
    config = load_config(run, ["model.num_layers=3"])
    assert (config.model.num_layers, config.model.hidden_size, config.run.name) == (3, 64, "r")
    # model=PATH replaces the section whichever comes first
    config = load_config(run, ["model.num_layers=2", f"model={tmp_path}/models/m.yaml"])
    assert config.model.num_layers == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("1E3", 1e3), ("-1e+2", -100.0), (".5", 0.5), ("1_000", 1000), ("0x10", 16), ("off", "off"),
        ("no", "no"), ("true", True), ("null", None), ("~", None), ("[1,2]", [1, 2]), ("2026-01-02", "2026-01-02"),
        ("1:30", "1:30"), ("1f1b", "1f1b"), ("'2'", "2"), ("e5", "e5"), ("1e", "1e"),
    ],
)  # fmt: skip
def test_scalars(text: str, value: object) -> None:
    found = parse(text).value
    assert found == value and type(found) is type(value)
    assert parse(flow(value)).value == value
    assert parse(dump({"key": value})).value == {"key": value}


def test_text_on_the_command_line_needs_no_quotes(good: Path) -> None:
    config = load_config(good, ["run.name=2026", "run.wandb=off", "optim.lr=3e-4", "data.valid=[a,b]", "data.train=c"])
    assert (config.run.name, config.run.wandb, config.optim.lr) == ("2026", "off", 3e-4)
    assert (config.data.valid, config.data.train) == (("a", "b"), ("c",))
