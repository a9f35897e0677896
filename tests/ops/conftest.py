from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """torch.compile forgets what a test has compiled: it refuses a function that it has compiled eight times."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
