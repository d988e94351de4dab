"""Reading experts where they are: every family bit for bit, and every way in which files can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specgate.errors import CheckpointError, ConfigError, SpecgateError, UnknownArchitectureError
from specgate.moe.expert_tensors import FORMS, piece_shapes, skeleton
from specgate.moe.families import FAMILIES as TABLE
from specgate.moe.hosts import load_host
from specgate.runtime.layout import DTYPES
from specgate.runtime.source import ExpertSource
from tests.moe.tiny_hosts import make_tokenizer
from tests.runtime.checkpoints import FAMILIES, experts_of, loaded, rewrite_header, save

SHARDED = {"max_shard_size": "40KB"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OLMoE in one file."""
    return save("olmoe", tmp_path_factory.mktemp("whole"))


@pytest.fixture
def olmoe(whole: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "olmoe"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save("olmoe", tmp_path / "sharded", **SHARDED)


def same(source: ExpertSource, model: Any) -> None:
    """Every block of the source against the tensors of the loaded model."""
    experts = experts_of(model)
    assert len(source.blocks) == len(experts) == source.layers * source.experts
    for b, expected in enumerate(experts):
        got = source.tensors(b)
        assert set(got) == set(expected)
        for name, tensor in expected.items():
            assert got[name].dtype == tensor.dtype
            assert torch.equal(got[name], tensor), (b, name)


def test_the_table_has_every_family() -> None:
    assert set(FORMS) == set(TABLE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "more", [{}, SHARDED, {"save_original_format": False}], ids=["one", "shards", "memory"]
)
def test_every_family_bit_for_bit(family: str, more: dict[str, Any], tmp_path: Path) -> None:
    folder = save(family, tmp_path, **more)
    source = ExpertSource.open(folder)
    assert source.family == family
    assert source.layout.is_copy
    same(source, loaded(folder, torch.bfloat16))


@pytest.mark.parametrize("stored", list(DTYPES))
@pytest.mark.parametrize("slot", list(DTYPES))
def test_a_cast_is_transformers_cast(stored: str, slot: str, tmp_path: Path) -> None:
    for family in ("gpt_oss", "switch_transformers"):
        folder = save(family, tmp_path / family, DTYPES[stored])
        source = ExpertSource.open(folder, slot)
        assert source.layout.is_copy == (stored == slot)
        same(source, loaded(folder, DTYPES[slot]))


@pytest.mark.parametrize("name", ["olmoe_ref", "switch_ref"])
def test_the_bundled_models(name: str) -> None:
    host = load_host(name, dtype="bfloat16")
    source = ExpertSource.open(name)
    assert (source.model_id, source.revision, source.family) == (
        host.model_id, host.revision, host.family.name
    )  # fmt: skip
    same(source, host.model)


def test_numbers_of_blocks(whole: Path) -> None:
    source = ExpertSource.open(whole)
    assert (source.layers, source.experts) == (3, 8)
    assert [(b.layer, b.expert) for b in source.blocks] == [divmod(i, 8) for i in range(24)]
    assert source.block_id(2, 5) == 21
    with pytest.raises(
        ConfigError, match=r"Layer 3, expert 0 does not exist; .* has 3 MoE layers of 8 experts"
    ):
        source.block_id(3, 0)
    for block in source.blocks:  # segments fill the pieces, and nothing twice
        places = sorted((s.at, s.at + s.length) for s in block.segments)
        assert all(a[1] <= b[0] for a, b in pairwise(places))
        assert sum(s.length for s in block.segments) == 3 * 24 * 32 * 2


def test_layers_beyond_the_model_are_left_out(tmp_path: Path) -> None:
    """DeepSeek-V3 ships a layer for multi-token prediction that transformers does not load."""
    folder = save("deepseek_v3", tmp_path)
    before = ExpertSource.open(folder)

    def extra(header: dict[str, Any]) -> None:
        for name in [name for name in header if ".layers.2." in name]:
            header[name.replace(".layers.2.", ".layers.3.")] = header[name]

    rewrite_header(folder / "model.safetensors", extra)
    after = ExpertSource.open(folder)
    assert [(b.layer, b.expert) for b in after.blocks] == [(b.layer, b.expert) for b in before.blocks]


def test_base_models_without_the_prefix(olmoe: Path) -> None:
    before = ExpertSource.open(olmoe)
    first = before.tensors(9)

    def plain(header: dict[str, Any]) -> None:
        for name in list(header):
            header[name.removeprefix("model.")] = header.pop(name)

    rewrite_header(olmoe / "model.safetensors", plain)
    assert torch.equal(ExpertSource.open(olmoe).tensors(9)["gate_up_proj"], first["gate_up_proj"])


def test_a_model_on_the_hub(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(name: str, **more: Any) -> str:
        asked.append((name, more))
        return str(shutil.copytree(whole, tmp_path / "snapshots" / "0a1b2c"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = ExpertSource.open("somebody/tiny-olmoe", revision="main")
    assert (source.model_id, source.revision) == ("somebody/tiny-olmoe", "0a1b2c")
    assert asked == [
        ("somebody/tiny-olmoe", {"revision": "main", "allow_patterns": ["*.safetensors", "*.json"]})
    ]
    same(source, loaded(whole, torch.bfloat16))


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    refused("somebody/no-such-model", CheckpointError, r"Cannot load the model 'somebody/no-such-model'")


# ---------------------------------------------------------------------------------------- what can be wrong


def refused(folder: Path | str, kind: type[SpecgateError], sentence: str) -> None:
    with pytest.raises(kind, match=sentence) as caught:
        ExpertSource.open(folder)
    assert "\n" not in str(caught.value)


def test_only_bin(olmoe: Path) -> None:
    (olmoe / "model.safetensors").rename(olmoe / "pytorch_model.bin")
    refused(olmoe, CheckpointError, r"holds only .bin weights; .*save_pretrained")
    (olmoe / "pytorch_model.bin").unlink()
    refused(olmoe, CheckpointError, r"holds no model.safetensors and no model.safetensors.index.json")


def test_no_such_model(tmp_path: Path) -> None:
    refused(tmp_path / "none" / "here", CheckpointError, "does not exist")
    refused(tmp_path, CheckpointError, "holds no config.json")
    refused("olmoe_reff", CheckpointError, "No model is called 'olmoe_reff'")
    refused("", CheckpointError, "empty")


def test_a_shard_that_is_missing(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[2]
    shard.unlink()
    refused(sharded, CheckpointError, rf"The shard {shard.name} that .* names is missing; copy or download")


def test_an_index_that_leads_elsewhere(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    name = next(iter(good["weight_map"]))
    (sharded.parent / "stray.safetensors").write_bytes(b"x" * 100)
    for bad in ({"weight_map": {name: "../stray.safetensors"}}, {"weight_map": 3}, {}, []):
        index.write_text(json.dumps(bad))
        refused(sharded, CheckpointError, "is missing|is damaged")
    index.write_text("{")
    refused(sharded, CheckpointError, "is damaged")


@pytest.mark.parametrize("keep", [0, 5, 8, 200, -1, -5000])
def test_a_truncated_file(olmoe: Path, keep: int) -> None:
    file = olmoe / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:keep])
    refused(olmoe, CheckpointError, "is truncated|is not a safetensors file")


def test_truncated_after_opening(olmoe: Path) -> None:
    source = ExpertSource.open(olmoe)
    file = olmoe / "model.safetensors"
    ends = [max(s.offset + s.length for s in block.segments) for block in source.blocks]
    last = ends.index(max(ends))
    file.write_bytes(file.read_bytes()[: ends[last] - 100])
    with pytest.raises(SpecgateError, match=r"ends at byte .*, 100 bytes before .* truncated, copy it again"):
        source.read(last)
    assert len(source.read(ends.index(min(ends)))) == source.layout.block_bytes
    file.unlink()
    with pytest.raises(SpecgateError, match="cannot be read"):
        source.read(last)


@pytest.mark.parametrize(
    "header",
    [b"garbage, not json at all......", b"[1, 2]", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b"\xff\xfe\x00{}",
     b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
     b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
     b'{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
     b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}'],
)  # fmt: skip
def test_a_header_of_nonsense(olmoe: Path, header: bytes) -> None:
    file = olmoe / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(1000))
    refused(olmoe, CheckpointError, r"The header of .* (is damaged|makes no sense); copy or download")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 4000), value=st.integers(0, 255))
def test_a_damaged_byte_never_crashes(olmoe: Path, whole: Path, at: int, value: int) -> None:
    raw = bytearray((whole / "model.safetensors").read_bytes())
    raw[at] = value
    (olmoe / "model.safetensors").write_bytes(raw)
    assert "\n" not in outcome(olmoe)


def outcome(folder: Path) -> str:
    """What reading an expert is refused with; empty if it is not."""
    try:
        ExpertSource.open(folder).read(0)
    except SpecgateError as error:
        return str(error)
    return ""


def _drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: header.pop(name)


def test_an_expert_tensor_that_is_missing(olmoe: Path) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    rewrite_header(olmoe / "model.safetensors", _drop(name))
    refused(olmoe, CheckpointError, rf"lacks the expert tensor {name}; copy or download it again")


def test_a_layer_that_is_missing(olmoe: Path) -> None:
    def drop(header: dict[str, Any]) -> None:
        for name in [name for name in header if ".layers.2.mlp.experts" in name]:
            del header[name]

    rewrite_header(olmoe / "model.safetensors", drop)
    refused(
        olmoe,
        CheckpointError,
        r"lacks the expert tensor model.layers.2.mlp.experts.0.gate_proj.weight and 23",
    )


def test_a_tensor_of_another_shape(olmoe: Path) -> None:
    def swap(header: dict[str, Any]) -> None:
        header["model.layers.0.mlp.experts.0.down_proj.weight"]["shape"] = [24, 32]

    rewrite_header(olmoe / "model.safetensors", swap)
    refused(
        olmoe, CheckpointError, r"experts.0.down_proj.weight has the shape \[24, 32\] where .* \[32, 24\]"
    )


def test_a_tensor_of_another_dtype(olmoe: Path) -> None:
    def retype(dtype: str) -> Callable[[dict[str, Any]], None]:
        return lambda header: header["model.layers.0.mlp.experts.1.down_proj.weight"].update(dtype=dtype)

    rewrite_header(olmoe / "model.safetensors", retype("F16"))
    refused(olmoe, CheckpointError, "is stored as float16 while other experts are bfloat16")
    rewrite_header(olmoe / "model.safetensors", retype("U16"))
    refused(olmoe, CheckpointError, "is stored as U16, and experts are read from F32, BF16 and F16")


def test_quantised_checkpoints(tmp_path: Path) -> None:
    folder = save("gpt_oss", tmp_path / "gpt")

    def mxfp4(header: dict[str, Any]) -> None:
        for name in [name for name in header if name.endswith("_proj")]:
            header[name + "_blocks"] = header.pop(name)

    rewrite_header(folder / "model.safetensors", mxfp4)
    refused(folder, UnknownArchitectureError, r"\(mxfp4\).*Mxfp4Config\(dequantize=True\)")

    folder = save("deepseek_v3", tmp_path / "v3")

    def fp8(header: dict[str, Any]) -> None:
        for name, entry in header.items():
            if ".experts." in name:
                entry["dtype"] = "F8_E4M3"
                entry["shape"] = [2 * entry["shape"][0], *entry["shape"][1:]]

    rewrite_header(folder / "model.safetensors", fp8)
    refused(folder, UnknownArchitectureError, r"\(fp8\).*FineGrainedFP8Config\(dequantize=True\)")


def test_architectures_without_an_adapter(tmp_path: Path) -> None:
    def configured(config: Any) -> Path:
        folder = tmp_path / type(config).__name__
        config.save_pretrained(folder)
        save("olmoe", folder / "weights")
        shutil.copy(folder / "weights" / "model.safetensors", folder)
        return folder

    refused(configured(tf.NllbMoeConfig()), UnknownArchitectureError, "NLLB-MoE runs only experts 0 and 1")
    refused(configured(tf.PhimoeConfig()), UnknownArchitectureError, "'phimoe' has no adapter")
    refused(configured(tf.LlamaConfig()), UnknownArchitectureError, "'llama' has no experts")


def test_a_dtype_that_slots_cannot_have(whole: Path) -> None:
    with pytest.raises(ConfigError, match="dtype=float64 is not one that experts are kept in"):
        ExpertSource.open(whole, torch.float64)


def test_the_skeleton_holds_no_weights(whole: Path) -> None:
    layers = skeleton(tf.AutoConfig.from_pretrained(whole))
    assert all(parameter.is_meta for layer in layers for parameter in layer.block.parameters())
    assert piece_shapes(layers[0]) == {"gate_up_proj": (48, 32), "down_proj": (32, 24)}


def test_a_model_of_this_name_is_loadable(whole: Path, olmoe: Path) -> None:
    """Model id and revision are those of a host, so that a store and a host can be compared."""
    make_tokenizer().save_pretrained(olmoe)
    host = load_host(str(olmoe), device="cpu")
    source = ExpertSource.open(olmoe)
    assert (source.model_id, source.revision) == (host.model_id, host.revision)
