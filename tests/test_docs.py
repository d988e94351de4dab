"""The documents: their links lead somewhere, their Python runs, their generated parts are current."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from specgate.report import readme
from specgate.report.record import read_record
from specgate.traces.datamodule import RoutingDataModule

ROOT = Path(__file__).parent.parent
LISTED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
    cwd=ROOT, capture_output=True, text=True, check=True,
).stdout.split()  # fmt: skip
PAGES = [ROOT / name for name in LISTED if (ROOT / name).is_file()]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    """Paths in backquotes that begin with a folder of the repository are in it."""
    if page.name == "LOG.md":
        return  # tells of files as they were
    named = re.findall(r"`((?:specgate|conf|tests|docs|benchmarks)/[\w./-]*)`", page.read_text())
    future = {
        "specgate/policy/",
        "specgate/runtime/",
        "specgate/predictors/linear.py",
        "conf/model/linear.yaml",
    }
    assert [name for name in named if name not in future and not (ROOT / name).exists()] == []


def python_of(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def test_the_predictor_in_the_docs_works(tiny_traces: dict[str, Path]) -> None:
    (code,) = python_of(ROOT / "docs" / "adding-a-predictor.md")
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    data = RoutingDataModule(tiny_traces["olmoe"], window=32, batch_size=4)
    model = namespace["Linear"](**vars(data.spec), lookahead=3)
    with torch.no_grad():
        model.map_PHEE.normal_(generator=torch.Generator().manual_seed(0))
    batch = next(iter(data.train_dataloader()))
    logits = model(batch)
    B, T, L, _ = batch.experts_BTLK.shape
    assert logits.shape == (B, T, L + 1, 3, data.spec.experts)
    batch.experts_BTLK[:, :, 2:] = (batch.experts_BTLK[:, :, 2:] + 1) % data.spec.experts
    changed = model(batch)
    assert torch.equal(changed[:, :, :3], logits[:, :, :3]), "points before layer 2 do not see it"
    assert not torch.equal(changed[:, :, 3:], logits[:, :, 3:])


def test_the_reader_in_the_docs_works(
    tiny_traces: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = python_of(ROOT / "docs" / "traces.md")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/traces").mkdir(parents=True)
    (tmp_path / "data/traces/olmoe_ref").symlink_to(tiny_traces["olmoe"])
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    assert namespace["view"].num_tokens > 0


def test_generated_parts_of_the_readme_are_current() -> None:
    text = (ROOT / "README.md").read_text()
    assert readme.render(text, read_record(ROOT / readme.KEPT)) == text, "run make docs"


def test_pictures_of_the_readme_are_those_of_the_runs() -> None:
    pictures = {Path(name).name for name in read_record(ROOT / readme.KEPT)["pictures"]}
    shown = re.findall(r"\(docs/images/([^)]+)\)", (ROOT / "README.md").read_text())
    results = set(re.findall(r"\(images/([^)]+)\)", (ROOT / "docs" / "RESULTS.md").read_text()))
    assert set(shown) & pictures
    assert set(shown) <= pictures | results  # the rest are of the results page
    for name in shown:
        assert (ROOT / "docs" / "images" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_parts_are_replaced_and_nothing_else() -> None:
    text = "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb"
    assert readme.replace_part(text, "x", "new\\1") == "a\n<!-- x:begin -->\nnew\\1\n<!-- x:end -->\nb"
    with pytest.raises(readme.SpecgateError, match="0 parts marked"):
        readme.replace_part(text, "y", "new")


@pytest.mark.parametrize(("seconds", "text"), [(59.4, "59 s"), (60, "1 min 0 s"), (201, "3 min 21 s")])
def test_clock(seconds: float, text: str) -> None:
    assert readme.clock(seconds) == text


def test_every_predictor_has_its_paragraph_and_paper() -> None:
    text = (ROOT / "docs" / "predictors.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE))
    models = {file.stem for file in (ROOT / "conf" / "model").glob("*.yaml")}
    assert set(sections) == models
    without = [name for name, body in sections.items() if not re.search(r"\b(19|20)\d\d\b", body)]
    assert without == []
    assert [name for name, body in sections.items() if len(body.split()) < 25] == []
