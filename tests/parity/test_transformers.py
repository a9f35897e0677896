"""Against transformers: the same checkpoint gives the same logits, the same training, and the same model back.

All in float32. Weights are drawn in transformers, so that its layout of a checkpoint is the one that is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_lite.checkpoint.huggingface import config_from_hf, export_huggingface, huggingface_weights
from megatron_lite.checkpoint.store import save
from megatron_lite.checkpoint.weights import iterate_weights
from megatron_lite.config.load import load_config
from megatron_lite.config.problems import override
from megatron_lite.data.loader import Microbatch
from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.models.families import parameter_table
from megatron_lite.optim.lr_schedule import learning_rate
from megatron_lite.train.build import Training, build, layout_of
from megatron_lite.train.checkpoints import tensors_to_save
from megatron_lite.train.step import train_step

BOUND = 1e-5  # the bound, absolute and relative to the largest entry
NUM_STEPS, BATCH, SEQ_LEN, VOCABULARY = 20, 8, 32, 160
LAYOUTS = {
    "single": (1, []),
    "tp2-pp2": (4, ["parallel.tp=2", "parallel.pp=2"]),
    "tp2-sp-dp2": (4, ["parallel.tp=2", "parallel.dp=2", "parallel.sequence_parallel=true"]),
}
TRAINING_LAYOUTS = {
    "single": (1, []),
    "tp2-pp2-dp2": (8, ["parallel.tp=2", "parallel.pp=2", "parallel.dp=2"]),
}
MODELS = ("llama", "llama-tied", "mistral", "qwen2", "gpt2")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For matrices as small as these, and beside other processes, a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def transformers_config(name: str) -> Any:
    import transformers

    if name == "gpt2":
        return transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=64, n_layer=4, n_head=4, n_positions=64,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if name == "mistral":  # a window shorter than the sequence, and heads that are wider than hidden_size / num_heads
        return transformers.MistralConfig(**shape, sliding_window=11, head_dim=24)
    if name == "qwen2":  # biases, and a window on the second half of the layers
        return transformers.Qwen2Config(**shape, use_sliding_window=True, sliding_window=11, max_window_layers=2)
    if name == "llama-tied":  # and YaRN, and GeGLU
        return transformers.LlamaConfig(
            **shape, tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh",
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16,
            },
        )  # fmt: skip
    return transformers.LlamaConfig(
        **shape,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        },
    )  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers writes it. Norms and biases are random too: ones and zeros would hide a mix-up."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(MODELS.index(request.param))
    model = transformers.AutoModelForCausalLM.from_config(transformers_config(request.param), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm_weight = parameter.ndim == 1 and name.endswith("weight")
            parameter.normal_(mean=float(is_norm_weight), std=0.1 if parameter.ndim == 1 else 0.05)
    folder = tmp_path_factory.mktemp("checkpoints") / request.param
    model.save_pretrained(folder)
    return folder


def transformers_model(folder: Path) -> Any:
    import transformers  # here, so that the workers of the pool, which never need it, do not wait for it

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def random_tokens(count: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (count, SEQ_LEN), generator=torch.Generator().manual_seed(7))


def counting_sequences(count: int) -> Tensor:
    """``[count, SEQ_LEN + 1]``: each sequence counts up from somewhere by 1, 2 or 3, so there is something to learn."""
    generator = torch.Generator().manual_seed(11)
    first = torch.randint(0, VOCABULARY, (count, 1), generator=generator)
    by = torch.randint(1, 4, (count, 1), generator=generator)
    return (first + by * torch.arange(SEQ_LEN + 1)) % VOCABULARY


def run_config(folder: Path, layout: list[str]) -> list[str]:
    return [
        *(override(f"model.{key}", value) for key, value in config_from_hf(folder).items()),
        f"train.seq_len={SEQ_LEN}", "train.micro_batch_size=2", f"train.global_batch_size={BATCH}",
        f"train.num_steps={NUM_STEPS}", "train.precision=fp32", "optim.lr=3e-3", "optim.warmup_steps=5",
        "optim.weight_decay=0.1", "optim.clip_grad_norm=1.0", *layout,
    ]  # fmt: skip


def start(folder: Path, overrides: list[str]) -> Training:
    config = load_config(None, overrides, world_size=torch.distributed.get_world_size())
    mesh = build_mesh(layout_of(config), device=torch.device("cpu"))
    weights = huggingface_weights(folder, parameter_table(config.model), config.model, torch.float32)
    return build(config, mesh=mesh, weights=weights)


@torch.no_grad()
def logits_job(folder: Path, overrides: list[str], tokens: Tensor) -> tuple[int, Tensor] | None:
    """(dp index, logits ``[B / dp, S, V]``) from the last stage: its part of the batch, stage after stage."""
    training = start(folder, overrides)
    stage, mesh = training.runner.model, training.mesh
    own = tokens.tensor_split(mesh.dp.size)[mesh.dp.index]
    inputs = own
    if not mesh.pp.is_first:
        divide_by = mesh.tp.size if training.config.parallel.sequence_parallel else 1
        buffer = torch.empty(own.numel() // divide_by, training.config.model.hidden_size)
        inputs = collectives.start_receive(buffer, mesh.pp, mesh.pp.index - 1).wait()
    num_sequences, seq_len = own.shape
    outputs = stage.hidden(inputs, stage.sequences(num_sequences, seq_len, None, None, torch.empty(())))
    if not mesh.pp.is_last:
        collectives.start_send(outputs, mesh.pp, mesh.pp.index + 1).wait()
        return None
    assert stage.head is not None
    return mesh.dp.index, stage.head.logits(outputs).view(*own.shape, -1)


def training_job(folder: Path, overrides: list[str], data: Tensor, weights_folder: Path) -> list[float]:
    """The loss of every step. What the last step starts from is left in ``weights_folder``."""
    training = start(folder, overrides)
    dp, losses = training.mesh.dp, []
    batches = data.split(BATCH)
    for number, batch in enumerate(batches, start=1):
        if number == len(batches):
            save_checkpoint(training, weights_folder)
        own = batch.tensor_split(dp.size)[dp.index]
        losses.append(train_step(training, [Microbatch(b[:, :-1], b[:, 1:]) for b in own.split(2)]).loss)
    return losses


def save_checkpoint(training: Training, out: Path) -> None:
    save(out, tensors_to_save(training), state={}, model=training.config.model, axis=training.mesh.world)


def save_job(folder: Path, overrides: list[str], weights_folder: Path) -> None:
    save_checkpoint(start(folder, overrides), weights_folder)


def imported_logits(pool: WorkerPool, folder: Path, layout: str, tokens: Tensor) -> list[Tensor]:
    """The batch's logits as each tensor-parallel rank sees them."""
    world_size, overrides = LAYOUTS[layout]
    results = pool.run(logits_job, world_size, folder, run_config(folder, overrides), tokens)
    by_dp: dict[int, list[Tensor]] = {}
    for index, logits in filter(None, results):
        by_dp.setdefault(index, []).append(logits)
    return [torch.cat(parts) for parts in zip(*(by_dp[index] for index in sorted(by_dp)), strict=True)]


def reference_losses(folder: Path, data: Tensor, lr_factor: float = 1.0) -> list[float]:
    """A plain training loop: transformers' model, torch's AdamW, one batch at a time."""
    torch.manual_seed(0)
    config = load_config(None, run_config(folder, []), world_size=1)
    model = transformers_model(folder).train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optim, losses = config.optim, []
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
    )
    for step, batch in enumerate(data.split(BATCH), start=1):
        logits = model(batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr_factor * learning_rate(optim, step, NUM_STEPS)
        optimizer.step()
        losses.append(loss.item())
    return losses


def largest_difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_of_an_imported_checkpoint(pool: WorkerPool, checkpoint: Path, layout: str) -> None:
    tokens = random_tokens(4)
    with torch.no_grad():
        expected = transformers_model(checkpoint)(tokens).logits
    everywhere = imported_logits(pool, checkpoint, layout, tokens)
    assert len(everywhere) == (1 if layout == "single" else 2)
    for logits in everywhere:
        assert logits.shape == expected.shape
        difference = (logits - expected).abs().max()
        assert difference <= BOUND * expected.abs().max()
        assert difference <= BOUND


@pytest.fixture(scope="module")
def data() -> Tensor:
    return counting_sequences(NUM_STEPS * BATCH)


@pytest.fixture(scope="module")
def expected_losses(checkpoint: Path, data: Tensor) -> list[float]:
    return reference_losses(checkpoint, data)


@pytest.mark.parametrize("layout", TRAINING_LAYOUTS)
def test_twenty_training_steps_and_the_export_of_their_weights(
    pool: WorkerPool, checkpoint: Path, data: Tensor, expected_losses: list[float], layout: str, tmp_path: Path
) -> None:
    world_size, overrides = TRAINING_LAYOUTS[layout]
    results = pool.run(training_job, world_size, checkpoint, run_config(checkpoint, overrides), data, tmp_path / "own")
    assert expected_losses[-1] < expected_losses[0] - 0.3  # it does learn
    for losses in results:
        assert len(losses) == NUM_STEPS
        assert largest_difference(losses, expected_losses) <= BOUND
    # the trained weights, exported, give transformers the loss of the step that followed
    config = load_config(None, run_config(checkpoint, overrides), world_size=world_size)
    export_huggingface(tmp_path / "out", config.model, iterate_weights(tmp_path / "own"), torch.float32)
    last = data.split(BATCH)[-1]
    with torch.no_grad():
        logits = transformers_model(tmp_path / "out")(last[:, :-1]).logits
    assert abs(F.cross_entropy(logits.flatten(0, 1), last[:, 1:].flatten()).item() - results[0][-1]) <= BOUND


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_and_reload_give_identical_logits(
    pool: WorkerPool, checkpoint: Path, layout: str, tmp_path: Path
) -> None:
    """Bitwise: the same weights in the same model."""
    world_size, overrides = LAYOUTS[layout]
    pool.run(save_job, world_size, checkpoint, run_config(checkpoint, overrides), tmp_path / "own")
    config = load_config(None, run_config(checkpoint, overrides), world_size=world_size)
    export_huggingface(tmp_path / "out", config.model, iterate_weights(tmp_path / "own"), torch.float32)
    tokens = random_tokens(4)
    with torch.no_grad():
        before, after = (transformers_model(folder)(tokens).logits for folder in (checkpoint, tmp_path / "out"))
    assert torch.equal(before, after)


def test_two_swapped_heads_break_the_bound_on_logits(pool: WorkerPool, checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    is_gpt2 = "transformer.h.0.attn.c_attn.weight" in tensors
    name = "transformer.h.0.attn.c_attn.weight" if is_gpt2 else "model.layers.0.self_attn.q_proj.weight"
    width = json.loads((checkpoint / "config.json").read_text()).get("head_dim") or 16
    first, rest = torch.arange(width), torch.arange(2 * width, tensors[name].shape[is_gpt2])
    swapped = torch.cat([width + first, first, rest])
    tensors[name] = tensors[name].index_select(int(is_gpt2), swapped)
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    tokens = random_tokens(4)
    with torch.no_grad():
        expected = transformers_model(checkpoint)(tokens).logits
    (logits,) = imported_logits(pool, tmp_path, "single", tokens)
    assert (logits - expected).abs().max() > 100 * BOUND


def test_a_learning_rate_one_percent_off_breaks_the_bound_on_losses(
    checkpoint: Path, data: Tensor, expected_losses: list[float]
) -> None:
    steps = 10
    losses = reference_losses(checkpoint, data[: steps * BATCH], lr_factor=1.01)
    assert largest_difference(losses, expected_losses[:steps]) > 10 * BOUND
