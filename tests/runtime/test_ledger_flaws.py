"""Sequences that the first edition of the ledger's rules got wrong, each with what must come of it."""

from __future__ import annotations

from tests.runtime.ledgers import Make, counted, for_each, load, on_device, one_class, run, start

pytestmark = for_each


def test_two_prefetches_do_not_read_each_other_out_of_the_only_slab(make: Make) -> None:
    ledger = one_class(make, slots=1, slabs=1)
    ledger.demand([0])
    run(ledger)  # the slot is in use
    ledger.prefetch(1, 0.5, 9)
    ledger.prefetch(2, 0.5, 9)
    assert [(job.kind, job.block) for job in run(ledger)] == [("READ", 1)]
    ledger.release([0])
    assert [(job.kind, job.block) for job in run(ledger)] == [("COPY", 1), ("READ", 2)], (
        "2 is no likelier than 1: it stays in the slab"
    )


def test_prefetches_that_are_not_admitted_do_not_read_each_other_out_either(make: Make) -> None:
    ledger = make([0] * 4, [10], [2], [1], "forecast")
    for b in (0, 1):
        ledger.prefetch(b, 0.9, 9)
        run(ledger)
    ledger.prefetch(2, 0.5, 9)
    ledger.prefetch(3, 0.5, 9)
    assert [(job.kind, job.block) for job in run(ledger)] == [("READ", 2)]


def test_a_demand_does_not_wait_for_a_prefetch_that_came_later(make: Make) -> None:
    ledger = make([0] * 3, [10], [1], [3])
    ledger.prefetch(1, 0.5, 9, "host")
    run(ledger)
    ledger.demand([0])
    read = ledger.next_job()
    ledger.prefetch(1, 0.1, 9)
    assert ledger.next_job() is None, "the only slot is for 0"
    ledger.complete(read.id, "OK")
    assert [(job.kind, job.block) for job in start(ledger)] == [("COPY", 0)]


def test_no_prefetch_reads_beside_a_demand_that_waits_for_an_old_read(make: Make) -> None:
    ledger = one_class(make, slots=4)
    ledger.prefetch(0, 0.5, 1)
    ledger.next_job()
    ledger.advance(2)
    ledger.demand([0])
    ledger.prefetch(1, 0.5, 9)
    assert ledger.next_job() is None


def test_demands_given_up_do_not_pile_up(make: Make) -> None:
    ledger = one_class(make, blocks=200, slots=2, slabs=2, max_pending=4)
    for b in range(200):
        ledger.demand([b])
        ledger.release([b])
    assert all(ledger.state(b)[6] is None for b in range(200))
    ledger.prefetch(199, 0.9, 9)
    assert [(job.kind, job.block) for job in run(ledger)] == [("READ", 199), ("COPY", 199)]


def test_a_demand_given_up_does_not_hold_up_prefetches(make: Make) -> None:
    ledger = make([0, 0, 1, 1], [10, 10], [1, 1], [2, 2])
    for b in (2, 3):
        ledger.prefetch(b, 0.5, 99, "host")
    run(ledger)
    ledger.demand([0])
    ledger.release([0])
    ledger.demand([1])
    assert [(job.kind, job.block) for job in run(ledger)] == [("READ", 1), ("COPY", 1)]
    ledger.prefetch(2, 0.9, 99)
    assert [(job.kind, job.block) for job in run(ledger)] == [("COPY", 2)]


def test_forecasts_that_did_not_come_true_make_room(make: Make) -> None:
    ledger = make([0] * 20, [10], [8], [0], "forecast", resident_host=True)
    for b in range(8):
        ledger.prefetch(b, 0.9, 1)
        run(ledger)
    ledger.advance(100)
    for i in range(300):
        load(ledger, 10 + i % 3)
    assert counted(ledger, "host_hit", "hit") == (3, 297)
    for b in range(13, 16):
        ledger.prefetch(b, 0.8, 10**6)
    assert [job.block for job in run(ledger)] == [13, 14, 15]
    assert on_device(ledger, 20) == {6, 7, 10, 11, 12, 13, 14, 15}, "of the wrong ones the least ids went"


def test_prefetches_do_not_evict_likelier_ones(make: Make) -> None:
    ledger = make([0] * 20, [10], [2], [0], resident_host=True)
    for b in range(10):
        ledger.prefetch(b, 0.99 - b / 20, 5)
    assert [job.block for job in run(ledger)] == [0, 1]
    assert counted(ledger, "wasted_bytes") == (0,)
    assert on_device(ledger, 20) == {0, 1}


def test_a_past_deadline_does_not_replace_a_good_one(make: Make) -> None:
    ledger = one_class(make)
    ledger.advance(5)
    ledger.prefetch(0, 0.9, 9)
    want = ledger.state(0)[6]
    assert ledger.prefetch(0, 0.9, 3) == "stale"
    ledger.advance(5)
    assert ledger.state(0)[6] == want


def test_a_big_prefetch_does_not_wait_for_all_small_ones(make: Make) -> None:
    ledger = make([0] * 200 + [1], [4, 8], [200, 1], [0, 0], resident_host=True, prefetch_copy_bytes=10)
    ledger.prefetch(0, 0.9, 50)
    first = ledger.next_job()
    ledger.prefetch(200, 0.99, 1)
    for b in range(1, 200):
        ledger.prefetch(b, 0.1, 50)
    assert start(ledger) == [], "12 bytes are over 10"
    ledger.complete(first.id, "OK")
    assert [job.block for job in run(ledger)] == [200, *range(1, 200)]


def test_bytes_read_ahead_in_vain_are_counted(make: Make) -> None:
    ledger = one_class(make, blocks=9, slots=1, slabs=1)
    for b in range(5):
        ledger.prefetch(b, 0.5, 9, "host")
        run(ledger)
    assert counted(ledger, "read_bytes_prefetch", "wasted_read_bytes", "wasted_bytes") == (50, 40, 0)
