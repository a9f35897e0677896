"""From tokens to text as they come: whole characters only, and no further than a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# Tokens of the prompt that are decoded along with the first new ones: enough for a character of four bytes, and for
# tokenizers that leave out the space at the very beginning of a text.
CONTEXT_TOKENS = 8


class TextStream:
    """Decodes tokens one after the other. What they say together is what the tokenizer decodes from all of them.

    A character may be spread over several tokens; its bytes are held back until it is complete.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)[-CONTEXT_TOKENS:]
        # What lies before _start no longer changes how the rest decodes; what lies before _told has been given out.
        self._start, self._told = 0, len(self._ids)

    def add(self, token: int) -> str:
        """The text that this token completes."""
        self._ids.append(token)
        text = self._text_after_told()
        return "" if text.endswith(UNFINISHED) else self._tell(text)

    def finish(self) -> str:
        """What was held back: bytes that never became a character."""
        return self._tell(self._text_after_told())

    def _text_after_told(self) -> str:
        told = self._tokenizer.decode(self._ids[self._start : self._told])
        return self._tokenizer.decode(self._ids[self._start :])[len(told) :]

    def _tell(self, text: str) -> str:
        if text:
            self._start, self._told = self._told, len(self._ids)
        return text


class StopStrings:
    """Cuts a stream of text before the first stop string that appears in it.

    Text that may be the beginning of a stop string is held back until that is known.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = tuple(stops), ""
        self.has_stopped = False

    def add(self, text: str) -> str:
        """The part of the text so far that is certain to stay."""
        self._held += text
        found = [place for place in (self._held.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.has_stopped, self._held, text = True, "", self._held[: min(found)]
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def finish(self) -> str:
        """What was held back, for it turned out to be no stop string."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
