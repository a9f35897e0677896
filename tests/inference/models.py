"""Tiny random models as transformers writes them, and what transformers generates from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY, WINDOW = 160, 6
FAMILIES = ("llama", "gpt2", "mistral", "qwen2")
# Of unequal lengths, the longest longer than the window.
PROMPTS = [[3, 14, 15, 92, 65], [35, 89, 79, 32, 38, 46, 26, 43, 38], [27, 18, 28]]


def transformers_config(family: str) -> Any:
    import transformers

    if family == "gpt2":
        return transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=64, n_layer=4, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
        )
    common = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    if family == "mistral":
        return transformers.MistralConfig(**common, sliding_window=WINDOW)
    if family == "qwen2":
        return transformers.Qwen2Config(**common)
    return transformers.LlamaConfig(**common)


def write_model(family: str, folder: Path) -> Path:
    """A checkpoint with random norms and biases, and weights wide enough that no two tokens are equally likely."""
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers_config(family), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm_weight = parameter.ndim == 1 and name.endswith("weight")
            parameter.normal_(mean=float(is_norm_weight), std=0.2 if family == "gpt2" else 0.15)
    model.save_pretrained(folder)
    return folder


def load_transformers(folder: Path) -> Any:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.generation_config.eos_token_id = None
    model.generation_config.bos_token_id = None
    return model


def transformers_tokens(model: Any, prompt: list[int], num_tokens: int, **options: Any) -> list[int]:
    """The new tokens, greedy unless told otherwise, up to the first end."""
    model.generation_config.eos_token_id = options.pop("end_ids", None)
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False, pad_token_id=VOCABULARY - 1, **options
    )
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def smallest_margin(model: Any, prompt: list[int], continuation: list[int]) -> float:
    """The least difference of the two highest logits over the continuation: what rounding must not bridge."""
    logits = model(torch.tensor([prompt + continuation])).logits[0, len(prompt) - 1 : -1]
    best = logits.topk(2, dim=-1).values
    return float((best[:, 0] - best[:, 1]).min())
