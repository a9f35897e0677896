"""Beam search finds the tokens that transformers finds, however it is told to stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lite.inference.beam import BeamSearch, EarlyStopping
from megatron_lite.inference.generate import Settings, generate
from megatron_lite.inference.source import open_source
from megatron_lite.inference.stage import load_stage
from tests.inference import models
from tests.inference.models import PROMPTS, VOCABULARY
from tests.utils.meshes import mesh

NUM_TOKENS = 10
CASES: list[tuple[int, EarlyStopping, float, float]] = [
    (2, False, 1.0, 1.0),
    (3, True, 1.0, 1.0),
    (4, "never", 1.0, 1.0),
    (4, False, 0.0, 1.0),
    (3, False, 2.0, 1.3),
    (2, True, -1.0, 1.0),
    (4, "never", -0.5, 1.2),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return models.write_model("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def peer(folder: Path) -> Any:
    torch.set_num_threads(1)
    return models.load_transformers(folder)


@pytest.mark.parametrize("num_ends", [0, 1, 12])
@pytest.mark.parametrize(("num_beams", "early_stopping", "length_penalty", "penalty"), CASES)
def test_beams_are_those_of_transformers(
    folder: Path,
    peer: Any,
    num_beams: int,
    early_stopping: EarlyStopping,
    length_penalty: float,
    penalty: float,
    num_ends: int,
) -> None:
    """With no, one and a dozen tokens that end a text: the more there are, the sooner beams end."""
    end_ids = tuple(range(7, VOCABULARY, 13))[:num_ends]
    settings = Settings(
        max_new_tokens=NUM_TOKENS, num_beams=num_beams, early_stopping=early_stopping, end_ids=end_ids,
        length_penalty=length_penalty, repetition_penalty=penalty,
    )  # fmt: skip
    stage = load_stage(open_source(folder), mesh=mesh(), dtype=torch.float32)
    found = generate(stage, PROMPTS, settings, mesh=mesh(), dtype=torch.float32)
    for prompt, one in zip(PROMPTS, found, strict=True):
        expected = models.transformers_tokens(
            peer, prompt, NUM_TOKENS, num_beams=num_beams, early_stopping=early_stopping, end_ids=list(end_ids) or None,
            length_penalty=length_penalty, repetition_penalty=penalty,
        )  # fmt: skip
        assert list(one.token_ids) == expected
        assert one.finish == ("end" if expected[-1] in end_ids else "length")


def test_the_settings_make_a_difference(folder: Path) -> None:
    """Control: the cases above are not one and the same."""
    stage = load_stage(open_source(folder), mesh=mesh(), dtype=torch.float32)
    ends = tuple(range(7, VOCABULARY, 13))
    texts, finishes = set(), set()
    for num_beams, early_stopping, length_penalty, penalty in CASES:
        settings = Settings(
            max_new_tokens=NUM_TOKENS, num_beams=num_beams, early_stopping=early_stopping, end_ids=ends,
            length_penalty=length_penalty, repetition_penalty=penalty,
        )  # fmt: skip
        completions = generate(stage, PROMPTS, settings, mesh=mesh(), dtype=torch.float32)
        texts.add(tuple(one.token_ids for one in completions))
        finishes |= {one.finish for one in completions}
    assert len(texts) >= 4
    assert finishes == {"end", "length"}


def test_wide_beams_find_the_likeliest_text() -> None:
    """Over a Markov chain of 4 tokens, by going through all texts: as many beams as texts miss none."""
    step = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(11)).log_softmax(dim=-1)
    texts = torch.cartesian_prod(*[torch.arange(4)] * 4)
    scores = step[0, texts[:, 0]] + sum(step[texts[:, i], texts[:, i + 1]] for i in range(3))
    greedy, token = [], 0
    for _ in range(4):
        token = int(step[token].argmax())
        greedy.append(token)
    for num_beams, is_exact in ((64, True), (1, False)):
        options: dict[str, Any] = {"length_penalty": 1.0, "early_stopping": False, "device": torch.device("cpu")}
        search = BeamSearch(1, num_beams, 4, (), **options)
        tokens = torch.zeros(num_beams, dtype=torch.int64)
        while not search.is_done:
            _, tokens = search.advance(step[tokens])
        ((best, score),) = search.best()
        likeliest = texts[scores.argmax()].tolist()
        assert list(best) == (likeliest if is_exact else greedy)
        assert likeliest != greedy
        if is_exact:
            assert score == pytest.approx(float(scores.max()) / 4, rel=1e-12)
