"""Killed at any moment and started again, a collection ends with the same bytes.

Letters: B sequences, T tokens, N flat tokens.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specgate.errors import TraceError
from specgate.moe.batches import BatchRunner, Settings
from specgate.moe.collection import Interrupted, collect
from specgate.moe.hosts import Host
from specgate.traces.store import TraceReader
from tests.moe.tiny_hosts import KINDS, PREFILL, QUIET, Hosts, Paths, Texts

Patch = pytest.MonkeyPatch


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def _die_at(call: int, name: str) -> None:
    """Makes this process kill itself at the ``call``-th use of ``os.<name>``: around a write to disk."""
    original: Callable[..., Any] = getattr(os, name)
    left = [call]

    def deadly(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(os, name, deadly)


def _collect_and_die(host: Host, documents: Texts, settings: Settings, out: Path, moment: Any) -> None:
    torch.set_num_threads(1)
    if moment is not None:
        _die_at(*moment)
    collect(host, documents, settings, out, QUIET)


def run_and_kill(*arguments: Any) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=_collect_and_die, args=arguments)
    process.start()
    process.join(120)
    return process.exitcode


@pytest.mark.parametrize("kind", list(KINDS))
def test_killed_at_any_moment_it_ends_with_the_same_bytes(
    kind: str, whole: Paths, hosts: Hosts, documents: Texts, tmp_path: Path
) -> None:
    """SIGKILL before the plan is visible, with half-written shards, between shards, and before the header."""
    host, settings = KINDS[kind]
    truth = files_of(whole[kind])
    shards = sum(name.startswith("shards/") for name in truth)
    assert shards == 4
    out = tmp_path / "trace"
    moments = [(0, "replace"), (0, "fsync"), (2, "replace"), (1, "fsync"), (2, "fsync"), (1, "replace")]
    survived = []
    for moment in moments:
        code = run_and_kill(hosts[host], documents, settings, out, moment)
        survived.append(len(list((out / "shards").glob("*.safetensors"))))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert not (out / "trace.json").exists()
    assert survived == sorted(survived)
    assert survived[0] == 0
    assert max(survived) > 0
    assert run_and_kill(hosts[host], documents, settings, out, None) == 0
    assert files_of(out) == truth


def test_killed_by_the_clock_it_ends_with_the_same_bytes(
    whole: Paths, hosts: Hosts, documents: Texts, tmp_path: Path
) -> None:
    kind = "olmoe decode"
    host, settings = KINDS[kind]
    out = tmp_path / "trace"
    context = multiprocessing.get_context("fork")
    killed = 0
    for seconds in (0.05, 0.3, 0.6, 1.0, 1.5):
        process = context.Process(target=_collect_and_die, args=(hosts[host], documents, settings, out, None))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            os.kill(process.pid or 0, signal.SIGKILL)
            killed += 1
        process.join()
    assert killed >= 1
    assert run_and_kill(hosts[host], documents, settings, out, None) == 0
    assert files_of(out) == files_of(whole[kind])


def test_a_damaged_or_lost_shard_is_collected_again(
    whole: Paths, hosts: Hosts, documents: Texts, tmp_path: Path
) -> None:
    kind = "switch prefill"
    host, settings = KINDS[kind]
    out = tmp_path / "trace"
    shutil.copytree(whole[kind], out)
    (out / "shards/00001.safetensors").unlink()
    bad = out / "shards/00002.safetensors"
    raw = bytearray(bad.read_bytes())
    raw[-5] ^= 1
    bad.write_bytes(raw)
    outcome = collect(hosts[host], documents, settings, out, QUIET)
    assert 0 < outcome.tokens < TraceReader(out).stack("encoder").num_tokens * 2
    assert files_of(out) == files_of(whole[kind])


def test_a_finished_trace_costs_nothing_to_ask_for_again(
    whole: Paths, hosts: Hosts, documents: Texts
) -> None:
    before = files_of(whole["olmoe prefill"])
    outcome = collect(hosts["olmoe"], documents, PREFILL, whole["olmoe prefill"], QUIET)
    assert outcome.tokens == 0
    assert outcome.header.routing_control["agreement"] == 1.0
    assert files_of(whole["olmoe prefill"]) == before


def test_another_plan_in_the_same_directory_is_refused(whole: Paths, hosts: Hosts, documents: Texts) -> None:
    out = whole["olmoe prefill"]
    before = files_of(out)
    changes: list[dict[str, Any]] = [{"seed": 6}, {"length": 20}, {"temperature": 0.5}]
    for change, said in zip(
        changes, ("seed: 5 -> 6", "length: 16 -> 20", "temperature: 0.8 -> 0.5"), strict=True
    ):
        with pytest.raises(TraceError, match=rf"another plan.*{said}.*choose another output directory"):
            collect(hosts["olmoe"], documents, replace(PREFILL, **change), out, QUIET)
    with pytest.raises(TraceError, match="another plan"):
        collect(hosts["olmoe"], documents[:-3], PREFILL, out, QUIET)
    with pytest.raises(TraceError, match="another plan"):
        collect(hosts["switch_transformers"], documents, PREFILL, out, QUIET)
    assert files_of(out) == before


def test_ctrl_c_says_how_to_go_on(
    whole: Paths,
    hosts: Hosts,
    documents: Texts,
    tmp_path: Path,
    monkeypatch: Patch,
) -> None:
    original = BatchRunner.run

    def interrupted(self: BatchRunner, number: int, windows: Any) -> Any:
        if number == 5:
            raise KeyboardInterrupt
        return original(self, number, windows)

    with monkeypatch.context() as patch:
        patch.setattr(BatchRunner, "run", interrupted)
        with pytest.raises(Interrupted, match=r"Stopped with 2 of 4 shards in .*run the same command again"):
            collect(hosts["olmoe"], documents, PREFILL, tmp_path / "trace", QUIET)
    assert all(not m._forward_pre_hooks for m in hosts["olmoe"].model.modules())
    collect(hosts["olmoe"], documents, PREFILL, tmp_path / "trace", QUIET)
    assert files_of(tmp_path / "trace") == files_of(whole["olmoe prefill"])
