"""An offloaded model in use: errors in the middle, several models and threads, and what it does not do."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import modeling_utils

from specgate.errors import ConfigError, StoreError
from specgate.moe.families import moe_layers
from specgate.moe.offload_experts import ExpertRunner
from specgate.moe.recorder import Recorder
from tests.moe.offload_support import (
    STORES,
    SWITCH,
    assert_same,
    expert_parameters,
    load_resident,
    opened,
    prompt,
    resident_run,
    run,
    saved,
)

TOKENS = 6


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("olmoe", tmp_path_factory)


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


# ---------------------------------------------------------------------- other ways of using it


@pytest.mark.parametrize("family", ["olmoe", SWITCH])
def test_beams_and_samples(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = saved(family, tmp_path_factory)
    resident = load_resident(folder)
    with opened(folder) as model:
        for more in ({"num_beams": 3}, {"do_sample": True, "temperature": 1.3}, {"use_cache": False}):
            found = []
            for one in (model, resident):
                torch.manual_seed(5)
                found.append(one.generate(**prompt(), max_new_tokens=TOKENS, pad_token_id=0, **more))
            assert torch.equal(*found)


@pytest.mark.parametrize("family", ["olmoe", SWITCH])
def test_its_routing_is_recorded_like_any_other(
    family: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = saved(family, tmp_path_factory)
    taken = []
    for one in (load_resident(folder), None):
        with opened(folder) as offloaded:
            model = one or offloaded
            with Recorder(model, hidden="fp16", control=True) as recorder:
                run(model, 3)
                taken.append(recorder.take())
    for stack, calls in taken[0].items():
        for mine, theirs in zip(calls, taken[1][stack], strict=True):
            assert all(torch.equal(t, theirs.tensors()[n]) for n, t in mine.tensors().items())
            assert mine.agrees_BTL is not None
            assert bool(mine.agrees_BTL.all())


def test_checkpoints_in_shards_and_stacked(tmp_path: Path, folder: Path) -> None:
    resident = load_resident(folder)
    wanted = resident_run("olmoe", folder, None, TOKENS)
    resident.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    resident.save_pretrained(tmp_path / "stacked", save_original_format=False)
    for name in ("shards", "stacked"):
        with opened(tmp_path / name, 5, verify=True) as model:
            assert_same(run(model, TOKENS), wanted)


def test_the_example_of_the_docs_runs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (root / "docs" / "offload.md").read_text(), flags=re.DOTALL)
    exec(code, {})
    printed = capsys.readouterr().out
    assert "expert slots" in printed
    assert int(printed.split()[-1]) > 0


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
