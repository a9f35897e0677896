"""Bytes that come and go within a step beside state and activations. Estimates: the largest of each kind.

What is in use at one time is not the sum of all of these; the sum is what a plan has to leave room for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from megatron_lite.config.schema import RunConfig
from megatron_lite.pipeline.instructions import Kind, Schedule
from megatron_lite.planner.activations import INT64, Activations, head_saves_gradients
from megatron_lite.planner.amounts import Amount
from megatron_lite.planner.state import Unit, item_sizes, keeps_whole_gradients, num_slices

# Of logits that the head makes at a time, bytes: CHUNK_BYTES of `megatron_lite.ops.linear_cross_entropy`.
LOGITS_CHUNK_BYTES = 32 << 20
NUMBERS_OF_A_TOKEN = 8  # maxima, sums, losses and the like, in the head
MOST_MOMENTS = 2  # that an optimizer keeps for a weight
# Messages of a pipeline rank under way at once: one each way that leaves, one that comes, and on CPUs those that are
# posted ahead of their place (`megatron_lite.pipeline.p2p`).
LEAVING, COMING, POSTED_AHEAD = 2, 1, 2
STREAM_SETS = 3  # of buffers in main memory, for what is not computed on in place: `megatron_lite.zero.offload`
SLICES_READ = 2  # of offloaded parameters on the device at once: one that is gathered, and the next one


def buffers_of(
    activations: Activations, schedule: Schedule, units: Sequence[Unit], rank: int, *, keeps_gathered: bool
) -> dict[str, Amount]:
    """Bytes by what they are for, where they lie. keeps_gathered: of ZeRO 3, whether gathered parameters stay."""
    config, device = activations.config, activations.device
    has_head = schedule.placement.rank_of[-1] == rank
    on_device = {
        **_of_zero(config, units, keeps_gathered),
        "computing": max(_layer(activations, units), _head(activations, schedule) if has_head else 0),
        "messages": _messages(activations, schedule, rank),
        "batch": _batch(config, device),
        "stashed weights": _stashed(config, units, schedule, rank),
    }
    return {what: Amount(num_bytes) for what, num_bytes in on_device.items()} | _of_offload(config, units, device)


def _of_zero(config: RunConfig, units: Sequence[Unit], keeps_gathered: bool) -> dict[str, int]:
    """Whole gradients and parameters where the state has slices, and what is under way to other ranks."""
    parallel, sizes = config.parallel, item_sizes(config.train)
    own = [unit for unit in units if not unit.shares]
    largest = max(unit.layout.size for unit in units)
    parts = {"gathered parameters": 0, "whole gradients": 0, "reduction": 0}
    if config.dp == 1:
        return parts
    # Received: a slice from each rank; and their sum.
    parts["reduction"] = (largest + largest // config.dp) * sizes.gradient
    slices = num_slices(config)
    if slices == 1 and keeps_whole_gradients(config):
        return parts
    if parallel.zero_stage in (1, 2):
        parts["gathered parameters"] = max(unit.layout.size for unit in own) // slices * sizes.compute
    if parallel.zero_stage == 3:
        whole = sum(unit.layout.size for unit in own) if keeps_gathered else _neighbours(own)
        parts["gathered parameters"] = whole * sizes.compute
    if not keeps_whole_gradients(config):
        waits = parallel.reduce_policy == "step" and config.num_microbatches > 1
        whole = sum(unit.layout.size for unit in units) if waits else _neighbours(units)
        parts["whole gradients"] = whole * sizes.gradient
    return parts


def _neighbours(units: Sequence[Unit]) -> int:
    """Elements of the two units side by side that are largest together: the one in use, and the next one."""
    sizes = [unit.layout.size for unit in units]
    return max((one + other for one, other in pairwise(sizes)), default=sizes[0])


def _of_offload(config: RunConfig, units: Sequence[Unit], device: str) -> dict[str, Amount]:
    """Slices of buckets on their way. The optimizer works in main memory on what is offloaded of it: in place, and on
    what is in files through the sets of buffers, also beside a GPU."""
    offload, sizes, zero = config.offload, item_sizes(config.train), config.parallel.zero_stage
    region = max(unit.layout.size for unit in units) // (num_slices(config) if zero >= 1 else 1)
    apart = device != "cpu"  # on a CPU main memory is the device

    def in_main_memory(num_bytes: int) -> Amount:
        return Amount(host=num_bytes) if apart else Amount(num_bytes)

    def buffers(place: str, item_size: int) -> Amount:
        return in_main_memory(STREAM_SETS * region * item_size if place == "nvme" else 0)

    state = buffers(offload.optimizer, sizes.master + MOST_MOMENTS * sizes.moment)
    parameters = buffers(offload.parameters, sizes.compute)
    if apart and offload.optimizer != "none":  # copies of what the CPU reads and makes, of one bucket
        stays = offload.gradients == "none"
        state += Amount(host=region * (sizes.compute + stays * sizes.gradient))
    if apart and offload.parameters != "none":
        parameters = Amount(SLICES_READ * region * sizes.compute, STREAM_SETS * region * sizes.compute)
    return {
        "optimizer state on its way": state,
        "gradients on their way": buffers(offload.gradients, sizes.gradient),
        "parameters on their way": parameters,
    }


def _head(activations: Activations, schedule: Schedule) -> int:
    """A chunk of logits, some numbers of each token, in 16 bits the product that is added to the gradient of the head,
    and the head's gradients where no forward has saved them."""
    row = activations.vocabulary * activations.item_size
    rows = min(activations.tokens, max(1, LOGITS_CHUNK_BYTES // row))
    product = row * activations.config.model.hidden_size if activations.wide_size > activations.item_size else 0
    gradients = 0 if head_saves_gradients(schedule) else activations.head_gradients
    numbers = NUMBERS_OF_A_TOKEN * activations.tokens * activations.wide_size
    return rows * row + numbers + product + gradients


def _layer(activations: Activations, units: Sequence[Unit]) -> int:
    """The gradients of a layer in backward: of what is before and behind the activation function, or of attention; and
    of one parameter, which autograd makes where gradients are added up in another dtype."""
    sizes = item_sizes(activations.config.train)
    largest = max(unit.largest_parameter for unit in units)
    own = largest * sizes.compute if sizes.gradient != sizes.compute else 0
    qkv, mixed, up, ffn = activations.widths
    inner = activations.tokens * max(up + ffn, qkv + mixed) * activations.item_size
    gathered = activations.whole_stream if activations.shard_tokens < activations.tokens else 0
    return inner + 3 * activations.stream + gathered + own


def _messages(activations: Activations, schedule: Schedule, rank: int) -> int:
    kinds = {one.kind for one in schedule.lists[rank]}
    leaving = len(kinds & {Kind.SEND_ACTIVATION, Kind.SEND_GRADIENT})
    receives = bool(kinds & {Kind.RECEIVE_ACTIVATION, Kind.RECEIVE_GRADIENT})
    ahead = POSTED_AHEAD if activations.device == "cpu" else 0
    return (min(leaving, LEAVING) + receives * (COMING + ahead)) * activations.stream


def _batch(config: RunConfig, device: str) -> int:
    """Token ids and targets of a step, documents and positions too; in main memory those of the next step as well."""
    per_token = 2 * INT64 + (config.data.isolate_documents) * (4 + INT64)
    tokens = config.num_microbatches * config.train.micro_batch_size * config.train.seq_len
    return tokens * per_token * (2 if device == "cpu" else 1)


def _stashed(config: RunConfig, units: Sequence[Unit], schedule: Schedule, rank: int) -> int:
    """Older weights, one set for each version that a microbatch in flight has seen, and the newest one aside."""
    versions = min(schedule.placement.num_ranks - rank, schedule.num_microbatches)
    if not config.parallel.weight_stashing or versions == 1:
        return 0
    return versions * sum(unit.layout.size for unit in units) * item_sizes(config.train).compute
