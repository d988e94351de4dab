"""Parquet: an exact round trip, and the same rows in polars, duckdb and datasets."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specgate.traces.convert import main
from specgate.traces.schema import StackInfo
from specgate.traces.store import TraceReader
from specgate.traces.tables import routers_beside
from tests.traces.helpers import stack_info, tree, write_trace


def run(*args: Any) -> int:
    return main([str(a) for a in args])


STACKS: dict[str, dict[str, StackInfo]] = {
    "two stacks": {
        "encoder": stack_info(2, 8, 1, dropped=True),
        "decoder": stack_info(3, 300, 2, hidden="fp16"),
    },
    "int8": {"decoder": stack_info(12, 9, 3, hidden="int8")},
    "ids only": {"decoder": stack_info(2, 5, 2, D=None, hidden="none", has_weights=False)},
    "some layers": {"decoder": replace(stack_info(4), hidden_layers=[1, 3])},
}


@pytest.mark.parametrize("name", STACKS)
def test_parquet_round_trip_is_byte_identical(tmp_path: Path, name: str) -> None:
    trace = tmp_path / "trace"
    write_trace(trace, STACKS[name], [[5, 3], [], [7, 1, 2], [4]], phases=(0, 1), header=None)
    assert run(trace, tmp_path / "t.parquet", "--with-hidden") == 0
    assert run(tmp_path / "t.parquet", tmp_path / "back") == 0
    assert tree(tmp_path / "back") == tree(trace)


def test_parquet_without_hidden_keeps_the_rest(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    write_trace(trace, STACKS["two stacks"])
    assert run(trace, tmp_path / "t.parquet") == 0
    assert run(tmp_path / "t.parquet", tmp_path / "back") == 0
    a, b = TraceReader(trace), TraceReader(tmp_path / "back")
    for stack in a.header.stacks:
        one, two = a.stack(stack), b.stack(stack)
        assert "hidden" not in two.fields
        for field in two.fields:
            index = np.arange(one.num_tokens)
            assert np.array_equal(one.gather(field, index), two.gather(field, index))
        assert np.array_equal(one.sequences.start_S, two.sequences.start_S)
    assert b.header.documents == a.header.documents
    assert b.routers("decoder") is not None
    routers_beside(tmp_path / "t.parquet").unlink()
    with pytest.raises(SystemExit):
        sys.exit(run(tmp_path / "t.parquet", tmp_path / "third"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trace and its Parquet file."""
    path = tmp_path_factory.mktemp("parquet")
    write_trace(
        path / "trace", {"decoder": stack_info(3, 300, 2, hidden="none", dropped=True)}, phases=(0, 1)
    )
    assert run(path / "trace", path / "t.parquet") == 0
    return path / "trace", path / "t.parquet"


def expected_rows(trace: Path) -> list[dict[str, Any]]:
    """The rows by a plain loop over sequences and tokens."""
    reader = TraceReader(trace)
    view, documents = reader.stack("decoder"), reader.header.documents
    rows = []
    s = view.sequences
    for i in range(len(s)):
        d = documents[s.document_S[i]]
        for t in range(int(s.start_S[i]), int(s.start_S[i] + s.length_S[i])):
            row: dict[str, Any] = {
                "stack": "decoder",
                "document": d.name,
                "domain": d.domain,
                "split": d.split,
                "phase": ["prefill", "decode"][s.phase_S[i]],
                "sequence": i,
                "position": int(view.gather("positions", np.array(t))),
                "token_id": int(view.gather("token_ids", np.array(t))),
            }
            for layer in range(3):
                row[f"experts_0{layer}"] = view.gather("experts", np.array(t))[layer].tolist()
                row[f"weights_0{layer}"] = view.gather("weights", np.array(t))[layer].astype(float).tolist()
                row[f"dropped_0{layer}"] = bool(view.gather("dropped", np.array(t))[layer])
            rows.append(row)
    return rows


def test_polars_reads_it(exported: tuple[Path, Path]) -> None:
    polars = pytest.importorskip("polars")
    assert polars.read_parquet(exported[1]).to_dicts() == expected_rows(exported[0])


def test_duckdb_reads_it(exported: tuple[Path, Path]) -> None:
    duckdb = pytest.importorskip("duckdb")
    relation = duckdb.sql(f"select * from '{exported[1]}'")
    rows = [dict(zip(relation.columns, values, strict=True)) for values in relation.fetchall()]
    assert rows == expected_rows(exported[0])
    top = duckdb.sql(f"select sum(experts_00[1]) from '{exported[1]}'").fetchall()[0][0]
    assert top == sum(r["experts_00"][0] for r in expected_rows(exported[0]))


def test_datasets_reads_it(exported: tuple[Path, Path], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_parquet(str(exported[1]), cache_dir=str(tmp_path))
    assert rows.to_list() == expected_rows(exported[0])


def test_rows_of_another_tool(
    exported: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table that lost our header (filtered by polars) is still importable as rows."""
    polars = pytest.importorskip("polars")
    table = polars.read_parquet(exported[1]).filter(polars.col("domain") != "domain-1")
    table.write_parquet(tmp_path / "some.parquet")
    assert run(tmp_path / "some.parquet", tmp_path / "no") == 1
    assert "give --experts E" in capsys.readouterr().err
    assert run(tmp_path / "some.parquet", tmp_path / "no", "--experts", 300) == 1
    assert "rows of both phases" in capsys.readouterr().err
    assert run(tmp_path / "some.parquet", tmp_path / "out", "--experts", 300, "--phase", "decode") == 0
    want = [r for r in expected_rows(exported[0]) if r["domain"] != "domain-1" and r["phase"] == "decode"]
    view = TraceReader(tmp_path / "out").stack("decoder")
    index = np.arange(view.num_tokens)
    assert view.gather("experts", index)[:, 2].tolist() == [r["experts_02"] for r in want]
    assert view.gather("positions", index).tolist() == [r["position"] for r in want]
    assert len(view.sequences) == len({r["sequence"] for r in want})
