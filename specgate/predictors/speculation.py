"""What the speculation kernel needs of a predictor, as plain tensors and numbers; and the same computation in
torch.

Letters: B sequences, T tokens, L MoE layers, P = L + 1 source points, H horizons, E experts per layer, K
experts per token, D hidden size, F features, W units, V ids, R rows of the id table, C its columns.

The kernel (``specgate.runtime.speculate``) runs ``router_lookahead``, ``router_residual`` and ``mlp``, while
decoding (``router_lookahead`` in prefill too), calibrated by nothing, by temperature or by vector scaling.
Matrices are handed over row by row over their inputs and their rows are padded to a multiple of 8, so that
16-byte loads are aligned.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specgate.errors import ConfigError
from specgate.forecast import Forecast
from specgate.predictors.base import LinkCalibrator, Predictor
from specgate.predictors.features import MEANS, SLOW, TOKEN_GAIN
from specgate.predictors.host_routers import HostRouters
from specgate.predictors.layers import PointAttention
from specgate.predictors.mlp import ENTRY_GAIN, MLP
from specgate.predictors.router_lookahead import RouterLookahead
from specgate.predictors.router_residual import RouterResidual
from specgate.traces.batch import INVALID, RoutingBatch

RUNNABLE: tuple[type[Predictor], ...] = (RouterLookahead, RouterResidual, MLP)
"""Classes whose step the kernel computes; a subclass may compute something else and is refused."""


@dataclass(frozen=True)
class SpeculationParts:
    """A predictor and its calibrator without their classes: what ``specgate.runtime.speculate.Speculator``
    takes.

    Attributes:
        sizes: see ``SpeculationSizes`` in ``runtime/csrc/speculate.h``.
        tensors: see ``SpeculationWeights`` there; the state and the threshold are the Speculator's own.
    """

    sizes: dict[str, int | float] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def speculation_parts(
    predictor: Predictor, calibrator: nn.Module | None = None, *, dtype: torch.dtype = torch.float32
) -> SpeculationParts:
    """The parts of a predictor, on its device, detached from it (a change of the predictor does not reach
    them).

    Args:
        calibrator: default: the predictor's own.
        dtype: of the matrices and the id table: float32 gives the predictor's probabilities, bfloat16 halves
            what a launch has to read.

    Raises:
        ConfigError: if the kernel does not run this predictor or calibrator, or a weight is not finite.
    """
    if type(predictor) not in RUNNABLE:
        names = ", ".join(cls.name for cls in RUNNABLE)
        raise ConfigError(
            f"the speculation kernel does not run {predictor.name or type(predictor).__name__!r}: choose one"
            f" of {names}"
        )
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(
            f"speculation with weights in {dtype} is unknown: choose torch.float32 or torch.bfloat16"
        )
    if predictor.phase != "decode" and isinstance(predictor, MLP):
        raise ConfigError(
            f"{predictor.name} was trained for phase={predictor.phase} and the speculation kernel runs while"
            " decoding: train it on a decode trace, or with data.train_on_prefill=true"
        )
    parts = SpeculationParts()
    parts.sizes.update(
        layers=predictor.layers,
        experts=predictor.experts,
        top_k=predictor.top_k,
        horizons=predictor.lookahead,
        vocab=predictor.vocab_size,
        hidden=predictor.hidden_size or 0,
        wraps=int(predictor.phase == "decode"),
        softmax=int(predictor.top_k == 1),
        bf16=int(dtype == torch.bfloat16),
    )
    _add_calibrator(parts, predictor, predictor.calibrator if calibrator is None else calibrator)
    if isinstance(predictor, MLP):
        _add_mlp(parts, predictor, dtype)
    host = getattr(predictor, "host", None)
    if isinstance(host, HostRouters):
        _add_routers(parts, predictor, host, dtype)
    if isinstance(predictor, RouterLookahead):
        _add_token_table(parts, predictor, dtype)
    for name, tensor in parts.tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ConfigError(
                f"{predictor.name} has weights that are not finite ({name}): it diverged in training, choose"
                " another checkpoint"
            )
        parts.tensors[name] = tensor.detach().clone().contiguous()
    return parts


def _add_calibrator(parts: SpeculationParts, predictor: Predictor, calibrator: nn.Module) -> None:
    """``link(logits * scale + offset)``: scale and offset by source point and horizon, or by expert too."""
    kind_PH = predictor.kinds.clamp(min=0)
    P, H = kind_PH.shape
    horizon_H = torch.arange(H, device=kind_PH.device)
    buffers = dict(calibrator.named_buffers())
    if isinstance(calibrator, LinkCalibrator):
        scale = torch.ones(P, H, 1, device=kind_PH.device)
        offset = torch.zeros_like(scale)
    elif "log_temperature_QH" in buffers:
        scale = (-buffers["log_temperature_QH"][kind_PH, horizon_H]).exp()[..., None]
        offset = buffers["offset_QH"][kind_PH, horizon_H][..., None]
        if predictor.top_k == 1:
            offset = torch.zeros_like(offset)
    elif "log_scale_PHE" in buffers:
        scale, offset = (-buffers["log_scale_PHE"]).exp(), buffers["expert_offset_PHE"]
    else:
        name = getattr(calibrator, "name", type(calibrator).__name__)
        raise ConfigError(
            f"the speculation kernel does not calibrate by {name!r}: train with calibration=temperature or"
            " calibration=vector"
        )
    generator = torch.Generator().manual_seed(0)
    logits_PHE = (4 * torch.randn(P, H, predictor.experts, generator=generator)).to(kind_PH.device)
    z_PHE = logits_PHE * scale + offset
    found_PHE = z_PHE.softmax(-1) if predictor.top_k == 1 else z_PHE.sigmoid()
    if not torch.allclose(calibrator(logits_PHE[None, None], predictor.kinds)[0, 0], found_PHE, atol=1e-5):
        raise ConfigError(
            f"{type(calibrator).__name__} is no scale and offset of the logits, which is all that the"
            " speculation kernel does: train with calibration=temperature or calibration=vector"
        )
    parts.sizes["scale_experts"] = scale.shape[-1]
    parts.tensors.update(scale=scale.float(), offset=offset.float())


def _padded(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Columns up to a multiple of 8."""
    return F.pad(matrix.float(), (0, -matrix.shape[-1] % 8)).to(dtype)


def _add_routers(
    parts: SpeculationParts, predictor: Predictor, host: HostRouters, dtype: torch.dtype
) -> None:
    parts.sizes.update(routers=1, router_eps=host.eps)
    trust_PH = getattr(
        predictor, "trust_PH", torch.ones(predictor.kinds.shape, device=host.weight_LED.device)
    )
    parts.tensors.update(
        router=_padded(host.weight_LED.mT, dtype),
        router_bias=host.bias_LE,
        correction=host.correction_LE,
        corrected=host.corrected_L.to(torch.uint8),
        trust=trust_PH.float(),
    )


def _add_token_table(parts: SpeculationParts, predictor: RouterLookahead, dtype: torch.dtype) -> None:
    """The logits of every row at the columns that are asked for, and a last row for ids without one."""
    L, H, rows = predictor.layers, predictor.lookahead, int(predictor.row_V.max()) + 1
    asked = sorted({*range(min(H, predictor.width)), *range(L, predictor.width)})
    prior_CE = predictor.prior_LE()[[column % L for column in asked]]
    counts_RCE = F.pad(predictor.counts_RCE[:rows][:, asked], (0, 0, 0, 0, 0, 1))
    seen_RC1 = F.pad(predictor.seen_RC[:rows][:, asked], (0, 0, 0, 1))[..., None]
    p_RCE = (counts_RCE + predictor.smoothing * prior_CE) / (seen_RC1 + predictor.smoothing)
    column_X = torch.full((2 * L,), -1, dtype=torch.int32)
    column_X[asked] = torch.arange(len(asked), dtype=torch.int32)
    parts.sizes.update(table_rows=rows + 1, table_columns=len(asked))
    parts.tensors.update(
        table=predictor.link(p_RCE).to(dtype),
        row=predictor.row_V.to(torch.int32),
        column=column_X.to(predictor.row_V.device),
    )


def _add_mlp(parts: SpeculationParts, predictor: MLP, dtype: torch.dtype) -> None:
    features, head = predictor.features, predictor.head
    L, H, E = predictor.layers, predictor.lookahead, predictor.experts
    attention = features.attention
    parts.sizes.update(
        width=head.first.weight.shape[-1],
        depth=1 + len(head.more),
        token_dim=features.token_VF.embedding_dim,
        state_dim=features.expert_LEF.shape[-1],
        decays=len(features.decays),
        heads=attention.heads if attention else 0,
        head_width=attention.width if attention else 0,
        table_rows=predictor.vocab_size,
        table_columns=H,
        unit_eps=1e-6,
        slow=SLOW,
        mean_0=MEANS[0],
        mean_1=MEANS[1],
    )
    column_X = torch.full((2 * L,), -1, dtype=torch.int32)
    column_X[:H] = torch.arange(H, dtype=torch.int32)
    parts.tensors.update(
        first=_padded(head.first.weight, dtype),
        first_bias=head.first.bias_P1,
        gate=head.gate.weight,
        gate_bias=head.gate.bias_P1,
        last=_padded(head.last.weight, dtype),
        last_bias=head.last.bias_P1,
        token=features.token_VF.weight * TOKEN_GAIN,
        expert=features.expert_LEF,
        start=features.start_VF.weight,
        table=(predictor.entry_VF.weight * ENTRY_GAIN).view(-1, H, E).to(dtype),
        column=column_X.to(features.decay_C.device),
    )
    if features.decays:
        parts.tensors["decay"] = features.decay_C
    if head.more:
        parts.tensors["more"] = torch.stack([_padded(layer.weight, dtype) for layer in head.more])  # type: ignore[arg-type]
        parts.tensors["more_bias"] = torch.stack([layer.bias_P1 for layer in head.more])  # type: ignore[misc]
    if attention is not None:
        _add_attention(parts, attention, dtype)


def _add_attention(parts: SpeculationParts, attention: PointAttention, dtype: torch.dtype) -> None:
    parts.tensors.update(
        attend=_padded(attention.query_key_value.weight, dtype),
        attend_bias=attention.query_key_value.bias_P1,
        penalty=F.softplus(attention.slope_PA),
    )


@torch.no_grad()
def speculate_in_torch(
    predictor: Predictor, batch: RoutingBatch, layer: int, threshold: float
) -> list[tuple[int, int, float, int]]:
    """What the kernel computes, by the predictor itself: (layer, expert, p, ahead) of what reaches
    ``threshold``.

    Args:
        batch: what has been routed so far, of every sequence; what it holds beyond ``layer`` of the last
            token is not looked at.

    Shapes:
        output: nearest target first, then by expert.
    """
    p_BHE = predictor.step_probabilities(batch, layer)[:, predictor.kinds[layer + 1] != INVALID]
    column_H = torch.arange(layer + 1, layer + 1 + p_BHE.shape[1])
    rows = (column_H % predictor.layers, column_H >= predictor.layers, column_H - layer)
    merged = Forecast.merge([Forecast(p_HE, *rows, source_layer=layer) for p_HE in p_BHE])
    keep_N2 = (merged.p_HE >= threshold).nonzero()
    p_N = merged.p_HE[keep_N2[:, 0], keep_N2[:, 1]]
    targets_H = merged.target_layer_H.tolist()
    return [(targets_H[h], e, p, h + 1) for (h, e), p in zip(keep_N2.tolist(), p_N.tolist(), strict=True)]
