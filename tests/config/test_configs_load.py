"""Every file under configs/ loads, and survives being written and read again."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lite.config import ConfigError, RunConfig, load_config, to_yaml, with_world

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = sorted((CONFIGS / "runs").glob("*.yaml"))
MODELS = sorted((CONFIGS / "models").glob("*.yaml"))
WORLD_SIZES = {"llama3-8b-64xa100": 64}
DEFAULT_WORLD_SIZE = 8

MILLION = 10**6
PUBLISHED_PARAMETERS = {
    "gpt2-small": 124.44 * MILLION,
    "gpt2-xl": 1557.6 * MILLION,
    "llama2-7b": 6738.4 * MILLION,
    "llama3-8b": 8030.3 * MILLION,
    "llama3.1-8b": 8030.3 * MILLION,
    "llama3-70b": 70553.7 * MILLION,
    "mistral-7b": 7241.7 * MILLION,
    "qwen2-7b": 7615.6 * MILLION,
}


def num_parameters(config: RunConfig) -> int:
    m = config.model
    head = 0 if m.tie_embeddings else m.vocab_size * m.hidden_size
    attention = m.hidden_size * m.head_dim * (2 * m.num_heads + 2 * m.num_kv_heads)
    if m.family != "gpt2":
        attention += m.head_dim * (m.num_heads + 2 * m.num_kv_heads) * (m.family == "qwen2")
        layer = attention + 3 * m.hidden_size * m.ffn_hidden_size + 2 * m.hidden_size
        return m.vocab_size * m.hidden_size + m.num_layers * layer + m.hidden_size + head
    biases = 4 * m.hidden_size + m.ffn_hidden_size + m.hidden_size
    layer = attention + 2 * m.hidden_size * m.ffn_hidden_size + biases + 4 * m.hidden_size
    return (m.vocab_size + m.max_seq_len) * m.hidden_size + m.num_layers * layer + 2 * m.hidden_size + head


def test_there_are_configs() -> None:
    assert {"quickstart", "tiny-proof"} <= {path.stem for path in RUNS}
    assert set(PUBLISHED_PARAMETERS) <= {path.stem for path in MODELS}
    found = {path for path in CONFIGS.rglob("*.yaml") if path.parent.name in ("runs", "models")}
    assert found == {*RUNS, *MODELS}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_run_loads_and_round_trips(path: Path, tmp_path: Path) -> None:
    world_size = WORLD_SIZES.get(path.stem, DEFAULT_WORLD_SIZE)
    config = load_config(path, world_size=world_size)
    assert config.world_size == world_size
    batch = config.num_microbatches * config.train.micro_batch_size * config.dp
    assert batch == config.train.global_batch_size
    assert config == with_world(load_config(path), world_size)
    written = tmp_path / "written.yaml"
    written.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(written) == config
    assert load_config(written, ["optim.lr=0.5"]) != config


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_model_loads(path: Path) -> None:
    config = load_config(CONFIGS / "runs" / "tiny-proof.yaml", [f"model={path}"])
    expected = PUBLISHED_PARAMETERS.get(path.stem)
    if expected is not None:
        assert num_parameters(config) == pytest.approx(expected, rel=1e-4)  # the published number has 4 digits


def test_quickstart_is_the_layout_of_the_readme() -> None:
    config = load_config(CONFIGS / "runs" / "quickstart.yaml", world_size=8)
    assert (config.parallel.tp, config.parallel.pp, config.dp) == (2, 2, 2)
    assert config.num_microbatches >= config.parallel.pp, "with fewer the pipeline is mostly bubble"


def test_a_broken_copy_does_not_load(tmp_path: Path) -> None:
    """Negative control: the checks above can fail."""
    text = (CONFIGS / "runs" / "tiny-proof.yaml").read_text(encoding="utf-8")
    broken = tmp_path / "broken.yaml"
    broken.write_text(text.replace("num_heads: 8", "num_heads: 7"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"model\.hidden_size"):
        load_config(broken)
