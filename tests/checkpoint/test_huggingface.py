"""Hugging Face checkpoints: in and out again without a changed bit, in every form in which they come."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_lite.checkpoint import shard_reader
from megatron_lite.checkpoint.huggingface import config_from_hf, export_huggingface, huggingface_weights
from megatron_lite.checkpoint.huggingface import export as export_module
from megatron_lite.checkpoint.shard_reader import ShardReader
from megatron_lite.checkpoint.store import save
from megatron_lite.checkpoint.tensor_files import CheckpointError, TensorFiles
from megatron_lite.checkpoint.weights import iterate_weights
from megatron_lite.config.load import load_config
from megatron_lite.config.problems import override
from megatron_lite.config.schema import ModelConfig
from megatron_lite.data.tokenizer import save_tokenizer
from megatron_lite.data.tokenizer_training import train_tokenizer
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.models.families import parameter_table
from megatron_lite.train.build import build, layout_of
from megatron_lite.train.checkpoints import tensors_to_save

NAMES = ("llama", "llama-tied", "mistral", "qwen2", "qwen2-window", "gpt2", "gpt2-untied")
LAYOUTS = {
    "single": (1, []),
    "tp4-pp2": (8, ["parallel.tp=4", "parallel.pp=2"]),
    "tp2-sp-pp2-dp2-zero0": (
        8,
        ["parallel.tp=2", "parallel.pp=2", "parallel.dp=2", "parallel.sequence_parallel=true", "parallel.zero_stage=0"],
    ),
}


def import_and_save(folder: Path, overrides: list[str], out: Path) -> None:
    """Builds a run from the Hugging Face folder and writes a checkpoint of it."""
    config = load_config(None, overrides, world_size=torch.distributed.get_world_size())
    mesh = build_mesh(layout_of(config), device=torch.device("cpu"))
    table = parameter_table(config.model)
    training = build(config, mesh=mesh, weights=huggingface_weights(folder, table, config.model, torch.float32))
    save(out, tensors_to_save(training), state={}, model=config.model, axis=mesh.world)


def run_overrides(folder: Path, layout: list[str]) -> list[str]:
    model = [override(f"model.{key}", value) for key, value in config_from_hf(folder).items()]
    return [*model, "train.seq_len=8", "train.global_batch_size=8", "train.num_steps=1", *layout]


def model_of(folder: Path) -> ModelConfig:
    return ModelConfig(**config_from_hf(folder))


def reader(folder: Path, dtype: torch.dtype = torch.float32) -> ShardReader:
    model = model_of(folder)
    return huggingface_weights(folder, parameter_table(model), model, dtype)


def wholes(folder: Path, dtype: torch.dtype = torch.float32) -> list[tuple[str, Tensor]]:
    """(global name, whole tensor) of every parameter that is not tied."""
    weights = reader(folder, dtype)
    table = parameter_table(model_of(folder))
    return [(spec.name, weights(spec, 1, 0)) for spec in table if spec.tied_to is None]


def assert_same_tensors(found: Path, expected: dict[str, Tensor]) -> None:
    tensors = {name: tensor for file in sorted(found.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_through_a_layout_changes_no_bit(
    pool: WorkerPool, original: Callable[[str], Path], name: str, layout: str, tmp_path: Path
) -> None:
    """transformers -> a run in some layout -> its checkpoint -> Hugging Face again."""
    source = original(name)
    world_size, layout_overrides = LAYOUTS[layout]
    pool.run(import_and_save, world_size, source, run_overrides(source, layout_overrides), tmp_path / "own")
    export_huggingface(tmp_path / "out", model_of(source), iterate_weights(tmp_path / "own"), torch.float32)
    assert_same_tensors(tmp_path / "out", load_file(source / "model.safetensors"))
    assert config_from_hf(tmp_path / "out") == config_from_hf(source)


def test_fused_parameters_are_made_of_the_right_rows(original: Callable[[str], Path]) -> None:
    """Against the names and shapes written out by hand; a swap of k and v, or of gate and up, would round-trip."""
    llama, own = load_file(original("llama") / "model.safetensors"), dict(wholes(original("llama")))
    q, k, v = (llama[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv")
    assert torch.equal(own["layers.1.attention.qkv.weight"], torch.cat([q, k, v]))
    gate, up = (llama[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    assert torch.equal(own["layers.1.mlp.up.weight"], torch.cat([gate, up]))
    gpt2, own = load_file(original("gpt2") / "model.safetensors"), dict(wholes(original("gpt2")))
    assert torch.equal(own["layers.0.attention.out.weight"], gpt2["transformer.h.0.attn.c_proj.weight"].t())
    assert torch.equal(own["layers.0.mlp.up.bias"], gpt2["transformer.h.0.mlp.c_fc.bias"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tp", [2, 4])
def test_a_shard_is_the_slice_of_the_whole(original: Callable[[str], Path], name: str, tp: int) -> None:
    weights, table = reader(original(name)), parameter_table(model_of(original(name)))
    for spec in table:
        whole = weights(spec, 1, 0)
        for index in range(tp):
            assert torch.equal(weights(spec, tp, index), spec.take_shard(whole, tp, index)), (spec.name, index)


def test_a_rank_reads_no_more_than_its_slices(original: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    true_read = TensorFiles.read

    def counting_read(self: TensorFiles, *args: Any) -> Tensor:
        values = true_read(self, *args)
        read.append(values.numel())
        return values

    monkeypatch.setattr(TensorFiles, "read", counting_read)
    weights, table = reader(original("llama")), parameter_table(model_of(original("llama")))
    assert read == []  # checking names and shapes reads no values
    for spec in table:
        local = weights(spec, 2, 1)
        assert sum(read) <= local.numel(), spec.name
        read.clear()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sharded_files_are_written_and_read(original: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    source, out = original(name), tmp_path / "out"
    export_huggingface(out, model_of(source), iter(wholes(source)), torch.float32, max_shard_bytes=20_000)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    expected = load_file(source / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert index["weight_map"].keys() == expected.keys()
    assert_same_tensors(out, expected)
    for (name, ours), (other, theirs) in zip(wholes(out), wholes(source), strict=True):
        assert name == other
        assert torch.equal(ours, theirs)


def test_sharded_files_of_transformers_are_read(original: Callable[[str], Path], tmp_path: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(original("llama"))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert all(
        torch.equal(a[1], b[1]) for a, b in zip(wholes(tmp_path / "sharded"), wholes(original("llama")), strict=True)
    )


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_files_of_the_model_without_its_head_have_no_prefix(editable: Callable[[str], Any], name: str) -> None:
    """As the hub's GPT-2 is: no prefix, and the causal mask among the tensors."""
    copy = editable(name)
    expected = wholes(copy.folder)
    copy.tensors = {key.partition(".")[2]: value for key, value in copy.tensors.items()}
    if name == "gpt2":
        copy.tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(2)}
    copy.save()
    assert all(torch.equal(a[1], b[1]) for a, b in zip(wholes(copy.folder), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_goes_through_float32_and_back(
    editable: Callable[[str], Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    copy = editable("gpt2")
    copy.tensors = {name: tensor.to(dtype) for name, tensor in copy.tensors.items()}
    copy.save()
    export_huggingface(tmp_path / "out", model_of(copy.folder), iter(wholes(copy.folder)), dtype)
    assert_same_tensors(tmp_path / "out", copy.tensors)
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("rows_at_once", [7, 4096])
def test_a_stored_copy_of_a_tied_head_must_be_a_copy(
    editable: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    """Refused before the first shard is read: a rank that reads no embedding has to refuse it as well."""
    monkeypatch.setattr(shard_reader, "ROWS_AT_ONCE", rows_at_once)
    copy = editable("llama-tied")
    copy.tensors["lm_head.weight"] = copy.tensors["model.embed_tokens.weight"].clone()
    copy.save()
    assert len(wholes(copy.folder)) > 0
    copy.tensors["lm_head.weight"][-1, -1] += 1
    copy.save()
    with pytest.raises(CheckpointError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight"):
        reader(copy.folder)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_the_export_with_its_tokenizer(
    original: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    import transformers

    tokenizer = train_tokenizer(["one two three"], 257)
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    source, out = original(name), tmp_path / "out"
    # 257 tokens are the fewest of a byte-level tokenizer, and more than this vocabulary
    with pytest.raises(CheckpointError, match="257 tokens, and the model only 161"):
        export_huggingface(out, model_of(source), [], torch.float32, tokenizer=tmp_path / "tokenizer.json")
    assert not out.exists()

    model = model_of(source).model_copy(update={"vocab_size": 257})
    table = parameter_table(model)
    tensors = [(spec.name, torch.randn(spec.shape)) for spec in table if spec.tied_to is None]
    export_huggingface(out, model, tensors, torch.float32, tokenizer=tmp_path / "tokenizer.json")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    assert loaded.dtype == torch.float32
    assert loaded.config.eos_token_id == 0
    auto = transformers.AutoTokenizer.from_pretrained(out)
    text = "one  tvo\n\té"
    assert auto(text)["input_ids"] == tokenizer.encode(text).ids
    assert auto.decode(auto(text)["input_ids"]) == text
    assert auto.eos_token == "<|endoftext|>"
    assert auto.model_max_length == 24


def test_an_export_that_reads_back_differently_is_refused(
    original: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One flipped bit on the way to the disk, in any of the files."""

    class FlippingWriter(export_module.TensorWriter):
        def check(self) -> None:
            data = bytearray(self.path.read_bytes())
            data[-3] ^= 1
            self.path.write_bytes(data)
            super().check()

    monkeypatch.setattr(export_module, "TensorWriter", FlippingWriter)
    source = original("llama")
    with pytest.raises(CheckpointError, match=r"read back is not what was written: lm_head\.weight"):
        export_huggingface(tmp_path / "out", model_of(source), iter(wholes(source)), torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_the_reader_takes_files_that_the_safetensors_library_wrote(tmp_path: Path) -> None:
    """And the other way round: what TensorWriter wrote is read by the library in every test above."""
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    files = TensorFiles(tmp_path, ["x.safetensors"])
    assert torch.equal(files.read("a", 1, 1, 3), torch.tensor([[1.0, 2.0], [4.0, 5.0]]))
    assert files.read("b").dtype == torch.bfloat16
