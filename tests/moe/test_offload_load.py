"""How an offloaded model is loaded and left: no expert tensor made, no class changed, nothing left behind."""

from __future__ import annotations

import gc
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import core_model_loading, modeling_utils
from transformers.models.olmoe import modeling_olmoe
from transformers.monkey_patching import get_patch_mapping

import specgate
from specgate.errors import CheckpointError, StoreError
from specgate.moe.families import FAMILIES, moe_layers
from tests.moe.offload_support import (
    assert_same,
    expert_parameters,
    load_resident,
    opened,
    resident_run,
    run,
    saved,
)
from tests.moe.tiny_hosts import make_host

TOKENS = 6
ORIGINAL = modeling_olmoe.OlmoeExperts


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("olmoe", tmp_path_factory)


@pytest.fixture(autouse=True)
def _no_global_change() -> Any:
    yield
    assert modeling_olmoe.OlmoeExperts is ORIGINAL
    assert not hasattr(ORIGINAL, "runner")
    assert get_patch_mapping() == {}
    assert type(modeling_olmoe.OlmoeSparseMoeBlock(make_host("olmoe").config).experts) is ORIGINAL


# ---------------------------------------------------------------------- what is loaded


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_model_is_of_its_own_class_and_without_experts(
    family: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = saved(family, tmp_path_factory)
    resident = load_resident(folder)
    with opened(folder) as model:
        assert type(model) is type(resident)
        assert expert_parameters(model) == []
        assert len(expert_parameters(resident)) > 0
        dense = {n: p for n, p in resident.named_parameters() if ".experts." not in n}
        assert list(dict(model.named_parameters())) == list(dense)
        assert all(torch.equal(p, dense[n]) for n, p in model.named_parameters())
        for mine, theirs in zip(moe_layers(model), moe_layers(resident), strict=True):
            assert isinstance(mine.experts, type(theirs.experts))
            assert type(mine.experts).__name__ == type(theirs.experts).__name__
            assert (mine.name, mine.stack, mine.num_experts) == (
                theirs.name,
                theirs.stack,
                theirs.num_experts,
            )
        assert not model.training
        assert model.generation_config.to_dict() == resident.generation_config.to_dict()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_no_expert_tensor_is_ever_made(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, made = saved(family, tmp_path_factory), []
    real = core_model_loading._materialize_copy

    def counted(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        out = real(tensor, *args, **kwargs)
        made.append(out.numel())
        return out

    monkeypatch.setattr(core_model_loading, "_materialize_copy", counted)
    with opened(folder) as model:
        dense = sum(p.numel() for p in [*model.parameters(), *model.buffers()])
        stored = json.loads((folder / "config.json").read_text())
        assert stored["model_type"] == family
    assert 0 < sum(made) <= dense
    made.clear()
    load_resident(folder)
    assert sum(made) > dense


def _peak() -> int:
    """Bytes of the largest resident set since :func:`_forget_peak`."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def test_peak_memory_is_not_the_models(tmp_path: Path) -> None:
    host = make_host("olmoe", num_experts=64, intermediate_size=512, hidden_size=64, head_dim=16)
    host.save_pretrained(tmp_path)
    experts = sum(p.numel() * 4 for n, p in host.named_parameters() if ".experts." in n)
    assert experts > 70e6
    del host
    gc.collect()
    made = opened(tmp_path)
    clear = Path("/proc/self/clear_refs")
    try:
        clear.write_text("5")
    except OSError:
        pytest.skip("the peak of this process cannot be set back")
    before = _peak()
    with made as model:
        run(model, 2)
        assert _peak() - before < experts / 3


def test_the_load_report_names_only_what_is_wrong(tmp_path: Path, folder: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.stranger"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for where, expected in ((folder, False), (tmp_path, True)):
        messages: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, messages=messages: messages.append(record.getMessage())  # type: ignore
        log = logging.getLogger("transformers.modeling_utils")
        log.addHandler(handler)
        try:
            with opened(where) as model:
                run(model, 1)
        finally:
            log.removeHandler(handler)
        text = "\n".join(messages)
        assert "experts" not in text
        assert ("model.layers.0.mlp.stranger" in text) == expected
    tensors.pop("model.layers.1.self_attn.q_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with (
        pytest.raises(CheckpointError, match=r"lack 1 tensors \(model.layers.1.self_attn.q_proj"),
        opened(tmp_path),
    ):
        pass


def test_a_missing_expert_is_named_before_anything_runs(tmp_path: Path, folder: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.2.mlp.experts.5.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with (
        pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.experts\.5\.up_proj"),
        opened(tmp_path),
    ):
        pass


def test_a_packed_file(tmp_path: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from specgate.runtime.pack import Options, pack

    for codec in ("none", "int8"):
        target = tmp_path / f"{codec}.experts"
        pack(Options(moe=str(folder), out=str(target), codec=codec))
        with opened(folder, 7, packed=target, verify=True) as model:
            found = run(model, TOKENS)
            assert model.specgate.plan.codec == codec
            errors = model.specgate.verified
        if codec == "none":
            assert_same(found, resident_run("olmoe", folder, None, TOKENS))
        else:
            assert 0 < max(errors) < 0.05
    other = tmp_path_factory.mktemp("other")
    make_host("olmoe", seed=1).save_pretrained(other)
    with pytest.raises(CheckpointError, match=r"was packed from olmoe .* is another model; pack it again"):
        specgate.offload(other, packed=tmp_path / "none.experts")


# ---------------------------------------------------------------------- how it ends


def test_after_the_block_the_model_says_so(folder: Path) -> None:
    made = opened(folder)
    with made as model:
        run(model, 1)
        seen = model.specgate.stats()
    assert model.specgate.stats() == seen
    with pytest.raises(StoreError, match="its offload block was left"):
        run(model, 1)
    with made as again:  # the block may be entered anew
        assert again is not model
        with pytest.raises(StoreError, match="already open"), made:
            pass
        assert_same(run(again, TOKENS), resident_run("olmoe", folder, None, TOKENS))


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("where", ["_load_pretrained_model", "_finalize_model_loading", "__init__"])
def test_an_error_while_loading(
    where: str, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise kind("out of luck")

    made = opened(folder)
    if where == "__init__":
        monkeypatch.setattr(modeling_olmoe.OlmoeModel, where, fail)
    else:
        monkeypatch.setattr(modeling_utils.PreTrainedModel, where, staticmethod(fail))
    expected = CheckpointError if kind is RuntimeError else kind
    with pytest.raises(expected), made:
        pass
    monkeypatch.undo()
    assert len(expert_parameters(load_resident(folder))) == 6
    with made as model:
        run(model, 1)


@pytest.mark.parametrize("step", ["runner", "forecaster", "verify"])
def test_an_error_while_opening_closes_the_store(
    step: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    from specgate.moe import offload

    closed: list[bool] = []
    real = offload.Offload._open_store

    def watched(self: Any, source: Any) -> Any:
        store = real(self, source)
        close = store.close
        store.close = lambda: (closed.append(True), close())
        return store

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(offload.Offload, "_open_store", watched)
    name = {"runner": "ExpertRunner", "forecaster": "moe_layers", "verify": "verify_model"}[step]
    monkeypatch.setattr(offload, name, fail)
    with pytest.raises(KeyboardInterrupt), opened(folder, verify=True):
        pass
    assert closed == ([] if step == "forecaster" else [True])
