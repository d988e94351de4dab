"""What the kernel lets a program read files with, asked by trying. Needs nothing but the standard library."""

from __future__ import annotations

import ctypes
import os
import tempfile
from pathlib import Path

#: The same on every architecture of Linux.
IO_URING_SETUP = 425


def io_uring_error() -> int:
    """0 if the kernel gives out an io_uring, else its errno (a container may forbid what the kernel has)."""
    libc = ctypes.CDLL(None, use_errno=True)
    parameters = ctypes.create_string_buffer(120)  # struct io_uring_params: zeros ask for nothing special
    ring = libc.syscall(ctypes.c_long(IO_URING_SETUP), ctypes.c_uint(1), parameters)
    if ring < 0:
        return ctypes.get_errno()
    os.close(ring)
    return 0


def direct_io_error(folder: Path) -> int:
    """0 if a file in ``folder`` can be opened past the page cache (O_DIRECT), else the errno.

    Raises:
        OSError: no file can be made in the folder.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".specgate-direct-") as file:
        try:
            os.close(os.open(file.name, os.O_RDONLY | os.O_DIRECT))
        except OSError as error:
            return error.errno or -1
    return 0
