"""What is computed for every sample: in C++ (csrc/data) where it is built, else in numpy, with equal results."""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data import index_reference
from megatron_lite.ops.native import build_report

logger = logging.getLogger(__name__)

NO_LIMIT = 2**63 - 1  # a vocabulary in which every token id lies


@functools.cache
def implementation() -> ModuleType:
    """The compiled module, or the reference, which is said once."""
    try:
        if sys.byteorder != "little":
            raise ImportError("token files are little-endian and this machine is not")
        return importlib.import_module("megatron_lite.data._index")
    except ImportError as error:
        logger.warning(
            "the data index runs in numpy, more slowly: %s; install a C++20 compiler and pybind11, then reinstall with "
            "`pip install -e . --no-build-isolation`",
            build_report().get("index") or error,
        )
        return index_reference


def permutation(num_samples: int, seed: int, epoch: int, source: int = 0) -> NDArray[np.int64]:
    """The samples 0 .. num_samples - 1 in the order of an epoch, int64 [num_samples].

    Sorts the samples by the first num_samples 64-bit words of the counter-based generator Philox 4x64-10 under the key
    (seed, epoch), from the counter (0, 0, 0, source) (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
    SC 2011, section 3). The raw words are fixed by the paper, whereas numpy may change from release to release what it
    makes of them in `Generator.permutation`.
    """
    return implementation().permutation(num_samples, seed, epoch, source)


def fill_blend(shares: NDArray[np.int64], counts: NDArray[np.int64], sources: NDArray[np.uint16]) -> None:
    """Which source each of the next samples of a blend comes from.

    With weights w = shares / sum(shares), the j-th sample of a source (from 0) may come at place floor(j / w) of the
    blend or later, and has to come before place ceil((j + 1) / w). Of the sources that may come next, the one with the
    earliest deadline does, the first of those that tie. In the first k samples of the blend a source then has more
    than w k - 1 and fewer than w k + 1 (Baruah et al., "Proportionate progress", Algorithmica 15, 1996; taking the
    source with the largest deficit does not keep to that).

    shares: int64 [n], positive, with a sum of at most 2**61. counts: int64 [n], samples of each source so far; brought
    up to date. sources: uint16 [num], filled.
    """
    implementation().fill_blend(shares, counts, sources)


def gather_tokens(
    file: NDArray[Any],
    first: NDArray[np.int64],
    rows: NDArray[np.int64],
    vocab_size: int,
    tokens: NDArray[np.int64],
    targets: NDArray[np.int64],
) -> int:
    """Copies samples out of a token file.

    Row rows[n] of `tokens` gets the tokens first[n] .. first[n] + S - 1 of `file` (integers [num_tokens]), the same row
    of `targets` those one further on. first, rows: int64 [num]; tokens, targets: int64 [B, S], filled.

    Returns the first n whose sample has an id outside 0 .. vocab_size - 1, or -1.
    """
    return implementation().gather_tokens(file, first, rows, vocab_size, tokens, targets)


def mark_documents(
    starts: NDArray[np.int64],
    first: NDArray[np.int64],
    rows: NDArray[np.int64],
    documents: NDArray[np.int32],
    positions: NDArray[np.int64],
) -> None:
    """Tells the documents in samples apart.

    In row rows[n], which holds the tokens from position first[n] of a file, `documents` counts documents from 0, and
    `positions` restarts at 0 where one begins; a document that began before the sample counts from the sample's first
    token. starts: int64 [D], rising strictly: where the file's documents begin. first, rows: int64 [num];
    documents int32 [B, S], positions int64 [B, S], filled.
    """
    implementation().mark_documents(starts, first, rows, documents, positions)
