from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from megatron_lite.config.schema import ModelConfig
from megatron_lite.models.families import parameter_table
from megatron_lite.models.identity import ParameterSpec
from megatron_lite.zero.bucket import Bucket
from megatron_lite.zero.partition import ALIGNMENT, Interval, lay_out
from tests.models.tiny import model_config
from tests.zero.buckets import bucket_of, memory_plan

CONFIGS = {
    "llama": model_config(),
    "1 kv head": model_config(num_kv_heads=1),
    "gpt2": model_config("gpt2"),
    "wide gpt2": model_config("gpt2", hidden_size=40, num_heads=4, num_kv_heads=4, ffn_hidden_size=300),
}
of_every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def layer_specs(config: ModelConfig) -> dict[str, ParameterSpec]:
    return {spec.name: spec for spec in parameter_table(config) if spec.name.startswith("layers.0.")}


def layer_bucket(
    config: ModelConfig,
    tp: tuple[int, int] = (1, 0),
    dp: tuple[int, int] = (1, 0),
    stage: int = 1,
    is_sequence: bool = False,
) -> Bucket:
    """The bucket of the first layer as rank ``tp[1]`` of ``tp[0]`` and ``dp[1]`` of ``dp[0]`` holds it."""
    specs = layer_specs(config)
    shapes = [(name, spec.shard(*tp).shape) for name, spec in specs.items()]
    bucket = bucket_of(lay_out("layers.0", shapes, dp[0]), memory_plan(dp=dp, stage=stage))
    bucket.describe(specs, *tp, is_sequence)
    return bucket


# Decay


@pytest.mark.parametrize("dp", [1, 2, 3, 4, 8])
@of_every_config
def test_runs_cover_each_slice_once_with_the_right_decay(config: ModelConfig, dp: int) -> None:
    specs = layer_specs(config)
    assert {spec.decay for spec in specs.values()} == {True, False}
    decays: dict[int, bool] = {}
    for index in range(dp):
        bucket = layer_bucket(config, dp=(dp, index))
        at = 0
        for run, run_decays in bucket.decay_runs():
            assert run.start == at and run.size > 0
            assert run.start % ALIGNMENT == 0, "vectorised code sees the same boundaries in every layout"
            at = run.stop
            for element in range(run.start, run.stop):
                decays[bucket.region.start + element] = run_decays
        assert at == bucket.region.size
    assert len(decays) == bucket.layout.size
    for slot in bucket.layout.slots:
        found = {decays[element] for element in range(slot.interval.start, slot.interval.stop)}
        assert found == {specs[slot.name].decay}, slot.name


def test_a_stage_that_holds_the_whole_state_has_the_same_runs() -> None:
    whole = layer_bucket(CONFIGS["gpt2"], dp=(4, 2), stage=0)
    assert whole.region == whole.layout.whole
    assert whole.decay_runs()[0][0].start == 0
    assert sum(run.size for run, _ in whole.decay_runs()) == whole.layout.size


# Partial sums over tensor parallelism


def global_sum(config: ModelConfig, tp: int, is_sequence: bool, replicas_meet: bool = True) -> dict[str, Tensor]:
    """Every rank's gradients after the exchange that ``partial_sums`` describes; what rank r put in is r + 1."""
    buckets = [layer_bucket(config, tp=(tp, index), is_sequence=is_sequence) for index in range(tp)]
    sizes = {bucket.partial_buffer_size for bucket in buckets}
    assert len(sizes) == 1, "the buffers of all ranks are added"
    total = torch.zeros(sizes.pop(), dtype=torch.float64)
    for rank, bucket in enumerate(buckets):
        bucket.gradients.kept.fill_(rank + 1)
        for part in bucket.partial_sums:
            assert part.local.size == part.place.size > 0
            total[part.place.start : part.place.stop] += bucket.gradients.kept[part.local.start : part.local.stop]
    result = {}
    for rank, bucket in enumerate(buckets):
        for part in bucket.partial_sums:
            bucket.gradients.kept[part.local.start : part.local.stop] = total[part.place.start : part.place.stop]
        for slot in bucket.layout.slots:
            result[f"{rank} {slot.name}"] = bucket.gradients.kept[slot.interval.start : slot.interval.stop].view(
                slot.shape
            )
    return result


@pytest.mark.parametrize("is_sequence", [False, True], ids=["whole tokens", "sequence parallel"])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@of_every_config
def test_ranks_that_hold_the_same_rows_meet_and_no_others(config: ModelConfig, tp: int, is_sequence: bool) -> None:
    if config.num_heads % tp or config.ffn_hidden_size % tp:
        tp = 4  # the widest that this model takes
    gradients = global_sum(config, tp, is_sequence)
    for name, spec in layer_specs(config).items():
        for index in range(tp):
            shard, found = spec.shard(tp, index), gradients[f"{index} {name}"]
            if spec.shard_dim is None:
                summed = is_sequence and tp > 1 and spec.partial_under_sequence_parallel
                holders = range(tp) if summed else [index]
                assert torch.equal(found, torch.full(spec.shape, float(sum(h + 1 for h in holders)), dtype=found.dtype))
                continue
            for piece in shard.pieces:
                rows = found.narrow(spec.shard_dim, piece.local, piece.size)
                holders = [h for h in range(tp) if any(p.start == piece.start for p in spec.shard(tp, h).pieces)]
                assert len(holders) == piece.replicas
                assert torch.equal(rows, torch.full_like(rows, sum(h + 1 for h in holders))), (name, index)


def test_replicated_key_value_heads_are_partial_sums() -> None:
    """So that the test above is not about nothing: which parameters meet, in four layouts."""
    both = {"layers.0.attention.qkv.weight", "layers.0.attention_norm.weight", "layers.0.mlp_norm.weight"}
    for tp, is_sequence, expected in (
        (2, False, set()),
        (4, False, {"layers.0.attention.qkv.weight"}),
        (4, True, both),
        (1, True, set()),
    ):
        bucket = layer_bucket(CONFIGS["llama"], tp=(tp, 0), is_sequence=is_sequence)
        assert {part.parameter for part in bucket.partial_sums} == expected


# What counts in the norm


@pytest.mark.parametrize("tp", [1, 2, 4])
@of_every_config
def test_every_element_counts_on_exactly_one_rank(config: ModelConfig, tp: int) -> None:
    specs = layer_specs(config)
    counted = {name: torch.zeros(spec.shape, dtype=torch.float64) for name, spec in specs.items()}
    for index in range(tp):
        bucket = layer_bucket(config, tp=(tp, index))
        counts = torch.ones(bucket.layout.size, dtype=torch.float64)
        for interval in bucket.uncounted:
            counts[interval.start : interval.stop] = 0
        for slot in bucket.layout.slots:
            spec = specs[slot.name]
            local = counts[slot.interval.start : slot.interval.stop].view(slot.shape)
            dim = spec.shard_dim or 0
            for piece in spec.shard(tp, index).pieces:
                counted[slot.name].narrow(dim, piece.start, piece.size).add_(local.narrow(dim, piece.local, piece.size))
    for name, count in counted.items():
        assert torch.equal(count, torch.ones_like(count)), name


def test_a_tied_parameter_does_not_count() -> None:
    table = {spec.name: spec for spec in parameter_table(model_config(tie_embeddings=True))}
    for name, is_counted in (("embedding.tokens.weight", True), ("head.weight", False)):
        bucket = bucket_of(lay_out(name, [(name, table[name].shape)], 1), memory_plan())
        bucket.describe(table, 1, 0, False)
        assert bucket.uncounted == ([] if is_counted else [Interval(0, 97 * 32)])


# Memory


def one_parameter(dtype: torch.dtype, shape: tuple[int, ...] = (5, 7)) -> tuple[nn.Parameter, Bucket]:
    bucket = bucket_of(lay_out("unit", [("w", shape)], 2), memory_plan(dtype, stage=0))
    return bucket.parameters["w"], bucket


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_parameters_gradients_and_master_weights_are_one_memory(dtype: torch.dtype) -> None:
    """No copies where the dtypes agree: autograd adds into the bucket, and what the optimizer writes is used."""
    parameter, bucket = one_parameter(dtype)
    x = torch.randn(3, 5, dtype=dtype)
    for times in (1, 2):
        (x @ parameter).sum().backward()
        gradient = times * x.sum(dim=0)[:, None].expand(5, 7)
        torch.testing.assert_close(bucket.gradients.kept[:35].view(5, 7), gradient)
        assert parameter.grad is not None and parameter.grad.data_ptr() == bucket.gradients.kept.data_ptr()
    assert not bucket.gradients.kept[35:].any()
    bucket.master.fill_(3)
    assert torch.equal(parameter, torch.full((5, 7), 3.0, dtype=dtype))


def test_bf16_gradients_are_added_in_fp32() -> None:
    """The sum of 300 bf16 gradients equals the fp32 sum of them bit by bit, which a sum in bf16 misses by far."""
    parameter, bucket = one_parameter(torch.bfloat16)
    assert parameter.dtype == torch.bfloat16 and bucket.gradients.kept.dtype == bucket.master.dtype == torch.float32
    generator = torch.Generator().manual_seed(0)
    expected, in_bf16 = torch.zeros(5, 7), torch.zeros(5, 7, dtype=torch.bfloat16)
    for _ in range(300):
        gradient = (1 + 0.1 * torch.randn(5, 7, generator=generator)).to(torch.bfloat16)
        parameter.backward(gradient)
        expected += gradient.float()
        in_bf16 += gradient
        assert parameter.grad is None, "nothing is left behind in bf16"
    assert torch.equal(bucket.gradients.kept[:35].view(5, 7), expected)
    assert not torch.allclose(in_bf16.float(), expected, rtol=1e-2)


def test_a_parameter_used_twice_in_one_backward_enters_once_as_a_sum() -> None:
    parameter, bucket = one_parameter(torch.bfloat16)
    x = torch.full((1, 5), 2.0, dtype=torch.bfloat16)
    ((x @ parameter).sum() + 3 * (x @ parameter).sum()).backward()
    assert torch.equal(bucket.gradients.kept[:35], torch.full((35,), 8.0))


def test_a_tied_table_is_one_memory_with_two_gradients() -> None:
    owner, follower = (lay_out(name, [(name, (4, 3))], 1) for name in ("embedding", "head"))
    first = bucket_of(owner, memory_plan())
    second = bucket_of(follower, memory_plan(), shared_with=first)
    first.flat[:12] = 5
    embedding, head = first.parameters["embedding"], second.parameters["head"]
    assert head.data_ptr() == embedding.data_ptr() and (head == 5).all()
    head.sum().backward()
    assert second.gradients.kept[:12].eq(1).all() and not first.gradients.kept.any()


def test_replicated_pieces_are_contiguous_in_every_layout() -> None:
    """What ``Bucket`` rests on: only rows are replicated."""
    for config, tp in itertools.product(CONFIGS.values(), (2, 4)):
        for spec in parameter_table(config):
            if spec.shard_dim == 1:
                assert all(piece.replicas == 1 for piece in spec.shard(tp, 0).pieces)
