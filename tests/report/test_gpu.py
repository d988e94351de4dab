"""Evaluation and calibration give the same numbers on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from specgate.calibration.fit import TemperatureFitter
from specgate.report.evaluate import evaluate
from tests.predictors.support import fitted
from tests.report.support import DOMAINS, batches


@pytest.mark.gpu
@pytest.mark.parametrize("K", [1, 2])
def test_cuda_agrees_with_the_cpu(K: int) -> None:
    labels = {"trace": "t", "model": "m", "stack": "s", "phase": "decode", "split": "test"}
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        predictor = fitted("mlp", "decode", K=K, hidden=False)  # no ties, which rounding would break
        TemperatureFitter(cells=3000)(predictor, batches("decode", K, 0), device)
        made = batches("decode", K, 50)
        found.append(evaluate(predictor, made, labels=labels, domains=DOMAINS, device=device, progress=False))
    for cpu, cuda in zip(*found, strict=True):
        assert (cpu["kind"], cpu["horizon"], cpu["n"]) == (cuda["kind"], cuda["horizon"], cuda["n"])
        for score in ("recall_at_k", "exact_set", "brier", "nll", "ece", "mean_confidence"):
            assert cuda[score] == pytest.approx(cpu[score], abs=1e-4), score
