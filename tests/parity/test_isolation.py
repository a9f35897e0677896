"""No token sees another document: in a packed sample, changing document 1 changes no bit of document 2's logits.

In every layout and every attention backend, for rotary and learned positions, with and without a sliding window.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_lite.config import RunConfig, load_config
from megatron_lite.data import IndexedWriter, TokenDataset
from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.ops.dispatch import BACKENDS
from megatron_lite.train.build import Training, build, layout_of

VOCABULARY, SEQ_LEN = 96, 32
# Tokens of the documents of each sample. Multiples of 4, so that a document alone also splits over tp = 4.
LENGTHS = ((8, 12, 12), (4, 20, 8), (16, 4, 12), (12, 16, 4))
_COMMON = (
    "model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_layers=4", "model.num_heads=4",
    f"model.vocab_size={VOCABULARY}", f"model.max_seq_len={SEQ_LEN}", f"train.seq_len={SEQ_LEN}",
    f"train.global_batch_size={len(LENGTHS)}", "train.num_steps=1", "train.precision=fp32",
)  # fmt: skip
MODELS = {
    "llama": ("model.family=llama", "model.num_kv_heads=2"),
    "gpt2": ("model.family=gpt2",),
    "mistral": ("model.family=mistral", "model.num_kv_heads=2", "model.sliding_window=5"),
    "qwen2": ("model.family=qwen2", "model.num_kv_heads=1"),
}
LAYOUTS = {
    "single": (1, ()),
    "tp=2": (2, ("parallel.tp=2",)),
    "tp=4,sp": (4, ("parallel.tp=4", "parallel.sequence_parallel=true")),
    "pp=2": (2, ("parallel.pp=2",)),
    "dp=4": (4, ("parallel.dp=4",)),
    "tp=2,pp=2,dp=2,sp": (
        8,
        ("parallel.tp=2", "parallel.pp=2", "parallel.dp=2", "parallel.sequence_parallel=true"),
    ),
}
# Rounding of float32 over 4 layers: the logits are of order 1, and the two computations add in another order.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Sample:
    """tokens, documents, positions: ``[1, S]``; documents and positions are None where nothing is isolated."""

    tokens: Tensor
    documents: Tensor | None
    positions: Tensor | None


def ids(generator: torch.Generator, count: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=generator)


def packed(row: int, changed: int | None = None, *, isolate: bool = True) -> Sample:
    """Sample ``row``, with every token of the document ``changed`` replaced by another one."""
    generator, others = torch.Generator().manual_seed(row), torch.Generator().manual_seed(100 + row)
    parts = [ids(generator, length) for length in LENGTHS[row]]
    if changed is not None:
        shift = 1 + ids(others, LENGTHS[row][changed]) % (VOCABULARY - 1)
        parts[changed] = (parts[changed] + shift) % VOCABULARY
    documents = torch.cat([torch.full((length,), n, dtype=torch.int32) for n, length in enumerate(LENGTHS[row])])
    positions = torch.cat([torch.arange(length) for length in LENGTHS[row]])
    tokens = torch.cat(parts)[None]
    return Sample(tokens, documents[None], positions[None]) if isolate else Sample(tokens, None, None)


def alone(row: int, document: int) -> Sample:
    whole, place = packed(row), span(row, document)
    return Sample(whole.tokens[:, place], None, None)


def span(row: int, document: int) -> slice:
    start = sum(LENGTHS[row][:document])
    return slice(start, start + LENGTHS[row][document])


def isolation_config(model: str, layout: str, backend: str, world_size: int) -> RunConfig:
    keys = [*_COMMON, *MODELS[model], *LAYOUTS[layout][1], f"kernels.attention={backend}"]
    return load_config(None, keys, world_size=world_size)


@torch.no_grad()
def logits_job(config: RunConfig, samples: list[list[Sample]]) -> tuple[int, list[list[Tensor]]] | None:
    """(dp index, logits of its rows' samples) on the last stage. samples: of each row; the rows are split over dp."""
    mesh = build_mesh(layout_of(config), device=torch.device("cpu"))
    training = build(config, mesh=mesh)
    for name, parameter in training.named_parameters():
        if parameter.ndim == 1 and name.endswith("bias"):
            parameter.fill_(0.1)  # drawn as zeros, they would hide a bias in the wrong place
    per_rank = len(samples) // mesh.dp.size
    own = samples[mesh.dp.index * per_rank : (mesh.dp.index + 1) * per_rank]
    logits = [[_logits(training, sample) for sample in row] for row in own]
    return (mesh.dp.index, logits) if mesh.pp.is_last else None


def _logits(training: Training, sample: Sample) -> Tensor:
    """``[S, V]`` on the last stage, nothing elsewhere."""
    stage, mesh = training.runner.model, training.mesh
    inputs = sample.tokens
    if not mesh.pp.is_first:
        divide_by = mesh.tp.size if training.config.parallel.sequence_parallel else 1
        buffer = torch.empty(sample.tokens.numel() // divide_by, training.config.model.hidden_size)
        inputs = collectives.start_receive(buffer, mesh.pp, mesh.pp.index - 1).wait()
    sequences = stage.sequences(1, sample.tokens.shape[1], sample.positions, sample.documents, torch.empty(()))
    outputs = stage.hidden(inputs, sequences)
    if stage.head is not None:
        return stage.head.logits(outputs)
    collectives.start_send(outputs.contiguous(), mesh.pp, mesh.pp.index + 1).wait()
    return torch.empty(0)


def logits_of(
    pool: WorkerPool, model: str, layout: str, backend: str, samples: list[list[Sample]]
) -> list[list[Tensor]]:
    """The logits ``[S, V]`` of each row's samples, the same on all tensor-parallel ranks."""
    world_size = LAYOUTS[layout][0]
    config = isolation_config(model, layout, backend, world_size)
    by_dp: dict[int, list[list[Tensor]]] = {}
    for index, logits in filter(None, pool.run(logits_job, world_size, config, samples)):
        for seen, row in zip(by_dp.setdefault(index, logits), logits, strict=True):
            assert all(map(torch.equal, seen, row))
    rows = [row for index in sorted(by_dp) for row in by_dp[index]]
    assert len(rows) == len(samples) and all(torch.isfinite(logits).all() for row in rows for logits in row)
    return rows


def test_every_backend_is_tried() -> None:
    assert {backend.name for backend in BACKENDS["attention"]} == {"reference", "cpu", "sdpa", "triton", "cuda"}


def test_the_samples_are_those_that_the_loader_makes(tmp_path: Path) -> None:
    """Documents and positions of token files, as `data.isolate_documents` gives them to the model."""
    with IndexedWriter(tmp_path / "pair", "uint16") as writer:
        for row, lengths in enumerate(LENGTHS):
            for part in packed(row).tokens[0].split(lengths):
                writer.add_document(part.numpy())
        writer.add_document([0])  # the target of the last token
    dataset = TokenDataset([tmp_path / "pair"], SEQ_LEN, isolate_documents=True)
    assert len(dataset) == len(LENGTHS)
    for row in range(len(LENGTHS)):
        sample, expected = dataset.sample(row), packed(row)
        assert sample.document_ids is not None and sample.positions is not None
        assert expected.documents is not None and expected.positions is not None
        assert sample.tokens[:-1].tolist() == expected.tokens[0].tolist()
        assert sample.document_ids.tolist() == expected.documents[0].tolist()
        assert sample.positions.tolist() == expected.positions[0].tolist()


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_a_document_does_not_see_another(pool: WorkerPool, model: str, layout: str, backend: str) -> None:
    samples = [
        [packed(row), packed(row, changed=0), packed(row, changed=1), alone(row, 1), alone(row, 2)]
        for row in range(len(LENGTHS))
    ]
    for row, logits in enumerate(logits_of(pool, model, layout, backend, samples)):
        whole, first_changed, second_changed, second_alone, third_alone = logits
        first, second, third = (span(row, document) for document in range(3))
        assert not torch.equal(whole[first], first_changed[first])
        assert torch.equal(whole[second], first_changed[second])
        assert torch.equal(whole[third], first_changed[third])
        assert not torch.equal(whole[second], second_changed[second])
        assert torch.equal(whole[first], second_changed[first])
        assert torch.equal(whole[third], second_changed[third])
        for document, lone in ((second, second_alone), (third, third_alone)):
            assert lone.shape == whole[document].shape
            assert (whole[document] - lone).abs().max() <= ROUNDING * lone.abs().max()


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("model", MODELS)
def test_without_isolation_it_does(pool: WorkerPool, model: str, backend: str) -> None:
    """Negative control: the same samples as one stream of tokens."""
    samples = [[packed(row, isolate=False), packed(row, changed=0, isolate=False)] for row in range(len(LENGTHS))]
    for row, (whole, changed) in enumerate(logits_of(pool, model, "tp=2", backend, samples)):
        assert (whole[span(row, 1)] - changed[span(row, 1)]).abs().max() > 100 * ROUNDING


def test_positions_that_do_not_restart_are_noticed(pool: WorkerPool) -> None:
    """Negative control: learned positions tell where in the sample a document begins."""
    samples = []
    for row in range(len(LENGTHS)):
        counted_on = Sample(packed(row).tokens, packed(row).documents, torch.arange(SEQ_LEN)[None])
        samples.append([counted_on, alone(row, 1)])
    for row, (whole, lone) in enumerate(logits_of(pool, "gpt2", "single", "reference", samples)):
        assert (whole[span(row, 1)] - lone).abs().max() > 100 * ROUNDING * lone.abs().max()
