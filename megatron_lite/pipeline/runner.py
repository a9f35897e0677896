"""Runs a schedule on one stage: a table from instruction to method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatron_lite.distributed.mesh import Axis, Mesh
from megatron_lite.models.transformer import Transformer
from megatron_lite.pipeline.p2p import Inbox, Outbox
from megatron_lite.pipeline.schedules import Instruction, Kind, Schedule


class MicrobatchLike(Protocol):
    """tokens, targets: int64 ``[B, S]``; documents: int ``[B, S]`` or None; positions: int64 ``[B, S]`` or None."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def documents(self) -> Tensor | None: ...
    @property
    def positions(self) -> Tensor | None: ...


@dataclass
class _Step:
    """What one run of a schedule holds. Tensors are keyed by microbatch and leave when they are used."""

    microbatches: Sequence[MicrobatchLike]
    loss_weight: Tensor
    activations_in: Inbox | None
    gradients_in: Inbox | None
    activations_out: Outbox | None
    gradients_out: Outbox | None
    inputs: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    output_gradients: dict[int, Tensor] = field(default_factory=dict)
    loss_sums: list[Tensor] = field(default_factory=list)

    def close(self) -> None:
        for outbox in (self.activations_out, self.gradients_out):
            if outbox is not None:
                outbox.flush()


class PipelineRunner:
    """Executes instruction lists on this rank's stage of the model.

    reduce_gradients: called once, by the REDUCE_GRADIENTS instruction.
    """

    def __init__(
        self,
        stage: Transformer,
        *,
        mesh: Mesh,
        dtype: torch.dtype,
        tokens_divide_by: int,
        reduce_gradients: Callable[[], None],
    ) -> None:
        self.stage, self.mesh, self.dtype = stage, mesh, dtype
        self._tokens_divide_by, self._reduce_gradients = tokens_divide_by, reduce_gradients
        self._methods: dict[Kind, Callable[[_Step, int], None]] = {
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.RECEIVE_ACTIVATION: self._receive_activation,
            Kind.SEND_ACTIVATION: self._send_activation,
            Kind.RECEIVE_GRADIENT: self._receive_gradient,
            Kind.SEND_GRADIENT: self._send_gradient,
            Kind.REDUCE_GRADIENTS: lambda step, microbatch: self._reduce_gradients(),
        }

    def run(self, schedule: Schedule, microbatches: Sequence[MicrobatchLike], loss_weight: Tensor) -> list[Tensor]:
        """Runs the schedule over the microbatches.

        loss_weight: float64 scalar by which each microbatch's sum of token losses enters the loss of the step.
        Returns the loss sums (float64 scalars) in microbatch order on the last stage, and nothing on the others.
        """
        step = self._begin(schedule, microbatches, loss_weight)
        for instruction in schedule:
            self._methods[instruction.kind](step, instruction.microbatch)
        step.close()
        assert not (step.inputs or step.outputs or step.output_gradients) or not _has_backward(schedule)
        return step.loss_sums

    def _begin(self, schedule: Schedule, microbatches: Sequence[MicrobatchLike], loss_weight: Tensor) -> _Step:
        forward, back = self.mesh.pp, self.mesh.pp_return
        shape = (0, 0)
        if microbatches:
            shape = (microbatches[0].tokens.numel() // self._tokens_divide_by, self.stage.config.hidden_size)

        def inbox(kind: Kind, axis: Axis, from_index: int) -> Inbox | None:
            expected = [instruction.microbatch for instruction in schedule if instruction.kind is kind]
            return Inbox(axis, from_index, expected, shape, self.dtype, self.mesh.device) if expected else None

        return _Step(
            microbatches,
            loss_weight,
            activations_in=inbox(Kind.RECEIVE_ACTIVATION, forward, forward.index - 1),
            gradients_in=inbox(Kind.RECEIVE_GRADIENT, back, back.index + 1),
            activations_out=None if forward.is_last else Outbox(forward, forward.index + 1),
            gradients_out=None if back.is_first else Outbox(back, back.index - 1),
        )

    def _forward(self, step: _Step, m: int) -> None:
        batch = step.microbatches[m]
        inputs = step.inputs.get(m, batch.tokens)
        like = torch.empty((), dtype=self.dtype, device=self.mesh.device)
        batch_size, seq_len = batch.tokens.shape
        sequences = self.stage.sequences(batch_size, seq_len, batch.positions, batch.documents, like)
        output = self.stage(inputs, sequences, batch.targets)
        if self.mesh.pp.is_last:
            step.loss_sums.append(output.detach())
        step.outputs[m] = output
        if not torch.is_grad_enabled():
            step.inputs.pop(m, None)

    def _backward(self, step: _Step, m: int) -> None:
        gradient = step.loss_weight if self.mesh.pp.is_last else step.output_gradients.pop(m)
        torch.autograd.backward(step.outputs.pop(m), gradient)
        if self.mesh.pp.is_first:
            step.inputs.pop(m, None)

    def _receive_activation(self, step: _Step, m: int) -> None:
        assert step.activations_in is not None
        step.inputs[m] = step.activations_in.take(m).requires_grad_(torch.is_grad_enabled())

    def _send_activation(self, step: _Step, m: int) -> None:
        assert step.activations_out is not None
        step.activations_out.send(step.outputs[m], m)
        if not torch.is_grad_enabled():
            del step.outputs[m]

    def _receive_gradient(self, step: _Step, m: int) -> None:
        assert step.gradients_in is not None
        step.output_gradients[m] = step.gradients_in.take(m)

    def _send_gradient(self, step: _Step, m: int) -> None:
        assert step.gradients_out is not None
        gradient = step.inputs.pop(m).grad
        assert gradient is not None
        step.gradients_out.send(gradient, m)


def _has_backward(schedule: Sequence[Instruction]) -> bool:
    return any(instruction.kind is Kind.BACKWARD for instruction in schedule)
