"""Packs the experts of a model into one file: ``python -m specgate.runtime.pack moe=olmoe_ref codec=int8``.

The model is never loaded: each expert is read from the safetensors files, encoded and written, one at a time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from specgate.errors import ConfigError, SpecgateError
from specgate.runtime import codecs, native
from specgate.runtime.layout import DTYPES, BlockLayout
from specgate.runtime.packed import PackedHeader, PackedWriter, is_packed
from specgate.runtime.source import ExpertSource

FOLDER = Path("data/experts")


@dataclass(frozen=True)
class Options:
    """What may be written on the command line.

    Attributes:
        moe: a bundled model, a directory or a name on the hub.
        codec: ``none``, ``int8``, ``int4`` or ``fp8``.
        group: values that share a scale, 32 or 64, with ``int4``; 0 is 32.
        zstd: whether to compress each block.
        level: of zstd, 1 to 19.
        dtype: of what is not coded; empty is the checkpoint's own.
        out: the file; empty is ``data/experts/<model>-<codec>.experts``.
        revision: branch, tag or commit on the hub.
    """

    moe: str
    codec: str = "none"
    group: int = 0
    zstd: bool = False
    level: int = 3
    dtype: str = ""
    out: str = ""
    revision: str = ""


@dataclass(frozen=True)
class Packed:
    """What was packed.

    Attributes:
        path: the file.
        blocks: experts in it.
        plain_bytes: of the experts in the checkpoint's dtype.
        file_bytes: of the file.
        seconds: that it took.
    """

    path: Path
    blocks: int
    plain_bytes: int
    file_bytes: int
    seconds: float


def parse(arguments: Sequence[str]) -> Options:
    """Options from ``key=value`` arguments.

    Raises:
        ConfigError: an unknown key, a value of the wrong kind, or no ``moe``.
    """
    kinds = {field.name: type(field.default) for field in fields(Options)} | {"moe": str}
    values: dict[str, Any] = {}
    for argument in arguments:
        key, found, text = argument.partition("=")
        if not found or key not in kinds:
            raise ConfigError(f"{argument} is not an option; write key=value with {', '.join(kinds)}.")
        if kinds[key] is bool:
            if text.lower() not in ("true", "false"):
                raise ConfigError(f"{argument} is neither true nor false; write {key}=true or {key}=false.")
            values[key] = text.lower() == "true"
        elif kinds[key] is int:
            if not text.isdecimal():
                raise ConfigError(f"{argument} is not a number; write {key}=32, say.")
            values[key] = int(text)
        else:
            values[key] = text
    if not values.get("moe"):
        raise ConfigError(
            "moe= is missing; name a bundled model (olmoe_ref), a directory or a name on the hub."
        )
    return Options(**values)


def pack(options: Options, console: Console | None = None) -> Packed:
    """Packs a model's experts.

    Raises:
        SpecgateError: whatever :meth:`specgate.runtime.source.ExpertSource.open` and
            :class:`specgate.runtime.packed.PackedWriter` refuse; a value that is not finite with a codec;
            zstd without its library; an unknown codec, group, dtype or level.
    """
    start = time.perf_counter()
    if options.codec not in codecs.LEVELS and options.codec != "none":
        raise ConfigError(f"codec={options.codec} is unknown; choose none, int8, int4 or fp8.")
    if options.dtype and options.dtype not in DTYPES:
        raise ConfigError(f"dtype={options.dtype} is unknown; choose {', '.join(DTYPES)}.")
    if not 1 <= options.level <= 19:
        raise ConfigError(f"level={options.level} is not possible; choose 1 to 19.")
    if is_packed(options.moe):
        raise ConfigError(
            f"moe={options.moe} is a packed file already; give the model that it was made from."
        )
    compress = _compressor(options.level) if options.zstd else None
    source = ExpertSource.open(options.moe, options.dtype or None, options.revision or None)
    tensors = [(piece.name, piece.shape, piece.dtype) for piece in source.layout.pieces]
    layout = BlockLayout.make(tensors, options.codec, options.group)
    header = PackedHeader(
        source.model_id, source.revision, source.family, source.layers, source.experts, layout, options.zstd
    )
    path = _path(options, source.model_id)
    bound = layout.block_bytes
    if compress is not None:
        bound += bound // 128 + 1024  # zstd's own bound for what does not compress is below this
    bar = Progress(
        TextColumn("packing {task.fields[where]}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
        transient=True,
        disable=console is not None and not console.is_terminal,
    )
    plain = source.layout.slot_bytes
    with PackedWriter(path, header, bound) as writer, bar:
        task = bar.add_task("", total=plain * len(source.blocks), where="")
        for b, block in enumerate(source.blocks):
            where = f"layer {block.layer}, expert {block.expert}"
            data = _encode(source, b, layout, where)
            writer.add(data if compress is None else compress(data))
            bar.update(task, advance=plain, where=where)
        size = writer.finish()
    seconds = time.perf_counter() - start
    return Packed(path, len(source.blocks), plain * len(source.blocks), size, seconds)


def _encode(source: ExpertSource, b: int, layout: BlockLayout, where: str) -> Any:
    """One expert's block as a bytes-like object."""
    if layout.codec == "none" and source.layout.is_copy:
        return source.read(b)
    tensors = source.tensors(b)
    return codecs.encode_block(layout, tensors, where).numpy()


def _compressor(level: int) -> Any:
    """Bytes -> one zstd frame, from the native core.

    Raises:
        StoreError: if the core is not built.
        ConfigError: if the library is absent.
    """
    core: Any = native.require()
    core.zstd_version()
    return lambda data: core.zstd_compress(np.frombuffer(data, np.uint8), level)


def _path(options: Options, model_id: str) -> Path:
    if options.out:
        return Path(options.out).expanduser()
    name = f"{Path(model_id).name}-{options.codec}{'-zstd' if options.zstd else ''}.experts"
    return FOLDER / name


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    told = list(sys.argv[1:] if arguments is None else arguments)
    if not told or told[0] in ("-h", "--help"):
        print(f"{__doc__}\nOptions:{str(Options.__doc__).partition('Attributes:')[2].rstrip()}")
        return 0
    errors = Console(stderr=True)
    try:
        with torch.inference_mode():
            done = pack(parse(told), errors)
    except SpecgateError as error:
        errors.print(str(error), style="bold red", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        errors.print("Stopped; nothing was written.", style="bold red")
        return 130
    share = done.file_bytes / done.plain_bytes
    rate = done.plain_bytes / 1e6 / done.seconds
    print(
        f"{done.path}: {done.blocks} experts, {done.file_bytes / 1e6:.1f} MB ({share:.1%} of the "
        f"checkpoint's {done.plain_bytes / 1e6:.1f} MB), {done.seconds:.1f} s, {rate:.0f} MB/s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
