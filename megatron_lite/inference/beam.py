"""Beam search: the likeliest continuations, found a token at a time with a fixed number of candidates.

Scores, the length penalty (Wu et al. 2016, arXiv:1609.08144, section 7, without its constants) and the three rules of
when to stop are those of transformers, so that both find the same tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# Below every sum of log-probabilities: what no beam holds yet.
NOTHING = -1e9

EarlyStopping = Literal["never"] | bool


class BeamSearch:
    """The beams of a batch of prompts: ``n`` running ones for each, and the best ``n`` that have ended.

    max_new_tokens: at which every beam ends. end_ids: tokens that end a beam. length_penalty: the sum of a beam's
    log-probabilities is divided by its number of tokens to this power; above 0 favours long ones. early_stopping: a
    prompt is done when n beams have ended (True), when the best running one would, if it ended now, be no better than
    the worst of them (False), or when it never can be better ('never').
    """

    def __init__(
        self,
        num_prompts: int,
        num_beams: int,
        max_new_tokens: int,
        end_ids: tuple[int, ...],
        *,
        length_penalty: float,
        early_stopping: EarlyStopping,
        device: torch.device,
    ) -> None:
        self._num_beams, self._max_new_tokens, self._end_ids = num_beams, max_new_tokens, end_ids
        self._length_penalty, self._early_stopping = length_penalty, early_stopping
        self._length = 0
        shape = (num_prompts, num_beams)
        self._running = torch.zeros(*shape, 0, dtype=torch.int64, device=device)
        self._running_scores = torch.full(shape, NOTHING, dtype=torch.float64, device=device)
        self._running_scores[:, 0] = 0  # all beams of a prompt begin alike: one of them speaks for it
        self._ended = torch.zeros(*shape, max_new_tokens, dtype=torch.int64, device=device)
        self._ended_scores = torch.full(shape, NOTHING, dtype=torch.float64, device=device)
        self._ended_lengths = torch.zeros(shape, dtype=torch.int64, device=device)
        self._is_open = torch.ones(num_prompts, dtype=torch.bool, device=device)
        self.is_done = False

    def advance(self, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Takes ``log_probs [prompts * n, V]`` of every running beam's next token.

        Returns (rows, tokens), both int64 ``[prompts * n]``: the new beam i is the old beam ``rows[i]`` and
        ``tokens[i]``.
        """
        num_prompts, n = self._running_scores.shape
        vocab_size = log_probs.shape[-1]
        totals = log_probs.view(num_prompts, n, vocab_size) + self._running_scores[..., None]
        # So many that n of them go on even if all ends of all beams are among them.
        count = min(max(2, 1 + len(self._end_ids)) * n, n * vocab_size)
        scores, chosen = totals.flatten(1).topk(count, dim=-1)
        beams, tokens = chosen // vocab_size, chosen % vocab_size
        sequences = torch.cat((_take(self._running, beams), tokens[..., None]), dim=-1)
        self._length += 1
        ends = torch.zeros_like(tokens, dtype=torch.bool)
        for end_id in self._end_ids:
            ends |= tokens == end_id
        ends |= self._length >= self._max_new_tokens

        going_on = scores.masked_fill(ends, NOTHING).topk(n, dim=-1).indices
        self._keep_ended(sequences, scores, ends)
        self._running, self._running_scores = _take(sequences, going_on), _take(scores, going_on)
        self._close_prompts(bool(ends.all()))
        first = torch.arange(num_prompts, device=tokens.device)[:, None] * n
        return (first + _take(beams, going_on)).flatten(), _take(tokens, going_on).flatten()

    def best(self) -> list[tuple[tuple[int, ...], float]]:
        """For each prompt the tokens of its best beam, with the end, and its score."""
        lengths, scores = self._ended_lengths[:, 0].tolist(), self._ended_scores[:, 0].tolist()
        rows = self._ended[:, 0].tolist()
        return [(tuple(row[:length]), score) for row, length, score in zip(rows, lengths, scores, strict=True)]

    def _keep_ended(self, sequences: Tensor, scores: Tensor, ends: Tensor) -> None:
        """Puts candidates that end, of the n best, among the ended ones of prompts that are open."""
        n, length = self._num_beams, self._length
        takes = ends[:, :n] & self._is_open[:, None]
        if self._early_stopping is True:
            takes &= ~self._is_full()[:, None]
        new_scores = (scores[:, :n] / length**self._length_penalty).masked_fill(~takes, NOTHING)
        new = torch.nn.functional.pad(sequences[:, :n], (0, self._max_new_tokens - length))
        all_scores = torch.cat((self._ended_scores, new_scores), dim=1)
        self._ended_scores, best = all_scores.topk(n, dim=-1)
        self._ended = _take(torch.cat((self._ended, new), dim=1), best)
        lengths = torch.full_like(self._ended_lengths, length).masked_fill(~takes, 0)
        self._ended_lengths = _take(torch.cat((self._ended_lengths, lengths), dim=1), best)

    def _is_full(self) -> Tensor:
        return (self._ended_lengths > 0).all(dim=1)

    def _close_prompts(self, all_ended: bool) -> None:
        reaches = self._early_stopping == "never" and self._length_penalty > 0
        length = self._max_new_tokens if reaches else self._length
        hoped = self._running_scores[:, 0] / length**self._length_penalty
        self._is_open &= ~self._is_full() | (hoped > self._ended_scores[:, -1])
        all_full = self._early_stopping is True and bool(self._is_full().all())
        self.is_done = all_ended or all_full or not bool(self._is_open.any())


def _take(values: Tensor, beams: Tensor) -> Tensor:
    """Beams ``[prompts, m]`` of ``values [prompts, n, ...]``."""
    prompts = torch.arange(values.shape[0], device=values.device)[:, None]
    return values[prompts, beams]
