"""Conformal sets: thresholds agree with crepes and brute force, coverage holds, no budget is exceeded."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from crepes import ConformalClassifier
from hypothesis import given, settings
from hypothesis import strategies as st

from specgate.calibration.conformal import (
    LEVELS,
    ConformalSets,
    covered_by_size,
    mean_cut_size,
    ranks,
    threshold,
)
from specgate.calibration.coverage import BudgetCheck, CoverageByDocument, ratio_interval
from specgate.errors import ConfigError
from specgate.traces.batch import INVALID, kind_PH

LAYERS, HORIZONS, EXPERTS = 2, 2, 8
KINDS_PH = kind_PH(LAYERS, HORIZONS, "prefill")
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def honest_batch(top_k: int, seed: int, B: int = 16, T: int = 64) -> Batch:
    """Probabilities and used experts drawn from them, alike for all points and horizons."""
    generator = torch.Generator().manual_seed(seed)
    shape = (B, T, LAYERS + 1, HORIZONS)
    logits = 2 * torch.randn(*shape, EXPERTS, generator=generator)
    noise = -torch.log(-torch.log(torch.rand(logits.shape, generator=generator)))
    used = (logits + noise).topk(top_k).indices
    p = logits.softmax(-1) if top_k == 1 else logits.sigmoid()
    return p, used, torch.ones(shape, dtype=torch.bool) & (KINDS_PH != INVALID)


def fitted(top_k: int, seeds: range = range(2)) -> ConformalSets:
    sets = ConformalSets(HORIZONS, EXPERTS)
    report = sets.fit((honest_batch(top_k, seed) for seed in seeds), KINDS_PH)
    assert {row["mode"] for row in report} == {"all", "each"}
    return sets


@pytest.mark.parametrize("level", [0.8, 0.9, 0.95])
def test_sets_agree_with_crepes_for_one_expert(level: float) -> None:
    p, used, valid = honest_batch(1, 0)
    fresh, _, _ = honest_batch(1, 1, B=4)
    sets = ConformalSets(HORIZONS, EXPERTS)
    sets.fit([(p, used, valid)], KINDS_PH)
    mine = sets.sets(fresh, KINDS_PH, level)
    for point in (1, 2):
        chosen = KINDS_PH[:, 0] == KINDS_PH[point, 0]  # all points of the kind were pooled
        calibration = 1 - p[:, :, chosen, 0].gather(-1, used[:, :, chosen, 0])
        classifier = ConformalClassifier()
        classifier.fit(calibration.flatten().double().numpy())
        scores = 1 - fresh[:, :, point, 0].flatten(0, 1)
        theirs = classifier.predict_set(scores.double().numpy(), confidence=level, smoothing=False)
        np.testing.assert_array_equal(mine[:, :, point, 0].flatten(0, 1).numpy(), theirs.astype(bool))
        break


@pytest.mark.parametrize("mode", ["all", "each"])
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 120), st.integers(1, 4), st.sampled_from([0.5, 0.8, 0.9, 0.95]))
def test_threshold_is_the_largest_that_the_definition_allows(
    mode: str, seed: int, events: int, top_k: int, level: float
) -> None:
    p_MK = torch.rand(events, top_k, generator=torch.Generator().manual_seed(seed))
    found = threshold(p_MK, level, mode)
    allowed = 1 - level

    def holds(limit: float) -> bool:
        missed = p_MK < limit
        if mode == "all":  # the conformal quantile: (N + 1)(1 - a)-th smallest score, brute force
            rank = math.ceil((events + 1) * level - 1e-9)
            return rank <= events and int((~missed.any(1)).sum()) >= rank
        risk = float(missed.double().mean())
        return events / (events + 1) * risk + 1 / (events + 1) <= allowed + 1e-9

    candidates = [0.0, *sorted(p_MK.flatten().tolist())]
    allowed_limits = [limit for limit in candidates if limit == 0.0 or holds(limit)]
    assert found == pytest.approx(max(allowed_limits), abs=1e-7)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("mode", ["all", "each"])
def test_coverage_holds_on_new_data(top_k: int, mode: str) -> None:
    sets = fitted(top_k, range(4))
    p, used, _ = honest_batch(top_k, 99, B=64)
    sizes = []
    for level in (0.8, 0.9, 0.95):
        mask = sets.sets(p, KINDS_PH, level, mode)
        hit = mask.gather(-1, used)
        covered = hit.all(-1).double() if mode == "all" else hit.double().mean(-1)
        for point, h0 in ((1, 0), (0, 1)):
            assert float(covered[:, :, point, h0].mean()) == pytest.approx(level, abs=0.025)
        sizes.append(float(mask[:, :, 1, 0].sum(-1).double().mean()))
    assert sizes == sorted(sizes)
    assert not sets.sets(p, KINDS_PH, 0.9, mode)[:, :, KINDS_PH == INVALID].any()


def test_too_few_events_and_no_fit_mean_everything() -> None:
    assert threshold(torch.rand(5, 2), 0.95, "all") == 0.0
    assert threshold(torch.rand(5, 2), 0.95, "each") == 0.0
    p, _, _ = honest_batch(2, 0, B=1)
    assert ConformalSets(HORIZONS, EXPERTS).sets(p, KINDS_PH, 0.9)[:, :, 1, 0].all()


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("mode", ["all", "each"])
def test_budget_is_never_exceeded_and_its_coverage_is_kept(top_k: int, fill: bool, mode: str) -> None:
    sets = fitted(top_k, range(4))
    p, used, _ = honest_batch(top_k, 77, B=64)
    last = -1.0
    for budget in (0, 1000, 2999, 3000, 5000, 8000, 10**9):
        found = sets.within_budget(p, KINDS_PH, budget, 1000, mode, fill)
        size = found.mask_BTPHE.sum(-1)
        assert int(size.max()) * 1000 <= budget
        hit = found.mask_BTPHE.gather(-1, used)[:, :, 1, 0]
        covered = float((hit.all(-1).double() if mode == "all" else hit.double().mean(-1)).mean())
        assert covered == pytest.approx(float(found.coverage_PH[1, 0]), abs=0.025)
        assert float(size[:, :, 1, 0].double().mean()) == pytest.approx(float(found.size_PH[1, 0]), abs=0.15)
        assert float(found.coverage_PH[1, 0]) >= last - 0.02
        last = float(found.coverage_PH[1, 0])
    filled = sets.within_budget(p, KINDS_PH, 3000, 1000, mode, True)
    unfilled = sets.within_budget(p, KINDS_PH, 3000, 1000, mode, False)
    assert not (unfilled.mask_BTPHE & ~filled.mask_BTPHE).any()
    assert float(filled.coverage_PH[1, 0]) >= float(unfilled.coverage_PH[1, 0])
    assert (filled.mask_BTPHE[:, :, 1, 0].sum(-1) == 3).all()


def test_tables_of_cut_sets_agree_with_a_loop() -> None:
    p, used, _ = honest_batch(3, 5, B=2, T=20)
    p_ME, used_MK = p[..., 0, 0, :].flatten(0, 1), used[..., 0, 0, :].flatten(0, 1)
    inside = p_ME >= 0.4
    place = ranks(p_ME)
    for mode in ("all", "each"):
        found = covered_by_size(inside.gather(1, used_MK), place.gather(1, used_MK), EXPERTS, mode)
        for size in range(1, EXPERTS + 1):
            cut = torch.zeros_like(inside)
            for m in range(len(p_ME)):
                for e in sorted(range(EXPERTS), key=lambda e: -float(p_ME[m, e]))[:size]:
                    cut[m, e] = inside[m, e]
            hit = cut.gather(1, used_MK)
            expected = (hit.all(1).double() if mode == "all" else hit.double().mean(1)).mean()
            assert float(found[size - 1]) == pytest.approx(float(expected), abs=1e-6)
            assert float(mean_cut_size(inside.sum(1), EXPERTS)[size - 1]) == pytest.approx(
                float(inside.sum(1).clamp(max=size).double().mean()), abs=1e-6
            )


def test_coverage_by_document_counts_and_intervals_know_of_documents() -> None:
    sets = fitted(3, range(3))
    found = CoverageByDocument(sets, documents=20, levels=(0.9,))
    p, used, valid = honest_batch(3, 50, B=40)
    document_B = torch.arange(40) // 4
    for part in (slice(0, 15), slice(15, 40)):
        found.update(p[part], used[part], valid[part], KINDS_PH, document_B[part])
    rows = [r for r in found.rows(200) if (r["mode"], r["kind"], r["horizon"]) == ("all", "within", 1)]
    mask = sets.sets(p, KINDS_PH, 0.9)
    within = [point for point in range(LAYERS + 1) if int(KINDS_PH[point, 0]) == 0]
    expected = mask.gather(-1, used).all(-1)[:, :, within, 0].double().mean()
    assert rows[0]["coverage"] == pytest.approx(float(expected), abs=1e-5)
    assert rows[0]["documents"] == 10
    assert rows[0]["low"] <= rows[0]["coverage"] <= rows[0]["high"]
    # ten documents of 100 equal tokens each: the interval is that of ten numbers, not of a thousand
    part_D, whole_D = np.array([100.0, 0.0] * 5), np.full(10, 100.0)
    low, high = ratio_interval(part_D, whole_D, 4000)
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 10) ** 0.5, rel=0.15)


def test_the_gap_scatters_with_the_documents_fitted_on_too() -> None:
    """Thresholds from few unlike documents: the interval over scored documents alone misses the level far too
    often, the one over both seldom. The oracle is the repetition of the whole experiment."""
    generator = np.random.default_rng(0)
    missed_old, missed_new = 0, 0
    for _ in range(60):
        score = [
            generator.normal(size=(25, 1)) + generator.normal(size=(25, 200)) for _ in range(2)
        ]  # the scores of a document are alike
        limit = np.quantile(score[0], 0.2)
        looks = []
        for x_DN in score:
            look = CoverageByDocument(ConformalSets(1, 2), documents=25, levels=(0.8,))
            look.events_DQH[:, 0, 0] = 200.0
            look.sums_DJQHC2[:, :, 0, 0, 0, 0] = torch.from_numpy((x_DN >= limit).sum(1).astype(float))[
                :, None
            ]
            looks.append(look)
        row = looks[1].rows(300, 0, looks[0])[0]
        assert row["gap_low"] <= row["gap"] <= row["gap_high"]
        missed_old += not row["low"] <= 0.8 <= row["high"]
        missed_new += not row["gap_low"] <= 0 <= row["gap_high"]
    assert missed_new <= 9 < missed_old


def test_same_mix_weighs_domains_as_they_were_fitted() -> None:
    looks = []
    for domains, covered in (([0, 0, 0, 1], [8, 8, 8, 8]), ([0, 1, 1, 2], [9, 5, 7, 1])):
        look = CoverageByDocument(ConformalSets(1, 2), documents=4, levels=(0.8,))
        look.events_DQH[:, 0, 0] = 10.0
        look.sums_DJQHC2[:, :, 0, 0, 0, 0] = torch.tensor(covered, dtype=torch.float64)[:, None]
        look.domain_D = torch.tensor(domains)
        looks.append(look)
    row = looks[1].rows(50, 0, looks[0])[0]
    assert row["coverage"] == pytest.approx(22 / 40)
    assert row["same_mix"] == pytest.approx(0.75 * 0.9 + 0.25 * 0.6)  # domain 2 was not fitted on
    assert row["fit_documents"] == 4
    assert "same_mix" not in looks[1].rows(50, 0)[0]


def test_budget_check_sums_over_batches() -> None:
    sets = fitted(3)
    p, used, valid = honest_batch(3, 60)
    whole, parts = BudgetCheck(sets, [2, 4, 99]), BudgetCheck(sets, [2, 4, 99])
    whole.update(p, used, valid, KINDS_PH)
    for part in (slice(0, 5), slice(5, 16)):
        parts.update(p[part], used[part], valid[part], KINDS_PH)
    assert whole.rows() == parts.rows()
    assert {row["budget"] for row in whole.rows()} == {2, 4}
    assert all(row["largest"] <= row["budget"] for row in whole.rows())


def test_wrong_questions_are_refused() -> None:
    sets = fitted(3)
    p, _, _ = honest_batch(3, 0, B=1)
    with pytest.raises(ConfigError, match=r"level 0\.93 has no conformal threshold"):
        sets.sets(p, KINDS_PH, 0.93)
    with pytest.raises(ConfigError, match="mode 'some'"):
        sets.sets(p, KINDS_PH, LEVELS[0], "some")
    with pytest.raises(ConfigError, match="a budget of -1 bytes"):
        sets.within_budget(p, KINDS_PH, -1, 10)
