"""The models of this project in EleutherAI's evaluation harness (`lm-eval`, an extra).

The first rank runs the harness and says what to compute; the others wait for its word. So the harness, which may
download and sample, runs once, and requests and results are the same in every layout.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer
from tqdm import tqdm

from megatron_lite.distributed import collectives
from megatron_lite.distributed.faults import is_user_error
from megatron_lite.distributed.mesh import Mesh
from megatron_lite.inference.windows import Window

Scores = list[tuple[float, bool]]
STOP = "stop"
MAX_NEW_TOKENS = 256  # where a task does not say; the harness's own default


class LmEvalError(ValueError):
    """A task, or a request of one, that cannot be computed; the message says why and what to do."""


class Team(AbstractContextManager["Team"]):
    """Calls of the first rank that every rank of the mesh takes part in.

    with Team(mesh, {"score": score}) as team:  # the first rank
        team.call("score", windows)
    Team(mesh, {"score": score}).serve()        # the others, until the first one leaves its block

    """

    def __init__(self, mesh: Mesh, actions: dict[str, Callable[..., Any]]) -> None:
        self._mesh, self._actions = mesh, actions
        self._others_wait = True

    def call(self, action: str, *args: Any) -> Any:
        """What the action returns on this rank; all ranks run it with these arguments."""
        collectives.gather_objects((action, args), self._mesh.world)
        self._others_wait = False
        result = self._actions[action](*args)
        self._others_wait = True
        return result

    def serve(self) -> None:
        """Takes part in the calls of the first rank until there are no more. Raises LmEvalError if it failed."""
        while True:
            action, args = collectives.gather_objects(None, self._mesh.world)[0]
            if action == STOP:
                break
            self._actions[action](*args)
        for message in args:
            raise LmEvalError(message)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._others_wait:  # not after an error in a call, which the others are in as well; a defect is ours to show
            told = (str(error),) if error is not None and is_user_error(error) else ()
            collectives.gather_objects((STOP, told), self._mesh.world)


class MegatronLite(TemplateLM):
    """A model of this project as the harness sees it; lives on the first rank.

    score: the log-probabilities of windows (`score_windows`). complete: the new tokens of each prompt, given the
    prompts, the most new tokens, the strings to stop at, and the harness's arguments for sampling.
    max_length: most tokens that the model reads. prefix, end: the tokens before and behind a text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        score: Callable[[list[Window]], Scores],
        complete: Callable[[list[list[int]], int, list[str], dict[str, Any]], list[list[int]]],
        max_length: int,
        prefix: int,
        end: int,
        block: int,
        quiet: bool,
    ) -> None:
        super().__init__()
        self._encoder: Tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._encoder.no_truncation()
        self._encoder.no_padding()
        self._score, self._complete = score, complete
        self.max_length, self._prefix, self._end = max_length, prefix, end
        self._block, self._quiet = block, quiet

    @property
    def eot_token_id(self) -> int:
        return self._end

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds unless the text begins with them already."""
        if add_special_tokens is None:
            start = self._encoder.decode([self._prefix], skip_special_tokens=False)
            add_special_tokens = not (start and string.startswith(start))
        ids: list[int] = self._encoder.encode(string, add_special_tokens=add_special_tokens).ids
        return ids

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in windows as the harness cuts them."""
        pairs, counts = [], []
        for request in requests:
            windows = get_rolling_token_windows(self.tok_encode(request.args[0]), self._prefix, self.max_length, 1)
            own = [make_disjoint_window(window) for window in windows]
            pairs += [(("", ""), *pair) for pair in own]
            counts.append(len(own))
        totals = iter([total for total, _ in self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)])
        return [sum(next(totals) for _ in range(count)) for count in counts]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> Scores:
        """The log-probability of each continuation, and whether greedy decoding gives it; contexts lose their start."""
        windows = []
        for _, context, continuation in requests:
            if not continuation or len(continuation) > self.max_length:
                raise LmEvalError(
                    f"a continuation of {len(continuation)} tokens cannot be scored: the model reads 1 to "
                    f"{self.max_length} at once"
                )
            tokens = (context + continuation)[-(self.max_length + 1) :]
            windows.append(Window(np.array(tokens, dtype=np.int64), len(tokens) - 1 - len(continuation)))
        order = sorted(range(len(windows)), key=lambda n: -windows[n].num_inputs)
        scores: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(windows), desc="scoring", disable=disable_tqdm or self._quiet) as bar:
            for start in range(0, len(order), self._block):
                numbers = order[start : start + self._block]
                scores.update(zip(numbers, self._score([windows[n] for n in numbers]), strict=True))
                bar.update(len(numbers))
        return [scores[number] for number in range(len(windows))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to a string to stop at or the end of the text."""
        arguments = [request.args for request in requests]
        prompts = [self.tok_encode(context) for context, _ in arguments]
        groups: dict[str, list[int]] = {}
        for number in sorted(range(len(prompts)), key=lambda n: -len(prompts[n])):
            groups.setdefault(json.dumps(arguments[number][1], sort_keys=True), []).append(number)
        texts: dict[int, str] = {}
        with tqdm(total=len(prompts), desc="generating", disable=disable_tqdm or self._quiet) as bar:
            for numbers in groups.values():
                for start in range(0, len(numbers), self._block):
                    block = numbers[start : start + self._block]
                    settings = arguments[block[0]][1]
                    texts.update(zip(block, self._generate([prompts[n] for n in block], settings), strict=True))
                    bar.update(len(block))
        return [texts[number] for number in range(len(prompts))]

    def _generate(self, prompts: list[list[int]], settings: dict[str, Any]) -> list[str]:
        """Texts for prompts with the same settings; a long prompt keeps its end."""
        sampling = dict(normalize_gen_kwargs(settings, MAX_NEW_TOKENS))
        stops = handle_stop_sequences(sampling.pop("until", None), eos=None)
        num_new_tokens = int(sampling.pop("max_gen_toks"))
        if num_new_tokens >= self.max_length:
            raise LmEvalError(
                f"the task asks for {num_new_tokens} new tokens, and the model reads {self.max_length} in all; "
                "set max_gen_toks in the task's generation_kwargs"
            )
        prompts = [prompt[-(self.max_length - num_new_tokens) :] for prompt in prompts]
        found = self._complete(prompts, num_new_tokens, [stop for stop in stops if stop], sampling)
        texts = (self._encoder.decode(ids, skip_special_tokens=True) for ids in found)
        return [postprocess_generated_text(text, stops, None) for text in texts]
