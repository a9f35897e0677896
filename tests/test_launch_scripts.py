"""The scripts of launch/ and .ci/: they parse, they say what they take, and they refuse what makes no sense."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [*sorted((ROOT / "launch").rglob("*.sh")), *sorted((ROOT / "launch").rglob("*.sbatch")), ROOT / ".ci" / "run"]
USER_ERROR = 2


def bash(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_parses(script: Path) -> None:
    result = bash("-n", str(script))
    assert result.returncode == 0, result.stderr


@pytest.mark.cluster  # whose runs install it
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    result = subprocess.run(["shellcheck", "-x", str(script)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("script", "mentions"),
    [("quickstart.sh", ("--steps", "--layout", "--model", "--text")), ("test.sh", ("--matrix", "--cluster", "pytest"))],
)
def test_help_installs_nothing(script: str, mentions: tuple[str, ...], tmp_path: Path) -> None:
    copy = tmp_path / "launch"
    shutil.copytree(ROOT / "launch", copy)
    result = bash(str(copy / script), "--help")
    assert result.returncode == 0, result.stderr
    assert all(word in result.stdout for word in mentions), result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["launch"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--steps", "many"], "--steps 'many'"),
        (["--steps"], "number of steps"),
        (["--layout", "tp=0"], "'tp=0' is not a size"),
        (["--layout", "tp=2,qq=3"], "'qq=3' is not understood"),
        (["--model", "configs/models/none.yaml"], "configs/models/none.yaml: no such file"),
        (["--text"], "at least one file"),
        (["--text", "no-such-file"], "no-such-file: no such file"),
        (["--fast"], "--fast: no such option"),
    ],
)
def test_misuse_of_the_quickstart(arguments: list[str], complaint: str) -> None:
    result = bash("launch/quickstart.sh", *arguments)
    assert result.returncode == USER_ERROR, result.stdout + result.stderr
    assert complaint in result.stderr


PRETENDED_SETUP = """
root=$PWD venv=$PWD/venv
install() { :; }
say() { :; }
elapsed() { echo 0; }
"""


def pretend(folder: Path) -> None:
    """A checkout whose commands only tell how they were called."""
    (folder / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "quickstart.sh", folder / "launch")
    (folder / "launch" / "setup.sh").write_text(PRETENDED_SETUP, encoding="utf-8")
    (folder / "venv" / "bin").mkdir(parents=True)
    (folder / "data" / "quickstart").mkdir(parents=True)
    for name in ("python", "megatron-lite"):
        program = folder / "venv" / "bin" / name
        program.write_text('#!/bin/sh\necho "$@"\n', encoding="utf-8")
        program.chmod(0o755)


@pytest.mark.parametrize(("num_bytes", "fraction"), [(20_000, "0.20"), (500_000, "0.05"), (5_000_000, "0.01")])
def test_the_quickstart_holds_out_enough_of_a_small_text(tmp_path: Path, num_bytes: int, fraction: str) -> None:
    """20 samples of 256 tokens take some 20 KB."""
    pretend(tmp_path)
    (tmp_path / "one.txt").write_bytes(b"x" * (num_bytes // 2))
    (tmp_path / "two.txt").write_bytes(b"x" * (num_bytes // 2))
    result = bash("launch/quickstart.sh", "--text", "one.txt", "two.txt", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (made,) = [line for line in result.stdout.splitlines() if line.startswith("data ")]
    assert made.endswith(f"--valid-fraction {fraction}")


def test_the_quickstart_ends_with_a_sample(tmp_path: Path) -> None:
    """Of Python where the model was trained on the standard library, and of whatever it says first elsewhere."""
    pretend(tmp_path)
    (tmp_path / "own.txt").write_bytes(b"x" * 20_000)
    for texts, prompt in (([], "def  "), (["--text", "own.txt"], " ")):
        result = bash("launch/quickstart.sh", *texts, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        calls = [line for line in result.stdout.splitlines() if line.startswith(("data ", "train ", "generate "))]
        assert [line.split()[0] for line in calls] == ["data", "train", "generate"]
        assert calls[-1].startswith(f"generate runs/quickstart --prompt {prompt}--max-new-tokens ")
        assert "--seed 1" in calls[-1]


@pytest.mark.parametrize(("fails", "code"), [("nothing", 0), ("tests/ops", 5), ("--ignore=tests/ops", 5)])
def test_all_tests_are_those_of_two_halves(tmp_path: Path, fails: str, code: int) -> None:
    """Each room is in one of them, and either's failure is that of all."""
    pretend(tmp_path)
    shutil.copy(ROOT / "launch" / "test.sh", tmp_path / "launch")
    python = tmp_path / "venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\necho "$@"\ncase " $* " in *" {fails} "*) exit 5 ;; esac\n', encoding="utf-8")
    result = bash("launch/test.sh", cwd=tmp_path)
    assert result.returncode == code, result.stderr
    first, second = (line.split() for line in result.stdout.splitlines() if "pytest" in line)
    rooms = {word.removeprefix("--ignore=") for word in first if word.startswith("--ignore=")}
    assert rooms == {word for word in second if word.startswith("tests/")}
    assert len(rooms) > 5 and all((ROOT / room).is_dir() for room in rooms)


def test_all_tests_of_launchers_are_where_they_are_looked_for() -> None:
    marked = {
        path.relative_to(ROOT / "tests") for path in ROOT.glob("tests/**/*.py") if "mark.cluster" in path.read_text()
    }
    assert {path.parts[0] for path in marked if len(path.parts) > 1} == {"cluster"}
    assert Path(__file__).relative_to(ROOT / "tests") in marked, "they are seen"


def test_the_quickstart_refuses_a_text_that_is_too_short(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("a few words", encoding="utf-8")
    result = bash("launch/quickstart.sh", "--text", str(tmp_path / "note.txt"))
    assert result.returncode == USER_ERROR, result.stdout + result.stderr
    assert "11 bytes are too few" in result.stderr and "at least 16384" in result.stderr


def test_no_python_is_one_clear_message(tmp_path: Path) -> None:
    """In a fresh checkout on a machine whose Python is too old."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "date", "mktemp", "rm", "cat"):
        (tools / tool).symlink_to(shutil.which(tool) or "")
    old = tools / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.10\nexit 1\n', encoding="utf-8")
    old.chmod(0o755)
    result = bash(str(tmp_path / "launch" / "quickstart.sh"), PATH=str(tools))
    assert result.returncode == 1
    assert "no Python 3.11 or newer found" in result.stderr and "PYTHON=" in result.stderr
    assert not (tmp_path / ".venv").exists()


SETUP = "set -euo pipefail; . launch/setup.sh; "


def test_quietly_shows_the_end_of_what_failed() -> None:
    result = bash("-c", SETUP + "quietly 'the step' bash -c 'echo the reason; exit 3'; echo never")
    assert result.returncode == 3
    assert "the reason" in result.stderr and "never" not in result.stdout
    quiet = bash("-c", SETUP + "quietly 'the step' echo chatter; echo after")
    assert quiet.returncode == 0 and "chatter" not in quiet.stdout and "after" in quiet.stdout


def fingerprint(root: Path, **environment: str) -> str:
    """Of this Python, in place of that of .venv."""
    venv = root / "venv/bin"
    if not venv.exists():
        venv.mkdir(parents=True)
        (venv / "python").symlink_to(sys.executable)
    sourced = f". {ROOT}/launch/setup.sh; root={root} venv={root}/venv; fingerprint"
    return bash("-c", f"set -euo pipefail; {sourced}", **environment).stdout.strip()


def test_an_install_is_repeated_when_what_it_was_made_from_changes(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    before = fingerprint(tmp_path)
    assert len(before) == 64 and fingerprint(tmp_path) == before
    kernel = tmp_path / "csrc/rms_norm/cpu.cpp"
    kernel.write_text(kernel.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert fingerprint(tmp_path) != before


def test_an_install_is_repeated_for_other_gpus_and_other_compilers(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "setup.py", "constraints.txt"):
        (tmp_path / name).touch()
    tools = tmp_path / "tools"
    tools.mkdir()
    seen = [fingerprint(tmp_path)]
    for name in ("MEGATRON_LITE_CUDA_ARCHS", "CUDA_HOME", "NVCC", "CXX"):
        seen.append(fingerprint(tmp_path, **{name: "90"}))
    for gpus in ("8.0", "9.0"):
        (tools / "nvidia-smi").write_text(f"#!/bin/sh\necho {gpus}; echo {gpus}\n", encoding="utf-8")
        (tools / "nvidia-smi").chmod(0o755)
        seen.append(fingerprint(tmp_path, PATH=f"{tools}{os.pathsep}{os.environ['PATH']}"))
    assert len(set(seen)) == len(seen) and {len(digest) for digest in seen} == {64}


def test_what_is_built_is_not_built_again_for_more_extras(tmp_path: Path) -> None:
    """A Python that notes what pip is asked for, and leaves the report of a build behind."""
    for name in ("pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    report = tmp_path / "megatron_lite/ops/_native_build.json"
    report.parent.mkdir(parents=True)
    python.write_text(
        f'#!/bin/sh\nif [ "$2" = pip ]; then\n  shift 2; echo "$@" >>{tmp_path}/calls\n'
        f'  echo \'{{"cpu": null, "cuda": null, "index": null}}\' >{report}\n'
        f'else\n  exec {sys.executable} "$@"\nfi\n'
    )
    python.chmod(0o755)
    sourced = f". {ROOT}/launch/setup.sh; root={tmp_path} venv={tmp_path}/venv"
    calls = []
    for name, extras in (("quickstart", ""), ("test", "[test]"), ("test", "[test]")):
        ended = bash("-c", f"set -euo pipefail; {sourced}; install {name} '{extras}'")
        assert ended.returncode == 0, ended.stdout + ended.stderr
        said = (tmp_path / "calls").read_text().splitlines()
        calls.append([line.split()[-1] for line in said[sum(map(len, calls)) :]])
    assert calls == [["pybind11", "."], ["megatron-lite[test]"], []]
