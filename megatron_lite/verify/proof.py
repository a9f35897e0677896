"""The proof: every layout against one process in float64, and against the layouts that it must equal bit by bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_lite.config.schema import RunConfig
from megatron_lite.distributed.worker_pool import WorkerPool
from megatron_lite.models.identity import same_bits
from megatron_lite.verify.layouts import ProofLayout
from megatron_lite.verify.shrink import NUM_STEPS
from megatron_lite.verify.trial import InconsistentRanks, global_tensors, run_trial

# Relative to the largest entry of each tensor. float64 sums of a few thousand terms round at 1e-13; float32 at 1e-6.
BOUNDS = {"float64": 1e-10, "float32": 1e-5}


@dataclass(frozen=True)
class Outcome:
    """What a layout computed, as global values. ``gradients`` of step 1, ``parameters`` after the last step."""

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Everything, named, in the order in which a mistake first shows."""
        yield "loss of step 1", torch.tensor(self.losses[:1], dtype=torch.float64)
        for name, gradient in self.gradients.items():
            yield f"gradient of {name}", gradient
        yield "grad_norm of step 1", torch.tensor(self.grad_norms[:1], dtype=torch.float64)
        for name, parameter in self.parameters.items():
            yield f"parameter {name}", parameter
        yield "loss of later steps", torch.tensor(self.losses[1:], dtype=torch.float64)
        yield "grad_norm of later steps", torch.tensor(self.grad_norms[1:], dtype=torch.float64)


@dataclass(frozen=True)
class Verdict:
    """How a layout compares.

    loss, grad_norm, gradient, parameter: largest difference from the reference, relative to the largest entry of the
    tensor. bitwise: whether it equals ``base`` in every bit (None if it is its own base). broken: the first value that
    breaks the bound or the bits, empty if the layout holds. broken_parameter: the first parameter whose gradient or
    value does. axis: which axis alone breaks it too.
    """

    layout: ProofLayout
    loss: float = 0.0
    grad_norm: float = 0.0
    gradient: float = 0.0
    parameter: float = 0.0
    bitwise: bool | None = None
    broken: str = ""
    broken_parameter: str = ""
    difference: float = 0.0
    axis: str = ""

    @property
    def holds(self) -> bool:
        return not self.broken


@dataclass
class Proof:
    """Runs layouts of one config and compares them; every layout is run once.

    config: as ``shrink`` made it. dtype: 'float64' or 'float32'. without: a reduction to leave out on purpose in every
    layout (see ``train/faults.py``), never in the reference.
    """

    config: RunConfig
    dtype: str
    pool: WorkerPool
    without: str | None = None
    timeout_s: float = 300.0
    _outcomes: dict[ProofLayout, Outcome] = field(default_factory=dict)
    _reference: Outcome | None = None

    def reference(self) -> Outcome:
        """One process, float64, nothing left out."""
        if self._reference is None:
            exact = self.config.model_copy(update={"train": self.config.train.model_copy(update={"precision": "fp64"})})
            self._reference = self._run(exact, ProofLayout(), None)
        return self._reference

    def outcome(self, layout: ProofLayout) -> Outcome:
        if layout not in self._outcomes:
            self._outcomes[layout] = self._run(self.config, layout, self.without)
        return self._outcomes[layout]

    def _run(self, config: RunConfig, layout: ProofLayout, without: str | None) -> Outcome:
        config = layout.apply(config)
        reports = self.pool.run(
            run_trial, layout.world_size, config, NUM_STEPS, without, timeout_s=self.timeout_s, threads=1
        )
        return Outcome(
            reports[0].losses,
            reports[0].grad_norms,
            global_tensors(config, reports, "gradients"),
            global_tensors(config, reports, "parameters"),
        )

    def judge(self, layout: ProofLayout) -> Verdict:
        """Runs ``layout`` and compares it; if it breaks a bound, finds the axis."""
        verdict = self.compare(layout)
        if verdict.holds:
            return verdict
        alone = [("none, one process breaks it too", ProofLayout()), *layout.single_axes()]
        axis = next((name for name, single in alone if not self.compare(single).holds), "only in combination")
        return dataclasses.replace(verdict, axis=axis)

    def compare(self, layout: ProofLayout) -> Verdict:
        """Runs ``layout`` and compares it."""
        try:
            outcome, base = self.outcome(layout), self.outcome(layout.base())
        except InconsistentRanks as error:
            return Verdict(layout, broken=str(error), broken_parameter=error.parameter)
        worst = {"loss": 0.0, "grad_norm": 0.0, "gradient": 0.0, "parameter": 0.0}
        broken: list[tuple[str, float]] = []
        for (name, value), (_, exact) in zip(outcome.values(), self.reference().values(), strict=True):
            found = relative_difference(value, exact)
            kind = name.split(" ")[0]
            worst[kind] = max(worst[kind], found) if found == found else found
            if not found <= BOUNDS[self.dtype]:
                broken.append((name, found))
        differing = differing_values(outcome, base)
        if differing and not broken:
            broken = [(name, 0.0) for name in differing]
        name, difference = broken[0] if broken else ("", 0.0)
        parameters = [name.split(" ")[-1] for name, _ in broken if name.startswith(("gradient of", "parameter "))]
        if broken and not difference:
            name += f" (not bitwise equal to {layout.base()})"
        return Verdict(
            layout,
            loss=worst["loss"],
            grad_norm=worst["grad_norm"],
            gradient=worst["gradient"],
            parameter=worst["parameter"],
            bitwise=None if layout == layout.base() else not differing,
            broken=name,
            broken_parameter=parameters[0] if parameters else "",
            difference=difference,
        )

    def run(self, layouts: list[ProofLayout], on_verdict: Callable[[Verdict], None] = lambda _: None) -> list[Verdict]:
        """Judges each layout; ``on_verdict`` is told of each as it comes."""
        verdicts = []
        for layout in layouts:
            verdicts.append(self.judge(layout))
            on_verdict(verdicts[-1])
        return verdicts


def relative_difference(value: Tensor, exact: Tensor) -> float:
    """Largest absolute difference over the largest entry of ``exact``; NaN where a NaN is."""
    if value.shape != exact.shape:
        raise ValueError(f"shapes {tuple(value.shape)} and {tuple(exact.shape)} differ")
    largest = float(exact.abs().max())
    distance = float((value.to(torch.float64) - exact.to(torch.float64)).abs().max())
    return distance / largest if largest > 0 else distance


def differing_values(one: Outcome, other: Outcome) -> list[str]:
    """Names of the values in which two outcomes differ in any bit, or are no numbers: a NaN proves nothing."""
    pairs = zip(one.values(), other.values(), strict=True)
    return [name for (name, value), (_, expected) in pairs if not same_bits(value, expected) or value.isnan().any()]
