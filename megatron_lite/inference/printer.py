"""What ``megatron-lite generate`` shows: text as it comes, or one JSON object for each prompt."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TextIO

from megatron_lite.inference.generate import Completion

BOLD, PLAIN = "\x1b[1m", "\x1b[0m"


class Printer:
    """Prints each prompt with its continuation, in the order of the prompts.

    Texts grow together, and one can be shown at a time: that of the first prompt that is not over is printed as it
    comes, and the others catch up when it is their turn. Prompts are bold on a terminal.
    """

    def __init__(self, prompts: Sequence[str], out: TextIO | None = None) -> None:
        self._prompts, self._out = prompts, sys.stdout if out is None else out
        self._waiting = ["" for _ in prompts]
        self._is_over = [False for _ in prompts]
        self._current = -1

    def on_token(self, prompt: int, token_id: int, text: str) -> None:
        self._waiting[prompt] += text
        self._print(prompt)

    def on_end(self, prompt: int, text: str, completion: Completion) -> None:
        self._waiting[prompt] += text
        self._is_over[prompt] = True
        self._print(prompt)

    def print_all(self, completions: Sequence[Completion]) -> None:
        """For what was generated elsewhere: everything at once."""
        for prompt, completion in enumerate(completions):
            self.on_end(prompt, completion.text, completion)

    def _print(self, prompt: int) -> None:
        if self._current < 0:
            self._begin(0)
        while prompt == self._current:
            self._out.write(self._waiting[prompt])
            self._waiting[prompt] = ""
            if self._is_over[prompt]:
                self._out.write("\n")
                if prompt + 1 < len(self._prompts):
                    self._begin(prompt + 1)
                    prompt += 1
                    continue
                self._current = len(self._prompts)
            break
        self._out.flush()

    def _begin(self, prompt: int) -> None:
        self._current = prompt
        text = self._prompts[prompt]
        if prompt > 0:
            self._out.write("\n")
        self._out.write(f"{BOLD}{text}{PLAIN}" if self._out.isatty() else text)


def as_json(prompt: str, prompt_ids: Sequence[int], completion: Completion) -> str:
    """One line: prompt, its ids, the text that follows, its ids, why it ended, and the score of a beam."""
    record: dict[str, object] = {
        "prompt": prompt,
        "prompt_ids": list(prompt_ids),
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish": completion.finish,
    }
    if completion.score is not None:
        record["score"] = completion.score
    return json.dumps(record, ensure_ascii=False)
