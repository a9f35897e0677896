"""Text from a model: prompts in, completions out, in any layout of processes and the same in each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

from megatron_lite.config.schema import ModelConfig
from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import Mesh
from megatron_lite.inference import sampling
from megatron_lite.inference.beam import BeamSearch, EarlyStopping
from megatron_lite.inference.decoder import Decoder
from megatron_lite.inference.stream import StopStrings, TextStream
from megatron_lite.models.families import FAMILIES
from megatron_lite.models.transformer import Transformer

Finish = Literal["end", "length", "stop"]
# In the place of a token, where the logits were NaN.
NOT_A_NUMBER = -1


class GenerateError(ValueError):
    """A setting, a prompt or a model from which nothing can be generated; the message says what to change."""


@dataclass(frozen=True)
class Settings:
    """How the next token is chosen, and when a text ends.

    temperature: 0 takes the likeliest token (greedy). top_k: None for all. repetition_penalty: 1 for none.
    num_beams: above 1 searches with beams, without chance. length_penalty, early_stopping: see `BeamSearch`.
    end_ids: tokens after which a text is over. stop: strings before which it is cut (needs a tokenizer).
    seed: of the random numbers, which belong to (seed, number of the prompt, number of the token).
    batch_size: prompts that are computed together. use_cache: False computes all positions again for each token.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    seed: int = 0
    end_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    batch_size: int = 16
    use_cache: bool = True

    def __post_init__(self) -> None:
        """Raises GenerateError for values that make no sense."""
        for name, is_right, rule in (
            ("max_new_tokens", self.max_new_tokens >= 1, "must be at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "must be 0 (greedy) or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "must be at least 1; leave it out to keep all tokens"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1; 1 keeps all tokens"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "must be above 0; 1 is none"),
            ("length_penalty", math.isfinite(self.length_penalty), "must be a number; 0 makes length no matter"),
            ("num_beams", self.num_beams >= 1, "must be at least 1; 1 is no beam search"),
            ("batch_size", self.batch_size >= 1, "must be at least 1"),
            ("stop", all(self.stop), "must not be empty; leave it out to stop at the end of a text only"),
        ):
            if not is_right:
                raise GenerateError(f"{name} is {getattr(self, name)!r}; it {rule}")
        if self.num_beams > 1 and self.stop:
            raise GenerateError("stop strings end a text while it grows, and beams are texts until the end: use one")


@dataclass(frozen=True)
class Completion:
    """What followed a prompt.

    token_ids: all new tokens, with the one that ended it. text: of them, without special tokens and from no stop
    string on; empty without a tokenizer. finish: 'end' (an end token), 'stop' (a stop string) or 'length'.
    score: of beam search, the beam's sum of log-probabilities over its length to the power of length_penalty.
    """

    token_ids: tuple[int, ...]
    text: str
    finish: Finish
    score: float | None = None


class Listener(Protocol):
    """Is told of every new token of this rank's prompts as it comes, and of what it adds to the text."""

    def on_token(self, prompt: int, token_id: int, text: str) -> None: ...

    def on_end(self, prompt: int, text: str, completion: Completion) -> None:
        """text: what was held back until the end."""


@torch.inference_mode()
def generate(
    stage: Transformer,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    *,
    mesh: Mesh,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None = None,
    listener: Listener | None = None,
) -> list[Completion]:
    """Continues each prompt. Every rank of the mesh calls it with the same prompts, and gets all completions.

    stage: this rank's part of the model, of `load_stage`. Each dp rank takes a part of the prompts. dtype: of the
    stage.

    Raises GenerateError, on every rank, for a prompt that is empty, has a token that the model does not, or is too
    long for the model's positions, and for logits that are NaN.
    """
    check_prompts(stage.config, prompts, settings.max_new_tokens)
    if settings.stop and tokenizer is None:
        raise GenerateError("stop strings need a tokenizer, to see the text")
    own = torch.arange(len(prompts)).tensor_split(mesh.dp.size)[mesh.dp.index].tolist()
    continue_all = _search_beams if settings.num_beams > 1 else _choose_tokens
    completions: list[Completion] = []
    for start in range(0, len(own), settings.batch_size):
        rows = [
            _Row(number, prompts[number], settings, tokenizer, listener)
            for number in own[start : start + settings.batch_size]
        ]
        num_new_tokens = settings.max_new_tokens
        decoder = Decoder(
            stage, mesh, dtype, [row.prompt for row in rows], num_new_tokens, use_cache=settings.use_cache
        )
        continue_all(decoder, rows, settings, mesh)
        completions += [row.completion() for row in rows]
    return [one for part in collectives.gather_objects(completions, mesh.dp) for one in part]


def check_prompts(model: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raises GenerateError for the first prompt that cannot be continued by ``max_new_tokens`` tokens."""
    for number, prompt in enumerate(prompts):
        which = f"prompt {number + 1} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
        if not prompt:
            raise GenerateError(f"{which} has no tokens; the first new one has to follow on something")
        wrong = next((token for token in prompt if not 0 <= token < model.vocab_size), None)
        if wrong is not None:
            raise GenerateError(f"{which} has token id {wrong}, and the model has 0 to {model.vocab_size - 1}")
        room = model.max_seq_len - len(prompt)
        if FAMILIES[model.family].positions == "learned" and max_new_tokens > room:
            fits = f"at most {room} fit" if room > 0 else "none fits: shorten the prompt"
            raise GenerateError(
                f"{which} has {len(prompt)} tokens, and with max_new_tokens={max_new_tokens} it would go beyond the "
                f"{model.max_seq_len} positions that this {model.family} model has learned; {fits}"
            )


class _Row:
    """One prompt and what follows it."""

    def __init__(
        self,
        number: int,
        prompt: Sequence[int],
        settings: Settings,
        tokenizer: Tokenizer | None,
        listener: Listener | None,
    ) -> None:
        self.number, self.prompt, self.finish, self.score = number, prompt, None, None
        self.token_ids: list[int] = []
        self._text: list[str] = []
        self._settings, self._listener = settings, listener
        self._stream = None if tokenizer is None else TextStream(tokenizer, prompt)
        self._stops = StopStrings(settings.stop)

    finish: Finish | None
    score: float | None

    def add(self, token_id: int) -> None:
        """Takes the next token, unless the text is over."""
        if self.finish is not None:
            return
        self.token_ids.append(token_id)
        is_end = token_id in self._settings.end_ids
        text = ""
        if self._stream is not None and not is_end:
            text = self._stops.add(self._stream.add(token_id))
            self._text.append(text)
        if self._listener is not None:
            self._listener.on_token(self.number, token_id, text)
        if is_end:
            self._end("end")
        elif self._stops.has_stopped:
            self._end("stop")
        elif len(self.token_ids) == self._settings.max_new_tokens:
            self._end("length")

    def _end(self, finish: Finish) -> None:
        text = ""
        if self._stream is not None and finish != "stop":
            text = self._stops.add(self._stream.finish()) + self._stops.finish()
            self._text.append(text)
        self.finish = "stop" if self._stops.has_stopped else finish
        if self._listener is not None:
            self._listener.on_end(self.number, text, self.completion())

    def completion(self) -> Completion:
        assert self.finish is not None, "the text is not over"
        return Completion(tuple(self.token_ids), "".join(self._text), self.finish, self.score)


class _Scores:
    """What the last stage needs besides logits: the tokens that each row has had, for the penalty."""

    def __init__(self, prompts: Sequence[Sequence[int]], settings: Settings, like: Tensor) -> None:
        self._penalty = settings.repetition_penalty
        self._seen = torch.zeros(like.shape if self._penalty != 1 else (0, 0), dtype=torch.bool, device=like.device)
        for seen, prompt in zip(self._seen, prompts, strict=False):
            seen[list(prompt)] = True

    def penalise(self, scores: Tensor) -> Tensor:
        return scores if self._penalty == 1 else sampling.penalise_repetition(scores, self._seen, self._penalty)

    def add(self, tokens: Tensor) -> None:
        if self._penalty != 1:
            self._seen.scatter_(1, tokens[:, None], True)

    def select(self, rows: Tensor) -> None:
        if self._penalty != 1:
            self._seen = self._seen[rows]


def _choose_tokens(decoder: Decoder, rows: Sequence[_Row], settings: Settings, mesh: Mesh) -> None:
    """Greedy or by chance: one token for each row at a time, chosen on the last stage."""
    logits = decoder.read_prompts()
    scores = None if logits is None else _Scores([row.prompt for row in rows], settings, logits)
    chances = torch.empty(0)
    if settings.temperature > 0:
        numbers = [sampling.uniforms(settings.seed, row.number, settings.max_new_tokens) for row in rows]
        chances = torch.stack(numbers, dim=1).to(mesh.device)
    for step in range(settings.max_new_tokens):
        tokens = torch.full((len(rows),), NOT_A_NUMBER, device=mesh.device)
        if logits is not None and scores is not None and not logits.isnan().any():
            penalised = scores.penalise(logits)
            if settings.temperature == 0:
                tokens = penalised.argmax(dim=-1)
            else:
                distribution = sampling.probabilities(penalised, settings.temperature, settings.top_k, settings.top_p)
                tokens = sampling.draw(distribution, chances[step])
            scores.add(tokens)
        collectives.broadcast(tokens, mesh.pp, mesh.pp.size - 1)
        for row, token in zip(rows, _numbers(tokens), strict=True):
            row.add(token)
        if all(row.finish is not None for row in rows):
            return
        logits = decoder.read_tokens(tokens)


def _search_beams(decoder: Decoder, rows: Sequence[_Row], settings: Settings, mesh: Mesh) -> None:
    """Beam search on the last stage; the others are told which beams go on, and with what."""
    num_beams = settings.num_beams
    logits = decoder.read_prompts()
    each = torch.arange(len(rows), device=mesh.device).repeat_interleave(num_beams)
    decoder.select(each)
    search = BeamSearch(
        len(rows),
        num_beams,
        settings.max_new_tokens,
        settings.end_ids,
        length_penalty=settings.length_penalty,
        early_stopping=settings.early_stopping,
        device=mesh.device,
    )
    scores = None
    if logits is not None:
        scores = _Scores([row.prompt for row in rows], settings, logits)
        scores.select(each)
        logits = logits[each]
    while True:
        news = torch.full((3, len(each)), NOT_A_NUMBER, device=mesh.device)
        if logits is not None and scores is not None and not logits.isnan().any():
            log_probs = logits.to(torch.float64).log_softmax(dim=-1)
            news[0], news[1] = search.advance(scores.penalise(log_probs))
            news[2] = search.is_done
            scores.select(news[0])
            scores.add(news[1])
        collectives.broadcast(news, mesh.pp, mesh.pp.size - 1)
        _numbers(news[1])
        if news[2, 0]:
            break
        decoder.select(news[0])
        logits = decoder.read_tokens(news[1])
    best = collectives.gather_objects(search.best() if mesh.pp.is_last else None, mesh.pp)[-1]
    for row, (token_ids, score) in zip(rows, best, strict=True):
        row.score = score
        for token_id in token_ids:
            row.add(token_id)


def _numbers(tokens: Tensor) -> list[int]:
    """The token ids. Raises GenerateError, on every rank, where the last stage had no logits to choose from."""
    ids: list[int] = tokens.tolist()
    if NOT_A_NUMBER in ids:
        raise GenerateError(
            "the logits are not numbers (NaN): the weights hold NaN or infinity, or overflow in this dtype; try "
            "--dtype float32, or an earlier checkpoint"
        )
    return ids
