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
from megatron_lite.config.loss_scale import LossScaleConfig
from megatron_lite.config.model import ModelConfig, RopeScaling
from megatron_lite.config.offload import OffloadConfig
from megatron_lite.config.optim import OptimConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.section import Rampup, Section

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "InitConfig",
    "KernelsConfig",
    "LossScaleConfig",
    "ModelConfig",
    "OffloadConfig",
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
    batch_rampup: Rampup | None = Field(
        default=None,
        description="[start, increment, samples]: the global batch begins with start sequences and grows by increment "
        "to global_batch_size, evenly over the first so many samples (arXiv:2005.14165, appendix B; Megatron-LM's "
        "rampup-batch-size); num_steps and the learning rate still count steps",
        json_schema_extra={"example": [8, 8, 1000]},
    )
    num_steps: int = Field(ge=1, description="number of optimizer steps")
    seed: int = Field(default=1234, ge=0, le=2**63 - 1, description="seed of the initial weights and of the data order")
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = Field(
        default="fp32",
        description="arithmetic; bf16 and fp16 compute in 16 bits with fp32 master weights, fp16 with a loss_scale",
    )
    grad_dtype: Literal["fp32", "param"] = Field(
        default="fp32",
        description="bf16 and fp16: what gradients are added up and reduced in over dp: fp32, or the parameters' "
        "dtype; no effect with fp32 and fp64",
    )
    stochastic_rounding: bool = Field(
        default=False,
        description="bf16 without master weights: the step rounds its result to one of the two bfloat16 next to it, "
        "the nearer one more often, so that the mean is right (arXiv:2010.06192)",
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
    embedding_gradient_scale: float = Field(
        default=1.0,
        gt=0,
        description="factor on the gradient of the token embedding, against spikes of the loss (GLM-130B, "
        "arXiv:2210.02414, takes 0.1); of a table that the head shares, only the embedding's part is scaled",
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
    network_interface: str | None = Field(
        default=None,
        min_length=1,
        description="network interface that the processes talk over, such as eth0 or ib0",
        json_schema_extra={"default": "GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, or what gloo and NCCL choose"},
    )
    rendezvous_timeout_s: float = Field(
        default=600.0, gt=0, description="longest wait at the start until every process has come, seconds"
    )
    stop_grace_s: float = Field(
        default=600.0,
        gt=0,
        description="longest time from a signal until the step is done, its checkpoint written and the run ended, "
        "seconds; what runs on is ended then, without a checkpoint",
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
    loss_scale: LossScaleConfig = Field(default_factory=LossScaleConfig, description="factor on the loss of fp16")
    offload: OffloadConfig = Field(default_factory=OffloadConfig, description="what leaves the device")
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
        """Forward passes of each dp rank in one optimizer step, once the batch has its full size."""
        per_pass = self.train.micro_batch_size * self.dp
        assert self.train.global_batch_size % per_pass == 0, "rules.py lets no such batch through"
        return self.train.global_batch_size // per_pass

    @property
    def tokens_per_step(self) -> int:
        """Target tokens of one global batch of full size when no document boundary masks any."""
        return self.train.global_batch_size * self.train.seq_len


def default_decay_steps(schedule: str, num_steps: int) -> int:
    """Length of the decay when it is not given; a fifth for wsd (Hägele et al. 2024, arXiv:2405.18392, section 4)."""
    return max(1, num_steps // 5) if schedule == "wsd" else num_steps
