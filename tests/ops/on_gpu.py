"""A plugin of pytest, `-p tests.ops.on_gpu`: tensors that a test makes without saying where are made on the GPU.

So the tests of the public functions run there on what `auto` chooses for CUDA. Those that are about the CPU fail.
"""

from __future__ import annotations

import pytest
import torch

_Generator = torch.Generator


class _OnGpu(torch.Generator):
    """Makes generators of numbers on the GPU. A class, because torch.compile asks what is an instance of it."""

    def __new__(cls, device: torch.device | str = "cuda") -> torch.Generator:  # type: ignore[misc]
        return _Generator(device)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_default_device("cuda")
    torch.Generator = _OnGpu  # type: ignore[misc]
