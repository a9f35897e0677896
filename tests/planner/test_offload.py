"""Buffers of offloaded state: as large as those that a run makes, and in main memory, where it makes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lite.optim.precision import precision_of
from megatron_lite.planner.advice import why_not
from megatron_lite.planner.memory import predict
from megatron_lite.train.build import build
from megatron_lite.train.checkpoints import blank_weights
from megatron_lite.utils.memory import readable_bytes
from tests.utils.meshes import mesh
from tests.zero.test_engine import config_of

KEYS = ("train.precision=bf16", "parallel.zero_stage=3", "parallel.gather_policy=keep")
ALL = ("optimizer", "gradients", "parameters")


def places(place: str, *what: str) -> list[str]:
    return [f"offload.{one}={place}" for one in what]


def test_the_stream_of_a_run_in_files_is_what_is_predicted_in_main_memory(tmp_path: Path) -> None:
    """What a CPU run allocates, where main memory is the device; beside a GPU the same buffers are in main memory."""
    config = config_of(*KEYS, *places("nvme", *ALL), f"offload.dir={tmp_path}", world_size=1)
    training = build(config, mesh=mesh(), weights=blank_weights(precision_of(config.train).master))
    try:
        num_bytes = training.stream.num_bytes
    finally:
        training.memory.close()
    own = ("optimizer state on its way", "gradients on their way", "parameters on their way")
    on_cpu, on_gpu = (predict(config, 0, device) for device in ("cpu", "cuda"))
    assert sum(on_cpu.buffer_parts[what].device for what in own) == num_bytes > 0
    assert on_cpu.buffers.host == 0, "on a CPU main memory is the device"
    copies = on_gpu.buffers.host - num_bytes  # of a bucket's updated parameters, on their way to the GPU
    assert 0 < copies <= num_bytes // 3
    read = on_gpu.buffer_parts["parameters on their way"].device
    assert [on_gpu.buffer_parts[what].device for what in own] == [0, 0, read] and 0 < read < num_bytes


@pytest.mark.parametrize("what", ALL)
def test_only_parameters_pass_through_the_device(what: str) -> None:
    plain, moved = (
        predict(config_of(*KEYS, *extra, world_size=1), 0, "cuda").buffers for extra in ((), places("cpu", what))
    )
    assert (moved.device > plain.device) == (what == "parameters")
    assert plain.host == 0 and (moved.host > 0) == (what != "gradients"), "sums in main memory are used in place"


def test_why_a_state_does_not_fit() -> None:
    config = config_of("parallel.zero_stage=0", world_size=1)
    state = predict(config, 0, "cpu").state.device
    words = f"rank 0 needs {readable_bytes(state)} for its state, the process itself holds 1.00 MiB, and the limit is "
    limit = readable_bytes(state - 1)
    assert why_not(config, 0, state - 1, device="cpu", source="ulimit -v", used_bytes=1 << 20).startswith(
        f"{words}{limit} (ulimit -v); "
    )
    alone = why_not(config, 0, state - 1, device="cpu")
    assert alone.startswith(f"rank 0 needs {readable_bytes(state)} for its state, and the limit is {limit}; ")
    assert why_not(config, 0, state, device="cpu") == "", "negative control"
