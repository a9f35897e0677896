"""Between our model section and the config.json of Hugging Face, in both directions from one table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megatron_lite.checkpoint.huggingface.families import CONFIGS, FULL, REQUIRED, SCALING_KEYS, SLIDING
from megatron_lite.checkpoint.tensor_files import CheckpointError, read_json
from megatron_lite.config.schema import ModelConfig
from megatron_lite.models.positions import ntk_theta

CONFIG_FILE = "config.json"
_FLOATS = ("norm_eps", "init_std", "rope_theta")


def config_from_hf(folder: str | Path) -> dict[str, Any]:
    """The model section that describes a Hugging Face checkpoint: every key of ``ModelConfig`` with a plain value.

    Raises CheckpointError, with everything that stands in the way, for a folder without a readable config.json, of
    another architecture, or with a setting that our model does not compute.
    """
    return read_model(folder).model_dump()


def read_model(folder: str | Path) -> ModelConfig:
    """`config_from_hf` as a ``ModelConfig``."""
    path = Path(folder) / CONFIG_FILE
    try:
        return ModelConfig.model_validate(_model_section(read_json(path), path))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors())
        raise CheckpointError(f"{path}: is not a possible model: {wrong}") from error


def config_to_hf(model: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json for ``model``, without the ids of special tokens.

    transformers 4 and 5 read it: version 5 has moved the rotary keys into ``rope_parameters`` and the layers with a
    sliding window into ``layer_types``, and both places are filled.
    """
    model, family = without_ntk(model), CONFIGS[model.family]
    activation_key, activations = family.activations
    written: dict[str, Any] = {
        "architectures": [family.architectures[0]],
        "model_type": model.family,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        **{theirs: getattr(model, ours) for ours, (theirs, _) in family.keys.items()},
        activation_key: activations[model.activation][0],
        **{key: values[0] for key, values in family.settings.items()},
        **family.written,
    }
    if model.family != "gpt2":
        scaling = _scaling_to_hf(model)
        written["rope_theta"] = model.rope_theta
        written["rope_scaling"] = scaling
        written["rope_parameters"] = {"rope_theta": model.rope_theta, **(scaling or {"rope_type": "default"})}
    if model.family == "qwen2":
        windows = [model.window_of_layer(layer) for layer in range(model.num_layers)]
        written["use_sliding_window"] = model.sliding_window is not None
        written["sliding_window"] = model.sliding_window
        written["max_window_layers"] = windows.count(None)
        written["layer_types"] = [FULL if window is None else SLIDING for window in windows]
    return written


def _model_section(config: dict[str, Any], path: Path) -> dict[str, Any]:
    name = _family_of(config, path)
    family = CONFIGS[name]
    section: dict[str, Any] = {"family": name}
    problems = [
        f"{theirs} is missing"
        for theirs, absent in family.keys.values()
        if absent is REQUIRED and config.get(theirs) is None
    ]
    for ours, (theirs, absent) in family.keys.items():
        section[ours] = _number(ours, config.get(theirs, absent))
    problems += _read_activation(config, section)
    for key, accepted in family.settings.items():
        if config.get(key, accepted[0]) not in accepted:
            problems.append(f"{key} is {config[key]!r}, and this model computes {accepted[0]!r}")
    if config.get("quantization_config"):
        problems.append("quantization_config: the weights are quantized, and have to be float16, bfloat16 or float32")
    if name != "gpt2":
        problems += _read_rotary(config, section)
    if name == "qwen2" and not problems:
        problems += _read_window(config, section)
    if problems:
        raise CheckpointError(
            f"{path}: {'; '.join(problems)}. Use a plain {family.architectures[0]} checkpoint, in full precision"
        )
    return section


def _family_of(config: dict[str, Any], path: Path) -> str:
    declared = config.get("architectures") or []
    for name, family in CONFIGS.items():
        kind = config.get("model_type", name if set(declared) & set(family.architectures) else None)
        if kind == name and (not declared or set(declared) & set(family.architectures)):
            return name
    known = ", ".join(f"{name} ({family.architectures[0]})" for name, family in CONFIGS.items())
    raise CheckpointError(
        f"{path}: is of another architecture, model_type {config.get('model_type')!r} with architectures {declared!r}; "
        f"what can be read is {known}"
    )


def _read_activation(config: dict[str, Any], section: dict[str, Any]) -> list[str]:
    key, activations = CONFIGS[section["family"]].activations
    by_their_name = {name: ours for ours, names in activations.items() for name in names}
    value = config.get(key, next(iter(by_their_name)))
    if value not in by_their_name:
        return [f"{key} is {value!r}, and this model computes {', '.join(by_their_name)}"]
    section["activation"] = by_their_name[value]
    return []


def without_ntk(model: ModelConfig) -> ModelConfig:
    """The same function said without rope_scaling.type=ntk, for which transformers has no name: it is a rope_theta."""
    scaling = model.rope_scaling
    if scaling is None or scaling.type != "ntk":
        return model
    theta = ntk_theta(model.rope_theta, scaling.factor, model.head_dim)
    return model.model_copy(update={"rope_theta": theta, "rope_scaling": None})


def _read_rotary(config: dict[str, Any], section: dict[str, Any]) -> list[str]:
    """Fills in the rotary keys, from where transformers 4 or 5 writes them; returns what is wrong with them."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        return [f"rope_scaling is {scaling!r}, and has to be an object"]
    section["rope_theta"] = _number("rope_theta", scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    partial = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    problems = [] if partial in (None, 1) else [f"partial_rotary_factor is {partial!r}, and this model rotates all"]
    if kind == "default":
        return problems
    if kind not in SCALING_KEYS:
        known = ", ".join(SCALING_KEYS)
        return [*problems, f"rope_scaling is of type {kind!r}, and this model has {known}"]
    if kind == "yarn":
        if scaling.get("truncate") is False:
            return [*problems, "rope_scaling.truncate is False, and this model ends the ramp at whole pairs"]
        scaling = _complete_yarn(scaling, section["max_seq_len"])
    keys = SCALING_KEYS[kind]
    missing = [theirs for theirs in keys.values() if not isinstance(scaling.get(theirs), int | float)]
    if missing:
        return [*problems, f"rope_scaling has no number {' and '.join(missing)}"]
    section["rope_scaling"] = {"type": kind} | {
        ours: int(scaling[theirs]) if ours == "original_max_seq_len" else float(scaling[theirs])
        for ours, theirs in keys.items()
    }
    return problems


def _complete_yarn(scaling: dict[str, Any], max_seq_len: int) -> dict[str, Any]:
    """The parameters of YaRN with what may be left out, as transformers computes it."""
    given = {key: value for key, value in scaling.items() if value}  # null and 0 are as if left out
    plain = {"original_max_position_embeddings": max_seq_len, "beta_fast": 32.0, "beta_slow": 1.0}
    factor = given.get("factor")
    if "attention_factor" not in given and isinstance(factor, int | float):
        growth = 0.1 * math.log(max(1.0, factor))
        has_both = "mscale" in given and "mscale_all_dim" in given
        above, below = (float(given["mscale"]), float(given["mscale_all_dim"])) if has_both else (1.0, 0.0)
        plain["attention_factor"] = (above * growth + 1) / (below * growth + 1)
    return plain | given


def _read_window(config: dict[str, Any], section: dict[str, Any]) -> list[str]:
    """Fills in the sliding window of Qwen2 and the first layer that has it; returns what is wrong with them.

    The window counts only with ``use_sliding_window``. Which layers have it ``layer_types`` says; where that is
    absent, those from ``max_window_layers`` on.
    """
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window", False) else None
    if window is None:
        return []
    num_layers, first = section["num_layers"], config.get("max_window_layers", 28)
    kinds = config.get("layer_types")
    if kinds is not None:
        is_list = isinstance(kinds, list) and len(kinds) == num_layers
        if not is_list or not all(kind in (FULL, SLIDING) for kind in kinds):
            return [f"layer_types is {kinds!r}, and has to name {FULL} or {SLIDING} for each of {num_layers} layers"]
        first = kinds.count(FULL)
        if SLIDING in kinds[:first]:
            return [f"layer_types mixes {FULL} and {SLIDING}, and this model has all layers without a window first"]
    if not isinstance(first, int):
        return [f"max_window_layers is {first!r}, and has to be a number"]
    if first < num_layers:
        section |= {"sliding_window": window, "sliding_window_from": first}
    return []


def _scaling_to_hf(model: ModelConfig) -> dict[str, Any] | None:
    scaling = model.rope_scaling
    if scaling is None:
        return None
    return {"rope_type": scaling.type} | {
        theirs: getattr(scaling, ours) for ours, theirs in SCALING_KEYS[scaling.type].items()
    }


def _number(key: str, value: Any) -> Any:
    """JSON does not tell 10000 from 10000.0."""
    return float(value) if key in _FLOATS and type(value) is int else value
