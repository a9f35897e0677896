"""What a config makes of its token files: one text or a blend, a split or pairs of their own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_lite.config import RunConfig, load_config
from megatron_lite.data import BatchLoader, BlendedDataset, DataError, IndexedWriter, TokenDataset
from megatron_lite.data import cache as cache_module
from megatron_lite.data.prepare import prepare_corpus
from megatron_lite.train.corpus import Corpus, held_out_files, open_corpus
from tests.train.tiny_run import tiny_config

SEQ_LEN = 4
MODEL = "model.family=llama model.vocab_size=1000 model.hidden_size=32 model.num_layers=1 model.num_heads=4"
TRAIN = f"model.max_seq_len=64 train.seq_len={SEQ_LEN} train.global_batch_size=10 train.num_steps=10"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs a, b and c of ten documents of eight tokens; in a they begin with 100, 110 ... 190, in b with 200."""
    folder = tmp_path_factory.mktemp("pairs")
    for number, name in enumerate("abc", 1):
        with IndexedWriter(folder / name, np.uint16) as writer:
            for document in range(10):
                writer.add_document([100 * number + 10 * document + token for token in range(8)])
    return folder


def config_of(folder: Path, text: str) -> RunConfig:
    overrides = f"{MODEL} {TRAIN} {text}".replace("@", f"{folder}/").split()
    return load_config(None, overrides, world_size=1, files_exist=True)


def opened(config: RunConfig, dp: int = 1, index: int = 0) -> Corpus:
    mesh: Any = SimpleNamespace(world=SimpleNamespace(is_first=index == 0), dp=SimpleNamespace(size=dp, index=index))
    return open_corpus(config, mesh)


def tokens_of(loader: BatchLoader, num_batches: int) -> list[int]:
    parts = [part for n in range(num_batches) for part in loader.batch(n * loader.global_batch_size)]
    return torch.cat([part.tokens.flatten() for part in parts]).tolist()


def test_files_without_weights_are_one_text(pairs: Path) -> None:
    corpus = opened(config_of(pairs, "data.train=[@a,@b] data.shuffle=false"))
    assert isinstance(corpus.train.dataset, TokenDataset) and len(corpus.train.dataset) == 159 // SEQ_LEN
    assert tokens_of(corpus.train, 4)[72:88] == [*range(190, 198), *range(200, 208)]
    assert corpus.valid is None and corpus.valid_tokens_per_byte is None
    corpus.close()


def test_weights_make_a_blend(pairs: Path) -> None:
    corpus = opened(config_of(pairs, "data.train=[@a,@b,@c] data.train_weights=[5,3,2]"))
    assert isinstance(corpus.train.dataset, BlendedDataset) and len(corpus.train.dataset) == 3 * (79 // SEQ_LEN)
    hundreds = np.array(tokens_of(corpus.train, 10)) // 100
    assert np.bincount(hundreds)[1:].tolist() == [200, 120, 80]  # 100 samples of 4 tokens
    corpus.close()


@pytest.mark.parametrize("weights", ["", "data.train_weights=[0.7,0.3]"])
def test_a_split_gives_each_part_documents_of_its_own(pairs: Path, weights: str) -> None:
    config = config_of(pairs, f"data.train=[@a,@b] data.split=[0.6,0.2,0.2] data.shuffle=false {weights}")
    corpus, files = opened(config), held_out_files(config, "test")
    assert corpus.valid is not None and files is not None
    test = TokenDataset(files[0], SEQ_LEN, fractions=files[1])
    documents = [
        {token // 10 for token in tokens_of(corpus.train, 6)},
        {
            int(token) // 10
            for batch in corpus.valid.eval_batches(9)
            for part in batch
            for token in part.tokens.flatten()
        },
        {int(token) // 10 for sample in range(len(test)) for token in test.sample(sample).tokens},
    ]
    assert documents == [{*range(10, 16), *range(20, 26)}, {16, 17, 26, 27}, {18, 19, 28, 29}]
    assert corpus.valid_tokens_per_byte is None
    corpus.close()


def test_pairs_of_their_own(pairs: Path) -> None:
    config = config_of(pairs, "data.train=@a data.valid=@b data.test=@c data.split=[1,0,0]")
    for part, name in (("valid", "b"), ("test", "c")):
        assert held_out_files(config, part) == ((str(pairs / name),), (0.0, 1.0))  # type: ignore[arg-type]
    assert held_out_files(config_of(pairs, "data.train=@a"), "test") is None
    assert held_out_files(config_of(pairs, "data.train=@a data.split=[0.9,0.1,0]"), "test") is None
    corpus = opened(config)
    assert corpus.valid is not None and len(corpus.valid.dataset) == 79 // SEQ_LEN
    assert next(iter(corpus.valid.eval_batches(1)))[0].tokens[0, 0] == 200
    corpus.close()


def test_a_part_that_is_too_small_says_so(pairs: Path) -> None:
    with pytest.raises(DataError, match=r"part 0\.98 \.\. 0\.99 of the documents .* a larger fraction in data\.split"):
        opened(config_of(pairs, "data.train=@a data.split=[0.98,0.01,0.01]"))


def test_a_bad_token_in_any_source_is_found_at_the_start(pairs: Path) -> None:
    for weights in ("", "data.train_weights=[1,1]"):
        config = config_of(pairs, f"data.train=[@a,@c] {weights} model.vocab_size=350")
        with pytest.raises(DataError, match=r"c\.bin: token 40 has the id 350"):
            opened(config)
        assert opened(config, dp=2, index=1).train.num_microbatches == 5  # the other ranks leave that to the first


@pytest.mark.parametrize("text", ["", "data.train_weights=[0.7,0.2,0.1]"])
def test_every_rank_reads_its_part_of_one_order(pairs: Path, text: str) -> None:
    config = config_of(pairs, f"data.train=[@a,@b,@c] {text}")
    whole = opened(config).train
    halves = [opened(config, dp=2, index=index).train for index in range(2)]
    for step in range(12):
        ids = [one for half in halves for one in half.sample_ids(10 * step).flatten().tolist()]
        assert ids == whole.sample_ids(10 * step).flatten().tolist()
    assert halves[0].sample_ids(0).tolist() != halves[1].sample_ids(0).tolist()  # negative control


def test_the_index_is_kept_in_data_cache(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module.IndexCache.__init__, "__defaults__", (0,))
    text = f"data.train=[@a,@b] data.train_weights=[1,2] data.isolate_documents=true data.cache={tmp_path}/cache"
    first = opened(config_of(pairs, text))
    expected = tokens_of(first.train, 10)
    first.close()
    kinds = sorted(path.name.partition("-")[0] for path in (tmp_path / "cache").glob("*.idx"))
    assert kinds == ["blend", "documents", "documents", "order", "order"]
    assert not (pairs / cache_module.FOLDER).exists()
    again = opened(config_of(pairs, text))
    assert tokens_of(again.train, 10) == expected
    again.close()


def test_bits_per_byte_need_the_text_of_the_whole_pair(tmp_path: Path) -> None:
    """`megatron-lite data` wrote down the bytes of the pair; those of a part of it nobody knows."""
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"the cats of number {number} sit on mats; " * 40, encoding="utf-8")
    corpus = tmp_path / "data"
    prepare_corpus(sorted(tmp_path.glob("*.txt")), corpus, vocab_size=300, valid_fraction=0.1, progress=False)
    known = opened(tiny_config(corpus, tmp_path))
    assert known.valid_tokens_per_byte is not None and known.valid_bits_per_byte(1.0) is not None
    known.close()
    split = opened(tiny_config(corpus, tmp_path, "split", "data.valid=[]", "data.split=[0.5,0.5,0]"))
    assert split.valid is not None and split.valid_bits_per_byte(1.0) is None
    split.close()
