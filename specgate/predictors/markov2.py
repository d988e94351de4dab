"""Second-order Markov chain over experts with back-off, which adapts to the sequence while decoding.

Letters: B sequences, T tokens, N scored tokens, L MoE layers, P = L + 1 source points, H horizons, E experts
per layer (a second expert axis is the source's), K experts per token, R rows of the pair table, Q kinds of
target, I kinds of evidence, J = L - 1.

Order 2 conditions on the experts of layer l and of layer l - 1, and backs off to layer l alone, then to
popularity. K = 1: interpolated Kneser-Ney (Chen and Goodman, 1999, doi:10.1006/csla.1999.0128) with the
pseudo-counts of its hierarchical Pitman-Yor form (Teh, ACL 2006), (max(c - d, 0) + (a + d N1+) q) / (n + a),
d = n1 / (n1 + 2 n2). K > 1: each expert is used or not, and n trials with c uses over a beta prior centred on
the lower order give (c + a q) / (n + a) (the hierarchical back-off of MacKay and Peto, 1995), which unlike
discounting keeps every probability below 1. While decoding, the sequence so far is a second corpus, as in
cache language models (Kuhn and De Mori, 1990): decayed use of each expert, and the transitions already made
in this sequence. How much each piece of evidence counts is fitted per kind of target and horizon on training
batches held out of the counts (``loglinear.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from specgate.errors import ConfigError
from specgate.predictors.counting import CountingPredictor, next_valid_BT, used_BTCE
from specgate.predictors.features import at_targets_BTPHE, column_PH, decayed, points
from specgate.predictors.loglinear import fit_weights
from specgate.predictors.markov2_step import OWN_SHARE, step_evidence
from specgate.traces.batch import INVALID, WITHIN, WRAPPED, RoutingBatch, kind_PH, targets

Tables = tuple[Tensor, Tensor, Tensor | None]


class Markov2(CountingPredictor):
    """The ``markov2`` predictor. In prefill nothing ahead is known of earlier tokens: there it does not
    adapt.

    Args:
        order: 1 or 2 layers to condition on.
        adapt: factor on the strength of adaptation that was found best; 0 turns it off.
        ranks: pairs are made of the heaviest experts of each layer, at most so many (K^2 pairs are many).
        cells: bound on the pair table's size, 4 bytes each and twice that when in use: 24 layers x 32 experts
            at H = 3 take 2.3 M. Where the E^2 pairs of a layer do not all fit (48 x 128), the commonest of
            the first batches get a row and the others back off to order 1.
        decays: of the sequence's own use of experts; the last one also ages its own transitions.
        fit_batches, fit_every: so many training batches, every ``fit_every``-th, are held out to fit the
            weights on, and counted afterwards. fit_cells: cells per kind and horizon used.

    Shapes:
        joint_LHEE (buffer): ``[L, H + 1, E_source, E_target]``, trials_LHE: uses of the source with such a
            target.
        pair_RHE, trials_RH (buffers): the same of pairs. row_JM (buffer): ``[L - 1, E * E]`` row of the pair
            e(l - 1) * E + e(l), -1 for none. weight_QHI (buffer): of the evidence.
        forward: ``RoutingBatch`` -> logits ``[B, T, P, H, E]``.

    Raises:
        ConfigError: for another order, or a negative ``adapt``.
    """

    name: ClassVar[str] = "markov2"
    joint_LHEE: Tensor
    trials_LHE: Tensor
    pair_RHE: Tensor
    trials_RH: Tensor
    row_JM: Tensor
    weight_QHI: Tensor
    far_kinds: Tensor
    far_columns: Tensor

    def __init__(
        self,
        *,
        order: int = 2,
        adapt: float = 1.0,
        ranks: int = 4,
        cells: int = 32_000_000,
        decays: list[float] | None = None,
        fit_batches: int = 8,
        fit_every: int = 8,
        fit_cells: int = 4096,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if order not in (1, 2):
            raise ConfigError(f"order {order} is neither 1 nor 2: choose how many layers to condition on")
        if adapt < 0:
            raise ConfigError(
                f"adapt {adapt} is negative: choose 0 (off), 1 (as strong as found best) or between"
            )
        L, H, E = self.layers, self.lookahead, self.experts
        self.order, self.ranks, self.adapt = (order if L > 1 else 1), min(ranks, self.top_k), float(adapt)
        self.adapts = self.adapt > 0 and self.phase == "decode"
        self.decays = [0.7, 0.95] if decays is None else [float(a) for a in decays]
        self.fit_batches, self.fit_every, self.fit_cells = fit_batches, fit_every, fit_cells
        self.kept: list[RoutingBatch] = []
        self.batches_seen, self.batches_kept = 0, 0
        self.register_buffer("far_kinds", kind_PH(L, H + 1, self.phase), persistent=False)
        self.register_buffer("far_columns", column_PH(L, H + 1), persistent=False)
        self.register_buffer("joint_LHEE", torch.zeros(L, H + 1, E, E))
        self.register_buffer("trials_LHE", torch.zeros(L, H + 1, E))
        self.rows = min(E * E, max(1, cells // ((L - 1) * H * E))) if self.order == 2 else 0
        R = max(1, (L - 1) * self.rows)
        self.register_buffer("pair_RHE", torch.zeros(R, H, E))
        self.register_buffer("trials_RH", torch.zeros(R, H))
        row_JM = torch.full((max(1, L - 1), E * E), -1, dtype=torch.int64)
        if self.rows == E * E:
            row_JM = torch.arange(R).view(L - 1, E * E)
        self.register_buffer("row_JM", row_JM)
        plain = [1.0, 0.0, 1.0] if self.top_k == 1 else [0.4, 0.2, 0.2]
        start = plain[: 1 if self.order == 1 else 3] + [0.3] * (len(self.decays) + 1) * self.adapts
        self.register_buffer("weight_QHI", torch.tensor(start).repeat(3, H, 1))
        self._tables: Tables | None = None
        self.register_load_state_dict_post_hook(lambda module, keys: setattr(module, "_tables", None))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._tables = None  # moved to another device
        return super()._apply(fn, recurse)

    # ------------------------------------------------------------------ counting

    def count(self, batch: RoutingBatch) -> None:
        self.batches_seen += 1
        if self.batches_kept < self.fit_batches and self.batches_seen % self.fit_every == 0:
            self.batches_kept += 1
            self.kept.append(replace(batch, hidden_BTLD=None))
        else:
            self.add(batch)

    def add(self, batch: RoutingBatch) -> None:
        """Add a batch to all counts."""
        super().count(batch)
        self._tables, mask_BT = None, batch.mask_BT
        both_NCE = used_BTCE(batch, self.experts, 2 * self.layers)[mask_BT]
        follows_N = next_valid_BT(batch)[mask_BT]
        source_LEN = both_NCE[:, : self.layers].permute(1, 2, 0)
        for h0 in range(self.lookahead + 1):
            kind_L, column_L = self.far_kinds[1:, h0], self.far_columns[1:, h0]
            there_LN = self.there(kind_L, follows_N).to(both_NCE.dtype)
            target_LNE = both_NCE[:, column_L].transpose(0, 1) * there_LN[..., None]
            self.joint_LHEE[:, h0] += source_LEN @ target_LNE
            self.trials_LHE[:, h0] += (source_LEN @ there_LN[..., None])[..., 0]
        if self.order == 2:
            self.add_pairs(batch, follows_N)

    @staticmethod
    def there(kind_L: Tensor, follows_N: Tensor) -> Tensor:
        """Whether each layer's target exists: ``[L, N]`` bool."""
        return (kind_L != INVALID)[:, None] & ((kind_L != WRAPPED)[:, None] | follows_N)

    def pairs(self, experts_NLK: Tensor) -> Tensor:
        """The pairs e(l - 1) * E + e(l) of layers 1..L-1: ``[N, L - 1, pairs]``."""
        top = experts_NLK[..., : self.ranks]
        return (top[:, :-1, :, None] * self.experts + top[:, 1:, None, :]).flatten(2)

    def add_pairs(self, batch: RoutingBatch, follows_N: Tensor) -> None:
        """Add a batch to the pair table."""
        following = torch.cat([batch.experts_BTLK[:, 1:], torch.zeros_like(batch.experts_BTLK[:, :1])], dim=1)
        experts_NCK = torch.cat([batch.experts_BTLK, following], dim=2)[batch.mask_BT]
        pairs_NJM = self.pairs(experts_NCK[:, : self.layers])
        layer_J1 = torch.arange(self.layers - 1, device=pairs_NJM.device)[:, None]
        if self.rows < self.experts**2:
            self.give_rows((layer_J1 * self.experts**2 + pairs_NJM).flatten())
        row_NJM = self.row_JM[layer_J1, pairs_NJM]
        for h0 in range(self.lookahead):
            there_JN = self.there(self.kinds[2:, h0], follows_N)
            use_NJM = (row_NJM >= 0) & there_JN.T[..., None]
            cell_N = row_NJM[use_NJM] * self.lookahead + h0
            self.trials_RH.view(-1).index_add_(0, cell_N, torch.ones_like(cell_N, dtype=torch.float32))
            target_NJMK = experts_NCK[:, self.columns[2:, h0]][:, :, None].expand(*row_NJM.shape, -1)
            cell_NK = cell_N[:, None] * self.experts + target_NJMK[use_NJM]
            ones = torch.ones(cell_NK.numel(), device=cell_NK.device)
            self.pair_RHE.view(-1).index_add_(0, cell_NK.flatten(), ones)

    def give_rows(self, code_N: Tensor) -> None:
        """Give the commonest pairs without a row one, as long as their layer has any left."""
        code, times = code_N[self.row_JM.view(-1)[code_N] < 0].unique(return_counts=True)
        code = code[times.argsort(descending=True, stable=True)]
        layer, order = (code // self.experts**2).sort(stable=True)
        first_J = torch.searchsorted(layer, torch.arange(self.layers - 1, device=layer.device))
        place = torch.arange(len(layer), device=layer.device) - first_J[layer]
        place = place + (self.row_JM >= 0).sum(1)[layer]
        free = place < self.rows
        self.row_JM.view(-1)[code[order][free]] = layer[free] * self.rows + place[free]

    @torch.no_grad()
    def finish(self) -> None:
        """Fit the weights on the batches held out, then count these too."""
        if self.kept:
            self.fit_weights(self.kept)
            for batch in self.kept:
                self.add(batch.to(self.joint_LHEE.device))
            self.kept = []

    def fit_weights(self, batches: list[RoutingBatch]) -> None:
        """Choose the weights of least log loss on batches that are not among the counts."""
        chooser = torch.Generator().manual_seed(0)
        found: dict[tuple[int, int], list[tuple[Tensor, Tensor, Tensor]]] = {}
        for batch in batches:
            batch = batch.to(self.joint_LHEE.device)
            x_IBTPHE = torch.stack(list(self.evidence(batch)))
            experts_BTPHK, valid_BTPH = targets(batch, self.lookahead)
            base_PHE = self.link(self.prior_PHE())
            for q in range(3):
                for h0 in range(self.lookahead):
                    cell_N3 = (valid_BTPH[..., h0] & (self.kinds[:, h0] == q)).nonzero()
                    some = torch.randperm(len(cell_N3), generator=chooser)[: self.fit_cells // len(batches)]
                    b, t, p = cell_N3[some.to(cell_N3.device)].unbind(1)
                    x_NIE = x_IBTPHE[:, b, t, p, h0].transpose(0, 1)
                    used_NE = torch.zeros_like(x_NIE[:, 0]).scatter_(-1, experts_BTPHK[b, t, p, h0], 1.0)
                    found.setdefault((q, h0), []).append((base_PHE[p, h0], x_NIE, used_NE))
        for (q, h0), parts in found.items():
            base_NE, x_NIE, used_NE = (torch.cat(column) for column in zip(*parts, strict=True))
            if len(base_NE) >= 64:  # fewer say nothing
                start_I = self.weight_QHI[q, h0]
                start_I.copy_(fit_weights(base_NE, x_NIE, used_NE, start_I, self.top_k))

    # ------------------------------------------------------------------ probabilities

    def backed_off(self, hits: Tensor, trials: Tensor, lower: Tensor) -> Tensor:
        """P(used | context) over its lower order; shapes ``[..., E]``, ``[...]``, ``[..., E]``."""
        trials = trials[..., None]
        if self.top_k > 1:
            return (hits + self.smoothing * lower) / (trials + self.smoothing)
        once, twice = (hits == 1).sum(), (hits == 2).sum()
        discount = once / (once + 2 * twice).clamp(min=1)
        freed = discount * (hits > 0).sum(-1, keepdim=True)
        return ((hits - discount).clamp(min=0) + (self.smoothing + freed) * lower) / (trials + self.smoothing)

    def tables(self) -> Tables:
        """Evidence of one expert of layer l, of one of layer l - 1 (both ``[L, H, E, E]``), and what a pair
        adds to the former (``[R + 1, H * E]``, the last row for pairs without one); made once per state of
        the counts."""
        if self._tables is None:
            prior_LH1E = self.prior_LE()[self.far_columns[1:] % self.layers][:, :, None]
            p_LHEE = self.backed_off(self.joint_LHEE, self.trials_LHE, prior_LH1E)
            evidence_LHEE = self.link(p_LHEE) - self.link(prior_LH1E)
            near, skip = evidence_LHEE[:, :-1], torch.zeros_like(evidence_LHEE[:, 1:])
            skip[1:] = evidence_LHEE[:-1, 1:]
            extra: Tensor | None = None
            if self.order == 2:
                E, code_R = (
                    self.experts,
                    torch.zeros(len(self.pair_RHE), dtype=torch.int64, device=p_LHEE.device),
                )
                layer, code = (self.row_JM >= 0).nonzero().unbind(1)
                code_R[self.row_JM[layer, code]] = layer * E * E + code
                lower_RHE = p_LHEE[code_R // (E * E) + 1, :-1, code_R % E]
                p_RHE = self.backed_off(self.pair_RHE, self.trials_RH, lower_RHE)
                extra = F.pad((self.link(p_RHE) - self.link(lower_RHE)).flatten(1), (0, 0, 0, 1))
            self._tables = (near.contiguous(), skip, extra)
        return self._tables

    def evidence(self, batch: RoutingBatch) -> Iterator[Tensor]:
        """The pieces of evidence in the order of ``weight_QHI``, each ``[B, T, P, H, E]``, in logits."""
        near_LHEE, skip_LHEE, extra_RF = self.tables()
        used_BTLE = used_BTCE(batch, self.experts, self.layers)
        yield points(torch.einsum("btle,lhef->btlhf", used_BTLE, near_LHEE))
        if extra_RF is not None:
            before_BTLE = torch.cat([torch.zeros_like(used_BTLE[:, :, :1]), used_BTLE[:, :, :-1]], dim=2)
            yield points(torch.einsum("btle,lhef->btlhf", before_BTLE, skip_LHEE))
            yield self.pair_evidence(batch, extra_RF)
        if self.adapts:
            yield from self.use_evidence(batch, used_BTLE)
            yield self.own_transitions(batch, used_BTLE)

    def pair_evidence(self, batch: RoutingBatch, extra_RF: Tensor) -> Tensor:
        """Mean over the experts of layer l of what the pairs with those of layer l - 1 add, summed over
        these."""
        B, T = batch.valid_BT.shape
        pairs_NJM = self.pairs(batch.experts_BTLK.flatten(0, 1))
        row_NJM = self.row_JM[torch.arange(self.layers - 1, device=pairs_NJM.device)[:, None], pairs_NJM]
        row_NJM = row_NJM.masked_fill(
            (row_NJM < 0) | ~batch.valid_BT.flatten()[:, None, None], len(extra_RF) - 1
        )
        with torch.autocast(extra_RF.device.type, enabled=False):
            sum_F = F.embedding_bag(row_NJM.flatten(0, 1), extra_RF, mode="sum")
        sum_BTJHE = sum_F.view(B, T, self.layers - 1, self.lookahead, self.experts) / self.ranks
        return F.pad(sum_BTJHE, (0, 0, 0, 0, 2, 0))

    def use_evidence(self, batch: RoutingBatch, used_BTLE: Tensor) -> Iterator[Tensor]:
        """What the sequence's own decayed use of the target layer's experts says."""
        prior_LE, prior_PHE = self.prior_LE(), self.prior_PHE()
        for decay in self.decays:
            mass_BT11 = decayed(batch.valid_BT[..., None].float(), decay)[..., None]
            after_BTLE = OWN_SHARE * (decayed(used_BTLE, decay) - mass_BT11 * prior_LE)
            p_BTPHE = at_targets_BTPHE(after_BTLE, self.lookahead) + prior_PHE
            yield self.link(p_BTPHE) - self.link(prior_PHE)

    def own_transitions(self, batch: RoutingBatch, used_BTLE: Tensor) -> Tensor:
        """What followed in this sequence when earlier tokens used the same experts at this layer.

        The counts c(e, f) of the sequence so far, summed over this token's experts e, are those of tokens s <
        t weighted by how many experts s and t share at layer l: attention without any [E, E] table per token.
        """
        T, L = batch.valid_BT.shape[1], self.layers
        both_BTCE, follows_BT = used_BTCE(batch, self.experts, 2 * L), next_valid_BT(batch)
        age_TT = torch.arange(T, device=used_BTLE.device)
        age_TT = age_TT[:, None] - age_TT[None]
        shared_BLTT = torch.einsum("btle,bsle->blts", used_BTLE, used_BTLE)
        shared_BLTT = shared_BLTT * self.decays[-1] ** age_TT.clamp(min=0)
        prior_LHE, found = self.prior_PHE()[1:], []
        for h0 in range(self.lookahead):
            # The next token's layer j > l (only beyond L layers ahead) is not known of token t itself.
            old_BLTT = shared_BLTT * (age_TT >= (1 if h0 < L else 2))
            there_BTL = torch.where(
                self.kinds[1:, h0] == WITHIN, batch.valid_BT[..., None], follows_BT[..., None]
            )
            hits_BTLE = torch.einsum("blts,bsle->btle", old_BLTT, both_BTCE[:, :, self.columns[1:, h0]])
            mass_BTL1 = torch.einsum("blts,bsl->btl", old_BLTT, there_BTL.float())[..., None]
            prior_LE = prior_LHE[:, h0]
            p_BTLE = (hits_BTLE + self.smoothing * prior_LE) / (mass_BTL1 + self.smoothing)
            found.append(self.link(p_BTLE) - self.link(prior_LE))
        return points(torch.stack(found, dim=3))

    def forward(self, batch: RoutingBatch) -> Tensor:
        B, T = batch.valid_BT.shape
        prior_PHE = self.link(self.prior_PHE())
        logits_BTPHE = prior_PHE.expand(B, T, *prior_PHE.shape)
        for weight_PH1, x_BTPHE in zip(self.weights(), self.evidence(batch), strict=True):
            logits_BTPHE = logits_BTPHE + x_BTPHE * weight_PH1
        return logits_BTPHE

    def weights(self) -> list[Tensor]:
        """The weight of each piece of evidence: ``[P, H, 1]`` each."""
        horizon_H = torch.arange(self.lookahead, device=self.kinds.device)
        weight_PHI = self.weight_QHI[self.kinds.clamp(min=0), horizon_H]
        static = 1 if self.order == 1 else 3
        return [
            w[..., None] * (1.0 if i < static else self.adapt) for i, w in enumerate(weight_PHI.unbind(-1))
        ]

    def step_logits(self, batch: RoutingBatch, layer: int) -> Tensor:
        """Rows of the tables, and sums over the history of the layers foreseen."""
        logits_BHE = self.link(self.prior_LE()[self.columns[layer + 1] % self.layers])
        for weight_PH1, x_BHE in zip(self.weights(), step_evidence(self, batch, layer), strict=True):
            logits_BHE = logits_BHE + x_BHE * weight_PH1[layer + 1]
        return logits_BHE

    def report(self) -> dict[str, Any]:
        """Order, size of the pair table, and the weights found per kind of target (within, wrapped,
        entry)."""
        names = ["order 1", "skip", "pair"][: 1 if self.order == 1 else 3]
        if self.adapts:
            names += [f"own use, decay {a}" for a in self.decays] + ["own transitions"]
        weight_QHI = self.weight_QHI.cpu()
        weights = {
            name: [[round(float(x), 4) for x in row] for row in weight_QHI[..., i]]
            for i, name in enumerate(names)
        }
        pairs = {"cells": self.pair_RHE.numel(), "rows_used": int((self.trials_RH.sum(1) > 0).sum())}
        return {"order": self.order, "pair_table": pairs, "weights": weights}
