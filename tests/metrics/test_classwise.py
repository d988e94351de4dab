"""Classwise and per-domain calibration against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specgate.metrics.classwise import DetailedCalibration, noise_error
from specgate.metrics.functional import calibration_bins
from specgate.traces.batch import kind_PH, targets
from tests.predictors.support import EXPERTS, LAYERS, make_batch


def ece(p: np.ndarray, used: np.ndarray, bins: int) -> float:
    """Expected calibration error of cells, by the definition."""
    number = np.minimum((p * bins).astype(int), bins - 1)
    return sum(abs((p - used)[number == c].sum()) for c in range(bins)) / len(p)


def test_classwise_and_domain_errors_agree_with_loops() -> None:
    horizons, bins = 2, 5
    metric = DetailedCalibration(LAYERS, EXPERTS, 2, horizons, ("a", "b"), bins)
    kinds = kind_PH(LAYERS, horizons, "decode")
    cells: dict[tuple[int, int, int, int], list[tuple[float, float]]] = {}
    for seed in range(3):
        batch = make_batch("decode", K=2, B=4, T=10, hidden=False, seed=seed)
        batch.domain_B[::2] = 1
        experts, valid = targets(batch, horizons)
        p = torch.rand(*valid.shape, EXPERTS, generator=torch.Generator().manual_seed(seed))
        metric.update(p, experts, valid, kinds, batch.domain_B)
        for b, t, point, h0 in valid.nonzero().tolist():
            for e in range(EXPERTS):
                used = float(e in experts[b, t, point, h0].tolist())
                key = (point, h0, e, int(batch.domain_B[b]))
                cells.setdefault(key, []).append((float(p[b, t, point, h0, e]), used))
    found = metric.compute()
    for kind, number in (("within", 0), ("wrapped", 1), ("entry", 2)):
        for h0 in range(horizons):
            points = [point for point in range(LAYERS + 1) if int(kinds[point, h0]) == number]
            if not points:
                continue
            row, of_class = found[kind][h0 + 1], []
            for point in points:
                for e in range(EXPERTS):
                    mine = np.array([x for g in (0, 1) for x in cells.get((point, h0, e, g), [])])
                    of_class.append(ece(mine[:, 0], mine[:, 1], bins))
            assert row["ece_classwise"] == pytest.approx(np.mean(of_class), abs=1e-5)
            for g, domain in enumerate(("a", "b")):
                mine = np.array(
                    [x for p in points for e in range(EXPERTS) for x in cells.get((p, h0, e, g), [])]
                )
                assert row["per_domain"][domain]["ece"] == pytest.approx(
                    ece(mine[:, 0], mine[:, 1], bins), abs=1e-5
                )
            assert row["ece"] < row["ece_classwise"]


def test_noise_is_what_honest_probabilities_show() -> None:
    generator = torch.Generator().manual_seed(0)
    errors, expected = [], []
    for _ in range(60):
        p = torch.rand(300, 2, generator=generator)
        p[:, 1] = 1 - p[:, 0]
        used = (torch.rand(300, generator=generator) >= p[:, 0]).long()[:, None]
        bins = calibration_bins(p, used, torch.zeros(300, dtype=torch.int64), 1, 4)[0]
        number = np.minimum((p[:, 0].numpy() * 4).astype(int), 3)  # the first expert alone: independent cells
        first = (torch.arange(2) == used)[:, 0].numpy()
        errors.append(sum(abs((p[:, 0].numpy() - first)[number == c].sum()) for c in range(4)) / 300)
        alone = bins.clone()
        for c in range(4):
            alone[c] = torch.tensor([(number == c).sum(), p[:, 0].numpy()[number == c].sum(), 0.0])
        expected.append(float(noise_error(alone)))
    assert np.mean(errors) == pytest.approx(np.mean(expected), rel=0.15)
