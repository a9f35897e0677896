"""The tokenizer's files of an export, and the ids of special tokens that config.json repeats."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.huggingface.config import CONFIG_FILE
from megatron_lite.checkpoint.tensor_files import CheckpointError, read_json
from megatron_lite.config.files import tokenizer_path
from megatron_lite.config.schema import ModelConfig
from megatron_lite.data.tokenizer import end_of_document_id, load_tokenizer, tokenizer_vocab_size
from megatron_lite.utils.files import DataError

GENERATION_FILE = "generation_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
# What may lie beside a tokenizer.json and belongs to it; taken along as it is.
COMPANIONS = (
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SETTINGS = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class Tokens:
    """files: name -> content. ids: keys of config.json -> an id, a list of ids, or None. generation: of
    generation_config.json, where the tokenizer came with one."""

    files: dict[str, bytes] = field(default_factory=dict)
    ids: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(_IDS[:2]))
    generation: dict[str, Any] | None = None

    def generation_config(self) -> dict[str, Any]:
        if self.generation is not None:
            return self.generation
        known = {key: value for key, value in self.ids.items() if value is not None}
        return {"_from_model_config": True, **known}


def tokens_of(model: ModelConfig, source: str | Path) -> Tokens:
    """What an export of ``model`` holds for the tokenizer ``source``, a file or a folder.

    A tokenizer that comes from a Hugging Face folder keeps all its files, the ids of its special tokens, and its
    settings for generation. For any other they are made from the tokenizer.

    Raises CheckpointError where it has more tokens than the model, DataError where it is broken.
    """
    tokenizer, file = load_tokenizer(source), tokenizer_path(source)
    size = tokenizer_vocab_size(tokenizer)
    if size > model.vocab_size:
        raise CheckpointError(
            f"{source}: has {size} tokens, and the model only {model.vocab_size}; "
            "use the tokenizer that its training data was made with"
        )
    if file.name == "tokenizer.json" and (file.parent / TOKENIZER_CONFIG_FILE).is_file():
        return _carried(file, tokenizer)
    return _made(model, tokenizer)


def _carried(file: Path, tokenizer: Any) -> Tokens:
    folder = file.parent
    files = {name: (folder / name).read_bytes() for name in (file.name, *COMPANIONS) if (folder / name).is_file()}
    settings = read_json(folder / TOKENIZER_CONFIG_FILE)
    ids: dict[str, Any] = {}
    for key in _IDS:
        token = settings.get(key.removesuffix("_id"))
        text = token.get("content") if isinstance(token, dict) else token
        ids[key] = tokenizer.token_to_id(text) if isinstance(text, str) else None
    if (folder / CONFIG_FILE).is_file():
        # The model's own say: it may end by several tokens.
        ids |= {key: value for key, value in read_json(folder / CONFIG_FILE).items() if key in _IDS}
    generation = folder / GENERATION_FILE
    return Tokens(files, ids, read_json(generation) if generation.is_file() else None)


def _made(model: ModelConfig, tokenizer: Any) -> Tokens:
    try:
        end: int | None = end_of_document_id(tokenizer)
    except DataError:
        end = None  # a tokenizer of someone else's that ends documents by a name of its own, or not at all
    names = dict.fromkeys(_SETTINGS[:2], None if end is None else tokenizer.id_to_token(end))
    for key, candidates in (("unk_token", ("<unk>", "[UNK]")), ("pad_token", ("<pad>", "[PAD]"))):
        names[key] = next((name for name in candidates if tokenizer.token_to_id(name) is not None), None)
    special = {key: name for key, name in names.items() if name is not None}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.max_seq_len,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        TOKENIZER_CONFIG_FILE: (json.dumps(settings, indent=2) + "\n").encode(),
        "special_tokens_map.json": (json.dumps(special, indent=2) + "\n").encode(),
    }
    return Tokens(files, {"bos_token_id": end, "eos_token_id": end})
