"""Greedy tokens are those of transformers: with and without cache, in batches of unequal prompts, in every layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.topology import Layout
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.inference import decoder as decoder_module
from megatron_lite.inference.decoder import Decoder
from megatron_lite.inference.generate import Completion, GenerateError, Settings, generate
from megatron_lite.inference.source import open_source
from megatron_lite.inference.stage import load_stage
from tests.inference import models
from tests.inference.models import FAMILIES, PROMPTS
from tests.utils.meshes import mesh

NUM_TOKENS = 20
GREEDY = Settings(max_new_tokens=NUM_TOKENS, temperature=0)
BEAMS = Settings(max_new_tokens=8, num_beams=3, length_penalty=0.5, repetition_penalty=1.1)
CHANCE = Settings(max_new_tokens=NUM_TOKENS, temperature=1.5, top_k=50, top_p=0.95, repetition_penalty=1.2, seed=3)
LAYOUTS = {"tp2": Layout(tp=2), "pp2": Layout(pp=2), "dp2": Layout(dp=2), "tp2 pp2": Layout(tp=2, pp=2)}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("transformers")
    return {family: models.write_model(family, tmp_path_factory.mktemp("models") / family) for family in FAMILIES}


def ours(folder: Path, settings: Settings, prompts: list[list[int]] = PROMPTS, **changes: Any) -> list[Completion]:
    """In this process. changes: of the model section."""
    source = open_source(folder)
    if changes:
        source = replace(source, model=source.model.model_copy(update=changes))
    stage = load_stage(source, mesh=mesh(), dtype=torch.float32)
    return generate(stage, prompts, settings, mesh=mesh(), dtype=torch.float32)


def ids_of(completions: list[Completion]) -> list[list[int]]:
    return [list(one.token_ids) for one in completions]


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, list[list[int]]]:
    """The tokens of transformers, prompt by prompt; no choice among them is close."""
    tokens = {}
    for family, folder in folders.items():
        model = models.load_transformers(folder)
        tokens[family] = [models.transformers_tokens(model, prompt, NUM_TOKENS) for prompt in PROMPTS]
        margins = [models.smallest_margin(model, p, c) for p, c in zip(PROMPTS, tokens[family], strict=True)]
        assert min(margins) > 1e-3, f"{family}: {margins}; float32 leaves 1e-5 of rounding: choose another seed"
        assert all(len(set(one)) > 5 for one in tokens[family]), "a text that repeats one token would hide mistakes"
    return tokens


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_transformers(
    folders: dict[str, Path], expected: dict[str, list[list[int]]], family: str, use_cache: bool
) -> None:
    """A batch of prompts of 5, 9 and 3 tokens."""
    assert ids_of(ours(folders[family], replace(GREEDY, use_cache=use_cache))) == expected[family]


def layout_job(layout: Layout, folders: dict[str, Path], all_settings: list[Settings]) -> dict[str, list[Any]]:
    with torch.inference_mode():
        own = build_mesh(layout, device=torch.device("cpu"))
        results = {}
        for family, folder in folders.items():
            stage = load_stage(open_source(folder), mesh=own, dtype=torch.float32)
            results[family] = [
                generate(stage, PROMPTS, settings, mesh=own, dtype=torch.float32) for settings in all_settings
            ]
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_generates_the_same(
    pool: WorkerPool, folders: dict[str, Path], expected: dict[str, list[list[int]]], layout: str
) -> None:
    """Greedy, with beams and by chance, on every rank."""
    settings = [GREEDY, replace(GREEDY, use_cache=False, max_new_tokens=4), BEAMS, CHANCE]
    alone = {family: [ours(folder, one) for one in (BEAMS, CHANCE)] for family, folder in folders.items()}
    results = pool.run(layout_job, LAYOUTS[layout].world_size, LAYOUTS[layout], folders, settings)
    assert len(results) == LAYOUTS[layout].world_size
    for result in results:
        for family in FAMILIES:
            greedy, uncached, beams, chance = map(ids_of, result[family])
            assert greedy == expected[family]
            assert uncached == [one[:4] for one in expected[family]]
            assert [beams, chance] == [ids_of(one) for one in alone[family]]


def test_a_prompt_draws_the_same_whatever_it_is_batched_with(folders: dict[str, Path]) -> None:
    together = ids_of(ours(folders["llama"], CHANCE))
    assert ids_of(ours(folders["llama"], replace(CHANCE, batch_size=1))) == together
    assert ids_of(ours(folders["llama"], replace(CHANCE, max_new_tokens=7))) == [one[:7] for one in together]
    assert ids_of(ours(folders["llama"], replace(CHANCE, seed=4))) != together


def test_bfloat16_generates(folders: dict[str, Path]) -> None:
    """Its rounding may change a choice, so only what both agree on is asked: the first, at the widest margins."""
    stage = load_stage(open_source(folders["qwen2"]), mesh=mesh(), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in stage.parameters()} == {torch.bfloat16}
    rows = [
        generate(stage, PROMPTS, replace(GREEDY, use_cache=cache), mesh=mesh(), dtype=torch.bfloat16)
        for cache in (True, False)
    ]
    assert [one[:2] for one in ids_of(rows[0])] == [one[:2] for one in ids_of(rows[1])]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_position_off_by_one_in_the_cache_changes_the_tokens(
    folders: dict[str, Path], expected: dict[str, list[list[int]]], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: new tokens are told a position that is one too far."""
    right = Decoder._pass

    def wrong(self: Decoder, ids: Tensor, positions: Tensor, past: Any, last: Tensor | None) -> Tensor | None:
        return right(self, ids, positions + (last is None), past, last)

    monkeypatch.setattr(decoder_module.Decoder, "_pass", wrong)
    tokens = ids_of(ours(folders[family], replace(GREEDY, max_new_tokens=NUM_TOKENS - 1)))
    assert all(one != right[: NUM_TOKENS - 1] for one, right in zip(tokens, expected[family], strict=True))


def test_rows_taken_for_equally_long_change_the_tokens(
    folders: dict[str, Path], expected: dict[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: without the lengths of rows the shorter prompts see the filler behind them."""
    right = Decoder._pass

    def wrong(self: Decoder, ids: Tensor, positions: Tensor, past: Any, last: Tensor | None) -> Tensor | None:
        return right(self, ids, positions, past and replace(past, slots=None), last)

    monkeypatch.setattr(decoder_module.Decoder, "_pass", wrong)
    tokens = ids_of(ours(folders["llama"], GREEDY))
    assert [a == b for a, b in zip(tokens, expected["llama"], strict=True)] == [False, True, False]


@pytest.mark.parametrize("window", [None, models.WINDOW - 1])
def test_another_window_changes_the_tokens(
    folders: dict[str, Path], expected: dict[str, list[list[int]]], window: int | None
) -> None:
    """Negative control: the text is longer than the window, and its size matters."""
    tokens = ids_of(ours(folders["mistral"], GREEDY, sliding_window=window))
    assert all(a != b for a, b in zip(tokens, expected["mistral"], strict=True))


def test_a_text_ends_at_an_end_token(folders: dict[str, Path], expected: dict[str, list[list[int]]]) -> None:
    end = expected["llama"][1][6]
    places = [one.index(end) if end in one else None for one in expected["llama"]]
    completions = ours(folders["llama"], replace(GREEDY, end_ids=(end,)))
    for one, whole, place in zip(completions, expected["llama"], places, strict=True):
        assert list(one.token_ids) == (whole if place is None else whole[: place + 1])
        assert one.finish == ("length" if place is None else "end")
    assert {one.finish for one in completions} == {"end", "length"}


def test_prompts_that_cannot_be_continued_are_refused(folders: dict[str, Path]) -> None:
    for prompts, words in (
        ([[1], []], r"prompt 2 of 2 has no tokens"),
        ([[1, 160]], r"token id 160, and the model has 0 to 159"),
        ([[1] * 50], r"50 tokens, and with max_new_tokens=20 .* 64 positions .* gpt2 .*; at most 14 fit"),
    ):
        with pytest.raises(GenerateError, match=words):
            ours(folders["gpt2"], GREEDY, prompts)
    assert len(ours(folders["llama"], GREEDY, [[1] * 50])[0].token_ids) == NUM_TOKENS  # rotary positions have no end


def test_weights_that_are_nan_are_told(folders: dict[str, Path]) -> None:
    stage = load_stage(open_source(folders["llama"]), mesh=mesh(), dtype=torch.float32)
    assert stage.final_norm is not None
    stage.final_norm.weight[3] = float("nan")
    for settings in (GREEDY, BEAMS, CHANCE):
        with pytest.raises(GenerateError, match="logits are not numbers"):
            generate(stage, PROMPTS, settings, mesh=mesh(), dtype=torch.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"num_beams": 2, "length_penalty": float("nan")}, "length_penalty is nan; it must be a number"),
        ({"num_beams": 2, "stop": ("a",)}, "use one"),
        ({"stop": ("",)}, "must not be empty"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(GenerateError, match=words):
        Settings(**changes)
