"""Keys and values of the tokens that a model has seen, so that a new token costs one position and not all of them.

Keys are kept after their rotation: a rotary position is a token's own, whatever comes after it. The token at position
p of a row is in slot p of that row; a row that is shorter than others has nothing in the slots behind its end yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class KVCache:
    """Memory for ``max_len`` positions of each row, for the layers of one stage, allocated once.

    layers: global indices. keys, values: ``[layers, B, max_len, K, D]`` for the K key-value heads that this process
    holds.
    """

    def __init__(
        self,
        layers: range,
        batch_size: int,
        max_len: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layers, self.max_len = layers, max_len
        shape = (len(layers), batch_size, max_len, num_kv_heads, head_dim)
        # Zeros: what is not written yet is masked, and the product of a masked weight with a NaN would be one.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def select(self, rows: Tensor, num_keys: int) -> KVCache:
        """A cache whose row i goes on from row ``rows[i]`` of this one, of which the first ``num_keys`` slots count.

        With as many rows as before the memory is this one's; otherwise it is new.
        """
        if rows.numel() == self.keys.shape[1]:
            for memory in (self.keys, self.values):
                memory[:, :, :num_keys] = memory[:, rows, :num_keys]
            return self
        _, _, max_len, num_kv_heads, head_dim = self.keys.shape
        chosen = KVCache(
            self.layers, rows.numel(), max_len, num_kv_heads, head_dim, dtype=self.keys.dtype, device=self.keys.device
        )
        for memory, into in ((self.keys, chosen.keys), (self.values, chosen.values)):
            into[:, :, :num_keys] = memory[:, rows, :num_keys]
        return chosen


@dataclass(frozen=True)
class Past:
    """Where the new tokens of a pass go in a cache, and how much of it they see.

    num_keys: slots that are filled after the pass, in the row that has most. slots: int64 ``[B, S]``, those of the new
    tokens where rows differ in length; None: the last S of ``num_keys`` in every row.
    """

    cache: KVCache
    num_keys: int
    slots: Tensor | None = None

    @property
    def lengths(self) -> Tensor | None:
        """Slots of each row after the pass, int64 ``[B]``; None where every row has ``num_keys``."""
        return None if self.slots is None else self.slots[:, -1] + 1

    def extend(self, layer: int, k_BSKD: Tensor, v_BSKD: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the keys and values of the new tokens, and returns all so far, ``[B, num_keys, K, D]``."""
        cache = self.cache
        assert self.num_keys <= cache.max_len, f"{self.num_keys} positions in a cache of {cache.max_len}"
        keys, values = cache.keys[layer - cache.layers.start], cache.values[layer - cache.layers.start]
        if self.slots is None:
            first = self.num_keys - k_BSKD.shape[1]
            keys[:, first : self.num_keys], values[:, first : self.num_keys] = k_BSKD, v_BSKD
        else:
            rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
            keys[rows, self.slots], values[rows, self.slots] = k_BSKD, v_BSKD
        return keys[:, : self.num_keys], values[:, : self.num_keys]
