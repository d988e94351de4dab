"""The store's own thread prefetches what the speculation kernel's ring says, with no Python between."""

import time

import numpy as np
import pytest
import torch

from specgate.errors import ConfigError
from specgate.predictors.speculation import speculation_parts
from specgate.runtime import native
from specgate.runtime.layout import BlockLayout
from specgate.runtime.speculate import Speculator
from specgate.runtime.store import ExpertStore
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
