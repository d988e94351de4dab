"""Whose routing a plan is simulated with, and what stands in for a predictor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from specgate.errors import BudgetError, ConfigError
from specgate.policy.roofline import RUNTIMES, ModelSizes, costs_of
from specgate.policy.workload import Workload, decoding, join, oracle_forecasts
from specgate.report.plan_case import Case, choose_case, likely_forecasts, timing
from specgate.report.plan_run import Outcome, binds, case_slots, row_of, run_all, run_policy, scaled_share
from specgate.report.plan_sample import load_sample, write_sample
from specgate.report.plan_settings import PlanSettings
from specgate.report.plan_sizes import sizes_of
from specgate.report.simulate_trace import documents_of
from specgate.runtime import native
from specgate.traces.datamodule import RoutingDataModule
from tests.policy.machines import machine
from tests.report.replays import E, K, L, data_of, save_predictor, shape, write_decode_trace
from tests.report.test_plan_sizes import shape_of as bundled
from tests.traces.helpers import header_for, stack_info, write_trace

QUICK = PlanSettings(documents=1, tokens=8, warmup=1, train_documents=3, runtime="fused")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> RoutingDataModule:
    return data_of(write_decode_trace(tmp_path_factory.mktemp("plan") / "trace"))


def routing(tokens: int, layers: int = 3, experts: int = 16, top_k: int = 4, seed: int = 0) -> Workload:
    rng = np.random.default_rng(seed)
    experts_TLK = np.argsort(rng.random((tokens, layers, experts)), axis=-1)[..., :top_k]
    return decoding([experts_TLK], experts)


def case_of(own: bool = True, batch_size: int = 1, documents: int = 3) -> Case:
    found = [routing(10, seed=i) for i in range(documents * batch_size)]
    found = [w.with_forecasts(oracle_forecasts(w, 2)) for w in found]
    return Case("t", own, join(found), tuple(found), batch_size, 1, "of nobody", {})


def tiny(layers: int = 3, experts: int = 16, top_k: int = 4) -> ModelSizes:
    return ModelSizes("m", layers, experts, top_k, 1000, 2000, 2, (500,) * layers, 900)


# ---------------------------------------------------------------------- forecasts that stand in


def _scored(workload: Workload, recall: list[float], seed: int) -> tuple[Any, Any, Any]:
    """Horizon, p and whether the expert is really used, of each entry."""
    found = likely_forecasts(workload, recall, seed)
    layers = workload.layers
    used = {(n, e) for n in range(workload.events) for e in workload.event(n)}
    horizon, p, right = [], [], []
    for point in range(workload.points):
        for h, e, q in found.at(point):
            event = (point // (layers + 1)) * layers + point % (layers + 1) + h - 1
            assert event < workload.events, "nothing is foreseen beyond the document"
            horizon.append(h)
            p.append(q)
            right.append((event, e) in used)
    return np.array(horizon), np.array(p), np.array(right)


def test_stand_in_forecasts_are_honest_and_as_good_as_asked() -> None:
    horizon, p, right = _scored(routing(400), [0.8, 0.7, 0.5], 0)
    for h, recall in ((1, 0.8), (2, 0.7), (3, 0.5)):
        mine = horizon == h
        assert right[mine].mean() == pytest.approx(recall, abs=0.03)
        assert p[mine].mean() == pytest.approx(recall, abs=0.03)
    for low in (0.2, 0.4, 0.6, 0.8):
        mine = (p >= low) & (p < low + 0.2)
        assert right[mine].mean() == pytest.approx(p[mine].mean(), abs=0.04)


@settings(max_examples=20, deadline=None)
@given(recall=st.floats(0.3, 1), tokens=st.integers(1, 6), seed=st.integers(0, 99))
def test_as_many_are_named_as_are_used(recall: float, tokens: int, seed: int) -> None:
    work = routing(tokens, seed=seed)
    mine, known = likely_forecasts(work, [recall, recall], seed), oracle_forecasts(work, 2)
    assert np.array_equal(np.diff(mine.start_P1), np.diff(known.start_P1))


def test_perfect_recall_is_the_oracle() -> None:
    work = routing(20)
    mine, known = likely_forecasts(work, [1.0, 1.0], 0), oracle_forecasts(work, 2)
    assert np.array_equal(mine.expert_M, known.expert_M)
    assert mine.p_M.min() == 1


def test_the_same_seed_says_the_same() -> None:
    one, same, other = (likely_forecasts(routing(20), [0.6], seed) for seed in (1, 1, 2))
    assert np.array_equal(one.p_M, same.p_M)
    assert not np.array_equal(one.expert_M, other.expert_M)


def test_layers_that_use_everything_leave_nobody_to_be_wrong_about() -> None:
    work = routing(5, experts=4, top_k=4)
    horizon, _, right = _scored(work, [0.5], 0)
    assert right.all()
    assert len(horizon) < 5 * 3 * 4, "what is not named is missed"


# ---------------------------------------------------------------------- choosing


def test_a_trace_of_the_same_shape_is_the_models_own(data: RoutingDataModule) -> None:
    sizes = sizes_of(shape())
    found = choose_case(QUICK, sizes, "olmoe", {"other": data, "mine": data})
    assert (found.name, found.own) == ("other", True)
    assert found.identity["name"] == "other"
    assert len(found.documents) == QUICK.documents + QUICK.warmup
    assert {w.steps for w in found.documents} == {QUICK.tokens}
    assert "foresee 82 / 82 / 81 %" in found.forecasts


def test_another_models_routing_stands_in_and_says_so(data: RoutingDataModule) -> None:
    found = choose_case(QUICK, sizes_of(shape(num_hidden_layers=5)), "olmoe", {"t": data})
    assert (found.name, found.own) == ("t", False)
    assert (found.train.layers, found.train.experts, found.train.top_k) == (L, E, K)


def test_a_predictor_foresees_its_own_trace(data: RoutingDataModule, tmp_path: Path) -> None:
    checkpoint = str(save_predictor(data, tmp_path / "predictor.ckpt"))
    asked = replace(QUICK, checkpoints=[checkpoint])
    found = choose_case(asked, sizes_of(shape()), "olmoe", {"t": data})
    assert found.forecasts == "of mlp"
    assert all(w.forecasts is not None for w in found.documents)
    with pytest.raises(ConfigError, match="no trace of tiny that it could foresee"):
        choose_case(asked, sizes_of(shape(num_hidden_layers=5)), "olmoe", {"t": data})


@pytest.mark.parametrize(
    ("family", "name", "routed"),
    [("olmoe", "olmoe_ref", (8, 32, 4)), ("switch_transformers", "switch_ref", (6, 8, 1))],
)
def test_without_a_trace_a_bundled_models_routing_stands_in(
    family: str, name: str, routed: tuple[int, int, int], tmp_path: Path
) -> None:
    lost = RoutingDataModule(tmp_path / "nowhere", phase="decode")
    found = choose_case(replace(QUICK, tokens=20), tiny(), family, {"lost": lost})
    assert (found.name, found.own, found.missing, found.identity) == (name, False, ("lost",), {})
    assert (found.train.layers, found.train.experts, found.train.top_k) == routed
    assert found.train.documents == QUICK.train_documents
    assert [w.steps for w in found.documents] == [20, 20]
    seen = {tuple(w.expert_M.tolist()) for w in (*found.documents, found.train.document(0))}
    assert len(seen) == 3, "no document is fitted on and run"


def test_routing_of_prompts_stands_in_for_nobody(tmp_path: Path) -> None:
    """A prompt's routing is another one; the model's own may be taken for want of better."""
    stack = {"decoder": stack_info(L=L, E=E, K=K, D=None, hidden="none")}
    folder = tmp_path / "prefill"
    write_trace(folder, stack, shards=[[12] * 40], header=header_for(stack, documents=40), routers=False)
    read = RoutingDataModule(folder, phase="prefill", window=12, batch_size=8)
    assert choose_case(QUICK, sizes_of(shape(num_hidden_layers=5)), "olmoe", {"t": read}).name == "olmoe_ref"
    assert choose_case(QUICK, sizes_of(shape()), "olmoe", {"t": read}).own


def test_a_bundled_model_has_its_own_routing() -> None:
    found = choose_case(QUICK, sizes_of(bundled("olmoe_ref")), "olmoe", {})
    assert (found.name, found.own) == ("olmoe_ref", True)


def test_the_bundled_routing_is_real() -> None:
    """The experts of a token come back at the next one more often than by chance."""
    for work in load_sample("olmoe", 128).documents["train"]:
        assert all(len(work.event(n)) == 4 for n in range(work.events))
    work = join(load_sample("olmoe", 128).documents["train"])
    again = [len({*work.event(n)} & {*work.event(n + 8)}) for n in range(0, work.events - 8)]
    assert np.mean(again) > 1.2 * 4 * 4 / 32


def test_a_sample_is_made_of_a_trace(data: RoutingDataModule, tmp_path: Path) -> None:
    path = write_sample(data.paths[0], "mine", tmp_path)
    with safe_open(path, framework="numpy") as file:
        first = file.get_tensor("train.0")
        assert file.metadata() == {"experts": str(E)}
    (work,) = documents_of(data, "train", 1)["none"]
    assert first.shape == (work.steps, L, K)
    assert first.reshape(-1).tolist() == work.expert_M.tolist()


def test_too_few_documents_are_refused(data: RoutingDataModule) -> None:
    with pytest.raises(ConfigError, match=r"too few for plan\.batch_size=50"):
        choose_case(replace(QUICK, batch_size=50), sizes_of(shape()), "olmoe", {"t": data})


# ---------------------------------------------------------------------- costs


def test_own_routing_has_the_models_own_costs() -> None:
    case = case_of()
    found = timing(case, tiny(), machine(), QUICK, 1500, 64)
    work = case.together(case.documents)
    want = costs_of(tiny(), work, machine(), block_bytes=1500, context=64, runtime=RUNTIMES["fused"])
    assert found.steps_per_step == 1
    assert np.array_equal(found.run.exec_ns_N, want.exec_ns_N)
    assert np.array_equal(found.run.pre_ns_N, want.pre_ns_N)
    assert found.run.copy_ns == want.copy_ns


def test_a_stand_in_moves_the_bytes_of_the_planned_model() -> None:
    """6 layers of 2 of 32 experts, by the routing of 3 layers of 4 of 16: twice the bytes for each half."""
    sizes = tiny(layers=6, experts=32, top_k=2)
    case = case_of(own=False)
    found = timing(case, sizes, machine(), QUICK, 1500, 64)
    assert found.steps_per_step == 2
    assert found.run.expert_bytes == 1500 * 2 / 4
    whole = row_of("x", Outcome(0, 0, 12, 0, 12 * 750, 0, 0, 0, 1, 1, 100, 50, 50), found, 750)
    assert whole["demand_bytes"] == 6 * 2 * 1500, "every expert of a token"
    event = costs_of(
        sizes, routing(1, 6, 32, 2), machine(), block_bytes=1500, context=64, runtime=RUNTIMES["fused"]
    )
    assert found.run.exec_ns_N.mean() == pytest.approx(event.exec_ns_N.mean())
    assert found.run.pre_ns_N.mean() == pytest.approx(event.pre_ns_N.mean())


@given(mine=st.floats(0.01, 0.9), theirs=st.floats(0.01, 0.9))
def test_shares_scale_by_what_a_step_uses(mine: float, theirs: float) -> None:
    assert scaled_share(mine, mine, theirs) == pytest.approx(theirs)
    assert scaled_share(1.0, mine, theirs) == pytest.approx(1.0)
    assert scaled_share(mine / 2, mine, theirs) == pytest.approx(theirs / 2)
    shares = [scaled_share(x, mine, theirs) for x in np.linspace(0.01, 1, 50)]
    assert shares == sorted(shares)
    assert scaled_share(0.37, mine, mine) == pytest.approx(0.37)


def test_slots_of_the_case() -> None:
    own, other = case_of(), case_of(own=False)
    assert case_slots(20, tiny(), own) == 20
    assert case_slots(48, tiny(), own) == case_slots(10**6, tiny(), other) == 48
    with pytest.raises(BudgetError, match=r"3 slots hold fewer experts than the 4 that one step of 1"):
        case_slots(3, tiny(), own)
    assert case_slots(3, tiny(), other) == 4


# ---------------------------------------------------------------------- running


@pytest.mark.skipif(not native.available(), reason="the native core is not built")
def test_no_cache_costs_what_its_copies_do() -> None:
    case = case_of()
    costs = timing(case, tiny(), machine(), QUICK, 2000, 64)
    found = run_policy("on_demand", case, costs, 4, case.blocks)
    work = case.together(case.documents[1:])
    assert (found.steps, found.tokens, found.hits) == (20, 20, 0)
    assert found.demand_bytes == len(work.expert_M) * 2000
    compute = costs.run.part(10 * 3, 30 * 3).compute_ns
    assert found.total_ns == pytest.approx(compute + len(work.expert_M) * costs.run.copy_ns, rel=1e-3)


@pytest.mark.skipif(not native.available(), reason="the native core is not built")
@pytest.mark.parametrize(("own", "batch_size"), [(True, 1), (True, 2), (False, 1)])
def test_nobody_beats_the_oracle_nor_everything_on_the_device(own: bool, batch_size: int) -> None:
    case = case_of(own, batch_size)
    costs = timing(case, tiny(), machine(), replace(QUICK, batch_size=batch_size), 2000, 64)
    rows = {row["policy"]: row for row in run_all(case, costs, 24, case.blocks)}
    speeds = {name: row["tokens_per_second"] for name, row in rows.items()}
    assert speeds["on_demand"] <= speeds["lru"] <= speeds["oracle"] <= speeds["resident"] * (1 + 1e-9)
    assert rows["oracle"]["share_of_gain"] == pytest.approx(1)
    assert max(rows[name]["share_of_gain"] for name in ("lru", "lfru")) == pytest.approx(0)


def test_with_a_slot_for_each_nothing_is_simulated() -> None:
    def never(*_: Any) -> Outcome:
        pytest.fail("something was simulated")

    case = case_of()
    costs = timing(case, tiny(), machine(), QUICK, 2000, 64)
    rows = run_all(case, costs, case.blocks, case.blocks, never)
    assert len({row["tokens_per_second"] for row in rows}) == 1
    step = costs.run.compute_ns / 30
    assert rows[0]["tokens_per_second"] == pytest.approx(1e9 / step, rel=1e-6)
    assert {row["share_of_gain"] for row in rows} == {None}


@pytest.mark.parametrize(
    ("stall", "file", "binding"), [(0.8, 0, "link"), (0.8, 10_000, "file"), (0.1, 0, "memory")]
)
def test_what_binds_is_what_takes_most_time(stall: float, file: float, binding: str) -> None:
    costs = timing(case_of(), tiny(), machine(), QUICK, 2000, 64).run
    row = {"stall_share": stall, "demand_bytes": 10_000, "prefetch_bytes": 0, "file_bytes": file}
    assert binds(row, {"memory": 0.7, "compute": 0.1, "launches": 0.2, "host": 0.0}, costs) == binding
