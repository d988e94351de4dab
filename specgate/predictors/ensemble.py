"""Several trained predictors as one: averaged, voting, or stacked; and how far they disagree.

Letters: M members, B sequences, T tokens, P source points, H horizons, E experts per layer, K experts per
token, Q kinds of target (within, wrapped, entry).

``mean``: the members' calibrated probabilities, averaged (Lakshminarayanan et al., "Simple and Scalable
Predictive Uncertainty Estimation using Deep Ensembles", 2017, arXiv:1612.01474). ``stacking``: averaged with
weights per kind and horizon that were fitted on validation data (Wolpert, "Stacked Generalization", Neural
Networks 5, 1992; see ``specgate.calibration.ensemble``). ``majority``: each member votes for its K most
probable experts. ``borda``: each member gives E - 1 points to its most probable expert, 0 to its last (de
Borda, "Mémoire sur les élections au scrutin", 1781).

Votes are no probabilities. Their logits grow with the votes, equal votes being ordered by the mean
probability, and the calibrator that follows makes them probabilities: ``majority`` is the share of v votes
among M members and one more, the mean: link((v + mean) / (M + 1)); ``borda`` is the log odds of the share of
all points, whose odds fall about as 1 / rank, by a power that the temperature fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from specgate.errors import ConfigError
from specgate.metrics.uncertainty import forecast_entropy, parts_of
from specgate.predictors.base import Predictor
from specgate.predictors.registry import predictor_class
from specgate.traces.batch import KINDS, RoutingBatch

COMBINE = ("mean", "majority", "borda", "stacking")


class Ensemble(Predictor):
    """The ``ensemble`` predictor. It has no training of its own; its members are evaluated one by one.

    Args:
        members: trained predictors of one stack and phase, or their hyperparameters (that is what a
            checkpoint keeps: their weights and calibrators lie in the ensemble's own state).
        labels: what to call them; default, their names.
        combine: one of :data:`COMBINE`.
        hidden_size: of the trace; kept only if a member needs it.

    Shapes:
        weight_QHM (buffer): ``[Q, H, M]`` weight of each member, equal ones until stacking was fitted.
        forward: ``RoutingBatch`` -> logits ``[B, T, P, H, E]``.

    Raises:
        ConfigError: for fewer than two members, or members that do not fit together.
    """

    name: ClassVar[str] = "ensemble"
    trains: ClassVar[bool] = False
    weight_QHM: Tensor

    def __init__(
        self,
        *,
        members: Sequence[Predictor | Mapping[str, Any]],
        labels: Sequence[str] | None = None,
        combine: str = "mean",
        **kwargs: Any,
    ) -> None:
        if combine not in COMBINE:
            raise ConfigError(f"combine={combine!r} is unknown: choose one of {', '.join(COMBINE)}")
        if len(members) < 2:
            raise ConfigError(
                f"an ensemble of {len(members)} predictors is none: name at least two checkpoints"
            )
        built = [one if isinstance(one, Predictor) else _built(one) for one in members]
        members = [dict(one.hparams) for one in built]  # what save_hyperparameters sees
        labels = list(labels or [one.name for one in built])
        if not any(one.hidden_size for one in built):
            kwargs["hidden_size"] = None
        super().__init__(**kwargs)
        self.combine, self.labels = combine, labels
        for label, one in zip(labels, built, strict=True):
            self._check(label, one)
        self.members = nn.ModuleList(built).requires_grad_(False).eval()
        shape = (len(KINDS), self.lookahead, len(built))
        self.register_buffer("weight_QHM", torch.full(shape, 1 / len(built)))

    @classmethod
    def of(
        cls,
        members: Sequence[Predictor],
        labels: Sequence[str] | None = None,
        combine: str = "mean",
        lookahead: int | None = None,
    ) -> Ensemble:
        """An ensemble of loaded predictors; ``lookahead`` is by default the least of theirs.

        Raises:
            ConfigError: see :class:`Ensemble`.
        """
        if not members:
            raise ConfigError("an ensemble of 0 predictors is none: name at least two checkpoints")
        first = members[0]
        return cls(
            members=members,
            labels=labels,
            combine=combine,
            layers=first.layers,
            experts=first.experts,
            top_k=first.top_k,
            vocab_size=min(one.vocab_size for one in members),
            phase=first.phase,
            hidden_size=next((one.hidden_size for one in members if one.hidden_size), None),
            bidirectional=any(one.bidirectional for one in members),
            lookahead=lookahead or min(one.lookahead for one in members),
        )

    def _check(self, label: str, member: Predictor) -> None:
        for what in ("layers", "experts", "top_k", "phase"):
            have, want = getattr(member, what), getattr(self, what)
            if have != want:
                raise ConfigError(
                    f"member {label} was trained for {what}={have} and the ensemble is of {what}={want}:"
                    " combine predictors of one stack and phase"
                )
        if member.lookahead < self.lookahead:
            raise ConfigError(
                f"member {label} foresees {member.lookahead} layers ahead, the ensemble should foresee"
                f" {self.lookahead}: set lookahead={member.lookahead}, or train it with more"
            )
        if member.hidden_size not in (None, self.hidden_size):
            raise ConfigError(
                f"member {label} needs hidden states of {member.hidden_size} values and there are"
                f" {self.hidden_size or 'none'}: combine predictors of one trace"
            )
        if member.vocab_size < self.vocab_size:
            raise ConfigError(
                f"member {label} knows {member.vocab_size} token ids and the ensemble {self.vocab_size}:"
                " combine predictors of one tokenizer"
            )
        if member.quantization is not None:
            raise ConfigError(f"member {label} is packed: combine checkpoints as trained, then quantise")
        if member.bidirectional and not self.bidirectional:
            raise ConfigError(f"member {label} looks at later tokens, which this stack does not know yet")

    def train(self, mode: bool = True) -> Ensemble:
        """Members stay as they were trained, without dropout, whatever the mode."""
        super().train(mode)
        self.members.eval()
        return self

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Refuse to be trained."""
        raise ConfigError("an ensemble is not trained: train its members, then combine their checkpoints")

    # ------------------------------------------------------------------ forecasts

    def forward(self, batch: RoutingBatch) -> Tensor:
        return self.combined(self.member_probabilities(batch), self.kinds)

    def step_logits(self, batch: RoutingBatch, layer: int) -> Tensor:
        """The logits of each sequence's last token from one layer, ``[B, H, E]``: each member's own step,
        combined."""
        steps = (
            one.step_probabilities(batch, layer)[:, None, : self.lookahead].float() for one in self._each()
        )
        return self.combined(steps, self.kinds[layer + 1 : layer + 2])[:, 0]

    def _each(self) -> Iterator[Predictor]:
        for one in self.members:
            assert isinstance(one, Predictor)
            yield one

    def member_probabilities(self, batch: RoutingBatch) -> Iterator[Tensor]:
        """Each member's calibrated probabilities in turn: float32 ``[B, T, P, H, E]``."""
        for one in self._each():
            yield one.probabilities(batch)[..., : self.lookahead, :].float()

    def combined(self, members: Iterable[Tensor], kinds_PH: Tensor) -> Tensor:
        """Logits of what the members say together.

        Shapes:
            members: M tensors ``[..., P, H, E]`` of probabilities.
            kinds_PH: which kind of target each place is.
            output: ``[..., P, H, E]``.
        """
        weight_PHM = self.weights_at(kinds_PH)
        mean_E, votes_E, M = torch.zeros(()), torch.zeros(()), len(self.members)
        for i, p_E in enumerate(members):
            mean_E = mean_E.to(p_E) + weight_PHM[..., i, None] * p_E
            if self.combine == "majority":
                votes_E = votes_E.to(p_E) + chosen(p_E, self.top_k)
            elif self.combine == "borda":
                votes_E = votes_E.to(p_E) + points(p_E)
        if self.combine == "majority":
            return self._link((votes_E + mean_E) / (M + 1))
        if self.combine == "borda":
            whole = M * (self.experts - 1) + 1.5
            middle = max(M * (self.experts - self.top_k - 0.5) + 0.5, 0.5) / whole
            threshold = 0.0 if self.top_k == 1 else float(torch.logit(torch.tensor(middle)))
            return torch.logit((votes_E + 0.5 + mean_E / 2) / whole) - threshold
        return self._link(mean_E)

    def weights_at(self, kinds_PH: Tensor) -> Tensor:
        """Weights of the members at each place, ``[P, H, M]``."""
        horizon_H = torch.arange(kinds_PH.shape[1], device=kinds_PH.device)
        return self.weight_QHM[kinds_PH.clamp(min=0), horizon_H]

    def _link(self, p_E: Tensor) -> Tensor:
        """Logits whose softmax (K = 1) or sigmoid (K > 1) is ``p_E``, finite."""
        ln_E = p_E.clamp(min=1e-12).log()
        return ln_E if self.top_k == 1 else ln_E - torch.log1p(-p_E.clamp(max=1 - 1e-7))

    # ------------------------------------------------------------------ uncertainty

    @torch.no_grad()
    def uncertainty(self, batch: RoutingBatch) -> dict[str, Tensor]:
        """Total, aleatoric and epistemic uncertainty of each forecast in nats, total = aleatoric + epistemic
        (see :mod:`specgate.metrics.uncertainty`): of the members' averaged forecast, whatever ``combine``.

        Shapes:
            output: each ``[B, T, P, H]``.
        """
        weight_PHM = self.weights_at(self.kinds)
        mean_BTPHE, aleatoric_BTPH = torch.zeros(()), torch.zeros(())
        for i, p_BTPHE in enumerate(self.member_probabilities(batch)):
            weight_PH = weight_PHM[..., i]
            mean_BTPHE = mean_BTPHE.to(p_BTPHE) + weight_PH[..., None] * p_BTPHE
            inner_BTPH = forecast_entropy(p_BTPHE, self.top_k)
            aleatoric_BTPH = aleatoric_BTPH.to(p_BTPHE) + weight_PH * inner_BTPH
        return parts_of(forecast_entropy(mean_BTPHE.clamp(max=1), self.top_k), aleatoric_BTPH)

    def report(self) -> dict[str, Any]:
        """The members and their weights per kind of target and horizon."""
        weights = {kind: self.weight_QHM[q].tolist() for q, kind in KINDS.items()}
        return {"members": self.labels, "combine": self.combine, "weights": weights}


def chosen(p_E: Tensor, top_k: int) -> Tensor:
    """1 for the ``top_k`` most probable experts, else 0: ``[..., E]``."""
    return torch.zeros_like(p_E).scatter_(-1, p_E.topk(top_k, dim=-1).indices, 1.0)


def points(p_E: Tensor) -> Tensor:
    """Borda points: E - 1 for the most probable expert, 0 for the least: ``[..., E]``."""
    least_first_E = p_E.argsort(dim=-1)
    given_E = torch.arange(p_E.shape[-1], device=p_E.device, dtype=p_E.dtype).expand_as(p_E)
    return torch.empty_like(p_E).scatter_(-1, least_first_E, given_E)


def _built(hparams: Mapping[str, Any]) -> Predictor:
    """A member as its hyperparameters describe it, its state still to be loaded."""
    return predictor_class(str(hparams["predictor"]))(**hparams)
