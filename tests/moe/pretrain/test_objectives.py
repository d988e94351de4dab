"""Objectives: what goes in comes out again, and a batch depends on (seed, step) alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specgate.moe.pretrain.objectives import FromStep, Steps, causal, prefix_lm, span_corruption

SENTINELS = list(range(2, 34))


@settings(max_examples=60, deadline=None)
@given(width=st.integers(16, 150), rows=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_span_corruption_loses_nothing(width: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    window = rng.integers(100, 200, (rows, width))
    batch = span_corruption(window, SENTINELS, 1, rng)
    for original, source, target in zip(
        window, batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True
    ):
        assert source[-1] == target[-1] == 1
        spans: dict[int, list[int]] = {}
        for token in target[:-1]:
            if token in SENTINELS:
                spans[current := token] = []
            else:
                spans[current].append(token)
        rebuilt = [t for token in source[:-1] for t in spans.get(token, [token])]
        assert rebuilt == original.tolist()
        assert all(spans.values())
    hidden = width - (batch["input_ids"] >= 100).sum(1)
    assert (hidden == max(1, round(0.15 * width))).all()


def test_decoder_sees_the_token_before() -> None:
    window = np.arange(100, 120).reshape(1, 20)
    batch = prefix_lm(window, 8)
    assert batch["input_ids"].tolist() == [list(range(100, 108))]
    assert batch["labels"].tolist() == [list(range(108, 120))]
    assert batch["decoder_input_ids"].tolist() == [[0, *range(108, 119)]]
    following = causal(window)
    assert torch.equal(following["labels"][:, :-1], following["input_ids"][:, 1:])


@pytest.mark.parametrize("objective", ["causal", "switch"])
def test_batch_is_a_function_of_seed_and_step(objective: str) -> None:
    stream = np.arange(100, 5000).astype(np.uint16)

    def steps(seed: int) -> Steps:
        return Steps(stream, objective, 600, 32, SENTINELS, 1, seed)

    for step in range(4):
        one, two, other = steps(0)[step], steps(0)[step], steps(1)[step]
        assert all(torch.equal(one[k], two[k]) for k in one)
        assert one["labels"].shape != other["labels"].shape or not torch.equal(one["labels"], other["labels"])
        assert sum(v.numel() for k, v in one.items() if k != "labels") <= 600


def test_resumed_sampler_keeps_the_length_of_the_run() -> None:
    assert list(FromStep(3, 6)) == [3, 4, 5]
    assert len(FromStep(3, 6)) == 6
