"""Tiny random hosts of every supported family, and the small collections that tests make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from specgate.moe.batches import Settings
from specgate.moe.hosts import Host
from specgate.moe.text import TextDocument

Hosts = dict[str, Host]
Texts = list[TextDocument]
Paths = dict[str, Path]

QUIET = Console(quiet=True)
PREFILL = Settings(sequences=30, length=16, batch_size=4, shard_sequences=8, seed=5)
DECODE = replace(PREFILL, phase="decode", prompt_length=8, length=10, hidden="int8")
KINDS = {
    "olmoe prefill": ("olmoe", PREFILL),
    "olmoe decode": ("olmoe", DECODE),
    "switch prefill": ("switch_transformers", replace(PREFILL, hidden="int8")),
    "switch decode": ("switch_transformers", replace(DECODE, hidden="none")),
}

VOCAB = 300
TEXT = "the quick brown fox jumps over a lazy dog while seven wise owls count every silver moon rising"
WORDS = TEXT.split()
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": 1,
}  # fmt: skip
MLA = {
    "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 8, "n_shared_experts": 1,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "first_k_dense_replace": 1, "num_experts_per_tok": 3,
}  # fmt: skip


def _mixtral(**more: Any) -> Any:
    return tf.MixtralConfig(**COMMON | {"num_hidden_layers": 2, "num_local_experts": 8} | more)


def _olmoe(**more: Any) -> Any:
    return tf.OlmoeConfig(
        **COMMON | {"num_hidden_layers": 3, "num_experts": 8, "num_experts_per_tok": 2} | more
    )


def _qwen2(**more: Any) -> Any:
    sizes = {"num_hidden_layers": 3, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    extra = {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 1, "mlp_only_layers": [1]}
    return tf.Qwen2MoeConfig(**COMMON | sizes | extra | more)


def _qwen3(**more: Any) -> Any:
    sizes = {"num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return tf.Qwen3MoeConfig(**COMMON | sizes | {"head_dim": 8, "decoder_sparse_step": 2} | more)


def _deepseek_v2(**more: Any) -> Any:
    groups = {
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.0,
    }
    return tf.DeepseekV2Config(**COMMON | MLA | {"num_hidden_layers": 3} | groups | more)


def _deepseek_v3(**more: Any) -> Any:
    groups = {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
    return tf.DeepseekV3Config(**COMMON | MLA | {"num_hidden_layers": 3} | groups | more)


def _gpt_oss(**more: Any) -> Any:
    sizes = {"num_hidden_layers": 2, "num_local_experts": 8, "num_experts_per_tok": 4, "head_dim": 8}
    return tf.GptOssConfig(**COMMON | sizes | more)


def _switch(**more: Any) -> Any:
    return tf.SwitchTransformersConfig(
        **{
            "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 24, "num_heads": 4, "num_layers": 4,
            "num_decoder_layers": 4, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 4,
            "num_experts": 8, "expert_capacity": 5, "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 1,
            "decoder_start_token_id": 0,
        }
        | more
    )  # fmt: skip


CONFIGS: dict[str, Callable[..., Any]] = {
    "switch_transformers": _switch, "mixtral": _mixtral, "olmoe": _olmoe, "qwen2_moe": _qwen2,
    "qwen3_moe": _qwen3, "deepseek_v2": _deepseek_v2, "deepseek_v3": _deepseek_v3, "gpt_oss": _gpt_oss,
}  # fmt: skip


def make_host(family: str, seed: int = 0, **more: Any) -> Any:
    """A random model of a family. Routers are drawn wide, so that decisions spread and near-ties are rare."""
    torch.manual_seed(seed)
    config = CONFIGS[family](**more)
    auto = tf.AutoModelForSeq2SeqLM if family == "switch_transformers" else tf.AutoModelForCausalLM
    model = auto.from_config(config)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        wide = (".gate.weight", ".router.weight", ".router.bias", ".classifier.weight")
        if name.endswith(wide) or name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(tensor.data, std=0.5)
        elif "norm" in name:
            torch.nn.init.uniform_(tensor.data, 0.5, 1.5)
    model.generation_config.eos_token_id = config.eos_token_id
    return model.eval().requires_grad_(False)


def make_tokenizer() -> Any:
    """A byte-level BPE that knows a handful of words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def make_text(folder: Path, domains: int = 2, documents: int = 12, words: int = 60) -> list[str]:
    """Text files of a few domains; the words differ from document to document."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for d in range(domains):
        texts = []
        for i in range(documents):
            generator = torch.Generator().manual_seed(1000 * d + i)
            picks = torch.randint(len(WORDS), (words,), generator=generator).tolist()
            texts.append(" ".join(WORDS[p] for p in picks))
        path = folder / f"domain{d}.txt"
        path.write_text("\n\f\n".join(texts))
        paths.append(str(path))
    return paths
