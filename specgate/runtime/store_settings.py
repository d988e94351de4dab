"""How an expert store moves bytes, and how many experts fit its memory."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from specgate.errors import ConfigError
from specgate.runtime.layout import aligned

PAGE = 4096
SPARED = 0.5  # of free memory, left to others when host_bytes is not given


PIECES_AHEAD = 3  # of forecasts' copies on their way to a GPU at a time (csrc/device_cuda.cu)


@dataclass(frozen=True)
class StoreSettings:
    """How the store moves bytes.

    Attributes:
        eviction, host_eviction: ``lru``, ``lfu``, ``lfru``, ``static``, ``forecast``, ``belady`` or
            ``priced`` (see :meth:`~specgate.runtime.store.ExpertStore.set_reuse`).
        half_life: of ``lfru``, in events.
        max_pending: forecast experts that wait for a transfer at most.
        max_reads: experts read from the file at a time.
        prefetch_copy_bytes, prefetch_read_bytes: of forecast experts in flight at most; what a demanded one
            can find before it on the link.
        piece_bytes: a forecast expert is copied to a GPU in pieces of so many, between which a demanded one
            goes first; 0: as a whole.
        price_scale: with ``priced``, a forecast expert is fetched if p times the time that it saves exceeds
            what its slot's present expert is worth and what its copy takes, times the link's utilisation
            by demands, times this; None: every forecast is. price_floor: of that factor on the copy, since a
            fetch costs energy and the host's time on a link that is free.
        prefetch_depth: events ahead that a forecast expert is fetched for with ``priced``; what is foreseen
            beyond them guides eviction alone. 0: all are fetched for.
        trust: forecasts are believed as far as earlier ones of like p and horizon came true (csrc/trust.h).
        reader: ``auto``, ``io_uring`` or ``pread``.
        direct: read past the page cache (O_DIRECT) where the file system allows it.
        depth: reads in flight for io_uring; threads: for pread.
        workers: threads that decompress.
        timeline: newest transfers and stalls kept for :meth:`ExpertStore.timeline`.
        poison: fill slots with NaN before an expert lies in them.
        faults: for tests: (offset, errno, limit): reads of that byte of a file fail or end early; a negative
            errno makes them late by as many milliseconds.
    """

    eviction: str = "lru"
    host_eviction: str = "lru"
    half_life: float = 64.0
    max_pending: int = 1024
    max_reads: int = 8
    prefetch_copy_bytes: int = 64 << 20
    prefetch_read_bytes: int = 64 << 20
    piece_bytes: int = 4 << 20
    price_scale: float | None = None
    price_floor: float = 0.0
    prefetch_depth: int = 0
    trust: bool = False
    reader: str = "auto"
    direct: bool = True
    depth: int = 32
    threads: int = 4
    workers: int = 2
    timeline: int = 100_000
    poison: bool = False
    faults: tuple[tuple[int, int, int], ...] = ()

    @property
    def chunk_bytes(self) -> int:
        """Where a forecast's copy to a GPU can be stopped, for a simulation: a demanded expert finds up to
        PIECES_AHEAD pieces before it, on average as much as if copies could be stopped at multiples of this.
        """
        return (2 * PIECES_AHEAD - 1) * self.piece_bytes


def host_slots_that_fit(block_bytes: int, blocks: int, host_bytes: int | None) -> int:
    """Encoded experts that ``host_bytes`` hold, or half of the free memory; not more than all."""
    slab = aligned(block_bytes, PAGE)
    if host_bytes is not None and host_bytes < 0:
        raise ConfigError(f"host_bytes={host_bytes} is negative; write 0 for no host tier.")
    room = int(psutil.virtual_memory().available * SPARED) if host_bytes is None else host_bytes
    return min(blocks, room // slab)
