"""metrics.json: what an entry point measured, and everything needed to believe it or to run it again.

One JSON object per run, written whole or not at all:

    schema_version  1
    entry           "benchmark.py"
    command         how it was called, e.g. "python benchmark.py mode=accuracy"
    started         UTC, ISO 8601; wall_seconds: how long it ran
    git             {commit, dirty} of the code, or null outside a repository
    hardware        {cpu, cores, memory_gb, gpus}
    versions        of python, specgate and the libraries that matter
    config          the resolved configuration
    traces          identity of each trace (see specgate.report.identity)
    rows            see specgate.report.evaluate
    ...             whatever else the entry point reports
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from omegaconf import OmegaConf

from specgate.errors import SpecgateError

SCHEMA_VERSION = 1
FILE_NAME = "metrics.json"
_LIBRARIES = ("torch", "lightning", "torchmetrics", "transformers", "numpy", "safetensors", "hydra-core")


class Run:
    """Started at the beginning of an entry point, written at its end.

    Args:
        entry: file name of the entry point, ``"train.py"``.
        config: its configuration (an OmegaConf object or a plain dict), resolved when written.
    """

    def __init__(self, entry: str, config: Any = None) -> None:
        self.entry, self.config = entry, config
        self.started = datetime.now(UTC)
        self._clock = time.perf_counter()

    def write(self, directory: str | Path, **content: Any) -> Path:
        """Write ``directory/metrics.json`` with ``content`` (``rows``, ``traces``, ...) and return its path.

        Raises:
            ValueError: if ``content`` is not plain JSON (NaN included).
        """
        record = {
            "schema_version": SCHEMA_VERSION,
            "entry": self.entry,
            "command": command_line(self.entry),
            "started": self.started.isoformat(timespec="seconds"),
            "wall_seconds": round(time.perf_counter() - self._clock, 3),
            "git": git_state(),
            "hardware": hardware(),
            "versions": versions(),
            "config": plain_config(self.config),
            **content,
        }
        path = Path(directory) / FILE_NAME
        write_json(path, record)
        return path


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON object so that a reader sees the old file or the whole new one, never a part.

    Every key starts a line, and so does every item of a list of objects: a diff stays readable, the file
    small.

    Raises:
        ValueError: if a value is NaN or infinite; ``TypeError`` if it is no JSON at all.
    """
    lines = [f"{json.dumps(key)}: {_json_lines(value)}" for key, value in record.items()]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _json_lines(value: Any) -> str:
    def dump(item: Any) -> str:
        return json.dumps(item, allow_nan=False)

    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n " + ",\n ".join(map(dump, value)) + "\n]"
    return dump(value)


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a metrics.json; ``path`` is the file or a run's directory.

    Raises:
        SpecgateError: if there is none, it is damaged, or it has another schema.
    """
    file = Path(path)
    file = file / FILE_NAME if file.is_dir() else file
    if not file.is_file():
        raise SpecgateError(
            f"{file} does not exist: give a {FILE_NAME} or the output directory of a finished run"
        )
    try:
        record = json.loads(file.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise SpecgateError(f"{file} is not valid JSON ({error}): run its entry point again") from None
    version = record.get("schema_version") if isinstance(record, dict) else None
    if version != SCHEMA_VERSION:
        raise SpecgateError(
            f"{file} has schema_version {version!r} and this specgate reads {SCHEMA_VERSION}: "
            "run its entry point again"
        )
    return record


def plain_config(config: Any) -> Any:
    """The configuration as plain values, interpolations resolved where they can be."""
    if not OmegaConf.is_config(config):
        return config
    try:
        return OmegaConf.to_container(config, resolve=True)
    except Exception:  # a run directory, say, is only known inside Hydra
        return OmegaConf.to_container(config, resolve=False)


def command_line(entry: str) -> str:
    """How this process was called, without the machine's paths: ``python benchmark.py mode=accuracy``."""
    name = Path(sys.argv[0]).name
    words = sys.argv[1:] if name == entry else []
    return shlex.join(["python", entry, *words])


def git_state() -> dict[str, Any] | None:
    """Commit of the code and whether files differ from it; None outside a git repository."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None  # installed somewhere inside another repository
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> dict[str, Any]:
    """CPU model, usable cores, memory in GB, GPU names."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": math.floor(psutil.virtual_memory().total / 1e9),
        "gpus": gpus,
    }


def cpu_model() -> str:
    """The processor's name as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python, specgate and the libraries that results depend on."""
    from specgate import __version__

    found = {"python": platform.python_version(), "specgate": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe_hardware(hardware_: Mapping[str, Any]) -> str:
    """One phrase: ``NVIDIA H100 80GB HBM3, 16 cores of ...``."""
    gpus = ", ".join(hardware_.get("gpus") or [])
    return f"{gpus + ', ' if gpus else ''}{hardware_['cores']} cores of {hardware_['cpu']}"
