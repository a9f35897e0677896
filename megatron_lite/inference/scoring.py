"""The log-probability of given tokens behind given contexts, and whether greedy decoding would choose them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from megatron_lite.distributed import collectives
from megatron_lite.inference.windows import GROUP, Window, group_microbatches
from megatron_lite.models.transformer import LossHead
from megatron_lite.ops.cross_entropy_shard import IGNORED_TARGET
from megatron_lite.pipeline.runner import PipelineRunner
from megatron_lite.tensor_parallel.vocab import VocabParallelLossHead

CHUNK_BYTES = 64 << 20  # of logits that exist at a time


class RowScores(nn.Module):
    """In place of a head that sums losses: ``x[T, H]``, targets ``[B, S]`` to float64 ``[B, 2]``.

    Of each row the sum of the log-probabilities of its targets, and how many of them are not the most likely token.
    Targets that are ignored count for neither.
    """

    def __init__(self, head: LossHead | VocabParallelLossHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, x_TH: Tensor, targets_BS: Tensor) -> Tensor:
        targets = targets_BS.flatten()
        scored = torch.nonzero(targets != IGNORED_TARGET)[:, 0]
        values = torch.zeros(len(targets), 2, dtype=torch.float64, device=x_TH.device)
        statistics = torch.float64 if x_TH.dtype == torch.float64 else torch.float32
        vocab_size = self.head.vocab_size if isinstance(self.head, VocabParallelLossHead) else len(self.head.weight)
        for chunk in scored.split(max(1, CHUNK_BYTES // (vocab_size * x_TH.element_size()))):
            logits = self.head.logits(x_TH[chunk]).to(statistics)
            wanted = targets[chunk]
            picked = logits.log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0]
            misses = logits.argmax(dim=-1) != wanted
            values[chunk] = torch.stack([picked.double(), misses.double()], dim=1)
        return values.view(*targets_BS.shape, 2).sum(dim=1)

    def logits(self, x_TH: Tensor) -> Tensor:
        """Those of the head."""
        logits: Tensor = self.head.logits(x_TH)
        return logits


@torch.no_grad()
def score_windows(runner: PipelineRunner, windows: Sequence[Window], max_tokens: int) -> list[tuple[float, bool]]:
    """Of each window the log-probability of the tokens that are scored in it, and whether all are the most likely ones.

    Every rank of the mesh calls it with the same windows, and gets the same answer. The windows are dealt to the
    data-parallel ranks by length, so that those of one microbatch, of at most ``max_tokens`` tokens, are alike. The
    head of the last stage is a `RowScores`.
    """
    mesh = runner.mesh
    order = sorted(range(len(windows)), key=lambda n: -windows[n].num_inputs)[mesh.dp.index :: mesh.dp.size]
    found: list[tuple[int, float, bool]] = []
    for numbers in _alike(windows, order, max_tokens):
        rows = [[windows[number]] for number in numbers]
        height = max(1, max_tokens // windows[numbers[0]].num_inputs)
        (microbatches,) = group_microbatches(rows, height, mesh.device)
        values = runner.evaluate(microbatches)
        if values and mesh.tp.is_first:
            of_rows = torch.cat(values).tolist()
            found += [(number, total, misses == 0) for number, (total, misses) in zip(numbers, of_rows, strict=False)]
    everywhere = [one for part in collectives.gather_objects(found, mesh.world) for one in part]
    return [(total, is_greedy) for _, total, is_greedy in sorted(everywhere)]


def _alike(windows: Sequence[Window], order: Sequence[int], max_tokens: int) -> Iterator[tuple[int, ...]]:
    """The numbers of windows that run together, longest first."""
    start = 0
    while start < len(order):
        height = max(1, max_tokens // windows[order[start]].num_inputs)
        yield tuple(order[start : start + height * GROUP])
        start += height * GROUP
