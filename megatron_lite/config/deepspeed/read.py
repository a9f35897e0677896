"""A DeepSpeed config from its file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.config.deepspeed.document import read_document
from megatron_lite.config.deepspeed.translate import translate
from megatron_lite.config.deepspeed.translation import Line, Ours
from megatron_lite.config.load import given_values
from megatron_lite.config.problems import ConfigError, Problem, override
from megatron_lite.config.source import Override


class RefusedError(ConfigError):
    """A file of which something is refused. lines: of all its keys, as in `Reading`."""

    def __init__(self, problems: Sequence[Problem], source: str, lines: Sequence[Line]) -> None:
        super().__init__(problems, source)
        self.lines = tuple(lines)


@dataclass(frozen=True)
class Reading:
    """lines: one for each key of the file, and for defaults of DeepSpeed's that matter. overrides: for `load_config`,
    to stand before those of the command line."""

    lines: tuple[Line, ...]
    overrides: tuple[str, ...]


def read_deepspeed(
    path: str | Path, config: str | Path | None, overrides: Sequence[str] = (), *, world_size: int | None = None
) -> Reading:
    """Reads a DeepSpeed config for a run.

    path: the JSON file. config, overrides: the run's YAML and its command line, as `load_config` takes them; the file
        wins over the YAML, and the command line over both.
    world_size: number of processes; the batch sizes count dp = world_size / (tp * pp * cp).

    Raises `RefusedError` with everything in the file that is refused, `ConfigError` for what is no DeepSpeed config.
    """
    document = read_document(Path(path))
    values, origins = given_values(config, overrides, world_size=world_size)
    found = translate(document, Ours(values, origins), str(path))
    if found.problems:
        raise RefusedError(found.problems, str(path), found.lines)
    texts = (Override(override(key, value), str(path), found.sources[key]) for key, value in found.values.items())
    return Reading(tuple(found.lines), tuple(texts))
