"""The run that every launcher has to reproduce: the model of the quickstart as tensor 2 x data 2 in four processes; and
how two runs are compared."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from torch import Tensor

from megatron_lite.checkpoint.chunks import Chunk, GlobalTensor
from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.checkpoint.steps import list_steps
from megatron_lite.checkpoint.store import load_alone
from megatron_lite.utils import run_files
from tests.cluster.commands import ROOT
from tests.train.commands import write_config
from tests.train.tiny_run import same_numbers

NPROC, NUM_STEPS = 4, 6
_QUICKSTART = yaml.safe_load((ROOT / "configs/models/llama-tiny.yaml").read_text())
MODEL = tuple(f"model.{key}={value}" for key, value in _QUICKSTART.items())
# For runs of which only the ends matter.
SMALL = ("model.vocab_size=300", "model.hidden_size=32", "model.ffn_hidden_size=64", "model.num_layers=2")
LAYOUT = ("parallel.tp=2", "parallel.dp=2")
SHORT = (f"train.num_steps={NUM_STEPS}", "optim.warmup_steps=2", "checkpoint.interval=3", "train.eval_interval=3")


def write_run(folder: Path, corpus: Path, *more: str, name: str = "tiny") -> Path:
    """The config of that run as ``folder/NAME.yaml``; it writes to ``folder/runs/NAME``. Later keys replace its own."""
    return write_config(folder, corpus, name, *MODEL, *LAYOUT, *SHORT, *more)


def run_of(config: Path) -> Path:
    """The folder of the run that a config of `write_run` describes."""
    return config.parent / "runs" / config.stem


def differences(one: Path, other: Path) -> list[str]:
    """In what two runs differ, in any bit: the numbers of each step, and the tensors of their last checkpoints."""
    found = same_numbers(one, other)
    newest = [list_steps(folder / run_files.CHECKPOINTS) for folder in (one, other)]
    if not all(newest) or newest[0][-1].name != newest[1][-1].name:
        return [*found, f"their checkpoints are {[[step.name for step in steps] for steps in newest]}"]
    first, second = (tensors_of(steps[-1]) for steps in newest)
    found += [f"only one has {name}" for name in sorted(first.keys() ^ second.keys())]
    found += [name for name in sorted(first.keys() & second.keys()) if not torch.equal(first[name], second[name])]
    return found


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint as it was saved, weights and optimizer state, whatever layout saved it."""
    manifest = read_manifest(checkpoint)
    tensors = {name: torch.empty(stored.shape, dtype=stored.torch_dtype) for name, stored in manifest.tensors.items()}
    wanted = [
        GlobalTensor(name, tuple(values.shape), values.dtype, (Chunk((0,) * values.dim(), values),))
        for name, values in tensors.items()
    ]
    load_alone(manifest, wanted)
    return tensors
