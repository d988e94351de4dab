"""The threaded store, on the CPU and on a GPU: contents, tiers, faults, Ctrl-C, what it leaves behind."""

import json
import os
import shutil
import signal
import threading
import time
from functools import partial

import psutil
import pytest
import torch

from specgate.errors import BudgetError, ConfigError, StoreError
from specgate.moe.hosts import local_directory
from specgate.runtime import native
from specgate.runtime.layout import BlockLayout
from specgate.runtime.source import ExpertSource
from specgate.runtime.store import ExpertStore, StoreSettings

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="the native core is not compiled"),
    pytest.mark.timeout(60),
]


@pytest.fixture(scope="module")
def source():
    return ExpertSource.open("olmoe_ref")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def open_store(request):
    """``ExpertStore`` with slots on that device."""
    return partial(ExpertStore, device=request.param)


def check(store, source, layer, experts):
    """The slots that are acquired hold exactly the checkpoint's tensors."""
    for expert, slot in zip(experts, store.acquire(layer, experts), strict=True):
        for name, tensor in source.tensors(source.block_id(layer, expert)).items():
            assert torch.equal(store.arena(name)[slot].cpu(), tensor)
    store.release(layer, experts)


@pytest.mark.parametrize("reader", ["io_uring", "pread"])
@pytest.mark.parametrize("host_experts", [0, 3, 10_000])
def test_contents_on_every_way(source, reader, host_experts, open_store):
    settings = StoreSettings(poison=True, reader=reader)
    try:
        store = open_store(source, 6, host_experts * (source.layout.block_bytes + 4096), settings=settings)
    except ConfigError as error:  # a kernel or container without io_uring
        assert reader == "io_uring"
        pytest.skip(str(error))
    with store:
        for step in range(3):
            for layer in range(source.layers):
                store.prefetch((layer + 1) % source.layers, (step * 5) % 32, 0.9)
                check(store, source, layer, [(step * 5 + i * 9) % 32 for i in range(4)])
        stats = store.stats()
        assert stats["hit"] + stats["late"] + stats["host_hit"] + stats["miss"] == 3 * 8 * 4
        assert stats["device_bytes"] == 6 * source.layout.slot_bytes
        if host_experts == 0:
            assert stats["host_hit"] == 0


def test_free_slots_hold_nan(source, open_store):
    with open_store(source, 4, 0, settings=StoreSettings(poison=True)) as store:
        (slot,) = store.acquire(0, [3])
        others = [s for s in range(4) if s != slot]
        for piece in store.layout.pieces:
            assert store.arena(piece.name)[others].isnan().all()
            assert not store.arena(piece.name)[slot].isnan().any()


def test_forecasts_become_hits(source, open_store):
    with open_store(source, 8) as store:
        assert store.prefetch(2, 7, 0.9) == "queued"
        store.drain()
        assert store.prefetch(2, 7, 0.8) == "resident"
        assert store.prefetch(3, 7, 0.8, host=True) == "queued"
        store.drain()
        assert store.state(3, 7)[0] == "ABSENT"
        assert store.state(3, 7)[3] == "PRESENT"
        check(store, source, 2, [7])
        stats = store.stats()
        assert (stats["hit"], stats["miss"]) == (1, 0)
        assert stats["useful_bytes"] == source.layout.block_bytes
        store.advance(5)
        assert store.prefetch(4, 1, 0.9, deadline=4) == "stale"


def test_warm_fills_what_there_is_room_for(source, open_store):
    with open_store(source, 40) as store:
        store.warm(host=True)
        store.warm()
        states = [store.state(layer, e) for layer in range(8) for e in range(32)]
        assert sum(s[0] == "PRESENT" for s in states) == 40
        assert all(s[3] == "PRESENT" for s in states)


def test_static_and_belady(source, open_store):
    with open_store(source, 2, settings=StoreSettings(eviction="static")) as store:
        weights = torch.zeros(8, 32)
        weights[0, 5] = 1.0
        store.set_weights(weights)
        for expert in (5, 1, 2, 3):
            check(store, source, 0, [expert])
        assert store.state(0, 5)[0] == "PRESENT"
    with open_store(source, 2, settings=StoreSettings(eviction="belady")) as store:
        events = [(0, [1]), (0, [2]), (0, [3]), (0, [1])]
        store.set_future(events)
        for layer, experts in events:
            check(store, source, layer, experts)
        assert store.stats()["hit"] == 1


def test_priced_keeps_what_is_foreseen(source, open_store):
    with open_store(source, 3, settings=StoreSettings(eviction="priced")) as store:
        store.set_reuse(half_life=8.0, discount=0.9, intercept=-0.2, slope=0.8)
        for layer in range(3):
            check(store, source, layer, [5])  # each a step ago or less; layer 0 runs last of all
        store.advance(3)
        assert store.prefetch(1, 5, 0.99, deadline=4) == "resident"
        assert store.prefetch(2, 5, 0.0, deadline=5) == "resident"
        check(store, source, 3, [7])
        assert store.state(1, 5)[0] == "PRESENT"
        assert store.state(2, 5)[0] == "ABSENT", "foreseen not to be used, and used again after a whole step"
        with pytest.raises(ConfigError, match=r"discount=1\.5"):
            store.set_reuse(discount=1.5)


def test_a_forecast_that_is_not_worth_its_bytes_is_not_fetched(source, open_store):
    settings = StoreSettings(eviction="priced", price_scale=1.0)
    with open_store(source, 4, settings=settings) as store:
        for layer in range(8):
            for expert in (0, 1):
                check(store, source, layer, [expert])
            store.drain()
        for _ in range(8):  # four experts that are used in every step
            check(store, source, 0, [0, 1, 2, 3])
        assert store.prefetch(5, 9, 0.0, deadline=99) == "refused"
        assert store.prefetch(0, 3, 0.0, deadline=99) == "resident", "nothing is moved for that"
        assert store.stats()["unworthy"] == 1
        assert store.state(5, 9)[0] == "ABSENT"
        check(store, source, 5, [9])
    with pytest.raises(ConfigError, match=r"price_scale=0\.5.* needs eviction=priced, not lru"):
        open_store(source, 4, settings=StoreSettings(price_scale=0.5))


def test_a_budget_below_one_call(source, open_store):
    with open_store(source, 3) as store:
        with pytest.raises(BudgetError, match="4 experts are needed at once and the budget holds 3"):
            store.acquire(0, [0, 1, 2, 3])
        check(store, source, 0, [0, 1, 2])
    with pytest.raises(BudgetError, match="num_slots=0"):
        open_store(source, 0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: s.acquire(8, [0]), "layer 8"),
        (lambda s: s.acquire(0, [32]), r"\[32\]"),
        (lambda s: s.acquire(0, [1, 1]), "named twice"),
        (lambda s: s.release(0, [1]), "not acquired"),
        (lambda s: s.prefetch(0, 1, float("nan")), "no probability"),
        (lambda s: s.prefetch(0, 1, 1.5), "no probability"),
        (lambda s: s.advance(-1), "clock went back"),
        (lambda s: s.arena("nothing"), "no piece nothing"),
    ],
)
def test_nonsense_is_refused(source, call, words, open_store):
    with open_store(source, 4) as store, pytest.raises(ConfigError, match=words):
        call(store)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eviction": "random"}, "eviction=random is unknown"),
        ({"reader": "magic"}, "reader=magic is unknown"),
        ({"max_reads": 0}, "max_reads=0"),
        ({"workers": 0}, "workers=0"),
        ({"half_life": 0.0}, "half_life"),
    ],
)
def test_nonsense_settings(source, settings, words, open_store):
    with pytest.raises(ConfigError, match=words):
        open_store(source, 4, settings=StoreSettings(**settings))


def test_memory_that_is_refused(open_store):
    layout = BlockLayout.make([("up", (1 << 18, 1 << 19), torch.float32)])  # 512 GiB
    with pytest.raises(StoreError, match=r"MiB of (slots|device memory) were refused.*: lower budget_gb"):
        open_store(None, 100, layout=layout, layers=10, experts=10)


def test_no_more_slots_than_experts(source, open_store):
    with open_store(source, 1 << 40, 0) as store:
        assert store.num_slots == 8 * 32


def test_closed(source, open_store):
    store = open_store(source, 4)
    store.acquire(0, [1])
    store.close()
    store.close()
    store.release(0, [1])
    for call in (
        lambda: store.acquire(0, [1]),
        lambda: store.prefetch(0, 1, 0.5),
        lambda: store.arena("down_proj"),
    ):
        with pytest.raises(StoreError, match="closed"):
            call()
    assert store.stats()["device_bytes"] == 0


def copied_model(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(local_directory("olmoe_ref"), folder)
    return folder


def place(source, layer, expert):
    """File and offset of an expert's first bytes."""
    segment = source.blocks[source.block_id(layer, expert)].segments[0]
    return source.paths[segment.file], segment.offset


@pytest.mark.parametrize("host_bytes", [0, None])
def test_io_errors_name_the_file_and_spare_the_others(source, host_bytes, open_store):
    path, offset = place(source, 1, 4)
    settings = StoreSettings(faults=((offset, 5, 2**63),))  # EIO
    with open_store(source, 6, host_bytes, settings=settings) as store:
        with pytest.raises(StoreError, match=path.name):
            store.acquire(1, [3, 4])
        assert store.state(1, 3)[2] == 0
        store.prefetch(1, 4, 0.9)  # a forecast that fails is no error
        store.drain()
        check(store, source, 1, [3, 5])
        with pytest.raises(StoreError, match=path.name):
            store.acquire(1, [4])


def test_a_file_truncated_while_open(tmp_path, open_store):
    source = ExpertSource.open(copied_model(tmp_path))
    with open_store(source, 4, 0) as store:
        check(store, source, 0, [0])
        last = max(range(len(source.blocks)), key=lambda b: source.blocks[b].segments[0].offset)
        path, offset = place(source, *divmod(last, 32))
        os.truncate(path, offset)
        with pytest.raises(StoreError, match=path.name):
            store.acquire(*[divmod(last, 32)[0], [divmod(last, 32)[1]]])


def test_ctrl_c_while_waiting(source, open_store):
    """Python's handler runs at once, the experts are released, the store goes on."""
    _, offset = place(source, 0, 2)
    with open_store(source, 2, 0, settings=StoreSettings(faults=((offset, -3000, 0),))) as store:
        check(store, source, 0, [0])
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            store.acquire(0, [1, 2])
        assert time.monotonic() - start < 2.0
        assert store.state(0, 1)[2] == store.state(0, 2)[2] == 0
        check(store, source, 0, [1, 2])


def test_closing_while_another_thread_waits(source, open_store):
    _, offset = place(source, 0, 2)
    store = open_store(source, 2, 0, settings=StoreSettings(faults=((offset, -1000, 0),)))
    errors = []

    def wait():
        try:
            store.acquire(0, [2])
        except StoreError as error:
            errors.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    store.close()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert "closed" in errors[0]


def test_two_stores_on_one_file(source, open_store):
    with open_store(source, 4, 0) as one, open_store(source, 4, 0) as two:
        for expert in range(0, 32, 5):
            check(one, source, 0, [expert])
            check(two, source, 1, [expert])


def test_threads_share_a_store(source, open_store):
    errors = []

    def work(store, seed):
        generator = torch.Generator().manual_seed(seed)
        try:
            for _ in range(60):
                experts = torch.randperm(32, generator=generator)[:3].tolist()
                check(store, source, int(torch.randint(8, (1,), generator=generator)), experts)
        except BaseException as error:
            errors.append(error)

    with open_store(source, 9, 0, settings=StoreSettings(poison=True)) as store:
        threads = [threading.Thread(target=work, args=(store, seed)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors


def test_nothing_is_left_behind(source, open_store):
    def use():
        with open_store(source, 8, 1 << 20) as store:
            store.prefetch(0, 1, 0.5)
            check(store, source, 0, [1, 2])

    process = psutil.Process()
    use()  # libraries load, allocators warm up, a GPU's driver starts threads of its own
    threads, files = process.num_threads(), process.num_fds()
    for _ in range(5):
        use()
    assert process.num_threads() == threads
    assert process.num_fds() == files


def test_in_memory(open_store):
    layout = BlockLayout.make([("up", (4, 8), torch.float32)])
    with open_store(None, 2, layout=layout, layers=2, experts=3) as store:
        for layer in range(2):
            for expert in range(3):
                block = torch.full((4, 8), float(10 * layer + expert))
                store.fill(
                    layer, expert, torch.nn.functional.pad(block.view(torch.uint8).flatten(), (0, 128))
                )
        slots = store.acquire(1, [0, 2])
        assert store.arena("up")[slots, 0, 0].tolist() == [10.0, 12.0]
        store.release(1, [0, 2])
        assert store.stats()["miss"] == 0
        assert store.reader == "memory"
    with pytest.raises(ConfigError, match="give all three"):
        open_store(None, 2)


def test_experts_shared_by_two_stores(open_store):
    layout = BlockLayout.make([("up", (4, 16), torch.float32)])
    owner = open_store(None, 1, layout=layout, layers=1, experts=3)
    for expert in range(3):
        owner.fill(0, expert, torch.full((64,), float(expert)).view(torch.uint8))
    with open_store(None, 3, layout=layout, layers=1, experts=3, share=owner) as other:
        slots = other.acquire(0, [0, 1, 2])
        assert other.arena("up")[slots, 0, 0].tolist() == [0.0, 1.0, 2.0]
        assert other.stats()["host_bytes"] == owner.stats()["host_bytes"] == 3 * 4096
        with pytest.raises(StoreError, match="1 stores still share"):
            owner.close()
        other.release(0, [0, 1, 2])
    owner.close()
    with pytest.raises(ConfigError, match="share= names a store of other experts"):
        open_store(None, 1, layout=layout, layers=2, experts=3, share=owner)


def test_time_of_hits(source, open_store):
    with open_store(source, 4) as store:
        with pytest.raises(ConfigError, match="not on the device"):
            store.time_hits(0, [1, 2], 3)
        store.drain()
        check(store, source, 0, [1, 2])
        acquire, release = store.time_hits(0, [1, 2], 50)
        assert len(acquire) == len(release) == 50
        assert 0 < min(acquire) < 1_000_000
        assert store.state(0, 1)[2] == 0


def test_timeline_is_a_chrome_trace(source, tmp_path, open_store):
    with open_store(source, 4) as store:
        check(store, source, 2, [1, 2])
        saved = json.loads(store.save_timeline(tmp_path / "t.json").read_text())["traceEvents"]
    names = {event["name"] for event in saved if event["ph"] == "X"}
    assert {"read: layer 2, expert 1", "copy: layer 2, expert 2", "read: layer 2, expert 2"} <= names
    assert all(event["dur"] >= 0 for event in saved if event["ph"] == "X")
