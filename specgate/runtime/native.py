"""The native core, ``specgate.runtime._native``: compiled from csrc/, loaded on first use, missed politely.

Every other module asks here, so that specgate imports, and its Python reference runs, where nothing was
compiled.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from types import ModuleType

from specgate.errors import StoreError

MODULE = "specgate.runtime._native"
REBUILD = (
    "install a C++20 compiler, then run `make native` in specgate's folder, or install it again with "
    "SPECGATE_NATIVE=1 pip install --force-reinstall --no-deps, which shows why it does not compile"
)


@cache
def _load() -> ModuleType | str:
    """The module, or why there is none."""
    try:
        return import_module(MODULE)
    except ModuleNotFoundError:
        version = ".".join(map(str, sys.version_info[:2]))
        return f"was not compiled for this Python {version}"
    except ImportError as error:
        return f"cannot be loaded ({error})"


def available() -> bool:
    """Whether the native core can be used."""
    return isinstance(_load(), ModuleType)


def require() -> ModuleType:
    """The native core.

    Raises:
        StoreError: it was not compiled, or the compiled file cannot be loaded; says how to build it.
    """
    module = _load()
    if isinstance(module, str):
        raise StoreError(f"specgate's native core ({MODULE}) {module}: {REBUILD}")
    return module


def backend() -> str:
    """``native+cuda`` (compiled with CUDA, whether or not a device is here), ``native`` or ``python``."""
    module = _load()
    if isinstance(module, str):
        return "python"
    return "native+cuda" if module.build_info()["cuda"] else "native"
