"""Forecasts while offloaded: predictors see what a trace holds, right ones save loads, wrong ones only time.

Letters: B sequences, T tokens, L MoE layers, P = L + 1 source points, H horizons, E experts, K per token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import specgate
from specgate.errors import CheckpointError, ConfigError
from specgate.moe.families import moe_layers
from specgate.moe.recorder import Recorder, Routing, join
from specgate.predictors.base import Predictor
from specgate.traces.batch import RoutingBatch
from tests.moe.offload_support import (
    CONTEXT,
    SWITCH,
    assert_same,
    load_resident,
    prompt,
    resident_run,
    run,
    saved,
)
from tests.moe.tiny_hosts import VOCAB

TOKENS = 10


class Watcher(Predictor):
    """Notes what it is shown and says what it is told to."""

    name: ClassVar[str] = "watcher"

    def watch(self, say: Callable[[RoutingBatch, int], Tensor] | None = None) -> Watcher:
        self.seen: list[tuple[int, RoutingBatch]] = []
        self.say = say
        return self

    def probabilities(self, batch: RoutingBatch) -> Tensor:
        """Prefill asks for all points at once; which one it looks at is told by the calls' order."""
        layer = len(self.seen) % (self.layers + 1) - 1
        B, T = batch.valid_BT.shape
        p_BHE = self._told(batch, layer)[:, None, None]
        return p_BHE.expand(B, T, self.layers + 1, -1, -1)

    def step_probabilities(self, batch: RoutingBatch, layer: int) -> Tensor:
        return self._told(batch, layer)

    def _told(self, batch: RoutingBatch, layer: int) -> Tensor:
        self.seen.append((layer, batch._map(torch.clone)))
        if self.say is None:
            return torch.zeros(len(batch.valid_BT), self.lookahead, self.experts)
        return self.say(batch, layer)


def watcher(model: Any, stack: str, phase: str, lookahead: int = 2, hidden: bool = True) -> Watcher:
    layers = [layer for layer in moe_layers(model) if layer.stack == stack]
    return Watcher(
        layers=len(layers),
        experts=layers[0].num_experts,
        top_k=layers[0].top_k,
        vocab_size=model.config.vocab_size,
        phase=phase,
        hidden_size=model.config.hidden_size if hidden else None,
        bidirectional=stack == "encoder",
        lookahead=lookahead,
    ).watch()


def recorded(model: Any, stack: str, tokens: int, inputs: dict[str, Tensor]) -> tuple[list[Routing], Tensor]:
    """Every call through a stack while the resident model generates, and all tokens."""
    with Recorder(model, hidden="fp16") as recorder, torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
        return recorder.take()[stack], out


def opened(folder: Path, predictor: Any, share: float = 0.5, **more: Any) -> Any:
    """An offload with slots for a part of the experts."""
    plan = specgate.offload(folder, predictor=predictor, context=CONTEXT, **more).plan
    slots = max(plan.least_slots, int(plan.blocks * share))
    made = specgate.offload(folder, plan.budget_for(slots), predictor, context=CONTEXT, **more)
    assert made.plan.slots == slots
    return made


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss", SWITCH])
def test_while_decoding_it_sees_what_a_trace_holds(
    family: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, inputs = saved(family, tmp_path_factory), prompt()
    resident = load_resident(folder)
    calls, out = recorded(resident, "decoder", TOKENS, inputs)
    first = 0 if family == SWITCH else inputs["input_ids"].shape[1]
    steps = join(calls if family == SWITCH else calls[1:])
    assert steps.hidden_BTLD is not None
    seen = watcher(resident, "decoder", "decode")
    with opened(folder, seen) as model:
        model.generate(
            **inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0
        )
    L = seen.layers
    assert [layer for layer, _ in seen.seen] == list(range(-1, L)) * steps.experts_BTLK.shape[1]
    for number, (layer, batch) in enumerate(seen.seen):
        last = number // (L + 1)
        T = last + 1
        assert batch.valid_BT.shape == (2, T)
        assert bool(batch.valid_BT.all())
        assert torch.equal(batch.token_ids_BT, out[:, first : first + T])
        assert batch.positions_BT.tolist() == [list(range(first, first + T))] * 2
        known_TL = (torch.arange(T)[:, None] < last) | (torch.arange(L) <= layer)
        for name, wanted in (
            ("experts_BTLK", steps.experts_BTLK.long()),
            ("weights_BTLK", steps.weights_BTLK.float()),
            ("hidden_BTLD", steps.hidden_BTLD.float()),
        ):
            shape = (1, T, L, 1)
            assert torch.equal(getattr(batch, name), wanted[:, :T] * known_TL.view(shape)), name
        if family == SWITCH:
            assert batch.dropped_BTL is not None
            assert not batch.dropped_BTL.any()


@pytest.mark.parametrize(("family", "stack"), [("olmoe", "decoder"), (SWITCH, "encoder")])
def test_at_a_prompt_it_sees_what_a_trace_holds(
    family: str, stack: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, inputs = saved(family, tmp_path_factory), prompt()
    resident = load_resident(folder)
    calls, _ = recorded(resident, stack, 2, inputs)
    whole = calls[0]
    assert whole.hidden_BTLD is not None
    for history in (128, 4):
        seen = watcher(resident, stack, "prefill", lookahead=2)
        with opened(folder, seen, history=history) as model:
            model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0)
        # From the last layer nothing is to be foreseen at a prompt.
        assert [layer for layer, _ in seen.seen] == list(range(-1, seen.layers - 1))
        for layer, batch in seen.seen:
            for b, real in enumerate(inputs["attention_mask"].bool()):
                places = real.nonzero().flatten()[-history:]
                n = len(places)
                assert batch.valid_BT[b].tolist() == [True] * n + [False] * (len(batch.valid_BT[b]) - n)
                assert torch.equal(batch.token_ids_BT[b, :n], inputs["input_ids"][b, places])
                count = int(real.sum())
                assert batch.positions_BT[b, :n].tolist() == list(range(count - n, count))
                known = slice(0, layer + 1)
                assert torch.equal(
                    batch.experts_BTLK[b, :n, known], whole.experts_BTLK[b, places, known].long()
                )
                assert batch.hidden_BTLD is not None
                assert torch.equal(
                    batch.hidden_BTLD[b, :n, known], whole.hidden_BTLD[b, places, known].float()
                )
                assert not batch.hidden_BTLD[b, n:].any()
                if whole.dropped_BTL is not None and batch.dropped_BTL is not None:
                    assert torch.equal(batch.dropped_BTL[b, :n, known], whole.dropped_BTL[b, places, known])


def test_the_window_is_cut_and_goes_on(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, inputs = saved("olmoe", tmp_path_factory), prompt()
    resident = load_resident(folder)
    calls, out = recorded(resident, "decoder", 20, inputs)
    steps = join(calls[1:])
    for history in (1, 3, 7):
        seen = watcher(resident, "decoder", "decode", hidden=False)
        with opened(folder, seen, history=history) as model:
            model.generate(**inputs, max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0)
        whole = [batch for layer, batch in seen.seen if layer == seen.layers - 1]
        assert len(whole) == 19
        for t, batch in enumerate(whole):
            start = max(0, t + 1 - history)
            assert torch.equal(batch.token_ids_BT, out[:, 12 + start : 12 + t + 1])
            assert torch.equal(batch.experts_BTLK, steps.experts_BTLK[:, start : t + 1].long())


class Fortune:
    """Knows the routing of the resident model's run: what a forecast from a point should be."""

    def __init__(self, folder: Path) -> None:
        self.model = load_resident(folder)
        calls, _ = recorded(self.model, "decoder", TOKENS, prompt())
        steps = calls if self.model.config.is_encoder_decoder else calls[1:]
        self.first = prompt()["input_ids"].shape[1] if len(steps) < len(calls) else 0
        self.experts_BTLK = join(steps).experts_BTLK.long()

    def used(self, batch: RoutingBatch, layer: int, horizons: int, experts: int) -> Tensor:
        """1 where an expert will be used: ``[B, H, E]``."""
        B, T, L, _ = self.experts_BTLK.shape
        used_BHE = torch.zeros(B, horizons, experts)
        t = int(batch.positions_BT[0, -1]) - self.first
        for h in range(horizons):
            token, target = t + (layer + 1 + h) // L, (layer + 1 + h) % L
            if token < T:
                used_BHE[:, h].scatter_(1, self.experts_BTLK[:, token, target], 1.0)
        return used_BHE


@cache
def fortune_of(folder: Path) -> Fortune:
    return Fortune(folder)


@pytest.mark.parametrize(("family", "share"), [("olmoe", 0.5), (SWITCH, 0.13)])
def test_a_true_forecast_leaves_no_miss(
    family: str, share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Layers, horizons, tokens and deadlines fit together: while decoding every expert is there in time."""
    folder, inputs = saved(family, tmp_path_factory), prompt()
    fortune = fortune_of(folder)
    knowing = watcher(fortune.model, "decoder", "decode", lookahead=2)
    knowing.watch(lambda batch, layer: fortune.used(batch, layer, 2, knowing.experts))
    marks: list[dict[str, Any]] = []
    for predictor in (None, knowing):
        with opened(folder, predictor, share, store="simple", eviction="forecast") as model:
            seen: list[dict[str, Any]] = []
            model.get_decoder().register_forward_hook(
                lambda *_, seen=seen, model=model: seen.append(model.specgate.stats())
            )
            model.generate(
                **inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0
            )
            marks.append({k: seen[-1][k] - seen[0][k] for k in ("miss", "hit", "useful_bytes")})
    plain, foreseen = marks
    assert plain["miss"] > 10
    assert plain["useful_bytes"] == 0
    assert foreseen["miss"] == 0
    assert foreseen["useful_bytes"] > 0
    assert foreseen["hit"] == plain["hit"] + plain["miss"]


def _nonsense(kind: str, fortune: Fortune, experts: int) -> Callable[[RoutingBatch, int], Tensor]:
    generator = torch.Generator().manual_seed(3)

    def say(batch: RoutingBatch, layer: int) -> Tensor:
        used_BHE = fortune.used(batch, layer, 3, experts)
        return {
            "the worst first": 1 - used_BHE,
            "everything": torch.ones_like(used_BHE),
            "random": torch.rand(used_BHE.shape, generator=generator),
            "no number": torch.full_like(used_BHE, float("nan")),
            "beyond one": used_BHE * 7 - 3,
            "infinite": torch.full_like(used_BHE, float("inf")),
        }[kind]

    return say


@pytest.mark.parametrize(
    "kind", ["the worst first", "everything", "random", "no number", "beyond one", "infinite"]
)
def test_a_wrong_forecast_changes_no_value(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    for family, share, store in (("olmoe", 0.4, "simple"), ("olmoe", 0.4, "auto"), (SWITCH, 0.0, "auto")):
        folder = saved(family, tmp_path_factory)
        fortune = fortune_of(folder)
        wrong = watcher(fortune.model, "decoder", "decode", lookahead=3)
        wrong.watch(_nonsense(kind, fortune, wrong.experts))
        at_prompt = watcher(
            fortune.model, "encoder" if family == SWITCH else "decoder", "prefill", lookahead=1
        )
        at_prompt.watch(lambda batch, layer: torch.ones(len(batch.valid_BT), 1, 8))
        with opened(folder, [wrong, at_prompt], share, store=store, poison=True, threshold=0.0) as model:
            assert_same(run(model, TOKENS), resident_run(family, folder, None, TOKENS))
            stats = model.specgate.stats()
        assert stats["forecasts"] > 0
        assert (stats["ignored"] > 0) == (kind == "no number")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2", "gpt_oss"])
def test_families_with_a_learned_predictor(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    from specgate.predictors.mlp import MLP

    folder = saved(family, tmp_path_factory)
    model = load_resident(folder)
    layers = [layer for layer in moe_layers(model) if layer.stack == "decoder"]
    torch.manual_seed(0)
    mlp = MLP(
        layers=len(layers), experts=8, top_k=layers[0].top_k, vocab_size=model.config.vocab_size,
        phase="decode", hidden_size=32, lookahead=2, width=16, heads=0,
    )  # fmt: skip
    with opened(folder, mlp, threshold=0.0) as offloaded:
        assert_same(run(offloaded, TOKENS), resident_run(family, folder, None, TOKENS))
        assert offloaded.specgate.stats()["forecasts"] > 0


def test_a_checkpoint_or_a_run_folder(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from specgate.predictors.mlp import MLP
    from tests.predictors.support import trainer

    folder = saved("olmoe", tmp_path_factory)
    sizes = {"layers": 3, "experts": 8, "top_k": 2, "vocab_size": VOCAB, "hidden_size": 32}
    run_of = trainer(tmp_path)
    run_of.strategy.connect(MLP(phase="decode", width=16, heads=0, **sizes))
    (tmp_path / "checkpoints").mkdir()
    run_of.save_checkpoint(tmp_path / "checkpoints" / "best.ckpt")
    for given in (tmp_path, str(tmp_path / "checkpoints" / "best.ckpt")):
        with opened(folder, given, threshold=0.0) as model:
            assert_same(run(model, 3), resident_run("olmoe", folder, None, 3))
            assert model.specgate.stats()["forecasts"] > 0
            assert "predictor" in str(model.specgate.plan)


def test_a_predictor_of_another_model_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = saved("olmoe", tmp_path_factory)
    model = load_resident(folder)
    right = dict(watcher(model, "decoder", "decode").hparams)
    right.pop("predictor")
    for name, value in (("layers", 4), ("experts", 9), ("top_k", 3), ("hidden_size", 31), ("vocab_size", 7)):
        with pytest.raises(CheckpointError, match=f"watcher was trained for .*{value}.*this model"):
            specgate.offload(folder, predictor=Watcher(**right | {name: value}))
    twice = [Watcher(**right), Watcher(**right)]
    with pytest.raises(ConfigError, match="Two predictors are for the decoder's decode"):
        specgate.offload(folder, predictor=twice)
    with pytest.raises(CheckpointError, match="does not exist"):
        specgate.offload(folder, predictor="nowhere/best.ckpt")
    for more in ({"threshold": 1.5}, {"threshold": float("nan")}, {"history": 0}):
        with pytest.raises(ConfigError, match="write"):
            specgate.offload(folder, predictor=Watcher(**right), **more)


def test_no_hook_is_left_behind(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = saved(SWITCH, tmp_path_factory)
    resident = load_resident(folder)
    predictors = [watcher(resident, "decoder", "decode"), watcher(resident, "encoder", "prefill", 1)]
    with opened(folder, predictors) as model:
        run(model, 2)
        hooks = [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
        assert hooks
        asked = [len(p.seen) for p in predictors]
        assert min(asked) > 0
    assert not [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
