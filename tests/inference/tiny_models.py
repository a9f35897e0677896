"""Hugging Face folders of tiny models with a tokenizer, and texts that it knows."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY, MAX_SEQ_LEN, END, END_ID = 320, 64, "<|endoftext|>", 0
VERSE = "".join(f"the {i % 7} cats of number {i} sit on {i % 5} mats; " for i in range(40))
OTHER = "".join(f"{i} dogs, {i * i} bones — and a café; " for i in range(20))


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE of 300 tokens; the first one ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([VERSE], trainer=trainer)
    return tokenizer


def transformers_config(family: str) -> Any:
    import transformers

    common = {"vocab_size": VOCABULARY, "bos_token_id": END_ID, "eos_token_id": END_ID}
    if family == "gpt2":
        return transformers.GPT2Config(
            **common, n_embd=32, n_layer=4, n_head=4, n_positions=MAX_SEQ_LEN,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    return transformers.LlamaConfig(
        **common, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=MAX_SEQ_LEN,
    )  # fmt: skip


def make_folder(folder: Path, family: str = "llama", *, with_tokenizer: bool = True) -> Path:
    """A folder as transformers writes it. The weights are large enough for logits that differ."""
    import transformers

    torch.manual_seed(len(family))
    model = transformers.AutoModelForCausalLM.from_config(transformers_config(family), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0 if parameter.ndim > 1 else 1.0)
    model.save_pretrained(folder)
    if with_tokenizer:
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), bos_token=END, eos_token=END)
        fast.save_pretrained(folder)
    return folder


@functools.cache
def transformers_model(folder: Path, dtype: torch.dtype) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


def token_losses(folder: Path, ids: list[int], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Of a stream of at most max_seq_len + 1 tokens: the loss of each but the first, by transformers."""
    with torch.no_grad():
        logits = transformers_model(folder, dtype)(torch.tensor([ids[:-1]])).logits[0]
    return -logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
