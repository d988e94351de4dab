"""The n-gram baseline against a direct implementation on dictionaries."""

import math
from collections import Counter

import numpy as np
import pytest

from specgate.moe.pretrain.ngram import DISCOUNT, NGram


def naive(train: list[int], history: list[int], token: int, order: int, vocab: int) -> float:
    if order == 0:
        return 1 / vocab
    context = tuple(history[len(history) - order + 1 :]) if order > 1 else ()
    grams = Counter(tuple(train[i : i + order]) for i in range(len(train) - order + 1))
    follow = {g[-1]: c for g, c in grams.items() if g[:-1] == context}
    lower = naive(train, history, token, order - 1, vocab)
    total = sum(follow.values())
    if total == 0:
        return lower
    return max(follow.get(token, 0) - DISCOUNT, 0) / total + DISCOUNT * len(follow) / total * lower


@pytest.mark.parametrize("order", [2, 3, 4])
def test_equals_the_definition(order: int) -> None:
    rng = np.random.default_rng(order)
    train = rng.integers(0, 5, 200)
    text = rng.integers(0, 7, 30)  # ids 5 and 6 never occur in training
    got = NGram(train, order, 7).log_probs(text)
    for i, token in enumerate(text.tolist()):
        n = min(order, i + 1)
        want = naive(train.tolist(), text[:i].tolist(), token, n, 7)
        assert got[i] == pytest.approx(math.log(want), rel=1e-9)


def test_probabilities_sum_to_one() -> None:
    rng = np.random.default_rng(0)
    model = NGram(rng.integers(0, 6, 500), 4, 8)
    for history in ([0, 1, 2], [5, 5, 5], [7, 6, 7]):
        total = sum(math.exp(model.log_probs(np.array([*history, t]))[-1]) for t in range(8))
        assert total == pytest.approx(1)


def test_refuses_what_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="order 5"):
        NGram(np.zeros(100, int), 5, 65536)
