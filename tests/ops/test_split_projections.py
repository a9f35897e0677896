from __future__ import annotations

import torch

from megatron_lite.ops.split_projections import split_projections, split_projections_reference

SHAPES = ((2, 3, 4, 5), (2, 3, 2, 5), (2, 3, 2, 5))


def test_parts_and_gradients_are_those_of_the_reference() -> None:
    x = torch.randn(6, 40, dtype=torch.float64)
    results = []
    for split in (split_projections, split_projections_reference):
        leaf = x.clone().requires_grad_()
        parts = split(leaf, SHAPES)
        # A transposed product leaves a strided gradient, as attention does; the parts weigh differently.
        loss = sum((i + 1) * (part.transpose(1, 2).contiguous() ** 2).sum() for i, part in enumerate(parts))
        loss.backward()
        results.append((*parts, leaf.grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_gradients_are_right() -> None:
    x = torch.randn(6, 40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: split_projections(x, SHAPES), (x,))
