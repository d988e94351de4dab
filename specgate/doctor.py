"""``python -m specgate doctor``: what this machine has, and what to do about what it has not.

Needs nothing but the standard library, so that it also speaks when the installation is broken. Each line has
a status: ``ok``; ``note`` (optional, absent); ``warn`` (works, but not as meant); ``BROKEN`` (required; the
exit code is then 1).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from specgate.probe import direct_io_error, io_uring_error

OK, NOTE, WARN, BROKEN = "ok", "note", "warn", "BROKEN"
PYTHON_TESTED = ((3, 11), (3, 12))
#: Releases that must never run, whatever range they fall into.
MALICIOUS = {
    ("lightning", "2.6.2"),
    ("lightning", "2.6.3"),
    ("pytorch-lightning", "2.6.2"),
    ("pytorch-lightning", "2.6.3"),
}
REFERENCE = Path(__file__).parent / "moe" / "reference"
BUNDLED_MODELS = ("switch_ref", "olmoe_ref")
DISK_NEEDED_GB, RAM_NEEDED_GB = 5.0, 6.0
SPEED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Check:
    """One line of the doctor: what was looked at, how it is, what was found, what to do (empty when ok)."""

    name: str
    status: str
    found: str
    remedy: str = ""


def run_tool(command: list[str]) -> str | None:
    """Standard output of a tool, or None when it is absent, fails or takes more than ten seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def requirements() -> list[str]:
    """specgate's own requirement lines: from the installed metadata, else from pyproject.toml beside it."""
    try:
        return metadata.requires("specgate") or []
    except metadata.PackageNotFoundError:
        import tomllib

        file = Path(__file__).parent.parent / "pyproject.toml"
        return tomllib.loads(file.read_text())["project"]["dependencies"] if file.is_file() else []


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> Check:
    """The interpreter: 3.11 and 3.12 are tested, newer ones may work."""
    found = f"{platform.python_version()} at {sys.executable}"
    if version < PYTHON_TESTED[0]:
        return Check(
            "python",
            BROKEN,
            found,
            "specgate needs Python 3.11 or 3.12: make setup PYTHON=/path/to/python3.11",
        )
    if version > PYTHON_TESTED[-1]:
        return Check(
            "python", WARN, found, "tested on 3.11 and 3.12 only: make distclean setup PYTHON=python3.12"
        )
    return Check("python", OK, found)


def check_package(requirement: str, installed: Callable[[str], str] = metadata.version) -> Check | None:
    """One requirement line such as ``torch>=2.10`` against what is installed; None for an extra's."""
    if "extra ==" in requirement:
        return None
    name = re.split(r"[\s<>=!~\[;(]", requirement, maxsplit=1)[0]
    wanted = requirement[len(name) :].split(";")[0].strip(" ()")
    remedy = "run make setup"
    try:
        version = installed(name)
    except metadata.PackageNotFoundError:
        return Check(name, BROKEN, "not installed", remedy)
    if (name, version) in MALICIOUS:
        return Check(
            name,
            BROKEN,
            f"{version}: a MALICIOUS release",
            f"treat this machine's credentials as stolen; then pip uninstall {name} and run make setup",
        )
    try:
        from packaging.specifiers import SpecifierSet
    except ModuleNotFoundError:
        return Check(
            name, WARN, version, f"whether it is in {wanted} cannot be told without `packaging`: {remedy}"
        )
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        return Check(name, BROKEN, f"{version}, outside {wanted}", remedy)
    return Check(name, OK, f"{version} (in {wanted or 'any'})")


def check_packages() -> Iterator[Check]:
    """Every base requirement, and pytorch-lightning, which lightning's malicious releases brought along."""
    lines = requirements()
    if not lines:
        yield Check("packages", WARN, "no requirement list found", "run make setup")
    for line in lines:
        check = check_package(line)
        if check is not None:
            yield check
    twin = check_package("pytorch-lightning")
    if twin is not None and "MALICIOUS" in twin.found:
        yield twin


def check_gpu(tool: Callable[[list[str]], str | None] = run_tool) -> list[Check]:
    """GPUs that the driver sees (name, memory, driver), and whether torch can use them."""
    query = tool(
        ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    )
    if not query:
        return [
            Check(
                "gpu",
                NOTE,
                "none seen (no nvidia-smi)",
                "not needed: everything runs on the CPU, only slower",
            )
        ]
    checks = []
    for i, line in enumerate(query.splitlines()):
        name, memory, driver = (part.strip() for part in line.split(","))
        size = f"{int(memory) / 1024:.0f} GiB" if memory.isdigit() else memory
        checks.append(Check(f"gpu {i}", OK, f"{name}, {size}, driver {driver}"))
    usable = tool(
        [sys.executable, "-c", "import torch; print(torch.cuda.is_available(), torch.version.cuda)"]
    )
    if usable is None or not usable.startswith("True"):
        remedy = (
            "install the CUDA build of the same torch version: pip install --force-reinstall torch==<version>"
        )
        checks.append(
            Check(
                "torch on gpu",
                WARN,
                f"this torch cannot use it ({usable or 'torch fails to import'})",
                remedy,
            )
        )
    else:
        checks.append(Check("torch on gpu", OK, f"yes, CUDA {usable.split()[-1]}"))
    return checks


def check_compilers(tool: Callable[[list[str]], str | None] = run_tool) -> list[Check]:
    """A C++ compiler and nvcc: needed to compile the native core, not to run it."""
    checks = []
    for name, commands, remedy in (
        ("c++ compiler", ("c++", "g++", "clang++"), "install one (Debian: apt-get install g++)"),
        ("nvcc", ("nvcc",), "not needed on a machine without a GPU; else install the CUDA toolkit"),
    ):
        found = next(
            (
                f"{c}: {text.splitlines()[-1 if c == 'nvcc' else 0]}"
                for c in commands
                if (text := tool([c, "--version"]))
            ),
            None,
        )
        checks.append(Check(name, OK, found) if found else Check(name, NOTE, "none", remedy))
    return checks


#: Asks the native core about itself, in a process of its own: a broken one must not end the doctor.
NATIVE_PROGRAM = """
import json
from specgate.errors import StoreError
from specgate.runtime import native
try:
    print(json.dumps(native.require().build_info()))
except StoreError as error:
    print(json.dumps({"missing": str(error)}))
"""


def check_native(tool: Callable[[list[str]], str | None] = run_tool) -> Check:
    """The compiled core of the expert store: whether it loads, was compiled with CUDA, and sees devices."""
    line = (tool([sys.executable, "-c", NATIVE_PROGRAM]) or "").strip().split("\n")[-1]
    try:
        info = json.loads(line)
    except ValueError:
        return Check(
            "native core", WARN, "crashes or hangs when it is loaded", "make native compiles it anew"
        )
    if "missing" in info:
        found, _, remedy = info["missing"].partition(": ")
        return Check("native core", NOTE, found, remedy)
    cuda = (
        f"CUDA {info['cuda_version']}, {info['cuda_devices']} device(s)" if info["cuda"] else "without CUDA"
    )
    found = f"{info['version']}, {info['compiler']}, {cuda}"
    if not info["cuda"] and tool(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]):
        return Check(
            "native core", WARN, found, "install the CUDA toolkit, then make native SPECGATE_CUDA=ON"
        )
    return Check("native core", OK, found)


def check_file_reading(
    folder: Path,
    uring: Callable[[], int] = io_uring_error,
    direct: Callable[[Path], int] = direct_io_error,
) -> list[Check]:
    """What the expert store reads files with: both only make it faster, and it does without."""
    error = uring()
    checks = [Check("io_uring", OK, "yes")]
    if error:
        found = f"no ({os.strerror(error)})"
        remedy = "not needed: threads read instead; sysctl kernel.io_uring_disabled or a container forbids it"
        checks = [Check("io_uring", NOTE, found, remedy)]
    try:
        error = direct(folder)
    except OSError:
        return checks  # the folder cannot be written: check_disk says so
    if error:
        remedy = "not needed: reads go through the page cache; a local disk (ext4, xfs) can do it"
        return [*checks, Check("O_DIRECT", NOTE, f"no, in {folder} ({os.strerror(error)})", remedy)]
    return [*checks, Check("O_DIRECT", OK, f"yes, in {folder}")]


def disk_speed(folder: Path, size: int = SPEED_BYTES) -> tuple[float, float]:
    """Sequential write and read speed in MB/s of ``size`` bytes in ``folder``, page cache dropped between."""
    block = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".specgate-disk-") as file:
        start = time.perf_counter()
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        while file.read(2**20):
            pass
        done = time.perf_counter()
    return size / 1e6 / (written - start), size / 1e6 / (done - written)


def check_disk(folder: Path) -> Check:
    """Free space and speed where traces and runs go."""
    try:
        free = shutil.disk_usage(folder).free / 1e9
        write, read = disk_speed(folder)
    except OSError as error:
        return Check(
            "disk", BROKEN, f"{folder} cannot be written ({error.strerror})", "run from a folder that you own"
        )
    found = f"{free:.0f} GB free in {folder}, writes {write:.0f} MB/s, reads {read:.0f} MB/s"
    if free < DISK_NEEDED_GB:
        return Check(
            "disk",
            WARN,
            found,
            f"make demo needs about {DISK_NEEDED_GB:.0f} GB: free some, or set paths.data=",
        )
    return Check("disk", OK, found)


def check_memory() -> Check:
    """Memory that a process can still get."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file() and (kb := re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())):
        available = int(kb.group(1)) * 1024 / 1e9
    found = f"{available:.0f} of {total:.0f} GB available, {os.cpu_count()} cores"
    if available < RAM_NEEDED_GB:
        return Check("memory", WARN, found, "make demo may swap: close something, or lower data.batch_size")
    return Check("memory", OK, found)


def read_sums(file: Path) -> dict[str, str]:
    """A ``sha256sum`` file as {relative path: hex digest}."""
    pairs = (line.split(maxsplit=1) for line in file.read_text().splitlines() if line.strip())
    return {path.lstrip("*"): digest for digest, path in pairs}


def check_bundled(reference: Path = REFERENCE) -> list[Check]:
    """The two reference models and the text: present, and byte for byte what was released (SHA256SUMS)."""
    sums_file = reference / "SHA256SUMS"
    remedy = "restore it: git checkout -- specgate/moe/reference, or reinstall specgate"
    if not sums_file.is_file():
        return [Check("bundled models", BROKEN, f"{sums_file} is missing", remedy)]
    sums = read_sums(sums_file)
    checks = []
    for part in (*BUNDLED_MODELS, "text"):
        expected = {path: digest for path, digest in sums.items() if path.split("/")[0] == part}
        missing = [path for path in expected if not (reference / path).is_file()]
        damaged = [
            path
            for path, digest in expected.items()
            if path not in missing and hashlib.sha256((reference / path).read_bytes()).hexdigest() != digest
        ]
        if not expected or missing:
            checks.append(Check(part, BROKEN, f"missing: {', '.join(missing) or part}", remedy))
        elif damaged:
            checks.append(Check(part, BROKEN, f"damaged: {', '.join(damaged)}", remedy))
        else:
            size = sum((reference / path).stat().st_size for path in expected) / 1e6
            checks.append(Check(part, OK, f"{len(expected)} files intact, {size:.1f} MB"))
    return checks


def examine(folder: Path) -> list[Check]:
    """Every check, in the order it is printed."""
    from specgate import __version__

    return [
        Check("specgate", OK, f"{__version__} at {Path(__file__).parent}"),
        check_python(),
        *check_packages(),
        *check_gpu(),
        *check_compilers(),
        check_native(),
        *check_file_reading(folder),
        check_disk(folder),
        check_memory(),
        *check_bundled(),
    ]


def render(checks: list[Check], colour: bool) -> str:
    """The lines for a person; what to do stands under each line that is not ok."""
    paint = {OK: "32", NOTE: "36", WARN: "33", BROKEN: "31;1"}
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        label = f"{check.status:<6}"
        label = f"\033[{paint[check.status]}m{label}\033[0m" if colour else label
        lines.append(f"{label}  {check.name:<{width}}  {check.found}")
        if check.remedy:
            lines.append(f"{'':6}  {'':<{width}}  -> {check.remedy}")
    broken = sum(check.status == BROKEN for check in checks)
    lines += ["", f"{broken} required thing(s) broken" if broken else "nothing that is required is broken"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Prints the examination; 1 when something required is broken, else 0."""
    parser = argparse.ArgumentParser(prog="specgate doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON list instead of text")
    parser.add_argument(
        "--folder", type=Path, default=Path.cwd(), help="where traces will go (default: here)"
    )
    options = parser.parse_args(argv)
    checks = examine(options.folder)
    if options.json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        print(render(checks, colour=sys.stdout.isatty()))
    return int(any(check.status == BROKEN for check in checks))


if __name__ == "__main__":
    sys.exit(main())
