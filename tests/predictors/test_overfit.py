"""Every learned predictor memorises a tiny trace to recall 1.0, so that a broken one cannot hide behind a
plausible score."""

from __future__ import annotations

import pytest

from tests.predictors.overfit import overfit
from tests.predictors.support import LEARNED, SMALL


@pytest.mark.parametrize(
    ("phase", "K", "hidden"), [("prefill", 1, True), ("decode", 2, True), ("decode", 2, False)]
)
@pytest.mark.parametrize("name", sorted(LEARNED))
def test_overfits_a_tiny_trace(name: str, phase: str, K: int, hidden: bool) -> None:
    assert overfit(name, phase, K, hidden, **SMALL.get(name, {})) == 1.0
