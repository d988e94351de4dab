"""Tiny models with random weights, saved as plain transformers directories, and text that lies about nothing.

Letters: L MoE layers, E experts, K experts per token, D hidden size.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

SPECIALS = ("<pad>", "</s>", "<unk>")


def save_tokenizer(folder: Path) -> int:
    """Writes a byte-level tokenizer (one id per byte) into ``folder``; returns the size of its vocabulary."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return len(vocabulary)


def save_olmoe(folder: Path) -> Path:
    """An OLMoE with random weights: L 4, E 8, K 2, D 32."""
    vocabulary = save_tokenizer(folder)
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.2,
    )
    OlmoeForCausalLM(config).save_pretrained(folder)
    return folder


def save_switch(folder: Path) -> Path:
    """A Switch Transformer of random weights: L 3 per stack, E 4, K 1, D 32; its capacity drops tokens."""
    vocabulary = save_tokenizer(folder)
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=vocabulary,
        d_model=32,
        d_kv=16,
        d_ff=32,
        num_layers=3,
        num_sparse_encoder_layers=3,
        num_decoder_layers=3,
        num_sparse_decoder_layers=3,
        num_heads=2,
        num_experts=4,
        expert_capacity=12,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        initializer_factor=1.0,
    )
    SwitchTransformersForConditionalGeneration(config).save_pretrained(folder)
    return folder


def documents() -> list[tuple[str, str]]:
    """A few dozen small texts of two domains: (domain, text). Different enough that each split gets some."""
    numbers = [
        ("numbers", "\n".join(f"{i} times {j} is {i * j}." for j in range(1, 24))) for i in range(1, 40)
    ]
    names = ("router", "expert", "layer", "token", "forecast", "cache", "shard", "trace")
    code = [
        ("code", f"def {name}_{i}(x):\n" + "\n".join(f"    x += {i * k} * x - {k}" for k in range(24)))
        for i in range(1, 6)
        for name in names
    ]
    return numbers + code


def save_text(folder: Path) -> Path:
    """The documents as one text file per domain, separated by form feeds."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain in ("numbers", "code"):
        texts = [text for d, text in documents() if d == domain]
        (folder / f"{domain}.txt").write_text("\n\f\n".join(texts))
    return folder
