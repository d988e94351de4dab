"""``transformer_xl``: segments with memory equal the whole; attention against loops; recall of the past.

Letters: B sequences, T tokens, L MoE layers, E experts, K experts per token, N rows, J keys, W width, C head
width.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specgate.errors import ConfigError, SpecgateError
from specgate.predictors.recall import Recall
from specgate.predictors.relative import RelativeAttention, aligned, visible_TJ
from specgate.predictors.transformer_xl import Memory, TransformerXL
from specgate.traces.batch import RoutingBatch, targets
from tests.predictors.support import (
    EXPERTS,
    LAYERS,
    VOCAB,
    fitted,
    loader,
    make_batch,
    make_predictor,
    trainer,
)


def cut(batch: RoutingBatch, start: int, stop: int) -> RoutingBatch:
    """Tokens start..stop - 1."""
    parts = {k: v for k, v in vars(batch).items() if isinstance(v, Tensor) and v.dim() > 1}
    return replace(batch, **{k: v[:, start:stop] for k, v in parts.items()})  # type: ignore[arg-type]


def segmented(model: TransformerXL, batch: RoutingBatch, sizes: list[int]) -> tuple[Tensor, Memory]:
    """Logits of ``step`` over segments of these sizes, put together."""
    memory, found, at = None, [], 0
    with torch.no_grad():
        for size in sizes:
            logits, memory = model.step(cut(batch, at, at + size), memory)
            found.append(logits)
            at += size
    assert memory is not None
    assert at == batch.valid_BT.shape[1]
    return torch.cat(found, dim=1), memory


# --- recurrence ---


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize(("K", "hidden"), [(1, True), (2, True), (2, False)])
@pytest.mark.parametrize("memory", [3, 50])
def test_segments_with_memory_equal_the_whole(phase: str, K: int, hidden: bool, memory: int) -> None:
    """Also where the text is longer than the memory: attention reaches as far in both."""
    model = fitted("transformer_xl", phase, K=K, hidden=hidden, memory=memory)
    assert isinstance(model, TransformerXL)
    batch = make_batch(phase, T=13, K=K, hidden=hidden)
    with torch.no_grad():
        whole = model(batch)
    valid = batch.valid_BT
    for sizes in ([1] * 13, [5, 1, 7], [2, 9, 2], [13]):
        found, _ = segmented(model, batch, sizes)
        torch.testing.assert_close(found[valid], whole[valid], rtol=1e-3, atol=1e-3)
    alone, _ = model.step(cut(batch, 5, 13))  # and the memory matters
    assert not torch.allclose(alone[valid[:, 5:]], whole[:, 5:][valid[:, 5:]], atol=1e-2)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_memory_is_bounded_and_without_gradient(phase: str) -> None:
    model = fitted("transformer_xl", phase, memory=4)
    assert isinstance(model, TransformerXL)
    batch, memory = make_batch(phase, T=12, padded=False), None
    sizes = []
    for t in range(12):
        _, memory = model.step(cut(batch, t, t + 1), memory)
        tensors = [
            *memory.trunk,
            memory.valid_Nm,
            memory.experts_BmLK,
            memory.grams_BmG,
            *memory.carry.values(),
        ]
        assert not any(x.requires_grad for x in tensors)
        assert all(x.shape[1] == min(t + 1, 4) for x in memory.trunk)
        sizes.append(sum(x.numel() for x in tensors))
    assert sizes[:4] == sorted(set(sizes[:4]))
    assert len(set(sizes[3:])) == 1
    assert memory is not None
    assert len(memory.trunk) == len(model.trunk) + 1


def test_a_memory_changes_nothing_for_another_sequence() -> None:
    model = fitted("transformer_xl")
    assert isinstance(model, TransformerXL)
    batch = make_batch(T=8, padded=False)
    other = replace(batch, experts_BTLK=batch.experts_BTLK.clone())
    other.experts_BTLK[0, :4] = (other.experts_BTLK[0, :4] + 1) % EXPERTS
    a, b = (segmented(model, x, [4, 4])[0][:, 4:] for x in (batch, other))
    torch.testing.assert_close(a[1:], b[1:])
    assert not torch.allclose(a[0], b[0], atol=1e-3)


def test_steps_that_make_no_sense_are_refused() -> None:
    model = fitted("transformer_xl", "prefill", bidirectional=True)
    assert isinstance(model, TransformerXL)
    with pytest.raises(SpecgateError, match="read whole: call forward"):
        model.step(make_batch("prefill"))
    model = fitted("transformer_xl")
    assert isinstance(model, TransformerXL)
    _, memory = model.step(make_batch(B=3))
    with pytest.raises(SpecgateError, match="memory is of 3 sequences, the segment of 2"):
        model.step(make_batch(B=2), memory)
    with pytest.raises(ConfigError, match="memory=0"):
        make_predictor("transformer_xl", memory=0)
    with pytest.raises(ConfigError, match=r"trunk_width=20 is no multiple of 2 \* trunk_heads=8"):
        make_predictor("transformer_xl", trunk_width=20)


def test_an_encoder_sees_later_tokens() -> None:
    model = fitted("transformer_xl", "prefill", bidirectional=True)
    batch = make_batch("prefill", T=8, padded=False)
    other = replace(batch, experts_BTLK=batch.experts_BTLK.clone())
    other.experts_BTLK[:, 7, 0] = (other.experts_BTLK[:, 7, 0] + 1) % EXPERTS
    with torch.no_grad():
        changed = (model(batch) - model(other)).abs()[:, 0].amax((0, 2, 3))
    assert changed[0] == 0  # before layer 0 its routing is not known
    assert changed[1] > 1e-4


def test_context_tokens_do_not_change_the_loss() -> None:
    """Training leaves the head out for tokens before the first scored one."""
    model = fitted("transformer_xl", dropout=0.0, token_dropout=0.0).train()
    batch = make_batch(context=3)
    found = model.training_loss(batch)
    logits = model(batch)
    expected = model.loss(logits, *targets(batch, 3)) + model.imitation_loss(batch, logits)  # type: ignore[operator]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)


# --- attention ---


def test_scores_by_distance_align_with_keys() -> None:
    T, J = 3, 5
    by_distance = torch.arange(J - 1, -T, -1.0).expand(1, 1, T, -1)  # the score is the distance itself
    found = aligned(by_distance, J)[0, 0]
    for i in range(T):
        for j in range(J):
            assert found[i, j] == (J - T + i) - j
    assert aligned(torch.tensor([[[[7.0]]]]), 1).tolist() == [[[[7.0]]]]


@pytest.mark.parametrize("causal", [True, False])
def test_relative_attention_against_loops(causal: bool) -> None:
    torch.manual_seed(0)
    N, T, J, W, heads, span = 2, 3, 5, 8, 2, 2
    attention = RelativeAttention(W, heads, dropout=0.0)
    with torch.no_grad():
        attention.content_A1C.normal_()
        attention.distance_A1C.normal_()
    y = torch.randn(N, J, W)
    seen = visible_TJ(T, J, span, causal, y.device)
    with torch.no_grad():
        found = attention(y[:, -T:], y, seen[None].expand(N, -1, -1))
        key, value = attention.key_value(y).chunk(2, dim=-1)
        query = attention.query(y)
        for n in range(N):
            for i in range(T):
                at, mixed = J - T + i, []
                for a in range(heads):
                    part = slice(a * W // heads, (a + 1) * W // heads)
                    scores = {}
                    for j in range(J):
                        distance = at - j
                        if causal and not 0 <= distance <= span:
                            continue
                        angles = [distance / 10000.0 ** (2 * c / W) for c in range(W // 2)]
                        wave = torch.tensor([math.sin(x) for x in angles] + [math.cos(x) for x in angles])
                        r = attention.position(wave)[part]
                        q = query[n, at, part]
                        u, v = attention.content_A1C[a, 0], attention.distance_A1C[a, 0]
                        scores[j] = float((q + u) @ key[n, j, part] + (q + v) @ r) / math.sqrt(W // heads)
                    total = sum(math.exp(s) for s in scores.values())
                    mixed.append(sum(math.exp(s) / total * value[n, j, part] for j, s in scores.items()))
                expected = attention.out(torch.cat([m for m in mixed if isinstance(m, Tensor)]))
                torch.testing.assert_close(found[n, i], expected, rtol=1e-4, atol=1e-5)


# --- recall ---


def test_recall_returns_what_the_last_equal_id_used() -> None:
    recall = Recall(LAYERS, EXPERTS, 2, 3, width=4, heads=1)
    with torch.no_grad():
        recall.slope_A.fill_(10.0)  # the latest of several
        recall.bonus_AG.copy_(torch.tensor([[100.0, 0.0, 0.0]]))
        recall.null_PA.fill_(20.0)
        recall.path_PAL.zero_()
    ids = torch.tensor([[4, 5, 4, 6, 5, 4, 7]])
    grams = torch.stack([ids, torch.full_like(ids, -1), torch.full_like(ids, -1)], dim=-1)
    used = torch.rand(1, 7, LAYERS, EXPERTS)
    context = torch.zeros(1, 7, 4)
    with torch.no_grad():
        share = recall.shares(context, context, grams, grams, used, used, span=6)
        found = recall(share, used)[0][..., : 3 * EXPERTS].view(7, LAYERS + 1, 3, EXPERTS) / 2
    last = {2: 0, 4: 1, 5: 2}
    for t in range(7):
        for p in range(LAYERS + 1):
            for h0 in range(3):
                column, expected = p + h0, torch.zeros(EXPERTS)
                if t in last:
                    behind = column >= LAYERS  # the next token's layer: what came behind the found token
                    source = last[t] + int(behind)
                    if source < t and column < 2 * LAYERS:
                        expected = used[0, source, column % LAYERS]
                torch.testing.assert_close(found[t, p, h0], expected, atol=1e-4, rtol=1e-4)


def own_table_batch(seed: int) -> RoutingBatch:
    """Every sequence has its own table from ids to experts: only the sequence's own past tells it."""
    batch = make_batch("decode", B=16, T=24, K=2, hidden=False, seed=seed, padded=False)
    g = torch.Generator().manual_seed(1000 + seed)
    table_BVLK = torch.rand(16, VOCAB, LAYERS, EXPERTS, generator=g).topk(2, dim=-1).indices
    ids_BT = torch.randint(0, 4, (16, 24), generator=g)
    rows_B1 = torch.arange(16)[:, None]
    return replace(batch, token_ids_BT=ids_BT, experts_BTLK=table_BVLK[rows_B1, ids_BT])


def test_it_learns_in_context_what_no_table_can_hold(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {
        "width": 32,
        "trunk_width": 16,
        "trunk_heads": 2,
        "trunk_depth": 1,
        "lr": 0.01,
        "dropout": 0.0,
    }
    model = make_predictor("transformer_xl", K=2, hidden=False, **settings)
    trainer(tmp_path, max_epochs=4).fit(model, loader([own_table_batch(s) for s in range(20)]))
    batch = own_table_batch(99)
    batch.mask_BT[:, :16] = False  # by then every id has come up
    experts, valid = targets(batch, 3)
    valid = valid & (model.kinds != 1)  # which id comes next is chance
    with torch.no_grad():
        recall = float(model.eval().hits(model(batch), experts)[valid].float().mean()) / 2
    assert recall > 0.9


def test_an_id_never_met_says_as_little_as_another(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make_predictor("transformer_xl", "decode", hidden=False)
    batches = [make_batch(hidden=False, seed=s) for s in range(3)]
    for batch in batches:
        batch.token_ids_BT %= VOCAB - 2
    trainer(tmp_path, max_epochs=2).fit(model, loader(batches))
    probe = make_batch(hidden=False, B=1, T=2, padded=False, seed=9)
    with torch.no_grad():
        results = []
        for new in (VOCAB - 2, VOCAB - 1, 0):
            probe.token_ids_BT[0, 1] = new
            results.append(model.eval()(probe)[0, 1])
    torch.testing.assert_close(results[0], results[1])
    assert not torch.allclose(results[0], results[2], atol=1e-4)
