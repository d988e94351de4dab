"""``hierarchical`` and its grouping of layers: similarity and segmentation against slow oracles, who shares
what."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from specgate import load_predictor
from specgate.errors import ConfigError
from specgate.predictors.grouping import check_groups, contrast, equal_groups, routing_similarity, segment
from specgate.predictors.hierarchical import GroupBlock, Hierarchical
from specgate.traces.datamodule import RoutingDataModule
from specgate.training import save_predictor
from tests.predictors.support import EXPERTS, LAYERS, fitted, make_batch, make_predictor, trainer


def alignment(x: torch.Tensor, y: torch.Tensor) -> float:
    """Linear CKA from the two N x N Gram matrices (the other way round than the code, which never forms
    them)."""
    N = len(x)
    centre = torch.eye(N, dtype=torch.float64) - 1 / N
    gram_x, gram_y = centre @ (x @ x.T) @ centre, centre @ (y @ y.T) @ centre
    return float((gram_x * gram_y).sum() / (gram_x.norm() * gram_y.norm()))


@pytest.mark.parametrize("K", [1, 2])
def test_similarity_is_centred_kernel_alignment(K: int) -> None:
    batches = [make_batch(K=K, B=6, T=12, seed=s, context=2) for s in range(2)]
    for batch in batches:  # layer 2 follows layer 0 with its experts renumbered
        batch.experts_BTLK[:, :, 2] = (batch.experts_BTLK[:, :, 0] * 5 + 3) % EXPERTS
    found = routing_similarity(batches, LAYERS, EXPERTS, tokens=10**6)
    used = [
        torch.zeros(int(b.mask_BT.sum()), LAYERS, EXPERTS, dtype=torch.float64).scatter_(
            -1, b.experts_BTLK[b.mask_BT], 1.0
        )
        for b in batches
    ]
    x = torch.cat(used)
    for i in range(LAYERS):
        for j in range(LAYERS):
            assert float(found[i, j]) == pytest.approx(alignment(x[:, i], x[:, j]), abs=1e-4)
    assert float(found[0, 2]) == pytest.approx(1.0, abs=1e-4), "numbers of experts mean nothing"
    assert float(found[0, 1]) < 0.5


def test_similarity_looks_at_so_many_tokens_and_survives_a_constant_layer() -> None:
    batches = [make_batch(B=4, T=10, seed=s, padded=False) for s in range(3)]
    batches[0].experts_BTLK[:, :, 1] = torch.tensor([0, 1])
    one = routing_similarity(batches, LAYERS, EXPERTS, tokens=40)
    torch.testing.assert_close(one, routing_similarity(batches[:1], LAYERS, EXPERTS, tokens=10**6))
    assert float(one[0, 1]) == pytest.approx(0.0, abs=1e-6)
    assert one.diagonal().tolist() == [1.0] * LAYERS
    torch.testing.assert_close(routing_similarity([], LAYERS, EXPERTS, tokens=5), torch.eye(LAYERS))


def scatter(similarity: torch.Tensor, run: list[int]) -> float:
    return sum(float(similarity[i, i]) for i in run) - sum(
        float(similarity[i, j]) for i in run for j in run
    ) / len(run)


@pytest.mark.parametrize("groups", [1, 2, 3, 5, 7])
def test_segmentation_is_the_best_of_all(groups: int) -> None:
    g = torch.Generator().manual_seed(groups)
    for _ in range(5):
        x = torch.randn(7, 4, generator=g).abs()
        similarity = torch.nn.functional.normalize(x, dim=1)
        similarity = similarity @ similarity.T
        found = segment(similarity, groups)
        assert [layer for run in found for layer in run] == list(range(7))
        assert len(found) == groups
        assert all(found)
        costs = []
        for cuts in combinations(range(1, 7), groups - 1):
            edges = [0, *cuts, 7]
            runs = [list(range(a, b)) for a, b in pairwise(edges)]
            costs.append(sum(scatter(similarity, run) for run in runs))
        assert sum(scatter(similarity, run) for run in found) == pytest.approx(min(costs), abs=1e-9)


def test_blocks_are_found() -> None:
    blocks = [[0, 1], [2, 3, 4, 5], [6]]
    similarity = torch.full((7, 7), 0.2)
    for block in blocks:
        for i in block:
            similarity[i, block] = 0.7
    similarity.fill_diagonal_(1.0)
    assert segment(similarity, 3) == blocks
    assert contrast(similarity, blocks) == (0.7, 0.2)
    assert contrast(torch.eye(2), [[0], [1]]) == (None, 0.0)


def test_groups_given_or_not() -> None:
    assert equal_groups(8, 3) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert check_groups([[2], [0, 1]], 3) == [[2], [0, 1]]
    model = make_predictor("hierarchical", groups=[[0, 2], [1]])
    assert isinstance(model, Hierarchical)
    assert model.group_P.tolist() == [0, 0, 1, 0]
    assert model.report() == {"groups": [[0, 2], [1]], "grouping": "given"}
    assert len(make_predictor("hierarchical", groups=9).grouping()) == LAYERS  # type: ignore[operator]
    for groups, message in (
        ([[0], [1]], "layer 2 is not in exactly one"),
        ([[0, 1], [1, 2]], "layer 1 is not in exactly one"),
        ([[0, 1, 2, 3]], "layer 3 is not in exactly one"),
        ([[0, 1, 2], []], "one of them is empty"),
        (0, "groups 0 is below 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_predictor("hierarchical", groups=groups)


@pytest.mark.parametrize("hidden", [True, False])
def test_groups_share_a_sub_model_and_layers_keep_their_head(hidden: bool) -> None:
    """What changes when one group's block, one layer's head, the trunk is changed: a gradient says it."""
    model = fitted("hierarchical", hidden=hidden, groups=[[0], [1, 2]])
    assert isinstance(model, Hierarchical)
    logits = model(make_batch(hidden=hidden))
    (block,) = model.blocks
    assert isinstance(block, GroupBlock)
    blocks = block.up_GWW
    for p, group in ((0, 0), (1, 0), (2, 1), (3, 1)):
        (blocks_grad, head_grad, trunk_grad) = torch.autograd.grad(
            logits[:, :, p].sum(), [blocks, model.head.weight, model.shared.weight], retain_graph=True
        )
        assert [bool(blocks_grad[g].any()) for g in range(2)] == [g == group for g in range(2)]
        assert [bool(head_grad[q].any()) for q in range(4)] == [q == p for q in range(4)]
        assert bool(trunk_grad.any())


def test_starts_at_the_target_layers_router() -> None:
    batch, model = make_batch(), make_predictor("hierarchical", width=32).eval()
    base = make_predictor("router_lookahead")
    within = model.kinds == 0
    torch.testing.assert_close(model(batch)[:, :, within], base(batch)[:, :, within])


def test_a_bidirectional_stack_sees_later_tokens_and_no_padding() -> None:
    kwargs: dict[str, Any] = {"K": 1, "hidden": True, "groups": 2, "width": 32}
    batch = make_batch("prefill", K=1, padded=True)
    changed = make_batch("prefill", K=1, padded=True)
    changed.hidden_BTLD[:, 4:] += 1.0  # type: ignore[index]
    for full in (False, True):
        model = fitted("hierarchical", "prefill", bidirectional=full, **kwargs)
        same = torch.allclose(model(batch)[0, :4], model(changed)[0, :4], atol=1e-6)
        assert same != full
        padding = make_batch("prefill", K=1, padded=True)
        padding.hidden_BTLD[-1, 5:] = 9.0  # type: ignore[index]
        torch.testing.assert_close(model(padding)[-1, :5], model(batch)[-1, :5])


def test_groups_are_measured_before_training_and_kept(tiny_traces: dict[str, Path], tmp_path: Path) -> None:
    data = RoutingDataModule(tiny_traces["olmoe"], window=32, batch_size=4, use_hidden=False)
    model = Hierarchical(**vars(data.spec), groups=2, width=16, group_tokens=200)
    assert model.report() == {"groups": [[0, 1], [2, 3]], "grouping": "equal"}
    trainer(tmp_path, max_steps=1).fit(model, datamodule=data)
    similarity = routing_similarity(data.train_dataloader(), 4, 8, tokens=200)
    report = model.report()
    assert report["grouping"] == "measured"
    assert report["groups"] == segment(similarity, 2)
    assert report["similarity"][0][1] == pytest.approx(float(similarity[0, 1]), abs=1e-4)
    again = load_predictor(save_predictor(model, tmp_path / "a.ckpt"))
    assert isinstance(again, Hierarchical)
    assert again.report() == report
    again.similarity_LL.zero_()  # a measured predictor is not measured again
    again.train()
    trainer(tmp_path, max_steps=1).fit(again, datamodule=data)
    assert not again.similarity_LL.any()
