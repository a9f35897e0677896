"""Packed weights: the products are those of the layers that they replace, for a row and for many."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.inference.packed import PackedHead, PackedLinear, can_pack
from megatron_lite.inference.source import open_source
from megatron_lite.inference.stage import load_stage
from megatron_lite.models.transformer import Linear
from tests.inference import models
from tests.utils.meshes import mesh

pytestmark = pytest.mark.skipif(
    not can_pack(torch.float32, torch.device("cpu")), reason="this build of torch has no oneDNN"
)


def is_product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether ``y`` is ``x weight^T + bias`` but for rounding.

    No order of adding n numbers in float32 is wrong by more than n 2^-24 times the sum of their sizes (Higham,
    Accuracy and Stability of Numerical Algorithms, section 4.2).
    """
    wide = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    sizes = F.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    return bool(((y.double() - wide).abs() <= (weight.shape[1] + 1) * 2**-24 * sizes).all())


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 33, 200])
@torch.no_grad()
def test_packed_linear(num_rows: int, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    layer = Linear(70, (48, 24, 24), bias=has_bias)
    for parameter in layer.parameters():
        parameter.normal_(generator=generator)
    x = torch.randn(num_rows, 70, generator=generator)
    packed = PackedLinear(layer)
    assert packed.split_sizes == (48, 24, 24)
    assert is_product(packed(x), x, layer.weight, layer.bias)
    assert not is_product(packed(x), x, layer.weight.roll(1, dims=0), layer.bias), "rows in another order must show"


@pytest.mark.parametrize(("family", "is_tied"), [("gpt2", True), ("llama", False)])
@torch.no_grad()
def test_load_stage_packs(tmp_path: Path, family: str, is_tied: bool) -> None:
    pytest.importorskip("transformers")
    stage = load_stage(open_source(models.write_model(family, tmp_path)), mesh=mesh(), dtype=torch.float32)
    assert not [name for name, module in stage.named_modules() if isinstance(module, Linear)]
    assert len([module for module in stage.modules() if isinstance(module, PackedLinear)]) == 4 * len(stage.layers)
    head, embedding = stage.head, stage.embedding
    assert isinstance(head, PackedHead) and embedding is not None
    assert (head.weight is embedding.tokens.weight) == is_tied
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert is_product(head.logits(x), x, head.weight, None)
