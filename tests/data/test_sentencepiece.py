"""SentencePiece models, against the sentencepiece library: the same ids and the same text."""

from __future__ import annotations

import io
import math
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from megatron_lite.data import DataError
from megatron_lite.data.sentencepiece import read_sentencepiece
from megatron_lite.data.tokenizer import END_OF_DOCUMENT, as_continuation, end_of_document_id, load_tokenizer

SOURCES = sorted((Path(__file__).parents[2] / "megatron_lite" / "data").glob("*.py"))
LINES = [line for path in SOURCES[:8] for line in path.read_text().splitlines() if line.strip()]
# What a model does to text: T5's and Llama's ways, and those in between.
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bytes": {"byte_fallback": True},
    "llama": {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
    },
    "no prefix": {"byte_fallback": True, "add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "own symbols": {"byte_fallback": True, "user_defined_symbols": ["<tool>", "x_y"]},
    "gemma": {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["<tool>", "▁▁", "▁▁▁", "\n\n"],
    },
    "across words": {"split_by_whitespace": False},
}
FIXED = [
    *("", " ", "   ", "a", " a", "a ", "the cat  sat   on", "     five", "x" * 50, "\n\n\t tab\r\n end", "line\n" * 40),
    *(
        "文字 🙂 ünïcödé",
        "é e\u0301 ﬁ ① Ⅷ ½ ＡＢＣ",
        "한국어 テスト नमस्ते ก็ น้ำ",
        "\u3000x\u00a0y",
        "👩‍👩‍👧‍👦 🇩🇪 👍🏽",
        "\x00\x01",
    ),
    *("<s> </s> <unk> <0x0A> </", "▁ already ▁▁", "a <tool> b<tool>", "def f(x):\n    return x\n" * 9),
]


def texts() -> list[str]:
    draw = random.Random(0)
    alphabet = "abcdefrstu the  \n\t.,(){}é文🙂▁_0123"
    noise = ["".join(draw.choice(alphabet) for _ in range(draw.randint(1, 200))) for _ in range(200)]
    return [*FIXED, *noise, *LINES[:300], *("\n".join(LINES[at : at + 20]) for at in range(0, 300, 20))]


def train(folder: Path, kind: str, options: dict[str, Any]) -> tuple[Path, sentencepiece.SentencePieceProcessor]:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=700, model_type=kind, minloglevel=2, **options
    )
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path, sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def is_tie(model: sentencepiece.SentencePieceProcessor, one: list[int], other: list[int]) -> bool:
    """Whether two readings of a text are equally likely: the library adds scores in float32, and ours in float64."""
    scores = [math.fsum(model.get_score(number) for number in ids) for ids in (one, other)]
    return model.decode(one) == model.decode(other) and math.isclose(*scores, rel_tol=1e-6)


# Symbols that are runs of spaces, as Gemma's BPE has them, overlap, and in a unigram model not as here.
@pytest.mark.parametrize(
    ("kind", "options"),
    [*(("unigram", name) for name in MODELS if name != "gemma"), *(("bpe", name) for name in MODELS)],
)
def test_ids_are_those_of_sentencepiece(tmp_path: Path, kind: str, options: str) -> None:
    path, theirs = train(tmp_path, kind, MODELS[options])
    ours = read_sentencepiece(path)
    ours.encode_special_tokens = True  # SentencePiece reads `<s>` in a text as text
    assert ours.get_vocab_size() == theirs.get_piece_size()
    assert all(ours.token_to_id(theirs.id_to_piece(number)) == number for number in range(theirs.get_piece_size()))
    num_ties = 0
    for text in texts():
        ids, found = theirs.encode(text), ours.encode(text, add_special_tokens=False).ids
        if found != ids:
            assert kind == "unigram" and is_tie(theirs, found, ids), repr(text)
            num_ties += 1
        if theirs.unk_id() not in ids:  # which stands for ' ⁇ ' there, and for nothing here
            assert ours.decode(ids) == theirs.decode(ids), repr(text)
    assert num_ties <= len(texts()) // 50
    # Negative control: the comparison sees the difference between two models.
    assert ours.encode("the cat sat").ids != ours.encode("thecat sat").ids


def test_where_it_is_used(tmp_path: Path) -> None:
    path, theirs = train(tmp_path, "bpe", MODELS["llama"])
    for name in (tmp_path, path):  # the file, or the folder of one
        tokenizer = load_tokenizer(name)
        assert end_of_document_id(tokenizer) == theirs.eos_id()
    with pytest.raises(DataError, match="no token"):
        end_of_document_id(tokenizer, END_OF_DOCUMENT)
    rest = as_continuation(tokenizer)
    assert rest is not None and tokenizer.encode("a").tokens[0].startswith("▁") and rest.encode("a").tokens == ["a"]
    own, _ = train(tmp_path, "bpe", MODELS["own symbols"])
    tokenizer, rest = load_tokenizer(own), as_continuation(load_tokenizer(own))
    assert rest is not None and tokenizer.encode("a").tokens[0].startswith("▁") and rest.encode("a").tokens == ["a"]


def test_what_is_no_model(tmp_path: Path) -> None:
    good, _ = train(tmp_path, "bpe", {})
    content = good.read_bytes()
    path = tmp_path / "bad.model"
    for bad in (b"", b"\xff" * 30, b"hello", content[:1000], b"{}", b"\x80\x04\x95pickle"):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=r"bad\.model: is not a SentencePiece model"):
            read_sentencepiece(path)
    for kind in ("char", "word"):
        other, _ = train(tmp_path, kind, {"hard_vocab_limit": False})
        with pytest.raises(DataError, match=f"of type {kind}.*--tokenizer-type"):
            read_sentencepiece(other)
    with pytest.raises(DataError, match="cannot be read"):
        read_sentencepiece(tmp_path / "none.model")
