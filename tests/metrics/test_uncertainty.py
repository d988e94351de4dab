"""Entropies against sums by hand, the decomposition against the definition of mutual information, the area
under the ROC curve against scikit-learn.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from specgate.metrics.uncertainty import PARTS, AreaUnderROC, auroc, decompose, forecast_entropy


def members(M: int, E: int, top_k: int, seed: int = 0) -> torch.Tensor:
    """Probabilities of M members at 2 x 3 places, ``[M, 2, 3, E]`` float64."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(M, 2, 3, E, generator=g, dtype=torch.float64) * 2
    return logits.softmax(-1) if top_k == 1 else logits.sigmoid()


def test_entropy_of_what_is_known_by_heart() -> None:
    assert float(forecast_entropy(torch.full((8,), 1 / 8), 1)) == pytest.approx(math.log(8))
    assert float(forecast_entropy(torch.tensor([1.0, 0.0, 0.0]), 1)) == 0
    assert float(forecast_entropy(torch.full((8,), 0.5), 2)) == pytest.approx(8 * math.log(2))
    assert float(forecast_entropy(torch.tensor([1.0, 0.0, 1.0]), 2)) == 0


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("weights", [None, (0.5, 0.2, 0.3), (1.0, 0.0, 0.0)])
def test_epistemic_is_the_mutual_information(top_k: int, weights: tuple[float, ...] | None) -> None:
    """I(m; y) = sum_m w_m KL(p_m || mean), summed over outcomes by hand, not through entropies."""
    p = members(3, 5, top_k)
    w = torch.tensor(weights or (1 / 3,) * 3, dtype=torch.float64)
    parts = decompose(p, top_k, None if weights is None else w)
    for i, j in itertools.product(range(2), range(3)):
        information = 0.0
        mean = [sum(float(w[m] * p[m, i, j, e]) for m in range(3)) for e in range(5)]
        for m, e in itertools.product(range(3), range(5)):
            q = float(p[m, i, j, e])
            information += float(w[m]) * q * math.log(q / mean[e])
            if top_k > 1:
                information += float(w[m]) * (1 - q) * math.log((1 - q) / (1 - mean[e]))
        assert float(parts["epistemic"][i, j]) == pytest.approx(information, abs=1e-12)
    torch.testing.assert_close(parts["total"], parts["aleatoric"] + parts["epistemic"])


def test_weights_may_differ_from_place_to_place() -> None:
    p = members(3, 5, 2)
    g = torch.Generator().manual_seed(1)
    w = torch.rand(3, 2, 3, generator=g, dtype=torch.float64)
    w = w / w.sum(0)
    parts = decompose(p, 2, w)
    for i, j in itertools.product(range(2), range(3)):
        alone = decompose(p[:, i, j], 2, w[:, i, j])
        for part in PARTS:
            torch.testing.assert_close(parts[part][i, j], alone[part])


@pytest.mark.parametrize("top_k", [1, 2])
def test_members_that_agree_know_what_they_know(top_k: int) -> None:
    p = members(1, 6, top_k).expand(4, -1, -1, -1).float()
    parts = decompose(p, top_k)
    assert float(parts["epistemic"].max()) < 1e-5
    certain = torch.eye(2)[:, None, :]  # two members, each certain, of different experts
    split = decompose(certain, top_k)
    assert float(split["aleatoric"]) == 0
    assert float(split["epistemic"]) == pytest.approx(math.log(2) * (1 if top_k == 1 else 2))


@given(st.integers(1, 5), st.integers(2, 8), st.sampled_from([1, 2]), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_no_part_is_negative_and_they_add_up(M: int, E: int, top_k: int, seed: int) -> None:
    parts = decompose(members(M, E, top_k, seed).float(), top_k)
    for part in PARTS:
        assert float(parts[part].min()) >= 0
    torch.testing.assert_close(parts["total"], parts["aleatoric"] + parts["epistemic"])


scores = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=60)


@given(scores)
@settings(max_examples=100, deadline=None)
def test_auroc_is_scikit_learns_ties_included(pairs: list[tuple[int, bool]]) -> None:
    score, positive = (torch.tensor(list(column)) for column in zip(*pairs, strict=True))
    mine = auroc(score.float(), positive)
    if int(positive.sum()) in (0, len(pairs)):
        assert math.isnan(mine)
    else:
        assert mine == pytest.approx(roc_auc_score(positive.numpy(), score.numpy()), abs=1e-12)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_auroc_over_batches_and_its_mistakes() -> None:
    g = torch.Generator().manual_seed(0)
    score = torch.randn(500, generator=g)
    positive = score + torch.randn(500, generator=g) > 0.5
    metric = AreaUnderROC()
    for i in range(0, 500, 90):
        metric.update(score[i : i + 90], positive[i : i + 90])
    assert float(metric.compute()) == pytest.approx(roc_auc_score(positive.numpy(), score.numpy()), abs=1e-12)
    with pytest.raises(ValueError, match="differ"):
        metric.update(score[:3], positive[:2])
    with pytest.raises(ValueError, match="NaN"):
        metric.update(torch.tensor([math.nan]), torch.tensor([True]))
    assert math.isnan(float(AreaUnderROC().compute()))
