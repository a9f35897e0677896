"""Between our model section and the config.json of Hugging Face, in both directions from one table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megatron_lite.checkpoint.tensor_files import CheckpointError, read_json
from megatron_lite.config.problems import ConfigError, Problem, override
from megatron_lite.config.schema import ModelConfig

CONFIG_FILE = "config.json"
REQUIRED = object()


@dataclass(frozen=True)
class FamilyConfig:
    """How a family's config.json reads.

    keys: our key -> (theirs, the value that its absence means to transformers, or REQUIRED).
    settings: their key -> the values with which the model computes what ours does; the first is what absence means,
        and what is written.
    written: keys that are written and not read.
    """

    architectures: tuple[str, ...]
    keys: dict[str, tuple[str, Any]]
    settings: dict[str, tuple[Any, ...]]
    written: dict[str, Any]


CONFIGS = {
    "llama": FamilyConfig(
        architectures=("LlamaForCausalLM", "LlamaModel"),
        keys={
            "vocab_size": ("vocab_size", REQUIRED),
            "hidden_size": ("hidden_size", REQUIRED),
            "num_layers": ("num_hidden_layers", REQUIRED),
            "num_heads": ("num_attention_heads", REQUIRED),
            "num_kv_heads": ("num_key_value_heads", None),
            "head_dim": ("head_dim", None),
            "ffn_hidden_size": ("intermediate_size", REQUIRED),
            "max_seq_len": ("max_position_embeddings", 2048),
            "norm_eps": ("rms_norm_eps", 1e-6),
            "tie_embeddings": ("tie_word_embeddings", False),
            "init_std": ("initializer_range", 0.02),
        },
        settings={"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,)},
        written={"attention_dropout": 0.0},
    ),
    "gpt2": FamilyConfig(
        architectures=("GPT2LMHeadModel", "GPT2Model"),
        keys={
            "vocab_size": ("vocab_size", REQUIRED),
            "hidden_size": ("n_embd", REQUIRED),
            "num_layers": ("n_layer", REQUIRED),
            "num_heads": ("n_head", REQUIRED),
            "ffn_hidden_size": ("n_inner", None),
            "max_seq_len": ("n_positions", 1024),
            "norm_eps": ("layer_norm_epsilon", 1e-5),
            "tie_embeddings": ("tie_word_embeddings", True),
            "init_std": ("initializer_range", 0.02),
        },
        settings={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        written={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
}

# Ours -> theirs, inside rope_scaling.
_SCALING_KEYS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_seq_len": "original_max_position_embeddings",
    },
}
_FLOATS = ("norm_eps", "init_std", "rope_theta")
# Neither changes what the weights compute: rotary models take any length, and initial weights are replaced.
_FREE = {"llama": {"init_std", "max_seq_len"}, "gpt2": {"init_std", "rope_theta", "rope_scaling"}}


def config_from_hf(folder: str | Path) -> dict[str, Any]:
    """The model section that describes a Hugging Face checkpoint: every key of ``ModelConfig`` with a plain value.

    Raises CheckpointError, with everything that stands in the way, for a folder without a readable config.json, of
    another architecture, or with a setting that our model does not compute.
    """
    return read_model(folder).model_dump()


def check_matches(folder: str | Path, model: ModelConfig) -> None:
    """Raises ConfigError, with every difference, if the checkpoint in ``folder`` is not of the model ``model``."""
    found = read_model(folder)
    differing = _differing(model, found)
    problems = [_difference(key, getattr(model, key), getattr(found, key)) for key in differing]
    problems += [_no_longer_derived(key, getattr(found, key)) for key in _moved_by_fixes(model, found, differing)]
    if problems:
        raise ConfigError(problems, f"the model section for the checkpoint {folder}")


def read_model(folder: str | Path) -> ModelConfig:
    """`config_from_hf` as a ``ModelConfig``."""
    path = Path(folder) / CONFIG_FILE
    try:
        return ModelConfig.model_validate(_model_section(read_json(path), path))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors())
        raise CheckpointError(f"{path}: is not a possible model: {wrong}") from error


def config_to_hf(model: ModelConfig, dtype: torch.dtype, eos_token_id: int | None) -> dict[str, Any]:
    """The config.json for ``model``, which transformers 4 and 5 read: version 5 has moved the rotary keys into
    ``rope_parameters``, and both places are filled."""
    family = CONFIGS[model.family]
    written: dict[str, Any] = {
        "architectures": [family.architectures[0]],
        "model_type": model.family,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
        "use_cache": True,
        **{theirs: getattr(model, ours) for ours, (theirs, _) in family.keys.items()},
        **{key: values[0] for key, values in family.settings.items()},
        **family.written,
    }
    if model.family == "llama":
        scaling = _scaling_to_hf(model)
        written["rope_theta"] = model.rope_theta
        written["rope_scaling"] = scaling
        written["rope_parameters"] = {"rope_theta": model.rope_theta, **(scaling or {"rope_type": "default"})}
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
        value = config.get(theirs)
        section[ours] = _number(ours, absent if value is None else value)
    for key, accepted in family.settings.items():
        if config.get(key, accepted[0]) not in accepted:
            problems.append(f"{key} is {config[key]!r}, and this model computes {accepted[0]!r}")
    if config.get("quantization_config"):
        problems.append("quantization_config: the weights are quantized, and have to be float16, bfloat16 or float32")
    if name == "llama":
        problems += _read_rotary(config, section)
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
    raise CheckpointError(
        f"{path}: is of another architecture, model_type {config.get('model_type')!r} with architectures {declared!r}; "
        "what can be read is llama (LlamaForCausalLM) and gpt2 (GPT2LMHeadModel)"
    )


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
    if kind not in _SCALING_KEYS:
        known = " and ".join(_SCALING_KEYS)
        return [*problems, f"rope_scaling is of type {kind!r}, and this model has {known}"]
    keys = _SCALING_KEYS[kind]
    missing = [theirs for theirs in keys.values() if not isinstance(scaling.get(theirs), int | float)]
    if missing:
        return [*problems, f"rope_scaling has no number {' and '.join(missing)}"]
    section["rope_scaling"] = {"type": kind} | {
        ours: int(scaling[theirs]) if ours == "original_max_seq_len" else float(scaling[theirs])
        for ours, theirs in keys.items()
    }
    return problems


def _scaling_to_hf(model: ModelConfig) -> dict[str, Any] | None:
    scaling = model.rope_scaling
    if scaling is None:
        return None
    return {"rope_type": scaling.type} | {
        theirs: getattr(scaling, ours) for ours, theirs in _SCALING_KEYS[scaling.type].items()
    }


def _number(key: str, value: Any) -> Any:
    """JSON does not tell 10000 from 10000.0."""
    return float(value) if key in _FLOATS and type(value) is int else value


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-12)
    if hasattr(ours, "type") and hasattr(theirs, "type") and ours.type == theirs.type:
        return all(getattr(ours, key) == getattr(theirs, key) for key in _SCALING_KEYS[ours.type])
    return bool(ours == theirs)


def _differing(model: ModelConfig, found: ModelConfig) -> list[str]:
    keys = ["family"] if model.family != found.family else list(ModelConfig.model_fields)
    return [
        key for key in keys if key not in _FREE[found.family] and not _equal(getattr(model, key), getattr(found, key))
    ]


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
    is_choice = key in ("norm_eps", "rope_theta", "rope_scaling")
    return Problem(
        f"model.{key}",
        plain[0],
        f"is not what the checkpoint has, {plain[1]!r}",
        f"or change it in the checkpoint's {CONFIG_FILE}, if another function is meant" if is_choice else "",
        ((override(f"model.{key}", plain[1]),),),
    )
