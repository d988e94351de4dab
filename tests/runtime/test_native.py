"""The native core: how it is found and missed, what it says of itself, and installing with and without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import specgate
from specgate.errors import BudgetError, ConfigError, StoreError
from specgate.runtime import native

ROOT = Path(__file__).parent.parent.parent
compiled = pytest.mark.skipif(not native.available(), reason="specgate was installed with SPECGATE_NATIVE=0")


@pytest.fixture
def forget() -> Iterator[None]:
    """The native core is looked for anew, in this test and after it."""
    native._load.cache_clear()
    yield
    native._load.cache_clear()


def test_a_missing_core_is_one_sentence_with_a_remedy(forget: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, native.MODULE, None)  # Python's way to say that there is no such module
    assert not native.available()
    assert native.backend() == "python"
    with pytest.raises(
        StoreError, match=r"was not compiled for this Python 3\.\d+: .*`make native`"
    ) as caught:
        native.require()
    assert "SPECGATE_NATIVE=1 pip install" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_core_that_does_not_load_says_why(forget: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("undefined symbol: cudaFoo")

    monkeypatch.setattr(native, "import_module", broken)
    with pytest.raises(StoreError, match=r"cannot be loaded \(undefined symbol: cudaFoo\): .*make native"):
        native.require()


@compiled
def test_the_core_imports_without_torch_and_without_a_device() -> None:
    program = (
        "import json, sys; from specgate.runtime import native;"
        "print(json.dumps([native.require().build_info(), native.backend(), 'torch' in sys.modules]))"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    info, backend, torch = json.loads(done.stdout)
    assert info["version"] == specgate.__version__, "make native"
    assert info["compiler"].startswith(("GCC", "Clang"))
    assert info["cuda_devices"] == 0
    assert backend == ("native+cuda" if info["cuda"] else "native")
    assert (info["cuda_version"] is None) == (not info["cuda"])
    assert not torch
    assert done.stderr == "", "neither the driver's absence nor nanobind has anything to say"


@compiled
@pytest.mark.gpu
def test_devices_are_those_that_torch_counts() -> None:
    import torch

    assert native.require().build_info()["cuda_devices"] == torch.cuda.device_count()


@compiled
def test_failures_of_the_core_are_errors_of_specgate() -> None:
    ledger = native.require().Ledger
    with pytest.raises(ConfigError, match="fifo"):
        ledger([0, 0], [8], [1], [0], "fifo")
    with pytest.raises(BudgetError):
        ledger([0, 0], [8], [1], [0]).demand([0, 1])
    assert issubclass(BudgetError, StoreError)


def pip_wheel(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``pip wheel`` of this checkout, with SPECGATE_NATIVE only if it is among the variables."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    inherited = {name: value for name, value in os.environ.items() if name != "SPECGATE_NATIVE"}
    return subprocess.run(
        [*command, "--wheel-dir", str(folder), str(ROOT)],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "environment",
    [{"SPECGATE_NATIVE": "0"}, {"CXX": "/nowhere/c++"}],
    ids=["left out", "compiler fails"],
)
def test_without_a_core_the_wheel_is_pure_python(tmp_path: Path, environment: dict[str, str]) -> None:
    done = pip_wheel(tmp_path, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.whl")
    assert file.name == f"specgate-{specgate.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(file).namelist()
    assert "specgate/runtime/native.py" in names
    assert [name for name in names if name.endswith((".so", ".cpp", ".h", ".cu"))] == []


def test_a_core_that_is_asked_for_and_does_not_compile_is_a_failure_that_says_what_to_do(
    tmp_path: Path,
) -> None:
    done = pip_wheel(tmp_path, SPECGATE_NATIVE="1", CXX="/nowhere/c++")
    assert done.returncode != 0
    said = " ".join((done.stdout + done.stderr).split())
    assert "/nowhere/c++" in said
    assert "needs a C++20 compiler" in said
    assert "SPECGATE_NATIVE=0" in said
    assert list(tmp_path.glob("*.whl")) == []
