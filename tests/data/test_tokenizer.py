"""Tokenizers: what goes in comes out, and the same text gives the same file in any process."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from megatron_lite.data import DataError
from megatron_lite.data.tokenizer import (
    END_OF_DOCUMENT,
    as_continuation,
    declared_end,
    end_of_document_id,
    load_tokenizer,
    save_tokenizer,
    tokenizer_vocab_size,
)
from megatron_lite.data.tokenizer_training import TokenizerType, train_tokenizer

TEXT = ["the cat sat on the mat\n" * 50, "def cat(mat):\n    return mat\n" * 50, "ünïcödé 文字 🙂\n" * 20]


STRANGE = ["", " ", "the cat", "  two  spaces\n\n\ttab", "文字 🙂 \x00 never seen: ß", "\r\n\r\n", "▁ e\u0301 ##s"]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_text_comes_back_unchanged(kind: TokenizerType) -> None:
    tokenizer = train_tokenizer([*TEXT, Path(__file__).read_text()], 400, kind)
    for text in STRANGE:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.token_to_id(END_OF_DOCUMENT) == 0
    assert len(tokenizer.encode("tokenizer tokenizer").ids) < 10


def test_wordpiece_gives_words_back_and_no_spaces() -> None:
    tokenizer = train_tokenizer(TEXT, 300, "wordpiece")
    assert tokenizer.token_to_id(END_OF_DOCUMENT) == 0
    assert tokenizer.decode(tokenizer.encode("the cat sat").ids) == "the cat sat"
    # What its docstring says it loses, which is the negative control of the test above.
    assert tokenizer.decode(tokenizer.encode("the\n  cat").ids) == "the cat"
    assert "[UNK]" in tokenizer.encode("the ß").tokens
    assert any(token.startswith("##") for token in tokenizer.get_vocab())


def test_bad_types() -> None:
    with pytest.raises(ValueError, match=r"'bert' is unknown; it must be one of bpe, unigram, wordpiece"):
        train_tokenizer(TEXT, 300, "bert")  # type: ignore[arg-type]


def test_vocabulary() -> None:
    tokenizer = train_tokenizer(TEXT, 300)
    assert tokenizer_vocab_size(tokenizer) == 300
    assert end_of_document_id(tokenizer) == 0 == tokenizer.token_to_id(END_OF_DOCUMENT)
    # No space is put before the text: "the" is not " the".
    assert tokenizer.encode("the").ids != tokenizer.encode(" the").ids
    assert len(tokenizer.encode("the cat").ids) < len("the cat")
    assert tokenizer_vocab_size(train_tokenizer(["a"], 5000)) == 257
    with pytest.raises(ValueError, match="257"):
        train_tokenizer(TEXT, 256)


def test_training_is_deterministic() -> None:
    code = (
        "import hashlib; from megatron_lite.data.tokenizer_training import train_tokenizer; "
        f"print(hashlib.sha256(train_tokenizer({TEXT!r}, 320).to_str().encode()).hexdigest())"
    )
    here = hashlib.sha256(train_tokenizer(TEXT, 320).to_str().encode()).hexdigest()
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert there.stdout.strip() == here
    other = train_tokenizer([*TEXT, "zebra " * 99], 320).to_str()
    assert hashlib.sha256(other.encode()).hexdigest() != here


def test_save_and_load(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXT, 300)
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(path).to_str() == tokenizer.to_str()


def test_bad_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json: no such tokenizer.*megatron-lite data"):
        load_tokenizer(tmp_path)
    for content in ("", "{}", "not json"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(DataError, match="is not a tokenizer"):
            load_tokenizer(tmp_path)


def test_end_of_document_of_other_tokenizers() -> None:
    llama = Tokenizer(models.WordLevel({"a": 0, "</s>": 9}, unk_token="a"))
    llama.pre_tokenizer = pre_tokenizers.Whitespace()
    assert end_of_document_id(llama) == 9
    assert end_of_document_id(llama, "a") == 0
    assert tokenizer_vocab_size(llama) == 10  # ids 1 .. 8 are a gap
    with pytest.raises(DataError, match="<end>"):
        end_of_document_id(llama, "<end>")


def test_the_end_that_a_config_declares(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(TEXT, 300), tmp_path / "tokenizer.json")
    assert declared_end(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    for content in ({"eos_token": "<end>"}, {"eos_token": {"content": "<end>", "lstrip": False}}):
        config.write_text(json.dumps(content))
        assert declared_end(tmp_path) == declared_end(tmp_path / "tokenizer.json") == "<end>"
    config.write_text('{"eos_token": null}')
    assert declared_end(tmp_path) is None
    for bad in ("", "[1]"):
        config.write_text(bad)
        with pytest.raises(DataError, match=r"tokenizer_config\.json: is no JSON object.*--end-token"):
            declared_end(tmp_path)


def test_what_goes_on_gets_no_prefix() -> None:
    words = models.WordLevel({"▁a": 0, "a": 1, "?": 2}, unk_token="?")
    by_normalizer, by_metaspace = Tokenizer(words), Tokenizer(words)
    by_normalizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁")])
    by_metaspace.pre_tokenizer = pre_tokenizers.Metaspace()
    for tokenizer in (by_normalizer, by_metaspace):
        assert tokenizer.encode("a").ids == [0]
        rest = as_continuation(tokenizer)
        assert rest is not None and rest.encode("a").ids == [1]
    assert as_continuation(train_tokenizer(TEXT, 300)) is None
