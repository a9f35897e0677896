"""Hugging Face folders that cannot be read, and exports that cannot be written: one clear message each."""

from __future__ import annotations

import io
import json
import pickle
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.checkpoint.huggingface import config_from_hf, export_huggingface, huggingface_weights
from megatron_lite.checkpoint.shard_reader import ShardReader
from megatron_lite.checkpoint.tensor_files import CheckpointError
from megatron_lite.config.schema import ModelConfig
from megatron_lite.models.families import parameter_table
from megatron_lite.utils.files import DataError

Edit = Callable[[str], Any]


def model_of(folder: Path) -> ModelConfig:
    return ModelConfig(**config_from_hf(folder))


def read(folder: Path, model: ModelConfig | None = None) -> ShardReader:
    model = model or model_of(folder)
    return huggingface_weights(folder, parameter_table(model), model, torch.float32)


def tensors_of(folder: Path) -> list[tuple[str, Tensor]]:
    weights = read(folder)
    return [(spec.name, weights(spec, 1, 0)) for spec in parameter_table(model_of(folder)) if spec.tied_to is None]


class Opened:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def pickle_bytes(canary: Path) -> bytes:
    return pickle.dumps(Opened(canary))


def torch_archive(canary: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model.norm.weight": Opened(canary)}, buffer)
    return buffer.getvalue()


def test_all_missing_tensors_are_counted_and_the_first_named(editable: Edit) -> None:
    copy = editable("llama")
    kept = {name: tensor for name, tensor in copy.tensors.items() if ".layers.1." not in name and "lm_head" not in name}
    copy.tensors, all_tensors = kept, copy.tensors
    gone = [name for name in all_tensors if name not in kept]
    assert len(gone) == 10
    del copy.tensors["model.norm.weight"]
    copy.save()
    with pytest.raises(CheckpointError, match=f"11 of {len(all_tensors)} tensors are missing: model") as caught:
        read(copy.folder)
    named = [name for name in [*gone, "model.norm.weight"] if name in str(caught.value)]
    assert len(named) == 10
    assert "and 1 more" in str(caught.value)
    assert str(copy.folder) in str(caught.value)


def test_missing_tensors_of_files_without_prefix_are_named_without_it(editable: Edit) -> None:
    copy = editable("gpt2")
    copy.tensors = {name.removeprefix("transformer."): tensor for name, tensor in copy.tensors.items()}
    del copy.tensors["h.1.ln_2.bias"]
    with pytest.raises(CheckpointError, match=r"1 of 28 tensors are missing: h\.1\.ln_2\.bias\. "):
        read(copy.save())


def test_an_untied_model_without_a_head(editable: Edit) -> None:
    copy = editable("llama")
    del copy.tensors["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"1 of 21 tensors are missing: lm_head\.weight"):
        read(copy.save())


def test_wrong_shapes_say_what_is_there_and_what_should_be(editable: Edit) -> None:
    copy = editable("gpt2")
    name = "transformer.h.0.mlp.c_fc.weight"
    copy.tensors[name] = copy.tensors[name].t()  # as a Linear stores it
    with pytest.raises(CheckpointError, match=r"c_fc\.weight in model\.safetensors is \[96, 32\], not \[32, 96\]"):
        read(copy.save())


def test_another_model_section_does_not_fit(editable: Edit) -> None:
    copy = editable("llama")
    model = model_of(copy.folder).model_copy(update={"num_kv_heads": 4})
    with pytest.raises(CheckpointError, match=r"4 tensors do not fit.*k_proj\.weight.*is \[32, 32\], not \[64, 32\]"):
        read(copy.folder, model)


def test_tensors_that_have_no_place_are_refused(editable: Edit) -> None:
    copy = editable("llama")
    copy.tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    with pytest.raises(CheckpointError, match=r"1 tensors have no place.*q_proj\.bias"):
        read(copy.save())
    del copy.tensors["model.layers.0.self_attn.q_proj.bias"]
    copy.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # a buffer of old versions
    read(copy.save())


def test_more_layers_than_the_model_section_has(editable: Edit) -> None:
    copy = editable("llama")
    model = model_of(copy.folder).model_copy(update={"num_layers": 1})
    with pytest.raises(CheckpointError, match=r"9 tensors have no place in this llama model: model\.layers\.1\."):
        read(copy.folder, model)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_numbers_are_refused_by_name(editable: Edit, value: float) -> None:
    copy = editable("qwen2")
    name = "model.layers.1.self_attn.v_proj.bias"
    copy.tensors[name][3] = value
    weights, table = read(copy.save()), parameter_table(model_of(copy.folder))
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors: 1 of 16 weights of {name} are NaN or infinite.*earlier one"
    ):
        weights(table["layers.1.attention.qkv.bias"], 1, 0)
    weights(table["layers.0.attention.qkv.bias"], 1, 0)  # the others are read


def test_quantized_tensors_are_refused(editable: Edit) -> None:
    copy = editable("llama")
    copy.tensors["model.norm.weight"] = copy.tensors["model.norm.weight"].to(torch.int8)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds I8, not floats"):
        read(copy.save())


@pytest.mark.parametrize("kept_bytes", [0, 5, 100, -1])
def test_a_truncated_file_is_named(editable: Edit, kept_bytes: int) -> None:
    copy = editable("llama")
    copy.file.write_bytes(copy.file.read_bytes()[:kept_bytes])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is truncated or not a safetensors file"):
        read(copy.folder)


def test_a_folder_of_pickles_is_not_opened(editable: Edit) -> None:
    copy = editable("llama")
    copy.file.unlink()
    canary = copy.folder / "opened"
    (copy.folder / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch " + bytes(canary) + b"'\ntR.")
    with pytest.raises(CheckpointError, match=r"only as pickles \(pytorch_model\.bin\).*convert them to safetensors"):
        read(copy.folder)
    assert not canary.exists()


def test_a_folder_without_weights(editable: Edit, tmp_path: Path) -> None:
    copy = editable("llama")
    model = model_of(copy.folder)
    copy.file.unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        read(copy.folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        read(tmp_path / "nowhere", model)


def sharded(copy: Any, tmp_path: Path) -> Path:
    model = model_of(copy.folder)
    export_huggingface(tmp_path / "sharded", model, tensors_of(copy.folder), torch.float32, max_shard_bytes=20_000)
    return tmp_path / "sharded"


def test_missing_and_truncated_files_of_an_index(editable: Edit, tmp_path: Path) -> None:
    folder = sharded(editable("llama"), tmp_path)
    files = sorted(folder.glob("*.safetensors"))
    content = files[1].read_bytes()
    files[1].unlink()
    with pytest.raises(CheckpointError, match=f"1 of the {len(files)} files.*are missing: {files[1].name}"):
        read(folder)
    files[1].write_bytes(content[:-8])
    with pytest.raises(CheckpointError, match=f"{files[1].name}: is truncated"):
        read(folder)


def test_a_file_too_many_beside_an_index(editable: Edit, tmp_path: Path) -> None:
    """A shard of an earlier download, or of another model: which of the two is meant nobody knows."""
    folder = sharded(editable("llama"), tmp_path)
    first = min(folder.glob("*.safetensors"))
    (folder / "consolidated.safetensors").write_bytes(first.read_bytes())  # as in Mistral's repositories: no shard
    read(folder)
    (folder / "model-00009-of-00009.safetensors").write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=r"model-00009-of-00009\.safetensors is not in .*two checkpoints"):
        read(folder)


@pytest.mark.parametrize("make", [pickle_bytes, torch_archive])
def test_a_pickle_that_is_named_like_safetensors_is_not_opened(editable: Edit, make: Callable[[Path], bytes]) -> None:
    copy = editable("llama")
    canary = copy.folder / "opened"
    copy.file.write_bytes(make(canary))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is a pickle, which can run any code"):
        read(copy.folder)
    assert not canary.exists()
    pickle.loads(pickle_bytes(canary))  # the control: what opens it runs it
    assert canary.exists()


def test_an_index_that_does_not_fit_its_files(editable: Edit, tmp_path: Path) -> None:
    folder = sharded(editable("llama"), tmp_path)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = min(index["weight_map"].values())
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"model.extra": first}}))
    with pytest.raises(CheckpointError, match=rf"1 tensors of .* are missing from its files: model\.extra in {first}"):
        read(folder)
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"model.norm.weight": "../elsewhere"}}))
    with pytest.raises(CheckpointError, match=r"files outside of its folder: \.\./elsewhere"):
        read(folder)
    path.write_text(json.dumps({"weight_map": 3}))
    with pytest.raises(CheckpointError, match="has no weight_map"):
        read(folder)


def test_an_occupied_folder_is_not_exported_to(editable: Edit, tmp_path: Path) -> None:
    copy = editable("llama")
    before = {path.name: path.read_bytes() for path in copy.folder.iterdir()}
    with pytest.raises(CheckpointError, match=r"is not empty, it has config\.json; remove it"):
        export_huggingface(copy.folder, model_of(copy.folder), tensors_of(copy.folder), torch.float32)
    assert {path.name: path.read_bytes() for path in copy.folder.iterdir()} == before
    with pytest.raises(CheckpointError, match="is a file"):
        export_huggingface(copy.file, model_of(copy.folder), tensors_of(copy.folder), torch.float32)
    (tmp_path / "empty").mkdir()
    export_huggingface(tmp_path / "empty", model_of(copy.folder), tensors_of(copy.folder), torch.float32)
    assert (tmp_path / "empty/model.safetensors").is_file()


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Writing beyond this size fails in the kernel, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 40_000])
def test_no_space_left_leaves_nothing_behind(editable: Edit, tmp_path: Path, max_shard_bytes: int) -> None:
    copy = editable("llama")
    model, tensors = model_of(copy.folder), tensors_of(copy.folder)
    with (
        largest_file(30_000),
        pytest.raises(DataError, match=r"\.safetensors: no space left to write it .*free some space"),
    ):
        export_huggingface(tmp_path / "out", model, tensors, torch.float32, max_shard_bytes=max_shard_bytes)
    assert sorted(path.name for path in tmp_path.iterdir()) == [copy.folder.name]
    export_huggingface(tmp_path / "out", model, tensors, torch.float32)  # and with space it works


def test_tensors_that_are_not_the_models_are_refused(editable: Edit, tmp_path: Path) -> None:
    copy = editable("llama")
    model, tensors = model_of(copy.folder), tensors_of(copy.folder)
    for wrong, message in (
        (tensors[:-1], r"head\.weight \[161, 32\] comes next, and what came is nothing"),
        (tensors[1:], r"embedding\.tokens\.weight .* what came is layers\.0\.attention_norm\.weight"),
        ([*tensors, ("more", torch.zeros(1))], "it has no more;"),
        ([(tensors[0][0], torch.zeros(160, 32)), *tensors[1:]], r"came is embedding\.tokens\.weight \[160, 32\]"),
    ):
        with pytest.raises(CheckpointError, match=message):
            export_huggingface(tmp_path / "out", model, wrong, torch.float32)
        assert not (tmp_path / "out").exists()
