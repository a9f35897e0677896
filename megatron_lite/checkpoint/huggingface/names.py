"""What Hugging Face calls our parameters: one table per family, read by the import and by the export."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from megatron_lite.checkpoint.shard_reader import Part, PartTable
from megatron_lite.config.schema import ModelConfig
from megatron_lite.models.families import parameter_table
from megatron_lite.models.identity import ParameterSpec


@dataclass(frozen=True)
class FamilyNames:
    """Names of a family's tensors in the files of its ``...ForCausalLM`` model.

    prefix: of every tensor but the head; files that were saved from the model without its head leave it out.
    tensors: our name -> the tensors whose rows, one after another, make up the parameter; ``*`` is the layer.
    transposed: endings of the matrices that are stored ``[in, out]``.
    buffers: endings of tensors in older files that hold no weights.
    """

    prefix: str
    tensors: dict[str, tuple[str, ...]]
    transposed: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()


HEAD = "lm_head.weight"

_LLAMA = FamilyNames(
    prefix="model.",
    tensors={
        "embedding.tokens.weight": ("embed_tokens.weight",),
        "layers.*.attention_norm.weight": ("layers.*.input_layernorm.weight",),
        "layers.*.attention.qkv.weight": (
            "layers.*.self_attn.q_proj.weight",
            "layers.*.self_attn.k_proj.weight",
            "layers.*.self_attn.v_proj.weight",
        ),
        "layers.*.attention.out.weight": ("layers.*.self_attn.o_proj.weight",),
        "layers.*.mlp_norm.weight": ("layers.*.post_attention_layernorm.weight",),
        "layers.*.mlp.up.weight": ("layers.*.mlp.gate_proj.weight", "layers.*.mlp.up_proj.weight"),
        "layers.*.mlp.down.weight": ("layers.*.mlp.down_proj.weight",),
        "final_norm.weight": ("norm.weight",),
        "head.weight": (HEAD,),
    },
    buffers=(".rotary_emb.inv_freq",),
)
_QKV_BIAS = tuple(f"layers.*.self_attn.{part}_proj.bias" for part in "qkv")

NAMES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": replace(_LLAMA, tensors=_LLAMA.tensors | {"layers.*.attention.qkv.bias": _QKV_BIAS}),
    "gpt2": FamilyNames(
        prefix="transformer.",
        tensors={
            "embedding.tokens.weight": ("wte.weight",),
            "embedding.positions.weight": ("wpe.weight",),
            "layers.*.attention_norm.weight": ("h.*.ln_1.weight",),
            "layers.*.attention_norm.bias": ("h.*.ln_1.bias",),
            "layers.*.attention.qkv.weight": ("h.*.attn.c_attn.weight",),
            "layers.*.attention.qkv.bias": ("h.*.attn.c_attn.bias",),
            "layers.*.attention.out.weight": ("h.*.attn.c_proj.weight",),
            "layers.*.attention.out.bias": ("h.*.attn.c_proj.bias",),
            "layers.*.mlp_norm.weight": ("h.*.ln_2.weight",),
            "layers.*.mlp_norm.bias": ("h.*.ln_2.bias",),
            "layers.*.mlp.up.weight": ("h.*.mlp.c_fc.weight",),
            "layers.*.mlp.up.bias": ("h.*.mlp.c_fc.bias",),
            "layers.*.mlp.down.weight": ("h.*.mlp.c_proj.weight",),
            "layers.*.mlp.down.bias": ("h.*.mlp.c_proj.bias",),
            "final_norm.weight": ("ln_f.weight",),
            "final_norm.bias": ("ln_f.bias",),
            "head.weight": (HEAD,),
        },
        transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
        buffers=(".attn.bias", ".attn.masked_bias"),
    ),
}


def has_prefix(family: str, names: Iterable[str]) -> bool:
    """Whether files with these tensors carry the family's prefix."""
    names = list(names)
    return not names or any(name.startswith(NAMES[family].prefix) for name in names)


def huggingface_parts(config: ModelConfig, *, with_prefix: bool = True) -> PartTable:
    """Every parameter of the model (a tied one aside) with the tensors that Hugging Face stores it in."""
    family = NAMES[config.family]
    return {
        spec.name: _parts(family, spec, family.prefix if with_prefix else "")
        for spec in parameter_table(config)
        if spec.tied_to is None
    }


def unknown_names(config: ModelConfig, parts: PartTable, names: Iterable[str]) -> list[str]:
    """Tensors that the model has no place for; buffers, and a stored copy of a tied head, are none."""
    known = {part.name for own in parts.values() for part in own}
    if config.tie_embeddings:
        known.add(HEAD)
    return [name for name in names if name not in known and not name.endswith(NAMES[config.family].buffers)]


def _parts(family: FamilyNames, spec: ParameterSpec, prefix: str) -> tuple[Part, ...]:
    words = spec.name.split(".")
    layer = words[1] if words[0] == "layers" else ""
    names = family.tensors[".".join([words[0], "*", *words[2:]]) if layer else spec.name]
    whole = spec.shape[spec.shard_dim or 0]
    sizes = [block.size for block in spec.blocks] if len(names) > 1 else [whole]
    parts, start = [], 0
    for name, size in zip(names, sizes, strict=True):
        full = name if name == HEAD else prefix + name.replace("*", layer)
        parts.append(Part(full, start, start + size, is_transposed=name.endswith(family.transposed)))
        start += size
    assert start == whole, f"{spec.name}: {names} hold {start} of {whole} rows"
    return tuple(parts)
