"""Packing: what is written is what was read, nothing half-written is seen, and memory stays small."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from specgate.errors import ConfigError, SpecgateError, StoreError
from specgate.runtime import codecs, native
from specgate.runtime.layout import DTYPES
from specgate.runtime.pack import Options, main, pack, parse
from specgate.runtime.source import ExpertSource
from tests.runtime.checkpoints import FAMILIES, experts_of, loaded, save

QUIET = Console(quiet=True)
needs_zstd = pytest.mark.skipif(
    not native.available() or not native.require().zstd_available(), reason="no native core, or no libzstd"
)


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("olmoe", tmp_path_factory.mktemp("olmoe"))


def packed_file(model: Path | str, out: Path, **more: Any) -> Path:
    return pack(Options(moe=str(model), out=str(out), **more), QUIET).path


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_bit_for_bit(family: str, tmp_path: Path) -> None:
    folder = save(family, tmp_path / "model", max_shard_size="50KB")
    source = ExpertSource.open(packed_file(folder, tmp_path / "x.experts"))
    assert (source.packed, source.family, source.layout.is_copy) == (True, family, True)
    experts = experts_of(loaded(folder, torch.bfloat16))
    assert len(experts) == len(source.blocks)
    for b, expected in enumerate(experts):
        got = source.tensors(b)
        assert set(got) == set(expected)
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    wide = ExpertSource.open(tmp_path / "x.experts", torch.float32)
    assert torch.equal(wide.tensors(3)[name := next(iter(experts[3]))], experts[3][name].float())


@pytest.mark.parametrize("name", ["olmoe_ref", "switch_ref"])
@pytest.mark.parametrize(("codec", "group"), [("int8", 0), ("int4", 64), ("fp8", 0)])
def test_bundled_models_within_the_bounds(name: str, codec: str, group: int, tmp_path: Path) -> None:
    plain = ExpertSource.open(name)
    path = packed_file(name, tmp_path / "x.experts", codec=codec, group=group)
    for dtype in DTYPES.values():
        source = ExpertSource.open(path, dtype)
        assert (source.model_id, source.revision) == (plain.model_id, plain.revision)
        for b in range(0, len(source.blocks), 37):
            exact = plain.tensors(b)
            for piece, tensor in source.tensors(b).items():
                bound = codecs.error_bound(exact[piece], codec, group, dtype)
                assert ((tensor.double() - exact[piece].double()).abs() <= bound).all()


def test_the_same_content_gives_the_same_bytes(olmoe: Path, tmp_path: Path) -> None:
    one = packed_file(olmoe, tmp_path / "1.experts", codec="int4").read_bytes()
    assert packed_file(olmoe, tmp_path / "2.experts", codec="int4", group=32).read_bytes() == one


@needs_zstd
@pytest.mark.parametrize("codec", ["none", "int4"])
def test_zstd(codec: str, olmoe: Path, tmp_path: Path) -> None:
    plain = ExpertSource.open(packed_file(olmoe, tmp_path / "plain.experts", codec=codec))
    source = ExpertSource.open(packed_file(olmoe, tmp_path / "zstd.experts", codec=codec, zstd=True, level=5))
    assert source.compressed
    assert not plain.compressed
    for b, block in enumerate(source.blocks):
        assert block.compressed == block.segments[0].length != source.layout.block_bytes
        assert source.read(b) == plain.read(b)


def test_another_dtype_for_what_is_not_coded(olmoe: Path, tmp_path: Path) -> None:
    folder = save("gpt_oss", tmp_path / "model", torch.float32)
    half = ExpertSource.open(packed_file(folder, tmp_path / "x.experts", dtype="bfloat16"))
    whole = ExpertSource.open(folder, "bfloat16")
    assert half.layout.is_copy
    assert half.layout.block_bytes == half.layout.slot_bytes == whole.layout.slot_bytes
    assert whole.layout.block_bytes > 1.8 * half.layout.block_bytes
    assert all(torch.equal(half.tensors(5)[name], tensor) for name, tensor in whole.tensors(5).items())


# --------------------------------------------------------------------------------------- nothing half-written


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "problem", [KeyboardInterrupt, StoreError("broken"), OSError(errno.EIO, "I/O error")]
)
def test_an_interruption_leaves_nothing(
    problem: Any, olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = SimpleNamespace(count=0)
    read = ExpertSource.read

    def failing(self: ExpertSource, block: int) -> bytearray:
        calls.count += 1
        if calls.count == 10:
            assert names(tmp_path) == ["x.experts.partial"]
            raise problem
        return read(self, block)

    with monkeypatch.context() as patch:
        patch.setattr(ExpertSource, "read", failing)
        with pytest.raises(type(problem) if isinstance(problem, Exception) else problem):
            packed_file(olmoe, tmp_path / "x.experts")
    assert names(tmp_path) == []
    packed_file(olmoe, tmp_path / "x.experts")
    assert names(tmp_path) == ["x.experts"]


def test_a_killed_process_is_written_over(olmoe: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time; from specgate.runtime import pack, source; read = source.ExpertSource.read\n"
        "def slow(self, b):\n"
        "    if b == 9: print('there', flush=True); time.sleep(60)\n"
        "    return read(self, b)\n"
        "source.ExpertSource.read = slow; pack.main(sys.argv[1:])"
    )
    out = tmp_path / "x.experts"
    command = [sys.executable, "-c", code, f"moe={olmoe}", f"out={out}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        with pytest.raises(StoreError, match=r"Another process is writing .*x.experts.partial"):
            packed_file(olmoe, out)
        process.send_signal(signal.SIGKILL)
    assert names(tmp_path) == ["x.experts.partial"]
    fresh = packed_file(olmoe, tmp_path / "y.experts").read_bytes()
    assert packed_file(olmoe, out).read_bytes() == fresh
    assert names(tmp_path) == ["x.experts", "y.experts"]


def test_a_full_disk(olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
        with pytest.raises(StoreError, match=r"needs 0.2 MB and its disk has 0.1 MB free; choose"):
            packed_file(olmoe, tmp_path / "x.experts")
    assert names(tmp_path) == []
    write = os.pwrite

    def full(file: int, data: Any, offset: int) -> int:
        if offset > 60_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[:1000], offset)  # short writes too

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(StoreError, match=r"failed \(No space left on device\); free some space"):
            packed_file(olmoe, tmp_path / "x.experts")
    assert names(tmp_path) == []


def test_an_existing_file_stays(olmoe: Path, tmp_path: Path) -> None:
    (tmp_path / "x.experts").write_text("mine")
    with pytest.raises(ConfigError, match=r"x.experts exists already; delete it or choose another out="):
        packed_file(olmoe, tmp_path / "x.experts")
    assert names(tmp_path) == ["x.experts"]
    with pytest.raises(StoreError, match="cannot be written"):
        packed_file(olmoe, tmp_path / "x.experts" / "y.experts")


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    folder = save("switch_transformers", tmp_path / "model")
    source = ExpertSource.open(folder)
    place = source.blocks[11].segments[1]
    with source.paths[place.file].open("r+b") as f:
        f.seek(place.offset + 10)
        f.write(b"\x80\x7f")  # infinity in bfloat16
    sentence = r"wo of layer 1, expert 3 cannot be coded. A value is not finite"
    with pytest.raises(StoreError, match=sentence):
        packed_file(folder, tmp_path / "x.experts", codec="fp8")
    kept = ExpertSource.open(packed_file(folder, tmp_path / "y.experts"))
    assert kept.tensors(11)["wo"].isinf().sum() == 1


# ---------------------------------------------------------------------------------------------- command line


def test_the_command_line(olmoe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.experts"
    assert main([f"moe={olmoe}", "codec=int8", f"out={out}"]) == 0
    told = capsys.readouterr()
    assert re.fullmatch(
        rf"{out}: 24 experts, [\d.]+ MB \([\d.]+% of the checkpoint's [\d.]+ MB\), .* MB/s\n", told.out
    )
    assert main([f"moe={olmoe}", "codec=int8", f"out={out}"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["--help"]) == 0
    assert "codec" in capsys.readouterr().out


def test_the_default_name(olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert pack(Options(moe="switch_ref", codec="fp8"), QUIET).path == Path(
        "data/experts/switch_ref-fp8.experts"
    )
    assert names(tmp_path / "data" / "experts") == ["switch_ref-fp8.experts"]


def test_interrupted_on_the_command_line(
    olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(self: ExpertSource, block: int) -> bytearray:
        raise KeyboardInterrupt

    monkeypatch.setattr(ExpertSource, "read", stop)
    assert main([f"moe={olmoe}", f"out={tmp_path / 'x.experts'}"]) == 130
    assert "Stopped; nothing was written." in capsys.readouterr().err
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["codec=int8"], "moe= is missing"),
        (["moe=olmoe_ref", "codek=int8"], "codek=int8 is not an option; write key=value with moe, codec"),
        (["moe=olmoe_ref", "int8"], "int8 is not an option"),
        (["moe=olmoe_ref", "zstd=yes"], "zstd=yes is neither true nor false"),
        (["moe=olmoe_ref", "group=x"], "group=x is not a number"),
        (["moe=olmoe_ref", "codec=int3"], "codec=int3 is unknown; choose none, int8, int4 or fp8"),
        (["moe=olmoe_ref", "codec=int4", "group=48"], "group=48 is not possible"),
        (["moe=olmoe_ref", "dtype=float8"], "dtype=float8 is unknown"),
        (["moe=olmoe_ref", "zstd=true", "level=30"], "level=30 is not possible; choose 1 to 19"),
        (["moe=nowhere"], "No model is called 'nowhere'"),
    ],
)
def test_settings_that_make_no_sense(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(SpecgateError, match=sentence):
        pack(parse([*arguments, f"out={tmp_path / 'x.experts'}"]), QUIET)
    assert names(tmp_path) == []


def test_packing_what_is_packed(olmoe: Path, tmp_path: Path) -> None:
    file = packed_file(olmoe, tmp_path / "x.experts")
    with pytest.raises(ConfigError, match="is a packed file already"):
        packed_file(file, tmp_path / "y.experts")


def test_memory_stays_at_a_few_experts(tmp_path: Path) -> None:
    """A 75 MB checkpoint of 4.7 MB experts, in a process whose memory is measured before and at its most."""
    folder = save("olmoe", tmp_path / "model", hidden_size=512, intermediate_size=1536, num_hidden_layers=2)
    assert (folder / "model.safetensors").stat().st_size > 75e6
    code = (
        "import resource, sys, torch; from specgate.runtime import pack\n"
        "from specgate.runtime.source import ExpertSource\n"
        "ExpertSource.open(sys.argv[1])  # the library's own imports\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "for codec in ('none', 'int4', 'fp8'):\n"
        "    assert pack.main([f'moe={sys.argv[1]}', f'codec={codec}', f'out={sys.argv[2]}-{codec}']) == 0\n"
        "print('grown by', (peak() - before) // 1024)"
    )
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "x")]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    grown = int(told.stdout.rpartition("grown by ")[2])
    assert grown < 8 * 4.7, (
        told.stdout
    )  # one as read, one as coded, and float32 of a million values at a time
