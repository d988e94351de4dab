"""Loading hosts: local directories, and one sentence for everything that can be wrong with a name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace as Tiny
from typing import Any

import pytest
import safetensors.torch
import torch

from specgate.errors import CheckpointError, ConfigError, UnknownArchitectureError
from specgate.moe.hosts import bundled_hosts, load_host
from tests.moe.tiny_hosts import Paths


@pytest.mark.parametrize("name", ["olmoe", "switch_transformers"])
def test_a_directory_loads_as_saved(name: str, saved_hosts: Paths, tiny: Tiny) -> None:
    host = load_host(str(saved_hosts[name]), device="cpu")
    assert host.family.name == name
    assert host.model_id == name
    assert host.revision.startswith("sha256:")
    assert not host.model.training
    assert host.model.dtype == torch.float32
    assert host.device == torch.device("cpu")
    original = tiny.host(name).state_dict()
    for key, value in host.model.state_dict().items():
        assert torch.equal(value, original[key]), key
    assert host.tokenizer("the fox")["input_ids"]
    assert load_host(str(saved_hosts[name]), dtype="bfloat16", device="cpu").model.dtype == torch.bfloat16


def test_revision_follows_weights(saved_hosts: Paths, tiny: Tiny, tmp_path: Path) -> None:
    copy = shutil.copytree(saved_hosts["olmoe"], tmp_path / "olmoe")
    before = load_host(str(copy), device="cpu").revision
    assert before == load_host(str(saved_hosts["olmoe"]), device="cpu").revision
    tiny.host("olmoe", seed=1).save_pretrained(copy)
    assert load_host(str(copy), device="cpu").revision != before


def test_bundled_names_are_directories_with_a_configuration() -> None:
    for name in bundled_hosts():
        assert load_host(name, device="cpu").model_id == name


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("", "moe.path is empty"),
        ("/no/such/model", "Directory /no/such/model does not exist"),
        ("./missing", "Directory ./missing does not exist"),
        ("swich_ref", "No model is called 'swich_ref'"),
        ("somebody/no-such-model", "Cannot load the model 'somebody/no-such-model'.*(network|name)"),
    ],
)
def test_a_wrong_name_is_named(name: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load_host(name, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config.json"):
        load_host(str(tmp_path), device="cpu")


def test_pickled_weights_are_not_loaded(saved_hosts: Paths, tmp_path: Path) -> None:
    copy = shutil.copytree(saved_hosts["olmoe"], tmp_path / "olmoe")
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        load_host(str(copy), device="cpu")


def test_truncated_weights_are_one_sentence(saved_hosts: Paths, tmp_path: Path) -> None:
    copy = shutil.copytree(saved_hosts["olmoe"], tmp_path / "olmoe")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"Cannot load the model .* are damaged"):
        load_host(str(copy), device="cpu")


def test_an_unknown_architecture_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnknownArchitectureError, match="'llama' has no experts"):
        load_host(str(tmp_path), device="cpu")


def test_wrong_dtype_and_device(saved_hosts: Paths) -> None:
    path = str(saved_hosts["olmoe"])
    with pytest.raises(ConfigError, match="dtype='fp8' is not known"):
        load_host(path, dtype="fp8")
    with pytest.raises(ConfigError, match="device='gpu0' is not a device"):
        load_host(path, device="gpu0")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch sees no GPU"):
            load_host(path, device="cuda")


def test_missing_weights_are_not_made_up(saved_hosts: Paths, tmp_path: Path) -> None:
    copy = shutil.copytree(saved_hosts["olmoe"], tmp_path / "olmoe")
    weights = safetensors.torch.load_file(copy / "model.safetensors")
    gone = next(key for key in sorted(weights) if ".gate." in key)
    del weights[gone]
    safetensors.torch.save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lack 1 tensors.*would be random"):
        load_host(str(copy), device="cpu")


def test_mxfp4_checkpoints_are_dequantised(
    saved_hosts: Paths, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantised GPT-OSS goes past its modules; the loader asks for plain weights without being told."""
    shutil.copytree(saved_hosts["olmoe"], tmp_path, dirs_exist_ok=True)
    config = tiny.configs["gpt_oss"]().to_dict() | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked: dict[str, Any] = {}

    def load(path: Any, **kwargs: Any) -> Any:
        asked.update(kwargs)
        return tiny.host("gpt_oss"), {"missing_keys": set()}

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    load_host(str(tmp_path), device="cpu")
    assert asked["quantization_config"].dequantize is True
    assert asked["use_safetensors"] is True
