"""The configuration of a run, as frozen and strict pydantic models.

Every field states its type, its bounds, its unit and what it does; nothing here reads a file, the environment or the
device. A default that follows from other keys (``num_kv_heads`` from ``num_heads``) is filled in while the model is
made, so that a `RunConfig` holds concrete values and its readers never repeat the rule. What depends on the number
of processes (``parallel.dp``) is filled in by `megatron_lite.config.load.with_world`.

Rules that span several keys live in `megatron_lite.config.rules`; reading files and overrides lives in
`megatron_lite.config.load`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from megatron_lite.config.checkpoint import CheckpointConfig
from megatron_lite.config.data import DataConfig
from megatron_lite.config.kernels import KernelsConfig
from megatron_lite.config.model import ModelConfig, RopeScaling
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.section import Section, derived

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "InitConfig",
    "KernelsConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RopeScaling",
    "RunConfig",
    "RunSettings",
    "Section",
    "TrainConfig",
    "default_decay_steps",
]


class TrainConfig(Section):
    """The size of a step, the number of steps, and the arithmetic."""

    seq_len: int = Field(ge=1, description="length of a training sequence, tokens")
    micro_batch_size: int = Field(default=1, ge=1, description="sequences in one forward pass of one dp rank")
    global_batch_size: int = Field(ge=1, description="sequences in one optimizer step, over all dp ranks")
    num_steps: int = Field(ge=1, description="number of optimizer steps")
    seed: int = Field(default=1234, ge=0, le=2**63 - 1, description="seed of the initial weights and of the data order")
    precision: Literal["fp32", "bf16", "fp64"] = Field(
        default="fp32",
        description="arithmetic; bf16 computes in bfloat16 with fp32 master weights and fp32 gradient accumulation",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of each target that is spread evenly over the vocabulary (arXiv:1512.00567); the loss that "
        "training reports includes its effect, that of an evaluation does not",
    )
    z_loss: float = Field(
        default=0.0,
        ge=0,
        description="coefficient of each token's squared log-sum-exp of the logits (arXiv:2204.02311 takes 1e-4); "
        "the loss that training reports includes it, that of an evaluation does not",
    )
    eval_interval: int = Field(
        default=0, ge=0, description="optimizer steps between evaluations on data.valid; 0: only after the last step"
    )
    eval_batches: int = Field(default=8, ge=1, description="most global batches read from data.valid in one evaluation")
    log_interval: int = Field(
        default=1, ge=1, description="optimizer steps between lines on the console (metrics.jsonl has every step)"
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads of each process",
        json_schema_extra={"default": "cores / processes on this machine, at least 1"},
    )
    collective_timeout_s: float = Field(
        default=600.0, gt=0, description="longest wait for the other processes before a run is given up, seconds"
    )


class OptimConfig(Section):
    """The optimizer and its learning rate over time."""

    name: Literal["adamw"] = Field(
        default="adamw", description="optimizer; AdamW with decoupled weight decay (arXiv:1711.05101)"
    )
    lr: float = Field(default=3e-4, gt=0, description="highest learning rate, reached at step warmup_steps")
    min_lr: float = derived(
        "0.1 * lr",
        lambda data: 0.1 * data["lr"],
        ge=0,
        description="learning rate at the end of the decay; no effect with schedule=constant",
    )
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        default="cosine",
        description="learning rate after warm-up: cosine or linear decay to min_lr, constant, "
        "or wsd (constant, then a linear decay over the last decay_steps)",
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="optimizer steps of warm-up; step t, from 1, uses lr * t / warmup_steps"
    )
    decay_steps: int | None = Field(
        default=None,
        ge=1,
        description="cosine and linear: the step at which min_lr is reached, counted from 1; "
        "wsd: how many of the last steps decay; constant: no effect",
        json_schema_extra={"default": "train.num_steps; wsd: a fifth of it"},
    )
    weight_decay: float = Field(
        default=0.1, ge=0, description="decoupled weight decay, per unit of learning rate; not on norms and biases"
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the mean of gradients, per step")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="decay of the mean of squared gradients, per step")
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the mean of squared gradients")
    clip_grad_norm: float = Field(
        default=1.0, ge=0, description="largest 2-norm of the whole gradient; a larger one is scaled down; 0: off"
    )


class InitConfig(Section):
    """Where the first weights come from."""

    from_hf: str | None = Field(
        default=None,
        min_length=1,
        description="folder of a Hugging Face Llama, Mistral, Qwen2 or GPT-2 checkpoint in safetensors to start from",
        json_schema_extra={"default": "random weights from train.seed"},
    )


class RunSettings(Section):
    """Where a run leaves its results, what it reports to, and the device it uses."""

    name: str = Field(
        default="run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of the run; results go to dir/name",
        json_schema_extra={"default": "name of the config file without .yaml"},
    )
    dir: str = Field(default="runs", min_length=1, description="folder that holds the folders of runs")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="device to compute on; auto: cuda when there is one for each process, else cpu"
    )
    record_pipeline: int = Field(
        default=3,
        ge=0,
        description="optimizer step, counted from the start or the resume of the run, whose pipeline is recorded for "
        "the report, with the begin and end of every instruction of every stage; 0: none",
    )
    wandb: Literal["off", "offline", "online"] = Field(
        default="off", description="Weights & Biases: one run for all ranks; offline writes it to disk only"
    )
    tensorboard: bool = Field(default=False, description="whether TensorBoard event files are written")


class RunConfig(Section):
    """Everything that a run is. Equal configs give equal results."""

    model: ModelConfig = Field(description="the architecture: keys, or the path of a YAML file that holds them")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="the layout over processes")
    train: TrainConfig = Field(description="batch, steps and arithmetic")
    optim: OptimConfig = Field(default_factory=OptimConfig, validate_default=True, description="optimizer")
    data: DataConfig = Field(default_factory=DataConfig, description="token files")
    init: InitConfig = Field(default_factory=InitConfig, description="first weights")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="states of the run on disk")
    run: RunSettings = Field(default_factory=RunSettings, description="results and device")
    kernels: KernelsConfig = Field(default_factory=KernelsConfig, description="implementations of operations")

    @field_validator("optim", mode="after")
    @classmethod
    def _fill_decay_steps(cls, optim: OptimConfig, info: ValidationInfo) -> OptimConfig:
        """The one default that reaches across sections: how long the learning rate decays."""
        train = info.data.get("train")
        if optim.decay_steps is not None or train is None:
            return optim
        return optim.model_copy(update={"decay_steps": default_decay_steps(optim.schedule, train.num_steps)})

    @property
    def dp(self) -> int:
        """Data-parallel size, processes."""
        assert self.parallel.dp is not None, "parallel.dp depends on the number of processes: use with_world first"
        return self.parallel.dp

    @property
    def world_size(self) -> int:
        """Number of processes of the layout."""
        return self.dp * self.parallel.tp * self.parallel.pp * self.parallel.cp

    @property
    def num_microbatches(self) -> int:
        """Forward passes of each dp rank in one optimizer step."""
        per_pass = self.train.micro_batch_size * self.dp
        assert self.train.global_batch_size % per_pass == 0, "rules.py lets no such batch through"
        return self.train.global_batch_size // per_pass

    @property
    def tokens_per_step(self) -> int:
        """Target tokens of one global batch when no document boundary masks any."""
        return self.train.global_batch_size * self.train.seq_len


def default_decay_steps(schedule: str, num_steps: int) -> int:
    """Length of the decay when it is not given; a fifth for wsd (Hägele et al. 2024, arXiv:2405.18392, section 4)."""
    return max(1, num_steps // 5) if schedule == "wsd" else num_steps
