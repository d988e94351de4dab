"""Evaluation: the oracle is perfect through the same code, rows are plain JSON, calibration shows."""

from __future__ import annotations

import json

import pytest
import torch

from specgate.calibration.fit import TemperatureFitter
from specgate.report.evaluate import evaluate
from specgate.report.identity import expert_load
from specgate.traces.batch import targets
from tests.predictors.support import EXPERTS, LAYERS, fitted
from tests.report.support import DOMAINS, batches, oracle, rows_of, spec_of


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_oracle_is_perfect(phase: str, K: int) -> None:
    rows = rows_of(oracle(phase, K), "t", phase, K)
    assert {row["kind"] for row in rows} == {"within", "entry"} | (
        {"wrapped"} if phase == "decode" else set()
    )
    for row in rows:
        for score in (
            "recall_at_k",
            "recall_at_2k",
            "exact_set",
            "top1",
            "precision_at_half",
            "recall_at_half",
        ):
            assert row[score] == 1.0, score
        for score in ("ece", "brier"):
            assert row[score] == pytest.approx(0, abs=2e-6), score
        assert row["nll"] == pytest.approx(0, abs=1e-5)
        assert row["mean_confidence"] == pytest.approx(1, abs=2e-6)
        assert not row["learned"]


def test_rows_agree_with_a_direct_computation() -> None:
    predictor = fitted("mlp", "decode", hidden=False)
    rows = rows_of(predictor, "t", "decode", 2)
    found, total = torch.zeros(3), torch.zeros(3)
    with torch.no_grad():
        for batch in batches("decode", 2, 50):
            experts_BTPHK, valid_BTPH = targets(batch, 3)
            best = predictor.probabilities(batch).topk(2).indices
            hits = (best[..., None] == experts_BTPHK[..., None, :]).any(-1).float().mean(-1)
            for h in range(3):
                for p in range(1, LAYERS + 1):
                    if p + h < LAYERS:  # within the token
                        valid = valid_BTPH[:, :, p, h]
                        found[h] += hits[:, :, p, h][valid].sum()
                        total[h] += valid.sum()
    for row in (row for row in rows if row["kind"] == "within"):
        h = row["horizon"] - 1
        assert row["n"] == int(total[h])
        assert row["recall_at_k"] == pytest.approx(float(found[h] / total[h]), abs=1e-5)


def test_rows_are_plain_json_and_complete() -> None:
    rows = rows_of(fitted("markov", "decode", hidden=False), "t", "decode", 2)
    assert json.loads(json.dumps(rows, allow_nan=False)) == json.loads(json.dumps(rows))
    wanted = {"trace", "model", "stack", "phase", "split", "predictor", "kind", "horizon", "n", "learned"}
    wanted |= {"recall_at_k", "recall_at_2k", "exact_set", "top1", "precision_at_half", "recall_at_half"}
    wanted |= {"ece", "ece_uncalibrated", "brier", "nll", "mean_confidence", "mean_accuracy", "calibrated"}
    wanted |= {"per_layer", "per_domain", "reliability", "thresholds", "layers", "experts", "top_k"}
    for row in rows:
        assert wanted <= set(row)
        assert set(row["per_domain"]) <= set(DOMAINS)
        assert len({len(column) for column in row["per_layer"].values()}) == 1
        assert row["mean_accuracy"] == row["recall_at_k"]


def test_uncalibrated_columns_are_those_of_the_bare_link() -> None:
    predictor = fitted("mlp", "decode", hidden=False)
    for parameter in predictor.parameters():
        parameter.data *= 0.5  # or its sigmoids would saturate and tie
    before = rows_of(predictor, "t", "decode", 2)
    assert not before[0]["calibrated"]
    TemperatureFitter(cells=2000)(predictor, batches("decode", 2, 0))
    after = rows_of(predictor, "t", "decode", 2)
    for old, new in zip(before, after, strict=True):
        assert new["calibrated"]
        assert new["ece_uncalibrated"] == old["ece"] == old["ece_uncalibrated"]
        assert new["nll_uncalibrated"] == old["nll"]
        assert new["mean_confidence_uncalibrated"] == old["mean_confidence"]
        assert new["reliability_uncalibrated"] == old["reliability"]
        assert new["recall_at_k"] == old["recall_at_k"]  # scaling keeps the order of experts
        assert new["nll"] < old["nll"]  # random weights are badly calibrated


def test_expert_load_counts_scored_tokens() -> None:
    made = batches("decode", 2, 50)
    load = expert_load(spec_of("decode", 2), made)
    used = torch.cat([batch.experts_BTLK[batch.mask_BT] for batch in made])
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            share = float((used[:, layer] == expert).sum()) / (2 * len(used))
            assert load["share"][layer][expert] == pytest.approx(share, abs=1e-5)
        assert 0 < load["entropy"][layer] <= 1
        assert load["hot_quarter"][layer] == pytest.approx(max(load["share"][layer]), abs=1e-4)


def test_evaluation_restores_training_mode_and_leaves_no_gradients() -> None:
    predictor = fitted("mlp", "decode", hidden=False).train()
    labels = {"trace": "t", "model": "m", "stack": "s", "phase": "decode", "split": "test"}
    rows = evaluate(predictor, batches("decode", 2, 0), labels=labels, domains=DOMAINS, progress=True)
    assert predictor.training
    assert rows[0]["predictor"] == "mlp"
    assert all(parameter.grad is None for parameter in predictor.parameters())
