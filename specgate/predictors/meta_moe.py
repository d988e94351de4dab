"""A mixture of experts that foresees experts: a gate picks, per token, point and horizon, among predictors.

Letters: B sequences, T tokens, L MoE layers, P = L + 1 source points, H horizons, E experts per layer of the
host, J sub-predictors (branches), k of them in use at once.

The branches (``meta_branches.py``) differ in what they look at: hidden state, expert transitions, token ids,
history, and everything at once. Adaptive mixtures (Jacobs et al., 1991) with a sparse gate (Shazeer et al.,
2017, arXiv:1701.06538) and the load-balancing term of Switch (Fedus et al., 2021, arXiv:2101.03961).

Sparse in training and in use alike: the function that is trained is the one that is calibrated and run; a
gate trained dense and cut to k afterwards is another function than the one whose likelihood was maximised.
All branches are computed all the same (they are small products over all tokens at once), so sparsity buys
branches that stand on their own, and a gate that says which evidence it went by, not speed.

Combined as probabilities by default: the weighted mean of the branches' probabilities, the mixture whose
likelihood a mixture of experts maximises. It can never be surer than its surest branch, each branch must be
honest by itself, and it had the lower validation NLL. ``combine: logits`` adds the weighted log odds
instead (a logarithmic pool): sharper, and bolder than the evidence where branches share it.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specgate.errors import ConfigError
from specgate.predictors.features import PointFeatures, multi_hot_BTLE, prior_logit, stack_of
from specgate.predictors.layers import PointLinear, lookup
from specgate.predictors.meta_branches import (
    Branch,
    DeepBranch,
    HiddenBranch,
    HistoryBranch,
    Seen,
    TokenBranch,
    TransitionBranch,
)
from specgate.predictors.mlp import ENTRY_GAIN
from specgate.predictors.router_prior import RouterPrior
from specgate.traces.batch import INVALID, WITHIN, RoutingBatch, targets

COMBINE = ("probabilities", "logits")


class MetaMoE(RouterPrior):
    """The ``meta_moe`` predictor.

    Args:
        active: branches in use at once (k). combine: ``probabilities`` or ``logits``, see above.
        balance: weight of the load-balancing term. noise: standard deviation of the noise on the gate's
            scores, while training, when it chooses (never when it weighs).
        gate_width: hidden units of the gate. rank: of the hidden branch. history: decays of that branch.
        width, depth, dropout: of the deep branch and, dropout, of the gate. token_dim, state_dim, decays,
        heads: see :class:`PointFeatures`. id_dim: width of the token branch's embeddings.

    Shapes:
        lean_JPH (parameter): how much more or less than the others a branch trusts the host's router.
        weight_PHJ, entropy_PH, cells_PH (buffers): sums over the last validation, for :meth:`report`.
        forward: ``RoutingBatch`` -> logits ``[B, T, P, H, E]``.

    Raises:
        ConfigError: for an unknown ``combine``, or an ``active`` that is not among 1..J.
    """

    name: ClassVar[str] = "meta_moe"
    weight_PHJ: Tensor
    entropy_PH: Tensor
    cells_PH: Tensor

    def __init__(
        self,
        *,
        active: int = 2,
        combine: str = "probabilities",
        balance: float = 0.01,
        noise: float = 0.5,
        gate_width: int = 32,
        rank: int = 32,
        history: list[float] | None = None,
        width: int = 256,
        depth: int = 1,
        dropout: float = 0.1,
        token_dim: int = 32,
        id_dim: int = 64,
        state_dim: int = 32,
        decays: list[float] | None = None,
        heads: int = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if combine not in COMBINE:
            raise ConfigError(f"combine={combine!r} is unknown: choose one of {', '.join(COMBINE)}")
        self.active, self.combine, self.balance, self.noise = active, combine, balance, noise
        P, H, E = self.layers + 1, self.lookahead, self.experts
        self.features = PointFeatures(
            **stack_of(self, decays), token_dim=token_dim, state_dim=state_dim, heads=heads
        )
        start_PHE = torch.full((P, H, E), prior_logit(self))
        if self.host is not None:
            start_PHE[self.kinds == WITHIN] = 0.0
        branches: dict[str, Branch] = {}
        if self.hidden_size is not None:
            branches["hidden"] = HiddenBranch(self.hidden_size, rank, start_PHE)
        past = [0.5, 0.9, 0.98] if history is None else [float(a) for a in history]
        offsets = self.features.offsets
        branches |= {
            "transition": TransitionBranch(E, start_PHE),
            "token": TokenBranch(self.vocab_size, id_dim, offsets, start_PHE),
            "history": HistoryBranch(E, self.phase, self.bidirectional, past, start_PHE),
            "deep": DeepBranch(self.features.size, width, depth, E, dropout, start_PHE),
        }
        self.branches = nn.ModuleDict(branches)
        self.entry_VF = nn.Embedding(self.vocab_size, H * E)  # as in mlp; of the token and the deep branch
        nn.init.zeros_(self.entry_VF.weight)
        J = len(branches)
        if not 1 <= active <= J:
            raise ConfigError(f"active={active} is outside 1..{J}, the number of sub-predictors")
        if self.host is not None:
            self.lean_JPH = nn.Parameter(torch.zeros(J, P, H))
        self.drop = nn.Dropout(dropout)
        self.gate_in = PointLinear(P, self.features.size, gate_width)
        self.gate_out = PointLinear(P, gate_width, H * J)
        self.register_buffer("weight_PHJ", torch.zeros(P, H, J))
        self.register_buffer("entropy_PH", torch.zeros(P, H))
        self.register_buffer("cells_PH", torch.zeros(P, H))
        self._tally = False

    # ------------------------------------------------------------------ forecasting

    def forward(self, batch: RoutingBatch) -> Tensor:
        logits_BTPHE, weight_BTPHJ, _ = self.mixed(batch)
        if self._tally:
            self._count(batch, weight_BTPHJ)
        return logits_BTPHE

    def mixed(self, batch: RoutingBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``[B, T, P, H, E]``, the weights of the branches ``[B, T, P, H, J]`` (zero but for k),
        and the gate's scores of the same shape."""
        seen = self.seen(batch)
        scores_BTPHJ = self.scores(seen.features_BTPF)
        log_weight_BTPHJ = self.log_weights(scores_BTPHJ)
        logits_JBTPHE = self.opinions(seen)
        weight_BTPHJ = log_weight_BTPHJ.exp()
        if self.combine == "logits":
            shares = weight_BTPHJ.unbind(-1)
            logits = torch.stack(
                [share[..., None] * z for share, z in zip(shares, logits_JBTPHE, strict=True)]
            ).sum(0)
        else:
            logits = pooled(logits_JBTPHE, log_weight_BTPHJ, self.top_k)
        return logits, weight_BTPHJ, scores_BTPHJ

    def seen(self, batch: RoutingBatch) -> Seen:
        """What the branches look at."""
        used_BTLE = multi_hot_BTLE(batch, self.experts, weighted=False)
        weighted_BTLE = multi_hot_BTLE(batch, self.experts, weighted=True)
        entry_BTF = lookup(self.entry_VF, batch.token_ids_BT) * ENTRY_GAIN
        entry_BT1HE = entry_BTF.unflatten(-1, (1, self.lookahead, self.experts))
        features_BTPF, routed_BTPE = self.features(batch)
        return Seen(batch, features_BTPF, routed_BTPE, used_BTLE, weighted_BTLE, entry_BT1HE)

    def opinions(self, seen: Seen) -> list[Tensor]:
        """What each branch alone would say: J of ``[B, T, P, H, E]``."""
        base_BTPHE = self.prior(seen.batch)
        found = [branch(seen) for branch in self.branches.values()]
        if base_BTPHE is None:
            return found
        return [
            z + base_BTPHE * (self.trust_PH + lean_PH)[..., None]
            for z, lean_PH in zip(found, self.lean_JPH, strict=True)
        ]

    def scores(self, features_BTPF: Tensor) -> Tensor:
        """The gate: ``[B, T, P, F]`` -> ``[B, T, P, H, J]`` float32."""
        B, T, P = features_BTPF.shape[:3]
        x_PNW = F.gelu(self.gate_in(features_BTPF.flatten(0, 1).transpose(0, 1)))
        y_PNJ = self.gate_out(self.drop(x_PNW)).float()
        return y_PNJ.transpose(0, 1).reshape(B, T, P, self.lookahead, len(self.branches))

    def log_weights(self, scores_BTPHJ: Tensor) -> Tensor:
        """Log softmax over the k best branches, -inf for the others."""
        chosen_by = scores_BTPHJ.detach()
        if self.training and self.noise:
            chosen_by = chosen_by + self.noise * torch.randn_like(chosen_by)
        best_BTPHk = chosen_by.topk(self.active, dim=-1).indices
        off_BTPHJ = torch.ones_like(scores_BTPHJ, dtype=torch.bool).scatter(-1, best_BTPHk, False)
        return scores_BTPHJ.masked_fill(off_BTPHJ, -torch.inf).log_softmax(-1)

    # ------------------------------------------------------------------ training

    def training_loss(self, batch: RoutingBatch) -> Tensor:
        """The summed loss and imitation loss, plus ``balance`` per valid cell times the imbalance."""
        logits_BTPHE, weight_BTPHJ, scores_BTPHJ = self.mixed(batch)
        experts_BTPHK, valid_BTPH = targets(batch, self.lookahead)
        total = self.loss(logits_BTPHE, experts_BTPHK, valid_BTPH) + self.imitation_loss(batch, logits_BTPHE)
        uneven = imbalance(weight_BTPHJ[valid_BTPH], scores_BTPHJ[valid_BTPH])
        return total + self.balance * valid_BTPH.sum() * uneven

    # ------------------------------------------------------------------ what it went by

    @torch.no_grad()
    def validation_step(self, batch: RoutingBatch, batch_idx: int) -> None:
        """As every predictor's, and ``val/gate_entropy`` (nats per decision), ``val/gate_load_entropy``
        (nats, of the branches' mean weights) and ``val/gate_<branch>`` (mean weights)."""
        if batch_idx == 0:
            for tensor in (self.weight_PHJ, self.entropy_PH, self.cells_PH):
                tensor.zero_()
        before, cells_before = self.weight_PHJ.sum((0, 1)), self.cells_PH.sum()
        entropy_before = self.entropy_PH.sum()
        self._tally = True
        super().validation_step(batch, batch_idx)
        self._tally = False
        cells = int(self.cells_PH.sum() - cells_before)
        if not cells:
            return
        self._log_mean("val/gate_entropy", (self.entropy_PH.sum() - entropy_before) / cells, cells)
        share_J = (self.weight_PHJ.sum((0, 1)) - before) / cells
        for name, share in zip(self.branches, share_J, strict=True):
            self._log_mean(f"val/gate_{name}", share, cells)
        self._log_mean("val/gate_load_entropy", entropy(share_J), cells)

    def _count(self, batch: RoutingBatch, weight_BTPHJ: Tensor) -> None:
        valid_BTPH = targets(batch, self.lookahead)[1]
        self.weight_PHJ += (weight_BTPHJ * valid_BTPH[..., None]).sum((0, 1))
        self.entropy_PH += (entropy(weight_BTPHJ) * valid_BTPH).sum((0, 1))
        self.cells_PH += valid_BTPH.sum((0, 1))

    def report(self) -> dict[str, Any]:
        """The gate over the last validation: mean weight of every branch, over all and per point and horizon,
        and entropies in nats; empty before a validation."""
        if not bool(self.cells_PH.any()):
            return {}
        names = list(self.branches)

        def shares(weight_J: Tensor) -> dict[str, float]:
            return {n: round(float(w), 5) for n, w in zip(names, weight_J / weight_J.sum(), strict=True)}

        rows = []
        for p in range(self.layers + 1):
            for h0 in range(self.lookahead):
                cells = float(self.cells_PH[p, h0])
                if self.kinds[p, h0] == INVALID or not cells:
                    continue
                rows.append(
                    {
                        "layer": p - 1,
                        "horizon": h0 + 1,
                        "entropy": round(float(self.entropy_PH[p, h0]) / cells, 5),
                        "usage": shares(self.weight_PHJ[p, h0]),
                    }
                )
        all_J = self.weight_PHJ.sum((0, 1))
        gate = {
            "branches": names,
            "active": self.active,
            "usage": shares(all_J),
            "entropy": round(float(self.entropy_PH.sum() / self.cells_PH.sum()), 5),
            "load_entropy": round(float(entropy(all_J / all_J.sum())), 5),
            "load_entropy_max": round(math.log(len(names)), 5),
            "by_layer_and_horizon": rows,
        }
        return {"gate": gate}


def entropy(weight_J: Tensor) -> Tensor:
    """Of weights that sum to 1 along the last axis, in nats."""
    return -torch.xlogy(weight_J, weight_J).sum(-1)


def imbalance(weight_NJ: Tensor, scores_NJ: Tensor) -> Tensor:
    """Switch's load-balancing term: J times the sum over branches of (share of choices) times (mean
    probability that the gate gives it); 1 if all are used alike, J if one is used alone.

    Shapes:
        weight_NJ: weights in use, zero where a branch was not chosen. scores_NJ: of the gate.
    """
    if not len(weight_NJ):
        return scores_NJ.sum()
    chosen_NJ = (weight_NJ > 0).to(scores_NJ.dtype)
    share_J = chosen_NJ.sum(0) / chosen_NJ.sum()
    return scores_NJ.shape[-1] * (share_J * scores_NJ.softmax(-1).mean(0)).sum()


def pooled(logits_JBTPHE: list[Tensor], log_weight_BTPHJ: Tensor, top_k: int) -> Tensor:
    """The link of the weighted mean of the branches' probabilities: log (K = 1) or logit (K > 1) of it:
    ``[B, T, P, H, E]``."""
    z_JBTPHE = torch.stack(logits_JBTPHE).float()
    log_weight = log_weight_BTPHJ.movedim(-1, 0)[..., None]
    if top_k == 1:
        return torch.logsumexp(log_weight + z_JBTPHE.log_softmax(-1), dim=0)
    on = torch.logsumexp(log_weight + F.logsigmoid(z_JBTPHE), dim=0)
    return on - torch.logsumexp(log_weight + F.logsigmoid(-z_JBTPHE), dim=0)
