"""What specgate refuses to trace, and that each refusal names the reason and the remedy in one sentence."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from torch import nn

from specgate.errors import UnknownArchitectureError
from specgate.moe.families import check_transformers, find_family, moe_layers, router_tensors


def test_nllb_is_refused_and_the_reason_is_still_true() -> None:
    config = tf.NllbMoeConfig(
        vocab_size=50, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_experts=8, expert_capacity=64,
        encoder_sparse_step=1, decoder_sparse_step=1,
    )  # fmt: skip
    with pytest.raises(UnknownArchitectureError, match="NLLB-MoE runs only experts 0 and 1") as caught:
        find_family(config)
    assert "Mixtral" in str(caught.value)
    assert str(caught.value).count("\n") == 0
    torch.manual_seed(0)
    model = tf.NllbMoeForConditionalGeneration(config).eval()
    ran: set[int] = set()
    for name, module in model.named_modules():
        if type(module).__name__ == "NllbMoeDenseActDense" and ".experts." in name:
            number = int(name.rpartition("_")[2])
            module.register_forward_pre_hook(lambda m, args, e=number: ran.add(e))
    ids = torch.randint(3, 50, (2, 20))
    with torch.no_grad():
        model(input_ids=ids, decoder_input_ids=ids)
    assert ran <= {0, 1}  # the day this fails, NLLB-MoE can have an adapter


def test_unknown_and_dense_architectures_are_named() -> None:
    with pytest.raises(UnknownArchitectureError, match=r"'phimoe' has no adapter.*DeepSeek-V3"):
        find_family(tf.PhimoeConfig())
    with pytest.raises(UnknownArchitectureError, match="'llama' has no experts"):
        find_family(tf.LlamaConfig())
    with pytest.raises(UnknownArchitectureError, match="'Linear' has no experts"):
        find_family(nn.Linear(1, 1))


def test_dense_variant_of_a_known_family_is_refused(tiny: SimpleNamespace) -> None:
    with pytest.raises(UnknownArchitectureError, match="This Qwen3-MoE model has no MoE layer"):
        moe_layers(tiny.host("qwen3_moe", mlp_only_layers=[0, 1, 2, 3]))


def test_mxfp4_experts_are_refused(tiny: SimpleNamespace) -> None:
    model = tiny.host("gpt_oss")
    model.model.layers[1].mlp.experts.__class__ = type("Mxfp4GptOssExperts", (nn.Module,), {})
    with pytest.raises(UnknownArchitectureError, match=r"layers.1.mlp.experts is MXFP4.*dequantize=True"):
        moe_layers(model)


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0", "5.18.2", "6.0.0", "5.18.0.dev0"])
def test_other_transformers_versions_are_refused(version: str) -> None:
    with pytest.raises(UnknownArchitectureError, match=rf"transformers {version}.*>=5.19,<6"):
        check_transformers(version)


@pytest.mark.parametrize("version", ["5.19.0", "5.23.0", "5.99.1"])
def test_versions_in_range_pass(version: str) -> None:
    check_transformers(version)


def test_offloaded_router_is_refused(tiny: SimpleNamespace) -> None:
    layer = moe_layers(tiny.host("olmoe"))[0]
    layer.router.to("meta")
    with pytest.raises(UnknownArchitectureError, match=r"router of model.layers.0.mlp is offloaded"):
        router_tensors(layer)
