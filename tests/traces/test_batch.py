"""What is to be foreseen from each point, against a triple loop that reads the contract literally."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specgate.traces.batch import ENTRY, INVALID, WITHIN, WRAPPED, RoutingBatch, kind_PH, targets


def random_batch(B: int, T: int, L: int, K: int, phase: str, seed: int) -> RoutingBatch:
    g = torch.Generator().manual_seed(seed)
    length_B = torch.randint(1, T + 1, (B,), generator=g)
    context_B = torch.randint(0, T, (B,), generator=g)
    step_T = torch.arange(T)
    valid_BT = step_T < length_B[:, None]
    return RoutingBatch(
        experts_BTLK=torch.randint(0, 64, (B, T, L, K), generator=g),
        weights_BTLK=torch.rand(B, T, L, K, generator=g),
        token_ids_BT=torch.randint(0, 9, (B, T), generator=g),
        positions_BT=step_T.repeat(B, 1),
        valid_BT=valid_BT,
        mask_BT=valid_BT & (step_T >= context_B[:, None]),
        domain_B=torch.zeros(B, dtype=torch.int64),
        document_B=torch.arange(B),
        phase=phase,
    )


@settings(max_examples=80, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 6),
    L=st.integers(1, 5),
    K=st.integers(1, 3),
    H=st.integers(1, 7),
    phase=st.sampled_from(["prefill", "decode"]),
    seed=st.integers(0, 9999),
)
def test_targets_equal_the_naive_loop(B: int, T: int, L: int, K: int, H: int, phase: str, seed: int) -> None:
    batch = random_batch(B, T, L, K, phase, seed)
    experts, valid = targets(batch, H)
    kinds = kind_PH(L, H, phase)
    assert experts.shape == (B, T, L + 1, H, K)
    assert valid.shape == (B, T, L + 1, H)
    assert kinds.shape == (L + 1, H)
    for p in range(L + 1):
        known = p - 1  # the newest layer whose router input exists; -1 before the first
        for h in range(1, H + 1):
            layer, ahead = known + h, 0
            while layer >= L:
                layer, ahead = layer - L, ahead + 1
            if ahead == 0:
                kind = ENTRY if p == 0 else WITHIN
            else:
                kind = WRAPPED if ahead == 1 and phase == "decode" else INVALID
            assert int(kinds[p, h - 1]) == kind
            for b in range(B):
                for t in range(T):
                    there = t + ahead < T and bool(batch.valid_BT[b, t + ahead])
                    scored = kind != INVALID and bool(batch.mask_BT[b, t]) and there
                    assert bool(valid[b, t, p, h - 1]) == scored
                    want = (
                        batch.experts_BTLK[b, t + ahead, layer]
                        if scored
                        else torch.zeros(K, dtype=torch.int64)
                    )
                    assert torch.equal(experts[b, t, p, h - 1], want)


def test_kinds_of_a_three_layer_stack() -> None:
    assert kind_PH(3, 3, "decode").tolist() == [[2, 2, 2], [0, 0, 1], [0, 1, 1], [1, 1, 1]]
    assert kind_PH(3, 3, "prefill").tolist() == [[2, 2, 2], [0, 0, -1], [0, -1, -1], [-1, -1, -1]]
    assert kind_PH(1, 3, "decode").tolist() == [[2, 1, -1], [1, -1, -1]]


def test_moving_a_batch_keeps_everything() -> None:
    batch = random_batch(2, 4, 3, 2, "decode", 0)
    moved = batch.to("meta")
    assert moved.experts_BTLK.device.type == "meta"
    assert moved.mask_BT.device.type == "meta"
    assert moved.phase == "decode"
    assert moved.hidden_BTLD is None
    same = batch.to("cpu")
    assert torch.equal(same.weights_BTLK, batch.weights_BTLK)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA driver")
def test_pinning() -> None:
    assert random_batch(1, 2, 1, 1, "prefill", 0).pin_memory().experts_BTLK.is_pinned()
