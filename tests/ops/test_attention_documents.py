"""Documents as boundaries: the same bits as documents by their numbers, found once for all layers."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.ops import attention, attention_kernels, native
from megatron_lite.ops.attention import document_bounds
from tests.models.tiny import filled, model_config, token_ids
from tests.ops.attention_plain import documents_of, qkv
from tests.ops.oracle import assert_same_bits, run_with_gradients

DOCUMENTS = documents_of([13, 15, 3], 2)
IN_PIECES = torch.tensor([[0] * 10 + [1] * 11 + [0] * 10])
needs_native = pytest.mark.skipif(native.missing_cpu() is not None, reason=str(native.missing_cpu()))


def bounds_of(documents: Tensor) -> Tensor:
    bounds = attention_kernels.document_bounds(documents)
    assert bounds is not None
    return bounds


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize("queries", [31, 9, 2, 1])
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"causal": False}], ids=["causal", "window", "full"])
def test_boundaries_give_the_bits_of_documents(
    options: dict[str, Any], queries: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer queries than keys come from a cache. A window goes to torch's kernel in chunks, here of 8 queries."""
    monkeypatch.setattr(importlib.import_module("megatron_lite.ops.attention_sdpa"), "WINDOW_CHUNK", 8)
    q, k, v = qkv(2, 31, 4, 2, 16, torch.float32)
    op = functools.partial(attention, backend=backend, **options)
    results = [
        run_with_gradients(functools.partial(op, documents=documents), [q[:, -queries:], k, v])
        for documents in (DOCUMENTS, bounds_of(DOCUMENTS), DOCUMENTS * 0)
    ]
    assert_same_bits(results[0], results[1])
    assert not torch.equal(results[0][2], results[2][2])  # negative control: documents are not one


@needs_native
def test_boundaries_where_a_kernel_wants_them() -> None:
    for backend in ("auto", "cpu"):
        assert torch.equal(document_bounds(DOCUMENTS, torch.float32, backend), bounds_of(DOCUMENTS))
    for documents, dtype, backend in (
        (DOCUMENTS, torch.float32, "sdpa"),
        (DOCUMENTS, torch.float64, "auto"),
        (DOCUMENTS, torch.float64, "reference"),
        (IN_PIECES, torch.float32, "auto"),
    ):
        assert document_bounds(documents, dtype, backend) is documents
    with pytest.raises(ValueError, match=r"kernels\.attention=cpu cannot run for torch\.float64"):
        document_bounds(DOCUMENTS, torch.float64, "cpu")


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_what_is_no_documents_is_refused(backend: str) -> None:
    """Boundaries too: what `document_bounds` gave is not handed to it again."""
    whole = torch.zeros(2, 31, dtype=torch.int64)
    bounds = torch.zeros(2, 31, 2, dtype=torch.int32)
    for wrong in (whole.float(), whole.float() * math.nan, whole[0], bounds, whole > 0):
        with pytest.raises(ValueError, match=r"^document_bounds: documents is \[.*; it takes int \[B, S\]$"):
            document_bounds(wrong, torch.float32, backend)
    with pytest.raises(ValueError, match=r"^document_bounds: documents is .*sparse_coo; it takes a dense tensor$"):
        document_bounds(whole.to_sparse(), torch.float32, backend)


@needs_native
def test_a_microbatch_looks_for_its_boundaries_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And every layer gets the bits that it has from the documents themselves."""
    config = model_config(num_layers=3)
    model, tokens = filled(config, torch.float32), token_ids(*DOCUMENTS.shape)
    find, calls = attention_kernels.document_bounds, []

    def counted(documents: Tensor) -> Tensor | None:
        calls.append(documents)
        return find(documents)

    monkeypatch.setattr(attention_kernels, "document_bounds", counted)
    sequences = model.sequences(*DOCUMENTS.shape, None, DOCUMENTS, torch.empty(()))
    hidden = model.hidden(tokens, sequences)
    assert len(calls) == 1
    by_layer = model.hidden(tokens, dataclasses.replace(sequences, documents=DOCUMENTS))
    assert len(calls) == 1 + config.num_layers
    assert_same_bits([hidden], [by_layer])
