"""Measuring this machine: what is made of the readings, and that all of it runs on a processor alone."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specgate.errors import ConfigError
from specgate.policy import measure as command
from specgate.policy.hardware import local
from specgate.policy.measure import Plan, main, measure
from specgate.policy.readings import (
    MIB,
    fit_line,
    misfit,
    read_copies,
    read_experts,
    read_file,
    timed,
)

CPU = torch.device("cpu")
QUICK = {"mib": (0.25, 1.0), "tokens": (1, 4), "hidden": 64, "width": 32, "file_mib": 2, "block_mib": 1}
QUICK |= {"threads": 2, "memory_mib": 4, "repeats": 3}


@given(latency=st.floats(0, 1e5), bandwidth=st.floats(0.01, 500))
def test_a_line_is_found_again(latency: float, bandwidth: float) -> None:
    sizes = [2.0**k for k in range(16, 27, 2)]
    times = [latency + b / bandwidth for b in sizes]
    found = fit_line(sizes, times)
    assert found[1] == pytest.approx(bandwidth, rel=1e-6)
    assert found[0] == pytest.approx(latency, abs=1e-6 * times[0] + 1e-6 * latency)
    assert misfit(sizes, times, *found) < 1e-6


def test_a_latency_is_never_negative() -> None:
    latency, bandwidth = fit_line([100, 200, 300], [8, 20, 31])
    assert latency == 0
    assert bandwidth == pytest.approx(10, rel=0.1)


def test_relative_errors_count_so_that_small_copies_do_too() -> None:
    """A plain least squares would let the largest copy decide alone."""
    sizes, times = [1e3, 1e4, 1e7, 1e8], [3e3, 12e3, 1e7, 1.1e8]  # 2e3 + size, but for the largest
    latency, bandwidth = fit_line(sizes, times)
    assert latency == pytest.approx(2e3, rel=0.1)
    assert bandwidth == pytest.approx(1, rel=0.1)
    assert np.polyfit(sizes, times, 1)[1] < 0


@pytest.mark.parametrize(
    ("sizes", "times"), [([5], [1]), ([5, 5], [1, 2]), ([1, 2], [0, 1]), ([1, 100], [50, 1e-9])]
)
def test_readings_without_a_bandwidth_are_refused(sizes: list[float], times: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"more sizes|quiet machine"):
        fit_line(sizes, times)


def test_a_reading_is_the_median_of_its_repeats() -> None:
    naps = iter([0, 0, *[0.004, 0.012, 0.004, 0.004, 0.004]])
    found = timed(lambda: time.sleep(max(0.003, next(naps))), lambda: None, 5)
    assert 4e6 <= found.ns < 9e6
    assert found.high >= 12e6
    assert found.low <= found.ns
    assert found.spread > 0.5


def test_short_calls_are_repeated_within_a_reading() -> None:
    calls: list[int] = []
    found = timed(lambda: calls.append(1), lambda: None, 3)
    assert len(calls) > 1000
    assert found.ns < 1e5


def test_copies_are_of_the_size_that_was_asked_for() -> None:
    rows = read_copies([4096, 65536], 3, CPU, pinned=False)
    assert [row["bytes"] for row in rows] == [4096, 65536]
    for row in rows:
        assert row["low"] <= row["ns"] <= row["high"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ns"], rel=0.01)


def test_an_expert_is_counted_by_its_weights() -> None:
    rows = read_experts([1, 8], 64, 32, 3, CPU)
    for row in rows:
        operations = 2 * row["tokens"] * 3 * 64 * 32
        assert row["tflops"] == pytest.approx(operations / row["ns"] * 1e-3, abs=1e-4)


def test_a_file_is_read_whole_and_removed(tmp_path: Path) -> None:
    found = read_file(tmp_path, 4 * MIB, MIB, 2, 3)
    assert found["bytes"] == 4 * MIB
    assert found["gb_per_s"] == pytest.approx(4 * MIB / found["ns"], rel=0.01)
    assert found["page_ns"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_removed_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    opened = os.open
    monkeypatch.setattr(
        "specgate.policy.readings.open_direct", lambda path: (opened(path, os.O_RDONLY), False)
    )
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(ConfigError, match=r"The disk failed while being read \(Input/output error\)"):
        read_file(tmp_path, 4 * MIB, MIB, 2, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written to"):
        read_file(tmp_path / "none", 4 * MIB, MIB, 2, 3)
    with pytest.raises(ConfigError, match="larger --file-mib"):
        read_file(tmp_path, MIB, MIB, 2, 3)


def test_the_profile_is_made_of_the_readings(tmp_path: Path) -> None:
    found = measure(Plan(device="cpu", folder=tmp_path, **QUICK))
    assert found.measured
    assert found.device == "CPU"
    readings: Any = found.readings
    sizes = [row["bytes"] for row in readings["pageable"]]
    assert sizes == [MIB // 4, MIB]
    latency, bandwidth = fit_line(sizes, [row["ns"] for row in readings["pageable"]])
    assert found.link_gb_per_s == pytest.approx(bandwidth, rel=1e-3)
    assert found.link_latency_us == pytest.approx(latency * 1e-3, abs=1e-3)
    assert found.tflops == max(row["tflops"] for row in readings["experts"])
    assert found.file_gb_per_s == readings["file"]["gb_per_s"]
    assert 0 < found.free_gb <= found.device_gb
    assert found.operation_us == pytest.approx(readings["host"]["operation"]["ns"] * 1e-3, abs=1e-3)
    assert found.gathered_gb_per_s == readings["gathered"]["gb_per_s"] > 0
    assert (readings["gathered"]["top_k"], readings["expert"]["hidden"]) == (4, 64)
    assert readings["pinned"] == [], "there is nothing to pin for"
    assert readings["slowed"] is None
    assert found.launch_slowdown == 0, "the device is the host"


def test_a_slowdown_that_was_read_is_in_the_profile_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {"ns": 400e3, "low": 390e3, "high": 410e3}
    slowed = {"alone": times, "beside": times, "slowdown": {"median": 0.125, "low": -0.01, "high": 0.2}}
    monkeypatch.setattr(command, "read_slowed", lambda *_: slowed)
    out = tmp_path / "local.yaml"
    words = ["--device", "cpu", "--folder", str(tmp_path), "--out", str(out), "--mib", "0.25", "1"]
    words += ["--tokens", "1", "--hidden", "64", "--width", "32", "--file-mib", "2", "--block-mib", "1"]
    assert main([*words, "--threads", "2", "--memory-mib", "4", "--repeats", "3"]) == 0
    assert "12.5% longer, -1.0% to 20.0%" in capsys.readouterr().out
    assert (local(out).launch_slowdown, local(out).readings["slowed"]) == (0.125, slowed)
    slowed["slowdown"]["median"] = -0.01
    assert measure(Plan(device="cpu", folder=tmp_path, **QUICK)).launch_slowdown == 0


def test_the_command_writes_what_hardware_local_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "local.yaml"
    words = ["--device", "cpu", "--folder", str(tmp_path), "--out", str(out), "--mib", "0.25", "1"]
    words += ["--tokens", "1", "--hidden", "64", "--width", "32", "--file-mib", "2", "--block-mib", "1"]
    assert main([*words, "--threads", "2", "--memory-mib", "4", "--repeats", "3"]) == 0
    shown = capsys.readouterr().out
    assert "copy, pageable" in shown
    assert "hardware=local" in shown
    assert shown.strip().splitlines()[-1] == str(out)
    assert local(out).measured


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--mib", "1"], "name two or more sizes"),
        (["--mib", "0", "1"], "sizes above 0"),
        (["--tokens", "0"], "numbers from 1"),
        (["--top-k", "0"], "--top-k=0 is too small"),
        (["--repeats", "1"], "--repeats=1 is too small"),
        (["--file-mib", "0"], "--file-mib=0 is too small"),
        (["--device", "tpu"], "--device=tpu is not known"),
    ],
)
def test_nonsense_is_refused_in_one_sentence(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "read_copies", lambda *_: pytest.fail("something was measured"))
    assert main(words) == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert says in shown
    assert "Traceback" not in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no CUDA device here; choose cpu"):
        measure(Plan(device="cuda"))
