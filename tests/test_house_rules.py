"""Rules of the house that a program can check: short files, one direction of imports, no leftovers."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: Data flows from left to right, and a package imports only from those to its left; the rest of specgate/
#: (errors, forecast, metrics) is open to all.
ORDER = ("moe", "traces", "predictors", "calibration", "policy", "runtime", "report")
#: Collecting is the one step that writes what lies to its right.
ALLOWED = {("moe", "traces")}
#: The one place where host, forecast and store meet.
MEETING = ("specgate", "moe", "offload.py")
LONGEST = 400


def python_files() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [ROOT / name for name in listed if (ROOT / name).is_file()]


FILES = python_files()


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_files_are_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= LONGEST


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.is_relative_to(ROOT / "specgate")], ids=lambda f: str(f.relative_to(ROOT))
)
def test_modules_have_docstrings(file: Path) -> None:
    text = file.read_text()
    assert not text.strip() or ast.get_docstring(ast.parse(text)), (
        "a module says in its first line what it is for"
    )


def test_nothing_is_left_unfinished() -> None:
    pattern = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    found = [
        f"{file.relative_to(ROOT)}:{i}"
        for file in FILES
        for i, line in enumerate(file.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def test_no_global_patching_of_libraries() -> None:
    """A patch of somebody else's module lives inside a ``with``; an assignment at module level never does."""
    foreign = {"torch", "transformers", "lightning", "numpy", "hydra", "safetensors"}
    found = []
    for file in FILES:
        if not file.is_relative_to(ROOT / "specgate"):
            continue
        for node in ast.parse(file.read_text()).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                root = target
                while isinstance(root, ast.Attribute):
                    root = root.value
                if isinstance(target, ast.Attribute) and isinstance(root, ast.Name) and root.id in foreign:
                    found.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert found == []


def test_packages_import_only_from_their_left() -> None:
    found = []
    for file in FILES:
        parts = file.relative_to(ROOT).parts
        if parts[0] != "specgate" or len(parts) < 3 or parts[1] not in ORDER or parts == MEETING:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                _, _, rest = name.partition("specgate.")
                package = rest.split(".")[0]
                later = package in ORDER and ORDER.index(package) > ORDER.index(parts[1])
                if name.startswith("specgate.") and later and (parts[1], package) not in ALLOWED:
                    found.append(f"{'/'.join(parts)} imports {name}")
    assert found == []


def test_policy_and_store_know_a_forecast_never_a_predictor() -> None:
    knowers = [
        f for f in FILES if f.relative_to(ROOT).parts[:2] in (("specgate", "policy"), ("specgate", "runtime"))
    ]
    knowers.append(ROOT / "specgate" / "forecast.py")
    assert [f.name for f in knowers if re.search(r"specgate\.predictors", f.read_text())] == []
