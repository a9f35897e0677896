"""Logits of the next token for a batch of sequences, in any layout: the prompts first, then a token at a time.

Rows are filled up on the right, so that prompts of different lengths need no mask: no query sees what comes after it.
Afterwards each row goes on at its own position, and where rows differ attention is told the length of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import Mesh
from megatron_lite.models.cache import Past
from megatron_lite.models.positions import rotary_angles
from megatron_lite.models.transformer import Sequences, Transformer


class Decoder:
    """A batch under way. Every rank of a pipeline makes the same calls; only those of the last stage get logits.

    dtype: of weights and activations. num_new_tokens: that will be asked for, at most. use_cache: without it each
    token computes all positions again, which gives the same tokens and is for tests.
    """

    def __init__(
        self,
        stage: Transformer,
        mesh: Mesh,
        dtype: torch.dtype,
        prompts: Sequence[Sequence[int]],
        num_new_tokens: int,
        *,
        use_cache: bool = True,
    ) -> None:
        self._stage, self._mesh, self._dtype = stage, mesh, dtype
        lengths = [len(prompt) for prompt in prompts]
        self._num_keys, self._is_even = max(lengths), min(lengths) == max(lengths)
        self._lengths = torch.tensor(lengths, device=mesh.device)
        max_len = self._num_keys + num_new_tokens
        self._ids = torch.zeros(len(prompts), max_len, dtype=torch.int64)
        for row, prompt in zip(self._ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        self._ids = self._ids.to(mesh.device)
        self._positions = torch.arange(max_len, device=mesh.device)[None]
        self._rotary = rotary_angles(stage.config, self._positions, dtype) if stage.rotates else None
        like = torch.empty((), dtype=dtype, device=mesh.device)
        self._cache = stage.new_cache(len(prompts), max_len, like) if use_cache else None

    def read_prompts(self) -> Tensor | None:
        """Logits ``[B, V]`` of the token after each prompt, on the last stage."""
        return self._read_all()

    def read_tokens(self, tokens: Tensor) -> Tensor | None:
        """Logits ``[B, V]`` after one more token in each row, ``tokens`` int64 ``[B]``."""
        slots = self._lengths[:, None]
        self._lengths = self._lengths + 1
        self._num_keys += 1
        if self._cache is None:
            self._ids.scatter_(1, slots, tokens[:, None])
            return self._read_all()
        if self._is_even:
            positions = self._positions[:, self._num_keys - 1 : self._num_keys]
            return self._pass(tokens[:, None], positions, Past(self._cache, self._num_keys), last=None)
        return self._pass(tokens[:, None], slots, Past(self._cache, self._num_keys, slots), last=None)

    def select(self, rows: Tensor) -> None:
        """Goes on with row ``rows[i]`` as row i: int64 ``[new B]``."""
        self._ids, self._lengths = self._ids[rows], self._lengths[rows]
        if self._cache is not None:
            self._cache = self._cache.select(rows, self._num_keys)

    def _read_all(self) -> Tensor | None:
        """All rows from their first position on."""
        num_keys = self._num_keys
        past = None if self._cache is None else Past(self._cache, num_keys)
        return self._pass(self._ids[:, :num_keys], self._positions[:, :num_keys], past, last=self._lengths - 1)

    def _pass(self, ids: Tensor, positions: Tensor, past: Past | None, last: Tensor | None) -> Tensor | None:
        """Runs this rank's stage over ``ids [B, S]``. last: the index in S after which each row's logits are wanted."""
        (batch_size, seq_len), pp = ids.shape, self._mesh.pp
        rotary = None
        if self._rotary is not None:
            cosines, sines = self._rotary
            rotary = cosines[0][positions], sines[0][positions]
        sequences = Sequences(batch_size, seq_len, positions, rotary=rotary, past=past)
        inputs = ids
        if not pp.is_first:
            buffer = torch.empty(
                batch_size * seq_len, self._stage.config.hidden_size, dtype=self._dtype, device=self._mesh.device
            )
            inputs = collectives.start_receive(buffer, pp, pp.index - 1).wait()
        x_TH = self._stage.hidden(inputs, sequences)
        if not pp.is_last:
            collectives.start_send(x_TH.contiguous(), pp, pp.index + 1).wait()
            return None
        if last is not None:
            x_TH = x_TH[torch.arange(batch_size, device=x_TH.device) * seq_len + last]
        assert self._stage.head is not None
        logits: Tensor = self._stage.head.logits(x_TH)
        return logits
