from __future__ import annotations

import pytest
import torch

from megatron_lite.config.layout_rules import even_stages
from megatron_lite.config.schema import KernelsConfig
from megatron_lite.models.families import parameter_table
from megatron_lite.models.transformer import Transformer
from megatron_lite.pipeline.partition import cut_stage, layers_of_stage
from megatron_lite.train.build import stage_of
from tests.models.tiny import model_config

SPLITS = {"even": (2, 2, 2), "by remainder": (3, 2, 2, 2), "by hand": (1, 4, 2), "one stage": (5,), "one each": (1, 1)}


def test_stages_are_even_and_the_first_take_the_remainder() -> None:
    assert even_stages(5, 2) == (3, 2)
    assert even_stages(5, 4) == (2, 1, 1, 1)
    for num_layers in range(1, 40):
        for num_stages in range(1, num_layers + 1):
            stages = even_stages(num_layers, num_stages)
            assert len(stages) == num_stages and sum(stages) == num_layers
            assert list(stages) == sorted(stages, reverse=True) and stages[0] - stages[-1] <= 1


def test_fewer_layers_than_stages_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 layers cannot fill 4 pipeline stages: use parallel\.pp=3"):
        even_stages(3, 4)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_layers_of_all_stages_are_all_layers_in_order(split: tuple[int, ...]) -> None:
    layers = [layer for stage in range(len(split)) for layer in layers_of_stage(split, stage)]
    assert layers == list(range(sum(split)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_the_stages_together_are_the_model(split: tuple[int, ...], family: str) -> None:
    """Each parameter is on one stage, under its global name: the one that ``stage_of`` says."""
    config = model_config(family, num_layers=sum(split))
    found: dict[str, int] = {}
    for stage in range(len(split)):
        with torch.device("meta"):
            model = Transformer(config, KernelsConfig())
        cut_stage(model, split, stage)
        names = {name for name, _ in model.named_parameters()}
        assert not names & found.keys()
        found |= dict.fromkeys(names, stage)
        assert (model.embedding is not None) == (stage == 0)
        assert (model.head is not None) == (model.final_norm is not None) == (stage == len(split) - 1)
        assert [int(name) for name in model.layers] == list(layers_of_stage(split, stage))
    assert found == {spec.name: stage_of(spec.name, split) for spec in parameter_table(config)}


def test_a_split_that_says_otherwise_is_noticed() -> None:
    with torch.device("meta"):
        model = Transformer(model_config(num_layers=5), KernelsConfig())
    cut_stage(model, (3, 2), 1)
    assert list(model.layers) == ["3", "4"] != [str(layer) for layer in layers_of_stage((2, 3), 1)]
