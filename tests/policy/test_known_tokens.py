"""known_tokens: exactly the token under way is foreseen, and more of it is worth more."""

from __future__ import annotations

import numpy as np
import pytest

from specgate.errors import ConfigError
from specgate.policy.known_tokens import KnownTokens
from specgate.policy.workload import Workload, decoding

L, E, K = 3, 8, 2


@pytest.fixture
def workload() -> Workload:
    random = np.random.default_rng(0)
    documents = [
        np.stack([[random.permutation(E)[:K] for _ in range(L)] for _ in range(tokens)]) for tokens in (4, 3)
    ]
    return decoding(documents, E)


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_what_is_foreseen(workload: Workload, tokens: int) -> None:
    found = KnownTokens(tokens).foresee(workload, workload)
    for point in range(workload.points):
        step, p = divmod(point, L + 1)
        end = int(np.nonzero(workload.document_S == workload.document_S[step])[0][-1])
        last = min(step + tokens, end)
        wanted = {
            (n - (step * L + p) + 1, expert, 1.0)
            for n in range(step * L + p, (last + 1) * L)
            for expert in workload.event(n)
        }
        assert set(found.at(point)) == wanted


def test_nonsense() -> None:
    for tokens in (-1, 0.5, True):
        with pytest.raises(ConfigError, match="is no number of tokens"):
            KnownTokens(tokens)  # type: ignore[arg-type]
