"""Which layers go to which stage, and the cut of the model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from megatron_lite.models.transformer import Transformer


def layers_of_stage(stage_layers: Sequence[int], stage: int) -> range:
    """Global indices of the layers of ``stage``."""
    first = sum(stage_layers[:stage])
    return range(first, first + stage_layers[stage])


def cut_stage(model: Transformer, stage_layers: Sequence[int], stage: int) -> None:
    """Removes from ``model`` what other stages hold. Layers keep their global names."""
    own = layers_of_stage(stage_layers, stage)
    model.layers = nn.ModuleDict({name: layer for name, layer in model.layers.items() if int(name) in own})
    if stage > 0:
        model.embedding = None
    if stage < len(stage_layers) - 1:
        model.final_norm = model.head = None
