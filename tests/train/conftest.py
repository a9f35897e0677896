from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.tiny_run import make_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))
