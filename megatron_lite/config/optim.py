"""The optim section: the optimizer, its settings, and its learning rate over time."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from megatron_lite.config.section import Section, derived

# What is usual for each optimizer, where a key is not given. Adafactor: PaLM (arXiv:2204.02311, section 5), eps from
# arXiv:1804.04235, section 8. Lion: arXiv:2302.06675, section 5, for language models: a learning rate three to ten
# times smaller than AdamW's, with a decay as many times larger. Muon: arXiv:2502.16982, which takes AdamW's learning
# rate and decay, and torch.optim.Muon's momentum.
_LR = {"adamw": 3e-4, "adafactor": 1e-2, "sgd": 0.1, "lion": 1e-4, "muon": 3e-4}
_WEIGHT_DECAY = {"adamw": 0.1, "adafactor": 1.0, "sgd": 1e-4, "lion": 0.3, "muon": 0.1}
_BETA2 = {"adamw": 0.95, "adafactor": 0.95, "sgd": 0.95, "lion": 0.99, "muon": 0.95}
_EPS = {"adamw": 1e-8, "adafactor": 1e-30, "sgd": 1e-8, "lion": 1e-8, "muon": 1e-8}
_MOMENTUM = {"adamw": 0.9, "adafactor": 0.9, "sgd": 0.9, "lion": 0.9, "muon": 0.95}


def _usual(table: dict[str, float], **field: Any) -> Any:
    """A default that follows from the optimizer, as does advice; the help says AdamW's, and others."""
    usual = table["adamw"]
    others = [f"{name}: {value:g}" for name, value in table.items() if value != usual]
    made = derived("; ".join((f"{usual:g}", *others)), lambda data: table[data["name"]], **field)
    made.json_schema_extra["usual"] = table
    return made


class OptimConfig(Section):
    """The optimizer and its learning rate over time. A key has no effect with optimizers that it does not name."""

    name: Literal["adamw", "adafactor", "sgd", "lion", "muon"] = Field(
        default="adamw",
        description="optimizer; adamw (arXiv:1711.05101); adafactor without factoring, as PaLM's (arXiv:2204.02311); "
        "sgd; lion (arXiv:2302.06675); muon (arXiv:2502.16982) for the matrices of layers, adamw for all else",
    )
    lr: float = _usual(_LR, gt=0, description="highest learning rate, reached at step warmup_steps")
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
    weight_decay: float = _usual(
        _WEIGHT_DECAY,
        ge=0,
        description="decoupled weight decay, per unit of learning rate; not on norms and biases",
    )
    dynamic_weight_decay: bool = derived(
        "false; adafactor: true",
        lambda data: data["name"] == "adafactor",
        description="whether weight_decay is multiplied by the learning rate of the step, so that weights shrink by "
        "lr^2 * weight_decay, as PaLM's do",
    )
    beta1: float = Field(
        default=0.9,
        ge=0,
        lt=1,
        description="decay of the mean of gradients, per step; adafactor: of the mean of updates; "
        "lion: weight of the mean against the gradient in the update; muon: of what adamw updates; sgd has momentum",
    )
    beta2: float = _usual(
        _BETA2,
        ge=0,
        lt=1,
        description="decay of the mean of squared gradients, per step (adamw; muon: of what adamw updates); lion: of "
        "the mean of gradients; adafactor takes 1 - step^-0.8",
    )
    eps: float = _usual(
        _EPS,
        gt=0,
        description="added to the root of the mean of squared gradients; adafactor: to this mean, under the root",
    )
    momentum: float = _usual(
        _MOMENTUM,
        ge=0,
        lt=1,
        description="sgd, and muon's matrices: decay of the sum (sgd) or mean (muon) of gradients, per step; sgd with "
        "0 keeps no state",
    )
    nesterov: bool = derived(
        "false; muon with a momentum: true",
        lambda data: data["name"] == "muon" and data["momentum"] > 0,
        description="sgd, and muon's matrices: whether an update looks one step of momentum ahead",
    )
    newton_schulz_steps: int = Field(
        default=5, ge=1, le=99, description="muon: iterations of the orthogonalization of a matrix"
    )
    newton_schulz_dtype: Literal["master", "bf16"] = Field(
        default="master",
        description="muon: arithmetic of the orthogonalization: that of master weights, or bf16, which is faster on "
        "GPUs, and in which layouts agree to three digits alone",
    )
    clip_grad_norm: float = Field(
        default=1.0, ge=0, description="largest 2-norm of the whole gradient; a larger one is scaled down; 0: off"
    )

    def decay_rate(self, lr: float) -> float:
        """Weight decay at a learning rate, per unit of it."""
        return self.weight_decay * lr if self.dynamic_weight_decay else self.weight_decay
