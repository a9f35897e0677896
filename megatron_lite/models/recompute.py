"""Activation recomputation: what forward does not keep, backward computes once more (Chen et al. 2016).

What a microbatch saves of each layer for backward:

==========  ==========================================================  ==========================================
mode        not saved                                                   computed twice
==========  ==========================================================  ==========================================
none        nothing                                                     nothing
selective   what attention keeps beside q, k, v and its output: the     the attention of each layer (Korthikanti
            log-sum-exp of the kernels, ``[B, N, S]``, or the scores    et al. 2022, section 5)
            ``[B, N, S, S]`` where a backend has them
full        everything but the input ``[T, H]`` of each group of        the layers, but for the last product of a
            ``every_layers`` layers (the last one may be smaller)       group and the collective behind it
==========  ==========================================================  ==========================================

While a group is in backward, what its layers save is there at once: ``every_layers`` of them. Under sequence
parallelism the input of a group is this rank's shard ``[T / t, H]``, and the collectives of a group run again, in the
same order on all tp ranks. The final norm, the head and the embedding are not recomputed. Gradients have the same bits
in every mode.

Where the backward is split, recomputation belongs to its first half. Inputs of linear layers that it has made are
held until their weight gradients are computed, so recomputation does not lower the memory between the halves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MODES = ("none", "selective", "full")
Layer = Callable[..., Tensor]


@dataclass(frozen=True)
class Recompute:
    """mode: none, selective or full, see the file's header. every_layers: of full, layers in a group, at least 1."""

    mode: str = "none"
    every_layers: int = 1

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"recompute: mode is {self.mode!r}; it takes one of {', '.join(MODES)}")
        if self.every_layers < 1:
            raise ValueError(f"recompute: every_layers is {self.every_layers}; it takes 1 and more")

    def through(self, layers: Sequence[Layer], x: Tensor, context: Any) -> Tensor:
        """``x`` through the layers, each called as ``layer(x, context, recomputes_attention)``.

        Without a backward (`torch.no_grad`: evaluation, generation) nothing is kept and nothing is recomputed.
        """
        mode = self.mode if torch.is_grad_enabled() else "none"
        if mode != "full":
            return _run(layers, x, context, mode == "selective")
        for first in range(0, len(layers), self.every_layers):
            x = recomputed(_run, layers[first : first + self.every_layers], x, context, False)
        return x


def recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """``function(*arguments)``, of which only the arguments are saved: backward calls it again with them.

    Nothing may write to the arguments in between. No random numbers are drawn in a model, so no state of a generator
    is kept.
    """
    # No check of shapes: a fifth of the time that checkpointing itself takes. The number of tensors is still checked.
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False, determinism_check="none")


def _run(layers: Sequence[Layer], x: Tensor, context: Any, recomputes_attention: bool) -> Tensor:
    for layer in layers:
        x = layer(x, context, recomputes_attention)
    return x
