"""The file tier from Python: the checksum against its definition, reads against plain file contents."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specgate.errors import ConfigError, StoreError
from specgate.runtime import native

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="the native core is not compiled"),
    pytest.mark.timeout(120),
]

SIZES = (1_300_000, 4096, 70_001)
FOREVER = 1 << 40


def crc_by_definition(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def has_io_uring() -> bool:
    if not native.available():
        return False
    with native.require().FileReader([__file__]) as reader:
        return bool(reader.backend == "io_uring")


BACKENDS = ["pread", *(["io_uring"] if has_io_uring() else [])]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("experts")
    paths = [folder / f"{i}.bin" for i in range(len(SIZES))]
    for i, (path, size) in enumerate(zip(paths, SIZES, strict=True)):
        path.write_bytes(np.random.default_rng(i).bytes(size))
    return paths


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Threads and descriptors are as many as before."""

    def counts() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    before = counts()
    yield
    end = time.monotonic() + 10  # the kernel's own workers of a ring take a moment to end
    while counts() != before and time.monotonic() < end:
        time.sleep(0.01)
    assert counts() == before


def reader_of(paths: list[Path], **options: Any) -> Any:
    return native.require().FileReader([str(path) for path in paths], **options)


def read(reader: Any, segments: list[tuple[int, int, int, int]], size: int, **more: Any) -> tuple[Any, bytes]:
    """One request into fresh memory of zeros: its result and that memory."""
    memory = np.zeros(size, dtype=np.uint8)
    reader.submit(1, segments, memory, **more)
    (result,) = reader.wait(60)
    return result, memory.tobytes()


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=3000), st.integers(0, 3000))
def test_crc32c_is_the_published_one(data: bytes, at: int) -> None:
    crc32c = native.require().crc32c
    assert crc32c(b"123456789") == 0xE3069283  # the catalogue's check value
    assert crc32c(data) == crc_by_definition(data)
    assert crc32c(data[at:], crc32c(data[:at])) == crc32c(data)
    assert crc32c(np.frombuffer(data, dtype=np.uint8)) == crc32c(bytearray(data)) == crc32c(data)


def test_crc32c_takes_tensors_and_refuses_strided_memory() -> None:
    crc32c = native.require().crc32c
    values = torch.arange(40, dtype=torch.float32).reshape(5, 8)
    assert crc32c(values.to(torch.bfloat16)) == crc32c(
        values.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    )
    with pytest.raises(TypeError):
        crc32c(values.numpy()[:, ::2])


@pytest.mark.parametrize("direct", [True, False])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_segments_arrive_and_nothing_else_is_touched(
    files: list[Path], direct: bool, data: st.DataObject
) -> None:
    expected = bytearray(1 << 21)
    segments, at = [], 0
    for _ in range(data.draw(st.integers(0, 4))):
        file = data.draw(st.integers(0, len(SIZES) - 1))
        unit = data.draw(st.sampled_from([1, 256, 4096]))
        offset = data.draw(st.integers(0, SIZES[file] // unit)) * unit
        length = data.draw(st.one_of(st.just(SIZES[file] - offset), st.integers(0, SIZES[file] - offset)))
        at = (at + unit - 1) // unit * unit
        if at + length > len(expected):
            continue
        segments.append((file, offset, length, at))
        expected[at : at + length] = files[file].read_bytes()[offset : offset + length]
        at += length + data.draw(st.integers(0, 9))
    for backend in BACKENDS:
        with reader_of(files, backend=backend, direct=direct, chunk=1 << 16, depth=8) as reader:
            result, got = read(reader, segments, len(expected))
            assert (result.status, result.error, result.id) == ("ok", "", 1)
            assert got == bytes(expected)
            assert reader.stats()["bytes_wanted"] == sum(length for _, _, length, _ in segments)


def test_one_large_read_uses_the_depth(tmp_path: Path, backend: str) -> None:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(8 << 20))
    with reader_of([path], backend=backend, chunk=256 << 10, depth=8, threads=3) as reader:
        assert reader.size(0) == 8 << 20
        result, got = read(reader, [(0, 0, 8 << 20, 0)], 8 << 20)
        stats = reader.stats()
    assert result.status == "ok"
    assert got == path.read_bytes()
    assert stats["reads"] == 32
    assert 1 < stats["peak_in_flight"] <= {"io_uring": 8, "pread": 3}[backend]


@pytest.mark.usefixtures("nothing_left")
def test_every_request_ends_once_and_closing_cancels_the_rest(files: list[Path], backend: str) -> None:
    memories = [np.zeros(SIZES[0], dtype=np.uint8) for _ in range(40)]
    reader = reader_of(files, backend=backend, chunk=8192, depth=2, threads=2)
    for i, memory in enumerate(memories):
        reader.submit(i, [(0, 0, SIZES[0], 0)], memory)
    assert reader.cancel(39)
    assert not reader.cancel(40)
    results = reader.wait(60)
    reader.close()
    after = [memory.tobytes() for memory in memories]
    results += reader.wait(60)
    assert sorted(result.id for result in results) == list(range(40))
    assert next(result.status for result in results if result.id == 39) == "cancelled"
    assert {result.status for result in results} <= {"ok", "cancelled"}
    assert not memories[39].any()
    content = files[0].read_bytes()
    for result in results:
        assert result.status == "cancelled" or after[result.id] == content
        assert result.status == "cancelled" or 0 < result.started_ns <= result.finished_ns
    assert reader.poll() == []
    assert reader.wait() == []
    with pytest.raises(StoreError, match="closed"):
        reader.submit(1, [], memories[0])
    assert [memory.tobytes() for memory in memories] == after


def test_memory_lives_until_its_result_is_collected(files: list[Path], backend: str) -> None:
    with reader_of(files, backend=backend) as reader:
        for i in range(20):
            reader.submit(i, [(0, 0, SIZES[0], 0)], bytearray(SIZES[0]))
        with pytest.raises(ConfigError, match="request 3 has not been collected"):
            reader.submit(3, [(0, 0, 10, 0)], bytearray(10))
        found = 0
        while found < 20:
            found += len(reader.wait(60))
        reader.submit(3, [(0, 0, 10, 0)], bytearray(10))


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ((0, 70_000, errno.EIO, FOREVER, 1), r"at byte 65536 failed \(Input/output error\): check the disk"),
        ((0, 70_000, 0, 0, FOREVER), "at byte 65536 ended early 4 times: check the file system"),
        ((0, 70_000, errno.EAGAIN, FOREVER, FOREVER), "Resource temporarily unavailable"),
        ((0, 70_000, errno.EINTR, FOREVER, 3), ""),
        ((0, 70_000, errno.EAGAIN, FOREVER, 3), ""),
        ((0, 70_000, 0, 5000, 2), ""),  # the third read begins behind byte 70 000
        ((0, 70_000, 0, 0, 3), ""),
        ((1, 70_000, errno.EIO, FOREVER, 3), ""),  # of a file that is not read
    ],
)
def test_faults_of_the_disk(files: list[Path], backend: str, fault: tuple[int, ...], says: str) -> None:
    with reader_of(files, backend=backend, chunk=1 << 16, faults=[fault]) as reader:
        result, got = read(reader, [(0, 0, SIZES[0], 0)], SIZES[0])
        if says:
            assert result.status == "failed"
            assert not result.corrupt
            assert re.search(says, result.error)
            assert str(files[0]) in result.error
        else:
            assert result.status == "ok"
            assert got == files[0].read_bytes()
            assert reader.stats()["retries"] == (0 if fault[0] == 1 else fault[4])
        result, _ = read(reader, [(0, 0, 4096, 0)], 4096)  # and the reader goes on
        assert result.status == "ok"


def test_a_flipped_bit_is_found(files: list[Path], backend: str, tmp_path: Path) -> None:
    content = files[0].read_bytes()
    crc = native.require().crc32c(content[100:500_000])
    flipped = bytearray(content)
    flipped[250_000] ^= 16
    path = tmp_path / "flipped"
    path.write_bytes(flipped)
    with reader_of([files[0], path], backend=backend, chunk=1 << 16) as reader:
        result, _ = read(reader, [(0, 100, 499_900, 0)], 500_000, crc=crc)
        assert result.status == "ok"
        result, _ = read(reader, [(1, 100, 499_900, 0)], 500_000, crc=crc)
        assert result.status == "failed"
        assert result.corrupt
        assert f"'{path}' holds damaged bytes at byte 100" in result.error
        assert "corrupt" not in repr(result)
        assert "failed" in repr(result)


def test_a_file_that_is_not_what_was_opened(files: list[Path], backend: str, tmp_path: Path) -> None:
    content = files[0].read_bytes()
    truncated, replaced, removed = (tmp_path / name for name in ("truncated", "replaced", "removed"))
    for path in (truncated, replaced, removed):
        path.write_bytes(content)
    with reader_of([truncated, replaced, removed], backend=backend) as reader:
        os.truncate(truncated, 1000)
        (tmp_path / "new").write_bytes(content)
        os.replace(tmp_path / "new", replaced)
        removed.unlink()
        for file, word in ((0, "truncated"), (1, "replaced")):
            result, _ = read(reader, [(file, 4096, 4096, 0)], 4096)
            assert result.status == "failed"
            assert f"{word}' was {word} while open" in result.error
        result, got = read(reader, [(2, 0, len(content), 0)], len(content))
        assert result.status == "ok"
        assert got == content
        result, _ = read(reader, [(2, len(content) - 1, 2, 0)], 2)
        assert result.status == "failed"
        assert f"has {len(content)} bytes" in result.error


@pytest.mark.usefixtures("nothing_left")
def test_what_a_user_can_get_wrong(files: list[Path], tmp_path: Path, backend: str) -> None:
    with pytest.raises(StoreError, match=r"cannot open '.*nowhere' \(No such file or directory\): check"):
        reader_of([files[0], tmp_path / "nowhere"], backend=backend)
    with pytest.raises(StoreError, match="is not a regular file"):
        reader_of([tmp_path], backend=backend)
    for options in ({"depth": 0}, {"threads": 0}, {"chunk": 1000}, {"backend": "aio"}):
        with pytest.raises(ConfigError, match=r"choose"):
            reader_of(files, **{"backend": backend, **options})
    with reader_of(files, backend=backend) as reader:
        with pytest.raises(ConfigError, match="asks for file 3 of 3"):
            reader.submit(1, [(3, 0, 1, 0)], bytearray(1))
        with pytest.raises(ConfigError, match="puts 2 bytes at 0 of a destination of 1 bytes"):
            reader.submit(1, [(0, 0, 2, 0)], bytearray(1))
        with pytest.raises(TypeError):
            reader.submit(1, [(0, 0, 1, 0)], b"1")
        with pytest.raises(TypeError):
            reader.submit(1, [(0, 0, 1, 0)], np.zeros((4, 4))[:, ::2])
        assert reader.stats()["submitted"] == 0
