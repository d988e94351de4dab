"""The store's own thread prefetches what the speculation kernel's ring says, with no Python between."""

import time

import numpy as np
import pytest
import torch

from specgate.errors import ConfigError, StoreError
from specgate.predictors.speculation import speculation_parts
from specgate.runtime import native
from specgate.runtime.layout import BlockLayout
from specgate.runtime.speculate import Speculator
from specgate.runtime.store import ExpertStore, StoreSettings
from tests.runtime.speculation import decoded, launch, make_predictor, routing

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="the native core is not compiled"),
    pytest.mark.timeout(60),
]
L, E = 3, 6


@pytest.fixture
def store():
    layout = BlockLayout.make([("up", (8, 8), torch.float32)])
    with ExpertStore(None, 3 * E * L, layout=layout, layers=L + 1, experts=E) as opened:
        yield opened


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_what_is_foreseen_is_loaded(store):
    predictor = make_predictor("router_lookahead", L=L, E=E)
    batch = routing(predictor, B=1, T=4)
    with Speculator(speculation_parts(predictor), threshold=0.4, batch=1, device="cpu") as speculator:
        store.follow(speculator.ring, first_layer=1)  # layer 0 of the predictor is layer 1 of the store
        seen = 0
        foreseen = set()
        for t, layer in decoded(batch, L):
            launch(speculator, batch, t, layer)
            seen += 1
            foreseen |= {(layer + 1, expert) for layer, expert, _ in speculator.poll()}
            wait_for(lambda count=seen: store.stats()["followed"] == count)
        assert store.stats()["lost"] == 0
        store.drain()
        loaded = {(la, e) for la in range(L + 1) for e in range(E) if store.state(la, e)[0] == "PRESENT"}
        assert foreseen
        assert loaded == foreseen
        assert store.stats()["copied_bytes_prefetch"] == len(foreseen) * store.layout.block_bytes
        store.unfollow()
        launch(speculator, batch, 0, -1)
        time.sleep(0.05)
        assert store.stats()["followed"] == seen


def test_another_models_ring_is_refused(store):
    predictor = make_predictor("router_lookahead", L=L, E=E)
    with (
        Speculator(speculation_parts(predictor), threshold=0.4, batch=1, device="cpu") as speculator,
        pytest.raises(ConfigError, match="another model's"),
    ):
        store.follow(speculator.ring, first_layer=2, layers=L)


def test_closing_ends_the_thread(store):
    predictor = make_predictor("router_lookahead", L=L, E=E)
    with Speculator(speculation_parts(predictor), threshold=0.4, batch=1, device="cpu") as speculator:
        store.follow(speculator.ring, first_layer=1)
        store.close()
        launch(speculator, routing(predictor, B=1, T=2), 0, -1)


def test_many_at_once(store):
    store.prefetch_all(2, [(1, 0.5), (3, 0.9)])
    store.drain()
    assert [store.state(2, e)[0] for e in range(4)] == ["ABSENT", "PRESENT", "ABSENT", "PRESENT"]


def test_many_of_several_layers_at_once(store):
    store.prefetch_many(
        np.array([2 * E + 1, 3 * E], np.uint32), np.array([0.5, 0.9]), np.array([9, 9], np.int64)
    )
    store.drain()
    assert [store.state(layer, e)[0] for layer, e in [(2, 1), (2, 3), (3, 0)]] == [
        "PRESENT",
        "ABSENT",
        "PRESENT",
    ]


def test_many_that_do_not_fit_together_are_refused(store):
    with pytest.raises(ConfigError, match="must be of one length: there are 2, 1 and 2"):
        store.prefetch_many(np.zeros(2, np.uint32), np.ones(1), np.ones(2, np.int64))
    with pytest.raises(ConfigError, match="Block 1000000 is not one of"):
        store.prefetch_many(np.array([10**6], np.uint32), np.ones(1), np.ones(1, np.int64))


def foresee(store, blocks, p, deadlines):
    store.foresee(np.array(blocks, np.uint32), np.array(p, np.float64), np.array(deadlines, np.int64))


def test_foreseen_by_the_stores_own_thread(store):
    """The same as at once, and drain() knows of what was not looked at yet."""
    for _ in range(20):
        foresee(store, [2 * E + 1, 3 * E], [0.5, 0.9], [9, 9])
    store.drain()
    present = {
        (layer, e) for layer in range(L + 1) for e in range(E) if store.state(layer, e)[0] == "PRESENT"
    }
    assert present == {(2, 1), (3, 0)}


def test_foresight_goes_on_while_experts_are_asked_for(store):
    """Callers and the thread that judges share the ledger: nothing is lost, all are right in the end."""
    for clock in range(1, 200):
        store.advance(clock)
        blocks = [(clock * 7 + i) % (L * E) for i in range(12)]
        foresee(store, blocks, [0.1 + i / 20 for i in range(12)], [clock + 1 + i % 4 for i in range(12)])
        chosen = [clock % E, (clock + 1) % E]
        slots = store.acquire(clock % L, chosen)
        assert len(set(slots)) == 2
        store.release(clock % L, chosen)
    store.drain()
    store._core.invariants()


def test_closing_ends_what_is_foreseen(store):
    foresee(store, [1, 2, 3], [0.5, 0.5, 0.5], [9, 9, 9])
    store.close()
    with pytest.raises(StoreError, match="closed"):
        foresee(store, [1], [0.5], [9])


def test_foresight_that_makes_no_sense_is_refused(store):
    with pytest.raises(ConfigError, match="must be of one length"):
        foresee(store, [1, 2], [0.5], [9])
    with pytest.raises(ConfigError, match=r"expert block 1000000 with p=.*there are 24 blocks"):
        foresee(store, [10**6], [0.5], [9])
    with pytest.raises(ConfigError, match="p must be 0 to 1"):
        foresee(store, [1], [1.5], [9])


@pytest.mark.parametrize("depth", [0, 2])
def test_beyond_the_depth_nothing_is_fetched(depth):
    """What is foreseen further ahead is a hint for eviction alone."""
    settings = StoreSettings(eviction="priced", price_scale=0.5, prefetch_depth=depth)
    layout = BlockLayout.make([("up", (8, 8), torch.float32)])
    with ExpertStore(None, 8, settings=settings, layout=layout, layers=L, experts=E) as store:
        store.set_reuse(8.0, 0.3, -1.0, 0.5)
        store.advance(1)
        foresee(store, [1, 2, 3], [0.9, 0.9, 0.9], [2, 3, 4])
        store.drain()
        state = [store.state(0, e)[0] for e in (1, 2, 3)]
        assert state == ["PRESENT", "PRESENT", "ABSENT" if depth else "PRESENT"]


def test_what_has_no_deadline_is_fetched_whatever_the_depth():
    settings = StoreSettings(eviction="priced", price_scale=0.5, prefetch_depth=2)
    layout = BlockLayout.make([("up", (8, 8), torch.float32)])
    with ExpertStore(None, L * E, settings=settings, layout=layout, layers=L, experts=E) as store:
        store.warm(experts=[(0, 1), (1, 2)])
        assert [store.state(*at)[0] for at in ((0, 1), (1, 2), (1, 3))] == ["PRESENT", "PRESENT", "ABSENT"]
        for clock in range(1, 9):  # what copies and events take is known now
            store.advance(clock)
            store.acquire(0, [clock % E])
            store.release(0, [clock % E])
        store.warm()
        assert store.stats()["unworthy"] == 0
        assert all(store.state(layer, e)[0] == "PRESENT" for layer in range(L) for e in range(E))
