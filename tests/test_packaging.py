"""What is shipped: the wheel's content, the exact versions, one version number, and declared imports."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

import specgate
from specgate.runtime import native

ROOT = Path(__file__).parent.parent
#: The first test that wants the wheel waits for a compiler.
pytestmark = pytest.mark.timeout(1200)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENTRY_POINTS = ("collect.py", "train.py", "benchmark.py")
#: Import name -> package name, where they differ.
PACKAGE_OF = {
    "hydra": "hydra-core",
    "omegaconf": "hydra-core",
    "sklearn": "scikit-learn",
    "yaml": "hydra-core",
}


def tracked(*patterns: str) -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a machine without CUDA; with what this one has, the core is compiled by make setup."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--config-settings=cmake.define.SPECGATE_CUDA=OFF", "--no-index"]
    environment = {**os.environ, "SPECGATE_NATIVE": "1" if native.available() else "0"}
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(ROOT)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def test_wheel_holds_code_models_and_text_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for model in ("switch_ref", "olmoe_ref"):
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            assert f"specgate/moe/reference/{model}/{file}" in names
    assert (
        sum(name.startswith("specgate/moe/reference/text/") and name.endswith(".txt.xz") for name in names)
        >= 8
    )
    assert "specgate/moe/reference/SHA256SUMS" in names
    assert any(name.endswith("licenses/NOTICE") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    strangers = [
        n for n in names if n.split("/")[0] not in ("specgate", f"specgate-{specgate.__version__}.dist-info")
    ]
    assert strangers == []
    assert [n for n in names if "csrc" in n or "__pycache__" in n or n.endswith((".ckpt", ".pt"))] == []
    code = {str(p.relative_to(ROOT)) for p in tracked("specgate/**.py", "specgate/*.py")}
    assert code <= names


@pytest.mark.skipif(not native.available(), reason="specgate was installed with SPECGATE_NATIVE=0")
def test_wheel_holds_the_native_core_and_it_works_without_cuda(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    shared = [name for name in wheel.namelist() if name.endswith((".so", ".a", ".pyd"))]
    assert shared == [f"specgate/runtime/_native{sysconfig.get_config_var('EXT_SUFFIX')}"]
    wheel.extract(shared[0], tmp_path)
    program = "import _native; info = _native.build_info(); print(info['cuda'], info['cuda_devices'])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=(tmp_path / shared[0]).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", "0"]


def test_bundled_models_and_text_stay_small(wheel: zipfile.ZipFile) -> None:
    size = {name: wheel.getinfo(name).file_size for name in wheel.namelist()}
    for model in ("switch_ref", "olmoe_ref"):
        assert (
            sum(s for n, s in size.items() if f"/reference/{model}/" in n) <= 14e6 + 2e6
        )  # weights 14 MB, tokenizer
        assert size[f"specgate/moe/reference/{model}/model.safetensors"] <= 14e6
    assert sum(s for n, s in size.items() if "/reference/text/" in n) < 3e6


def test_one_version_number(wheel: zipfile.ZipFile) -> None:
    assert f"specgate-{specgate.__version__}-" in str(wheel.filename)
    assert "version" in PROJECT["dynamic"]
    assert not re.search(r"^version\s*=", (ROOT / "pyproject.toml").read_text(), re.M)


def constraints() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    return {canonical(line.split("==")[0]): line.split("==")[1] for line in lines}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_names() -> dict[str, list[str]]:
    """Requirement names per extra; "" holds the base ones."""
    groups = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    return {
        group: [canonical(re.split(r"[<>=!~\[; ]", line)[0]) for line in lines]
        for group, lines in groups.items()
    }


def test_constraints_pin_everything_and_no_cuda_build() -> None:
    pins = constraints()
    for names in requirement_names().values():
        assert [name for name in names if name not in pins and name != "specgate"] == []
    assert all(re.fullmatch(r"[\w.!]+", version) for version in pins.values())
    assert pins["torch"] == "2.13.0"
    assert [name for name in pins if name.startswith(("nvidia-", "triton", "cuda-", "torchvision"))] == []
    assert ("lightning", pins["lightning"]) not in {("lightning", "2.6.2"), ("lightning", "2.6.3")}
    assert pins["sqlalchemy"].startswith("1.")


def test_constraints_satisfy_the_declared_ranges() -> None:
    from packaging.requirements import Requirement

    pins = constraints()
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        for requirement in map(Requirement, lines):
            if requirement.name != "specgate":
                assert requirement.specifier.contains(pins[canonical(requirement.name)]), requirement


def imported(file: Path) -> set[str]:
    """Top-level names of every module that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    local = {"specgate", "tests", "conftest", "benchmarks", *(Path(name).stem for name in ENTRY_POINTS)}
    return names - set(sys.stdlib_module_names) - local


def test_every_import_is_declared() -> None:
    groups = requirement_names()
    library = {*groups[""], *groups["data"], *groups["quantize"], *groups["rl"]}
    for file in [*tracked("specgate/**.py", "specgate/*.py"), *(ROOT / name for name in ENTRY_POINTS)]:
        undeclared = {n for n in imported(file) if canonical(PACKAGE_OF.get(n, n)) not in library}
        assert undeclared == set(), file
    everything = {name for names in groups.values() for name in names}
    for file in tracked("tests/**.py", "tests/*.py"):
        undeclared = {n for n in imported(file) if canonical(PACKAGE_OF.get(n, n)) not in everything}
        assert undeclared == set(), file


def test_importing_specgate_is_light() -> None:
    program = (
        "import sys, specgate; print(specgate.__version__, sum(m in sys.modules for m in ('torch', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [specgate.__version__, "0"]


@pytest.mark.parametrize("name", specgate.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(specgate, name) is not None


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prophecy'"):
        specgate.prophecy  # noqa: B018
