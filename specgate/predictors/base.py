"""The predictor contract: a LightningModule from what a host has routed so far to logits over experts of
later layers.

Letters: B sequences, T tokens, L MoE layers, P = L + 1 source points, H horizons, E experts per layer, K
experts per token. Point p = 0 is "before the first MoE layer", p = l + 1 is "layer l's router input exists".
Column h0 of H is horizon h0 + 1.

Entry (t, p, h) of the logits uses only what is known at (t, p):

* decode: everything of tokens before t; of token t its id and the layers up to l = p - 1;
* prefill (the stack runs layer by layer over all tokens): the ids of all tokens, and the layers up to l of
tokens up to t; of all tokens if the stack is bidirectional (an encoder), where later tokens matter too.

Link: K = 1 -> softmax over experts; K > 1 -> independent sigmoids, logit 0 being the threshold of membership.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from specgate.errors import ConfigError, NotApplicableError, SpecgateError, TraceError
from specgate.forecast import Forecast
from specgate.predictors.schedule import WarmupCosine, adamw
from specgate.traces.batch import (
    INVALID,
    WITHIN,
    RoutingBatch,
    batch_chunks,
    kind_PH,
    last_valid_B,
    targets,
)

if TYPE_CHECKING:
    from specgate.traces.datamodule import RoutingDataModule


class LinkCalibrator(nn.Module):
    """The calibrator of a predictor that was not calibrated yet: softmax (K = 1) or sigmoid (K > 1) of the
    raw logits."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k

    def forward(self, logits_BTPHE: Tensor, kind_PH: Tensor) -> Tensor:
        """Probabilities of the same shape as the logits; ``kind_PH`` is not needed here."""
        return logits_BTPHE.softmax(-1) if self.top_k == 1 else logits_BTPHE.sigmoid()


class Predictor(L.LightningModule):
    """Base of every predictor. A subclass sets ``name`` and implements :meth:`forward`.

    Args:
        layers, experts, top_k, vocab_size, phase, hidden_size, bidirectional: the fields of ``StackSpec``
            (plain values, because a checkpoint has to load with ``weights_only=True``).
        lookahead: number of horizons H.
        lr: peak learning rate of AdamW. weight_decay: applied to matrices only.
        warmup: fraction of all steps with rising learning rate; then it follows half a cosine down to 2 % of
        the peak. max_logits: above this many logits the loss works through the batch in chunks, recomputing
        them backwards. predictor: the registry name, as stored in a checkpoint; must be the class's own.

    Shapes:
        forward: ``RoutingBatch`` -> logits ``[B, T, P, H, E]``.

    Raises:
        ConfigError: for a phase, lookahead or name that makes no sense.
    """

    name: ClassVar[str] = ""
    learned: ClassVar[bool] = True
    trains: ClassVar[bool] = True  # False: nothing is fitted on the train split, train.py goes on at once
    needs_hidden: ClassVar[bool] = False
    uses_routers: ClassVar[bool] = False
    kinds: Tensor
    #: ``{"bits": 8 or 4, "group": ...}`` once the weights are packed (``specgate.predictors.quantize``).
    quantization: dict[str, int] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A class with a forward of its own does not inherit another one's shortcut."""
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__ and "step_logits" not in cls.__dict__:
            cls.step_logits = Predictor.step_logits  # type: ignore[method-assign]

    def __init__(
        self,
        *,
        layers: int,
        experts: int,
        top_k: int,
        vocab_size: int,
        phase: str,
        hidden_size: int | None = None,
        bidirectional: bool = False,
        lookahead: int = 3,
        lr: float = 4e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        max_logits: int = 40_000_000,
        predictor: str | None = None,
    ) -> None:
        super().__init__()
        if predictor not in (None, self.name):
            raise ConfigError(
                f"a checkpoint of {predictor!r} is not a {self.name!r}: load it with load_predictor"
            )
        if phase not in ("prefill", "decode"):
            raise ConfigError(f"phase {phase!r} is neither 'prefill' nor 'decode'")
        if lookahead < 1 or lookahead > 2 * layers:
            raise ConfigError(
                f"lookahead {lookahead} is outside 1..{2 * layers} for a stack of {layers} MoE layers"
            )
        if bidirectional and phase != "prefill":
            raise ConfigError(f"a bidirectional stack is read whole: phase={phase} needs a causal one")
        if self.needs_hidden and hidden_size is None:
            raise NotApplicableError(
                f"{self.name} needs hidden states: collect with hidden=fp16, or choose an id-only predictor"
            )
        self.save_hyperparameters(ignore=["routers", "tensors"])
        self.hparams["predictor"] = self.name
        self.layers, self.experts, self.top_k = layers, experts, top_k
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.phase, self.lookahead, self.bidirectional = phase, lookahead, bidirectional
        self.max_logits = max_logits
        self.calibrator: nn.Module = LinkCalibrator(top_k)
        self.register_buffer("kinds", kind_PH(layers, lookahead, phase), persistent=False)

    # ------------------------------------------------------------------ asked by train.py

    @classmethod
    def resolve(cls, values: dict[str, Any], data: RoutingDataModule) -> dict[str, Any]:
        """The keyword arguments that a configuration's plain ``values`` mean; more than themselves if a
        subclass is built from files that they name (checkpoints, a host model)."""
        return values

    def fit_on_validation(
        self, batches: Iterable[RoutingBatch], device: torch.device | str | None = None
    ) -> list[dict[str, Any]]:
        """Fit what must not see the train split, before calibration; returns rows for metrics.json."""
        return []

    def report(self) -> dict[str, Any]:
        """What it says of itself beyond scores, plain JSON values: ``predictor_report`` of metrics.json."""
        return {}

    # ------------------------------------------------------------------ forecasts

    def forward(self, batch: RoutingBatch) -> Tensor:
        """Logits ``[B, T, P, H, E]``; subclasses implement it."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def probabilities(self, batch: RoutingBatch) -> Tensor:
        """Calibrated probabilities ``[B, T, P, H, E]`` that an expert is used at each target."""
        return self.calibrator(self(batch), self.kinds)

    def step_logits(self, batch: RoutingBatch, layer: int) -> Tensor:
        """What a loader calls at run time: the logits of each sequence's last token from one layer,
        ``[B, H, E]``, equal to :meth:`forward`'s there.

        Picked out of the whole window's; override it where one point of one token costs less.

        Args:
            layer: the last MoE layer whose router input exists, -1 before the first.
        """
        last_B = last_valid_B(batch.valid_BT)
        return self(batch)[torch.arange(last_B.shape[0], device=last_B.device), last_B, layer + 1]

    def step_probabilities(self, batch: RoutingBatch, layer: int) -> Tensor:
        """Calibrated :meth:`step_logits`, ``[B, H, E]``; a calibrator may differ from point to point."""
        logits_B1HE = self.step_logits(batch, layer)[:, None]
        if not getattr(self.calibrator, "by_point", False):
            return self.calibrator(logits_B1HE, self.kinds[layer + 1 : layer + 2])[:, 0]
        logits_BPHE = logits_B1HE.expand(-1, self.layers + 1, -1, -1)
        return self.calibrator(logits_BPHE, self.kinds)[:, layer + 1]

    def flops_per_token_layer(self, context: int) -> float | None:
        """Operations (a multiply-add is two) of :meth:`forward` per token and layer of a ``context``-token
        window.

        None: as counted while it runs. For predictors that compute more than they need (all of their
            experts).
        """
        return None

    @torch.no_grad()
    def predict_next_experts(self, state: RoutingBatch, layer: int | None = None) -> Forecast:
        """Foresee N+1..N+H at once from the newest known point: the last token of ``state``, its layers up to
        ``layer``.

        Args:
            state: what has been routed so far. What it holds of the last token beyond ``layer`` is not looked
                at. Several sequences are merged into "any of them needs the expert".
            layer: the last MoE layer whose router input exists, -1 before the first; default, while decoding,
                the last layer of the stack (the token is done).

        Shapes:
            output: a Forecast of up to H rows, nearest first (rows beyond what the phase allows are left
                out).

        Raises:
            SpecgateError: if nothing can be foreseen from there.
        """
        if layer is None:
            if self.phase == "prefill":
                raise SpecgateError(
                    "in prefill every layer is routed before the next: say layer=, the last layer known"
                )
            layer = self.layers - 1
        self._check_layer("layer", layer, lowest=-1)
        rows = (self.kinds[layer + 1] != INVALID).nonzero().flatten()
        if len(rows) == 0:
            raise SpecgateError(
                f"layer {layer} is the last of {self.layers} and prefill ends there: nothing to foresee"
            )
        return self._forecast(state, layer, rows)

    @torch.no_grad()
    def predict_experts_at_layer(
        self, current_layer: int, target_layer: int, context_history: RoutingBatch
    ) -> Forecast:
        """Foresee one layer from another; while decoding, a target before ``current_layer`` is the next
        token's.

        Args:
            current_layer: the last MoE layer whose router input exists for the last token, -1 before the
            first. target_layer: the MoE layer to foresee.
            context_history: what has been routed so far; the last token is the current one.

        Shapes:
            output: a Forecast of one row.

        Raises:
            SpecgateError: if the target cannot be foreseen: the current layer itself, a layer that prefill
                has passed, or one further ahead than the predictor was trained for.
        """
        self._check_layer("current_layer", current_layer, lowest=-1)
        self._check_layer("target_layer", target_layer, lowest=0)
        if target_layer == current_layer:
            raise SpecgateError(f"layer {target_layer} is being routed now: choose a later target_layer")
        ahead = target_layer - current_layer
        if ahead < 0:
            if self.phase == "prefill":
                raise SpecgateError(
                    f"layer {target_layer} lies before layer {current_layer} and prefill does not come back"
                    " to it: choose a later target_layer"
                )
            ahead += self.layers
        if ahead > self.lookahead:
            raise SpecgateError(
                f"layer {target_layer} is {ahead} ahead of layer {current_layer}, the predictor foresees"
                f" {self.lookahead}: train with lookahead={ahead}"
            )
        return self._forecast(context_history, current_layer, torch.tensor([ahead - 1]))

    def _check_layer(self, what: str, layer: int, lowest: int) -> None:
        if not lowest <= layer < self.layers:
            raise SpecgateError(
                f"{what} {layer} is outside {lowest}..{self.layers - 1}, the stack's MoE layers"
            )

    def _forecast(self, state: RoutingBatch, layer: int, rows: Tensor) -> Forecast:
        """The Forecast of horizon rows ``rows`` from ``layer`` at each sequence's last valid token,
        merged."""
        self.check_batch(state)
        if not bool(state.valid_BT.any(1).all()):
            raise SpecgateError("the state holds no token yet: pass at least the current token's id")
        was_training = self.training
        self.eval()
        p_BHE = self.step_probabilities(state, layer)
        self.train(was_training)
        rows = rows.to(p_BHE.device)
        p_BHE = p_BHE[:, rows]
        column_H = layer + 1 + rows
        columns = (column_H % self.layers, column_H >= self.layers, rows + 1)
        return Forecast.merge([Forecast(p_HE, *columns, source_layer=layer) for p_HE in p_BHE])

    def check_batch(self, batch: RoutingBatch) -> None:
        """Refuse a batch of another stack or phase.

        Raises:
            TraceError: naming what differs.
        """
        L_, K = batch.experts_BTLK.shape[2:]
        if (L_, K, batch.phase) != (self.layers, self.top_k, self.phase):
            raise TraceError(
                f"the trace has L={L_} K={K} phase={batch.phase}, the predictor was made for L={self.layers}"
                f" K={self.top_k} phase={self.phase}: choose the trace that it was trained on"
            )
        if self.hidden_size is not None and batch.hidden_BTLD is None:
            raise TraceError(
                f"{self.name} was made for hidden states of {self.hidden_size} values and the trace has none:"
                " train with data.use_hidden=false"
            )

    # ------------------------------------------------------------------ loss and metrics

    def loss(self, logits_BTPHE: Tensor, experts_BTPHK: Tensor, valid_BTPH: Tensor) -> Tensor:
        """Summed loss of the valid cells: cross entropy (K = 1) or binary cross entropy summed over experts
        (K > 1).

        Both are proper scoring rules and carry no class weights: up-weighting the K used experts of E would
        raise every probability and spoil the calibration; ranking does not need it.
        """
        logits_BTPHE = logits_BTPHE.float()  # masked, not indexed: a GPU would have to wait for the count
        used_BTPH = logits_BTPHE.gather(-1, experts_BTPHK).sum(-1)
        if self.top_k == 1:
            all_BTPH = logits_BTPHE.logsumexp(-1)
        else:
            all_BTPH = F.softplus(logits_BTPHE).sum(-1)
        return torch.where(valid_BTPH, all_BTPH - used_BTPH, 0.0).sum()

    def hits(self, logits_BTPHE: Tensor, experts_BTPHK: Tensor) -> Tensor:
        """How many of the K experts used are among the K largest logits: ``[B, T, P, H]`` int64."""
        used = torch.zeros_like(logits_BTPHE, dtype=torch.bool).scatter_(-1, experts_BTPHK, True)
        return used.gather(-1, logits_BTPHE.topk(self.top_k, dim=-1).indices).sum(-1)

    def _chunks(self, batch: RoutingBatch) -> list[RoutingBatch]:
        """The batch, cut along B so that no chunk has more than ``max_logits`` logits (but at least one
        sequence)."""
        per_sequence = batch.valid_BT.shape[1] * (self.layers + 1) * self.lookahead * self.experts
        return batch_chunks(batch, max(1, self.max_logits // per_sequence))

    def training_loss(self, batch: RoutingBatch) -> Tensor:
        """What training minimises, summed over the batch's valid cells; :meth:`loss` unless a subclass adds
        to it."""
        return self.loss(self(batch), *targets(batch, self.lookahead))

    def training_step(self, batch: RoutingBatch, batch_idx: int) -> Tensor | None:
        """Mean loss over the valid cells of the batch; None when the batch has none (on a GPU 0, since asking
        would make the host wait for it)."""
        if batch_idx == 0:
            self.check_batch(batch)
        cells = targets(batch, self.lookahead)[1].sum()
        if cells.device.type == "cpu" and cells == 0:
            return None
        chunks = self._chunks(batch)
        if len(chunks) == 1:
            total = self.training_loss(batch)
        else:
            parts = [checkpoint(self.training_loss, chunk, use_reentrant=False) for chunk in chunks]
            total = torch.stack([part for part in parts if isinstance(part, Tensor)]).sum()
        loss = total / cells.clamp(min=1)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    @torch.no_grad()
    def validation_step(self, batch: RoutingBatch, batch_idx: int) -> None:
        """Log ``val/loss``, ``val/recall`` (all valid cells) and ``val/recall_n<h>`` (targets within the
        token)."""
        if batch_idx == 0:
            self.check_batch(batch)
        within_PH = self.kinds == WITHIN
        for chunk in self._chunks(batch):
            experts_BTPHK, valid_BTPH = targets(chunk, self.lookahead)
            if not valid_BTPH.any():
                continue
            logits_BTPHE = self(chunk).float()
            found_BTPH = self.hits(logits_BTPHE, experts_BTPHK) / self.top_k
            cells = int(valid_BTPH.sum())
            loss = self.loss(logits_BTPHE, experts_BTPHK, valid_BTPH) / cells
            self._log_mean("val/loss", loss, cells)
            self._log_mean("val/recall", found_BTPH[valid_BTPH].mean(), cells, prog_bar=True)
            for h0 in range(self.lookahead):
                scored_BTP = valid_BTPH[..., h0] & within_PH[:, h0]
                if n := int(scored_BTP.sum()):
                    self._log_mean(f"val/recall_n{h0 + 1}", found_BTPH[..., h0][scored_BTP].mean(), n)

    def _log_mean(self, key: str, value: Tensor, weight: int, prog_bar: bool = False) -> None:
        self.log(
            key, value, batch_size=weight, on_step=False, on_epoch=True, sync_dist=True, prog_bar=prog_bar
        )

    # ------------------------------------------------------------------ optimisation

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW and warm-up + cosine over all steps of the run (constant after warm-up if their number is
        unknown)."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        decayed = [p for p in parameters if p.dim() > 1]
        plain = [p for p in parameters if p.dim() <= 1]
        groups = [
            {"params": decayed, "weight_decay": self.hparams["weight_decay"]},
            {"params": plain, "weight_decay": 0.0},
        ]
        optimizer = adamw([g for g in groups if g["params"]], lr=self.hparams["lr"], betas=(0.9, 0.99))
        steps = self.trainer.estimated_stepping_batches
        schedule = WarmupCosine(float(steps), self.hparams["warmup"])
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
