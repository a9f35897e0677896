"""The image for CPUs, built and run for real; and two containers on two hosts, as docker/compose.yaml has them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_lite
from megatron_lite.distributed.rank import EXIT_REQUEUE
from megatron_lite.utils import run_files
from tests.cluster import compose
from tests.cluster.commands import ROOT
from tests.cluster.hosts import network
from tests.cluster.images import BASE, Images, image_store
from tests.cluster.runs import NPROC, NUM_STEPS, differences, run_of, write_run
from tests.train.tiny_run import read_metrics

pytestmark = pytest.mark.cluster("buildah", "podman", "runc", "debootstrap", "ip", "nsenter", "setpriv")

IMAGE = "localhost/megatron-lite:cpu"
USER = 1000
LARGEST_IMAGE_BYTES = 1.5e9


@pytest.fixture(scope="module")
def images() -> Iterator[Images]:
    """With the image for CPUs."""
    with image_store() as store:
        store.import_base()
        built = store.build("cpu")
        assert built.code == 0, built.said[-4000:]
        assert "kernels: cpu, index; portable" in built.said
        print(f"built in {built.seconds:.0f} s")
        yield store


@pytest.fixture
def workspace(corpus: Path, tmp_path: Path) -> Path:
    """What a user mounts: his data, and room for runs."""
    folder = tmp_path / "workspace"
    shutil.copytree(corpus, folder / "data")
    os.chown(folder, USER, USER)
    return folder


def write_config(workspace: Path, name: str, *more: str) -> str:
    """The run of `tests.cluster.runs` for a container, which sees the folder as /workspace."""
    config = write_run(workspace, Path("/workspace/data"), "run.dir=/workspace/runs", *more, name=name)
    return f"/workspace/{config.name}"


def mounted(workspace: Path) -> tuple[str, str]:
    return "--volume", f"{workspace}:/workspace"


def test_the_image_says_what_it_is(images: Images) -> None:
    described = images.inspect(IMAGE)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in described["Labels"].items()}
    assert labels["version"] == megatron_lite.__version__
    assert labels["revision"].removesuffix("-dirty") == head.stdout.strip()
    assert "source" in labels and "@" not in labels["source"], "an address, without a password"
    assert described["Config"]["User"] == str(USER)
    assert described["Config"]["Entrypoint"] == ["megatron-lite"]
    assert f"localhost/megatron-lite:{megatron_lite.__version__}-cpu" in described["RepoTags"]
    base = images.inspect(BASE)["Size"]
    print(f"{described['Size'] / 1e6:.0f} MB, of which {base / 1e6:.0f} MB are Debian")
    assert described["Size"] < LARGEST_IMAGE_BYTES


def test_the_build_is_sent_what_it_copies(images: Images, tmp_path: Path) -> None:
    """And no history, environment, run or kernel that lies about in a checkout."""
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    context = tmp_path / "context"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in [*tracked, ".dockerignore"]:
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, context / name)
    stray = (".git/HEAD", ".venv/pyvenv.cfg", "runs/a/metrics.jsonl", "megatron_lite/ops/_native.so", "csrc/a.o")
    for name in (*stray, "megatron_lite/__pycache__/a.pyc", "data/quickstart/train.bin"):
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        (context / name).touch()
    images.engine("buildah", "build", "--tag", "context", "--file", tmp_path / "Dockerfile", context)
    images.engine("podman", "save", "--format", "docker-dir", "--output", tmp_path / "saved", "localhost/context")
    layers = [path for path in (tmp_path / "saved").iterdir() if re.fullmatch("[0-9a-f]{64}", path.name)]
    listed = [subprocess.run(["tar", "-tf", layer], capture_output=True, text=True).stdout for layer in layers]
    sent = {name.removeprefix("./") for name in "\n".join(listed).split() if not name.endswith("/")}
    folders = ("configs/", "csrc/", "docker/", "launch/", "megatron_lite/")
    single = {"LICENSE", "MANIFEST.in", "constraints.txt", "pyproject.toml", "setup.py"}
    assert sent == {name for name in tracked if name.startswith(folders) or name in single}


def test_a_container_trains_as_an_ordinary_user(images: Images, workspace: Path) -> None:
    inside = images.run(IMAGE, "-c", "id -u; touch /opt/venv/x; command -v g++ ssh", options=["--entrypoint", "bash"])
    lines = inside.said.splitlines()
    assert lines[0] == str(USER) and len(lines) == 2 and "Permission denied" in lines[1], inside.said
    ended = images.run(IMAGE, "train", write_config(workspace, "tiny"), "--nproc", NPROC, options=mounted(workspace))
    assert ended.code == 0, ended.said
    run = run_of(workspace / "tiny.yaml")
    assert len(read_metrics(run)) == NUM_STEPS
    assert {path.stat().st_uid for path in run.rglob("*")} == {USER}
    print(f"trained in {ended.seconds:.1f} s")


def test_exit_codes_pass_through_and_a_stopped_container_leaves_a_checkpoint(images: Images, workspace: Path) -> None:
    """Also as a user that the image does not know, which is how clusters start containers."""
    workspace.chmod(0o777)
    unknown = ("--user", "4321:4321", *mounted(workspace))
    refused = images.run(IMAGE, "train", "/workspace/none.yaml", options=unknown)
    assert refused.code == 2 and "none.yaml" in refused.said, refused.said
    alone = ("parallel.tp=1", "parallel.dp=1", "train.num_steps=100000", "optim.decay_steps=12")
    config = write_config(workspace, "endless", *alone)
    options = ["--name", "endless", "--network=none", *unknown]
    with images.command(IMAGE, "train", config, options=options, log=workspace.parent / "log") as training:
        metrics = run_of(workspace / "endless.yaml") / run_files.METRICS
        training.wait_for(lambda: metrics.exists() and len(read_metrics(metrics.parent)) >= 3, "the third step")
        images.engine("podman", "stop", "--time", "30", "endless")
        code = training.wait()
    assert code == EXIT_REQUEUE, training.said()
    stopped = re.search(r"stopped by SIGTERM after step (\d+)", training.said())
    assert stopped is not None, training.said()
    kept = metrics.parent / run_files.CHECKPOINTS / f"step-{int(stopped[1]):08d}"
    assert (kept / "checkpoint.json").stat().st_uid == 4321


def test_two_containers_on_two_hosts_train_together(images: Images, workspace: Path) -> None:
    """The services of docker/compose.yaml: to the bits of one container."""
    alone = images.run(IMAGE, "train", write_config(workspace, "alone"), "--nproc", NPROC, options=mounted(workspace))
    assert alone.code == 0, alone.said
    nodes = compose.services(CONFIG=write_config(workspace, "together"))
    with network(2, name="node", subnet="10.83.0") as hosts:
        names = workspace.parent / "hosts"
        names.write_text("127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in hosts))
        first, second = (
            images.command(
                node.image,
                *node.command,
                options=[
                    *node.options(workspace=workspace),
                    *("--network", f"ns:{host.network_namespace}", "--volume", f"{names}:/etc/hosts:ro"),
                ],
                log=workspace.parent / f"{host.name}.log",
            )
            for host, node in zip(hosts, (nodes["node1"], nodes["node2"]), strict=True)
        )
        with first, second:
            codes = first.wait(), second.wait()
    said = f"{first.said()}\n{second.said()}"
    assert codes == (0, 0), said
    assert said.count(f"step {NUM_STEPS}/{NUM_STEPS}") == 1, "only the first rank speaks"
    assert differences(run_of(workspace / "alone.yaml"), run_of(workspace / "together.yaml")) == []
