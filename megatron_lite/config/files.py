"""Which files a config means, and whether they are there. Separate from the rules, which never look at the disk."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_lite.config.layer_costs import read_layer_costs
from megatron_lite.config.problems import ABSENT, Fix, Problem, override
from megatron_lite.config.schedules import SCHEDULE_RULES
from megatron_lite.config.values import Unreadable, Values


def pair_paths(prefix: str | os.PathLike[str]) -> tuple[Path, Path]:
    """`PREFIX.bin` and `PREFIX.idx`; a prefix that already ends in .bin or .idx is understood too."""
    name = os.fspath(prefix)
    if name.endswith((".bin", ".idx")):
        name = name[:-4]
    return Path(f"{name}.bin"), Path(f"{name}.idx")


def tokenizer_path(path: str | os.PathLike[str]) -> Path:
    """The file of a tokenizer: `path` itself, or in a folder its tokenizer.json or, without one, tokenizer.model."""
    folder = Path(path)
    if not folder.is_dir():
        return folder
    alone = not (folder / "tokenizer.json").exists() and (folder / "tokenizer.model").exists()
    return folder / ("tokenizer.model" if alone else "tokenizer.json")


def check_values(v: Values) -> list[Problem]:
    """What is missing on disk for training. Relative paths are taken from the working directory."""
    problems: list[Problem] = []
    for look in (_train_data, _held_out_data, _cache, _tokenizer, _checkpoint, _schedule, _layer_costs, _offload):
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


def _held_out_data(v: Values) -> Iterator[Problem]:
    for key in ("data.valid", "data.test"):
        yield from _pairs(key, v[key])


def _cache(v: Values) -> Iterator[Problem]:
    folder, key = v["data.cache"], "data.cache"
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        yield Problem(key, folder, "must be a folder, or a path at which one can be made; it is a file", "name another")


def _pairs(key: str, prefixes: tuple[str, ...]) -> Iterator[Problem]:
    for position, prefix in enumerate(prefixes):
        missing = [str(path) for path in pair_paths(prefix) if not path.is_file()]
        if not missing:
            continue
        found = _near_prefix(prefix)
        fixes: tuple[Fix, ...] = ()
        if found is not None:
            fixes = ((override(key, [*prefixes[:position], found, *prefixes[position + 1 :]]),),)
        remedy = "`megatron-lite data --help` says how to make the pair from text"
        yield Problem(key, prefix, f"needs the file{'s' * (len(missing) > 1)} {' and '.join(missing)}", remedy, fixes)


def _near_prefix(prefix: str) -> str | None:
    """A prefix like this one whose pair is complete."""
    near = (str(path.with_suffix("")) for path in near_files(pair_paths(prefix)[1], "*.idx"))
    return next((candidate for candidate in near if all(path.is_file() for path in pair_paths(candidate))), None)


def _tokenizer(v: Values) -> Iterator[Problem]:
    path, key = v["data.tokenizer"], "data.tokenizer"
    if path is not None and not (file := tokenizer_path(path)).is_file():
        fixes = tuple((override(key, str(near)),) for near in near_files(file, "*.json", limit=1))
        rule = f"must be a tokenizer.json or a folder that holds one; there is no {file}"
        yield Problem(key, path, rule, "or leave the key out" if fixes else "name one, or leave the key out", fixes)


def _checkpoint(v: Values) -> Iterator[Problem]:
    folder, key = v["init.from_hf"], "init.from_hf"
    if folder is not None and not (Path(folder) / "config.json").is_file():
        found = "has no config.json" if Path(folder).is_dir() else "does not exist"
        rule = f"must be a folder with config.json and *.safetensors; it {found}"
        yield Problem(key, folder, rule, "download the checkpoint first, or leave the key out for random weights")


def _schedule(v: Values) -> Iterator[Problem]:
    schedule = v["parallel.schedule"]
    if schedule not in SCHEDULE_RULES:
        yield from _plain_file("parallel.schedule", schedule, "*.csv", f"or one of {', '.join(SCHEDULE_RULES)}")


def _layer_costs(v: Values) -> Iterator[Problem]:
    path, key = v["parallel.partition"], "parallel.partition"
    if path in ("even", "cost"):
        return
    missing = list(_plain_file(key, path, "*.json", "or parallel.partition=cost, which computes the costs"))
    yield from missing
    if not missing:
        try:
            read_layer_costs(path, v["model.num_layers"])
        except (ValueError, OSError) as error:
            yield Problem(key, path, str(error), "or let them be computed", ((override(key, "cost"),),))


def _offload(v: Values) -> Iterator[Problem]:
    folder, key = v["offload.dir"], "offload.dir"
    if folder is not None and not Path(folder).is_dir():
        found = "is not a folder" if Path(folder).exists() else "does not exist"
        yield Problem(key, folder, f"must be a folder; it {found}", "make it, on a disk of each machine's own")


def _plain_file(key: str, path: str, pattern: str, remedy: str) -> Iterator[Problem]:
    if not Path(path).is_file():
        fixes = tuple((override(key, str(near)),) for near in near_files(Path(path), pattern, limit=1))
        yield Problem(key, path, "there is no such file", remedy if fixes else f"name one, {remedy}", fixes)
