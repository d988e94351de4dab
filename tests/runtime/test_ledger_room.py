"""Room for a transfer: whom it may evict and what is kept, on small scenes worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tests.runtime.ledgers import Make, counted, for_each, load, on_device, one_class, run, start

pytestmark = for_each

# ---- Room ----------------------------------------------------------------


def test_only_blocks_out_of_use_are_evicted(make: Make) -> None:
    ledger = one_class(make, slots=3)
    load(ledger, 0, 1, 2)
    ledger.demand([0])
    ledger.release([0])  # used last
    ledger.demand([1])
    load(ledger, 3)
    assert on_device(ledger, 6) == {0, 1, 3}
    assert ledger.state(3)[1] == 2, "in the slot of the evicted"
    load(ledger, 4)
    assert on_device(ledger, 6) == {1, 3, 4}
    ledger.release([1])
    load(ledger, 5)
    assert on_device(ledger, 6) == {3, 4, 5}
    assert counted(ledger, "evictions") == (3,)


def test_classes_do_not_share_room(make: Make) -> None:
    ledger = make([0, 1, 1, 0], [10, 20], [1, 1], [1, 1])
    load(ledger, 0, 1, 2)
    assert on_device(ledger, 4) == {0, 2}
    assert [ledger.state(b)[3] for b in range(4)] == ["PRESENT", "ABSENT", "PRESENT", "ABSENT"]
    load(ledger, 3)
    assert on_device(ledger, 4) == {2, 3}
    assert counted(ledger, "evictions", "host_evictions") == (2, 2)


def test_a_slab_is_not_evicted_under_a_copy(make: Make) -> None:
    ledger = one_class(make, slabs=1)
    ledger.demand([0])
    ledger.complete(ledger.next_job().id, "OK")
    ledger.prefetch(1, 0.5, 9)
    (copy,) = start(ledger)
    assert (copy.kind, copy.block) == ("COPY", 0)
    ledger.complete(copy.id, "OK")
    assert [(job.kind, job.block) for job in start(ledger)] == [("READ", 1)]
    assert counted(ledger, "host_evictions") == (1,)


def test_a_slab_is_kept_for_a_demand(make: Make) -> None:
    ledger = one_class(make, slots=1, slabs=2)
    ledger.prefetch(3, 0.5, 9)
    ledger.complete(ledger.next_job().id, "OK")
    copy = ledger.next_job()  # in the only slot, from slab 0
    ledger.demand([0])
    ledger.complete(ledger.next_job().id, "OK")  # in slab 1, waits for the slot
    ledger.prefetch(1, 0.9, 9, "host")
    assert start(ledger) == []
    ledger.complete(copy.id, "OK")
    jobs = start(ledger)
    assert [(job.kind, job.block, job.slab) for job in jobs] == [("COPY", 0, 1), ("READ", 1, 0)]
    assert counted(ledger, "host_evictions") == (1,)


def test_a_slab_is_kept_for_a_prefetch_from_another_but_not_from_a_demand(make: Make) -> None:
    ledger = one_class(make, slots=1, slabs=2)
    ledger.demand([0])
    run(ledger)  # the slot is in use, slab 0 can go
    ledger.prefetch(1, 0.5, 9)
    ledger.prefetch(2, 0.5, 9, "host")
    assert [(job.kind, job.block, job.slab) for job in run(ledger)] == [("READ", 1, 1), ("READ", 2, 0)]
    ledger.prefetch(3, 0.9, 9, "host")
    assert start(ledger) == [], "it is the turn of 1, which is to be copied; 2 does not go in its place"
    ledger.release([0])
    ledger.demand([3])
    assert [(job.kind, job.block, job.slab) for job in start(ledger)] == [("READ", 3, 1)]
    assert ledger.state(1)[3] == "ABSENT"
    assert ledger.state(1)[6][:2] == ("PREFETCH", "DEVICE"), "to be read again"
    assert counted(ledger, "host_evictions") == (2,)


def test_a_slab_that_no_prefetch_wants_any_more_can_go(make: Make) -> None:
    ledger = one_class(make, slots=1, slabs=1)
    ledger.demand([0])
    run(ledger)
    ledger.prefetch(1, 0.5, 3)
    run(ledger)
    ledger.prefetch(2, 0.5, 9)
    assert start(ledger) == []
    ledger.advance(4)
    assert [(job.kind, job.block) for job in start(ledger)] == [("READ", 2)]


def test_a_prefetch_finds_no_room_where_all_is_in_use(make: Make) -> None:
    ledger = one_class(make, slots=2)
    ledger.demand([0, 1])
    run(ledger)
    ledger.prefetch(2, 0.9, 9)
    assert [(job.kind, job.block) for job in run(ledger)] == [("READ", 2)]
    assert ledger.state(2)[6] is not None
    ledger.release([1])
    assert [(job.kind, job.block, job.slot) for job in run(ledger)] == [("COPY", 2, 1)]


def test_a_prefetch_without_room_does_not_hold_up_the_next(make: Make) -> None:
    ledger = make([0, 0, 1], [10, 10], [1, 1], [0, 0], resident_host=True)
    ledger.demand([0])
    run(ledger)
    ledger.prefetch(1, 0.9, 1)
    ledger.prefetch(2, 0.1, 2)
    assert [job.block for job in start(ledger)] == [2]


def test_a_slot_is_spared_for_each_demand_on_its_way_to_host_memory(make: Make) -> None:
    ledger = make([0, 0, 0, 1], [10, 10], [2, 1], [4, 1])
    for b in (0, 1, 3):
        ledger.prefetch(b, 0.5, 9, "host")
    run(ledger)
    ledger.demand([2])
    for b in (0, 1, 3):
        ledger.prefetch(b, 0.5, 9)
    jobs = start(ledger)
    assert [(job.kind, job.block) for job in jobs] == [("READ", 2), ("COPY", 0), ("COPY", 3)], (
        "one of two slots of class 0; class 1 has no demand to wait for"
    )
    ledger.complete(jobs[1].id, "OK")
    assert [(job.kind, job.block, job.slot) for job in start(ledger)] == [("COPY", 1, 1)], (
        "the slot of 0 would do for 2: it can be evicted"
    )
    ledger.complete(jobs[0].id, "OK")
    assert [(job.kind, job.block, job.slot) for job in start(ledger)] == [("COPY", 2, 0)]


def test_a_slot_in_use_is_not_spared_and_a_demand_that_has_its_slot_needs_none(make: Make) -> None:
    ledger = one_class(make, slots=3)
    ledger.prefetch(0, 0.5, 9, "host")
    run(ledger)
    load(ledger, 3)
    ledger.demand([3])
    ledger.demand([1])  # one slot in use, one of the two free ones for 1
    ledger.demand([2])  # and the other one for 2
    ledger.prefetch(0, 0.5, 9)
    read_1, read_2 = start(ledger)
    ledger.complete(read_1.id, "OK")
    assert [(job.kind, job.block) for job in run(ledger)] == [("COPY", 1)], "arrives; 0 still waits"
    ledger.complete(read_2.id, "OK")
    assert [(job.kind, job.block) for job in run(ledger)] == [("COPY", 2)]
    ledger.release([1])
    assert [(job.kind, job.block) for job in start(ledger)] == [("COPY", 0)]


# ---- A prefetch in the place of another ----------------------------------------------------------------


def with_a_prefetched_block(make: Make, slabs: int, policy: str = "lru") -> Any:
    """One slot, which block 0 has by a prefetch of p = 0.5 due at 5; it is 3 now."""
    ledger = make([0] * 4, [10], [1], [slabs], policy, policy)
    ledger.advance(3)
    ledger.prefetch(0, 0.5, 5)
    run(ledger)
    assert ledger.ready([0])
    return ledger


@pytest.mark.parametrize("slabs", [0, 4])
@pytest.mark.parametrize(
    ("p", "now", "goes"), [(0.49, 5, False), (0.5, 5, False), (0.51, 3, True), (0.1, 6, True)]
)
def test_a_prefetch_displaces_a_less_likely_one_or_one_overdue(
    make: Make, slabs: int, p: float, now: int, goes: bool
) -> None:
    ledger = with_a_prefetched_block(make, slabs)
    ledger.advance(now)
    ledger.prefetch(1, p, 9)
    run(ledger)
    assert on_device(ledger, 4) == ({1} if goes else {0})
    assert (ledger.state(1)[6] is None) == goes
    assert counted(ledger, "evictions", "wasted_bytes") == ((1, 10) if goes else (0, 0))


def test_a_prefetched_block_that_was_used_goes_for_any_prefetch(make: Make) -> None:
    ledger = with_a_prefetched_block(make, 4)
    load(ledger, 0)
    ledger.prefetch(1, 0.1, 9)
    run(ledger)
    assert on_device(ledger, 4) == {1}
    assert counted(ledger, "evictions", "wasted_bytes") == (1, 0)


def test_a_prefetched_block_that_a_demand_met_on_its_way_goes_for_any_prefetch(make: Make) -> None:
    ledger = one_class(make, slots=1, slabs=0)
    ledger.prefetch(0, 0.5, 5)
    job = ledger.next_job()
    ledger.demand([0])
    ledger.complete(job.id, "OK")
    ledger.release([0])
    ledger.prefetch(1, 0.1, 9)
    run(ledger)
    assert on_device(ledger, 4) == {1}


def test_a_block_that_a_demand_brought_goes_for_any_prefetch(make: Make) -> None:
    ledger = one_class(make, slots=1)
    load(ledger, 0)
    ledger.prefetch(0, 0.9, 9)
    ledger.prefetch(1, 0.1, 9)
    run(ledger)
    assert on_device(ledger, 4) == {1}


def test_a_demand_displaces_any_prefetch(make: Make) -> None:
    ledger = with_a_prefetched_block(make, 4)
    load(ledger, 1)
    assert on_device(ledger, 4) == {1}


def test_what_counts_is_the_forecast_with_which_its_transfer_began(make: Make) -> None:
    ledger = one_class(make, slots=1, slabs=0)
    ledger.prefetch(0, 0.5, 5)
    job = ledger.next_job()
    assert ledger.prefetch(0, 0.9, 9) == "merged"
    ledger.complete(job.id, "OK")
    assert ledger.prefetch(0, 0.9, 9) == "resident"
    ledger.prefetch(1, 0.6, 9)
    run(ledger)
    assert on_device(ledger, 4) == {1}


def test_another_block_does_not_go_in_the_place_of_the_one_kept(make: Make) -> None:
    ledger = one_class(make, slots=2, resident_host=True)
    ledger.prefetch(0, 0.5, 5)
    run(ledger)
    load(ledger, 1)
    ledger.prefetch(2, 0.1, 9)
    assert start(ledger) == [], "it is the turn of 0"


def test_slabs_are_given_to_less_likely_prefetches_too(make: Make) -> None:
    ledger = one_class(make, slabs=1)
    ledger.prefetch(0, 0.9, 5, "host")
    ledger.prefetch(1, 0.1, 6, "host")
    assert [job.block for job in run(ledger)] == [0, 1]


@pytest.mark.parametrize(("p", "left"), [(0.5, {0}), (0.6, {1})])
def test_the_policy_must_admit_it_as_well(make: Make, p: float, left: set[int]) -> None:
    ledger = with_a_prefetched_block(make, 4, "forecast")
    ledger.prefetch(0, 0.55, 9)  # resident: the policy's forecast alone
    ledger.prefetch(1, p, 9)
    run(ledger)
    assert on_device(ledger, 4) == left
