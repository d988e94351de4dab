"""How good joint paths are: states of a split, the sharpness of set probabilities, hits.

Letters: B sequences, T tokens, n states drawn, P source points, W paths, H horizons, E experts, K experts per
token, U decoder width, G values tried.

Logits that give each expert its probability underrate whole sets: experts compete for K places, so given that
exactly K are used the likeliest sets are likelier than independent experts would have it. One factor on the
logits per kind of target and horizon, fitted on the validation split by maximum joint likelihood, mends that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specgate.predictors.paths import path_hits, set_log_p
from specgate.traces.batch import ENTRY, INVALID, KINDS, RoutingBatch, targets

if TYPE_CHECKING:
    from specgate.predictors.seq2seq import Seq2Seq

BATCHES, TOKENS = 8, 400
"""States come from so many batches, spread over the split, and at most so many tokens of each."""
BEAMS = 16


@dataclass(frozen=True)
class PathStates:
    """States at one source point, and what came.

    Shapes:
        start_nU, direct_nHE: what a search starts from. forced_nHE, soft_nHE: logits along the path that was
            taken, and along the soft path. taken_nHK: int64.
    """

    point: int
    start_nU: Tensor
    direct_nHE: Tensor
    forced_nHE: Tensor
    soft_nHE: Tensor
    taken_nHK: Tensor


def points_by_kind(kinds_PH: Tensor) -> dict[str, list[int]]:
    """All source points from which every horizon has a target, by the furthest target's kind."""
    found: dict[str, list[int]] = {}
    for p, row in enumerate(kinds_PH.tolist()):
        if INVALID not in row:
            found.setdefault(KINDS[ENTRY if p == 0 else max(row)], []).append(p)
    return found


@torch.no_grad()
def draw(
    model: Seq2Seq, batches: Iterable[RoutingBatch], device: torch.device | str | None = None
) -> dict[str, list[PathStates]]:
    """States at up to three points per kind of target, from batches spread over the split."""
    stride = max(1, len(batches) // BATCHES) if isinstance(batches, Sized) else 1
    states: dict[str, list[PathStates]] = {}
    for batch in islice(batches, 0, stride * BATCHES, stride):
        batch = batch if device is None else batch.to(device)
        experts_BTPHK, valid_BTPH = targets(batch, model.lookahead)
        start_PNU, direct_PNHE = model.encode(batch)
        soft_PNHE = model.decode(start_PNU, direct_PNHE)
        forced_PNHE = model.decode(start_PNU, direct_PNHE, model.taken(experts_BTPHK))
        for kind, points in points_by_kind(model.kinds).items():
            for p in sorted({points[0], points[len(points) // 2], points[-1]}):
                row_n = valid_BTPH[:, :, p].all(-1).flatten().nonzero().flatten()
                row_n = row_n[:: max(1, len(row_n) // TOKENS)][:TOKENS]
                if len(row_n):
                    drawn = PathStates(
                        p,
                        start_PNU[p, row_n],
                        direct_PNHE[p, row_n],
                        forced_PNHE[p, row_n],
                        soft_PNHE[p, row_n],
                        experts_BTPHK[:, :, p].flatten(0, 1)[row_n],
                    )
                    states.setdefault(kind, []).append(drawn)
    return states


@torch.no_grad()
def fit_sharpness(model: Seq2Seq, states: dict[str, list[PathStates]]) -> list[dict[str, Any]]:
    """Set ``model.sharp_PH`` to the factors of highest joint likelihood; one row per kind and horizon."""
    rows: list[dict[str, Any]] = []
    factor_G1 = torch.logspace(-0.5, 1.0, 46)[:, None]  # 0.32 to 10; one of them is 1
    for kind, drawn in states.items():
        forced_nHE = torch.cat([s.forced_nHE for s in drawn])
        taken_nHK = torch.cat([s.taken_nHK for s in drawn])
        points = points_by_kind(model.kinds)[kind]
        for h0 in range(model.lookahead):
            z_nE, set_nK = forced_nHE[:, h0].float(), taken_nHK[:, h0]
            nll_G = torch.cat([-set_log_p(z_nE * f.to(z_nE.device), set_nK).mean()[None] for f in factor_G1])
            best = int(nll_G.argmin())
            model.sharp_PH[points, h0] = float(factor_G1[best])
            one = int((factor_G1 - 1).abs().argmin())
            rows.append(
                {
                    "fitted": "set_sharpness",
                    "kind": kind,
                    "horizon": h0 + 1,
                    "value": float(factor_G1[best]),
                    "nll_before": float(nll_G[one]),
                    "nll_after": float(nll_G[best]),
                }
            )
    return rows


@torch.no_grad()
def measure(model: Seq2Seq, states: dict[str, list[PathStates]]) -> dict[str, dict[str, Any]]:
    """Hit rates of whole paths by kind: the best searched path, the best 4 and 16, the path of the K largest
    marginals of each step; and the mean probability that the best path was given."""
    found: dict[str, dict[str, Any]] = {}
    for kind, drawn in states.items():
        hits, alone, log_p = [], [], []
        for s in drawn:
            paths_nWHK, log_p_nW = model.search(
                s.start_nU, s.direct_nHE, s.point, model.lookahead, BEAMS, model.candidates()
            )
            hit_nW = path_hits(paths_nWHK, s.taken_nHK)
            hits.append(torch.stack([hit_nW[:, :b].any(1) for b in (1, 4, BEAMS)], dim=1))
            best_n1HK = s.soft_nHE.topk(model.top_k, dim=-1).indices[:, None]
            alone.append(path_hits(best_n1HK, s.taken_nHK)[:, 0])
            log_p.append(log_p_nW[:, 0])
        top_3 = torch.cat(hits).double().mean(0).tolist()
        found[kind] = {
            "states": sum(len(x) for x in alone),
            "points": sorted({s.point for s in drawn}),
            "top_1": top_3[0],
            "top_4": top_3[1],
            f"top_{BEAMS}": top_3[2],
            "marginals_path": float(torch.cat(alone).double().mean()),
            "mean_probability": float(torch.cat(log_p).double().exp().mean()),
        }
    return found
