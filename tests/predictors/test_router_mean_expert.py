"""``router_mean_expert``: the least-squares change of the residual stream, and what it is good for."""

from __future__ import annotations

import numpy as np
import torch

from specgate.predictors.router_mean_expert import RouterMeanExpert
from specgate.traces.batch import RoutingBatch, targets
from tests.predictors.support import EXPERTS, HIDDEN, LAYERS, make_batch, make_predictor


def count(predictor: RouterMeanExpert, batches: list[RoutingBatch]) -> None:
    for batch in batches:
        predictor.count(batch)
    predictor.finish()


def test_before_the_fit_it_is_router_lookahead() -> None:
    batch = make_batch()
    torch.testing.assert_close(
        make_predictor("router_mean_expert")(batch), make_predictor("router_lookahead")(batch)
    )


def test_fit_is_least_squares() -> None:
    predictor = make_predictor("router_mean_expert", ridge=1e-6)
    assert isinstance(predictor, RouterMeanExpert)
    batches = [make_batch(seed=s, B=6, context=1) for s in range(4)]
    count(predictor, batches)
    for layer, h in ((0, 1), (0, 2), (1, 1)):
        rows, changes = [], []
        for batch in batches:
            assert batch.hidden_BTLD is not None
            for b in range(6):
                for t in range(8):
                    if batch.mask_BT[b, t]:
                        x = np.zeros(EXPERTS + 1)
                        x[batch.experts_BTLK[b, t, layer].numpy()] = batch.weights_BTLK[b, t, layer].numpy()
                        x[-1] = 1.0
                        rows.append(x)
                        hidden = batch.hidden_BTLD[b, t].double().numpy()
                        changes.append(hidden[layer + h] - hidden[layer])
        expected, *_ = np.linalg.lstsq(np.array(rows), np.array(changes), rcond=None)
        np.testing.assert_allclose(predictor.added_LHXD[layer, h - 1].numpy(), expected, rtol=1e-3, atol=1e-4)


def test_it_beats_the_plain_router_where_experts_move_the_stream() -> None:
    """A host whose residual stream is moved by its experts alone: adding their outputs gives the exact router
    input."""
    g = torch.Generator().manual_seed(3)
    outputs = torch.randn(LAYERS, EXPERTS, HIDDEN, generator=g) * 2
    plain = make_predictor("router_lookahead", "prefill")
    ours = make_predictor("router_mean_expert", "prefill")
    assert isinstance(ours, RouterMeanExpert)

    def host(seed: int) -> RoutingBatch:
        batch = make_batch("prefill", B=6, T=12, seed=seed, padded=False)
        hidden = [torch.randn(6, 12, HIDDEN, generator=g)]
        for layer in range(LAYERS):
            unit = hidden[-1] / (hidden[-1].pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
            z = unit @ plain.host.weight_LED[layer].T + plain.host.bias_LE[layer]  # type: ignore[operator,union-attr]
            top = z.softmax(-1).topk(2, dim=-1)
            batch.experts_BTLK[:, :, layer], batch.weights_BTLK[:, :, layer] = top.indices, top.values
            moved = (top.values[..., None] * outputs[layer][top.indices]).sum(2)
            hidden.append(hidden[-1] + moved)
        batch.hidden_BTLD = torch.stack(hidden[:LAYERS], dim=2)
        return batch

    count(ours, [host(s) for s in range(6)])
    new = host(99)
    experts, valid = targets(new, 3)
    within = valid & (ours.kinds == 0)

    def recall(predictor) -> float:
        return float(predictor.hits(predictor(new), experts)[..., 0][within[..., 0]].float().mean()) / 2

    assert recall(ours) > 0.95
    assert recall(ours) > recall(plain) + 0.1
