"""benchmark.py mode=uncertainty: its numbers against a plain pass over the events, its page, its mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from sklearn.metrics import roc_auc_score

from specgate.calibration.fit import TemperatureFitter
from specgate.errors import CheckpointError, ConfigError
from specgate.predictors.ensemble import Ensemble
from specgate.predictors.mlp import MLP
from specgate.report.modes import MODES
from specgate.report.publish import publish
from specgate.report.record import Run, read_record
from specgate.report.results import markdown, store
from specgate.report.uncertainty import UncertaintySettings, make_ensemble, measure_uncertainty
from specgate.traces.batch import KINDS, targets
from specgate.traces.datamodule import RoutingDataModule
from specgate.training import save_predictor
from tests.traces.helpers import header_for, stack_info, write_trace

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def make_traces(folder: Path, K: int) -> dict[str, RoutingDataModule]:
    """A trace in domain, and one of other routing all of which is tested."""
    stack = {"decoder": stack_info(L=3, E=6, K=K, D=4)}
    header = header_for(stack, documents=40)
    write_trace(folder / "home", stack, shards=[[12] * 40, [9] * 40], header=header)
    documents = [replace(one, name=f"away-{i}") for i, one in enumerate(header.documents)]
    away = replace(header, documents=documents)
    write_trace(folder / "away", stack, shards=[[12] * 12], header=away, seed=5)
    return {
        "home": RoutingDataModule(folder / "home", window=12, batch_size=16),
        "away": RoutingDataModule(folder / "away", window=12, batch_size=16, everything=True),
    }


def save_members(folder: Path, data: RoutingDataModule, count: int = 3) -> list[str]:
    """Predictors of different random weights, calibrated."""
    for seed in range(count):
        torch.manual_seed(seed)
        one = MLP(**vars(data.spec), lookahead=2, width=16)
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.normal_(std=0.2)
        TemperatureFitter()(one, data.val_dataloader())
        save_predictor(one, folder / str(seed) / "predictor.ckpt")
    return [str(folder / str(seed)) for seed in range(count)]


@pytest.fixture(scope="module", params=[1, 2])
def measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Ensemble, dict[str, RoutingDataModule]]:
    folder = tmp_path_factory.mktemp(f"uncertainty{request.param}")
    traces = make_traces(folder, request.param)
    settings = UncertaintySettings(save_members(folder, traces["home"]), progress=False)
    content = measure_uncertainty(settings, traces)
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    ensemble, _ = make_ensemble(settings, traces["home"], TemperatureFitter(), torch.device("cpu"))
    return content, ensemble, traces


def plain(
    ensemble: Ensemble, data: RoutingDataModule, kind: str, horizon: int
) -> tuple[list[dict[str, Any]], list[int]]:
    """Every event of a kind and horizon on its own, by loops, and the sequence it is of."""
    events, sequences, count = [], [], 0
    for batch in data.test_dataloader():
        experts, valid = targets(batch, ensemble.lookahead)
        parts = ensemble.uncertainty(batch)
        with torch.no_grad():
            p, members = ensemble.probabilities(batch), list(ensemble.member_probabilities(batch))
        for b, t, q, h in valid.nonzero().tolist():
            if h != horizon - 1 or KINDS[int(ensemble.kinds[q, h])] != kind:
                continue
            used = set(experts[b, t, q, h].tolist())
            row: dict[str, Any] = {part: float(values[b, t, q, h]) for part, values in parts.items()}
            best = set(p[b, t, q, h].topk(len(used)).indices.tolist())
            row |= {"domain": data.domains[int(batch.domain_B[b])], "missed": best != used}
            row["token"] = (count + b, t)
            for name, forecast in zip([*ensemble.labels, "ensemble"], [*members, p], strict=True):
                z = forecast[b, t, q, h].clamp(1e-7, 1 - 1e-7)
                hit = torch.zeros_like(z).index_fill_(0, torch.tensor(sorted(used)), 1.0)
                cells = -(hit * z.log() + (1 - hit) * (1 - z).log())
                row[name] = float(cells.mean()) if len(used) > 1 else -float(z[min(used)].log())
            events.append(row)
            sequences.append(count + b)
        count += len(batch.valid_BT)
    return events, sequences


@pytest.mark.parametrize(("kind", "horizon"), [("within", 1), ("entry", 2)])
@pytest.mark.parametrize("trace", ["home", "away"])
def test_means_scores_and_errors_are_those_of_the_events(
    measured: Any, trace: str, kind: str, horizon: int
) -> None:
    content, ensemble, traces = measured
    events, _ = plain(ensemble, traces[trace], kind, horizon)
    place = {"trace": trace, "kind": kind, "horizon": horizon}

    def one(rows: str, **more: Any) -> dict[str, Any]:
        (row,) = [r for r in content[rows] if all(r[k] == v for k, v in (place | more).items())]
        return dict(row)

    for domain in ("all", events[0]["domain"]):
        mine = [e for e in events if domain in ("all", e["domain"])]
        row = one("rows", domain=domain)
        assert (row["n"], row["shifted"]) == (len(mine), trace == "away")
        for part in ("total", "aleatoric", "epistemic"):
            assert row[part] == pytest.approx(sum(e[part] for e in mine) / len(mine), rel=1e-3, abs=1e-5)
    for name in [*ensemble.labels, "ensemble"]:
        nll = sum(e[name] for e in events) / len(events)
        assert one("scores", predictor=name)["nll"] == pytest.approx(nll, rel=1e-4)
    missed = [e["missed"] for e in events]
    row = one("errors")
    assert row["missed"] == pytest.approx(sum(missed) / len(missed), abs=1e-6)
    for part in ("total", "epistemic"):
        area = roc_auc_score(missed, [e[part] for e in events])
        assert row[f"auroc_{part}"] == pytest.approx(area, abs=2e-3)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_shift_is_told_by_means_per_token_and_per_sequence(measured: Any, level: str) -> None:
    content, ensemble, traces = measured
    scores: dict[str, dict[Any, list[float]]] = {}
    for trace in ("home", "away"):
        events, sequences = plain(ensemble, traces[trace], "within", 1)
        groups = scores.setdefault(trace, {})
        for event, sequence in zip(events, sequences, strict=True):
            groups.setdefault(event["token"] if level == "token" else sequence, []).append(event["epistemic"])
    means = [[sum(v) / len(v) for v in scores[trace].values()] for trace in ("home", "away")]
    (row,) = [
        r
        for r in content["shift"]
        if (r["level"], r["domain"], r["kind"], r["horizon"]) == (level, "all", "within", 1)
    ]
    assert (row["n_home"], row["n_shifted"]) == (len(means[0]), len(means[1]))
    area = roc_auc_score([0] * len(means[0]) + [1] * len(means[1]), means[0] + means[1])
    assert row["auroc_epistemic"] == pytest.approx(area, abs=2e-3)
    shares = [r["share"] for r in content["histograms"]]
    assert all(sum(share) == pytest.approx(1, abs=1e-3) for share in shares)


def test_everything_is_published(measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specgate.report.canvas.DPI", 40)
    content, ensemble, _ = measured
    assert "uncertainty" in MODES
    Run("benchmark.py", {}).write(tmp_path, **content)
    console = Console(width=150, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    page = publish(read_record(tmp_path), tmp_path, console)
    assert {file.name for file in (tmp_path / "plots").glob("*.png")} == {
        f"uncertainty-{name}.png" for name in ("nll", "domains", "histogram", "auroc")
    }
    text, tables = page.read_text(), (tmp_path / "tables.md").read_text()
    assert text.count("<img ") == 4
    assert all(label in tables for label in ensemble.labels)
    assert "AUROC" in console.export_text()
    slim = store(tmp_path, tmp_path / "results")
    assert "histograms" not in json.loads(slim.read_text())
    section = markdown({"one": read_record(slim)})
    assert all(
        label in section for label in [*ensemble.labels, "AUROC: forecasts that miss", "An ensemble (mean)"]
    )
    pairs = {(r["kind"], r["horizon"]) for r in content["scores"]}
    better = sum(
        min(r["nll"] for r in rows if r["predictor"] != "ensemble")
        > next(r["nll"] for r in rows if r["predictor"] == "ensemble")
        for pair in pairs
        for rows in [
            [r for r in content["scores"] if r["trace"] == "home" and (r["kind"], r["horizon"]) == pair]
        ]
    )
    assert f"home: the ensemble's NLL is below its best member's in {better} of {len(pairs)} pairs" in tables


def test_an_ensemble_brings_its_own_weights_and_calibration(tmp_path: Path) -> None:
    traces = make_traces(tmp_path, 2)
    members = save_members(tmp_path, traces["home"], 2)
    made, fitted = make_ensemble(
        UncertaintySettings(members, combine="stacking"),
        traces["home"],
        TemperatureFitter(),
        torch.device("cpu"),
    )
    assert fitted
    assert not torch.allclose(made.weight_QHM[0], torch.full((2, 2), 0.5))
    saved = save_predictor(made, tmp_path / "together" / "predictor.ckpt")
    again, nothing = make_ensemble(
        UncertaintySettings([str(saved)]), traces["home"], TemperatureFitter(), torch.device("cpu")
    )
    assert nothing == []
    assert again.combine == "stacking"
    torch.testing.assert_close(again.weight_QHM, made.weight_QHM)


def test_mistakes_are_named(tmp_path: Path) -> None:
    traces = make_traces(tmp_path, 2)
    (alone,) = save_members(tmp_path, traces["home"], 1)
    with pytest.raises(ConfigError, match="names one mlp, which cannot disagree with itself"):
        measure_uncertainty(UncertaintySettings([alone]), traces)
    with pytest.raises(ConfigError, match="needs an ensemble or its members"):
        UncertaintySettings([])
    with pytest.raises(ConfigError, match="split='train' is unknown"):
        UncertaintySettings([alone], split="train")
    (tmp_path / "other").mkdir()
    other = make_traces(tmp_path / "other", 1)
    members = save_members(tmp_path, traces["home"], 2)
    with pytest.raises(CheckpointError, match="top_k"):
        measure_uncertainty(UncertaintySettings(members), other)
