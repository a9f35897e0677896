"""A process that encodes texts on one core: run as a file, so that it starts without importing the package.

It reads the tokenizers and the type of ids from standard input, then one request after the other, and answers each on
standard output; all of it is pickled. It ends with its standard input, so it outlives nobody.
"""

from __future__ import annotations

import pickle
import signal
import sys
from array import array
from collections.abc import Sequence
from itertools import chain

from tokenizers import Tokenizer


def encode_pieces(
    tokenizer: Tokenizer, continuation: Tokenizer | None, texts: Sequence[str], begins: Sequence[bool]
) -> list[list[int]]:
    """The ids of each text; `continuation`, if there is one, encodes those that do not begin a document."""
    if continuation is None or all(begins):
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    chosen = list(zip(texts, begins, strict=True))
    sources = {
        wanted: iter(
            by.encode_batch_fast([text for text, first in chosen if first == wanted], add_special_tokens=False)
        )
        for wanted, by in ((True, tokenizer), (False, continuation))
    }
    return [next(sources[first]).ids for first in begins]


def _serve() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the first one ends the others
    source, target = sys.stdin.buffer, sys.stdout.buffer
    serialized, typecode = pickle.load(source)
    tokenizer, continuation = (None if text is None else Tokenizer.from_str(text) for text in serialized)
    assert tokenizer is not None
    for each in (tokenizer, continuation):
        if each is not None:
            each.encode_special_tokens = True  # this alone is not in the JSON
    while True:
        try:
            texts, begins = pickle.load(source)
        except EOFError:
            return
        pieces = encode_pieces(tokenizer, continuation, texts, begins)
        ids, lengths = array(typecode, chain.from_iterable(pieces)), array("q", map(len, pieces))
        pickle.dump((ids.tobytes(), lengths.tobytes()), target, pickle.HIGHEST_PROTOCOL)
        target.flush()


if __name__ == "__main__":
    _serve()
