"""Runs a schedule on one rank: a table from instruction to method."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_lite.distributed.mesh import Mesh
from megatron_lite.models.transformer import Transformer
from megatron_lite.ops.linear import WeightGradients
from megatron_lite.pipeline.instructions import (
    RECEIVES,
    SENDS,
    Instruction,
    InstructionList,
    Kind,
    Placement,
    Schedule,
)
from megatron_lite.pipeline.p2p import Mail
from megatron_lite.pipeline.schedules import forward_only
from megatron_lite.pipeline.timeline import Recorder
from megatron_lite.pipeline.zero_steps import ZeroSteps, with_zero


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


class BackwardWatcher(Protocol):
    """Who acts at the forwards and backwards of single microbatches."""

    def before_forward(self, microbatch: int) -> None: ...
    def around_backward(self, microbatch: int) -> AbstractContextManager[None]: ...


class ParameterMemory(Protocol):
    """Who makes parameters whole before they are used, and sums gradients over ranks: `megatron_lite.zero.engine`."""

    def running(self, run: Hashable) -> AbstractContextManager[None]: ...
    def open_chunk(self, chunk: int, *, keep: bool) -> None: ...
    def close_chunk(self, chunk: int) -> None: ...
    def backward(
        self, chunk: int, microbatch: int, *, is_weight_half: bool, starts_sums: bool
    ) -> AbstractContextManager[None]: ...
    def start_reduction(self, chunk: int, microbatch: int) -> None: ...


class Resident:
    """Parameters that are always whole, and gradients that nobody sums before the end of a step."""

    def running(self, run: Hashable) -> AbstractContextManager[None]:
        return nullcontext()

    def open_chunk(self, chunk: int, *, keep: bool) -> None: ...
    def close_chunk(self, chunk: int) -> None: ...
    def backward(
        self, chunk: int, microbatch: int, *, is_weight_half: bool, starts_sums: bool
    ) -> AbstractContextManager[None]:
        return nullcontext()

    def start_reduction(self, chunk: int, microbatch: int) -> None: ...


Place = tuple[int, int]  # a chunk and a microbatch
# Microbatches of an evaluation that run together, for each rank: the pipeline fills and drains once for each group.
EVALUATED_PER_RANK = 4


@dataclass
class _Step:
    """What one run of a schedule holds. Tensors leave when they are used.

    inputs: of chunks, which their gradients come back to. graphs: the end of each forward's graph, without the tensor
    that it made: that one goes where it is sent, and is free once it has left.
    """

    microbatches: Sequence[MicrobatchLike]
    loss_weights: Tensor
    mail: Mail
    inputs: dict[Place, Tensor] = field(default_factory=dict)
    graphs: dict[Place, GradientEdge] = field(default_factory=dict)
    output_gradients: dict[Place, Tensor] = field(default_factory=dict)
    outgoing: dict[Instruction, Tensor] = field(default_factory=dict)
    loss_sums: list[Tensor] = field(default_factory=list)
    summed: frozenset[Place] = frozenset()  # after whose backward the gradients of a chunk are summed over ranks


class PipelineRunner:
    """Executes instruction lists on this rank's chunks of the model.

    Args:
        chunks: the parts of the model that ``placement`` puts on this rank, by number.
        reduce_gradients: called once, by the REDUCE_GRADIENTS instruction.
        weight_gradients: for schedules with split backwards, what each chunk's linear layers leave for later.
        memory: is told when chunks are used. zero: what an evaluation's schedules have of ZeRO's steps.
    """

    def __init__(
        self,
        chunks: Mapping[int, Transformer],
        placement: Placement,
        *,
        mesh: Mesh,
        dtype: torch.dtype,
        tokens_divide_by: int,
        reduce_gradients: Callable[[], None],
        weight_gradients: Mapping[int, WeightGradients] | None = None,
        memory: ParameterMemory | None = None,
        zero: ZeroSteps | None = None,
    ) -> None:
        self.chunks, self.placement, self.mesh, self.dtype = dict(chunks), placement, mesh, dtype
        self._tokens_divide_by, self._reduce_gradients = tokens_divide_by, reduce_gradients
        self._weight_gradients = weight_gradients or {}
        self._memory: ParameterMemory = memory or Resident()
        self._evaluation = replace(zero or ZeroSteps(), reduce="none")
        self.recorder: Recorder | None = None  # while it is set, it takes down when instructions begin and end
        self.watcher: BackwardWatcher | None = None
        self.current: Instruction | None = None  # what is being computed, or was last
        self._last_chunk = placement.num_chunks - 1
        self._methods: dict[Kind, Callable[[_Step, Instruction], None]] = {
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward_whole,
            Kind.BACKWARD_INPUT: self._backward_input,
            Kind.BACKWARD_WEIGHT: self._backward_weight,
            Kind.GATHER_PARAMETERS: lambda step, one: self._memory.open_chunk(one.chunk, keep=one.microbatch < 0),
            Kind.RELEASE_PARAMETERS: lambda step, one: self._memory.close_chunk(one.chunk),
            Kind.START_REDUCTION: lambda step, one: self._memory.start_reduction(one.chunk, one.microbatch),
            Kind.REDUCE_GRADIENTS: lambda step, one: self._reduce_gradients(),
        }

    @property
    def model(self) -> Transformer:
        """The only chunk of a rank that holds one."""
        (only,) = self.chunks.values()
        return only

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[MicrobatchLike]) -> list[Tensor]:
        """Forward passes alone. Returns the loss sums (float64 scalars) on the rank of the last chunk, else nothing.

        They run in groups, of which no rank holds more than the activations of one.
        """
        one = torch.ones((), dtype=torch.float64, device=self.mesh.device)
        group, loss_sums = EVALUATED_PER_RANK * self.placement.num_ranks, list[Tensor]()
        for start in range(0, len(microbatches), group):
            part = microbatches[start : start + group]
            loss_sums += self.run(with_zero(forward_only(self.placement, len(part)), self._evaluation), part, one)
        return loss_sums

    def run(self, schedule: Schedule, microbatches: Sequence[MicrobatchLike], loss_weight: Tensor) -> list[Tensor]:
        """Runs the schedule over the microbatches.

        loss_weight: float64 scalar, or one for each microbatch, by which its sum of token losses enters the loss.
        Returns the loss sums (float64 scalars) in microbatch order on the rank of the last chunk, else nothing.
        """
        weights = loss_weight.expand(len(microbatches))
        instructions = schedule.lists[self.mesh.pp.index]
        summed = frozenset((c, m) for kind, c, m in instructions if kind is Kind.START_REDUCTION)
        step = _Step(microbatches, weights, self._mail(schedule, microbatches), summed=summed)
        try:
            with self._memory.running((schedule.name, len(microbatches))):
                self._execute(instructions, step)
        except BaseException:
            for weight_gradients in self._weight_gradients.values():
                weight_gradients.forget()
            raise
        finally:
            step.mail.close()
        left = [*step.inputs, *step.graphs, *step.output_gradients, *step.outgoing]
        assert not left, f"the schedule left tensors behind: {left}"
        return step.loss_sums

    def _execute(self, instructions: InstructionList, step: _Step) -> None:
        receives: list[Instruction] = []
        sends: list[tuple[Instruction, Tensor]] = []
        for instruction in instructions:
            if self.recorder is not None:
                self.recorder.begin(instruction)
            if instruction.kind in RECEIVES:
                receives.append(instruction)
            elif instruction.kind in SENDS:
                sends.append((instruction, step.outgoing.pop(instruction)))
            else:
                if receives or sends:
                    step.mail.exchange(receives, sends)
                    receives, sends = [], []
                self.current = instruction
                self._methods[instruction.kind](step, instruction)
            if self.recorder is not None:
                self.recorder.end()
        step.mail.exchange(receives, sends)
        step.mail.flush()

    def _mail(self, schedule: Schedule, microbatches: Sequence[MicrobatchLike]) -> Mail:
        width = next(iter(self.chunks.values())).config.hidden_size
        tokens = microbatches[0].tokens.numel() // self._tokens_divide_by if microbatches else 0
        return Mail(
            schedule.lists[self.mesh.pp.index],
            self.placement,
            len(microbatches),
            mesh=self.mesh,
            shape=(tokens, width),
            dtype=self.dtype,
        )

    def _forward(self, step: _Step, instruction: Instruction) -> None:
        _, chunk, m = instruction
        batch, model, trains = step.microbatches[m], self.chunks[chunk], torch.is_grad_enabled()
        if trains and self.watcher is not None:
            self.watcher.before_forward(m)
        inputs = batch.tokens if chunk == 0 else self._activation(step, instruction)
        like = torch.empty((), dtype=self.dtype, device=self.mesh.device)
        batch_size, seq_len = batch.tokens.shape
        sequences = model.sequences(batch_size, seq_len, batch.positions, batch.documents, like)
        output = model(inputs, sequences, batch.targets)
        if trains:
            step.graphs[chunk, m] = get_gradient_edge(output)
            if chunk > 0:
                step.inputs[chunk, m] = inputs
        if chunk == self._last_chunk:
            step.loss_sums.append(output.detach())
        elif self.placement.is_local(chunk):
            step.inputs[chunk + 1, m] = output.detach().requires_grad_(trains)
        else:
            step.outgoing[Instruction(Kind.SEND_ACTIVATION, chunk, m)] = output.detach()

    def _activation(self, step: _Step, forward: Instruction) -> Tensor:
        """The input of a chunk that is not the first."""
        _, chunk, m = forward
        if self.placement.is_local(chunk - 1):
            return step.inputs.pop((chunk, m))
        received = self._take(step, Instruction(Kind.RECEIVE_ACTIVATION, chunk, m), forward)
        return received.requires_grad_(torch.is_grad_enabled())

    def _take(self, step: _Step, receive: Instruction, used_by: Instruction) -> Tensor:
        tensor = step.mail.take(receive, used_by)
        if self.recorder is not None:
            self.recorder.arrived()
        return tensor

    def _backward_whole(self, step: _Step, instruction: Instruction) -> None:
        with nullcontext() if self.watcher is None else self.watcher.around_backward(instruction.microbatch):
            self._backward(step, instruction)

    def _backward(self, step: _Step, instruction: Instruction) -> None:
        kind, chunk, m = instruction
        if chunk == self._last_chunk:
            gradient = step.loss_weights[m]
        elif self.placement.is_local(chunk):
            gradient = step.output_gradients.pop((chunk, m))
        else:
            gradient = self._take(step, Instruction(Kind.RECEIVE_GRADIENT, chunk, m), instruction)
        starts_sums = kind is Kind.BACKWARD and (chunk, m) in step.summed
        with self._memory.backward(chunk, m, is_weight_half=False, starts_sums=starts_sums):
            torch.autograd.backward(step.graphs.pop((chunk, m)), gradient)
        if chunk == 0:
            return
        input_gradient = step.inputs.pop((chunk, m)).grad
        assert input_gradient is not None
        if self.placement.is_local(chunk - 1):
            step.output_gradients[chunk - 1, m] = input_gradient
        else:
            step.outgoing[Instruction(Kind.SEND_GRADIENT, chunk, m)] = input_gradient

    def _backward_weight(self, step: _Step, instruction: Instruction) -> None:
        _, chunk, m = instruction
        with self._memory.backward(chunk, m, is_weight_half=True, starts_sums=False):
            self._weight_gradients[chunk].run(m)

    def _backward_input(self, step: _Step, instruction: Instruction) -> None:
        with self._weight_gradients[instruction.chunk].collecting(instruction.microbatch):
            self._backward(step, instruction)
