"""Tables and verdicts: every predictor, kind and horizon is there, with the numbers of the rows."""

from __future__ import annotations

import re

from rich.console import Console

from specgate.report.publish import tables_of
from specgate.report.style import best_free, main_predictor, mean_recall, ranked, select, slug, trace_title
from specgate.report.tables import (
    Table,
    accuracy_table,
    calibration_table,
    detail_table,
    domain_table,
    number,
    percent,
    summary_table,
)
from specgate.report.verdict import verdict
from tests.report.support import record

ROWS = record()["rows"]


def row(predictor: str, kind: str, horizon: int, trace: str = "alpha") -> dict[str, object]:
    (found,) = select(ROWS, trace=trace, predictor=predictor, kind=kind, horizon=horizon)
    return dict(found)


def test_order_puts_free_before_learned_before_the_oracle() -> None:
    mine = select(ROWS, trace="alpha")
    names = ranked(mine)
    assert names[-2:] == ["mlp", "oracle"]
    assert mean_recall(mine, names[0]) <= mean_recall(mine, names[1])
    assert main_predictor(mine) == "mlp"
    assert best_free(mine) == names[1]
    assert best_free(select(mine, predictor="mlp")) is None
    assert main_predictor(select(mine, predictor="oracle")) == "oracle"


def test_summary_holds_every_predictor_and_kind_with_the_rows_numbers() -> None:
    table = summary_table(ROWS)
    assert (
        len(table.rows) == 3 * 5 + 2 * 5
    )  # alpha: three kinds, beta: no wrapped; four predictors and chance
    assert [cells[2] for cells in table.rows].count("oracle") == 5
    sections = sorted(table.sections)
    (mlp,) = [cells for cells in table.rows[sections[0] : sections[1]] if cells[2] == "mlp"]
    scores = {h: row("mlp", "within", h) for h in (1, 2)}
    assert mlp[3:5] == [f"{100 * scores[h]['recall_at_k']:.1f}" for h in (1, 2)]
    assert mlp[5] == "–"  # three layers: nothing lies three layers ahead within the token
    assert mlp[6] == f"{scores[1]['ece']:.3f}"
    assert {cells[1] for cells in table.rows} - {""} == {
        "same token",
        "before the first MoE layer",
        "across into the next token",
    }


def test_previous_token_has_a_footnote_in_prefill_only() -> None:
    prefill = detail_table(ROWS, "beta/decoder/prefill")
    assert any(cells[1] == "previous_token †" for cells in prefill.rows)
    assert any(note.startswith("† in prefill") and "popularity" in note for note in prefill.notes)
    decode = detail_table(ROWS, "alpha")
    assert all("†" not in cells[1] for cells in decode.rows)
    assert all("†" not in note for note in decode.notes)


def test_detail_has_all_scores_per_horizon() -> None:
    table = detail_table(ROWS, "alpha")
    assert [c for c in table.columns if c in ("recall@K %", "exact set %", "ECE", "Brier", "NLL")] == [
        "recall@K %",
        "exact set %",
        "ECE",
        "Brier",
        "NLL",
    ]
    wrapped = [cells[0] for cells in table.rows].index("across into the next token")
    (mlp,) = [cells for cells in table.rows[wrapped:] if cells[1] == "mlp"]
    brier = " / ".join(f"{row('mlp', 'wrapped', h)['brier']:.3f}" for h in (1, 2, 3))
    assert mlp[table.columns.index("Brier")] == brier


def test_calibration_and_domain_tables() -> None:
    table = calibration_table(ROWS, "alpha")
    assert len(table.rows) == 2 + 3 + 3
    assert table.rows[0][2] == percent(row("mlp", "within", 1)["mean_accuracy"])  # type: ignore[arg-type]
    domains = domain_table(ROWS, "alpha")
    assert [cells[0] for cells in domains.rows] == ["code", "prose"]
    assert domains.columns[2:] == ["previous_token N+1", "previous_token N+2", "mlp N+1", "mlp N+2"] or (
        domains.columns[2:] == ["popularity N+1", "popularity N+2", "mlp N+1", "mlp N+2"]
    )
    assert len(domain_table(ROWS, "alpha", limit=1).rows) == 1


def test_formats() -> None:
    table = Table("T<1>", ["a|b", "n"], [["x|y", "1"], ["z", "2"]], ["note"], {1}, {1})
    assert table.to_markdown().splitlines() == [
        "| a\\|b | n |",
        "| --- | ---: |",
        "| x\\|y | 1 |",
        "| **z** | **2** |",
        "",
        "note  ",
    ]
    page = table.to_html()
    assert "T&lt;1&gt;" in page
    assert page.count("<tr") == 3
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(accuracy_table(ROWS))
    assert "oracle" in console.export_text()
    assert (number(None), percent(None), number(0.1234), percent(0.5)) == ("–", "–", "0.123", "50.0")
    assert slug("beta/decoder/prefill") == "beta-decoder-prefill"
    assert trace_title(row("mlp", "within", 1, "beta/decoder/prefill")) == "beta/decoder/prefill"
    assert trace_title(row("mlp", "within", 1)) == "alpha (decoder, decode)"
    assert len(tables_of(record())) == 2 + 2 * 3


def with_recalls(**recalls: float) -> list[dict[str, object]]:
    """Rows of one trace in which only recall matters."""
    return [
        {**row("mlp", "within", 1), "predictor": name, "learned": name == "mlp", "recall_at_k": value}
        for name, value in recalls.items()
    ]


def test_verdict_says_whether_training_pays() -> None:
    pays = " ".join(verdict(with_recalls(popularity=0.4, markov=0.7, mlp=0.85, oracle=1.0), "alpha"))
    assert pays.startswith("Yes, and training pays: mlp finds 15.0 points of recall more than markov")
    assert "mlp closes 50.0 % of the gap" in pays
    assert "popular experts finds 40.0 %, 1.20 times chance: a fixed hot set explains little" in pays
    hardly = verdict(with_recalls(markov=0.7, mlp=0.71), "alpha")
    assert hardly[0].startswith("Yes, but training hardly pays: mlp finds 1.0 points")
    worse = verdict(with_recalls(markov=0.7, mlp=0.69), "alpha")
    assert worse[0].startswith(
        "Yes, but training does not pay: mlp finds 1.0 points of recall less than markov"
    )
    assert "training bought nothing" in " ".join(worse)
    assert verdict(with_recalls(popularity=0.35, mlp=0.5), "alpha")[0].startswith("Hardly")
    assert verdict(with_recalls(markov=0.7), "alpha")[0].startswith("Yes, and without training")
    assert verdict(with_recalls(mlp=0.7), "alpha")[0] == "mlp was compared with no free predictor."


def test_every_number_of_a_verdict_comes_from_the_rows() -> None:
    trace = "alpha"
    text = " ".join(verdict(ROWS, trace, record()["load"][trace]))
    numbers = set(re.findall(r"\d+\.\d+", text))
    mine = select(ROWS, trace=trace, kind="within")
    near = {r["predictor"]: r for r in select(mine, horizon=1)}
    expected = {percent(r["recall_at_k"]) for r in near.values()}
    expected |= {percent(2 / 6), f"{near['popularity']['recall_at_k'] * 3:.2f}"}
    best = near[best_free(select(ROWS, trace=trace)) or ""]["recall_at_k"]
    gain = near["mlp"]["recall_at_k"] - best
    expected |= {f"{abs(100 * gain):.1f}", percent(gain / (1 - best)), percent(-gain / (1 - best))}
    for r in select(mine, predictor="mlp"):
        expected |= {f"{r['ece']:.4f}", f"{r['ece_uncalibrated']:.4f}"}
    entropy = record()["load"][trace]["entropy"]
    expected |= {f"{min(entropy):.3f}", f"{max(entropy):.3f}"}
    assert numbers <= expected
