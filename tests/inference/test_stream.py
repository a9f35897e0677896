"""Text from tokens as they come: whole characters, all of the text, and nothing from a stop string on."""

from __future__ import annotations

import io

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, Unigram

from megatron_lite.inference.generate import Completion
from megatron_lite.inference.printer import Printer
from megatron_lite.inference.stream import UNFINISHED, StopStrings, TextStream

TEXT = "naïve 🙂🙃 日本語 — done"


def bytes_tokenizer() -> Tokenizer:
    """A token for each byte: every character beyond ASCII is spread over several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: id for id, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def words_tokenizer() -> Tokenizer:
    """Pieces that begin with a space, which the decoder leaves out where a text begins, as SentencePiece does."""
    pieces = [("<unk>", 0.0), ("▁the", -1.0), ("▁cat", -1.0), ("s", -1.0), ("▁sat", -1.0), ("▁", -5.0)]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@pytest.mark.parametrize("num_prompt_tokens", [0, 6, 16])
def test_characters_come_whole(num_prompt_tokens: int) -> None:
    tokenizer = bytes_tokenizer()
    ids = tokenizer.encode(TEXT).ids
    assert len(ids) == len(TEXT.encode()) > len(TEXT)
    stream = TextStream(tokenizer, ids[:num_prompt_tokens])
    pieces = [stream.add(token) for token in ids[num_prompt_tokens:]]
    assert "".join(pieces) == TEXT.encode()[num_prompt_tokens:].decode()
    assert all(len(piece) <= 1 for piece in pieces) and stream.finish() == ""
    naive = [tokenizer.decode([token]) for token in ids]  # the control
    assert any(UNFINISHED in piece for piece in naive)


def test_bytes_that_never_become_a_character_come_at_the_end() -> None:
    tokenizer = bytes_tokenizer()
    ids = tokenizer.encode("a🙂").ids
    stream = TextStream(tokenizer)
    assert [stream.add(token) for token in ids[:-1]] == ["a", "", "", ""]
    assert set(stream.finish()) == {UNFINISHED}
    broken = TextStream(tokenizer)
    pieces = [broken.add(token) for token in [*ids[1:-1], *tokenizer.encode("bc").ids]]
    assert "".join(pieces).endswith("bc") and UNFINISHED in "".join(pieces)


def test_spaces_between_words_are_kept() -> None:
    tokenizer = words_tokenizer()
    ids = tokenizer.encode("the cats sat the cat").ids
    for num_prompt_tokens in (0, 1, 3):
        stream = TextStream(tokenizer, ids[:num_prompt_tokens])
        text = "".join(stream.add(token) for token in ids[num_prompt_tokens:]) + stream.finish()
        assert tokenizer.decode(ids[:num_prompt_tokens]) + text == "the cats sat the cat"
    assert "".join(tokenizer.decode([token]) for token in ids) == "thecatssatthecat"  # the control


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (("END",), "one E two EN three "),
        (("xyz", "\n\n"), "one E two EN three END four\n"),
        (("three", "END", "wo"), "one E t"),
        (("none",), "one E two EN three END four\n\n\nfive EN"),
    ],
)
def test_text_is_cut_before_the_first_stop_string(stops: tuple[str, ...], expected: str, size: int) -> None:
    text = "one E two EN three END four\n\n\nfive EN"
    expected = expected.removesuffix("\n") if "\n\n" in stops else expected
    finder, told = StopStrings(stops), ""
    for start in range(0, len(text), size):
        told += finder.add(text[start : start + size])
        assert expected.startswith(told)
        if finder.has_stopped:
            break
    assert told + finder.finish() == expected
    assert finder.has_stopped == (expected != text)


def test_one_text_is_printed_at_a_time() -> None:
    out = io.StringIO()
    printer = Printer(["A:", "B:", "C:"], out)
    done = Completion((1,), "", "end")
    seen = []
    for prompt, text, is_end in (
        (0, " one", False), (1, " two", False), (2, " three", True), (0, " more", True), (1, " last", True),
    ):  # fmt: skip
        if is_end:
            printer.on_end(prompt, text, done)
        else:
            printer.on_token(prompt, 1, text)
        seen.append(out.getvalue())
    assert seen == [
        "A: one",
        "A: one",
        "A: one",
        "A: one more\n\nB: two",
        "A: one more\n\nB: two last\n\nC: three\n",
    ]
