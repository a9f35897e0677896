from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_lite.distributed.worker_pool import WorkerPool


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Processes for tests of up to 8 ranks, forked once: `pool.run(function, world_size, *args)`."""
    # What test modules import themselves is worth preloading too: fresh workers replace those of a failed run.
    with WorkerPool(max_workers=8, preload=("pytest", "megatron_lite.train.build")) as workers:
        yield workers
