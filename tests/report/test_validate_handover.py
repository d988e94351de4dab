"""What handing over forecasts costs the host: read with a row's own, on the machine of the replay alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from numpy.typing import NDArray

from specgate.errors import ConfigError
from specgate.policy.roofline import RUNTIMES
from specgate.report import validate_handover
from specgate.report.record import hardware
from specgate.report.replay_script import Script, make_script
from specgate.report.replay_settings import VARIANTS, ReplaySettings, store_settings
from specgate.report.validate_costs import ADD_OPERATIONS, costs_by_profile, known_after_us
from specgate.report.validate_handover import HandOvers, is_machine, read_event, read_handover
from specgate.report.validate_page import lines_of
from specgate.runtime import native
from specgate.runtime.store import ExpertStore
from tests.policy.machines import machine, sizes
from tests.policy.test_roofline import one_token
from tests.report.replays import E, L, data_of, quick, save_predictor, shape, write_decode_trace

pytestmark = pytest.mark.skipif(not native.available(), reason="the native core is not built")
AHEAD = [name for name, variant in VARIANTS.items() if variant.foresight]
FAST = 20_000  # ns of a layer


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Script:
    """Two documents of six tokens, with forecasts."""
    from specgate.calibration.load import load_predictor

    base = tmp_path_factory.mktemp("handover")
    data = data_of(write_decode_trace(base / "trace"))
    predictor = load_predictor(save_predictor(data, base / "predictor.ckpt"))
    return make_script("tiny", data, "test", 2, 6, predictor)


def settings_of(**more: Any) -> ReplaySettings:
    return quick(variants=list(VARIANTS), lookahead=2, **more)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Every hand-over takes two milliseconds, and is noted."""
    calls: list[tuple[Any, ...]] = []
    whole: Callable[..., None] = ExpertStore.foresee

    def foresee(self: ExpertStore, blocks_N: NDArray[Any], p_N: NDArray[Any], due_N: NDArray[Any]) -> None:
        calls.append((self.num_slots, self.settings, blocks_N, p_N, due_N))
        time.sleep(0.002)
        whole(self, blocks_N, p_N, due_N)

    monkeypatch.setattr(ExpertStore, "foresee", foresee)
    return calls


def test_a_slow_hand_over_is_found(script: Script, slow: list[tuple[Any, ...]]) -> None:
    found = read_handover(settings_of(), script, shape(), "oracle", 16, FAST)
    assert 2e6 * (6 * (L + 1) - 1) / (6 * (L + 1)) <= found.low <= found.ns <= found.high
    assert found.ns < 8e6
    # Of the second document, which is the first that is measured; nothing comes after its last layer
    assert len(slow) == (validate_handover.ROUNDS + 1) * (6 * (L + 1) - 1)
    slots, settings, blocks_N, p_N, due_N = slow[1]
    first, second = (script.documents[1].experts_TLK[0][layer] for layer in (1, 2))
    assert sorted(blocks_N) == sorted([E + e for e in first] + [2 * E + e for e in second])
    assert p_N.tolist() == [1.0] * 4
    assert sorted(due_N) == [2, 2, 3, 3], "counted from the first layer's call"
    assert (slots, settings.eviction) == (16, "belady")


@pytest.mark.parametrize("variant", AHEAD)
@pytest.mark.parametrize("slots", [2, 16, L * E])
def test_every_variant_with_forecasts_is_read(script: Script, variant: str, slots: int) -> None:
    found = read_handover(settings_of(), script, shape(), variant, slots, FAST)
    assert 0 < found.low <= found.ns <= found.high


def test_the_store_is_set_as_the_replay_s(script: Script, slow: list[tuple[Any, ...]]) -> None:
    settings = settings_of(price_scale=0.3, depth=2, prefetch_mib=1, threshold=0.9)
    read_handover(settings, script, shape(), "priced", 16, FAST)
    made, replayed = slow[0][1], store_settings(settings, "priced")
    assert (made.eviction, made.price_scale, made.prefetch_depth) == ("priced", 0.3, 2)
    whole = replayed.prefetch_copy_bytes // shape().layout().block_bytes
    assert made.prefetch_copy_bytes == whole * validate_handover.SMALL.block_bytes
    assert max(p for call in slow for p in call[3]) < 0.9, "priced looks at forecasts that are not probable"
    assert store_settings(settings, "lru").price_scale is None
    slow.clear()
    assert read_handover(settings, script, shape(), "forecast", 16, FAST).ns < 1e5
    assert not slow, "nothing is as probable as the threshold"
    read_handover(settings, script, shape(), "forecast:0.1", 16, FAST)
    assert slow


def test_nothing_to_read(script: Script) -> None:
    with pytest.raises(ConfigError, match="no forecasts for lru in this script"):
        read_handover(settings_of(), script, shape(), "lru", 16, FAST)


def test_hand_overs_are_read_on_the_machine_of_the_replay_alone(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate_handover, "PACE_NS", FAST)
    here = hardware()
    assert is_machine(here)
    parts = (settings_of(), script, shape())
    row = {"variant": "oracle", "slots": 16}
    read = HandOvers(*parts, here)
    found = read.of(row)
    assert found is not None
    assert (read.how, read.of({"variant": "lru", "slots": 16})) == ("read", None)
    assert 0 < found["low"] <= found["us"] <= found["high"] < 1e4
    elsewhere = HandOvers(*parts, here | {"cpu": "another"})
    assert (elsewhere.how, elsewhere.of(row)) == ("unknown", {"us": 0, "low": 0, "high": 0})
    given = HandOvers(*parts, here | {"gpus": ["another"]}, 12.5)
    assert (given.how, given.of(row)) == ("given", {"us": 12.5, "low": 12.5, "high": 12.5})


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_time_that_is_none_is_refused(script: Script, value: float) -> None:
    with pytest.raises(ConfigError, match=r"--handover-us=.* is no time; write microseconds"):
        HandOvers(settings_of(), script, shape(), hardware(), value)


def test_the_calls_around_an_event_are_read(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = read_event(shape(), "cpu", 100, FAST)
    assert 0 < quiet.low <= quiet.ns <= quiet.high
    whole: Callable[..., list[int]] = ExpertStore.acquire

    def acquire(self: ExpertStore, layer: int, experts: list[int]) -> list[int]:
        time.sleep(0.002)
        return whole(self, layer, experts)

    monkeypatch.setattr(ExpertStore, "acquire", acquire)
    assert 2e6 <= read_event(shape(), "cpu", 20, FAST).ns < 8e6
    here = HandOvers(settings_of(), script, shape(), hardware()).event("cpu")
    assert here is not None
    assert 2e3 <= here["us"] < 8e3
    there = HandOvers(settings_of(), script, shape(), hardware() | {"cpu": "another"})
    assert there.event("cpu") is None


@pytest.mark.gpu
def test_the_calls_around_an_event_are_read_on_a_gpu() -> None:
    assert 0 < read_event(shape(), "cuda", 200, FAST).ns < 5e6


# ---------------------------------------------------------------------- what follows


def test_when_a_forecast_is_known() -> None:
    """18 launches of the experts and those that add, 5 us each; 7 to send slots, 20 to send and wait."""
    own = {"operation_us": 5, "readback_us": 10, "upload_us": 20}
    parts = (RUNTIMES["replay"], sizes(), None, 0)
    sends = machine(**own, send_us=7)
    launched = (RUNTIMES["replay"].expert_launches + ADD_OPERATIONS) * 5
    assert costs_by_profile(parts, sends, one_token(), 3.0).forecast_ns == 1e3 * (7 + launched + 3)
    waits = costs_by_profile(parts, machine(**own), one_token())
    assert waits.forecast_ns == 1e3 * (20 + launched)
    graphs = (replace(RUNTIMES["replay"], graphs=True), sizes(), None, 0)
    known = {"graph_us": 9, "node_us": 0.1, "write_us": 4, "answer_us": 6}
    captured = machine(**own, send_us=7, **known)
    assert costs_by_profile(graphs, captured, one_token(), 3.0).forecast_ns == 1e3 * (4 + 9 + 3)
    processor = machine(**own, ahead=False)
    costs = costs_by_profile(parts, processor, one_token(), 3.0)
    assert costs.forecast_ns == pytest.approx(costs.exec_ns_N.mean() + 1e3 * (ADD_OPERATIONS * 5 + 3))
    assert known_after_us(RUNTIMES["replay"], processor, costs, 0.0) == costs.forecast_ns * 1e-3 - 3


def test_the_profile_s_slowdown_and_the_hand_over_are_in_the_costs() -> None:
    own = {"operation_us": 5, "readback_us": 10, "upload_us": 20, "send_us": 7, "launch_slowdown": 0.15}
    parts = (RUNTIMES["replay"], sizes(), None, 0)
    without, with_it = (costs_by_profile(parts, machine(**own), one_token(), us) for us in (0.0, 3.0))
    assert without.link_slowdown == with_it.link_slowdown == 0.15
    assert without.launch_ns_N is not None
    assert with_it.launch_ns_N is not None
    assert with_it.launch_ns_N - without.launch_ns_N == pytest.approx([3_000, 3_000])
    assert with_it.compute_ns > without.compute_ns


def page_lines(how: str | None, slowdown: float | None, *times: float | None) -> str:
    profile = {"link_gb_per_s": 53.1, "link_latency_us": 9.0, "operation_us": 12.0, "readback_us": None}
    profile |= {"send_us": 8.0} if slowdown is None else {"send_us": 8.0, "launch_slowdown": slowdown}
    rows = [{"handover": None if us is None else {"us": us}} for us in times]
    record = {"profile": profile, "rows": rows, "summary": {}, "skipped": []}
    record |= {"replayed_on": {"cpu": "box", "cores": 2, "gpus": []}}
    return " ".join(lines_of(record if how is None else record | {"handover": how}))


def test_the_page_says_what_the_profile_has() -> None:
    read = page_lines("read", 0.125, None, 14.0, 31.5)
    assert "12 us of the host for an operation, 8 us to send slots ahead" in read
    assert "launches 12.5% longer beside copies for forecasts." in read
    assert "Handing over a layer's forecasts takes the host 14 to 31.5 us (read)." in read
    assert "takes the host 20 us (given)" in page_lines("given", 0.0, 20.0, 20.0)
    assert "is not charged" in page_lines("unknown", 0.0, 0.0)
    assert "Handing over" not in page_lines("read", 0.0, None)
    assert "The profile:" not in page_lines(None, None), "records of before are shown as they were"
