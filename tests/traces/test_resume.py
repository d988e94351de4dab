"""A collection killed at any moment and started again ends with the same bytes; another plan is refused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from specgate.errors import TraceError
from specgate.traces.store import TraceReader, TraceWriter
from tests.traces.helpers import arrays_for, header_for, routers_for, stack_info, tree


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


def collect(path: Path, shards: int = 4) -> TraceWriter:
    """A little collection that resumes where it stopped, as collect.py does."""
    stacks = {"decoder": stack_info()}
    writer = TraceWriter(path, header_for(stacks), {"text": "x", "seed": 1}, shards)
    for i in range(shards):
        if not writer.done(i):
            writer.write_shard(
                i, {"decoder": arrays_for(stacks["decoder"], [3, i + 1], i)}, {"agree": 10 + i}
            )
    total = sum(writer.shard_meta(i)["agree"] for i in range(shards))
    writer.finish(routing_control={"agreement": 1.0, "decisions": total}, routers=routers_for(stacks))
    return writer


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_killed_at_every_step_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    collect(tmp_path / "whole")
    want = tree(tmp_path / "whole")
    real = getattr(os, call)
    steps = 0
    for survive in range(100):
        path = tmp_path / f"killed-{survive}"
        left = [survive]

        def dying(*args: Any, left: list[int] = left) -> Any:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return real(*args)

        try:
            with monkeypatch.context() as patch:
                patch.setattr(os, call, dying)
                collect(path)
            break
        except Killed:
            steps += 1
            if (path / "trace.json").exists():  # killed after the last byte
                assert tree(path) == want
            else:
                with pytest.raises(TraceError, match="collect"):
                    TraceReader(path)
            collect(path)
            assert tree(path) == want
    assert steps >= 7  # plan, 4 shards, routers, header


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.traces import test_resume as t
real = t.arrays_for
def slow(*a):
    time.sleep({pause})
    return real(*a)
t.arrays_for = slow
t.collect(Path({path!r}))
"""


def test_sigkill_between_shards_and_resume(tmp_path: Path) -> None:
    """A real process, really killed, started again: byte-identical to one that ran through."""
    collect(tmp_path / "whole")
    path = tmp_path / "killed"
    script = SCRIPT.format(root=str(Path(__file__).parents[2]), path=str(path), pause=0.3)
    process = subprocess.Popen([sys.executable, "-c", script])
    try:
        deadline = time.monotonic() + 120
        while not (path / "shards/00000.safetensors").exists() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (path / "trace.json").exists()
    (path / "shards/00003.safetensors.tmp").write_bytes(b"half a shard")
    writer = TraceWriter(path, header_for({"decoder": stack_info()}), {"text": "x", "seed": 1}, 4)
    assert writer.done(0)
    assert not writer.complete
    assert collect(path).complete
    assert tree(path) == tree(tmp_path / "whole")


def test_resume_with_another_plan_is_refused(tmp_path: Path) -> None:
    header = header_for({"decoder": stack_info()})
    TraceWriter(tmp_path, header, {"text": "x", "seed": 1}, 4)
    with pytest.raises(TraceError, match=r"another plan \(seed: 1 -> 2\).*choose another output directory"):
        TraceWriter(tmp_path, header, {"text": "x", "seed": 2}, 4)
    with pytest.raises(TraceError, match="num_shards: 4 -> 5"):
        TraceWriter(tmp_path, header, {"text": "x", "seed": 1}, 5)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(TraceError, match="damaged"):
        TraceWriter(tmp_path, header, {"text": "x", "seed": 1}, 4)


def test_shards_without_a_plan_are_refused(tmp_path: Path) -> None:
    collect(tmp_path)
    (tmp_path / "plan.json").unlink()
    with pytest.raises(TraceError, match=r"no plan\.json"):
        collect(tmp_path)


def test_a_damaged_or_deleted_shard_is_collected_again(tmp_path: Path) -> None:
    collect(tmp_path)
    want = tree(tmp_path)
    file = tmp_path / "shards/00002.safetensors"
    for damage in (b"", file.read_bytes()[:-3], file.read_bytes()[:-1] + b"\x7f"):
        file.write_bytes(damage)
        assert not TraceWriter(
            tmp_path, header_for({"decoder": stack_info()}), {"text": "x", "seed": 1}, 4
        ).done(2)
        collect(tmp_path)
        assert tree(tmp_path) == want
    file.unlink()
    writer = TraceWriter(tmp_path, header_for({"decoder": stack_info()}), {"text": "x", "seed": 1}, 4)
    writer.write_shard(2, {"decoder": arrays_for(stack_info(), [3, 3], 2)}, {"agree": 12})
    with pytest.raises(TraceError, match="incomplete"):  # until finish() has said that it is whole again
        TraceReader(tmp_path)
    collect(tmp_path)
    assert tree(tmp_path) == want


def test_a_shard_of_another_collection_does_not_count(tmp_path: Path) -> None:
    collect(tmp_path / "a")
    collect(tmp_path / "b", shards=5)
    shutil.copy(tmp_path / "b/shards/00001.safetensors", tmp_path / "a/shards/00001.safetensors")
    writer = TraceWriter(tmp_path / "a", header_for({"decoder": stack_info()}), {"text": "x", "seed": 1}, 4)
    assert [writer.done(i) for i in range(4)] == [True, False, True, True]


def test_finishing_twice_changes_nothing(tmp_path: Path) -> None:
    collect(tmp_path)
    want = tree(tmp_path)
    collect(tmp_path)
    assert tree(tmp_path) == want
