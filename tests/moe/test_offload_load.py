"""How an offloaded model is loaded and left: no expert tensor made, no class changed, nothing left behind."""

from __future__ import annotations

import gc
import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from transformers import core_model_loading, modeling_utils
from transformers.models.olmoe import modeling_olmoe
from transformers.monkey_patching import get_patch_mapping

import specgate
from specgate.errors import CheckpointError, ConfigError, StoreError
from specgate.moe.families import FAMILIES, moe_layers
from specgate.moe.offload_experts import ExpertRunner
from tests.moe.offload_support import (
    CONTEXT,
    STORES,
    SWITCH,
    assert_same,
    expert_parameters,
    load_resident,
    prompt,
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


def opened(folder: Path, slots: int | None = None, **more: Any) -> Any:
    plan = specgate.offload(folder, context=CONTEXT).plan
    slots = plan.least_slots if slots is None else slots
    return specgate.offload(folder, plan.budget_for(slots), context=CONTEXT, poison=True, **more)


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
    made = opened(tmp_path, host_gb=0.0)
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


class Stop(tf.LogitsProcessor):  # type: ignore[misc]
    """Raises in the middle of a generation."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.calls = error, 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 4:
            raise self.error
        return scores


@pytest.mark.parametrize("store", STORES)
def test_an_error_in_mid_generation_leaves_a_model_that_works(store: str, folder: Path) -> None:
    wanted = resident_run("olmoe", folder, None, TOKENS)
    with opened(folder, store=store) as model:
        for error in (ValueError("stop"), KeyboardInterrupt()):
            with pytest.raises(type(error)):
                model.generate(**prompt(), max_new_tokens=9, logits_processor=[Stop(error)])
            assert_same(run(model, TOKENS), wanted)  # a slot still pinned would be missing now
        for at in (1, 2, 9, 18):
            _interrupt(model.specgate.store, "acquire", at, model)
            _interrupt(model.specgate.store, "advance", at, model)
            assert_same(run(model, TOKENS), wanted)
    with pytest.raises(KeyboardInterrupt), opened(folder, store=store) as model:
        _interrupt(model.specgate.store, "acquire", 5, model, catch=False)


def _interrupt(store: Any, method: str, at: int, model: Any, catch: bool = True) -> None:
    """Generates, with Ctrl-C at the ``at``-th call of the store."""
    real, calls = getattr(store, method), 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    setattr(store, method, interrupted)
    try:
        if catch:
            with pytest.raises(KeyboardInterrupt):
                run(model, TOKENS)
        else:
            run(model, TOKENS)
    finally:
        delattr(store, method)


def test_an_expert_that_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with opened(tmp_path) as model:
        weights = tmp_path / "model.safetensors"
        with weights.open("r+b") as f:
            f.truncate(weights.stat().st_size // 3)
        with pytest.raises(StoreError):
            run(model, TOKENS)
        with pytest.raises(StoreError):
            run(model, TOKENS)


# ---------------------------------------------------------------------- beside other things


def test_two_at_once_and_one_inside_the_other(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = saved("mixtral", tmp_path_factory)
    with opened(folder) as first, opened(other, 5) as second, opened(folder, 9) as third:
        plain = load_resident(folder)  # an ordinary model meanwhile has its experts
        assert len(expert_parameters(plain)) == 6
        for _ in range(2):
            assert_same(run(first, TOKENS), resident_run("olmoe", folder, None, TOKENS))
            assert_same(run(second, TOKENS), resident_run("mixtral", other, None, TOKENS))
            assert_same(run(third, TOKENS), resident_run("olmoe", folder, None, TOKENS))


def _together(jobs: list[Any]) -> list[Any]:
    """Runs jobs in threads; their results, or what they raised."""
    found: list[Any] = [None] * len(jobs)

    def work(i: int) -> None:
        try:
            found[i] = jobs[i]()
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return found


def test_models_are_opened_in_several_threads(folder: Path) -> None:
    """transformers itself loads one model at a time only: it patches tie_weights while it does."""
    ties = modeling_utils.PreTrainedModel.tie_weights
    resident_run("olmoe", folder, None, TOKENS)

    def offloaded() -> Any:
        with opened(folder) as model:
            return run(model, TOKENS)

    for found in _together([offloaded] * 3):
        assert_same(found, resident_run("olmoe", folder, None, TOKENS))
    assert modeling_utils.PreTrainedModel.tie_weights is ties


def test_threads_share_a_model(folder: Path) -> None:
    wanted = resident_run("olmoe", folder, None, TOKENS)
    with opened(folder) as model:
        for found in _together([lambda: run(model, TOKENS)] * 3):
            assert_same(found, wanted)


# ---------------------------------------------------------------------- what it does not do


def test_a_backward_pass_is_refused(folder: Path) -> None:
    with opened(folder) as model:
        out = model(**prompt())
        assert torch.equal(out.logits, resident_run("olmoe", folder, None, TOKENS).logits)
        with pytest.raises(ConfigError, match="no gradient goes through them"):
            out.logits.sum().backward()


def test_it_is_neither_moved_nor_saved(folder: Path, tmp_path: Path) -> None:
    with opened(folder) as model:
        assert model.to("cpu") is model
        assert model.float() is model
        for change in (lambda: model.to("meta"), lambda: model.half(), lambda: model.bfloat16()):
            with pytest.raises(ConfigError, match=r"An offloaded model stays on cpu in torch\.float32"):
                change()
        with pytest.raises(ConfigError, match="no experts to save"):
            model.save_pretrained(tmp_path / "copy")
        assert_same(run(model, TOKENS), resident_run("olmoe", folder, None, TOKENS))


def test_a_compiled_block_goes_around_the_experts(folder: Path) -> None:
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with opened(folder) as model, torch.no_grad():
        block = moe_layers(model)[0].block
        wanted = block(hidden)
        assert torch.equal(torch.compile(block, backend="eager")(hidden), wanted)
        torch._dynamo.reset()
        with pytest.raises(Exception, match="disable"):
            torch.compile(block, backend="eager", fullgraph=True)(hidden)
        torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["olmoe", SWITCH])
def test_a_compiled_model_gives_the_same(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, inputs = saved(family, tmp_path_factory), dict(prompt())
    if family == SWITCH:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :9]
    with opened(folder) as model, torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        assert torch.equal(compiled(**inputs).logits, resident_run(family, folder, None, TOKENS).logits)
        torch._dynamo.reset()


def test_kernels_that_cannot_run_from_slots_are_refused(folder: Path) -> None:
    with opened(folder) as model:
        model.set_experts_implementation("eager")
        assert_same(run(model, TOKENS), resident_run("olmoe", folder, "eager", TOKENS))
        model.config._experts_implementation = "sonicmoe"
        with pytest.raises(ConfigError, match="'sonicmoe' cannot run from slots"):
            model(**prompt())


def test_a_call_without_tokens(folder: Path) -> None:
    with opened(folder) as model:
        experts: Any = moe_layers(model)[0].experts
        none = experts(torch.zeros(0, 32), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
        assert none.shape == (0, 32)
        assert isinstance(experts.runner, ExpertRunner)
