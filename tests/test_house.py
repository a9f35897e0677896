"""The house: which way imports run, who may communicate, how long things are. Read from the syntax trees.

Every check is a function from a folder to a list of complaints. It runs on this repository, where it finds nothing,
and on a small tree that breaks its rule, where it has to complain: the negative control.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "megatron_lite"

FLOORS = (
    {"config", "utils"},
    {"distributed", "ops"},
    {"models", "data"},
    {"tensor_parallel", "pipeline", "zero", "optim", "checkpoint"},
    {"train", "verify", "inference", "planner", "report"},
    {"cli", "__main__"},
)
# (importer, imported) on one floor, with the reason.
SAME_FLOOR = {
    ("verify", "train"): "a proof runs the steps that training runs",
    ("train", "planner"): "a run shows what was predicted beside what it has, and refuses to start where it cannot fit",
    ("report", "planner"): "a page shows the memory of a run by the names of its prediction",
    ("inference", "train"): "the model that generates is the stage that training builds",
    ("__main__", "cli"): "python -m megatron_lite is the command",
}
# Who reads or sets the environment, and why that is at start-up.
ENVIRONMENT = {
    "cli/ranks.py": "the command finds out whether a launcher started it",
    "cli/train.py": "hands the environment on, for the size of the world",
    "distributed/agent.py": "sets what torch's agent and its ranks read",
    "distributed/hosts.py": "chooses gloo's interface before the first group is made",
    "distributed/launch.py": "starts ranks, whose place is in their environment",
    "distributed/rank.py": "reads a rank's place once, and where torchrun wants to hear of errors",
    "distributed/rendezvous.py": "reads a rank's place once",
    "distributed/worker.py": "readies a worker before torch is used",
}
# Where something is divided by a count, and why. For the loss one place, as the design wants it.
NORMALISERS = {
    "train/step.py:loss_weight": "the one place where a sum of token losses is divided by their number",
    "models/families.py:_layer": "GPT-2 draws a projection into the residual smaller the more layers there are",
    "optim/adafactor.py:_scales": "the root mean square of a matrix of weights",
}
# What the name of a count has among its words, and the rooms that compute no loss.
COUNTS = {
    "batch", "count", "counts", "dp", "microbatches", "n", "num", "numel", "ranks", "samples", "sequences", "target",
    "targets", "token", "tokens", "world",
}  # fmt: skip
LOSSLESS_ROOMS = {"cli", "report"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80
MUTABLE_CALLS = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict"}
MUTATORS = {"append", "add", "update", "extend", "insert", "pop", "popitem", "remove", "discard", "clear", "setdefault"}


def package_files(root: Path) -> Iterator[tuple[str, ast.Module]]:
    """(path below the package, syntax tree) of each of its modules."""
    for path in sorted((root / PACKAGE).rglob("*.py")):
        yield path.relative_to(root / PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def source_files(root: Path, *suffixes: str) -> Iterator[Path]:
    for folder in (PACKAGE, "tests", "csrc", "benchmarks", "launch"):
        yield from sorted(path for path in (root / folder).rglob("*") if path.suffix in suffixes)
    yield from (path for path in (root / "setup.py",) if path.exists() and ".py" in suffixes)


def imported_modules(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import, wherever in the file it stands."""
    package = [PACKAGE, *Path(path).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def room_of(path: str) -> str:
    return Path(path).parts[0].removesuffix(".py")


def floor_of(room: str) -> int | None:
    return next((number for number, rooms in enumerate(FLOORS) if room in rooms), None)


def imports_run_upward(root: Path) -> list[str]:
    complaints = []
    for path, tree in package_files(root):
        room = room_of(path)
        if room == "__init__":
            continue
        if floor_of(room) is None:
            complaints.append(f"{path}: the room {room} is on no floor")
            continue
        for line, name in imported_modules(path, tree):
            parts = name.split(".")
            if parts[0] != PACKAGE or len(parts) < 2 or parts[1] == room or floor_of(parts[1]) is None:
                continue
            here, there = floor_of(room), floor_of(parts[1])
            assert here is not None and there is not None
            if there >= here and (room, parts[1]) not in SAME_FLOOR:
                complaints.append(f"{path}:{line}: {room} (floor {here}) imports {parts[1]} (floor {there})")
    return complaints


def communicates_elsewhere(root: Path) -> list[str]:
    """torch.distributed outside distributed/; and, for models/ and ops/, distributed/ itself."""
    complaints = []
    for path, tree in package_files(root):
        room = room_of(path)
        names = list(imported_modules(path, tree))
        attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
        names += [(node.lineno, ast.unparse(node)) for node in attributes]
        for line, name in names:
            if room == "checkpoint" and f"{name}.".startswith("torch.distributed.checkpoint."):
                continue  # the planners and the storage are its extension points
            if room != "distributed" and f"{name}.".startswith("torch.distributed."):
                complaints.append(f"{path}:{line}: {name} outside distributed/")
            if room in ("models", "ops") and f"{name}.".startswith(f"{PACKAGE}.distributed."):
                complaints.append(f"{path}:{line}: {room} knows that it is parallel: {name}")
    return complaints


def reads_the_environment(root: Path) -> list[str]:
    complaints = []
    for path, tree in package_files(root):
        for node in ast.walk(tree):
            is_read = isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv")
            is_import = isinstance(node, ast.ImportFrom) and node.module == "os"
            is_import = is_import and any("env" in alias.name for alias in node.names)  # type: ignore[attr-defined]
            if (is_read or is_import) and path not in ENVIRONMENT:
                complaints.append(f"{path}:{node.lineno}: the environment, after start-up")  # type: ignore[attr-defined]
    for source in source_files(root, ".cpp", ".cu", ".cuh", ".h"):
        if re.search(r"\bgetenv\s*\(", source.read_text(encoding="utf-8")):
            complaints.append(f"{source.relative_to(root)}: getenv")
    return complaints


def normalises_the_loss_elsewhere(root: Path) -> list[str]:
    """Divisions by a count, mean reductions of a loss: all but the known ones. A known one must exist."""
    found = set()
    for path, tree in package_files(root):
        if room_of(path) in LOSSLESS_ROOMS:
            continue
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            if any(_normalises(node) for node in ast.walk(function)):
                found.add(f"{path}:{function.name}")
    unknown = [f"{place} normalises the loss" for place in sorted(found - set(NORMALISERS))]
    return unknown + [f"{place} no longer normalises: {NORMALISERS[place]}" for place in set(NORMALISERS) - found]


def _normalises(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return _counts(node.right)
    if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Div):
        return _counts(node.value)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return isinstance(node.right, ast.UnaryOp) and isinstance(node.right.op, ast.USub) and _counts(node.left)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        divides = node.func.attr in ("div", "div_", "true_divide", "true_divide_") and any(map(_counts, node.args))
        inverts = node.func.attr in ("reciprocal", "reciprocal_") and any(map(_counts, [node.func.value, *node.args]))
        averages = node.func.attr == "mean" and "loss" in ast.unparse(node.func.value)
        reduction = next((word.value for word in node.keywords if word.arg == "reduction"), None)
        is_mean = "cross_entropy" in node.func.attr and "linear" not in node.func.attr
        is_mean = is_mean and (reduction is None or ast.unparse(reduction) == "'mean'")
        return divides or inverts or averages or is_mean
    return False


def _counts(value: ast.expr) -> bool:
    """Whether a name in the expression is that of a count: num_targets, batch.tokens, x.numel()."""
    names = [node.id for node in ast.walk(value) if isinstance(node, ast.Name)]
    names += [node.attr for node in ast.walk(value) if isinstance(node, ast.Attribute)]
    return any(not COUNTS.isdisjoint(name.lower().split("_")) for name in names)


def keeps_mutable_globals(root: Path) -> list[str]:
    """Mutable values at module level whose name is not a constant's, tables that a function changes, ``global``."""
    complaints = []
    for path, tree in package_files(root):
        module_names = set()
        for node in tree.body:
            if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
                continue
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            module_names.update(names)
            is_constant = all(name.strip("_").isupper() or name == "__all__" for name in names)
            if _is_mutable(node.value) and not is_constant:
                complaints.append(f"{path}:{node.lineno}: {', '.join(names)} is mutable, and not named as a table")
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            complaints += [f"{path}:{line}: {what}" for line, what in _changes(function, module_names)]
    return complaints


def _is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).rpartition(".")[2] in MUTABLE_CALLS
    return isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)


def _changes(function: ast.FunctionDef, module_names: set[str]) -> Iterator[tuple[int, str]]:
    stored = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    shared = module_names - stored - {argument.arg for argument in ast.walk(function) if isinstance(argument, ast.arg)}
    for node in ast.walk(function):
        if isinstance(node, ast.Global):
            yield node.lineno, f"global {', '.join(node.names)}"
        container: ast.expr | None = None
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            container = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
            container = node.func.value
        if isinstance(container, ast.Name) and container.id in shared:
            yield container.lineno, f"{function.name} changes {container.id}, which is the module's"


def is_too_long(root: Path) -> list[str]:
    complaints = []
    for path in source_files(root, ".py", ".cpp", ".cu", ".cuh", ".h", ".sh"):
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(root)
        if (lines := len(text.splitlines())) > MAX_FILE_LINES:
            complaints.append(f"{name}: {lines} lines, more than {MAX_FILE_LINES}")
        functions = _python_functions(text) if path.suffix == ".py" else _braced_functions(text)
        for function, lines in functions:
            if lines > MAX_FUNCTION_LINES:
                complaints.append(f"{name}: {function} has {lines} lines, more than {MAX_FUNCTION_LINES}")
    return complaints


def _python_functions(text: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def _braced_functions(text: str) -> Iterator[tuple[str, int]]:
    """Blocks of C++ and of shell that open at the end of a line without indentation; namespaces are not functions."""
    opened: tuple[str, int] | None = None
    for number, line in enumerate(text.splitlines()):
        if line.endswith("{") and not line.startswith((" ", "namespace", "}")):
            opened = line, number
        elif opened is not None and line.startswith("}"):
            yield opened[0], number - opened[1] + 1
            opened = None


LONG_FUNCTION = "void f(int x) {\n" + "  x += 1;\n" * 80 + "}\n"
LONG_SCRIPT = "f() {\n" + "  true\n" * 80 + "}\n"

# check -> files of a tree that breaks its rule, and what the complaint has to mention.
CONTROLS: list[tuple[Callable[[Path], list[str]], str, str, str]] = [
    (imports_run_upward, "megatron_lite/utils/a.py", "from megatron_lite.train.step import train_step", "train"),
    (imports_run_upward, "megatron_lite/zero/a.py", "from megatron_lite.pipeline import runner", "pipeline"),
    (imports_run_upward, "megatron_lite/zero/a.py", "from megatron_lite import pipeline", "pipeline"),
    (imports_run_upward, "megatron_lite/zero/a.py", "from ..pipeline import runner", "pipeline"),
    (imports_run_upward, "megatron_lite/zero/a.py", "def f():\n    import megatron_lite.cli", "cli"),
    (imports_run_upward, "megatron_lite/attic/a.py", "", "no floor"),
    (communicates_elsewhere, "megatron_lite/zero/a.py", "import torch.distributed as dist", "torch.distributed"),
    (communicates_elsewhere, "megatron_lite/zero/a.py", "from torch import distributed", "torch.distributed"),
    (communicates_elsewhere, "megatron_lite/zero/a.py", "import torch.distributed.checkpoint", "torch.distributed"),
    (communicates_elsewhere, "megatron_lite/checkpoint/a.py", "import torch.distributed as dist", "torch.distributed"),
    (communicates_elsewhere, "megatron_lite/zero/a.py", "import torch\ntorch.distributed.barrier()", "barrier"),
    (communicates_elsewhere, "megatron_lite/ops/a.py", "from megatron_lite.distributed import mesh", "is parallel"),
    (reads_the_environment, "megatron_lite/zero/a.py", "import os\nx = os.environ.get('A')", "zero/a.py:2"),
    (reads_the_environment, "megatron_lite/zero/a.py", "from os import getenv", "zero/a.py:1"),
    (reads_the_environment, "csrc/a/cpu.cpp", 'auto x = getenv("A");', "getenv"),
    (normalises_the_loss_elsewhere, "megatron_lite/a.py", "def f(x, n_targets):\n    return x / n_targets", "a.py:f"),
    (normalises_the_loss_elsewhere, "megatron_lite/a.py", "def f(x, batch):\n    x /= batch.tokens.numel()", "a.py:f"),
    (
        normalises_the_loss_elsewhere,
        "megatron_lite/a.py",
        "def f(x, dp):\n    return x * (1 / dp.size)",
        "a.py:f",
    ),
    (normalises_the_loss_elsewhere, "megatron_lite/a.py", "def f(x, count):\n    return x * count**-1", "a.py:f"),
    (normalises_the_loss_elsewhere, "megatron_lite/a.py", "def f(x, n):\n    return x * n.reciprocal()", "a.py:f"),
    (normalises_the_loss_elsewhere, "megatron_lite/a.py", "def f(x, n):\n    return torch.div(x, n)", "a.py:f"),
    (normalises_the_loss_elsewhere, "megatron_lite/a.py", "def f(loss):\n    return loss.mean()", "a.py:f"),
    (normalises_the_loss_elsewhere, "megatron_lite/a.py", "def f(x, y):\n    return F.cross_entropy(x, y)", "a.py:f"),
    (normalises_the_loss_elsewhere, "megatron_lite/a.py", "", "no longer"),
    (keeps_mutable_globals, "megatron_lite/a.py", "cache = {}", "cache"),
    (keeps_mutable_globals, "megatron_lite/a.py", "import collections\nseen = collections.deque()", "seen"),
    (keeps_mutable_globals, "megatron_lite/a.py", "TABLE = {}\ndef f():\n    TABLE[1] = 2", "changes TABLE"),
    (keeps_mutable_globals, "megatron_lite/a.py", "TABLE = []\ndef f():\n    TABLE.append(2)", "changes TABLE"),
    (keeps_mutable_globals, "megatron_lite/a.py", "x = 1\ndef f():\n    global x\n    x = 2", "global x"),
    (is_too_long, "megatron_lite/a.py", "x = 1\n" * 401, "401 lines"),
    (is_too_long, "tests/test_a.py", "def f():\n" + "    x = 1\n" * 80, "f has 81 lines"),
    (is_too_long, "csrc/a/cpu.cpp", f"namespace ml {{\n{LONG_FUNCTION}}}\n", "82 lines"),
    (is_too_long, "launch/a.sh", LONG_SCRIPT, "82 lines"),
]
CHECKS = list(dict.fromkeys(check for check, *_ in CONTROLS))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_nothing_here(check: Callable[[Path], list[str]]) -> None:
    complaints = check(ROOT)
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(("check", "path", "text", "mentions"), CONTROLS)
def test_control(check: Callable[[Path], list[str]], path: str, text: str, mentions: str, tmp_path: Path) -> None:
    """Negative control: the same check on a tree that breaks its rule."""
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(text, encoding="utf-8")
    complaints = check(tmp_path)
    assert any(mentions in complaint for complaint in complaints), complaints


def test_the_checks_see_the_package() -> None:
    """A check that reads no file would find nothing to complain about."""
    assert len(list(package_files(ROOT))) > 50
    assert {path.suffix for path in source_files(ROOT, ".py", ".cpp", ".cu", ".h", ".sh")} == {
        ".py", ".cpp", ".cu", ".h", ".sh",
    }  # fmt: skip
    for place in ENVIRONMENT:
        assert (ROOT / PACKAGE / place).exists(), f"{place} is gone: take it out of ENVIRONMENT"
    imports = {
        (room_of(path), name.split(".")[1])
        for path, tree in package_files(ROOT)
        for _, name in imported_modules(path, tree)
        if name.startswith(f"{PACKAGE}.")
    }
    assert set(SAME_FLOOR) <= imports, "an exception that nothing uses"


def run_tool(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], cwd=cwd, capture_output=True, text=True, check=False)


TOOLS = {
    "lint": ("ruff", "check", "--no-cache"),
    "format": ("ruff", "format", "--check", "--no-cache"),
    "types": ("mypy",),
}


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_tool_is_content(tool: str) -> None:
    arguments = TOOLS[tool] + (() if tool == "types" else (".",))
    result = run_tool(*arguments, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("tool", TOOLS)
def test_tool_control(tool: str, tmp_path: Path) -> None:
    """Negative control: the tools run with this project's settings, and complain."""
    (tmp_path / PACKAGE).mkdir()
    (tmp_path / PACKAGE / "a.py").write_text("import os\n\n\ndef f(x): return x+1\n", encoding="utf-8")
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(settings, encoding="utf-8")
    result = run_tool(*TOOLS[tool], *(() if tool == "types" else (".",)), cwd=tmp_path)
    complaint = {"lint": "F401", "format": "would be reformatted", "types": "missing a type annotation"}[tool]
    assert result.returncode != 0 and complaint in result.stdout, result.stdout + result.stderr
