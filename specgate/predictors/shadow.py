"""The host's next layers themselves, at reduced precision, on today's hidden state: an upper reference.

Letters: B sequences, T tokens, L MoE layers, P = L + 1 source points, H horizons, E experts per layer, K
experts per token, D hidden size.

From point p the experts of layer p - 1 run as they were routed, then attention, router and experts of the
next layers, on all tokens of the window, down to the layer that is asked for. With weights as they are and
all K experts that *is* the host, and the forecast is right up to the fp16 of the recorded states; with int4
weights, fewer experts or none it says how much of the host a forecast needs. It costs as much as the layers
that it foresees, so it is no prefetcher.

What it sees: in prefill the window (from position 0: everything); while decoding earlier tokens of the
window as they were and its context, not what lies before it. A Switch decoder's cross-attention is left out:
its encoder is not in the trace. The next token's layers, for which there is no state, are the token table's,
as in ``router_lookahead``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from specgate.errors import ConfigError, NotApplicableError
from specgate.predictors.router_lookahead import RouterLookahead
from specgate.predictors.shadow_host import ShadowHost
from specgate.traces.batch import RoutingBatch

if TYPE_CHECKING:
    from specgate.traces.datamodule import RoutingDataModule

EXPERTS = ("all", "one", "none")


class Shadow(RouterLookahead):
    """The ``shadow`` predictor. Nothing is trained: one pass counts the token table.

    Args:
        bits: of the weights of attention and experts: 16 (as they are), 8 or 4 (groups of 32).
        experts: which of the K experts run: ``all``, ``one`` (the heaviest) or ``none``.
        host: bundled name, directory or hub name of the model; None: what the trace says it was collected
        from. anatomy, shapes: of the host; found by :meth:`resolve`, kept in the checkpoint.
        tensors: the host's weights; kept in the checkpoint, so loading one needs no host.

    Shapes:
        forward: ``RoutingBatch`` with ``hidden_BTLD`` -> logits ``[B, T, P, H, E]``.

    Raises:
        ConfigError: for other bits or experts, or a host that does not fit the stack.
    """

    name: ClassVar[str] = "shadow"

    def __init__(
        self,
        *,
        bits: int = 4,
        experts_run: str = "all",
        host: str | None = None,
        anatomy: dict[str, Any] | None = None,
        shapes: dict[str, list[int]] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if bits not in (16, 8, 4):
            raise ConfigError(f"bits={bits} is no precision of the shadow: choose 16, 8 or 4")
        if experts_run not in EXPERTS:
            raise ConfigError(f"experts_run={experts_run!r} is unknown: choose one of {', '.join(EXPERTS)}")
        if anatomy is None or shapes is None:
            raise ConfigError("the shadow has no host: build it with train.py, which finds the trace's own")
        if shapes["router"] != [self.layers, self.experts, self.hidden_size]:
            raise ConfigError(
                f"the host's routers are {shapes['router']}, the stack's {[self.layers, self.experts]}"
                f" on {self.hidden_size} values: name the host that was traced with model.host="
            )
        self.shadow = ShadowHost(
            anatomy,
            shapes,
            tensors,
            bits=bits,
            experts=experts_run,
            bidirectional=self.bidirectional,
            capacity=self.phase == "prefill",
        )

    @classmethod
    def resolve(cls, values: dict[str, Any], data: RoutingDataModule) -> dict[str, Any]:
        """Adds the host's layers: of the model that ``host`` names, or else of the one that was traced.

        Raises:
            CheckpointError: if the model cannot be found. UnknownArchitectureError: if its layers cannot be
            run.
        """
        from specgate.moe.anatomy import anatomy
        from specgate.moe.hosts import load_host

        if data.spec.hidden_size is None:
            raise NotApplicableError("shadow needs hidden states to start from: collect with hidden=fp16")
        model_id = values.get("host") or data.readers[0].header.model_id
        plain, tensors = anatomy(load_host(model_id, dtype="float32", device="cpu").model, data.stack)
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        return {**values, "anatomy": plain, "shapes": shapes, "tensors": tensors}

    def forward(self, batch: RoutingBatch) -> Tensor:
        self.check_batch(batch)
        logits_BTPHE = self.table(batch).clone()
        assert batch.hidden_BTLD is not None
        host, place = self.shadow, self.shadow.place(batch.positions_BT, batch.valid_BT)
        before = self.entering(batch) if self.phase == "decode" else None
        for p in range(self.layers):
            if p == 0:
                x_BTD = host.embed(batch.token_ids_BT)
            else:
                x_BTD = self.after_experts(batch, p - 1)
            for h0 in range(min(self.lookahead, self.layers - p)):
                layer = p + h0
                if h0:
                    x_BTD = host.add_experts(x_BTD, layer - 1)
                x_BTD = host.add_attention(x_BTD, layer, place, None if before is None else before[layer])
                logits_BTPHE[:, :, p, h0] = self.asked(x_BTD, layer)
        return logits_BTPHE

    def table(self, batch: RoutingBatch) -> Tensor:
        """The token table's logits, ``[B, T, P, H, E]``."""
        return super(RouterLookahead, self).forward(batch)

    def asked(self, x_BTD: Tensor, layer: int) -> Tensor:
        """What the layer's router says of a stream: ``[B, T, E]``."""
        return self.host.scores_at(x_BTD.flatten(0, 1)[:, None], layer).view(*x_BTD.shape[:2], -1)

    def after_experts(self, batch: RoutingBatch, layer: int) -> Tensor:
        """The recorded stream of a layer with what its experts added, as they were routed: ``[B, T, D]``."""
        assert batch.hidden_BTLD is not None
        dropped = None if batch.dropped_BTL is None else batch.dropped_BTL[:, :, layer]
        routed = (batch.experts_BTLK[:, :, layer], batch.weights_BTLK[:, :, layer], dropped)
        return self.shadow.add_experts(batch.hidden_BTLD[:, :, layer].float(), layer, routed)

    def entering(self, batch: RoutingBatch) -> list[Tensor]:
        """What entered each layer's attention at every token: L of ``[B, T, D]``."""
        after = [self.after_experts(batch, layer) for layer in range(self.layers - 1)]
        return [self.shadow.embed(batch.token_ids_BT), *after]

    def flops_per_token_layer(self, context: int) -> float | None:
        """Of the layers that run, with the experts that are used (:meth:`ShadowHost.run_experts` computes all
        and weighs the others 0)."""
        sizes = {name: list(value.shape) for name, value in self.shadow.named_buffers()}
        D, A, C = sizes["query"][2], sizes["query"][1], sizes["key"][1]
        used = {"all": self.top_k, "one": 1, "none": 0}[self.shadow.experts]
        expert = 2 * (sizes["up"][2] * D + sizes["down"][2] * sizes["down"][3])
        router = 2 * D * self.experts
        attention = 2 * D * (2 * A + 2 * C) + 2 * 2 * A * context
        asked = sum(min(self.lookahead, self.layers - p) for p in range(self.layers))
        onward = asked - self.layers  # steps after the first, which starts from recorded or no routing
        total = asked * (attention + router) + (onward + self.layers - 1) * used * expert
        total += onward * router if used else 0
        if self.phase == "decode":  # the earlier tokens' experts, keys and values
            total += (self.layers - 1) * used * expert + asked * 2 * D * 2 * C
        return total / self.layers
