"""Whether a Hugging Face checkpoint is of the model that a config describes, with every difference and its remedy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.huggingface.config import CONFIG_FILE, read_model, without_ntk
from megatron_lite.checkpoint.huggingface.families import CONFIGS, SCALING_KEYS
from megatron_lite.config.problems import ConfigError, Problem, override
from megatron_lite.config.schema import ModelConfig


def check_matches(folder: str | Path, model: ModelConfig) -> None:
    """Raises ConfigError, with every difference, if the checkpoint in ``folder`` is not of the model ``model``."""
    found, model = read_model(folder), without_ntk(model)
    differing = _differing(model, found)
    problems = [_difference(key, getattr(model, key), getattr(found, key)) for key in differing]
    problems += [_no_longer_derived(key, getattr(found, key)) for key in _moved_by_fixes(model, found, differing)]
    if problems:
        name = (
            f"the model section for the checkpoint {folder} (`megatron-lite convert {folder} model.yaml` writes the "
            "one that fits, for model=model.yaml)"
        )
        raise ConfigError(problems, name)


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-12)
    if hasattr(ours, "type") and hasattr(theirs, "type") and ours.type == theirs.type:
        return all(getattr(ours, key) == getattr(theirs, key) for key in SCALING_KEYS[ours.type])
    return bool(ours == theirs)


def _differing(model: ModelConfig, found: ModelConfig) -> list[str]:
    keys = ["family"] if model.family != found.family else list(ModelConfig.model_fields)
    free = CONFIGS[found.family].free
    return [key for key in keys if key not in free and not _equal(getattr(model, key), getattr(found, key))]


def _moved_by_fixes(model: ModelConfig, found: ModelConfig, differing: list[str]) -> list[str]:
    """Keys that are right and were not given: they follow from keys that are about to change."""
    given = {key: getattr(model, key) for key in model.model_fields_set}
    fixed = ModelConfig.model_validate(given | {key: getattr(found, key) for key in differing})
    return _differing(fixed, found) if fixed.family == model.family else []


def _no_longer_derived(key: str, value: Any) -> Problem:
    rule = "follows from other keys, and changes with the ones above: the checkpoint needs it as it is"
    return Problem(f"model.{key}", value, rule, "", ((override(f"model.{key}", value),),))


def _difference(key: str, ours: Any, theirs: Any) -> Problem:
    plain = [value.model_dump() if hasattr(value, "model_dump") else value for value in (ours, theirs)]
    is_choice = key in ("norm_eps", "rope_theta", "rope_scaling", "sliding_window", "sliding_window_from", "activation")
    return Problem(
        f"model.{key}",
        plain[0],
        f"is not what the checkpoint has, {plain[1]!r}",
        f"or change it in the checkpoint's {CONFIG_FILE}, if another function is meant" if is_choice else "",
        ((override(f"model.{key}", plain[1]),),),
    )
