"""Routing paths as sequences: an encoder over the layers seen, a decoder that emits the layers to come, each
step knowing the experts of the steps before it.

Letters: B sequences, T tokens, N = B * T tokens flat, L MoE layers, P = L + 1 source points, H horizons, E
experts, K experts per token, F features, W encoder width, U decoder width.

After Sutskever, Vinyals and Le, "Sequence to Sequence Learning with Neural Networks", 2014, arXiv:1409.3215,
with gated recurrent units (Cho et al., 2014, arXiv:1406.1078). The joint probability of a path is the product
of its steps' probabilities; :meth:`Seq2Seq.beam_search` finds the most probable ones.

Marginals (what ``forward`` returns) would need a sum over all paths. ``forward`` runs the decoder along the
*soft path* instead: a step is given the mean embedding of the experts of the step before, weighted by their
probabilities. The first step has nothing before it and is exact; from the second on it is an approximation,
but one that is itself trained on the marginal loss (a proper scoring rule), beside the joint likelihood of
the same weights with the true experts fed in.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from specgate.errors import SpecgateError
from specgate.predictors.features import PointFeatures, column_PH, prior_logit, stack_of
from specgate.predictors.joint import draw, fit_sharpness, measure
from specgate.predictors.layers import PointLinear
from specgate.predictors.mlp import ENTRY_GAIN
from specgate.predictors.paths import PathForecast, search_paths
from specgate.predictors.router_prior import RouterPrior
from specgate.traces.batch import INVALID, WITHIN, RoutingBatch, targets


class LayerEncoder(nn.Module):
    """What the layers up to each point say: a gated unit per point, and a recurrent net over the points.

    Shapes:
        forward: features ``[B, T, P, F]``, router weights ``[B, T, P, E]`` -> the decoder's first state
            ``[P, N, U]`` and a share of every step's logits ``[P, N, H * E]``.
    """

    def __init__(
        self,
        points: int,
        size: int,
        width: int,
        state: int,
        outputs: int,
        experts: int,
        dropout: float,
        bias: float,
    ) -> None:
        super().__init__()
        self.first = PointLinear(points, size, width)
        self.gate = PointLinear(points, experts, width, bias=1.0)
        nn.init.normal_(self.gate.weight, std=0.5)
        self.drop = nn.Dropout(dropout)
        self.down = nn.Linear(width, state)
        self.over_layers = nn.GRU(state, state)
        self.start = nn.Linear(2 * state, state)
        self.last = PointLinear(points, width, outputs, zero=True, bias=bias)

    def forward(self, x_BTPF: Tensor, routed_BTPE: Tensor) -> tuple[Tensor, Tensor]:
        x_PNF, routed_PNE = (x.flatten(0, 1).transpose(0, 1) for x in (x_BTPF, routed_BTPE))
        y_PNW = self.drop(nn.functional.gelu(self.first(x_PNF)) * self.gate(routed_PNE))
        here_PNU = self.down(y_PNW)
        with torch.autocast(here_PNU.device.type, enabled=False):
            path_PNU = self.over_layers(here_PNU.float())[0]
        return torch.tanh(self.start(torch.cat([here_PNU, path_PNU], dim=-1))), self.last(y_PNW)


class PathDecoder(nn.Module):
    """One gated recurrent step per horizon; all source points at once.

    Shapes:
        step: see there. expert_LEU (parameter): embeddings of each layer's experts.
    """

    column: Tensor

    def __init__(self, layers: int, horizons: int, experts: int, state: int, dropout: float) -> None:
        super().__init__()
        self.expert_LEU = nn.Parameter(torch.randn(layers, experts, state) * 0.5)
        self.target_PHU = nn.Parameter(torch.randn(layers + 1, horizons, state) * 0.5)
        self.given = nn.Linear(state, 3 * state)
        self.carried = nn.Linear(state, 3 * state, bias=False)
        self.last = nn.ModuleList(
            [PointLinear(layers + 1, state, experts, zero=True) for _ in range(horizons)]
        )
        self.drop = nn.Dropout(dropout)
        self.register_buffer("column", column_PH(layers, horizons) % layers, persistent=False)

    def step(self, h0: int, state: Tensor, used: Tensor | None, points: slice) -> tuple[Tensor, Tensor]:
        """Step h0 at the source points ``points``.

        Shapes:
            state: ``[p, n, U]``. used: ``[p, n, E]``, 1 (or a probability) per expert of step h0 - 1; None at
                the first step.
            output: the next state ``[p, n, U]`` and the step's share of the logits ``[p, n, E]``.
        """
        x = self.target_PHU[points, h0, None]
        if used is not None:
            x = x + used @ self.expert_LEU[self.column[points, h0 - 1]]
        into, back = self.given(x), self.carried(state)
        reset, keep = (a + b for a, b in zip(into.chunk(3, -1)[:2], back.chunk(3, -1)[:2], strict=True))
        new = torch.tanh(into.chunk(3, -1)[2] + reset.sigmoid() * back.chunk(3, -1)[2])
        keep = keep.sigmoid()
        state = keep * state + (1 - keep) * new
        last = self.last[h0]
        assert isinstance(last, PointLinear)
        return state, torch.baddbmm(last.bias_P1[points, None], self.drop(state), last.weight[points])


class Seq2Seq(RouterPrior):
    """The ``seq2seq`` predictor.

    Args:
        width: encoder units per source point. decoder_width: recurrent units of encoder and decoder.
        joint: weight of the joint likelihood (teacher forcing) beside the marginal loss.
        dropout: on encoder units and decoder outputs.
        token_dim, state_dim, decays, heads: see :class:`PointFeatures`. Others: see :class:`RouterPrior`.

    Shapes:
        entry_VF (parameter): ``[V, H * E]``, a token table added at p = 0 (see :class:`MLP`).
        sharp_PH (buffer): factor on the logits of sets in a search, fitted on the validation split.
        forward: ``RoutingBatch`` -> logits ``[B, T, P, H, E]`` of the marginals, by the soft path.
    """

    name: ClassVar[str] = "seq2seq"
    sharp_PH: Tensor

    def __init__(
        self,
        *,
        width: int = 256,
        decoder_width: int = 128,
        joint: float = 0.5,
        dropout: float = 0.1,
        token_dim: int = 32,
        state_dim: int = 32,
        decays: list[float] | None = None,
        heads: int = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.joint = joint
        self.features = PointFeatures(
            **stack_of(self, decays), token_dim=token_dim, state_dim=state_dim, heads=heads
        )
        bias = prior_logit(self)
        outputs = self.lookahead * self.experts
        self.encoder = LayerEncoder(
            self.layers + 1, self.features.size, width, decoder_width, outputs, self.experts, dropout, bias
        )
        self.decoder = PathDecoder(self.layers, self.lookahead, self.experts, decoder_width, dropout)
        self.entry_VF = nn.Embedding(self.vocab_size, outputs)
        nn.init.zeros_(self.entry_VF.weight)
        if self.host is not None:
            with torch.no_grad():  # where the router speaks, the correction starts at zero
                bias_PHE = self.encoder.last.bias_P1.view(self.layers + 1, self.lookahead, self.experts)
                bias_PHE[self.kinds == WITHIN] = 0.0
        self.register_buffer("sharp_PH", torch.ones(self.layers + 1, self.lookahead))
        self._joint_report: dict[str, Any] = {}

    # ------------------------------------------------------------------ marginals and likelihood

    def encode(self, batch: RoutingBatch) -> tuple[Tensor, Tensor]:
        """The decoder's first state ``[P, N, U]`` and what no path changes of the logits ``[P, N, H, E]``."""
        H, E = self.lookahead, self.experts
        start_PNU, direct_PNF = self.encoder(*self.features(batch))
        direct_BTPHE = direct_PNF.transpose(0, 1).reshape(*batch.valid_BT.shape, -1, H, E)
        entry_BTF = self.entry_VF(batch.token_ids_BT) * ENTRY_GAIN
        entry_BT1HE = entry_BTF.view(*entry_BTF.shape[:2], 1, H, E)
        direct_BTPHE = torch.cat([direct_BTPHE[:, :, :1] + entry_BT1HE, direct_BTPHE[:, :, 1:]], dim=2)
        return start_PNU, self.corrected(batch, direct_BTPHE).flatten(0, 1).transpose(0, 1)

    def decode(self, start_PNU: Tensor, direct_PNHE: Tensor, taken_PNHE: Tensor | None = None) -> Tensor:
        """Logits ``[P, N, H, E]`` along the path ``taken`` (1 per expert used at each step), or, without
        one, along the soft path."""
        state, used, logits = start_PNU, None, []
        for h0 in range(self.lookahead):
            state, share_PNE = self.decoder.step(h0, state, used, slice(None))
            logits.append(direct_PNHE[:, :, h0] + share_PNE)
            used = self.soft(logits[-1]) if taken_PNHE is None else taken_PNHE[:, :, h0]
        return torch.stack(logits, dim=2)

    def soft(self, logits: Tensor) -> Tensor:
        """Probability of each expert, by the link."""
        return logits.softmax(-1) if self.top_k == 1 else logits.sigmoid()

    def forward(self, batch: RoutingBatch) -> Tensor:
        return self._as_batch(batch, self.decode(*self.encode(batch)))

    def _as_batch(self, batch: RoutingBatch, x_PNHE: Tensor) -> Tensor:
        return x_PNHE.transpose(0, 1).reshape(*batch.valid_BT.shape, *x_PNHE.shape[:1], *x_PNHE.shape[2:])

    def training_loss(self, batch: RoutingBatch) -> Tensor:
        """Marginal loss and imitation along the soft path, plus ``joint`` times the loss along the path that
        was taken."""
        experts_BTPHK, valid_BTPH = targets(batch, self.lookahead)
        start_PNU, direct_PNHE = self.encode(batch)
        logits_BTPHE = self._as_batch(batch, self.decode(start_PNU, direct_PNHE))
        total = self.loss(logits_BTPHE, experts_BTPHK, valid_BTPH) + self.imitation_loss(batch, logits_BTPHE)
        if self.joint == 0 or self.lookahead == 1:
            return total
        taken_PNHE = self.taken(experts_BTPHK)
        forced_BTPHE = self._as_batch(batch, self.decode(start_PNU, direct_PNHE, taken_PNHE))
        return total + self.joint * self.loss(forced_BTPHE, experts_BTPHK, valid_BTPH)

    def taken(self, experts_BTPHK: Tensor) -> Tensor:
        """The path that was taken, as :meth:`decode` wants it: ``[P, N, H, E]``, 1 per expert used."""
        shape = (*experts_BTPHK.shape[:-1], self.experts)
        taken_BTPHE = torch.zeros(shape, device=experts_BTPHK.device).scatter_(-1, experts_BTPHK, 1.0)
        return taken_BTPHE.flatten(0, 1).transpose(0, 1)

    # ------------------------------------------------------------------ joint paths

    def candidates(self) -> int:
        """How many experts the search tries per step if not told: all (K = 1) or four more than K."""
        return self.experts if self.top_k == 1 else min(self.experts, self.top_k + 4)

    @torch.no_grad()
    def search(
        self, start_NU: Tensor, direct_NHE: Tensor, point: int, horizons: int, beams: int, candidates: int
    ) -> tuple[Tensor, Tensor]:
        """Most probable paths of N states at one source point (see :func:`search_paths`)."""
        at = slice(point, point + 1)

        def step(h0: int, state: Tensor | None, experts: Tensor | None) -> tuple[Tensor, Tensor]:
            if state is None or experts is None:
                state, used = start_NU, None
            else:
                used = state.new_zeros(len(experts), self.experts).scatter_(1, experts, 1.0)[None]
            state, share = self.decoder.step(h0, state[None], used, at)
            direct_nE = direct_NHE[:, h0].repeat_interleave(share.shape[1] // len(direct_NHE), dim=0)
            return state[0], (direct_nE + share[0]) * self.sharp_PH[point, h0]

        return search_paths(step, horizons, self.top_k, beams, candidates)

    @torch.no_grad()
    def beam_search(
        self, batch: RoutingBatch, layer: int | None = None, beams: int = 4, candidates: int | None = None
    ) -> PathForecast:
        """The most probable joint paths from the last valid token of each sequence.

        Args:
            layer: the last MoE layer whose router input exists, as in ``predict_next_experts``.
            beams: paths kept. candidates: experts tried per step (see :func:`search_paths`).

        Raises:
            SpecgateError: if nothing can be foreseen from there, or the state holds no token.
        """
        self.check_batch(batch)
        if layer is None and self.phase == "prefill":
            raise SpecgateError(
                "in prefill all tokens pass a layer before the next: say layer=, the last known"
            )
        layer = self.layers - 1 if layer is None else layer
        self._check_layer("layer", layer, lowest=-1)
        horizons = int((self.kinds[layer + 1] != INVALID).sum())
        if horizons == 0:
            raise SpecgateError(f"layer {layer} is the last of {self.layers} and prefill ends there")
        if not bool(batch.valid_BT.any(1).all()):
            raise SpecgateError("the state holds no token yet: pass at least the current token's id")
        was_training = self.training
        start_PNU, direct_PNHE = self.eval().encode(batch)
        T = batch.valid_BT.shape[1]
        steps_T = torch.arange(T, device=batch.valid_BT.device)
        last_B = (batch.valid_BT * (steps_T + 1)).amax(1) - 1
        rows_B = torch.arange(len(last_B), device=last_B.device) * T + last_B
        paths = self.search(
            start_PNU[layer + 1, rows_B],
            direct_PNHE[layer + 1, rows_B],
            layer + 1,
            horizons,
            beams,
            self.candidates() if candidates is None else candidates,
        )
        self.train(was_training)
        column_H = layer + 1 + torch.arange(horizons)
        return PathForecast(*paths, column_H % self.layers, column_H >= self.layers, layer)

    def fit_on_validation(
        self, batches: Iterable[RoutingBatch], device: torch.device | str | None = None
    ) -> list[dict[str, Any]]:
        """Fit the sharpness of set probabilities, and measure how often joint paths hit (for
        :meth:`report`)."""
        self.eval()
        if device is not None:
            self.to(device)
        states = draw(self, batches, device)
        rows = fit_sharpness(self, states)
        self._joint_report = measure(self, states)
        return rows

    def report(self) -> dict[str, Any]:
        """Joint hit rates on the validation split by kind of target (see ``measure`` in joint.py)."""
        return {"joint_paths": {"horizons": self.lookahead, "kinds": self._joint_report}}
