"""Tables over many runs: seeds, gaps and costs by hand, archives, and the same bytes every time."""

from __future__ import annotations

import statistics
import tarfile
from pathlib import Path
from typing import Any

import pytest

from specgate.errors import SpecgateError
from specgate.report.record import write_json
from specgate.report.results import make
from specgate.report.runs import Spread, by_trace, group_runs, read_runs, settings
from specgate.report.zoo import Zoo, draw_all, main, section, summary, zoo_table
from specgate.report.zoo_store import store

TRACE: dict[str, Any] = {
    "name": "alpha", "stack": "decoder", "phase": "prefill", "layers": 4, "experts": 8, "top_k": 2,
    "hidden_size": 16, "sha256": ["ab" * 32],
}  # fmt: skip
RECALL = {
    "ensemble": 0.7,
    "popularity": 0.3,
    "router_lookahead": 0.5,
    "mlp": 0.7,
    "gnn": 0.8,
    "shadow": 0.95,
    "oracle": 1.0,
}
STEP = 0.01
"""Each seed and each horizon takes this off."""


def recall(name: str, seed: int, horizon: int) -> float:
    return 1.0 if name == "oracle" else RECALL[name] - STEP * seed - STEP * (horizon - 1)


def rows(name: str, seed: int, splits: tuple[str, ...]) -> list[dict[str, Any]]:
    return [
        {
            "trace": "alpha", "stack": "decoder", "phase": "prefill", "split": split, "predictor": name,
            "learned": name in ("mlp", "gnn", "shadow"), "kind": kind, "horizon": h, "n": 100,
            "recall_at_k": recall(name, seed, h) - 0.1 * (kind == "entry"), "ece": 0.01 * h, "nll": 0.2,
            "thresholds": {"threshold": [0.5]},
        }
        for split in splits for kind in ("within", "entry") for h in (1, 2, 3)
    ]  # fmt: skip


def record(entry: str, **content: Any) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "entry": entry,
        "command": f"python {entry}",
        "wall_seconds": 3600.0,
        "git": {"commit": "c" * 40, "dirty": False},
        "hardware": {"cpu": "Test CPU", "cores": 2, "memory_gb": 8, "gpus": ["Test GPU"]},
        "traces": [TRACE],
        **content,
    }


def train_run(name: str, seed: int, **config: Any) -> dict[str, Any]:
    return record(
        "train.py", rows=rows(name, seed, ("validation", "test")), parameters=1000 * (1 + len(name)),
        training_seconds=60.0 + seed, steps=10, tokens_seen=1000, pruned=None,
        config={"seed": seed, "data": {"traces": "/secret/alpha", "seed": seed}, "model": {"w": 1}, **config},
    )  # fmt: skip


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path, Path]:
    """An archive of runs, an accuracy benchmark, a cost benchmark."""
    job = 0
    for name in ("popularity", "router_lookahead", "mlp", "gnn", "shadow"):
        for seed in (0, 1, 2):
            write_json(tmp_path / "sweep" / str(job) / "metrics.json", train_run(name, seed))
            job += 1
    with tarfile.open(tmp_path / "runs.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "sweep", "sweep")
    benchmark = record(
        "benchmark.py",
        mode="accuracy",
        rows=[r for n in ("popularity", "oracle") for r in rows(n, 7, ("test",))],
    )
    write_json(tmp_path / "accuracy" / "metrics.json", benchmark)
    cost = [
        {"trace": "alpha", "predictor": f"{name} (0)", "precision": "float32", "parameters": 5, "bytes": 20,
         "flops_per_token_layer": 10.0, "share_of_host": share, "us": {"cpu": {"1": 120.0, "64": 900.0}}}
        for name, share in (("mlp", 0.015), ("gnn", 0.25))
    ]  # fmt: skip
    write_json(tmp_path / "cost" / "metrics.json", record("benchmark.py", mode="cost", rows=cost))
    return tmp_path / "runs.tar.gz", tmp_path / "accuracy", tmp_path / "cost"


def build(inputs: tuple[Path, Path, Path], docs: Path) -> int:
    runs, accuracy, cost = map(str, inputs)
    return main([runs, "--accuracy", accuracy, "--cost", cost, "--out", str(docs / "RESULTS.md")])


def test_page_and_picture_come_from_what_is_stored_alone(
    inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    docs = tmp_path / "docs"
    assert build(inputs, docs) == 0
    name = "zoo-alpha-decoder-prefill"
    stored, picture = docs / "results" / f"{name}.json", docs / "images" / f"{name}.png"
    before = (docs / "RESULTS.md").read_bytes(), picture.read_bytes(), stored.read_bytes()
    text = before[0].decode()
    assert f"images/{name}.png" in text
    assert "15 runs of train.py, 15.0 hours" in text
    assert "Test GPU" in text
    assert b"secret" not in before[2]
    assert b"threshold" not in before[2]
    picture.unlink()
    make(docs / "RESULTS.md")
    assert ((docs / "RESULTS.md").read_bytes(), picture.read_bytes(), stored.read_bytes()) == before


def zoo_of(inputs: tuple[Path, Path, Path], folder: Path) -> Zoo:
    import json

    (path,) = store(folder, [inputs[0]], [inputs[1]], [inputs[2]])
    return Zoo(json.loads(path.read_text()))


def test_the_table_by_hand(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    zoo = zoo_of(inputs, tmp_path)
    assert [g.label for g in zoo.groups] == [
        "popularity",
        "router_lookahead",
        "mlp",
        "gnn",
        "shadow",
        "oracle",
    ]
    table = zoo_table(zoo)
    cells = {row[0].split(" ")[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    of_seeds = [recall("gnn", seed, 1) for seed in (0, 1, 2)]
    shown = f"{100 * statistics.fmean(of_seeds):.1f} ± {100 * statistics.stdev(of_seeds):.2f}"
    assert cells["gnn"]["N+1 %"] == f"**{shown}**"  # shadow is higher and no rival
    assert cells["mlp"]["N+1 %"] == "69.0 ± 1.00"
    assert cells["oracle"]["N+3 %"] == "100.0"
    assert cells["oracle"]["seeds"] == "–"
    assert cells["gnn"]["seeds"] == "3"
    for h in (1, 2, 3):  # from router_lookahead to 1
        start = statistics.fmean(recall("router_lookahead", seed, h) for seed in (0, 1, 2))
        end = statistics.fmean(recall("gnn", seed, h) for seed in (0, 1, 2))
        assert cells["gnn"][f"closed N+{h} %"].startswith(f"**{100 * (end - start) / (1 - start):.1f}")
        assert cells["oracle"][f"closed N+{h} %"] == "100.0"
    assert cells["gnn"]["FLOPs, % of host"] == "25.00"
    assert cells["mlp"]["µs cpu×64"] == "900"
    assert cells["mlp"]["training s"] == "61 ± 1"
    assert cells["popularity"]["seeds"] == "3"  # its runs count, not the benchmark's
    assert any("recall of router_lookahead and the oracle's" in note for note in table.notes)
    assert "before the first MoE layer, N+1 %" in "\n".join(section("x", zoo.record))


def test_without_hidden_states_the_gap_begins_at_the_best_free_predictor(tmp_path: Path) -> None:
    trace = {**TRACE, "hidden_size": None}
    for job, name in enumerate(("popularity", "mlp")):
        write_json(tmp_path / f"{job}" / "metrics.json", {**train_run(name, 0), "traces": [trace]})
    oracle = record("benchmark.py", rows=rows("oracle", 0, ("test",)))
    write_json(tmp_path / "benchmark" / "metrics.json", {**oracle, "traces": [trace]})
    (path,) = store(tmp_path / "out", [tmp_path], [tmp_path / "benchmark"])
    assert path.stem == "zoo-alpha-decoder-prefill-ids"
    from specgate.report.record import read_record

    zoo = Zoo(read_record(path))
    start = zoo.baseline()
    assert start is not None
    assert start.label == "popularity"
    closed = zoo.gap_closed(zoo.groups[1], 2)
    assert closed is not None
    low, high = recall("popularity", 0, 2), recall("mlp", 0, 2)
    assert closed.mean == pytest.approx((high - low) / (1 - low))
    assert closed.deviation is None


def test_runs_that_differ_in_more_than_the_seed_are_told_apart(tmp_path: Path) -> None:
    for job, (seed, width) in enumerate(((0, 8), (1, 8), (0, 16))):
        run = train_run("mlp", seed, model={"width": width, "_target_": "x.MLP"})
        write_json(tmp_path / str(job) / "metrics.json", run)
    groups = group_runs(read_runs([tmp_path]))
    assert sorted((g.label, g.seeds) for g in groups) == [("mlp width=16", [0]), ("mlp width=8", [0, 1])]
    assert groups[0].label == "mlp width=16"  # seed 1 takes something off
    flat = settings(
        {"seed": 3, "paths": {"root": "/x"}, "data": {"traces": "/x/alpha", "seed": 3}, "lookahead": 3}
    )
    assert flat == {"data.traces": "alpha", "lookahead": 3}


def test_a_setting_that_only_some_runs_have_is_named(tmp_path: Path) -> None:
    for job, callbacks in enumerate(({}, {"quantize": {"_target_": "specgate.x.Quantize", "bits": 4}})):
        run = train_run("mlp", 0, callbacks=callbacks)
        write_json(tmp_path / str(job) / "metrics.json", run)
    labels = {group.label for group in group_runs(read_runs([tmp_path]))}
    assert labels == {"mlp", "mlp quantize=Quantize quantize.bits=4"}
    (path,) = store(tmp_path / "out", [tmp_path])
    from specgate.report.record import read_record

    assert {group.label for group in Zoo(read_record(path)).groups} == labels


def test_runs_without_test_scores_are_said(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    zoo = zoo_of(inputs, tmp_path)
    zoo.record["runs"][0]["scores"].pop("test")
    again = Zoo(zoo.record)
    assert again.left_out == ["sweep/0"]
    assert any("for want of test scores: sweep/0." in note for note in zoo_table(again).notes)
    for run in zoo.record["runs"]:
        run["scores"].pop("test", None)
    validated = Zoo(zoo.record)
    assert validated.split == "validation"
    assert "validation documents" in zoo_table(validated).title


def test_another_number_of_targets_is_said(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    zoo = zoo_of(inputs, tmp_path)
    for kinds in zoo.groups[2].runs[0]["scores"].values():
        kinds["within"]["1"]["n"] = 40
    assert zoo.unequal() == ["mlp (80 instead of 100)"]


def test_mistakes_get_one_clear_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "absent")]) == 1
    assert "absent is no folder of runs" in capsys.readouterr().err
    with pytest.raises(SpecgateError, match=r"no run of train\.py"):
        store(tmp_path, [tmp_path])
    (tmp_path / "metrics.json").write_text("{}")
    assert read_runs([tmp_path]) == []
    (tmp_path / "metrics.json").write_text('{"entry": "train.py"}')
    with pytest.raises(SpecgateError, match="run it again"):
        read_runs([tmp_path])
    assert Spread.of([]) is None


def test_what_was_not_trained_is_told_apart_by_its_own_settings_alone(tmp_path: Path) -> None:
    for job, (run, members) in enumerate(
        (("none", None), ("all", None), ("mean", ["mlp (0)", "mlp (1)", "gnn"]))
    ):
        model = {"_target_": "x.Y", "run": run, "checkpoints": [f"/some/where/{job}"]}
        made = train_run("shadow" if members is None else "ensemble", 0, model=model, trainer={"steps": job})
        made |= {"steps": 0, "predictor_report": {"members": members} if members else {}}
        write_json(tmp_path / str(job) / "metrics.json", made)
    labels = {group.label for group in group_runs(read_runs([tmp_path]))}
    assert {label.split(" checkpoints")[0].split(" run=")[0] for label in labels} == {"shadow", "ensemble"}
    assert not any("steps" in label for label in labels)
    (ensemble,) = (group for group in group_runs(read_runs([tmp_path])) if group.predictor == "ensemble")
    assert ensemble.runs[0]["settings"]["model.of"] == "2×mlp+1×gnn"
    assert "model.checkpoints" not in ensemble.runs[0]["settings"]


def test_a_variants_cost_is_the_one_with_its_settings(tmp_path: Path) -> None:
    for job, width in enumerate((8, 16)):
        made = train_run("mlp", 0, model={"width": width, "_target_": "x.MLP"}) | {"steps": 5}
        write_json(tmp_path / "runs" / str(job) / "metrics.json", made)
    rows_of = [
        {
            "trace": "alpha",
            "predictor": f"mlp ({w})",
            "settings": {"model.width": w},
            "share_of_host": w / 100,
            "us": {},
        }
        for w in (16, 8)
    ]
    cost = record("benchmark.py", mode="cost", rows=rows_of)
    write_json(tmp_path / "cost" / "metrics.json", cost)
    (path,) = store(tmp_path / "out", [tmp_path / "runs"], [], [tmp_path / "cost"])
    from specgate.report.record import read_record

    zoo = Zoo(read_record(path))
    found = {group.label: zoo.cost(group) for group in zoo.groups}
    assert {label: row and row["share_of_host"] for label, row in found.items()} == {
        "mlp width=8": 0.08,
        "mlp width=16": 0.16,
    }


def test_times_of_two_machines_are_shown_together(tmp_path: Path) -> None:
    from specgate.report.record import read_record

    write_json(tmp_path / "runs" / "0" / "metrics.json", train_run("mlp", 0))
    costs = []
    for device, us in (("cuda", 50.0), ("cpu", 900.0)):
        row = {"trace": "alpha", "predictor": "mlp", "share_of_host": 0.1, "us": {device: {"1": us}}}
        costs.append(tmp_path / device)
        write_json(costs[-1] / "metrics.json", record("benchmark.py", mode="cost", rows=[row]))
    (path,) = store(tmp_path / "out", [tmp_path / "runs"], [], costs)
    zoo = Zoo(read_record(path))
    found = zoo.cost(next(group for group in zoo.groups if group.predictor == "mlp"))
    assert found is not None
    assert found["us"] == {"cuda": {"1": 50.0}, "cpu": {"1": 900.0}}
    assert "µs cuda and cpu" in " ".join(zoo_table(zoo).notes)
    pictures = draw_all({path.stem: read_record(path)}, tmp_path / "images")
    assert [picture.name for picture in pictures] == [f"{path.stem}.png", f"{path.stem}-cost.png"]
    assert f"images/{path.stem}-cost.png" in "\n".join(section(path.stem, read_record(path)))


def test_runs_on_more_training_text_are_compared_on_the_same_test_text(tmp_path: Path) -> None:
    from specgate.report.record import read_record

    for job, (sha, digest) in enumerate((("aa", "t"), ("bb", "t"), ("cc", "u"))):
        made = train_run("mlp", job, model={"width": job + 1, "_target_": "x.MLP"}) | {"steps": 5}
        more = {"revision": ["host"], "text_sha256": {"validation": "v", "test": digest}}
        made["traces"] = [made["traces"][0] | more | {"sha256": [sha] * (2 - job % 2)}]
        write_json(tmp_path / "runs" / str(job) / "metrics.json", made)
    runs = read_runs([tmp_path / "runs"])
    assert [len(group) for group in by_trace(runs).values()] == [2, 1]
    paths = store(tmp_path / "out", [tmp_path / "runs" / "0", tmp_path / "runs" / "1"])
    assert read_record(paths[0])["trace"]["sha256"] == ["bb"], "the record names the plain trace"


def test_the_best_and_the_best_cheap_one_head_the_page(
    inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    def shown(record: Any) -> list[list[str]]:
        text = "\n".join(summary({"zoo-a": record, "other": {"kind": "running"}}))
        assert text.startswith("## The best on every trace")
        lines = [line for line in text.splitlines() if line.startswith("|")][2:]
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]

    record = zoo_of(inputs, tmp_path).record
    (row,) = shown(record)  # the best of all, and the best at a quarter of the layer
    assert (row[1], row[-1]) == ("gnn", "25.00")
    dear = [{**row, "share_of_host": 0.26} if "gnn" in row["predictor"] else row for row in record["cost"]]
    assert [row[1] for row in shown({**record, "cost": dear})] == ["gnn", "mlp"]
    assert summary({"other": {"kind": "running"}}) == []
