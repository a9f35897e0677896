"""``y = x W^T + b`` whose weight gradient is added into ``weight.grad`` by the matrix product itself, now or later.

Adding microbatches up costs, in plain autograd, a tensor of the weight's size that is written, read and added for each
microbatch. Where ``weight.grad`` exists and has the dtype of the product, the product adds to it instead (Megatron-LM
calls this gradient accumulation fusion), and autograd is given nothing to add.

A backward may be split (zero bubble pipelines, Qi et al. 2024, section 2): the gradient of the input at once, because
another rank waits for it, and the gradient of the weight later, when there is nothing better to do. `WeightGradients`
holds between the two what the second half needs: x and the gradient of y of each linear layer. It is the linear
layers that are split, also those over the tensor-parallel axis; norms, biases, embeddings and the head compute all
their gradients in the first half.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    weight_gradients: WeightGradients | None = None,
    saves_first: bool = False,
) -> Tensor:
    """``[T, in] -> [T, out]`` for ``weight [out, in]`` and ``bias [out]``, in any float dtype.

    Gradient of x: ``g W``; of the weight: ``g^T x``, see the file's header; of the bias: the sum of g over tokens.
    ``weight_gradients`` takes that of the weight while it collects. Under torch.compile nothing is put off.
    ``saves_first``: see `save_first`.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    if saves_first:
        x = save_first(x, weight)
    return _Linear.apply(x, weight, bias, weight_gradients, saves_first)


linear_reference = F.linear


class Gathering(Protocol):
    """A collective under way."""

    def wait(self) -> Tensor: ...


class WeightGradients:
    """The gradients of weights that one chunk of the model still owes, by microbatch.

    Within ``with store.collecting(m)`` a backward computes no gradient of a linear layer's weight: the layer puts its
    input and the gradient of its output here. ``run(m)`` makes the products, in the order in which they came, and
    frees the two tensors of each as it goes. The results have the bits of an undivided backward: it is the same
    product of the same tensors, which ``weight.grad`` and the hooks on the weight get in the same way.
    """

    def __init__(self) -> None:
        self._owed: dict[Hashable, deque[_Product]] = {}
        self._collected: deque[_Product] | None = None

    @property
    def is_collecting(self) -> bool:
        return self._collected is not None

    @property
    def owed(self) -> tuple[Hashable, ...]:
        """The microbatches of which weight gradients are to be computed, in the order in which they were collected."""
        return tuple(self._owed)

    @contextmanager
    def collecting(self, key: Hashable) -> Iterator[None]:
        """Opened around the backward of a microbatch (``key``) that computes the gradient of the input only."""
        assert self._collected is None, f"collecting {key} within another backward"
        assert key not in self._owed, f"the weight gradients of {key} have been collected and not computed"
        self._collected = deque()
        try:
            yield
            self._owed[key] = self._collected
        finally:
            self._collected = None

    def put(self, weight: Tensor, grad: Tensor, x: Tensor, gather: Callable[[Tensor], Gathering] | None = None) -> None:
        """Leaves ``grad^T x`` for later. With ``gather`` x is a shard, and the function starts to collect the whole."""
        assert self._collected is not None and weight.is_leaf
        self._collected.append(_Product(weight, grad, x, gather))

    def run(self, key: Hashable) -> None:
        """Computes the weight gradients of a microbatch. The next shard is gathered while a product is computed."""
        products = self._owed.pop(key)
        following = _start_first(products)
        while following is not None:
            product = following  # and with this the one before is free
            following = _start_first(products)
            product.finish()

    def forget(self) -> None:
        """Frees what is owed, of a step that broke off."""
        self._owed.clear()


def save_first(x: Tensor, weight: Tensor) -> Tensor:
    """``x``, saved for backward together with ``weight`` before the product of both is computed, and not after it.

    For the last product of what activation recomputation runs again: that ends when the last tensor is saved that
    backward needs, so the product, and a collective behind it, are not computed twice.
    """
    return _SaveFirst.apply(x, weight.detach())


def save_operands(ctx: Any, x: Tensor, weight: Tensor, saved_first: bool) -> None:
    """In the forward of a product: keeps what `saved_operands` returns in its backward."""
    ctx.weight, ctx.source = weight, x.grad_fn if saved_first else None
    if ctx.source is None:
        ctx.save_for_backward(x, weight)


def saved_operands(ctx: Any) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors if ctx.source is None else ctx.source.saved_tensors
    return x, weight


@runtime_checkable
class SplitLayer(Protocol):
    """A linear layer whose backward can be split."""

    weight_gradients: WeightGradients | None


def defer_weight_gradients(chunk: nn.Module, store: WeightGradients | None) -> None:
    """Lets the linear layers of ``chunk`` leave their weight gradients in ``store`` while it collects; None: never."""
    for module in chunk.modules():
        if isinstance(module, SplitLayer):
            module.weight_gradients = store


def weight_gradient(weight: Tensor, grad: Tensor, x: Tensor) -> Tensor | None:
    """``grad^T x`` ``[out, in]`` of ``grad [T, out]`` and ``x [T, in]``: added to ``weight.grad``, or returned.

    To be called in a backward with the weight itself, not with a copy, which is what ``ctx.saved_tensors`` has of it
    under activation recomputation. None says that it has been added: a gradient that is there is a place to accumulate
    in, also under ``torch.autograd.grad``.
    """
    if weight.requires_grad and weight.grad is not None and weight.grad.dtype == grad.dtype:
        weight.grad.addmm_(grad.t(), x)
        return None
    return grad.t() @ x


class _Product:
    """A weight gradient to be computed, and the two tensors that it needs."""

    def __init__(
        self, weight: Tensor, grad: Tensor, x: Tensor, gather: Callable[[Tensor], Gathering] | None = None
    ) -> None:
        # Detached: what is saved for a backward knows the graph that made it, and would keep it.
        self.weight, self._grad, self._x, self._gather = weight, grad.detach(), x.detach(), gather
        self._versions = grad._version, x._version
        self._gathering: Gathering | None = None

    def start(self) -> None:
        # Autograd looks at versions when a saved tensor is used; these have been used, and are once more.
        assert (self._grad._version, self._x._version) == self._versions, "written to before its weight gradient"
        if self._gather is not None:
            self._gathering = self._gather(self._x)

    def finish(self) -> None:
        result = _LateGradient.apply(self.weight, self)
        result.backward(torch.empty_like(result))

    def compute(self) -> Tensor | None:
        x = self._x if self._gathering is None else self._gathering.wait()
        return weight_gradient(self.weight, self._grad, x)


def _start_first(products: deque[_Product]) -> _Product | None:
    if not products:
        return None
    product = products.popleft()
    product.start()
    return product


class _SaveFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_gradients: WeightGradients | None,
        saved_first: bool,
    ) -> Tensor:
        ctx.has_bias, ctx.weight_gradients = bias is not None, weight_gradients
        save_operands(ctx, x, weight, saved_first)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = saved_operands(ctx)
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            if ctx.weight_gradients is not None and ctx.weight_gradients.is_collecting:
                ctx.weight_gradients.put(ctx.weight, grad, x)
            else:
                grad_weight = weight_gradient(ctx.weight, grad, x)
        return grad_x, grad_weight, grad.sum(dim=0) if ctx.has_bias else None, None, None


class _LateGradient(torch.autograd.Function):
    """A graph of one product: autograd takes its result to the weight and the hooks on it, without a copy."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, product: _Product) -> Tensor:
        ctx.product = product
        return weight.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, None]:
        return ctx.product.compute(), None
