"""Random numbers that have an identity: the value at (seed, name, index) is the same on whatever rank asks for it.

Values come in blocks of fixed size, each from a Philox generator (Salmon et al. 2011) whose key is made of the seed
and the name and whose counter starts at the block's number. A block is always generated whole, by the same code, so a
value does not depend on which slice of the tensor was asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

BLOCK = 1 << 16


def generator(seed: int, name: str, block: int = 0) -> np.random.Generator:
    """A generator of its own for (seed, name, block)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    key = int.from_bytes(digest[:16], "little")
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, block, 0]))


def standard_normal_blocks(seed: int, name: str, start: int, stop: int) -> Iterator[npt.NDArray[np.float64]]:
    """Values ``start .. stop`` of an endless sequence of standard normal numbers, in pieces, in order."""
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        values = generator(seed, name, block).standard_normal(BLOCK)
        first = block * BLOCK
        yield values[max(start - first, 0) : min(stop - first, BLOCK)]


def standard_normal(seed: int, name: str, start: int, stop: int) -> npt.NDArray[np.float64]:
    """Values ``start .. stop`` (flat global indices) in float64."""
    return np.concatenate([np.empty(0), *standard_normal_blocks(seed, name, start, stop)])
