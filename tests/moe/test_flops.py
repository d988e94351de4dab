"""A layer's cost from the configuration against operations counted while the real model runs.

Letters: B sequences, T tokens, L MoE layers, D hidden size, V token ids.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from specgate.errors import UnknownArchitectureError
from specgate.metrics.flops import count_flops
from specgate.moe.flops import layer_flops

B, T, V, D = 2, 12, 40, 32
SMALL: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 3},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_key_value_heads": 2,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    },
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    },
    "gpt_oss": {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 0,
        "q_lora_rank": 20,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 10,
        "n_group": 2,
        "topk_group": 1,
    },
}


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_decoder_families_against_the_counter(kind: str) -> None:
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **FAMILIES[kind]})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    ids = torch.randint(2, V, (B, T))
    counted = (
        count_flops(lambda: model(input_ids=ids, use_cache=False)) - 2 * B * T * D * V
    )  # but the LM head
    rotation = count_flops(
        lambda: model.model.rotary_emb(torch.zeros(B, T, D), torch.arange(T)[None].expand(B, T))
    )
    cost = layer_flops(config, keys=T)  # transformers multiplies masked pairs too
    assert cost.active == pytest.approx((counted - rotation) / (B * T * config.num_hidden_layers), rel=1e-6)
    assert cost.active == cost.attention + cost.router + cost.top_k * cost.expert + cost.shared


def test_switch_encoder_and_decoder_against_the_counter() -> None:
    config = transformers.SwitchTransformersConfig(
        vocab_size=V,
        d_model=D,
        d_kv=10,
        d_ff=24,
        num_layers=2,
        num_sparse_encoder_layers=2,
        num_decoder_layers=2,
        num_sparse_decoder_layers=2,
        num_heads=3,
        num_experts=4,
        expert_capacity=100,
    )
    config._attn_implementation = "eager"
    model: Any = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    ids = torch.randint(2, V, (B, T))
    counted = count_flops(lambda: model.encoder(input_ids=ids))
    assert layer_flops(config, T, "encoder").active == pytest.approx(counted / (B * T * 2), rel=1e-6)
    state = torch.randn(B, T, D)
    counted = count_flops(lambda: model.decoder(input_ids=ids, encoder_hidden_states=state, use_cache=False))
    encoded = 2 * 2 * D * 30  # keys and values of the encoder's tokens, once per text
    assert layer_flops(config, T, "decoder").active == pytest.approx(
        counted / (B * T * 2) - encoded, rel=1e-6
    )


def test_sliding_windows_bound_the_keys_of_their_layers() -> None:
    config = transformers.AutoConfig.for_model("gpt_oss", num_hidden_layers=2, sliding_window=100)
    near, far = layer_flops(config, 100).mixing, layer_flops(config, 300).mixing
    assert far == pytest.approx(near * (100 + 300) / 200)


def test_gpt_oss_20b_by_hand() -> None:
    """From its published sizes: 64 heads of 64 over 8 key heads, 4 of 32 experts of 2880 on 2880."""
    config = transformers.AutoConfig.for_model("gpt_oss", num_hidden_layers=24, num_local_experts=32)
    cost = layer_flops(config, 128)
    assert cost.projections == 2 * 2880 * 64 * (64 + 8 + 8 + 64)
    assert cost.mixing == 2 * 2 * 64 * 64 * 128
    assert cost.expert == 2 * 3 * 2880 * 2880
    assert cost.router == 2 * 2880 * 32
    assert cost.active == pytest.approx(2.54e8, rel=0.01)


def test_dense_models_have_no_moe_layer() -> None:
    with pytest.raises(UnknownArchitectureError, match="no experts"):
        layer_flops(transformers.AutoConfig.for_model("llama"), 128)
