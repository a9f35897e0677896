from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

# An odd vocabulary, so that it is padded over tp; two key-value heads, so that they are replicated at tp=4.
VOCABULARY = 161


def _config(name: str) -> Any:
    import transformers

    if name.startswith("gpt2"):
        return transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=24, n_inner=96,
            tie_word_embeddings=name == "gpt2", bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 24,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if name == "mistral":
        return transformers.MistralConfig(**shape, head_dim=16, sliding_window=5)
    if name == "qwen2":
        return transformers.Qwen2Config(**shape)
    if name == "qwen2-window":
        return transformers.Qwen2Config(**shape, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    return transformers.LlamaConfig(
        **shape, head_dim=16, tie_word_embeddings=name == "llama-tied",
    )  # fmt: skip


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a checkpoint that transformers wrote: 'llama', 'llama-tied', 'mistral' (with a window), 'qwen2',
    'qwen2-window' (on its second layer), 'gpt2' or 'gpt2-untied'.

    Every parameter is random, norms and biases too. Not to be changed: `editable` gives a copy.
    """
    transformers = pytest.importorskip("transformers")
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            torch.manual_seed(5)
            model = transformers.AutoModelForCausalLM.from_config(_config(name), dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_()
            folders[name] = tmp_path_factory.mktemp("original") / name
            model.save_pretrained(folders[name])
        return folders[name]

    return make


class Editable:
    """A copy of a checkpoint whose tensors and config can be changed, and written again with `save`."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.folder = folder
        self.config = json.loads((source / "config.json").read_text())
        self.tensors = load_file(source / "model.safetensors")
        folder.mkdir()
        self.save()

    def save(self) -> Path:
        (self.folder / "config.json").write_text(json.dumps(self.config))
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, self.file)
        return self.folder

    @property
    def file(self) -> Path:
        return self.folder / "model.safetensors"


@pytest.fixture
def editable(original: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Editable]:
    return lambda name: Editable(original(name), tmp_path / "checkpoint")
