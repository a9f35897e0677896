"""Tests that start real launchers on this machine: ``bash launch/test.sh --cluster``.

``pytest.mark.cluster("ip", "sshd")`` names the programs that a test needs. Without them, or without root, it is
skipped with the reason; where MEGATRON_LITE_CLUSTER_REQUIRED is set, as launch/test.sh does for root, it fails.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.cluster.commands import ROOT, run
from tests.cluster.runs import NPROC, run_of, write_run
from tests.train.commands import PROGRAM
from tests.train.tiny_run import make_corpus

# Debian keeps daemons and network tools where only root looks.
SEARCH_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    markers = list(item.iter_markers("cluster"))
    if not markers:
        return
    missing = [name for marker in markers for name in marker.args if shutil.which(name, path=SEARCH_PATH) is None]
    reason = "these tests make network namespaces and mounts: they need root" if os.geteuid() else ""
    if missing:
        reason = f"{', '.join(missing)}: not installed; bash launch/test.sh --cluster installs it, as root"
    if reason and os.environ.get("MEGATRON_LITE_CLUSTER_REQUIRED"):
        pytest.fail(reason, pytrace=False)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run of `tests.cluster.runs` on one machine, which every launcher has to reproduce."""
    config = write_run(tmp_path_factory.mktemp("reference"), corpus)
    ended = run([*PROGRAM, "train", config, "--nproc", NPROC], cwd=ROOT)
    assert ended.code == 0, ended.said
    return run_of(config)
