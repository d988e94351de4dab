"""Prefetches: what becomes of them, when they lapse, what was read in vain, on scenes worked out by hand."""

from __future__ import annotations

import pytest

from specgate.errors import ConfigError
from tests.runtime.ledgers import Make, counted, for_each, load, one_class, run, start

pytestmark = for_each


def test_what_becomes_of_a_prefetch(make: Make) -> None:
    ledger = one_class(make)
    load(ledger, 0)
    ledger.advance(5)
    assert ledger.prefetch(0, 0.5, 9) == "resident"
    assert ledger.prefetch(1, 0.5, 4) == "stale"
    assert ledger.prefetch(1, 0.5, 5, "host") == "queued"
    assert ledger.state(1)[6][:4] == ("PREFETCH", "HOST", 0.5, 5)
    seq = ledger.state(1)[6][4]
    assert ledger.prefetch(1, 0.25, 8) == "merged"
    assert ledger.state(1)[6] == ("PREFETCH", "DEVICE", 0.25, 8, seq)
    assert ledger.prefetch(1, 0.75, 7, "host") == "merged"
    assert ledger.state(1)[6] == ("PREFETCH", "DEVICE", 0.75, 7, seq), "the farther target stands"
    ledger.complete(ledger.next_job().id, "OK")
    assert ledger.prefetch(1, 0.1, 6, "host") == "resident"
    assert ledger.state(1)[6] == ("PREFETCH", "DEVICE", 0.75, 7, seq), "and the want is as it was"
    ledger.demand([1])
    assert ledger.prefetch(1, 0.9, 6) == "demanded"
    assert counted(ledger, "merged", "stale", "overflow") == (2, 1, 0)
    for bad in ((6, 0.5, 9), (1, 1.5, 9), (1, float("nan"), 9), (1, 0.5, 9, "disk")):
        with pytest.raises(ConfigError):
            ledger.prefetch(*bad)


def test_a_past_deadline_changes_nothing(make: Make) -> None:
    ledger = make([0, 0, 0, 1], [10, 10], [2, 2], [4, 0])
    load(ledger, 0)
    ledger.advance(5)
    ledger.prefetch(1, 0.9, 9)
    ledger.demand([2])
    wants = [ledger.state(b)[6] for b in range(3)]
    for b, target in ((0, "device"), (0, "host"), (1, "device"), (2, "device"), (3, "host")):
        assert ledger.prefetch(b, 0.1, 4, target) == "stale"
    assert [ledger.state(b)[6] for b in range(3)] == wants
    assert counted(ledger, "stale", "merged", "overflow") == (5, 0, 0)
    with pytest.raises(ConfigError):
        ledger.prefetch(1, 1.5, 4)


def test_there_is_no_prefetch_to_a_host_tier_that_is_not_there(make: Make) -> None:
    ledger = make([0, 1, 1], [10, 10], [1, 1], [2, 0])
    load(ledger, 1)
    ledger.prefetch(2, 0.5, 9)
    want = ledger.state(2)[6]
    assert [ledger.prefetch(b, 0.9, 8, "host") for b in range(3)] == ["queued", "refused", "refused"]
    assert ledger.state(2)[6] == want
    assert counted(ledger, "overflow", "merged", "stale") == (0, 0, 0)


def test_a_prefetch_for_host_memory_stops_there(make: Make) -> None:
    ledger = one_class(make)
    ledger.prefetch(2, 0.5, 9, "host")
    assert [(job.kind, job.level) for job in run(ledger)] == [("READ", "PREFETCH")]
    assert ledger.state(2) == ("ABSENT", -1, 0, "PRESENT", 0, 0, None)
    assert counted(ledger, "read_bytes_prefetch", "copied_bytes_prefetch") == (10, 0)


def test_a_full_queue_keeps_the_likeliest(make: Make) -> None:
    ledger = one_class(make, blocks=8, max_pending=3)
    for b, p, deadline in ((0, 0.2, 8), (1, 0.2, 9), (2, 0.2, 9)):
        assert ledger.prefetch(b, p, deadline) == "queued"
    assert ledger.prefetch(3, 0.2, 1) == "refused"
    assert ledger.prefetch(3, 0.3, 9) == "queued"
    waiting = [b for b in range(8) if ledger.state(b)[6]]
    assert waiting == [0, 1, 3], "of equal p the latest deadline goes, of equal deadlines the last to come"
    ledger.prefetch(4, 0.3, 9)
    ledger.prefetch(5, 0.3, 9)
    assert [b for b in range(8) if ledger.state(b)[6]] == [3, 4, 5]
    assert counted(ledger, "overflow") == (4,)
    ledger.next_job()  # what is in flight does not wait
    assert ledger.prefetch(6, 0.1, 9) == "queued"
    assert ledger.prefetch(7, 0.1, 9) == "refused"
    assert one_class(make, max_pending=0).prefetch(0, 1.0, 9) == "refused"


def test_stale_prefetches_are_dropped_but_not_on_their_way_to_the_device(make: Make) -> None:
    ledger = one_class(make, slots=3, slabs=6)
    for b, deadline in ((0, 1), (1, 2), (2, 3), (3, 4)):
        ledger.prefetch(b, 0.5, deadline)
    reads = start(ledger)
    ledger.complete(reads[0].id, "OK")
    copy = ledger.next_job()
    assert (copy.kind, copy.block) == ("COPY", 0)
    ledger.complete(reads[1].id, "OK")  # lies in host memory, waits for the link
    assert ledger.advance(3) == [], "a deadline that is now is not past"
    assert [b for b in range(6) if ledger.state(b)[6]] == [0, 2, 3]
    assert ledger.advance(4) == [reads[2].id]
    assert [b for b in range(6) if ledger.state(b)[6]] == [0, 3]
    assert counted(ledger, "stale") == (2,)
    ledger.complete(reads[2].id, "OK")
    assert ledger.state(2) == ("ABSENT", -1, 0, "PRESENT", 2, 0, None)
    assert ledger.advance(4) == []
    with pytest.raises(ConfigError):
        ledger.advance(3)


# ---- Bytes read in vain ----------------------------------------------------------------


def test_bytes_read_ahead_are_wasted_if_they_leave_host_memory_unused(make: Make) -> None:
    ledger = one_class(make, blocks=9, slots=2, slabs=1)
    names = ("host_evictions", "wasted_read_bytes", "wasted_bytes")
    ledger.prefetch(0, 0.5, 9, "host")
    ledger.prefetch(1, 0.5, 9, "host")
    run(ledger)
    assert counted(ledger, *names) == (1, 10, 0)
    ledger.prefetch(1, 0.5, 9)
    run(ledger)  # a copy uses 1
    ledger.prefetch(2, 0.5, 9, "host")
    run(ledger)
    assert counted(ledger, *names) == (2, 10, 0)
    load(ledger, 2)  # a demand uses 2
    load(ledger, 3)  # a demand reads 3
    ledger.prefetch(4, 0.5, 9, "host")
    run(ledger)
    assert counted(ledger, *names)[:2] == (4, 10)
    ledger.prefetch(5, 0.5, 9, "host")
    run(ledger)  # evicts 4
    assert counted(ledger, *names)[:2] == (5, 20)
    ledger.prefetch(1, 0.5, 9, "host")
    ledger.prefetch(6, 0.5, 9, "host")
    run(ledger)  # evicts 5, and 1: it was used, but not since it was read again
    assert counted(ledger, *names)[:2] == (7, 40)


def test_a_read_ahead_that_a_demand_found_is_used_though_never_copied(make: Make) -> None:
    ledger = one_class(make, slabs=1)
    ledger.prefetch(0, 0.5, 9, "host")
    run(ledger)
    ledger.demand([0])
    ledger.release([0])
    ledger.prefetch(1, 0.5, 9, "host")
    assert [job.block for job in run(ledger)] == [1]
    assert counted(ledger, "host_hit", "host_evictions", "wasted_read_bytes") == (1, 1, 0)


@pytest.mark.parametrize("status", ["FAILED", "CANCELLED"])
def test_a_read_ahead_that_does_not_arrive_is_wasted(make: Make, status: str) -> None:
    ledger = one_class(make)
    ledger.prefetch(0, 0.5, 9)
    ledger.complete(ledger.next_job().id, status)
    assert counted(ledger, "wasted_read_bytes", "wasted_bytes") == (10, 0)
    ledger = one_class(make)
    ledger.demand([0])
    ledger.complete(ledger.next_job().id, status)
    assert counted(ledger, "wasted_read_bytes", "wasted_bytes") == (0, 0)


def test_a_read_ahead_that_is_demanded_on_its_way_is_used(make: Make) -> None:
    ledger = one_class(make, slabs=1)
    ledger.prefetch(0, 0.5, 9)
    job = ledger.next_job()
    ledger.demand([0])
    ledger.release([0])
    ledger.complete(job.id, "OK")
    ledger.prefetch(1, 0.5, 9)
    assert [(job.kind, job.block) for job in start(ledger)] == [("READ", 1)]
    assert counted(ledger, "host_evictions", "wasted_read_bytes") == (1, 0)
