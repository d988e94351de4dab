"""Pictures and the HTML page: they are drawn, hold what they should, and need nothing from outside."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from specgate.report.canvas import line_of
from specgate.report.heatmaps import expert_load, layer_heat_map
from specgate.report.html import page
from specgate.report.plots import PER_TRACE, accuracy_against_horizon, confidence_decay, reliability
from specgate.report.publish import publish
from specgate.report.style import look_of, select
from tests.report.support import record

ROWS = record()["rows"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    console = Console(width=150, file=(folder / "printed.txt").open("w"))
    publish(record(), folder, console)
    console.file.close()
    return folder


def test_all_pictures_are_written(published: Path) -> None:
    names = {file.name for file in (published / "plots").iterdir()}
    wanted = {*PER_TRACE, "load"}
    assert names == {f"{trace}-{name}.png" for trace in ("alpha", "beta-decoder-prefill") for name in wanted}
    for file in (published / "plots").iterdir():
        data = file.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 8000
    assert "oracle" in (published / "printed.txt").read_text()
    assert "recall@K" in (published / "tables.md").read_text()


def test_pictures_are_deterministic(published: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.png"
    confidence_decay(ROWS, "alpha").savefig(again, metadata={"Software": None})
    assert again.read_bytes() == (published / "plots" / "alpha-decay.png").read_bytes()


def test_accuracy_plot_shows_every_predictor_with_its_numbers() -> None:
    drawn = accuracy_against_horizon(ROWS, "alpha")
    assert [axes.get_title() for axes in drawn.axes] == [
        "same token",
        "before the first MoE layer",
        "across into the next token",
    ]
    labels = {text.get_text() for text in drawn.legends[0].get_texts()}
    assert labels == {"popularity", "previous_token", "mlp (learned)", "oracle", "chance (K/E)"}
    expected = line_of(select(ROWS, trace="alpha", kind="entry", predictor="mlp"), "recall_at_k")
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in drawn.axes[1].lines]
    assert (expected[0], expected[1]) in lines


def test_prefill_has_two_panels() -> None:
    assert len(accuracy_against_horizon(ROWS, "beta/decoder/prefill").axes) == 2
    assert len(confidence_decay(ROWS, "beta/decoder/prefill").axes) == 2


def test_heat_map_holds_recall_per_layer_and_horizon() -> None:
    drawn = layer_heat_map(ROWS, "alpha")
    grid_HP = drawn.axes[0].images[0].get_array()
    assert grid_HP.shape == (3, 4)
    (entry,) = select(ROWS, trace="alpha", predictor="mlp", kind="entry", horizon=2)
    assert float(grid_HP[1, 0]) == pytest.approx(entry["per_layer"]["recall_at_k"][0])
    (wrapped,) = select(ROWS, trace="alpha", predictor="mlp", kind="wrapped", horizon=1)
    assert float(grid_HP[0, 3]) == pytest.approx(wrapped["per_layer"]["recall_at_k"][0])
    prefill = layer_heat_map(ROWS, "beta/decoder/prefill").axes[0].images[0].get_array()
    assert np.ma.getmaskarray(prefill)[:, 3].all()  # nothing lies ahead of the last layer in prefill


def test_reliability_and_load_are_drawn_from_their_columns() -> None:
    drawn = reliability(ROWS, "alpha")
    row = select(ROWS, trace="alpha", predictor="mlp", kind="within", horizon=1)[0]
    assert any(
        f"{row['ece_uncalibrated']:.3f} → {row['ece']:.3f}" in t.get_text() for t in drawn.axes[0].texts
    )
    load = record()["load"]["alpha"]
    picture = expert_load(load, "alpha").axes[0].images[0].get_array()
    np.testing.assert_allclose(picture, np.array(load["share"]) * 6)


def test_looks_are_distinct_and_unknown_predictors_get_a_spare_one() -> None:
    names = ["popularity", "markov", "mlp", "mlp (run-a)", "mlp (run-b)", "oracle"]
    looks = [look_of(name, names) for name in names]
    assert len({look.color for look in looks}) == len({look.marker for look in looks}) == len(names)


class Page(HTMLParser):
    """Collects tags and attributes; fails on tags that are not closed."""

    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_whole_and_self_contained(published: Path) -> None:
    source = (published / "report.html").read_text()
    parsed = Page()
    parsed.feed(source)
    assert parsed.open == []
    images = [attributes for tag, attributes in parsed.found if tag == "img"]
    assert len(images) == 12
    assert all((image["src"] or "").startswith("data:image/png;base64,") and image["alt"] for image in images)
    assert not re.search(r'(src|href)="(?!data:|#)', source)
    assert "<script" not in source
    assert "prefers-color-scheme: dark" in source
    for words in (
        "What was traced",
        "Is it worth predicting?",
        "python benchmark.py mode=accuracy",
        "ab" * 32,
    ):
        assert words in parsed.text
    assert "router_lookahead (the trace has no hidden states)" in parsed.text


def test_page_shows_the_rows_numbers_and_escapes_names() -> None:
    source = page(record(), {})
    row = select(ROWS, trace="alpha", predictor="mlp", kind="within", horizon=1)[0]
    assert f"{100 * row['recall_at_k']:.1f}" in source
    hostile = {**record(), "command": "<script>alert(1)</script>"}
    assert "<script>" not in page(hostile, {})
