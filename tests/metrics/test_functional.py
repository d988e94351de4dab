"""Scores against independent oracles: naive loops, scikit-learn, torchmetrics' own functional metrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, log_loss, precision_score, recall_score
from torchmetrics.functional.classification import binary_calibration_error

from specgate.metrics import (
    SCORES,
    calibration_bins,
    calibration_error,
    equal_mass_error,
    event_scores,
    threshold_curve,
)


def make_events(seed: int, events: int, experts: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p_ME = torch.rand(events, experts, generator=generator)
    if top_k == 1:
        p_ME = p_ME / p_ME.sum(1, keepdim=True)
    used_MK = (p_ME + 0.5 * torch.rand(events, experts, generator=generator)).topk(top_k).indices
    return p_ME, used_MK


shapes = st.integers(1, 12).flatmap(
    lambda experts: st.tuples(
        st.integers(0, 10_000), st.integers(1, 9), st.just(experts), st.integers(1, experts)
    )
)


@settings(max_examples=30, deadline=None)
@given(shapes)
def test_event_scores_match_a_naive_loop(shape: tuple[int, int, int, int]) -> None:
    p_ME, used_MK = make_events(*shape)
    scores_MJ = event_scores(p_ME, used_MK)
    _, _, experts, top_k = shape
    for m in range(len(p_ME)):
        p, used = [float(x) for x in p_ME[m].double()], [int(x) for x in used_MK[m]]
        order = sorted(range(experts), key=lambda e: -p[e])
        best, best2 = set(order[:top_k]), set(order[: 2 * top_k])
        truth = [1.0 if e in used else 0.0 for e in range(experts)]
        clamped = [min(max(x, 1e-7), 1 - 1e-7) for x in p]
        if top_k == 1:
            nll = -math.log(clamped[used[0]])
        else:
            nll = -sum(math.log(q if y else 1 - q) for q, y in zip(clamped, truth, strict=True)) / experts
        expected = {
            "n": 1.0,
            "recall_at_k": len(best & set(used)) / top_k,
            "recall_at_2k": len(best2 & set(used)) / top_k,
            "exact_set": float(best == set(used)),
            "top1": float(order[0] == used[0]),
            "brier": sum((q - y) ** 2 for q, y in zip(p, truth, strict=True)) / experts,
            "nll": nll,
            "mean_confidence": sum(p[e] for e in order[:top_k]) / top_k,
        }
        for j, name in enumerate(SCORES):
            assert float(scores_MJ[m, j]) == pytest.approx(expected[name], abs=1e-6), name


def test_brier_and_nll_match_scikit_learn() -> None:
    p_ME, used_MK = make_events(3, 200, 16, 4)
    truth = torch.zeros_like(p_ME).scatter(1, used_MK, 1.0)
    scores = dict(zip(SCORES, event_scores(p_ME, used_MK).mean(0).tolist(), strict=True))
    flat_p, flat_y = p_ME.double().flatten().numpy(), truth.flatten().numpy()
    assert scores["brier"] == pytest.approx(brier_score_loss(flat_y, flat_p), abs=1e-7)
    assert scores["nll"] == pytest.approx(log_loss(flat_y, flat_p), abs=1e-7)

    p_ME, used_MK = make_events(4, 300, 8, 1)
    scores = dict(zip(SCORES, event_scores(p_ME, used_MK).mean(0).tolist(), strict=True))
    normalised = p_ME.double() / p_ME.double().sum(1, keepdim=True)
    assert scores["nll"] == pytest.approx(
        log_loss(used_MK[:, 0], normalised.numpy(), labels=range(8)), abs=1e-6
    )


@settings(max_examples=20, deadline=None)
@given(shapes, st.sampled_from([5, 10, 20]))
def test_calibration_error_matches_torchmetrics(shape: tuple[int, int, int, int], bins: int) -> None:
    p_ME, used_MK = make_events(*shape)
    truth = torch.zeros_like(p_ME).scatter(1, used_MK, 1.0)
    ours = calibration_error(calibration_bins(p_ME, used_MK, torch.zeros(len(p_ME)).long(), 1, bins)[0])
    theirs = binary_calibration_error(p_ME.double().flatten(), truth.long().flatten(), n_bins=bins, norm="l1")
    assert float(ours) == pytest.approx(float(theirs), abs=1e-6)


def test_bins_are_half_open_and_the_last_one_closed() -> None:
    p_ME = torch.tensor([[0.0, 0.25, 0.5, 0.75, 1.0]])
    bins = calibration_bins(p_ME, torch.tensor([[4, 1]]), torch.zeros(1).long(), 1, 4)[0]
    assert bins[:, 0].tolist() == [1, 1, 1, 2]
    assert bins[:, 2].tolist() == [0, 1, 0, 1]


def test_groups_are_kept_apart() -> None:
    p_ME, used_MK = make_events(5, 50, 8, 2)
    group_M = torch.arange(50) % 3
    together = calibration_bins(p_ME, used_MK, group_M, 4, 20)
    for g in range(4):
        alone = calibration_bins(
            p_ME[group_M == g], used_MK[group_M == g], torch.zeros(int((group_M == g).sum())).long(), 1, 20
        )
        torch.testing.assert_close(together[g], alone[0])


def test_calibration_error_knows_right_from_wrong() -> None:
    generator = torch.Generator().manual_seed(0)
    first_M = torch.rand(40_000, generator=generator)
    used_MK = (torch.rand(40_000, generator=generator) >= first_M).long()[
        :, None
    ]  # expert 0 is used with p = first
    group_M = torch.zeros(40_000).long()
    honest_ME = torch.stack([first_M, 1 - first_M], 1)
    sharpened_ME = honest_ME**3 / (honest_ME**3).sum(1, keepdim=True)
    honest = float(calibration_error(calibration_bins(honest_ME, used_MK, group_M, 1, 20)[0]))
    overconfident = float(calibration_error(calibration_bins(sharpened_ME, used_MK, group_M, 1, 20)[0]))
    assert honest < 0.01
    assert overconfident > 0.1


def test_equal_mass_error_matches_numpy_quantile_bins() -> None:
    p_ME, used_MK = make_events(6, 4000, 8, 2)
    truth = torch.zeros_like(p_ME).scatter(1, used_MK, 1.0)
    fine = calibration_bins(p_ME, used_MK, torch.zeros(len(p_ME)).long(), 1, 1000)[0]
    order = np.argsort(p_ME.flatten().numpy(), kind="stable")
    chunks = np.array_split(order, 20)
    flat_p, flat_y = p_ME.flatten().double().numpy(), truth.flatten().numpy()
    expected = sum(abs(flat_p[c].sum() - flat_y[c].sum()) for c in chunks) / len(order)
    assert float(equal_mass_error(fine, 20)) == pytest.approx(expected, abs=2e-3)
    concentrated = torch.zeros(1000, 3)
    concentrated[3] = torch.tensor([100.0, 0.35, 5.0])
    assert float(equal_mass_error(concentrated, 20)) == pytest.approx(abs(0.35 - 5) / 100)


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 12), st.integers(1, 2))
def test_threshold_curve_matches_scikit_learn(seed: int, experts: int, top_k: int) -> None:
    p_ME, used_MK = make_events(seed, 25, experts, top_k)
    truth = torch.zeros_like(p_ME).scatter(1, used_MK, 1.0).flatten().numpy()
    fine = calibration_bins(p_ME, used_MK, torch.zeros(25).long(), 1, 1000)[0]
    curve = threshold_curve(fine, 50)
    flat_p = p_ME.double().flatten().numpy()
    for i, threshold in enumerate(curve["threshold"]):
        predicted = flat_p >= threshold
        assert curve["recall"][i] == pytest.approx(recall_score(truth, predicted), abs=1e-9)
        assert curve["fetched"][i] == pytest.approx(predicted.mean(), abs=1e-9)
        if predicted.any():
            assert curve["precision"][i] == pytest.approx(precision_score(truth, predicted), abs=1e-9)
        else:
            assert curve["precision"][i] is None


def test_threshold_off_the_bin_edges_is_refused() -> None:
    with pytest.raises(ValueError, match="7 thresholds"):
        threshold_curve(torch.zeros(20, 3), 7)
