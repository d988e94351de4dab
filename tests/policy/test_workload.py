"""Workloads: lists of forecasts in their order, and tokens that need no expert."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from specgate.policy.workload import NO_EXPERT, Forecasts, decoding


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=4),
)
def test_forecasts_are_listed_nearest_first_then_surest_then_by_expert(
    seed: int, values: list[float]
) -> None:
    random = np.random.default_rng(seed)
    P, H, E = random.integers(1, 6, 3)
    p_PHE = random.choice(np.asarray(values, dtype=np.float32), (P, H, E))
    found = Forecasts.from_dense(p_PHE)
    for point in range(P):
        wanted = sorted(
            (h, -float(p_PHE[point, h - 1, e]), e)
            for h in range(1, H + 1)
            for e in range(E)
            if p_PHE[point, h - 1, e] > 0
        )
        assert [(h, -p, e) for h, e, p in found.at(point)] == wanted


def test_what_is_dropped_asks_for_no_expert() -> None:
    experts_TLK = np.array([[[2], [NO_EXPERT]], [[NO_EXPERT], [NO_EXPERT]], [[2], [0]]])
    work = decoding([experts_TLK], 3)
    assert [work.event(n) for n in range(work.events)] == [[2], [], [], [], [2], [0]]
    assert work.use_counts_LE().tolist() == [[0, 0, 2], [1, 0, 0]]
    both = decoding([experts_TLK], 3, chunk=3)  # as one piece of a prompt
    assert [both.event(n) for n in range(both.events)] == [[2], [0]]
    assert both.tokens_M.tolist() == [2, 1]
