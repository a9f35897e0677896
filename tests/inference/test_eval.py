"""The numbers of `megatron-lite eval`: those of transformers, in every layout, and of a model whose loss is known."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from megatron_lite.data import IndexedWriter
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.topology import Layout
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.inference.eval_run import EvalRequest, load_runner, plan_evaluation, score_files
from megatron_lite.inference.evaluate import EvaluationError, Score
from megatron_lite.inference.stage import choose_layout
from tests.inference.tiny_models import END_ID, MAX_SEQ_LEN, OTHER, VERSE, VOCABULARY, make_folder, token_losses

# (tp, pp, processes); dp is the rest.
LAYOUTS = {"single": (1, 1, 1), "tp2": (2, 1, 2), "pp4": (1, 4, 4), "dp3": (1, 1, 3), "tp2-pp2-dp2": (2, 2, 8)}
BOUNDS = {"float64": 1e-10, "float32": 1e-5}  # the design's, relative
# transformers computes norms, rotations and the softmax of attention in float32, also where all else is float64.
REFERENCE = 1e-7


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For matrices as small as these, and beside other processes, a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return make_folder(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return make_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """verse.txt, other.txt, both as lines.jsonl, and both as the pair both.bin and both.idx, without a meta.json."""
    folder = tmp_path_factory.mktemp("texts")
    for name, text in (("verse", VERSE), ("other", OTHER)):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (VERSE, OTHER)))
    return folder


def token_ids(folder: Path, text: str) -> list[int]:
    tokenizer: Tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return list(tokenizer.encode(text).ids)


def write_pair(folder: Path, documents: list[list[int]]) -> str:
    with IndexedWriter(folder / "pair", "uint16") as writer:
        for document in documents:
            writer.add_document(document)
    return str(folder / "pair")


def scores_job(request: EvalRequest) -> list[Score]:
    plan = plan_evaluation(request, torch.distributed.get_world_size())
    layout = choose_layout(
        plan.source.model, tp=request.tp, pp=request.pp, world_size=torch.distributed.get_world_size()
    )
    mesh = build_mesh(layout, device=torch.device("cpu"))
    return score_files(request, plan, load_runner(plan.source, mesh, request.dtype))


def evaluate(pool: WorkerPool, source: Path, *files: object, layout: str = "single", **options: object) -> list[Score]:
    """The scores, which every rank has to agree on."""
    tp, pp, world_size = LAYOUTS[layout]
    options = {"dtype": "float64", **options}
    request = EvalRequest(source, tuple(map(str, files)), tp=tp, pp=pp, **options)  # type: ignore[arg-type]
    first, *others = pool.run(scores_job, world_size, request)
    assert all(scores == first for scores in others)
    return first


def reference_loss(source: Path, streams: list[list[int]], seq_len: int, stride: int) -> float:
    """Mean over all tokens but the first of each stream, each seen from the first window that reaches it."""
    losses = []
    for stream in streams:
        done = 0
        for begin in range(0, len(stream), stride):
            stop = min(begin + seq_len, len(stream) - 1)
            losses += token_losses(source, stream[begin : stop + 1])[done - begin :].tolist()
            done = stop
            if stop == len(stream) - 1:
                break
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize(("seq_len", "stride"), [(MAX_SEQ_LEN, MAX_SEQ_LEN), (48, 13)])
def test_equals_transformers(pool: WorkerPool, folder: Path, texts: Path, seq_len: int, stride: int) -> None:
    (score,) = evaluate(pool, folder, texts / "other.txt", seq_len=seq_len, stride=stride)
    ids = token_ids(folder, OTHER)
    assert score.num_tokens == score.num_scored == len(ids)
    assert score.text_bytes == len(OTHER.encode()) and score.documents == 1
    expected = reference_loss(folder, [[END_ID, *ids]], seq_len, stride)
    assert score.loss == pytest.approx(expected, rel=REFERENCE)
    assert score.perplexity == pytest.approx(math.exp(expected))
    assert score.bits_per_byte == pytest.approx(expected * len(ids) / math.log(2) / len(OTHER.encode()))
    (narrow,) = evaluate(pool, folder, texts / "other.txt", seq_len=seq_len, stride=stride, dtype="float32")
    assert narrow.loss == pytest.approx(expected, rel=BOUNDS["float32"])
    assert narrow.loss != score.loss


def test_more_context_changes_the_loss(pool: WorkerPool, llama: Path, texts: Path) -> None:
    """Negative control: a stride that is ignored would not be seen in a model that does not look back."""
    losses = {evaluate(pool, llama, texts / "other.txt", stride=stride)[0].loss for stride in (64, 32, 16)}
    assert len(losses) == 3


@pytest.mark.parametrize("dtype", BOUNDS)
def test_layouts_agree(pool: WorkerPool, folder: Path, texts: Path, dtype: str) -> None:
    files = (texts / "verse.txt", texts / "lines.jsonl")
    expected = evaluate(pool, folder, *files, dtype=dtype, stride=40, batch_size=3)
    assert [score.name for score in expected] == [*map(str, files), "all"]
    for layout in LAYOUTS:
        found = evaluate(pool, folder, *files, layout=layout, dtype=dtype, stride=40, batch_size=3)
        again = evaluate(pool, folder, *files, layout=layout, dtype=dtype, stride=40, batch_size=3)
        assert found == again, "bitwise the same twice"
        if layout in ("single", "pp4"):
            assert found == expected, "bitwise at the same dp and tp"
        for one, other in zip(found, expected, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=BOUNDS[dtype])
            assert dataclasses.replace(
                one, loss=other.loss, perplexity=other.perplexity, bits_per_byte=other.bits_per_byte
            ) == other  # fmt: skip


def test_the_total_is_that_of_all_tokens(pool: WorkerPool, llama: Path, texts: Path) -> None:
    verse, other, both = evaluate(pool, llama, texts / "verse.txt", texts / "other.txt")
    total = verse.loss * verse.num_scored + other.loss * other.num_scored
    assert both.name == "all" and both.loss == pytest.approx(total / (verse.num_scored + other.num_scored))
    assert both.text_bytes == len((VERSE + OTHER).encode()) and both.documents == 2
    assert both.bits_per_byte == pytest.approx(total / math.log(2) / both.text_bytes)


def test_documents_joined_or_isolated(pool: WorkerPool, llama: Path, texts: Path) -> None:
    ids = [token_ids(llama, text) for text in (VERSE, OTHER)]
    joined, isolated = (evaluate(pool, llama, texts / "lines.jsonl", isolate=isolate)[0] for isolate in (False, True))
    stream = [END_ID, *ids[0], END_ID, *ids[1]]
    assert joined.loss == pytest.approx(reference_loss(llama, [stream], MAX_SEQ_LEN, MAX_SEQ_LEN), rel=REFERENCE)
    streams = [[END_ID, *one] for one in ids]
    assert isolated.loss == pytest.approx(reference_loss(llama, streams, MAX_SEQ_LEN, MAX_SEQ_LEN), rel=REFERENCE)
    assert (joined.num_scored, isolated.num_scored) == (len(stream) - 1, len(stream) - 2)


def test_many_short_documents(pool: WorkerPool, folder: Path, tmp_path: Path) -> None:
    """They share the rows of a microbatch, and see nothing of one another."""
    sentences = [f"{'the cats sit on ' * (n % 7)}{n};" for n in range(60)]
    lines = tmp_path / "short.jsonl"
    lines.write_text("".join(json.dumps({"body": one}) + "\n" for one in sentences))
    (score,) = evaluate(pool, folder, lines, isolate=True, text_key="body", layout="tp2")
    streams = [[END_ID, *token_ids(folder, one)] for one in sentences]
    assert score.loss == pytest.approx(reference_loss(folder, streams, MAX_SEQ_LEN, MAX_SEQ_LEN), rel=REFERENCE)
    assert score.documents == 60 and score.text_bytes == len("".join(sentences).encode())


def test_documents_without_text_do_not_count(pool: WorkerPool, llama: Path, texts: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in ("", VERSE, "", OTHER, "")]
    (tmp_path / "gaps.jsonl").write_text("\n".join(lines) + "\n")
    for isolate in (False, True):
        (expected,) = evaluate(pool, llama, texts / "lines.jsonl", isolate=isolate)
        (score,) = evaluate(pool, llama, tmp_path / "gaps.jsonl", isolate=isolate)
        assert dataclasses.replace(score, name=expected.name) == expected


def test_token_files(pool: WorkerPool, llama: Path, tmp_path: Path) -> None:
    """Their tokens are scored as they are, ends of documents included; bytes are those that the tokens decode to."""
    documents = [[*token_ids(llama, text), END_ID] for text in (VERSE, OTHER)]
    pair = write_pair(tmp_path, documents)
    joined, isolated = (evaluate(pool, llama, pair, isolate=isolate)[0] for isolate in (False, True))
    streams = [[END_ID, *document] for document in documents]
    stream = [streams[0] + documents[1]]
    assert joined.loss == pytest.approx(reference_loss(llama, stream, MAX_SEQ_LEN, MAX_SEQ_LEN), rel=REFERENCE)
    assert isolated.loss == pytest.approx(reference_loss(llama, streams, MAX_SEQ_LEN, MAX_SEQ_LEN), rel=REFERENCE)
    for score in (joined, isolated):
        assert score.text_bytes == len((VERSE + OTHER).encode()) and score.documents == 2
        assert score.num_scored == score.num_tokens == sum(map(len, documents))


def test_bytes_that_are_unknown_are_left_out(pool: WorkerPool, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source = make_folder(tmp_path / "model", with_tokenizer=False)
    pair = write_pair(tmp_path, [[5, 6, 7] * 50])
    (score,) = evaluate(pool, source, pair)
    assert score.bits_per_byte is None and score.text_bytes is None and "no tokenizer" in score.no_bytes
    assert score.num_scored == 150, "config.json says which token ends a text"


def test_a_model_that_knows_nothing(pool: WorkerPool, llama: Path, texts: Path, tmp_path: Path) -> None:
    """Logits that are all 0: the loss is the logarithm of the size of the vocabulary."""
    source = tmp_path / "uniform"
    source.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (source / name).write_text((llama / name).read_text())
    tensors = load_file(llama / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros_like(tensors["lm_head.weight"])
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (score,) = evaluate(pool, source, texts / "verse.txt", layout="tp2-pp2-dp2")
    assert score.loss == pytest.approx(math.log(VOCABULARY), rel=1e-14)
    assert score.perplexity == pytest.approx(VOCABULARY, rel=1e-13)
    assert score.bits_per_byte == pytest.approx(
        math.log2(VOCABULARY) * len(token_ids(source, VERSE)) / len(VERSE.encode())
    )


def test_pieces_of_a_long_text_are_tokenised_as_one(pool: WorkerPool, llama: Path, tmp_path: Path) -> None:
    """A text that is read in several pieces, which end between words."""
    long = tmp_path / "long.txt"
    long.write_text(VERSE * 30, encoding="utf-8")
    (score,) = evaluate(pool, llama, long, dtype="float32", layout="dp3")
    assert score.num_tokens == len(token_ids(llama, VERSE * 30)) and score.text_bytes == 30 * len(VERSE)
    assert np.isfinite(score.loss)


def nan_job(request: EvalRequest) -> str:
    """What is said of weights of which one is NaN, on a stage that is not the last."""
    plan = plan_evaluation(request, torch.distributed.get_world_size())
    mesh = build_mesh(Layout(pp=request.pp), device=torch.device("cpu"))
    runner = load_runner(plan.source, mesh, request.dtype)
    if mesh.pp.index == 1:
        runner.model.get_parameter("layers.1.mlp.down.weight")[3, 5] = torch.nan
    with pytest.raises(EvaluationError) as raised:
        score_files(request, plan, runner)
    return str(raised.value)


def test_weights_that_are_nan_are_named_on_every_rank(pool: WorkerPool, llama: Path, texts: Path) -> None:
    messages = pool.run(nan_job, 4, EvalRequest(llama, (str(texts / "verse.txt"),), pp=4))
    assert len(set(messages)) == 1
    assert "weights are not finite: layers.1.mlp.down.weight" in messages[0] and "earlier checkpoint" in messages[0]
