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
        (([0], [1], [1], [1]), {"prefetch_copy_bytes": -1}, ConfigError),
        (([0], [1], [1], [1]), {"prefetch_read_bytes": -1}, ConfigError),
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


def test_a_demand_of_a_read_that_nobody_wanted_any_more(make: Make) -> None:
    ledger = one_class(make)
    ledger.prefetch(0, 0.5, 1)
    job = ledger.next_job()
    assert ledger.advance(2) == [job.id]
    ledger.demand([0])
    assert ledger.state(0)[6][:2] == ("DEMAND", "DEVICE")
    assert counted(ledger, "miss", "promoted") == (1, 0), "a new request, not one promoted"
    assert ledger.advance(2) == []
    ledger.prefetch(1, 0.5, 9)
    assert ledger.next_job() is None, "the read is a demand's now: no prefetch beside it"
    ledger.complete(job.id, "OK")
    assert [(job.kind, job.block, job.level) for job in start(ledger)] == [
        ("COPY", 0, "DEMAND"),
        ("READ", 1, "PREFETCH"),
    ]
    assert counted(ledger, "read_bytes_demand", "read_bytes_prefetch") == (0, 20), "as they were started"


def test_a_demand_that_nobody_holds_any_more_is_given_up(make: Make) -> None:
    ledger = one_class(make)
    ledger.demand([0, 1])
    ledger.demand([0])
    ledger.release([0, 1])
    assert [ledger.state(b)[6] is None for b in (0, 1)] == [False, True], "0 is held once more"
    ledger.release([0])
    assert ledger.state(0)[6] is None
    assert start(ledger) == []


@pytest.mark.parametrize("status", ["OK", "CANCELLED"])
def test_a_demand_given_up_is_read_to_the_end_at_most(make: Make, status: str) -> None:
    ledger = one_class(make)
    ledger.demand([0])
    job = ledger.next_job()
    ledger.release([0])
    assert ledger.state(0)[6][0] == "DEMAND", "on its way"
    assert ledger.advance(1) == []
    ledger.complete(job.id, status)
    host = ("PRESENT", 0) if status == "OK" else ("ABSENT", -1)
    assert ledger.state(0) == ("ABSENT", -1, 0, *host, 0, None)
    assert start(ledger) == []
    assert ledger.take_failed() == []


@pytest.mark.parametrize("status", ["OK", "CANCELLED"])
@pytest.mark.parametrize("slabs", [0, 4])
def test_a_demand_given_up_on_its_way_to_the_device_arrives_or_not(
    make: Make, slabs: int, status: str
) -> None:
    ledger = one_class(make, slabs=slabs)
    ledger.demand([0])
    job = ledger.next_job()
    if job.kind == "READ":
        ledger.complete(job.id, "OK")
        job = ledger.next_job()
    ledger.release([0])
    ledger.complete(job.id, status)
    assert ledger.state(0)[:3] == (("PRESENT", 0, 0) if status == "OK" else ("ABSENT", -1, 0))
    assert ledger.state(0)[6] is None
    assert start(ledger) == []
    ledger.demand([0])
    assert counted(ledger, "hit") == (int(status == "OK"),)


def test_a_demand_given_up_and_taken_up_again_on_its_way(make: Make) -> None:
    ledger = one_class(make)
    ledger.demand([0])
    job = ledger.next_job()
    want = ledger.state(0)[6]
    ledger.release([0])
    ledger.demand([0])
    assert ledger.state(0)[6] == want
    ledger.complete(job.id, "OK")
    assert [(job.kind, job.block) for job in run(ledger)] == [("COPY", 0)]


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
