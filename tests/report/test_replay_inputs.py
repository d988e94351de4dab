"""What a replay runs on: models' shapes, random experts, a trace's documents and what is foreseen of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from specgate.calibration.load import load_predictor
from specgate.errors import CheckpointError, ConfigError, TraceError
from specgate.policy.reuse import fit_discount
from specgate.policy.workload import join
from specgate.report import replay_store
from specgate.report.live_models import save_wide
from specgate.report.replay import Replay, replay
from specgate.report.replay_script import load_script, make_script, save_script
from specgate.report.replay_shape import ModelShape, check_trace
from specgate.report.replay_store import RandomBlocks, Stores
from specgate.report.replay_trace import (
    choose_windows,
    document_of,
    forecast_plan,
    foreseen,
    load_documents,
    make_plans,
)
from specgate.report.simulate_trace import documents_of
from specgate.runtime import codecs, native
from specgate.runtime.store import ExpertStore, StoreSettings
from specgate.traces.datamodule import RoutingDataModule
from tests.report.replays import GPT_OSS, E, K, L, data_of, quick, save_predictor, shape, write_decode_trace
from tests.test_configs import CONF
from tests.traces.helpers import header_for, stack_info, write_trace

pytestmark = pytest.mark.skipif(not native.available(), reason="the native core is not built")
CPU = torch.device("cpu")
LABELS = ("trace", "model", "stack", "phase", "variant", "residency")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decode_trace(tmp_path_factory.mktemp("inputs") / "trace")


@pytest.fixture(scope="module")
def checkpoint(trace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_predictor(data_of(trace), tmp_path_factory.mktemp("inputs") / "predictor.ckpt")


# ---------------------------------------------------------------------- shapes and weights


def test_shapes_are_those_of_the_models() -> None:
    found = {}
    for path in sorted((CONF / "shape").glob("*.yaml")):
        values: Any = OmegaConf.to_container(OmegaConf.load(path))
        made = ModelShape(values["name"], values["config"], values["dtype"])
        assert values["name"] == path.stem
        found[path.stem] = (made.layers, made.experts, made.top_k, made.expert_parameters)
    assert found["gpt_oss_20b"] == (24, 32, 4, 2880 * 5760 + 5760 + 2880 * 2880 + 2880)
    assert found["qwen3_30b_a3b"] == (48, 128, 8, 3 * 2048 * 768)
    assert found["mixtral_8x7b"] == (32, 8, 2, 3 * 4096 * 14336)
    oss: Any = OmegaConf.to_container(OmegaConf.load(CONF / "shape" / "gpt_oss_20b.yaml"))
    made = ModelShape("x", oss["config"])
    assert made.pieces["gate_up_proj"] == (2880, 5760), "transposed, as GptOssExperts has it"
    attention = 2 * 2880 * 64 * (64 + 8) + (64 + 2 * 8) * 64 + 2880 + 64
    assert made.dense_parameters == attention + 32 * 2880 + 32 + 2 * 2880
    assert made.layout().slot_bytes == 49_783_808


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "choose one of switch_transformers, mixtral"),
        ({"num_experts_per_tok": 9}, "has 8 experts in a layer and uses 9"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 leaves nothing"),
        ({"hidden_act": "nothing"}, "is none that transformers can build"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _ = shape(**change).pieces


def test_experts_without_an_index_can_be_planned_but_not_replayed(trace: Path, tmp_path: Path) -> None:
    values: Any = OmegaConf.to_container(OmegaConf.load(CONF / "shape" / "switch_base_8.yaml"))
    switch = ModelShape(values["name"], values["config"], values["dtype"])
    assert (switch.layers, switch.experts, switch.top_k) == (12, 8, 1)
    with pytest.raises(
        ConfigError, match=r"switch_transformers has no experts that run from slots.*of mixtral"
    ):
        replay(quick(), switch, {"t": data_of(trace)}, tmp_path)
    with pytest.raises(ConfigError, match="has no experts that run from slots"):
        save_wide(switch, tmp_path, CPU, 0)


def test_trace_of_another_shape_is_refused(trace: Path, tmp_path: Path) -> None:
    check_trace(shape(), "t", L, E, K)
    with pytest.raises(ConfigError, match=r"Trace t routes 4 layers, 2 of 8 experts, and shape tiny has 5"):
        replay(quick(), shape(num_hidden_layers=5), {"t": data_of(trace)}, tmp_path)


@pytest.mark.parametrize("codec", ["none", "int8", "int4", "fp8"])
def test_blocks_are_one_expert_with_its_rows_turned(codec: str) -> None:
    blocks = RandomBlocks(ModelShape("oss", GPT_OSS), codec)
    scratch = torch.empty(blocks.layout.block_bytes, dtype=torch.uint8)
    first, *others = [
        codecs.decode_block(blocks.layout, blocks.write(b, scratch).clone()) for b in range(L * E)
    ]
    seen = {tuple(first["down_proj"].flatten()[:64].tolist())}
    for b, expert in enumerate(others, 1):
        for name, matrix in expert.items():
            if matrix.dim() > 1:
                assert torch.equal(matrix, first[name].roll(b * replay_store.STEP % len(matrix), 0))
            else:
                assert torch.equal(matrix, first[name])
        seen.add(tuple(expert["down_proj"].flatten()[:64].tolist()))
    assert len(seen) == 16, "as many as there are rows to turn by"
    assert 0.5 < float(first["gate_up_proj"].float().std()) * GPT_OSS["hidden_size"] ** 0.5 < 1.5


class Lending(ExpertStore):
    """A store that can read another's experts, as the native one will: here by copying them."""

    opened: list[ExpertStore | None] = []

    def __init__(self, *args: Any, share: ExpertStore | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        Lending.opened.append(share)
        if share is not None:
            for block in range(self.layers * self.experts):
                mine, theirs = (torch.from_dlpack(s._core.slab(block)) for s in (self, share))
                mine.copy_(theirs)


def test_stores_share_experts_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = RandomBlocks(shape())
    made: list[int] = []
    monkeypatch.setattr(replay_store, "ExpertStore", Lending)
    Lending.opened.clear()
    with Stores(blocks, CPU, told=lambda done, total: made.append(total)) as stores:
        for slots in (2, 4):
            with stores.open(slots, StoreSettings()) as store:
                (slot,) = store.acquire(3, [5])
                wanted = codecs.decode_block(blocks.layout, blocks.write(29, torch.empty_like(blocks._first)))
                assert torch.equal(store.arena("down_proj")[slot], wanted["down_proj"])
                store.release(3, [5])
        lender = Lending.opened[1]
        assert lender is not None
        assert Lending.opened == [None, lender, lender]
        assert made == [L * E] * (L * E), "the experts are made once"
    assert lender._core.closed()


# ---------------------------------------------------------------------- what is foreseen


def test_documents_are_what_the_trace_holds(trace: Path) -> None:
    data = data_of(trace)
    (batch,) = choose_windows(data, "test", 1, 6)
    document, keep_T = document_of(batch, 6, "d")
    view = data.readers[0].stack("decoder")
    first = int(batch.document_B[0])
    mine = [i for i, d in enumerate(view.sequences.document_S) if int(d) == first]
    sequences = [
        view.gather("experts", range(start := int(view.sequences.start_S[i]), start + 6)) for i in mine
    ]
    assert document.experts_TLK in [s.tolist() for s in sequences]
    assert keep_T.tolist() == list(range(6))
    with pytest.raises(ConfigError, match=r"windows of 13 tokens \(the longest has 12\)"):
        choose_windows(data, "test", 1, 13)


def test_forecast_asks_for_what_the_predictor_says(trace: Path, checkpoint: Path) -> None:
    data = data_of(trace)
    predictor = load_predictor(checkpoint)
    (batch,) = choose_windows(data, "test", 1, 5)
    keep_T = torch.arange(5)
    with torch.no_grad():
        p_TPHE = predictor.probabilities(batch)[0].half()
    threshold = float(p_TPHE.median())
    plan = forecast_plan(foreseen(predictor, batch, keep_T), threshold)
    asked = 0
    for t in range(5):
        for p in range(L + 1):
            wanted = {(layer, h, e): value for layer, h, pairs in plan[t][p] for e, value in pairs}
            expected = {
                ((p + h) % L, h + 1, e): pytest.approx(float(p_TPHE[t, p, h, e]))
                for h in range(2)
                for e in range(E)
                if p_TPHE[t, p, h, e] >= threshold
            }
            assert wanted == expected
            assert [h for _, h, _ in plan[t][p]] == sorted(h for _, h, _ in plan[t][p])
            assert all(q == sorted(q, key=lambda pair: -pair[1]) for _, _, q in plan[t][p])
            asked += len(wanted)
    assert asked > 100


def test_oracle_asks_for_the_next_calls(trace: Path) -> None:
    (document,) = load_documents(data_of(trace), "test", 1, 3)
    make_plans([document], 3, {})
    events = document.events()
    assert events[L + 1] == (1, document.experts_TLK[1][1])
    for t in range(3):
        for p in range(L + 1):
            done = t * L + p
            expected = [(*events[done + h], h + 1) for h in range(3) if done + h < len(events)]
            found = [(layer, [e for e, _ in pairs], h) for layer, h, pairs in document.plans["oracle"][t][p]]
            assert found == expected


def test_predictor_of_another_trace_is_refused(trace: Path, tmp_path: Path) -> None:
    other = write_trace_of_three_layers(tmp_path / "other")
    file = save_predictor(data_of(other), tmp_path / "p.ckpt")
    with pytest.raises(CheckpointError, match="trained for layers=3"):
        replay(quick(checkpoints=[str(file)]), shape(), {"t": data_of(trace)}, tmp_path)


def write_trace_of_three_layers(folder: Path) -> Path:
    stack = {"decoder": stack_info(L=3, E=E, K=K, D=None, hidden="none")}
    header = header_for(stack, documents=40, phases=["decode"])
    write_trace(folder, stack, shards=[[12] * 40], header=header, phases=(1,), routers=False)
    return folder


# ---------------------------------------------------------------------- scripts


def test_script_takes_the_place_of_trace_and_predictor(trace: Path, checkpoint: Path, tmp_path: Path) -> None:
    script = tmp_path / "folder" / "s.safetensors"
    settings = quick(variants=["forecast", "lru"], residency=[0.25], script=str(script), documents=2)
    made = replay(replace(settings, checkpoints=[str(checkpoint)]), shape(), {"t": data_of(trace)}, tmp_path)
    elsewhere = RoutingDataModule(tmp_path / "nowhere", phase="decode")
    found = replay(replace(settings, documents=1, tokens=5), shape(), {"x": elsewhere}, tmp_path)
    assert found["replay"]["predictor"] == "mlp"
    for key in ("traces", "split"):
        assert found[key] == made[key]
    again = replay(settings, shape(), {"x": elsewhere}, tmp_path)
    for mine, theirs in zip(again["rows"], made["rows"], strict=True):
        assert [mine[c] for c in LABELS] == [theirs[c] for c in LABELS]
    lru_hits = [
        row["hit_rate"] for found in (again, made) for row in found["rows"] if row["variant"] == "lru"
    ]
    assert lru_hits[0] == lru_hits[1]
    from_trace = replace(settings, script=None, checkpoints=[str(checkpoint)])
    runs = [Replay(from_trace, shape(), "t", data_of(trace), tmp_path)]
    runs.append(Replay(settings, shape(), "x", elsewhere, tmp_path))
    plans = [[document.plans for document in run.documents] for run in runs]
    assert plans[0] == plans[1]
    with pytest.raises(ConfigError, match="has 3 documents of 6 tokens and 4 are asked for"):
        replay(replace(settings, documents=3), shape(), {"x": elsewhere}, tmp_path)
    with pytest.raises(ConfigError, match="Trace t routes 4 layers"):
        replay(settings, shape(num_hidden_layers=5), {"x": elsewhere}, tmp_path)


def test_files_that_are_no_script_are_refused(trace: Path, tmp_path: Path) -> None:
    script = tmp_path / "s.safetensors"
    script.write_bytes(b"nothing of the kind")
    with pytest.raises(TraceError, match="is no script of a replay"):
        replay(quick(script=str(script)), shape(), {"t": data_of(trace)}, tmp_path)
    script.unlink()
    save_script(make_script("t", data_of(trace), "test", 1, 3, None), script)
    settings = quick(script=str(script), variants=["forecast"], documents=1, warmup=0, tokens=3)
    with pytest.raises(ConfigError, match="need a predictor"):
        replay(settings, shape(), {"t": data_of(trace)}, tmp_path)
    assert [d.experts_TLK for d in load_script(script).documents] == [
        d.experts_TLK for d in load_documents(data_of(trace), "test", 1, 3)
    ]


# ---------------------------------------------------------------------- what policies learn


def test_what_is_learned_travels_with_the_script(tmp_path: Path) -> None:
    data = data_of(write_decode_trace(tmp_path / "trace"))
    script = make_script("tiny", data, "test", 2, 6, None)
    assert script.fitted is not None
    save_script(script, tmp_path / "a.safetensors")
    assert load_script(tmp_path / "a.safetensors").fitted == script.fitted
    train = documents_of(data, "train")["none"]
    assert sum(map(sum, script.fitted.uses_LE)) == sum(len(w.expert_M) for w in train)
    assert script.fitted.misses_C[0] == sum(len(w.expert_M) for w in train)
    for slots in (1, K * L, E * L):
        assert script.fitted.discount(slots) == pytest.approx(fit_discount(join(train), slots))
    save_script(make_script("tiny", data, "test", 2, 6, None, learns=False), tmp_path / "b.safetensors")
    settings = quick(variants=["static"], script=str(tmp_path / "b.safetensors"), documents=1)
    with pytest.raises(ConfigError, match="made without training documents, which static needs"):
        replay(settings, shape(), {"tiny": data}, tmp_path / "run")
