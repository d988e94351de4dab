"""Transfers: their order, their limits and how they end, on small scenes worked out by hand."""

from __future__ import annotations

import pytest

from specgate.errors import ConfigError
from tests.runtime.ledgers import Make, counted, for_each, one_class, run, start

pytestmark = for_each

# ---- Order and limits ----------------------------------------------------------------


def test_demands_go_first_come_first_served_and_prefetches_by_deadline(make: Make) -> None:
    ledger = one_class(make, blocks=8, slots=8, resident_host=True)
    for b, p, deadline in ((0, 0.9, 5), (1, 0.2, 3), (2, 0.4, 3), (3, 0.2, 3)):
        ledger.prefetch(b, p, deadline)
    ledger.demand([7, 4])
    assert [job.block for job in start(ledger)] == [7, 4], "no prefetch beside a demand's copy"
    ledger.complete(0, "OK")
    assert ledger.next_job() is None
    ledger.complete(1, "OK")
    assert [job.block for job in start(ledger)] == [2, 1, 3, 0]


def test_a_copy_that_was_sent_makes_way_for_the_next(make: Make) -> None:
    ledger = one_class(make, blocks=8, slots=8, resident_host=True, prefetch_copy_bytes=1)
    for b in range(3):
        ledger.prefetch(b, 0.5, b + 1)
    assert [job.block for job in start(ledger)] == [0], "one is always allowed"
    ledger.sent(0)
    ledger.sent(0)
    ledger.sent(99)
    assert [job.block for job in start(ledger)] == [1], "one behind it"
    ledger.demand([0])
    ledger.sent(1)
    assert ledger.next_job() is None, "a demand is on its way"
    ledger.complete(0, "OK")
    assert [job.block for job in start(ledger)] == [2]
    ledger.complete(1, "OK")
    ledger.complete(2, "OK")
    assert ledger.ready([0, 1, 2])


def test_reads_in_flight_are_limited_for_all(make: Make) -> None:
    ledger = make([0, 0, 0, 1, 1], [10, 10], [3, 2], [3, 0], max_reads=2)
    ledger.prefetch(0, 0.5, 9)
    ledger.prefetch(3, 0.5, 9)
    assert [(job.kind, job.block) for job in start(ledger)] == [("READ", 0), ("DIRECT", 3)]
    ledger.demand([1, 4])
    assert ledger.next_job() is None
    ledger.complete(1, "OK")
    assert [(job.kind, job.block) for job in start(ledger)] == [("READ", 1)]
    ledger.complete(0, "OK")
    assert [(job.kind, job.block) for job in start(ledger)] == [("DIRECT", 4), ("COPY", 0)]


def test_no_prefetch_read_beside_or_before_a_demand_read(make: Make) -> None:
    ledger = make([0, 0, 0, 1, 1], [10, 10], [3, 2], [3, 0], max_reads=2)
    ledger.prefetch(0, 0.5, 9)
    ledger.prefetch(3, 0.5, 9)
    ledger.demand([1])
    assert [(job.kind, job.block) for job in start(ledger)] == [("READ", 1)], "in flight"
    ledger.complete(0, "CANCELLED")
    ledger.demand([4])
    assert [(job.kind, job.block) for job in start(ledger)] == [("READ", 1), ("DIRECT", 4)]
    ledger.complete(1, "OK")
    assert [(job.kind, job.block) for job in start(ledger)] == [("COPY", 1)]
    ledger.complete(2, "OK")
    assert [(job.kind, job.block) for job in start(ledger)] == [("READ", 0), ("DIRECT", 3)]


def test_no_prefetch_read_while_a_demand_finds_no_slab(make: Make) -> None:
    ledger = make([0, 0, 1, 1], [10, 10], [2, 2], [1, 2])
    ledger.demand([0])
    ledger.complete(ledger.next_job().id, "OK")  # its slab is kept for its copy
    ledger.demand([1])
    ledger.prefetch(2, 0.5, 9)
    assert [(job.kind, job.block) for job in start(ledger)] == [("COPY", 0)]
    ledger.complete(1, "OK")  # now its slab can go
    assert [(job.kind, job.block) for job in start(ledger)] == [("READ", 1)]


def test_a_demand_read_does_not_hold_up_prefetch_copies(make: Make) -> None:
    ledger = one_class(make, slots=3)
    ledger.prefetch(0, 0.5, 9, "host")
    run(ledger)
    ledger.demand([1])
    ledger.prefetch(0, 0.5, 9)
    assert [(job.kind, job.block) for job in start(ledger)] == [("READ", 1), ("COPY", 0)]


def test_a_demand_that_waits_to_be_read_does_not_hold_up_prefetch_copies(make: Make) -> None:
    ledger = one_class(make, slots=3, max_reads=1)
    ledger.prefetch(0, 0.5, 9, "host")
    run(ledger)
    ledger.prefetch(2, 0.5, 9, "host")
    ledger.next_job()
    ledger.demand([1])
    assert ledger.next_job() is None, "reads are limited to one"
    ledger.prefetch(0, 0.5, 9)
    assert [(job.kind, job.block) for job in start(ledger)] == [("COPY", 0)]


def test_a_demand_that_waits_for_a_slot_does_not_hold_up_prefetch_reads(make: Make) -> None:
    ledger = one_class(make, slots=1)
    ledger.prefetch(0, 0.5, 9)
    ledger.complete(ledger.next_job().id, "OK")
    ledger.next_job()  # the copy of 0 has the slot
    ledger.demand([1])
    ledger.complete(ledger.next_job().id, "OK")
    assert ledger.next_job() is None
    ledger.prefetch(2, 0.5, 9)
    assert [(job.kind, job.block) for job in start(ledger)] == [("READ", 2)]


def test_no_prefetch_copy_while_a_demand_finds_no_slot(make: Make) -> None:
    ledger = make([0, 0, 1], [10, 10], [1, 1], [2, 1])
    ledger.prefetch(2, 0.5, 9, "host")
    ledger.prefetch(1, 0.5, 9)
    for _ in range(2):
        ledger.complete(ledger.next_job().id, "OK")
    copy = ledger.next_job()
    ledger.demand([0])
    ledger.complete(ledger.next_job().id, "OK")
    ledger.prefetch(2, 0.5, 9)
    assert start(ledger) == [], "1 is on its way to the only slot of class 0"
    ledger.complete(copy.id, "OK")
    assert [(job.kind, job.block) for job in run(ledger)] == [("COPY", 0), ("COPY", 2)]


def test_bytes_of_prefetches_in_flight_are_limited_but_one_may_always_go(make: Make) -> None:
    classes = [0, 1, 2, 2]
    ledger = make(classes, [40, 20, 9], [4, 4, 4], [4, 4, 4], prefetch_read_bytes=30, prefetch_copy_bytes=20)
    for b in range(4):
        ledger.prefetch(b, 0.5, b)
    assert [job.block for job in start(ledger)] == [0], "40 bytes, alone"
    ledger.complete(0, "OK")
    jobs = start(ledger)
    assert [(job.kind, job.block) for job in jobs] == [("COPY", 0), ("READ", 1), ("READ", 2)], "20 + 9 of 30"
    ledger.complete(jobs[1].id, "OK")
    assert [(job.kind, job.block) for job in start(ledger)] == [("READ", 3)], "20 more to copy: over 20"
    ledger.complete(jobs[0].id, "OK")
    ledger.complete(jobs[2].id, "OK")
    assert [(job.kind, job.block) for job in start(ledger)] == [("COPY", 1)], "20 of 20; 9 more do not fit"


def test_a_small_prefetch_does_not_pass_a_big_one_that_waits_for_its_turn(make: Make) -> None:
    ledger = make([0, 1, 0], [9, 20], [4, 4], [0, 0], prefetch_copy_bytes=20, resident_host=True)
    for b in range(3):
        ledger.prefetch(b, 0.5, b)
    assert [job.block for job in start(ledger)] == [0], "29 bytes are over 20"
    ledger.complete(0, "OK")
    assert [job.block for job in start(ledger)] == [1]
    ledger.complete(1, "OK")
    assert [job.block for job in start(ledger)] == [2]


def test_a_big_prefetch_read_holds_up_reads_but_no_copies(make: Make) -> None:
    ledger = make([0, 1, 0, 0], [9, 20], [4, 4], [4, 0], prefetch_read_bytes=20)
    ledger.prefetch(3, 0.5, 9, "host")
    run(ledger)
    for b, deadline in ((0, 1), (1, 2), (2, 3), (3, 4)):
        ledger.prefetch(b, 0.5, deadline)
    jobs = start(ledger)
    assert [(job.kind, job.block) for job in jobs] == [("READ", 0), ("COPY", 3)], "29 bytes are over 20"
    ledger.complete(jobs[0].id, "OK")
    assert [(job.kind, job.block) for job in start(ledger)] == [("COPY", 0), ("DIRECT", 1)]


def test_a_big_prefetch_copy_holds_up_copies_but_no_reads(make: Make) -> None:
    ledger = make([0, 1, 0, 0], [9, 20], [4, 4], [4, 4], prefetch_copy_bytes=20)
    for b in range(3):
        ledger.prefetch(b, 0.5, 9, "host")
    run(ledger)
    for b in range(4):
        ledger.prefetch(b, 0.5, b)
    assert [(job.kind, job.block) for job in start(ledger)] == [("COPY", 0), ("READ", 3)]


@pytest.mark.parametrize("spared", [True, False], ids=["spared", "in use"])
def test_a_big_prefetch_holds_up_others_though_it_has_no_room_yet(make: Make, spared: bool) -> None:
    ledger = make([0, 0, 1, 1], [20, 9], [1, 2], [2, 2], prefetch_copy_bytes=20)
    for b in (0, 2, 3):
        ledger.prefetch(b, 0.5, 9, "host")
    run(ledger)
    ledger.demand([1])
    read = ledger.next_job()
    if not spared:
        ledger.complete(read.id, "OK")
        run(ledger)  # 1 has the slot
    for b, deadline in ((2, 1), (0, 2), (3, 3)):
        ledger.prefetch(b, 0.5, deadline)
    assert [job.block for job in start(ledger)] == [2], "bytes are counted before room is looked for"


def test_bytes_of_a_promoted_prefetch_count_as_demand(make: Make) -> None:
    ledger = one_class(make, slots=4, prefetch_copy_bytes=20, resident_host=True)
    for b in range(3):
        ledger.prefetch(b, 0.5, b)
    assert [job.block for job in start(ledger)] == [0, 1]
    ledger.demand([0])
    ledger.complete(1, "OK")
    assert start(ledger) == [], "a demand's copy is in flight"
    ledger.complete(0, "OK")
    assert [job.block for job in start(ledger)] == [2]


# ---- Ends of jobs ----------------------------------------------------------------


@pytest.mark.parametrize("status", ["FAILED", "CANCELLED"])
def test_a_read_that_does_not_arrive(make: Make, status: str) -> None:
    ledger = one_class(make)
    ledger.demand([4])
    ledger.prefetch(3, 0.5, 9)
    ledger.complete(ledger.next_job().id, status)
    assert ledger.state(4)[:6] == ("ABSENT", -1, 1, "ABSENT", -1, 0)
    assert (ledger.state(4)[6] is None) == (status == "FAILED")
    job = ledger.next_job()
    assert job.block == (3 if status == "FAILED" else 4)
    ledger.complete(job.id, status)
    assert ledger.take_failed() == ([4] if status == "FAILED" else [])
    assert ledger.take_failed() == []
    assert counted(ledger, "wasted_bytes") == (0,)


@pytest.mark.parametrize("status", ["FAILED", "CANCELLED"])
@pytest.mark.parametrize("resident", [False, True])
def test_a_copy_that_does_not_arrive(make: Make, status: str, resident: bool) -> None:
    ledger = one_class(make, resident_host=resident)
    ledger.prefetch(0, 0.5, 9)
    while (job := ledger.next_job()).kind != "COPY":
        ledger.complete(job.id, "OK")
    ledger.complete(job.id, status)
    assert ledger.state(0)[:6] == ("ABSENT", -1, 0, "PRESENT", 0, 0)
    assert (ledger.state(0)[6] is None) == (status == "FAILED")
    assert ledger.take_failed() == [], "nobody waits for a prefetch"
    assert counted(ledger, "wasted_bytes", "wasted_read_bytes") == (10, 0)
    ledger.demand([0])
    ledger.complete(ledger.next_job().id, status)
    assert ledger.take_failed() == ([0] if status == "FAILED" else [])
    assert counted(ledger, "wasted_bytes") == (10,), "nothing of a demand is wasted"
    ledger.demand([0])
    run(ledger)
    assert ledger.state(0)[:3] == ("PRESENT", 0, 2)


@pytest.mark.parametrize("status", ["FAILED", "CANCELLED"])
def test_a_direct_read_that_does_not_arrive(make: Make, status: str) -> None:
    ledger = one_class(make, slabs=0)
    ledger.demand([0, 5])
    first, second = start(ledger)
    ledger.complete(second.id, status)
    ledger.complete(first.id, status)
    assert ledger.take_failed() == ([0, 5] if status == "FAILED" else [])
    assert [job.slot for job in start(ledger)] == ([] if status == "FAILED" else [0, 1])


def test_a_block_in_use_fails_for_its_prefetch_too(make: Make) -> None:
    ledger = one_class(make, slabs=0)
    ledger.demand([0])
    ledger.complete(ledger.next_job().id, "FAILED")
    assert ledger.take_failed() == [0]
    assert ledger.prefetch(0, 0.5, 9) == "queued"
    ledger.complete(ledger.next_job().id, "FAILED")
    assert ledger.take_failed() == [0]


@pytest.mark.parametrize("status", ["FAILED", "CANCELLED"])
@pytest.mark.parametrize("slabs", [0, 4])
def test_a_prefetch_that_a_demand_met_on_its_way_is_not_wasted(make: Make, slabs: int, status: str) -> None:
    ledger = one_class(make, slabs=slabs)
    ledger.prefetch(0, 0.5, 9)
    job = ledger.next_job()
    ledger.demand([0])
    ledger.complete(job.id, status)
    assert counted(ledger, "wasted_bytes", "wasted_read_bytes", "read_bytes_prefetch") == (0, 0, 10)


def test_a_demand_given_up_fails_too(make: Make) -> None:
    ledger = one_class(make)
    ledger.demand([0])
    job = ledger.next_job()
    ledger.release([0])
    ledger.complete(job.id, "FAILED")
    assert ledger.take_failed() == [0]
    assert ledger.state(0) == ("ABSENT", -1, 0, "ABSENT", -1, 0, None)


def test_only_jobs_in_flight_can_end(make: Make) -> None:
    ledger = one_class(make)
    ledger.demand([0])
    job = ledger.next_job()
    for id, status in ((job.id + 1, "OK"), (-1, "OK"), (job.id, "DONE")):
        with pytest.raises(ConfigError):
            ledger.complete(id, status)
    ledger.complete(job.id, "OK")
    with pytest.raises(ConfigError):
        ledger.complete(job.id, "OK")


def test_unknown_blocks(make: Make) -> None:
    ledger = one_class(make)
    for call in (ledger.state, lambda b: ledger.ready([b]), lambda b: ledger.set_future([[0], [b]])):
        with pytest.raises(ConfigError):
            call(6)
