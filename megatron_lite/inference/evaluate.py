"""Loss, perplexity and bits per byte of texts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import Mesh
from megatron_lite.inference.texts import Text
from megatron_lite.inference.windows import Window, cut_windows, group_microbatches, pack_rows
from megatron_lite.models.transformer import Transformer
from megatron_lite.pipeline.runner import PipelineRunner
from megatron_lite.train.step import loss_weight, sum_losses
from megatron_lite.utils.files import AtomicFile

# Inputs of one forward pass, where nothing else is asked for.
MICROBATCH_TOKENS = 8192


class EvaluationError(ValueError):
    """A model or a text that gives no loss; the message says why and what to do."""


@dataclass(frozen=True)
class Score:
    """How well a text is predicted.

    loss: nats for each scored token. perplexity: e to the loss. bits_per_byte: of the text in UTF-8; None where its
    bytes are unknown, for the reason in no_bytes. num_scored: tokens scored. num_tokens: tokens of the text.
    """

    name: str
    loss: float
    perplexity: float
    bits_per_byte: float | None
    documents: int
    num_tokens: int
    num_scored: int
    text_bytes: int | None
    no_bytes: str = ""


@dataclass(frozen=True)
class Windows:
    """seq_len: most inputs of a window. stride: from one window to the next, at most seq_len. rows: of a microbatch."""

    seq_len: int
    stride: int
    rows: int


@torch.no_grad()
def evaluate_text(
    text: Text, runner: PipelineRunner, windows: Windows, show: Callable[[Text], None] = lambda text: None
) -> tuple[float, Score]:
    """The exact sum of the token losses of a text, and its score. Every rank of the mesh calls it with the same text.

    The windows of the text are dealt to the data-parallel ranks. show: called as the text is read.

    Raises EvaluationError for a text without a token to score and for a loss that is no number, on every rank.
    """
    mesh, num_scored, loss_sums = runner.mesh, 0, list[Tensor]()

    def counted() -> Iterator[Window]:
        nonlocal num_scored
        for stream in text.streams():
            for window in cut_windows(stream, windows.seq_len, windows.stride):
                num_scored += window.num_scored
                yield window

    rows = pack_rows(counted(), windows.seq_len)
    own = islice(rows, mesh.dp.index, None, mesh.dp.size)
    for microbatches in group_microbatches(own, windows.rows, mesh.device):
        loss_sums += runner.evaluate(microbatches)
        show(text)
    if num_scored == 0:
        raise EvaluationError(f"{text.name}: has {text.num_tokens} tokens and none that can be scored; give more text")
    total = sum_losses(mesh, loss_sums)
    refuse_not_finite(text.name, total, runner.model, mesh)
    return total, _score(text.name, total, text.documents, text.num_tokens, num_scored, text.text_bytes, text.no_bytes)


def evaluate_texts(
    texts: Sequence[Text], runner: PipelineRunner, windows: Windows, show: Callable[[Text], None] = lambda text: None
) -> list[Score]:
    """The score of each text and, of several, that of all of them together at the end."""
    results = [evaluate_text(text, runner, windows, show) for text in texts]
    scores = [score for _, score in results]
    if len(scores) == 1:
        return scores
    total = math.fsum(total for total, _ in results)
    documents, num_tokens, num_scored = (
        sum(getattr(score, name) for score in scores) for name in ("documents", "num_tokens", "num_scored")
    )
    sizes = [score.text_bytes for score in scores if score.text_bytes is not None]
    without = next((score.no_bytes for score in scores if score.text_bytes is None), "")
    whole = _score("all", total, documents, num_tokens, num_scored, None if without else sum(sizes), without)
    return [*scores, whole]


def _score(
    name: str, total: float, documents: int, num_tokens: int, num_scored: int, text_bytes: int | None, no_bytes: str
) -> Score:
    loss = loss_weight(num_scored) * total
    try:
        perplexity = math.exp(loss)
    except OverflowError:
        perplexity = math.inf
    # A first token that nothing precedes counts as the mean of the others.
    bits = None if not text_bytes else loss / math.log(2) * (max(num_tokens, num_scored) / text_bytes)
    return Score(name, loss, perplexity, bits, documents, num_tokens, num_scored, text_bytes, no_bytes)


def refuse_not_finite(name: str, total: float, stage: Transformer, mesh: Mesh) -> None:
    """Raises EvaluationError for a total that is NaN or infinite, naming the weights that made it so.

    total: the same on every rank, and so is the error. name: of what was evaluated.
    """
    if math.isfinite(total):
        return
    broken = [key for key, weight in stage.named_parameters() if not bool(torch.isfinite(weight).all())]
    everywhere = sorted({key for keys in collectives.gather_objects(broken, mesh.world) for key in keys})
    if everywhere:
        more = f" and {len(everywhere) - 1} more" if len(everywhere) > 1 else ""
        raise EvaluationError(
            f"the model's weights are not finite: {everywhere[0]}{more} hold NaN or infinity; the run that made them "
            "diverged: evaluate an earlier checkpoint of it"
        )
    raise EvaluationError(f"{name}: the loss is {total}, with weights that are finite; compute in a wider --dtype")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """The content as JSON, numpy's numbers included; whole or not at all. Raises DataError."""
    with AtomicFile(path) as file:
        file.write((json.dumps(content, indent=2, default=float) + "\n").encode())


def check_windows(seq_len: int, stride: int, most: int) -> None:
    """Raises EvaluationError unless 1 <= stride <= seq_len <= most."""
    if not 1 <= seq_len <= most:
        raise EvaluationError(f"--seq-len is {seq_len}; it must lie between 1 and the model's max_seq_len, {most}")
    if not 1 <= stride <= seq_len:
        raise EvaluationError(f"--stride is {stride}; it must lie between 1 and the length of a window, {seq_len}")
