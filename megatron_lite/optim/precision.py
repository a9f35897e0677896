"""Which dtype holds what."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_lite.config.schema import TrainConfig

_COMPUTE = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


@dataclass(frozen=True)
class Precision:
    """compute: parameters in use and activations. master: the weights that the optimizer updates, which are the
    parameters in use where the two agree. gradients: sums over microbatches, and what is reduced over ranks."""

    compute: torch.dtype
    master: torch.dtype
    gradients: torch.dtype

    @property
    def moments(self) -> torch.dtype:
        """What the optimizer keeps beside weights, and computes in."""
        return torch.float64 if self.master == torch.float64 else torch.float32

    @property
    def rounds_stochastically(self) -> bool:
        """Whether the weights are kept in less than the optimizer computes in, so that it has to round them."""
        return self.master != self.moments


def precision_of(train: TrainConfig) -> Precision:
    """The dtypes of a run. With ``train.stochastic_rounding`` there are no master weights beside the parameters."""
    compute = _COMPUTE[train.precision]
    wide = torch.float64 if compute == torch.float64 else torch.float32
    return Precision(
        compute=compute,
        master=compute if train.stochastic_rounding else wide,
        gradients=compute if train.grad_dtype == "param" else wide,
    )
