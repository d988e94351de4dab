"""Forecasts are believed as far as earlier ones came true: against a reference made from the definition."""

from __future__ import annotations

import bisect
import math

import numpy as np
import pytest

from specgate.errors import ConfigError
from specgate.policy.workload import Forecasts, Workload, decoding
from specgate.runtime import native
from specgate.runtime.source import ExpertSource
from specgate.runtime.store import ExpertStore, StoreSettings
from specgate.runtime.trust import trusted

pytestmark = pytest.mark.skipif(not native.available(), reason="the native core is not compiled")

EDGES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9)
PRIOR, HALF, CERTAIN = 16.0, 8192.0, 0.999


def cell_of(p: float, ahead: int) -> tuple[int, int]:
    return bisect.bisect_right(EDGES, p), ahead if ahead <= 4 else 5 if ahead <= 8 else 6


def reference(workloads: list[Workload]) -> list[np.ndarray]:
    """Every forecast is settled when its event is, in the order in which they were made."""
    cells: dict[tuple[int, int], list[float]] = {}
    found = []
    for w in workloads:
        assert w.forecasts is not None
        out: list[float] = []
        open_: dict[int, list[tuple[int, tuple[int, int], float]]] = {}
        for step in range(w.steps):
            end = (int(np.nonzero(w.document_S == w.document_S[step])[0][-1]) + 1) * w.layers
            for p in range(w.layers + 1):
                now = step * w.layers + p - 1
                if p:
                    used = set(w.event(now))
                    for expert, cell, stated in open_.pop(now, []):
                        seen = cells.setdefault(cell, [0.0, 0.0, 0.0])
                        seen[0] += 1
                        seen[1] += stated
                        seen[2] += expert in used
                        if seen[0] >= 2 * HALF:
                            seen[:] = [x / 2 for x in seen]
                here: list[tuple[int, float, int]] = []
                for h, expert, stated in w.forecasts.at(step * (w.layers + 1) + p):
                    said, total, uses = cells.get(cell_of(stated, h), (0.0, 0.0, 0.0))
                    kept = min(stated, CERTAIN)
                    logit = math.log(kept / (1 - kept)) if stated > 0 else -math.inf
                    logit += math.log((uses + PRIOR) / (said - uses + PRIOR))
                    logit -= math.log((total + PRIOR) / (said - total + PRIOR))
                    here.append((h, -1 / (1 + math.exp(-logit)) if said and stated > 0 else -stated, expert))
                    if now + h < end and stated > 0:
                        open_.setdefault(now + h, []).append((expert, cell_of(stated, h), kept))
                out += [-p for _, p, _ in sorted(here)]
        found.append(np.array(out))
    return found


def drawn(seed: int, tokens: int = 60, skew: float = 1.0, layers: int = 3, experts: int = 8) -> Workload:
    """Two documents; each expert comes with a chance of its own, which forecasts say to the power of skew."""
    random = np.random.default_rng(seed)
    chance_LE = random.beta(0.6, 1.8, (layers, experts))
    used_TLE = random.random((2 * tokens, layers, experts)) < chance_LE
    used_TLE[..., 0] |= ~used_TLE.any(axis=-1)
    K = int(used_TLE.sum(-1).max())
    experts_TLK = np.full((2 * tokens, layers, K), -1)
    for t in range(2 * tokens):
        for layer in range(layers):
            (which,) = np.nonzero(used_TLE[t, layer])
            experts_TLK[t, layer, : len(which)] = which
    w = decoding([experts_TLK[:tokens], experts_TLK[tokens:]], experts)
    H = 2 * layers
    p_PHE = np.empty((w.points, H, experts), dtype=np.float32)
    for point in range(w.points):
        for h in range(H):
            p_PHE[point, h] = chance_LE[(point % (layers + 1) + h) % layers] ** skew
    p_PHE[random.random(p_PHE.shape) < 0.02] = 1.0
    return w.with_forecasts(Forecasts.from_dense(p_PHE, least=0.01))


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_the_definition(seed: int) -> None:
    works = [drawn(seed, skew=0.5), drawn(seed, tokens=20, skew=2.0)]
    for ours, wanted in zip(trusted(works), reference(works), strict=True):
        assert ours.forecasts is not None
        np.testing.assert_allclose(ours.forecasts.p_M, wanted, rtol=2e-6, atol=1e-9)


def test_older_forecasts_count_less() -> None:
    works = [drawn(7, tokens=900, skew=s) for s in (1.0, 3.0)]
    for ours, wanted in zip(trusted(works), reference(works), strict=True):
        assert ours.forecasts is not None
        np.testing.assert_allclose(ours.forecasts.p_M, wanted, rtol=2e-6, atol=1e-9)


def gaps(w: Workload, from_step: int) -> tuple[float, float]:
    """Mean p of the forecasts from a step on, and how often they came true."""
    assert w.forecasts is not None
    said, came = [], []
    for step in range(from_step, w.steps):
        end = (int(np.nonzero(w.document_S == w.document_S[step])[0][-1]) + 1) * w.layers
        for p in range(w.layers + 1):
            for h, expert, stated in w.forecasts.at(step * (w.layers + 1) + p):
                due = step * w.layers + p - 1 + h
                if due < end:
                    said.append(stated)
                    came.append(expert in w.event(due))
    return float(np.mean(said)), float(np.mean(came))


@pytest.mark.parametrize("skew", [0.3, 3.0], ids=["too sure", "too modest"])
def test_wrong_probabilities_become_right(skew: float) -> None:
    w = drawn(1, tokens=150, skew=skew)
    (better,) = trusted([w])
    stated, came = gaps(w, 100)
    learned, _ = gaps(better, 100)
    assert abs(stated - came) > 0.1
    assert abs(learned - came) < 0.2 * abs(stated - came)


def test_right_probabilities_stay() -> None:
    w = drawn(2, tokens=150)
    (same,) = trusted([w])
    assert w.forecasts is not None
    assert same.forecasts is not None
    certain = w.forecasts.p_M == 1
    change = np.abs(same.forecasts.p_M - w.forecasts.p_M)[~certain]
    assert change.mean() < 0.02


def test_what_makes_no_sense_is_refused() -> None:
    w = drawn(0, tokens=3)
    with pytest.raises(ConfigError, match="without forecasts"):
        trusted([w.with_forecasts(None)])
    with pytest.raises(ConfigError, match="3 layers of 9 experts is another model's"):
        trusted([w, drawn(0, tokens=3, experts=9)])
    assert w.forecasts is not None
    beyond = Forecasts(
        w.forecasts.start_P1,
        w.forecasts.horizon_M,
        np.full_like(w.forecasts.expert_M, 8),
        w.forecasts.p_M,
    )
    with pytest.raises(ConfigError, match="none of the 8"):
        trusted([w.with_forecasts(beyond)])


def test_nothing_is_nothing() -> None:
    assert trusted([]) == []


def test_trust_is_lost_by_forecasts_that_do_not_come_true() -> None:
    """Experts 0 and 1 of each layer are said to be used with 0.9 and 0.3; 1 and 2 are."""
    fetched, source = {}, ExpertSource.open("olmoe_ref")
    for trust in (False, True):
        settings = StoreSettings(eviction="priced", price_scale=0.5, price_floor=0.2, trust=trust)
        with ExpertStore(source, 6, settings=settings) as store:
            wrong = 0
            for clock in range(1, 250):
                layer, later = clock % 8, (clock + 2) % 8
                store.advance(clock)
                store.acquire(layer, [1, 2])
                store.release(layer, [1, 2])
                before = store.state(later, 0)[0]
                store.prefetch_all(later, [(0, 0.9), (1, 0.3)], clock + 2)
                store.drain()
                wrong += clock > 200 and before == "ABSENT" and store.state(later, 0)[0] == "PRESENT"
            stats = store.stats()
            fetched[trust] = wrong
            if trust:
                assert stats["forecasts_judged"] == pytest.approx(2 * 246, abs=4)
                assert stats["forecasts_true"] == pytest.approx(246, abs=4)
                assert stats["forecasts_stated"] == pytest.approx(1.2 * 246, abs=4)
            else:
                assert stats["forecasts_judged"] == 0
    assert fetched[False] > 25, "as probable as they are said to be, they are worth their bytes"
    assert fetched[True] == 0
