"""SentencePiece models (Kudo and Richardson, 2018) as Hugging Face `tokenizers`, without the sentencepiece library.

A .model file is a protocol buffer, ModelProto of src/sentencepiece_model.proto in google/sentencepiece. The fields
that matter here, by number:

    1 pieces (repeated)      1 piece, 2 score (float), 3 type
    2 trainer_spec           3 model_type, 24 treat_whitespace_as_suffix, 35 byte_fallback, 40 unk_id, 42 eos_id
    3 normalizer_spec        2 precompiled_charsmap, 3 add_dummy_prefix, 4 remove_extra_whitespaces,
                             5 escape_whitespaces
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatron_lite.utils.files import DataError

SUFFIX = ".model"
_SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_UNIGRAM, _BPE = 1, 2
_MODEL_TYPES = {_UNIGRAM: "unigram", _BPE: "bpe", 3: "word", 4: "char"}
# Of pieces in a unigram model that are no normal ones. What stands for no text has one so low that no text is read as
# it. That of users' symbols is what SentencePiece gives them: any normal piece has a lower one.
_SCORES = {_UNKNOWN: -1e6, _CONTROL: -1e6, _USER_DEFINED: -0.1, _UNUSED: -1e6, _BYTE: -1e6}


@dataclass(frozen=True)
class _Piece:
    text: str
    score: float
    type: int


@dataclass(frozen=True)
class _Model:
    pieces: tuple[_Piece, ...]
    model_type: int
    byte_fallback: bool
    space_behind: bool
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool

    def ids_of(self, kind: int) -> list[int]:
        return [number for number, piece in enumerate(self.pieces) if piece.type == kind]


def read_sentencepiece(path: Path) -> Tokenizer:
    """The tokenizer that gives the ids of a SentencePiece model, of type unigram or bpe, for the same text.

    Control symbols such as `</s>` become special tokens. Symbols that the user of the trainer defined are found
    after the text is normalised, so those that normalising changes are not found, and a text that is nothing but
    one of them gets no space in front; those of a unigram model that overlap may be divided in another way. Of two
    readings that a unigram model finds equally likely, up to the rounding of its float32 scores, the other may be
    taken. Where the model has a table of characters to replace (nfkc and the like), `tokenizers` loses some accents
    of a letter that has several.

    Raises:
        DataError: the file cannot be read or is no SentencePiece model, or one of another type.
    """
    try:
        model = _parse(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (IndexError, KeyError, struct.error, UnicodeDecodeError, _Malformed) as error:
        raise DataError(f"{path}: is not a SentencePiece model, or damaged ({error}); copy it again") from error
    unknown = model.ids_of(_UNKNOWN)
    if len(unknown) != 1:
        raise DataError(f"{path}: is not a SentencePiece model: it has {len(unknown)} unknown pieces, one is needed")
    kind = _MODEL_TYPES.get(model.model_type, str(model.model_type))
    if model.model_type not in (_UNIGRAM, _BPE) or model.space_behind or not model.escape_whitespaces:
        what = f"of type {kind}" if model.model_type not in (_UNIGRAM, _BPE) else "with spaces in an unusual place"
        raise DataError(
            f"{path}: is a SentencePiece model {what}, which has no equal in `tokenizers`; "
            "take one of type unigram or bpe, or train one here (--tokenizer-type)"
        )
    return _build(model, unknown[0])


def _build(model: _Model, unknown: int) -> Tokenizer:
    bytes_known = model.byte_fallback and len(model.ids_of(_BYTE)) == 256
    if model.model_type == _UNIGRAM:
        scores = [(piece.text, _SCORES.get(piece.type, piece.score)) for piece in model.pieces]
        tokenizer = Tokenizer(models.Unigram(scores, unknown, bytes_known))
    else:
        vocab = {piece.text: number for number, piece in enumerate(model.pieces)}
        unk = model.pieces[unknown].text
        tokenizer = Tokenizer(
            models.BPE(vocab, _merges(model), unk_token=unk, fuse_unk=True, byte_fallback=bytes_known)
        )
    special = [model.pieces[number].text for number in (unknown, *model.ids_of(_CONTROL))]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    # Spaces are marks by the time that symbols are looked for: SentencePiece never finds one that has a space.
    own = [text for number in model.ids_of(_USER_DEFINED) if " " not in (text := model.pieces[number].text)]
    if model.model_type == _UNIGRAM:
        own = []  # pieces like others, by their score
    tokenizer.normalizer = normalizers.Sequence(list(_normalizers(model, own)))
    # As normalised, or the text behind one would get a prefix like that at the beginning.
    kept = [text for text in own if tokenizer.normalizer.normalize_str(text) == text]
    tokenizer.add_tokens([AddedToken(text, normalized=True) for text in kept])
    if not any(_SPACE in piece.text.lstrip(_SPACE) for piece in model.pieces):
        # No piece reaches over the end of a word: words may be looked up one by one, which is several times faster.
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{_SPACE}*[^{_SPACE}]+|{_SPACE}+"), "isolated")
    strip = [decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _normalizers(model: _Model, own: list[str]) -> Iterator[normalizers.Normalizer]:
    if model.charsmap:
        charsmap = normalizers.Precompiled(model.charsmap)
        if charsmap.normalize_str("\r") == charsmap.normalize_str("\n"):
            # `tokenizers` looks the two up together, and would take them for one.
            yield normalizers.Replace("\r\n", "\n\n")
        yield charsmap
    if model.remove_extra_whitespaces:
        yield normalizers.Replace(Regex(r"\A +| +\z"), "")
        yield normalizers.Replace(Regex(" {2,}"), " ")
    if model.add_dummy_prefix and own:
        # The tokenizer normalises its symbols too, and they have to stay as they are.
        symbols = "|".join(re.escape(text) for text in own)
        yield normalizers.Replace(Regex(rf"\A(?!(?:{symbols})\z)(?=(?m:.))"), _SPACE)
    elif model.add_dummy_prefix:
        yield normalizers.Prepend(_SPACE)
    yield normalizers.Replace(" ", _SPACE)


def _merges(model: _Model) -> list[tuple[str, str]]:
    """The pairs that make a piece, best first. SentencePiece's BPE joins the pair whose piece has the highest score."""
    ids = {piece.text: number for number, piece in enumerate(model.pieces) if piece.type in (_NORMAL, _USER_DEFINED)}
    found = [
        (-model.pieces[number].score, number, ids[text[:cut]], ids[text[cut:]], (text[:cut], text[cut:]))
        for text, number in ids.items()
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]
    return [pair for *_, pair in sorted(found)]


class _Malformed(ValueError):
    pass


def _parse(data: bytes) -> _Model:
    pieces: list[_Piece] = []
    trainer: dict[int, int | bytes] | None = None
    normalizer: dict[int, int | bytes] | None = None
    for number, value in _fields(data):
        if number == 1:
            fields = dict(_fields(_bytes(value)))
            (score,) = struct.unpack("<f", _bytes(fields.get(2, b"\0\0\0\0")))
            pieces.append(_Piece(_bytes(fields[1]).decode("utf-8"), score, _int(fields.get(3, _NORMAL))))
        elif number == 2:
            trainer = dict(_fields(_bytes(value)))
        elif number == 3:
            normalizer = dict(_fields(_bytes(value)))
    if not pieces:
        raise _Malformed("it has no pieces")
    if trainer is None or normalizer is None:  # they come last: a file that was cut between two fields lacks them
        raise _Malformed("it ends before its settings")
    return _Model(
        pieces=tuple(pieces),
        model_type=_int(trainer.get(3, _UNIGRAM)),
        byte_fallback=bool(trainer.get(35, 0)),
        space_behind=bool(trainer.get(24, 0)),
        charsmap=_bytes(normalizer.get(2, b"")),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of the fields of a protocol buffer message: whole numbers, or bytes, fixed-size ones too."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield number, value
            continue
        if wire == 2:
            size, place = _varint(data, place)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise _Malformed(f"wire type {wire} at byte {place}")
        if place + size > len(data):
            raise _Malformed(f"a field of {size} bytes at byte {place} of {len(data)}")
        yield number, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise _Malformed(f"a number without an end at byte {place}")


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise _Malformed("a number where text is expected")
    return value


def _int(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise _Malformed("text where a number is expected")
    return value
