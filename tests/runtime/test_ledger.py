"""Every rule of the ledger on small scenes with expectations worked out by hand, for both implementations."""

from __future__ import annotations

from typing import Any

import pytest

from specgate.errors import BudgetError, ConfigError
from tests.runtime.ledgers import Make, counted, for_each, load, on_device, one_class, run, start

pytestmark = for_each

# ---- Construction ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        (([], [1], [1], [1]), {}, ConfigError),
        (([1], [1], [1], [1]), {}, ConfigError),
        (([0], [1, 2], [1], [1]), {}, ConfigError),
        (([0], [0], [1], [1]), {}, ConfigError),
        (([0], [1], [0], [1]), {}, BudgetError),
        (([0], [1], [1], [-1]), {}, ConfigError),
        (([0], [1], [1], [1]), {"policy": "fifo"}, ConfigError),
        (([0], [1], [1], [1]), {"host_policy": "fifo"}, ConfigError),
        (([0], [1], [1], [1]), {"max_reads": 0}, ConfigError),
        (([0], [1], [1], [1]), {"max_pending": -1}, ConfigError),
        (([0], [1], [1], [1]), {"half_life": 0.0}, ConfigError),
    ],
)
def test_values_that_make_no_sense(make: Make, arguments: Any, options: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        make(*arguments, **options)


# ---- The way of one block ----------------------------------------------------------------


def test_a_demand_is_read_then_copied(make: Make) -> None:
    ledger = one_class(make)
    ledger.demand([3])
    assert ledger.state(3)[:6] == ("ABSENT", -1, 1, "ABSENT", -1, 0)
    assert ledger.state(3)[6][:2] == ("DEMAND", "DEVICE")
    assert tuple(ledger.next_job()) == (0, "READ", 3, 0, -1, "DEMAND")
    assert ledger.state(3)[3:5] == ("LOADING", 0)
    assert ledger.next_job() is None
    ledger.complete(0, "OK")
    assert ledger.state(3)[3:5] == ("PRESENT", 0)
    assert tuple(ledger.next_job()) == (1, "COPY", 3, 0, 0, "DEMAND")
    assert ledger.state(3)[:6] == ("LOADING", 0, 1, "PRESENT", 0, 1)
    assert (ledger.ready([3]), ledger.ready([3], True), ledger.ready([], False)) == (False, True, True)
    ledger.complete(1, "OK")
    assert ledger.state(3) == ("PRESENT", 0, 1, "PRESENT", 0, 0, None)
    assert (ledger.ready([3]), ledger.ready([3, 4], True)) == (True, False)
    assert counted(ledger, "miss", "read_bytes_demand", "copied_bytes_demand") == (1, 10, 10)


def test_without_host_tier_the_file_goes_to_the_device(make: Make) -> None:
    ledger = one_class(make, slabs=0)
    ledger.demand([3])
    assert tuple(ledger.next_job()) == (0, "DIRECT", 3, -1, 0, "DEMAND")
    assert ledger.state(3)[:6] == ("LOADING", 0, 1, "ABSENT", -1, 0)
    ledger.complete(0, "OK")
    assert ledger.state(3) == ("PRESENT", 0, 1, "ABSENT", -1, 0, None)
    assert counted(ledger, "miss", "read_bytes_demand", "copied_bytes_demand") == (1, 10, 10)


def test_a_source_in_memory_is_only_copied(make: Make) -> None:
    ledger = make([0, 1, 0], [10, 20], [1, 1], [0, 0], resident_host=True)
    assert [ledger.state(b)[3:5] for b in range(3)] == [("PRESENT", 0), ("PRESENT", 0), ("PRESENT", 1)]
    assert ledger.prefetch(2, 0.5, 9, "host") == "resident"
    ledger.demand([2, 1])
    assert [tuple(job) for job in start(ledger)] == [
        (0, "COPY", 2, 1, 0, "DEMAND"),
        (1, "COPY", 1, 0, 0, "DEMAND"),
    ]
    assert ledger.state(2)[5] == 0, "nothing evicts a slab: no pin"
    assert counted(ledger, "host_hit", "miss", "read_bytes_demand", "copied_bytes_demand") == (2, 0, 0, 30)


def test_slots_and_slabs_are_handed_out_lowest_first(make: Make) -> None:
    ledger = make([0] * 6, [10], [3], [3], max_reads=3)
    ledger.demand([5, 4, 3])
    reads = start(ledger)
    assert [(job.block, job.slab) for job in reads] == [(5, 0), (4, 1), (3, 2)]
    ledger.complete(reads[1].id, "OK")
    ledger.complete(reads[0].id, "FAILED")  # slab 0 is free again
    assert [(job.kind, job.block, job.slot) for job in start(ledger)] == [("COPY", 4, 0)]
    ledger.release([5, 4, 3])
    ledger.demand([0])
    assert [(job.kind, job.block, job.slab) for job in start(ledger)] == [("READ", 0, 0)]


# ---- Demand ----------------------------------------------------------------


def test_a_bad_demand_changes_nothing(make: Make) -> None:
    ledger = make([0, 0, 0, 1], [10, 20], [2, 1], [2, 2])
    ledger.demand([0])
    before = ([ledger.state(b) for b in range(4)], ledger.stats())
    for blocks, error in (([1, 1], ConfigError), ([1, 4], ConfigError), ([3, 1, 2], BudgetError)):
        with pytest.raises(error):
            ledger.demand(blocks)
        assert ([ledger.state(b) for b in range(4)], ledger.stats()) == before
    ledger.demand([3, 1, 0])  # block 0 is pinned already: two blocks of class 0 in all
    assert [ledger.state(b)[2] for b in range(4)] == [2, 1, 0, 1]


def test_release_takes_one_pin_and_fails_as_a_whole(make: Make) -> None:
    ledger = one_class(make)
    ledger.demand([0, 1])
    ledger.demand([0])
    for blocks in ([1, 2], [0, 0], [6]):
        with pytest.raises(ConfigError):
            ledger.release(blocks)
    assert [ledger.state(b)[2] for b in range(3)] == [2, 1, 0]
    ledger.release([1, 0])
    assert [ledger.state(b)[2] for b in range(3)] == [1, 0, 0]


def test_where_a_demand_finds_its_block(make: Make) -> None:
    ledger = one_class(make, slots=2, slabs=3)
    load(ledger, 0, 1, 2)
    assert on_device(ledger, 6) == {1, 2}
    ledger.demand([2, 0])
    assert counted(ledger, "hit", "late", "host_hit", "miss") == (1, 0, 1, 3)
    run(ledger)
    ledger.release([2, 0])
    ledger.demand([3])
    job = ledger.next_job()
    assert (job.kind, job.block) == ("READ", 3)
    ledger.demand([3])  # on its way to host memory: still a miss
    assert counted(ledger, "hit", "late", "host_hit", "miss") == (1, 0, 1, 5)
    ledger.complete(job.id, "OK")
    ledger.next_job()
    ledger.demand([3])  # on its way to the device
    assert counted(ledger, "hit", "late", "late_bytes", "host_hit", "miss") == (1, 1, 0, 1, 5)


def test_a_second_demand_waits_with_the_first(make: Make) -> None:
    ledger = one_class(make)
    ledger.demand([0])
    want = ledger.state(0)[6]
    ledger.demand([0])
    assert (ledger.state(0)[2], ledger.state(0)[6]) == (2, want)
    first, second = run(ledger)
    assert (first.kind, second.kind) == ("READ", "COPY")
    ledger.release([0])
    ledger.demand([1])
    run(ledger)
    with pytest.raises(BudgetError):
        ledger.demand([2])


def test_a_demand_of_a_prefetch_not_started(make: Make) -> None:
    ledger = one_class(make)
    assert ledger.prefetch(0, 0.5, 9, "host") == "queued"
    ledger.demand([1])
    old, other = ledger.state(0)[6], ledger.state(1)[6]
    ledger.demand([0])
    level, target, *_, seq = ledger.state(0)[6]
    assert (level, target) == ("DEMAND", "DEVICE")
    assert old[4] < other[4] < seq, "promoted: to the end of the demands"
    assert counted(ledger, "promoted", "miss", "late", "useful_bytes") == (1, 2, 0, 0)
    assert [(job.block, job.level) for job in start(ledger)] == [(1, "DEMAND"), (0, "DEMAND")]


def test_a_demand_of_a_prefetch_in_flight(make: Make) -> None:
    ledger = one_class(make, slots=3, resident_host=True)
    ledger.prefetch(0, 0.5, 9)
    job = ledger.next_job()
    assert job.level == "PREFETCH"
    ledger.demand([0])
    names = ("late", "late_bytes", "useful_bytes", "promoted", "copied_bytes_prefetch", "copied_bytes_demand")
    assert counted(ledger, *names) == (1, 10, 10, 1, 10, 0)
    assert ledger.state(0)[6][0] == "DEMAND"
    ledger.demand([0])
    assert counted(ledger, *names) == (2, 10, 10, 1, 10, 0), "its bytes are late once"
    ledger.prefetch(1, 0.5, 9)
    assert ledger.next_job() is None, "the job is a demand's now: no prefetch beside it"
    ledger.complete(job.id, "OK")
    assert ledger.next_job().block == 1
    assert counted(ledger, "hit", "wasted_bytes") == (0, 0)


def test_prefetched_bytes_are_useful_once_and_wasted_if_evicted_unused(make: Make) -> None:
    ledger = one_class(make, slots=2, resident_host=True)
    ledger.prefetch(0, 0.9, 9)
    ledger.prefetch(1, 0.8, 9)
    run(ledger)
    names = ("hit", "useful_bytes", "wasted_bytes", "evictions")
    load(ledger, 0)
    assert counted(ledger, *names) == (1, 10, 0, 0)
    load(ledger, 0)
    assert counted(ledger, *names) == (2, 10, 0, 0)
    load(ledger, 2)  # evicts 1, never used
    assert counted(ledger, *names) == (2, 10, 10, 1)
    load(ledger, 3)  # evicts 0, used
    assert counted(ledger, *names) == (2, 10, 10, 2)
    assert counted(ledger, "copied_bytes_prefetch", "copied_bytes_demand") == (20, 20)


# ---- Prefetch ----------------------------------------------------------------


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
