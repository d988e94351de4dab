"""mode=plan: what it refuses, what it finds, what it says, and what that looks like."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from specgate.errors import ConfigError
from specgate.report.html import plain_page
from specgate.report.plan import Planner, Split, plan
from specgate.report.plan_case import Case, Timing
from specgate.report.plan_page import publish_plan, tables_of
from specgate.report.plan_run import Outcome
from specgate.report.plan_settings import PlanSettings, check_choices
from specgate.report.plan_sizes import Footprint
from specgate.report.plan_verdict import verdict, worth
from specgate.report.record import Run, read_record
from specgate.runtime import native
from specgate.traces.datamodule import RoutingDataModule
from tests.policy.machines import machine
from tests.report.replays import data_of, shape, write_decode_trace
from tests.test_configs import CONF

SLOT = 6144  # bytes of an expert of the tiny shape
QUICK: dict[str, Any] = {"documents": 1, "tokens": 8, "train_documents": 2, "warmup": 1, "context": 64}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> RoutingDataModule:
    return data_of(write_decode_trace(tmp_path_factory.mktemp("plan") / "trace"))


def need(context: int = 64) -> Footprint:
    return Planner(PlanSettings(**QUICK), shape(), machine(), {}).split(context=context).need


def budget(slots: float) -> float:
    """GB that leave room for so many experts."""
    return (need().fixed + slots * SLOT + 1) * 1e-9


def by_hits(*rates: float) -> Callable[..., Outcome]:
    """A simulator that finds these shares on the device: without a cache, lru, lfru, priced, oracle."""
    hits = dict(zip(("on_demand", "lru", "lfru", "priced", "oracle"), rates, strict=True))

    def run(name: str, case: Case, timing: Timing, slots: int, host: int) -> Outcome:
        work = case.together(case.documents[case.warmup :])
        asked = float(len(work.expert_M))
        missed = asked * (1 - hits[name])
        stall = missed * timing.run.copy_ns
        total = timing.run.compute_ns / timing.run.events * work.events + stall
        sizes = missed * timing.run.expert_bytes
        return Outcome(
            asked - missed, 0, missed, 0, sizes, 0, 0, 0, work.steps, work.steps, total, stall, stall
        )

    return run


# ---------------------------------------------------------------------- nonsense


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"budget_gb": -1}, "budget_gb=-1 is no amount of memory"),
        ({"budget_gb": 0}, "budget_gb=0 is no amount of memory"),
        ({"budget_gb": float("nan")}, "budget_gb=nan"),
        ({"budget_gb": "ten"}, "budget_gb=ten is no amount"),
        ({"budget_gb": True}, "budget_gb=True is no amount"),
        ({"budget_gb": 40}, "budget_gb=40 is more than the 8 GB of box; write 8 or less"),
        ({"host_gb": -2}, "host_gb=-2 is no amount"),
        ({"host_gb": 100}, "host_gb=100 is more than the 16 GB of box"),
        ({"context": 0}, r"plan\.context=0 makes no sense; write a whole number from 1"),
        ({"context": 1.5}, r"plan\.context=1\.5"),
        ({"batch_size": 0}, r"plan\.batch_size=0"),
        ({"tokens": 1}, r"plan\.tokens=1"),
        ({"codec": "int2"}, r"plan\.codec=int2 is unknown; choose one of none, int8, int4, fp8"),
        ({"runtime": "magic"}, r"plan\.runtime=magic is unknown; choose one of transformers"),
        ({"split": "all"}, r"plan\.split=all is unknown"),
        ({"recall": []}, r"plan\.recall=\[\] are no shares"),
        ({"recall": [0.9, 1.2]}, r"plan\.recall=\[0\.9, 1\.2\] are no shares"),
        ({"checkpoints": ["a", "b"]}, r"plan\.checkpoints names 2 predictors"),
    ],
)
def test_nonsense_is_refused_in_one_clear_sentence(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as raised:
        plan(PlanSettings(**QUICK | changed), shape(), machine(), {}, run=by_hits(0, 0, 0, 0, 0))
    text = str(raised.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert ". " not in text, "one sentence"


def test_impossible_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="has 8 experts in a layer and uses 9 per token"):
        plan(PlanSettings(**QUICK), shape(num_experts_per_tok=9), machine(), {})
    with pytest.raises(ConfigError, match=r"plan\.context=512 is more than the 256 tokens that tiny can see"):
        plan(PlanSettings(**QUICK | {"context": 512}), shape(max_position_embeddings=256), machine(), {})


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("shape=qwen3_30b", "shape=qwen3_30b is unknown; did you mean qwen3_30b_a3b?"),
        ("shape=zzz", "shape=zzz is unknown; choose one of deepseek_v2_lite, gpt_oss_120b"),
        ("hardware=rtx309", r"hardware=rtx309 is unknown; did you mean rtx3090\?"),
        ("nvme=floppy", "nvme=floppy is unknown; choose one of gen3, gen4, gen5, sata"),
    ],
)
def test_unknown_choices_are_refused_in_one_clear_sentence(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as raised:
        check_choices(["mode=plan", override, "budget_gb=10"], CONF)
    assert "\n" not in str(raised.value)


def test_known_choices_pass() -> None:
    check_choices(
        ["shape=gpt_oss_20b", "hardware=rtx3090", "nvme=gen4", "-m", "shape.name=x", "shape="], CONF
    )
    check_choices(["shape=${x}", "data=[a,b]"], CONF)


# ---------------------------------------------------------------------- fitting


def test_a_budget_becomes_slots_as_an_offloaded_model_makes_them() -> None:
    split = Planner(PlanSettings(**QUICK | {"budget_gb": budget(10)}), shape(), machine(), {}).split()
    assert (split.slots, split.fits, split.resident) == (10, True, False)
    assert split.need.fixed + 2 * SLOT <= split.least_gb * 1e9 < (split.need.fixed + 2 * SLOT) * 1.001
    assert split.need.fixed + 32 * SLOT <= split.all_gb * 1e9 < (split.need.fixed + 32 * SLOT) * 1.001


def test_slots_are_never_more_than_there_are_experts() -> None:
    assert Split(need(), 10**9, 10**9).slots == 32
    assert Split(need(), 0, 10**9).slots < 0
    assert not Split(need(), need().fixed + SLOT, 10**9).fits, "a token uses two"
    assert Split(need(), 10**9, 5 * SLOT + 1).in_host == 5


def test_more_context_leaves_fewer_slots() -> None:
    found = [Split(need(context), need().fixed + 20 * SLOT, 10**9).slots for context in (32, 64, 96)]
    assert found[0] > found[1] == 20 > found[2]


def test_what_does_not_fit_is_said_and_not_raised(data: RoutingDataModule) -> None:
    def never(*_: Any) -> Outcome:
        pytest.fail("something was simulated")

    found = plan(PlanSettings(**QUICK | {"budget_gb": budget(1)}), shape(), machine(), {"t": data}, run=never)
    (line,) = found["verdict"]
    assert line.startswith(f"tiny does not fit {budget(1):g} GB of box")
    assert f"the least budget is {found['plan']['least_gb']:g} GB" in line
    assert not found["plan"]["fits"]
    assert found["rows"] == found["codecs"] == []
    with_least = Planner(
        PlanSettings(**QUICK | {"budget_gb": found["plan"]["least_gb"]}), shape(), machine(), {}
    )
    assert with_least.split().fits


def test_everything_on_the_device_needs_no_prediction(data: RoutingDataModule) -> None:
    found = plan(PlanSettings(**QUICK), shape(), machine(), {"t": data}, run=by_hits(0, 0, 0, 0, 0))
    assert found["plan"]["resident"]
    text = " ".join(found["verdict"])
    assert "tiny fits 8 GB of box whole" in text
    assert "prediction is not worth it: there is nothing to fetch" in text


# ---------------------------------------------------------------------- what it says


def planned(data: RoutingDataModule, *rates: float, model: Any = None, **changed: Any) -> dict[str, Any]:
    values = QUICK | {"budget_gb": budget(12), "runtime": "fused"} | changed
    return plan(PlanSettings(**values), model or shape(), machine(), {"t": data}, run=by_hits(*rates))


def test_a_good_forecast_is_worth_it(data: RoutingDataModule) -> None:
    found = planned(data, 0, 0.4, 0.3, 0.7, 0.8)
    rows = {row["policy"]: row for row in found["rows"]}
    assert rows["priced"]["share_of_gain"] == pytest.approx(0.75)
    text = " ".join(found["verdict"])
    gain = rows["priced"]["tokens_per_second"] / rows["lru"]["tokens_per_second"]
    assert f"make it {gain:.2f} times as fast as the LRU cache, 75% of the time that an oracle saves" in text
    assert "Prediction is worth it" in text
    assert "12 of 32 experts (38%)" in text
    assert "Bound by the link" in text
    assert "not measured" in text


def test_the_better_cache_is_what_prediction_has_to_beat(data: RoutingDataModule) -> None:
    text = " ".join(planned(data, 0, 0.1, 0.6, 0.61, 0.8)["verdict"])
    assert "Prediction is not worth it" in text
    assert "as fast as the LFRU cache, 5% of the time that an oracle saves" in text


def test_an_oracle_that_gains_nothing_says_so(data: RoutingDataModule) -> None:
    text = " ".join(planned(data, 0, 0.5, 0.5, 0.5, 0.505)["verdict"])
    assert "Prediction is not worth it: even an oracle gains only" in text


def test_losing_is_not_called_a_gain(data: RoutingDataModule) -> None:
    found = planned(data, 0, 0.5, 0.4, 0.3, 0.9)
    assert "make it 0." in worth({r["policy"]: r for r in found["rows"]}, "of nobody")
    assert "0% of the time that an oracle saves" in " ".join(found["verdict"])


def test_codecs_save_bytes_of_the_link_and_of_host_memory(data: RoutingDataModule) -> None:
    found = planned(data, 0, 0.4, 0.4, 0.6, 0.8, host_gb=16 * SLOT * 1e-9)
    codecs = {row["codec"]: row for row in found["codecs"]}
    assert codecs["none"]["in_host"] == 16
    assert codecs["int4"]["in_host"] == 32
    assert codecs["int4"]["priced"] > codecs["none"]["priced"]
    text = " ".join(found["verdict"])
    assert "Host memory holds 16 of 32 experts: 16 (98.3 KB) are read from disk when needed" in text
    assert "Best codec: int" in text
    assert "changes values a little" in text


def test_another_models_routing_is_labelled(data: RoutingDataModule) -> None:
    deeper = shape(num_hidden_layers=5)
    fixed = Planner(PlanSettings(**QUICK), deeper, machine(), {}).split().need.fixed
    found = planned(data, 0, 0.4, 0.4, 0.6, 0.8, model=deeper, budget_gb=(fixed + 20 * SLOT) * 1e-9)
    assert found["plan"]["own_trace"] is False
    text = " ".join(found["verdict"])
    assert "No trace of tiny is here: its hit rates are those of t (4 layers, 2 of 8 experts)" in text
    assert "an estimate" in text
    assert "the trace of another model, t" in tables_of(found)[1].notes[0]


def test_without_any_trace_the_bundled_routing_is_labelled() -> None:
    values = QUICK | {"budget_gb": budget(12), "runtime": "fused"}
    found = plan(PlanSettings(**values), shape(), machine(), {}, run=by_hits(0, 0.4, 0.4, 0.6, 0.8))
    text = " ".join(found["verdict"])
    assert "those of olmoe_ref, a small model that comes with specgate (8 layers, 4 of 32 experts)" in text
    assert found["traces"] == []


def test_the_curve_starts_where_it_runs_and_ends_where_all_fits(data: RoutingDataModule) -> None:
    found = planned(data, 0, 0.4, 0.4, 0.6, 0.8)
    slots = [row["slots"] for row in found["curve"]]
    assert slots == sorted(slots)
    assert (slots[0], slots[-1]) == (2, 32)
    assert 12 in slots, "the budget that was asked for"
    assert found["curve"][-1]["lru"] == found["curve"][-1]["resident"]


def test_a_context_that_does_not_fit_is_shown_as_such(data: RoutingDataModule) -> None:
    found = planned(data, 0, 0.4, 0.4, 0.6, 0.8, model=shape(max_position_embeddings=100))
    assert [(row["context"], row["fits"]) for row in found["contexts"]] == [
        (16, True),
        (64, True),
        (256, False),
    ]
    assert "does not fit" in tables_of(found)[3].to_markdown()


# ---------------------------------------------------------------------- what it looks like


@pytest.mark.parametrize("fits", [True, False])
def test_a_page_is_written(data: RoutingDataModule, tmp_path: Path, fits: bool) -> None:
    found = planned(data, 0, 0.4, 0.3, 0.7, 0.8, budget_gb=budget(12 if fits else 1))
    path = Run("benchmark.py", {}).write(tmp_path, **found)
    record = read_record(path)
    assert record["verdict"] == verdict(found)
    with Console(record=True, width=160, file=(tmp_path / "shown").open("w")) as console:
        page = publish_plan(record, tmp_path, console)
    shown = " ".join(console.export_text().split())
    assert " ".join(found["verdict"][0].split()) in shown
    html = page.read_text(encoding="utf-8")
    assert html.count("<img") == (2 if fits else 1)
    assert "Where tiny lies" in (tmp_path / "tables.md").read_text()
    assert plain_page(record, "x", "y", [], [])


@pytest.mark.skipif(not native.available(), reason="the native core is not built")
def test_the_whole_mode(data: RoutingDataModule) -> None:
    values = QUICK | {"budget_gb": budget(12), "runtime": "fused"}
    found = plan(PlanSettings(**values), shape(), machine(), {"t": data})
    assert json.dumps(found, allow_nan=False)
    rows = {row["policy"]: row["tokens_per_second"] for row in found["rows"]}
    assert list(rows) == ["on_demand", "lru", "lfru", "priced", "oracle", "resident"]
    assert rows["on_demand"] <= rows["lru"] <= rows["oracle"] <= rows["resident"]
    again = plan(PlanSettings(**values), shape(), machine(), {"t": data})
    assert again == found, "nothing is left to chance"
