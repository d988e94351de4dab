"""The store in plain torch: values, pins, eviction, poison and failures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specgate.errors import BudgetError, ConfigError, StoreError
from specgate.runtime.layout import BlockLayout
from specgate.runtime.simple_store import SimpleStore

LAYERS, EXPERTS = 3, 4


class Shelf:
    """Experts whose values name them: 100 * layer + expert, and the negative in the second piece."""

    layers, experts = LAYERS, EXPERTS

    def __init__(self) -> None:
        self.layout = BlockLayout.make([("up", (3, 5), "float32"), ("down", (7,), "float32")])
        self.broken: set[int] = set()
        self.read: list[int] = []

    def tensors(self, block: int) -> Mapping[str, Tensor]:
        self.read.append(block)
        if block in self.broken:
            raise StoreError(f"Block {block} is gone; copy it again.")
        layer, expert = divmod(block, EXPERTS)
        value = float(100 * layer + expert)
        return {"up": torch.full((3, 5), value), "down": torch.full((7,), -value)}


def holds(store: SimpleStore, slot: int, layer: int, expert: int) -> bool:
    value = 100 * layer + expert
    return bool((store.arena("up")[slot] == value).all() and (store.arena("down")[slot] == -value).all())


def test_it_lends_experts_in_the_order_asked() -> None:
    with SimpleStore(Shelf(), 4) as store:
        assert store.arena("up").shape == (4, 3, 5)
        slots = store.acquire(1, [3, 0, 2])
        assert len(set(slots)) == 3
        assert all(holds(store, s, 1, e) for s, e in zip(slots, [3, 0, 2], strict=True))
        assert store.acquire(1, [0]) == [slots[1]]
        store.release(1, [0])
        store.release(1, [3, 0, 2])
        assert store.stats()["hit"] == 1
        assert store.stats()["miss"] == 3
        assert len(store.timeline()) == 3
        assert store.stats()["stall_seconds"] > 0


def test_pinned_experts_stay_and_too_many_are_refused() -> None:
    shelf = Shelf()
    with SimpleStore(shelf, 2) as store:
        (kept,) = store.acquire(0, [1])
        for expert in range(EXPERTS):
            (slot,) = store.acquire(2, [expert])
            assert slot != kept
            store.release(2, [expert])
        assert holds(store, kept, 0, 1)
        with pytest.raises(BudgetError):
            store.acquire(1, [0, 1])
        assert store.acquire(1, [0]) != [kept]  # the refusal pinned nothing


def test_free_slots_hold_no_number() -> None:
    shelf = Shelf()
    with SimpleStore(shelf, 3, poison=True) as store:
        assert bool(store.arena("up").isnan().all())
        assert bool(store.arena("down").isnan().all())
        (slot,) = store.acquire(0, [2])
        assert holds(store, slot, 0, 2)
        assert int(store.arena("up").isnan().all(-1).all(-1).sum()) == 2
        store.release(0, [2])
        shelf.broken.add(3)
        for _ in range(2):
            with pytest.raises(StoreError, match="Block 3 is gone"):
                store.acquire(0, [3])
        shelf.broken.clear()
        store.acquire(0, [3])


def test_a_failed_read_pins_nothing() -> None:
    shelf = Shelf()
    with SimpleStore(shelf, 2) as store:
        shelf.broken.add(1)
        with pytest.raises(StoreError):
            store.acquire(0, [0, 1])
        slots = store.acquire(1, [0, 1])  # both slots are free to take
        assert sorted(slots) == [0, 1]


def test_an_interrupt_in_a_read_pins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf()
    with SimpleStore(shelf, 2) as store:
        with monkeypatch.context() as patch:
            patch.setattr(shelf, "tensors", lambda block: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                store.acquire(0, [0, 1])
        slots = store.acquire(1, [2, 3])
        assert all(holds(store, s, 1, e) for s, e in zip(slots, [2, 3], strict=True))


def test_prefetch_brings_experts_and_is_counted() -> None:
    shelf = Shelf()
    with SimpleStore(shelf, 3) as store:
        assert store.prefetch(2, 1, 0.9, 5) == "queued"
        assert shelf.read == [9]
        assert store.prefetch(2, 1, 0.9, 5) == "resident"
        assert store.prefetch(2, 2, 0.9, 5, host=True) == "refused"
        (slot,) = store.acquire(2, [1])
        assert holds(store, slot, 2, 1)
        assert (store.stats()["hit"], store.stats()["miss"]) == (1, 0)
        assert store.stats()["useful_bytes"] == shelf.layout.block_bytes
        store.advance(6)
        assert store.prefetch(0, 0, 0.9, 5) == "stale"
        shelf.broken.add(0)
        store.prefetch(0, 0, 0.9, 7)  # what cannot be read is said when it is needed
        with pytest.raises(StoreError, match="Block 0"):
            store.acquire(0, [0])


def test_values_that_make_no_sense() -> None:
    with pytest.raises(ConfigError, match="num_slots=0"):
        SimpleStore(Shelf(), 0)
    with SimpleStore(Shelf(), 2) as store:
        for layer, experts in ((3, [0]), (-1, [0]), (0, [4]), (0, [-1])):
            with pytest.raises(ConfigError, match="outside the 3 layers of 4 experts"):
                store.acquire(layer, experts)
        with pytest.raises(ConfigError):
            store.arena("sideways")


def test_a_closed_store_says_so() -> None:
    store = SimpleStore(Shelf(), 2)
    store.acquire(0, [1])
    store.close()
    store.close()
    store.release(0, [1])
    assert store.stats()["miss"] == 1
    calls: list[Any] = [
        lambda: store.acquire(0, [1]),
        lambda: store.arena("up"),
        lambda: store.advance(1),
        lambda: store.prefetch(0, 1, 0.5),
    ]
    for call in calls:
        with pytest.raises(StoreError, match="closed"):
            call()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.sampled_from(["lru", "lfu", "lfru", "forecast"]),
    st.lists(
        st.tuples(st.integers(0, LAYERS - 1), st.sets(st.integers(0, EXPERTS - 1), min_size=1)), max_size=30
    ),
)
def test_whatever_is_asked_the_right_experts_are_there(
    slots: int, eviction: str, calls: list[tuple[int, set[int]]]
) -> None:
    with SimpleStore(Shelf(), slots, eviction=eviction, poison=True) as store:
        for clock, (layer, experts) in enumerate(calls):
            store.advance(clock)
            asked = sorted(experts)[:slots]
            places = store.acquire(layer, asked)
            assert all(holds(store, s, layer, e) for s, e in zip(places, asked, strict=True))
            store.release(layer, asked)
            store.prefetch((layer + 1) % LAYERS, clock % EXPERTS, 0.5, clock + 1)
