"""benchmarks.simulator runs, and writes down what it found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.simulator import cases_of, main, workload_of
from specgate.report.results import make
from tests.runtime.simulations import needs_native


def test_forecasts_are_of_what_comes() -> None:
    w = workload_of(layers=3, experts=8, top_k=2, steps=30)
    assert w.forecasts is not None
    for n in range(w.layers, w.events):
        step, layer = divmod(n, w.layers)
        named = {e: p for h, e, p in w.forecasts.at(step * (w.layers + 1) + layer) if h == 1}
        assert all(named[e] >= 2 / 3 for e in w.event(n))


@needs_native
def test_every_rule_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--layers", "3", "--experts", "8", "--top-k", "2", "--steps", "200", "--rounds", "1",
          "--out", str(tmp_path)])  # fmt: skip
    found = json.loads((tmp_path / "metrics.json").read_text())["simulator"]
    rows = {row["rules"]: row for row in found["rows"]}
    assert set(rows) == set(cases_of(3, 8))
    # The floor is low, as machines are shared: an eighth of what is asked of one that is not
    assert all(row["million_expert_events_per_second"] > 5 / 8 / 8 for row in rows.values())
    assert rows["lru"]["million_expert_events_per_second"] > 5 / 8
    assert rows["lru"]["hit_rate"] <= rows["belady"]["hit_rate"]
    assert "priced, depth 3" in capsys.readouterr().out
    page = make(tmp_path / "docs" / "RESULTS.md", [str(tmp_path)]).read_text()
    assert f"| lru | {rows['lru']['million_expert_events_per_second']:.2f} |" in page
    assert make(tmp_path / "docs" / "RESULTS.md").read_text() == page
