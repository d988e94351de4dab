"""The benchmark of the file tier counts every byte, and refuses what was not read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.file_tier import MIB, Plain, Reader, backends, make_file, measure, open_direct
from specgate.errors import ConfigError, StoreError
from specgate.runtime import native

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="the native core is not compiled"),
    pytest.mark.timeout(120),
]


def test_every_variant_reads_the_whole_file(tmp_path: Path) -> None:
    path = make_file(tmp_path, 5 * MIB + 777)
    readers = [Reader(backend, 2, sums) for backend in backends() for sums in (False, True)]
    result = measure(path, [Plain(1, 2), Plain(2, 1), *readers], rounds=2)
    assert result["file_bytes"] == os.path.getsize(path) == 5 * MIB + 777
    assert [row["backend"] for row in result["reader"]] == [reader.backend for reader in readers]
    speeds = [row["gb_per_s"] for row in result["plain"]]
    assert result["best_plain"]["gb_per_s"] == max(speeds) > 0
    for row in result["plain"] + result["reader"]:
        assert row["slowest"] <= row["gb_per_s"] <= row["fastest"]
        assert row["share_of_best_plain"] == pytest.approx(row["gb_per_s"] / max(speeds))


def test_timed_reading_checks_what_it_reads(tmp_path: Path) -> None:
    path = make_file(tmp_path, 3 * MIB)
    core = native.require()
    buffers = [bytearray(MIB), bytearray(MIB)]
    sums = [core.crc32c(path.read_bytes()[at : at + MIB]) for at in range(0, 3 * MIB, MIB)]
    assert core.time_reading(str(path), MIB, buffers, sums) > 0
    assert {bytes(buffer) for buffer in buffers} <= {
        path.read_bytes()[at : at + MIB] for at in range(0, 3 * MIB, MIB)
    }
    with pytest.raises(StoreError, match="holds damaged bytes at byte 1048576"):
        core.time_reading(str(path), MIB, buffers, [sums[0], sums[1] ^ 1, sums[2]])
    with pytest.raises(ConfigError, match="2 checksums were given for 3 blocks"):
        core.time_reading(str(path), MIB, buffers, sums[:2])
    with pytest.raises(ConfigError, match="cannot take blocks of 2097152"):
        core.time_reading(str(path), 2 * MIB, buffers)
    with pytest.raises(StoreError, match="cannot open"):
        core.time_reading(str(tmp_path / "nowhere"), MIB, buffers)


def test_direct_reads_are_told_from_cached_ones(tmp_path: Path) -> None:
    path = make_file(tmp_path, MIB)
    descriptor, direct = open_direct(path)
    os.close(descriptor)
    with native.require().FileReader([str(path)]) as reader:
        assert direct or not reader.direct(0)
