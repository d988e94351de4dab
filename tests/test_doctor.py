"""The doctor's checks, each on a machine that is well and on one that is not."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import specgate
from specgate import doctor, probe
from specgate.runtime import native


def version_of(version: str | None):
    def installed(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    return installed


@pytest.mark.parametrize(
    ("requirement", "version", "status"),
    [
        ("transformers<6,>=5.19", "5.23.0", doctor.OK),
        ("transformers<6,>=5.19", "5.18.9", doctor.BROKEN),
        ("transformers<6,>=5.19", "6.0.0", doctor.BROKEN),
        ("torch>=2.10", "2.13.0+cpu", doctor.OK),
        ("torch>=2.10", None, doctor.BROKEN),
        ("lightning<3,>=2.6.4", "2.6.6", doctor.OK),
        ("lightning<3,>=2.6.4", "2.6.3", doctor.BROKEN),
    ],
)
def test_packages_in_and_out_of_range(requirement: str, version: str | None, status: str) -> None:
    check = doctor.check_package(requirement, version_of(version))
    assert check is not None
    assert check.status == status
    assert bool(check.remedy) == (status != doctor.OK)


@pytest.mark.parametrize("name", ["lightning", "pytorch-lightning"])
@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_malicious_releases_are_called_that(name: str, version: str) -> None:
    check = doctor.check_package(name, version_of(version))
    assert check is not None
    assert check.status == doctor.BROKEN
    assert "MALICIOUS" in check.found
    assert "credentials" in check.remedy


def test_requirements_of_extras_are_left_out() -> None:
    assert doctor.check_package("ruff>=0.17; extra == 'dev'", version_of(None)) is None


def test_every_base_requirement_has_a_line() -> None:
    names = {check.name for check in doctor.check_packages()}
    assert {"torch", "lightning", "transformers", "hydra-core", "torchmetrics", "safetensors"} <= names


@pytest.mark.parametrize(
    ("version", "status"),
    [((3, 10), doctor.BROKEN), ((3, 11), doctor.OK), ((3, 12), doctor.OK), ((3, 13), doctor.WARN)],
)
def test_python_range(version: tuple[int, int], status: str) -> None:
    assert doctor.check_python(version).status == status


def test_gpu_lines_name_memory_and_driver() -> None:
    def tool(command: list[str]) -> str | None:
        return "NVIDIA H100, 81559, 580.65" if command[0] == "nvidia-smi" else "True 13.0"

    device, torch_line = doctor.check_gpu(tool)
    assert device.found == "NVIDIA H100, 80 GiB, driver 580.65"
    assert torch_line.status == doctor.OK
    assert "13.0" in torch_line.found


def test_a_gpu_that_torch_cannot_use_is_a_warning_with_a_remedy() -> None:
    def tool(command: list[str]) -> str | None:
        return "NVIDIA H100, 81559, 580.65" if command[0] == "nvidia-smi" else "False None"

    line = doctor.check_gpu(tool)[-1]
    assert line.status == doctor.WARN
    assert "CUDA build" in line.remedy


def test_no_gpu_and_no_compilers_are_notes_not_failures() -> None:
    checks = [*doctor.check_gpu(lambda command: None), *doctor.check_compilers(lambda command: None)]
    assert {check.name for check in checks} == {"gpu", "c++ compiler", "nvcc"}
    assert {check.status for check in checks} == {doctor.NOTE}
    assert all(check.remedy for check in checks)


INFO = {"version": "0.1.0", "compiler": "GCC 12.2.0", "cuda": True, "cuda_version": "13.0", "cuda_devices": 2}


@pytest.mark.parametrize(
    ("answer", "gpu", "status", "words"),
    [
        (json.dumps(INFO), None, doctor.OK, "0.1.0, GCC 12.2.0, CUDA 13.0, 2 device(s)"),
        ("a warning\n" + json.dumps({**INFO, "cuda": False}), None, doctor.OK, "without CUDA"),
        (json.dumps({**INFO, "cuda": False}), "NVIDIA H100", doctor.WARN, "SPECGATE_CUDA=ON"),
        (json.dumps({"missing": "it is not there: compile it"}), None, doctor.NOTE, "-> compile it"),
        (None, None, doctor.WARN, "crashes or hangs"),
        ("Illegal instruction", None, doctor.WARN, "make native"),
    ],
)
def test_native_core(answer: str | None, gpu: str | None, status: str, words: str) -> None:
    check = doctor.check_native(lambda command: answer if command[0] == sys.executable else gpu)
    assert check.status == status
    assert words in f"{check.found} -> {check.remedy}"
    assert bool(check.remedy) == (status != doctor.OK)


def test_native_core_of_this_machine_is_what_is_imported_here() -> None:
    check = doctor.check_native()
    assert check.status == (doctor.OK if native.available() else doctor.NOTE), check
    if native.available():
        assert check.found.startswith(specgate.__version__)


def test_ways_to_read_files(tmp_path: Path) -> None:
    ring, direct = doctor.check_file_reading(tmp_path, lambda: 0, lambda folder: 0)
    assert (ring.status, direct.status) == (doctor.OK, doctor.OK)
    ring, direct = doctor.check_file_reading(tmp_path, lambda: errno.EPERM, lambda folder: errno.EINVAL)
    assert (ring.status, direct.status) == (doctor.NOTE, doctor.NOTE)
    assert "Operation not permitted" in ring.found
    assert str(tmp_path) in direct.found
    assert ring.remedy
    assert direct.remedy


def test_probes_leave_nothing_behind(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    assert probe.io_uring_error() in {0, errno.EPERM, errno.ENOSYS}
    assert probe.direct_io_error(tmp_path) in {0, errno.EINVAL}
    assert set(os.listdir("/proc/self/fd")) == before
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        probe.direct_io_error(tmp_path / "absent")
    assert [check.name for check in doctor.check_file_reading(tmp_path / "absent")] == ["io_uring"]


def test_disk_is_measured_and_little_of_it_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, read = doctor.disk_speed(tmp_path, size=2**20)
    assert write > 0
    assert read > 0
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(doctor, "SPEED_BYTES", 2**20)
    monkeypatch.setattr(doctor, "DISK_NEEDED_GB", 1e9)
    assert doctor.check_disk(tmp_path).status == doctor.WARN
    assert doctor.check_disk(tmp_path / "absent").status == doctor.BROKEN


def bundle(folder: Path) -> Path:
    lines = []
    for name in ("switch_ref/model.safetensors", "olmoe_ref/model.safetensors", "text/a.txt.xz"):
        file = folder / name
        file.parent.mkdir()
        file.write_bytes(name.encode())
        lines.append(f"{hashlib.sha256(name.encode()).hexdigest()}  {name}\n")
    (folder / "SHA256SUMS").write_text("".join(lines))
    return folder


def test_bundled_files_are_checked_byte_for_byte(tmp_path: Path) -> None:
    reference = bundle(tmp_path)
    assert [check.status for check in doctor.check_bundled(reference)] == [doctor.OK] * 3
    (reference / "switch_ref/model.safetensors").write_bytes(b"switch_ref/model.safetensorz")
    (reference / "olmoe_ref/model.safetensors").unlink()
    damaged, missing, text = doctor.check_bundled(reference)
    assert (damaged.status, "damaged" in damaged.found) == (doctor.BROKEN, True)
    assert (missing.status, "missing" in missing.found) == (doctor.BROKEN, True)
    assert text.status == doctor.OK
    (reference / "SHA256SUMS").unlink()
    assert doctor.check_bundled(reference)[0].status == doctor.BROKEN


def test_the_checkout_itself_is_intact_and_its_sums_are_complete() -> None:
    checks = doctor.check_bundled()
    remedy = "after a change on purpose: make sums"
    assert [(check.name, check.status) for check in checks] == [
        (name, doctor.OK) for name in ("switch_ref", "olmoe_ref", "text")
    ], remedy
    listed = set(doctor.read_sums(doctor.REFERENCE / "SHA256SUMS"))
    present = {
        str(file.relative_to(doctor.REFERENCE))
        for part in (*doctor.BUNDLED_MODELS, "text")
        for file in (doctor.REFERENCE / part).rglob("*")
        if file.is_file() and file.suffix not in (".md", ".py", ".pyc")
    }
    assert listed == present, remedy


@pytest.mark.parametrize(("status", "code"), [(doctor.WARN, 0), (doctor.BROKEN, 1)])
def test_exit_code_and_json(status: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    checks = [doctor.Check("a", doctor.OK, "fine"), doctor.Check("b", status, "not so", "mend it")]
    monkeypatch.setattr(doctor, "examine", lambda folder: checks)
    assert doctor.main(["--json"]) == code
    assert [line["status"] for line in json.loads(capsys.readouterr().out)] == [doctor.OK, status]
    assert doctor.main([]) == code
    assert "-> mend it" in capsys.readouterr().out


def test_doctor_runs_without_torch_installed() -> None:
    """The doctor must speak on a broken installation: it may import nothing outside the standard library."""
    program = (
        "import sys; from specgate import doctor; list(doctor.check_packages());"
        "print(sorted({'torch', 'numpy', 'transformers', 'lightning', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 0, "usage:"),
        (["--version"], 0, "."),
        (["dance"], 2, "no command 'dance'"),
        (["doctor", "--help"], 0, "--json"),
    ],
)
def test_command_line(arguments: list[str], code: int, text: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "specgate", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert text in done.stdout + done.stderr
