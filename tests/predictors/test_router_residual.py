"""``router_residual``: starts at the router, ends above it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specgate.errors import ConfigError
from specgate.traces.batch import WITHIN, targets
from tests.predictors.support import loader, make_batch, make_predictor, trainer


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("K", [1, 2])
def test_at_the_start_it_is_router_lookahead(phase: str, K: int) -> None:
    batch = make_batch(phase, K=K)
    ours = make_predictor("router_residual", phase, K=K).eval()
    router = make_predictor("router_lookahead", phase, K=K)
    torch.testing.assert_close(ours(batch), router(batch))
    assert (ours(batch)[:, :, 1, 0] != 0).any()


def test_the_router_stays_as_it_was(tmp_path: Path) -> None:
    predictor = make_predictor("router_residual")
    before = {k: v.clone() for k, v in predictor.host.state_dict().items()}  # type: ignore[union-attr,operator]
    trainer(tmp_path, max_epochs=2).fit(predictor, loader([make_batch()]))
    for key, value in predictor.host.state_dict().items():  # type: ignore[union-attr,operator]
        assert torch.equal(value, before[key])
    assert not torch.allclose(predictor.trust_PH, torch.ones(4, 3))  # type: ignore[arg-type]


def test_training_improves_on_the_router(tmp_path: Path) -> None:
    """Targets are the router's choice on a changed hidden state, so that there is something to correct."""
    router = make_predictor("router_lookahead", "prefill")
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(2))).Q
    batches = []
    for seed in range(12):
        batch = make_batch("prefill", B=8, T=12, seed=seed, padded=False)
        assert batch.hidden_BTLD is not None
        batch.hidden_BTLD = batch.hidden_BTLD[:, :, :1].expand(-1, -1, 3, -1).clone()
        moved = batch.hidden_BTLD + 0.7 * batch.hidden_BTLD @ turn
        scores = router.host.scores(moved, torch.arange(3)[:, None])[..., 0, :]  # type: ignore[union-attr,operator]
        batch.experts_BTLK = scores.topk(2, dim=-1).indices
        batches.append(batch)
    ours = make_predictor("router_residual", "prefill", width=64, lr=5e-3)
    trainer(tmp_path, max_epochs=15).fit(ours, loader(batches[:-1]))
    ours.eval()
    experts, valid = targets(batches[-1], 3)
    within = valid & (ours.kinds == WITHIN)
    with torch.no_grad():
        after = ours.hits(ours(batches[-1]), experts)[within].float().mean() / 2
        before = router.hits(router(batches[-1]), experts)[within].float().mean() / 2
    assert float(after) > float(before) + 0.05


def test_without_routers_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the trace has none: choose model=mlp"):
        trainer(tmp_path, max_epochs=1).fit(
            make_predictor("router_residual", routers=None), loader([make_batch()])
        )
