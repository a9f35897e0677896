"""The update of flat memory: the kernels have the reference's bits, and all are as close to float64 as PyTorch's."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.ops import adamw as module
from megatron_lite.ops import dispatch, native
from megatron_lite.ops.adamw import AdamWStep, adamw, adamw_reference
from tests.ops.adamw_inputs import FORMATS, STEP, Memory, differing, expected, memory, results, undecayed_in
from tests.ops.oracle import assert_within

SIZES = (0, 1, 15, 512, 4099, 100_003)
needs_native = pytest.mark.skipif(native.missing_cpu() is not None, reason=str(native.missing_cpu()))
BACKENDS = [pytest.param("cpu", marks=needs_native), "torch", "reference"]


def by_kernel(*arguments: Any, undecayed: Any, parameters: Tensor | None, isa: int = -1) -> None:
    *tensors, step = arguments
    flat = [position for pair in undecayed for position in pair]
    torch.ops.megatron_lite_cpu.adamw(*tensors, parameters, flat, *step.coefficients(), isa)


def torchs(inputs: Memory, dtype: torch.dtype, step: AdamWStep) -> list[Tensor]:
    """weights and moments after torch.optim.AdamW's plain loop, one parameter for each run, in `dtype`."""
    weights, first, second, gradients = (tensor.to(dtype) for tensor in inputs)
    slices = module.runs(weights.numel(), undecayed_in(weights.numel()))
    parameters = [torch.nn.Parameter(weights[where].clone()) for where, _ in slices]
    groups = [
        {"params": [parameter], "weight_decay": step.weight_decay if decays else 0.0}
        for parameter, (_, decays) in zip(parameters, slices, strict=True)
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=step.lr, betas=(step.beta1, step.beta2), eps=step.eps, foreach=False, fused=False
    )
    for parameter, (where, _) in zip(parameters, slices, strict=True):
        parameter.grad = gradients[where] * step.factor
        optimizer.state[parameter] = {
            "step": torch.tensor(step.step - 1.0),
            "exp_avg": first[where].clone(),
            "exp_avg_sq": second[where].clone(),
        }
    optimizer.step()
    states = [optimizer.state[parameter] for parameter in parameters]
    moments = [torch.cat([state[name] for state in states]) for name in ("exp_avg", "exp_avg_sq")]
    return [torch.cat([parameter.detach() for parameter in parameters]), *moments]


def judge(actual: list[Tensor], inputs: Memory, step: AdamWStep = STEP) -> None:
    """By the rule of the oracle, and the change of the weights on its own, which the weights would hide."""
    plain, exact = torchs(inputs, torch.float32, step), torchs(inputs, torch.float64, step)
    start = inputs[0].double()
    changes = [result[0].double() - start for result in (actual, plain, exact)]
    for name, *three in (
        *zip(("weights", "first", "second"), actual[:3], plain, exact, strict=True),
        ("change of weights", changes[0].float(), changes[1].float(), changes[2]),
    ):
        assert_within(name, *three, factor=2.0)  # type: ignore[arg-type]


STEPS = {
    "third": STEP,
    "first": dataclasses.replace(STEP, step=1),
    "late": dataclasses.replace(STEP, step=100_000, factor=1.0),
    "short memory": dataclasses.replace(STEP, beta1=0.3, beta2=0.5),
    "no mean": dataclasses.replace(STEP, beta1=0.0),
    "large beta2": dataclasses.replace(STEP, beta2=0.9999, weight_decay=0.0),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_error_is_at_most_twice_that_of_plain_torch(step: AdamWStep, backend: str) -> None:
    for size in (1, 59, 4099):
        inputs = memory(size)
        judge(results(functools.partial(adamw, backend=backend), inputs, step), inputs, step)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FORMATS[1:], ids=str)
def test_gradients_of_16_bits(dtype: torch.dtype, backend: str) -> None:
    inputs = memory(4099, dtype)
    judge(results(functools.partial(adamw, backend=backend), inputs), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_gradients_and_zeros(backend: str) -> None:
    for scale in (1e4, 1e-4):
        inputs = memory(513, scale=scale)
        judge(results(functools.partial(adamw, backend=backend), inputs), inputs)
    zeros = tuple(torch.zeros(33) for _ in range(4))
    for tensor in results(functools.partial(adamw, backend=backend), zeros)[:3]:  # type: ignore[arg-type]
        assert not tensor.any()


@pytest.mark.parametrize(
    "change", [{"lr": 1.001}, {"beta1": 0.9999}, {"weight_decay": 1.01}, {"factor": 1.0001}], ids=str
)
def test_the_rule_catches_slightly_wrong_settings(change: dict[str, float]) -> None:
    """Negative control."""
    wrong = dataclasses.replace(STEP, **{name: getattr(STEP, name) * by for name, by in change.items()})
    inputs = memory(4099)
    with pytest.raises(AssertionError, match="allowed"):
        judge(results(adamw, inputs, wrong), inputs)


@needs_native
@pytest.mark.parametrize("isa", [0, 1, 2], ids=["portable", "avx2", "avx512"])
@pytest.mark.parametrize("gradient", FORMATS, ids=str)
@pytest.mark.parametrize("parameter", [None, *FORMATS], ids=str)
def test_every_instruction_set_has_the_bits_of_the_reference(
    isa: int, gradient: torch.dtype, parameter: torch.dtype | None
) -> None:
    """A set that this CPU lacks runs as the best below it, so that the test cannot be empty."""
    for size in SIZES if gradient == torch.float32 else (4099,):
        for step in STEPS.values() if size == 4099 else (STEP,):
            inputs = memory(size, gradient)
            kernel = functools.partial(by_kernel, isa=isa)
            wanted = expected(inputs, step, parameter)
            assert differing(results(kernel, inputs, step, parameter), wanted) == 0, size
    # Negative control: weights of which one is off by its last bit.
    wanted[0][77].nextafter_(torch.tensor(9.0))
    assert differing(results(kernel, inputs, step, parameter), wanted) == 1


@needs_native
def test_memory_on_no_boundary() -> None:
    """Of 16, 32 or 64 bytes, on which stores past the caches depend."""
    for offset in range(1, 17):
        inputs, parameters = memory(2000), torch.zeros(2000 + offset, dtype=torch.bfloat16)[offset:]
        shifted = [torch.cat((torch.zeros(offset, dtype=t.dtype), t))[offset:] for t in inputs]
        by_kernel(*shifted, STEP, undecayed=undecayed_in(2000), parameters=parameters)
        assert differing([*shifted, parameters], expected(inputs)) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_slicing_and_any_number_of_threads_give_the_same_bits(backend: str) -> None:
    """An element's result depends on that element alone. At multiples of 256, as buckets are sliced."""
    inputs, update = memory(100 * 256), functools.partial(adamw, backend=backend)
    undecayed = [(512, 1024), (5120, 9984)]
    whole = results(update, inputs, undecayed=undecayed)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert differing(results(update, inputs, undecayed=undecayed), whole) == 0
    finally:
        torch.set_num_threads(before)
    for share in (256, 768, 12800):
        parts = []
        for start in range(0, 100 * 256, share):
            part = tuple(tensor[start : start + share] for tensor in inputs)
            clipped = [(max(a - start, 0), min(b - start, part[0].numel())) for a, b in undecayed]
            parts.append(results(update, part, undecayed=[(a, b) for a, b in clipped if a < b]))  # type: ignore[arg-type]
        assert differing([torch.cat(columns) for columns in zip(*parts, strict=True)], whole) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_factor_is_a_multiplication_and_one_changes_nothing(backend: str) -> None:
    update = functools.partial(adamw, backend=backend)
    weights, first, second, gradients = memory(4099)
    multiplied = weights, first, second, gradients * STEP.factor
    by_factor = results(update, (weights, first, second, gradients))
    beforehand = results(update, multiplied, dataclasses.replace(STEP, factor=1.0))
    assert differing(by_factor[:3] + by_factor[4:], beforehand[:3] + beforehand[4:]) == 0
    assert torch.equal(by_factor[3], gradients), "gradients stay as they are"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_factor_that_is_no_number_shows(backend: str, factor: float) -> None:
    step = dataclasses.replace(STEP, factor=factor)
    weights, *_, parameters = results(functools.partial(adamw, backend=backend), memory(67), step)
    assert weights.isnan().all() and parameters.isnan().all()


@pytest.mark.parametrize("backend", ["torch", "reference", "auto"])
def test_float64(backend: str) -> None:
    inputs: Any = tuple(tensor.double() for tensor in memory(4099))
    exact = torchs(inputs, torch.float64, STEP)
    actual = results(functools.partial(adamw, backend=backend), inputs, STEP, torch.float32)
    for one, other in zip(actual[:3], exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)
    assert torch.equal(actual[4], actual[0].float())


@pytest.mark.parametrize("parameter", FORMATS, ids=str)
def test_parameters_are_the_weights_rounded(parameter: torch.dtype) -> None:
    weights, *_, parameters = results(adamw, memory(4099), STEP, parameter)
    assert torch.equal(parameters, weights.to(parameter)) and parameters.any()


def test_strided_gradients() -> None:
    weights, first, second, _ = memory(100)
    gradients = torch.randn(200)
    one, other = (weights, first, second, gradients[::2]), (weights, first, second, gradients[::2].contiguous())
    assert differing(results(adamw, one), results(adamw, other)) == 0


@needs_native
def test_operator_registrations() -> None:
    weights, first, second, gradients = memory(70)
    for parameters in (None, torch.zeros(70, dtype=torch.bfloat16)):
        arguments = (weights, first, second, gradients, parameters, [3, 17], *STEP.coefficients())
        torch.library.opcheck(torch.ops.megatron_lite.adamw_cpu.default, arguments)


@needs_native
def test_compiles_without_a_graph_break() -> None:
    def update(*arguments: Any, undecayed: Any, parameters: Tensor | None) -> None:
        *tensors, step = arguments
        flat = [position for pair in undecayed for position in pair]
        torch.ops.megatron_lite.adamw_cpu(*tensors, parameters, flat, *step.coefficients())

    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    assert differing(results(compiled, memory(70)), expected(memory(70))) == 0


WRONG: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "two dimensions": (lambda a: a.update(weights=torch.ones(2, 4)), r"weights is \[2, 4\] fp32"),
    "integer weights": (lambda a: a.update(weights=torch.ones(8, dtype=torch.int32)), "weights is .* int32"),
    "length": (lambda a: a.update(second=torch.ones(7)), r"second is \[7\] fp32 .* \[n\] like weights = \[8\]"),
    "dtype of a moment": (lambda a: a.update(first=torch.ones(8).half()), r"first is \[8\] fp16"),
    "dtype of the gradients": (lambda a: a.update(gradients=torch.ones(8).long()), "gradients is .* int64"),
    "expanded moments": (lambda a: a.update(second=torch.ones(1).expand(8)), "second is .* contiguous memory"),
    "device": (lambda a: a.update(parameters=torch.ones(8, device="meta")), "parameters is .* the device of weights"),
    "shared moments": (lambda a: a.update(second=a["first"]), r"second is \[8\] .* apart from that of first"),
    "shared gradients": (lambda a: a.update(gradients=a["weights"]), "gradients is .* apart from that of weights"),
    "shared parameters": (
        lambda a: a.update(parameters=a["weights"].view(torch.bfloat16)[8:]),
        r"parameters is \[8\] bf16 .* apart from that of weights",
    ),
    "sparse gradients": (lambda a: a.update(gradients=torch.ones(8).to_sparse()), "gradients is .* sparse_coo"),
    "no pairs": (lambda a: a.update(undecayed=[2, 4]), r"undecayed is \[2, 4\]; it takes pairs"),
    "half a pair": (lambda a: a.update(undecayed=[(2,)]), r"undecayed is \[\(2,\)\]; it takes pairs"),
    "three in a pair": (lambda a: a.update(undecayed=[(2, 3, 4)]), r"undecayed is \[\(2, 3, 4\)\]; it takes pairs"),
    "halves of numbers": (lambda a: a.update(undecayed=[(0.5, 3)]), "undecayed is .*0.5.* whole numbers"),
    "no list": (lambda a: a.update(undecayed=None), "undecayed is None; it takes pairs"),
    "order": (lambda a: a.update(undecayed=[(4, 6), (1, 2)]), "undecayed is .* in order"),
    "beyond the end": (lambda a: a.update(undecayed=[(4, 9)]), "undecayed is .* n = 8"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_bad_input(change: Callable[[dict[str, Any]], None], message: str) -> None:
    arguments: dict[str, Any] = {name: torch.ones(8) for name in ("weights", "first", "second", "gradients")}
    change(arguments)
    with pytest.raises(ValueError, match="adamw: " + message):
        adamw(*(arguments.pop(name) for name in ("weights", "first", "second", "gradients")), STEP, **arguments)


@pytest.mark.parametrize("name", ["beta1", "beta2"])
@pytest.mark.parametrize("beta", [1.0, -0.1, math.nan, None])
def test_a_beta_that_is_none(name: str, beta: float) -> None:
    with pytest.raises(ValueError, match=rf"adamw: step.{name} is {beta}; it takes a number from 0 to below 1"):
        adamw(*memory(8), dataclasses.replace(STEP, **{name: beta}))


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-3, None, True])
def test_a_setting_that_is_none(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"adamw: step.{name} is {value}; it takes a finite number, 0 or more"):
        adamw(*memory(8), dataclasses.replace(STEP, **{name: value}))


@pytest.mark.parametrize("value", [0, 1.0, None, True])
def test_a_number_of_the_update_that_is_none(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"adamw: step.step is {value}; it takes the number of the update"):
        adamw(*memory(8), dataclasses.replace(STEP, step=value))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_sees_that_weights_and_parameters_were_written(backend: str) -> None:
    """What an earlier operation saved for its backward has changed since; the gradients have not."""
    weights, first, second, gradients = memory(16)
    scale, parameters = torch.ones(16, requires_grad=True), torch.ones(16)
    products = [scale * tensor for tensor in (weights, first, second, parameters)]
    unchanged = scale * gradients
    with torch.no_grad():
        adamw(weights, first, second, gradients, STEP, parameters=parameters, backend=backend)
    unchanged.sum().backward()
    for product in products:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


@needs_native
def test_the_raw_operator_checks_before_it_touches_memory() -> None:
    weights, first, second, gradients = memory(16)
    for wrong in ((weights, first[:3], second), (weights, first.double(), second), (weights, first, second.view(4, 4))):
        with pytest.raises(RuntimeError, match="adamw takes"):
            torch.ops.megatron_lite_cpu.adamw(*wrong, gradients, None, [], *STEP.coefficients())
    for undecayed in ([0], [4, 2], [0, 17], [-1, 3]):
        with pytest.raises(RuntimeError, match="adamw takes undecayed"):
            torch.ops.megatron_lite_cpu.adamw(weights, first, second, gradients, None, undecayed, *STEP.coefficients())


def test_backends_that_are_not_there_are_named() -> None:
    for backend in ("cuda", "triton", "apex"):
        with pytest.raises(ValueError, match=f"kernels.adamw={backend} cannot run"):
            adamw(*memory(8), STEP, backend=backend)
    assert dispatch.select("adamw", "auto", torch.float64, "cpu").backend == "torch"


def apexs_adam(
    chunk: int, overflow: Tensor, lists: list[list[Tensor]], lr: float, beta1: float, beta2: float, eps: float,
    step: int, mode: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    """Takes what apex's amp_C.multi_tensor_adam takes, and does what it says it does."""
    assert chunk == 65536 and overflow.dtype == torch.int32 and mode == bias_correction == 1 and not overflow.any()
    for gradients, weights, first, second in zip(*lists, strict=True):
        update = AdamWStep(lr, beta1, beta2, eps, weight_decay, step)
        adamw_reference(weights, first, second, gradients, update)


def test_apexs_kernel_is_called_as_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for apex's extension, which needs a GPU."""
    extension = types.ModuleType("amp_C")
    extension.multi_tensor_adam = apexs_adam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "amp_C", extension)
    apex = dispatch.Choice("apex", "for this test")
    monkeypatch.setattr(module.dispatch, "select", lambda *arguments: apex)
    for dtype in FORMATS:
        inputs = memory(4099, dtype)
        assert differing(results(adamw, inputs), expected(inputs)) == 0
