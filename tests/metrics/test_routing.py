"""The torchmetrics classes: merging, masking, kinds, sources of error, and an oracle in plain loops."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specgate.metrics import SCORES, CalibrationMetrics, RoutingMetrics, event_scores
from specgate.traces.batch import KINDS, WITHIN, RoutingBatch, kind_PH, targets

HORIZONS, DOMAINS = 3, ("prose", "code")


def make_batch(
    seed: int, phase: str, B: int = 3, T: int = 5, L: int = 2, E: int = 6, K: int = 2
) -> RoutingBatch:
    generator = torch.Generator().manual_seed(seed)
    experts_BTLK = torch.rand(B, T, L, E, generator=generator).topk(K).indices
    length_B = torch.randint(1, T + 1, (B,), generator=generator)
    valid_BT = torch.arange(T)[None] < length_B[:, None]
    zeros = torch.zeros(B, T, dtype=torch.int64)
    return RoutingBatch(
        experts_BTLK=experts_BTLK,
        weights_BTLK=torch.ones(B, T, L, K) / K,
        token_ids_BT=zeros,
        positions_BT=zeros,
        valid_BT=valid_BT,
        mask_BT=valid_BT & (torch.rand(B, T, generator=generator) < 0.8),
        domain_B=torch.randint(0, len(DOMAINS), (B,), generator=generator),
        document_B=torch.arange(B),
        phase=phase,
    )


def make_forecast(seed: int, batch: RoutingBatch, E: int = 6) -> torch.Tensor:
    B, T, L, _ = batch.experts_BTLK.shape
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(B, T, L + 1, HORIZONS, E, generator=generator)


def run(metric: CalibrationMetrics, batch: RoutingBatch, p_BTPHE: torch.Tensor) -> None:
    L = batch.experts_BTLK.shape[2]
    metric.update(p_BTPHE, *targets(batch, HORIZONS), kind_PH(L, HORIZONS, batch.phase), batch.domain_B)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["prefill", "decode"]))
def test_matches_a_loop_over_tokens(seed: int, phase: str) -> None:
    batch = make_batch(seed, phase)
    p_BTPHE = make_forecast(seed, batch)
    metric = RoutingMetrics(2, 6, 2, HORIZONS, DOMAINS)
    run(metric, batch, p_BTPHE)
    result = metric.compute()

    # Independent: walk tokens, source layers and horizons; look the target up by hand.
    found: dict[tuple[str, int], list] = defaultdict(list)
    B, T, L, _ = batch.experts_BTLK.shape
    for b in range(B):
        for t in range(T):
            if not batch.mask_BT[b, t]:
                continue
            for source in range(-1, L):
                for h in range(1, HORIZONS + 1):
                    target, token = source + h, t
                    kind = "entry" if source == -1 else "within"
                    if target >= L:
                        target, token, kind = target - L, t + 1, "wrapped"
                        if phase == "prefill" or token >= T or not batch.valid_BT[b, token] or target >= L:
                            continue
                    used = batch.experts_BTLK[b, token, target]
                    scores = event_scores(p_BTPHE[b, t, source + 1, h - 1][None], used[None])[0]
                    found[kind, h].append((source, target, DOMAINS[batch.domain_B[b]], scores))

    assert {(kind, h) for kind in result for h in result[kind]} == set(found)
    for (kind, h), events in found.items():
        got = result[kind][h]
        mean_J = torch.stack([scores for *_, scores in events]).mean(0)
        assert got["n"] == len(events)
        for j, name in enumerate(SCORES):
            if j:
                assert got[name] == pytest.approx(float(mean_J[j]), abs=1e-5)
        for i, source in enumerate(got["per_layer"]["source_layer"]):
            mine = [e for e in events if e[0] == source]
            assert got["per_layer"]["n"][i] == len(mine)
            assert {got["per_layer"]["target_layer"][i]} == {e[1] for e in mine}
            mean = float(torch.stack([e[3] for e in mine])[:, 1].mean())
            assert got["per_layer"]["recall_at_k"][i] == pytest.approx(mean, abs=1e-5)
        assert sum(d["n"] for d in got["per_domain"].values()) == len(events)
        for domain, score in got["per_domain"].items():
            mean = float(torch.stack([e[3] for e in events if e[2] == domain])[:, 1].mean())
            assert score["recall_at_k"] == pytest.approx(mean, abs=1e-5)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["prefill", "decode"]))
def test_batches_merged_equal_one_batch(seed: int, phase: str) -> None:
    batch = make_batch(seed, phase, B=4)
    p_BTPHE = make_forecast(seed, batch)
    whole, left, right, idle = (RoutingMetrics(2, 6, 2, HORIZONS, DOMAINS) for _ in range(4))
    run(whole, batch, p_BTPHE)
    for rows, metric in ((slice(0, 1), left), (slice(1, 4), right)):
        part = replace(
            batch,
            **{
                name: getattr(batch, name)[rows]
                for name in (
                    "experts_BTLK",
                    "weights_BTLK",
                    "token_ids_BT",
                    "positions_BT",
                    "valid_BT",
                    "mask_BT",
                )
            },
            domain_B=batch.domain_B[rows],
            document_B=batch.document_B[rows],
        )
        run(metric, part, p_BTPHE[rows])
    left.merge_state(right)
    left.merge_state(idle)  # a DDP rank without data changes nothing
    assert left.compute() == whole.compute()
    for name in left._defaults:
        torch.testing.assert_close(getattr(left, name), getattr(whole, name))


def test_state_size_does_not_grow_and_doubles_survive_half_precision() -> None:
    metric = RoutingMetrics(2, 6, 2, HORIZONS, DOMAINS)
    before = {name: getattr(metric, name).shape for name in metric._defaults}
    for seed in range(3):
        batch = make_batch(seed, "decode")
        run(metric, batch, make_forecast(seed, batch).half())
    metric.half()
    assert {name: getattr(metric, name).shape for name in metric._defaults} == before
    assert metric.sums_GPHJ.dtype == torch.float64


def test_perfect_forecast_scores_perfectly_and_result_is_json() -> None:
    batch = make_batch(1, "decode")
    experts_BTPHK, _ = targets(batch, HORIZONS)
    perfect = torch.zeros(*experts_BTPHK.shape[:4], 6).scatter(-1, experts_BTPHK, 1.0)
    metric = RoutingMetrics(2, 6, 2, HORIZONS, DOMAINS)
    run(metric, batch, perfect)
    result = metric.compute()
    assert json.loads(json.dumps(result))["within"]["1"]["recall_at_k"] == 1.0
    for rows in result.values():
        for row in rows.values():
            assert (row["recall_at_k"], row["recall_at_2k"], row["exact_set"]) == (1.0, 1.0, 1.0)
            assert (row["ece"], row["brier"], row["precision_at_half"], row["recall_at_half"]) == (
                0.0,
                0.0,
                1.0,
                1.0,
            )
            assert row["nll"] == pytest.approx(0, abs=1e-6)


def test_prefill_has_no_wrapped_rows_and_recall_per_horizon_agrees() -> None:
    batch = make_batch(2, "prefill", B=8, L=4)
    p_BTPHE = make_forecast(2, batch)
    metric = RoutingMetrics(4, 6, 2, HORIZONS)
    L = 4
    metric.update(p_BTPHE, *targets(batch, HORIZONS), kind_PH(L, HORIZONS, "prefill"), torch.zeros(8).long())
    result = metric.compute()
    assert set(result) == {"within", "entry"} <= set(KINDS.values())
    for h in range(HORIZONS):
        assert float(metric.recall(WITHIN)[h]) == pytest.approx(
            result["within"][h + 1]["recall_at_k"], abs=1e-5
        )


def test_calibration_alone_agrees_with_the_full_metric() -> None:
    batch = make_batch(7, "decode")
    p_BTPHE = make_forecast(7, batch)
    full, light = RoutingMetrics(2, 6, 2, HORIZONS, DOMAINS), CalibrationMetrics(2, 6, 2, HORIZONS, DOMAINS)
    run(full, batch, p_BTPHE)
    run(light, batch, p_BTPHE)
    for kind, rows in light.compute().items():
        for h, row in rows.items():
            assert row.items() <= full.compute()[kind][h].items()


def test_empty_metric_and_empty_batch_give_no_rows() -> None:
    metric = RoutingMetrics(2, 6, 2, HORIZONS, DOMAINS)
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert metric.compute() == {}
    batch = make_batch(1, "decode")
    run(metric, replace(batch, mask_BT=torch.zeros_like(batch.mask_BT)), make_forecast(1, batch))
    metric._computed = None
    assert metric.compute() == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nan", "not \\[0, 1\\]"),
        ("large", "not \\[0, 1\\]"),
        ("shape", "do not fit"),
        ("domain", "domain id"),
    ],
)
def test_wrong_input_is_refused(change: str, message: str) -> None:
    batch = make_batch(1, "decode")
    batch = replace(batch, mask_BT=batch.valid_BT)
    p_BTPHE = make_forecast(1, batch)
    if change == "nan":
        p_BTPHE[:] = torch.nan
    elif change == "large":
        p_BTPHE += 1
    elif change == "shape":
        p_BTPHE = p_BTPHE[..., :5]
    else:
        batch = replace(batch, domain_B=batch.domain_B + 5)
    with pytest.raises(ValueError, match=message):
        run(RoutingMetrics(2, 6, 2, HORIZONS, DOMAINS), batch, p_BTPHE)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(9, "decode")
    p_BTPHE = make_forecast(9, batch)
    whole, pieces = RoutingMetrics(2, 6, 2, HORIZONS, DOMAINS), RoutingMetrics(2, 6, 2, HORIZONS, DOMAINS)
    run(whole, batch, p_BTPHE)
    monkeypatch.setattr("specgate.metrics.routing._CHUNK_CELLS", 18)
    run(pieces, batch, p_BTPHE)
    assert whole.compute() == pieces.compute()


def test_ranks_synchronise_to_the_result_of_one_process() -> None:
    """What DDP does at the end of an epoch: states are gathered from all ranks, in the states' order, and
    reduced.
    """
    batch, other = make_batch(11, "decode"), make_batch(12, "decode")
    whole, here, there = (RoutingMetrics(2, 6, 2, HORIZONS, DOMAINS) for _ in range(3))
    for metric, parts in ((whole, [batch, other]), (here, [batch]), (there, [other])):
        for part in parts:
            run(metric, part, make_forecast(13, part))
    remote = iter([getattr(there, name) for name in here._reductions])
    here.sync(dist_sync_fn=lambda state, group: [state, next(remote)], distributed_available=lambda: True)
    for name in whole._defaults:
        torch.testing.assert_close(getattr(here, name), getattr(whole, name))
    here.unsync()
