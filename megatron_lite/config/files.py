"""Whether the files that a config names are there. Separate from the rules, which never look at the disk."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

from megatron_lite.config.problems import ABSENT, Fix, Problem, override
from megatron_lite.config.values import Unreadable, Values

PAIR = (".bin", ".idx")
"""The two files of a token data set."""


def check_values(v: Values) -> list[Problem]:
    """What is missing on disk for training. Relative paths are taken from the working directory."""
    problems: list[Problem] = []
    for look in (_train_data, _valid_data, _tokenizer, _checkpoint):
        try:
            problems.extend(look(v))
        except Unreadable:
            continue
    return problems


def near_files(path: Path, pattern: str = "*", *, limit: int = 3) -> list[Path]:
    """Files in the folder of a missing one whose names are like its name, nearest first."""
    try:
        names = {found.name: found for found in sorted(path.parent.glob(pattern)) if found.is_file()}
    except OSError:
        return []
    return [names[name] for name in difflib.get_close_matches(path.name, names, n=limit, cutoff=0.4)]


def _train_data(v: Values) -> Iterator[Problem]:
    if not v["data.train"]:
        remedy = "give the path prefix of a .bin/.idx pair; `megatron-lite data --help` says how to make one from text"
        yield Problem("data.train", ABSENT, "must name at least one data set to train on", remedy)
    yield from _pairs("data.train", v["data.train"])


def _valid_data(v: Values) -> Iterator[Problem]:
    yield from _pairs("data.valid", v["data.valid"])


def _pairs(key: str, prefixes: tuple[str, ...]) -> Iterator[Problem]:
    for position, prefix in enumerate(prefixes):
        missing = [prefix + suffix for suffix in PAIR if not Path(prefix + suffix).is_file()]
        if not missing:
            continue
        found = _near_prefix(prefix)
        fixes: tuple[Fix, ...] = ()
        if found is not None:
            fixes = ((override(key, [*prefixes[:position], found, *prefixes[position + 1 :]]),),)
        remedy = "`megatron-lite data --help` says how to make the pair from text"
        yield Problem(key, prefix, f"needs the file{'s' * (len(missing) > 1)} {' and '.join(missing)}", remedy, fixes)


def _near_prefix(prefix: str) -> str | None:
    """A prefix whose pair is complete: the same without a suffix that was written by mistake, or a like name."""
    stripped = prefix.removesuffix(PAIR[0]).removesuffix(PAIR[1])
    near = (str(path)[: -len(PAIR[1])] for path in near_files(Path(prefix + PAIR[1]), "*" + PAIR[1]))
    for candidate in (stripped, *near):
        if all(Path(candidate + suffix).is_file() for suffix in PAIR):
            return candidate
    return None


def _tokenizer(v: Values) -> Iterator[Problem]:
    path, key = v["data.tokenizer"], "data.tokenizer"
    if path is not None and not Path(path).is_file():
        fixes = tuple((override(key, str(near)),) for near in near_files(Path(path), "*.json", limit=1))
        yield Problem(key, path, "must be a file; there is none", "or leave the key out", fixes)


def _checkpoint(v: Values) -> Iterator[Problem]:
    folder, key = v["init.from_hf"], "init.from_hf"
    if folder is not None and not (Path(folder) / "config.json").is_file():
        found = "has no config.json" if Path(folder).is_dir() else "does not exist"
        rule = f"must be a folder with config.json and *.safetensors; it {found}"
        yield Problem(key, folder, rule, "download the checkpoint first, or leave the key out for random weights")
