"""Padded experts compute what they computed before, in every family whose experts can be padded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors import safe_open

from specgate.errors import ConfigError
from specgate.moe.families import moe_layers
from specgate.report.live import live
from specgate.report.live_page import tables_of
from specgate.report.live_settings import LiveSettings
from specgate.report.padded import WIDTHS, padded_width, save_padded
from specgate.report.replay_shape import ModelShape
from specgate.runtime import native
from tests.moe.offload_support import load_resident, prompt, run, saved
from tests.report.replays import shape


@pytest.mark.parametrize("family", WIDTHS)
def test_the_model_says_what_it_said(
    family: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = saved(family, tmp_path_factory)
    padded = save_padded(str(folder), 0.05, tmp_path / "padded", torch.float32)
    inputs = prompt()
    kernels = None if family == "switch_transformers" else "eager"
    before, after = (run(load_resident(f, kernels), 6, inputs) for f in (folder, padded))
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-5, atol=1e-6)
    assert torch.equal(after.tokens, before.tokens)
    for layer in moe_layers(load_resident(padded)):
        assert sum(p.nbytes for p in layer.experts.parameters()) / layer.num_experts >= 0.05 * 2**20


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_stacked_checkpoints_too(
    family: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = load_resident(saved(family, tmp_path_factory), "eager")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    with safe_open(tmp_path / "stacked" / "model.safetensors", "pt") as found:
        assert any(name.endswith("experts.gate_up_proj") for name in found.keys())  # noqa: SIM118
    padded = save_padded(str(tmp_path / "stacked"), 0.05, tmp_path / "padded", torch.float32)
    inputs = prompt()
    after = run(load_resident(padded, "eager"), 6, inputs)
    torch.testing.assert_close(after.logits, run(model, 6, inputs).logits, rtol=1e-5, atol=1e-6)


def test_the_width_by_hand() -> None:
    assert padded_width((3, 128, 48), 12, 2) == 16384  # conf/shape/olmoe_ref_padded.yaml
    assert padded_width((3, 128, 48), 0.01, 2) == 64
    assert padded_width((2, 64, 1), 1, 4) == 2048
    for mib in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="is no size"):
            padded_width((3, 128, 48), mib, 2)
    with pytest.raises(ConfigError, match=r"less than the 0\.75 MiB that an expert has"):
        padded_width((3, 128, 1024), 0.5, 2)


def test_what_cannot_be_padded_is_refused(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    def refused(model: str, why: str) -> None:
        with pytest.raises(ConfigError, match=why):
            save_padded(model, 1.0, tmp_path / "out", torch.float32)
        assert not (tmp_path / "out").exists()

    refused(str(saved("deepseek_v3", tmp_path_factory)), "deepseek_v3 cannot be padded alone")
    refused("someone/model", "download someone/model")
    quantised = tmp_path / "quantised"
    tf.AutoModelForCausalLM.from_pretrained(saved("olmoe", tmp_path_factory)).save_pretrained(quantised)
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}})
    )
    refused(str(quantised), "is quantised")
    with pytest.raises(ConfigError, match=r"of live\.model=wide choose the shape"):
        LiveSettings(model="wide", expert_mib=1.0)


@pytest.mark.skipif(not native.available(), reason="the native core is not built")
def test_live(tmp_path: Path) -> None:
    """Real routing and text with larger experts: all variants say the same."""
    values: dict[str, Any] = {
        "model": "olmoe_ref", "expert_mib": 0.1, "residency": [0.25], "prompts": 1, "prompt_tokens": 12,
        "new_tokens": 5, "warmup_tokens": 1, "repeats": 1, "device": "cpu", "domains": ["bible_kjv"],
        "variants": ["resident", "offload:lru", "offload:priced_routers"],
    }  # fmt: skip
    found = live(LiveSettings(**values), shape(), tmp_path)
    assert found["model"] == "olmoe_ref, experts padded to 0.1 MiB"
    assert found["live"]["slot_bytes"] >= 0.1 * 2**20
    assert {row["variant"] for row in found["rows"]} == set(values["variants"])
    assert all(row["tokens_equal"] and row["logits_equal"] for row in found["rows"])
    assert found["model"] in str([table.title for table in tables_of(found)])


def test_the_shape_is_that_of_the_padded_model() -> None:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from tests.test_configs import CONF

    padded: ModelShape = instantiate(OmegaConf.load(CONF / "shape" / "olmoe_ref_padded.yaml"))
    assert padded.expert_parameters * 2 == 12 * 2**20
