from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.ops.emulation import build
from tests.ops.oracle import assert_same_bits, assert_within

# Shared memory that a block can have on sm_86 and sm_89. sm_80, which is emulated, has 163 KiB.
LEAST_SHARED_BYTES = 99 * 1024
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One call: q[batch, queries, heads, dim], k and v[batch, keys, key_heads, dim]."""

    queries: int
    keys: int
    dim: int
    heads: int = 1
    key_heads: int = 1
    batch: int = 1
    causal: bool = True
    window: int = 0
    documents: bool = False  # bounds, of documents that end at no tile's end
    slopes: bool = False
    d_lse: bool = False
    size: float = 1.0  # of q, k and v
    step: int = 1  # of the tokens in memory: q, k and v are views of tensors with more

    def bounds(self) -> Tensor | None:
        """int32[B, Sq, 2]: documents of 21 keys, and a query that sees nothing."""
        if not self.documents:
            return None
        position = torch.arange(self.queries) + max(0, self.keys - self.queries)
        first = position // 21 * 21
        bounds = torch.stack([first, (first + 21).clamp(max=self.keys)], dim=-1).expand(self.batch, -1, -1).clone()
        bounds[-1, self.queries // 2] = 7
        return bounds.int()

    def alibi(self) -> Tensor | None:
        return 2.0 ** -torch.arange(1, self.heads + 1) if self.slopes else None


# Each padded head dimension whole and odd; tiles that are partial, that all see, that none sees.
CASES = (
    Case(150, 150, 32, heads=2, key_heads=1, d_lse=True),
    Case(67, 67, 40, heads=4, key_heads=2, batch=2, documents=True),
    Case(140, 140, 64, window=30),
    Case(33, 190, 64, heads=2, key_heads=2, step=2, slopes=True),
    Case(59, 33, 59, heads=2, d_lse=True),
    Case(70, 150, 96, causal=False),
    Case(45, 45, 80, heads=2, causal=False, documents=True, slopes=True),
    Case(113, 203, 111, heads=2, d_lse=True),
    Case(100, 100, 128, documents=True, window=9),
    Case(40, 200, 128, causal=False, window=170),
    Case(1, 70, 128, heads=3),
    Case(70, 90, 256, heads=2, documents=True, d_lse=True),
    Case(30, 30, 200, size=4.0),
)
RESULTS = ("out", "lse", "dq", "dk", "dv")
# Of the results scaled, and of the calls with another mask; in each dtype.
NUM_CONTROLS = len(DTYPES) * (len(RESULTS) * len(CASES) + 4)


def check_numbers() -> int:
    caught = 0
    for dtype in DTYPES:
        caught += sum(_check(case, dtype) for case in CASES) + _masks_that_are_wrong(dtype)
        _check_edges(dtype)
        _check_devices_with_less_shared_memory(dtype)
        _check_bad_input(dtype)
    return caught


def _inputs(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and d_out."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(case.queries * 1000 + case.keys)
    shapes = [(case.queries, case.heads), (case.keys, case.key_heads), (case.keys, case.key_heads)]
    tensors = [
        torch.randn(case.batch, tokens * case.step, heads, case.dim, generator=generator).to(dtype)[:, :: case.step]
        for tokens, heads in [*shapes, shapes[0]]
    ]
    return [t * case.size for t in tensors[:3]] + [tensors[3]] if case.size != 1.0 else tensors


def _kernel(case: Case, inputs: list[Tensor], shared_bytes: int | None = None) -> tuple[Tensor, ...]:
    q, k, v, d_out = inputs
    shared_bytes = shared_bytes or _shared_bytes()
    mask = (case.bounds(), case.alibi(), case.dim**-0.5, case.causal, case.window)
    out, lse = torch.ops.megatron_lite_cuda.attention(q, k, v, *mask, shared_bytes, 0)
    d_lse = _d_lse(lse) if case.d_lse else None
    saved = (d_out, q, k, v, out, lse, d_lse)
    return out, lse, *torch.ops.megatron_lite_cuda.attention_backward(*saved, *mask, False, shared_bytes, 0)


def _shared_bytes() -> int:
    if torch.get_default_device().type == "cuda":
        return torch.cuda.get_device_properties().shared_memory_per_block_optin  # type: ignore[attr-defined]
    return 163 * 1024


def _d_lse(lse: Tensor) -> Tensor:
    return torch.linspace(-1, 1, lse.numel()).view_as(lse)


def _visible(case: Case) -> Tensor:
    """bool[B, 1, Sq, Sk], straight from the definition."""
    key, position = torch.arange(case.keys), torch.arange(case.queries)[:, None] + case.keys - case.queries
    seen = torch.ones(case.batch, case.queries, case.keys, dtype=torch.bool)
    if case.causal:
        seen &= key <= position
    if case.window:
        seen &= key > position - case.window
    bounds = case.bounds()
    if bounds is not None:
        seen &= (bounds[..., :1] <= key) & (key < bounds[..., 1:])
    return seen[:, None]


def _plain(case: Case, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """All intermediates in the inputs' dtype, as one would write it without a thought for precision."""
    leaves = [t.detach().requires_grad_() for t in inputs[:3]]
    q, k, v = (t.transpose(1, 2).repeat_interleave(case.heads // t.shape[2], dim=1) for t in leaves)
    scores = q @ k.transpose(-1, -2) * case.dim**-0.5
    slopes = case.alibi()
    if slopes is not None:
        position = torch.arange(case.queries)[:, None] + case.keys - case.queries
        distance = (position - torch.arange(case.keys)).abs().to(q.dtype)
        scores = scores - slopes.to(q.dtype)[:, None, None] * distance
    seen = _visible(case)
    # A query that sees nothing: its row of scores has no -inf alone, for that row's gradient would be NaN.
    sees = seen.any(dim=-1, keepdim=True)
    scores = scores.masked_fill(~seen & sees, -math.inf)
    weights = torch.where(sees, scores.softmax(dim=-1), 0.0)
    lse = torch.where(sees[..., 0], scores.logsumexp(dim=-1), -math.inf)
    out = (weights @ v).transpose(1, 2)
    finite = torch.where(sees[..., 0], lse, 0.0)
    extra = (finite * _d_lse(lse).to(finite.dtype)).sum() if case.d_lse else 0.0
    gradients = torch.autograd.grad((out * inputs[3]).sum() + extra, leaves)
    return out.detach(), lse.detach().to(torch.promote_types(lse.dtype, torch.float32)), *gradients


def _judge(name: str, actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    seen = exact != -math.inf
    assert torch.equal(actual == -math.inf, ~seen), f"{name}: rows that see nothing"
    factor = 2.0 if name in ("out", "lse") else 3.0
    assert_within(name, actual[seen], plain[seen], exact[seen], factor)


def _judged(case: Case, dtype: torch.dtype) -> Iterator[Callable[[Tensor], None]]:
    """Of each of the five results what judges one."""
    inputs = _inputs(case, dtype)
    for name, plain, exact in zip(
        RESULTS, _plain(case, inputs), _plain(case, [t.double() for t in inputs]), strict=True
    ):
        yield lambda actual, name=name, p=plain, e=exact: _judge(name, actual, p, e)


def _is_caught(judge: Callable[[Tensor], None], actual: Tensor) -> bool:
    try:
        judge(actual)
    except AssertionError:
        return True
    return False


def _check(case: Case, dtype: torch.dtype) -> int:
    """Checks the five results; returns how many of them, once made wrong by 16 units, were caught."""
    results = _kernel(case, _inputs(case, dtype))
    caught = 0
    for judge, actual in zip(_judged(case, dtype), results, strict=True):
        try:
            judge(actual)
        except AssertionError as error:
            raise AssertionError(f"{case} {dtype}: {error}") from None
        wrong = torch.where(actual == -math.inf, actual, actual * (1 + 16 * torch.finfo(dtype).eps) + 1e-3)
        caught += _is_caught(judge, wrong)
    return caught


def _masks_that_are_wrong(dtype: torch.dtype) -> int:
    """How many calls whose mask is off by one key, or whose slopes are missing, were caught by their output."""
    window = Case(64, 80, 32, window=8)
    slopes = Case(64, 64, 32, heads=2, key_heads=2, slopes=True)
    pairs = [
        (window, replace(window, window=9)),
        (window, replace(window, window=7)),
        (replace(window, window=0, causal=False), replace(window, window=0)),
        (slopes, replace(slopes, slopes=False)),
    ]
    caught = 0
    for case, other in pairs:
        judge, *_ = _judged(case, dtype)
        caught += _is_caught(judge, _kernel(other, _inputs(case, dtype))[0])
    return caught


def _check_edges(dtype: torch.dtype) -> None:
    """No rows, no queries, no keys, zeros, large values, and addresses that no 16-byte access takes."""
    for batch, queries, keys in ((0, 5, 5), (2, 0, 5), (2, 5, 0)):
        case = Case(queries, keys, 32, batch=batch, heads=2)
        out, lse, dq, dk, dv = _kernel(case, _inputs(case, dtype))
        assert out.shape == dq.shape == (batch, queries, 2, 32) and dk.shape == dv.shape == (batch, keys, 1, 32)
        assert not out.any() and not dq.any() and not dk.any() and not dv.any() and (lse == -math.inf).all()
    case = Case(40, 40, 32)
    zeros = [torch.zeros_like(t) for t in _inputs(case, dtype)]
    assert all(torch.isfinite(t).all() for t in _kernel(case, zeros))
    large = [t * 1e4 for t in _inputs(case, dtype)[:3]]
    assert all(torch.isfinite(t).all() for t in _kernel(case, [*large, zeros[3] + 1e-4])[:3])
    aligned = _inputs(case, dtype)
    shifted = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t) for t in aligned]
    for one, other in zip(_kernel(case, aligned), _kernel(case, shifted), strict=True):
        assert torch.equal(one, other)


def _check_devices_with_less_shared_memory(dtype: torch.dtype) -> None:
    """What takes most shared memory runs there, to the same bits."""
    for case in (case for case in CASES if case.dim > 64):
        inputs = _inputs(case, dtype)
        expected = _kernel(case, inputs)
        with _device_with(LEAST_SHARED_BYTES):
            assert_same_bits(_kernel(case, inputs, LEAST_SHARED_BYTES), expected)
    if torch.get_default_device().type == "cuda":
        return
    # Negative control: there the tiles of 163 KiB are refused, as that device would.
    with _device_with(LEAST_SHARED_BYTES):
        for dim, runs in ((64, True), (128, False), (256, False)):
            case = Case(40, 40, dim)
            try:
                _kernel(case, _inputs(case, dtype))
                did_run = True
            except RuntimeError:
                did_run = False
            assert did_run == runs, f"head dimension {dim}"


@contextlib.contextmanager
def _device_with(shared_bytes: int) -> Iterator[None]:
    """The emulated device gives a block no more. A GPU is as it is, and takes the smaller tiles as well."""
    if torch.get_default_device().type == "cuda":
        yield
        return
    emulation = ctypes.CDLL(str(build.build()))  # the one that is loaded already
    before = emulation.ml_emulation_shared(shared_bytes)
    try:
        yield
    finally:
        emulation.ml_emulation_shared(before)


def _check_bad_input(dtype: torch.dtype) -> None:
    """What the kernels do not take is refused before a pointer is read."""
    q, k, v, _ = _inputs(Case(5, 5, 32, heads=4, key_heads=2), dtype)
    calls: list[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]] = [
        (q[:, :, :3], k, v, None, None),
        (q, k, v[:, :4], None, None),
        (q.float(), k, v, None, None),
        (q.float(), k.float(), v.float(), None, None),
        (q[0], k[0], v[0], None, None),
        (q, k, v, torch.zeros(1, 5, 2), None),
        (q, k, v, torch.zeros(1, 4, 2, dtype=torch.int32), None),
        (q, k, v, None, torch.zeros(2)),
        (q.repeat(1, 1, 1, 9), k.repeat(1, 1, 1, 9), v.repeat(1, 1, 1, 9), None, None),
    ]
    for call in calls:
        try:
            torch.ops.megatron_lite_cuda.attention(*call, 1.0, True, 0, _shared_bytes(), 0)
        except RuntimeError as error:
            assert "attention" in str(error)
        else:
            raise AssertionError("taken")
    try:
        torch.ops.megatron_lite_cuda.attention(q, k, v, None, None, 1.0, True, 0, 48 * 1024, 0)
    except RuntimeError as error:
        assert "bytes of shared memory for a block, this one has 49152" in str(error)
    else:
        raise AssertionError("taken")
