"""Point features that go on from segment to segment: what ``PointFeatures`` sees, with a state carried along.

Letters: B sequences, T tokens of a segment, L MoE layers, P = L + 1 source points, H horizons, E experts, D
hidden size, F features, V token ids.

Entry (t, p) contains only what is known there (see base.py). Everything reaches back through decayed means
and the two tokens before, so a handful of tensors per sequence is all that a later segment needs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specgate.predictors.features import TOKEN_GAIN, column_PH, multi_hot_BTLE, points, shift_layer, shifted
from specgate.traces.batch import RoutingBatch

STATE_DECAYS, HIDDEN_DECAY = (0.5, 0.9), 0.8
Carry = dict[str, Tensor]
"""Name -> ``[B, ...]``: what the last token left behind."""


def decayed_from(x: Tensor, decay: float, start: Tensor | None) -> Tensor:
    """``decayed`` (features.py) of a sequence whose earlier part left ``start`` behind.

    Shapes:
        x: ``[B, T, ...]``. start: ``[B, ...]``, the mean after the token before, or None (zeros).
        output: ``[B, T, ...]``, the mean after each token.
    """
    steps_T = torch.arange(x.shape[1], device=x.device)
    age_TT = steps_T[:, None] - steps_T[None]
    matrix_TT = torch.where(age_TT >= 0, decay ** age_TT.clamp(min=0).to(x.dtype), 0.0) * (1 - decay)
    mean = (matrix_TT.to(x.dtype) @ x.flatten(2)).reshape(x.shape)
    if start is None:
        return mean
    fade_T = decay ** (steps_T + 1).to(x.dtype)
    return mean + fade_T.view(1, -1, *[1] * (x.dim() - 2)) * start[:, None].to(x.dtype)


def after(x: Tensor, before: Tensor | None) -> Tensor:
    """Token t - 1's value at t; the first token gets ``before`` (``[B, ...]``; None: zeros)."""
    moved = shifted(x)
    return moved if before is None else torch.cat([before[:, None].to(x.dtype), moved[:, 1:]], dim=1)


def at_targets(before_BTLE: Tensor, now_BTLE: Tensor, horizons: int) -> Tensor:
    """A per-layer running state at each target, as late as it is known (decode): ``at_targets_BTPHE``
    (features.py), told what was before the segment.

    Shapes:
        before_BTLE: the state after token t - 1; now_BTLE: after token t. output: ``[B, T, P, H, E]``.
    """
    layers = now_BTLE.shape[2]
    both = torch.cat([before_BTLE, now_BTLE], dim=2)
    column = column_PH(layers, horizons, now_BTLE.device)
    point_P1 = torch.arange(layers + 1, device=column.device)[:, None]
    not_yet_PH = (column >= layers) & (column - layers > point_P1 - 1)
    return both[:, :, torch.where(not_yet_PH, column - layers, column)]


class StreamFeatures(nn.Module):
    """Inputs of a predictor at every source point, segment after segment.

    Blocks: embeddings of this token's id, the two before and, in a bidirectional stack, the two behind; the
    experts of this and the previous layer, weighted; a running state of all layers passed and its decayed
    means over earlier tokens; while decoding the target layers' experts of the previous token and their
    decayed use; with hidden states the normalised residual stream, its change over the layer, its decayed
    mean and its log-norm.

    The embedding of an id that training never met would be noise; such an id says nothing, exactly as one
    that ``token_dropout`` hides.

    Args:
        token_dim, state_dim: widths of embeddings. decays: of the recency features. token_dropout: share of
            tokens whose id is hidden while training. expert_dropout: share of expert inputs zeroed while
            training.

    Shapes:
        met_V (buffer): bool, ids that training has met; all until :meth:`count_ids` starts the count.
        forward: ``RoutingBatch``, carry -> features ``[B, T, P, F]`` with F = :attr:`size`, router weights
            ``[B, T, P, E]``, the ids' embeddings ``[B, T, F_t]``, the use of experts ``[B, T, L, E]`` (1
            where used), and the carry for the next segment.
    """

    met_V: Tensor
    counts_ids: Tensor

    def __init__(
        self,
        *,
        layers: int,
        experts: int,
        vocab_size: int,
        horizons: int,
        phase: str,
        hidden_size: int | None,
        bidirectional: bool,
        token_dim: int,
        state_dim: int,
        decays: list[float],
        token_dropout: float,
        expert_dropout: float,
    ) -> None:
        super().__init__()
        self.layers, self.experts, self.horizons = layers, experts, horizons
        self.phase, self.hidden_size, self.decays = phase, hidden_size, decays
        self.state_dim = state_dim
        self.bidirectional, self.token_dropout = bidirectional, token_dropout
        self.drop = nn.Dropout(expert_dropout)
        self.token_VF = nn.Embedding(vocab_size, token_dim)
        nn.init.normal_(self.token_VF.weight, std=0.3 / TOKEN_GAIN)
        self.register_buffer("met_V", torch.ones(vocab_size, dtype=torch.bool))
        self.register_buffer("counts_ids", torch.tensor(False))
        self.expert_LEF = nn.Parameter(torch.randn(layers, experts, state_dim) * 0.5)
        self.start_VF = nn.Linear(token_dim, state_dim, bias=False)
        self.around = token_dim * (5 if bidirectional else 3)
        self.size = self.around + 2 * experts + 3 * state_dim
        if phase == "decode":
            self.size += horizons * experts * (1 + len(decays))
        if hidden_size is not None:
            self.size += 3 * hidden_size + 1

    def shown(self, batch: RoutingBatch) -> Tensor:
        """Where the token's id is looked at: not at padding, not at ids never met, nor where
        ``token_dropout`` hides them: ``[B, T]`` bool."""
        if not self.training:
            return batch.valid_BT & self.met_V[batch.token_ids_BT]
        self.met_V[batch.token_ids_BT[batch.valid_BT]] = True
        noise_BT = torch.rand(batch.valid_BT.shape, device=batch.valid_BT.device)
        return batch.valid_BT & (noise_BT >= self.token_dropout)

    def count_ids(self) -> None:
        """From now on (once in a predictor's life) only ids that training meets are looked at."""
        if not bool(self.counts_ids):
            self.met_V.zero_()
            self.counts_ids.fill_(True)

    def forward(
        self, batch: RoutingBatch, shown_BT: Tensor, carry: Carry | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Carry]:
        new: Carry = {}
        old, P, scale = carry or {}, self.layers + 1, self.experts**0.5
        weighted_BTLE = multi_hot_BTLE(batch, self.experts, weighted=True)
        used_BTLE = multi_hot_BTLE(batch, self.experts, weighted=False)
        token_BTF = self.token_VF(batch.token_ids_BT) * (TOKEN_GAIN * shown_BT[..., None])
        one_BTF = after(token_BTF, old.get("token_1"))
        two_BTF = after(one_BTF, old.get("token_2"))
        new |= {"token_1": token_BTF[:, -1], "token_2": one_BTF[:, -1]}
        around = [token_BTF, one_BTF, two_BTF]
        if self.bidirectional:
            around += [shifted(token_BTF, -1), shifted(token_BTF, -2)]
        around_BTF = torch.cat(around, dim=-1)
        this_BTPE = points(weighted_BTLE) * scale
        before_BTPE = points(shift_layer(weighted_BTLE)) * scale
        experts = [self.drop(this_BTPE), self.drop(before_BTPE)]
        blocks = [around_BTF[:, :, None].expand(-1, -1, P, -1), *experts]
        blocks += self._running_state(token_BTF, used_BTLE, weighted_BTLE, old, new)
        if self.phase == "decode":
            past = [("last", weighted_BTLE)]
            past += [
                (f"decayed_{a}", decayed_from(used_BTLE, a, old.get(f"decayed_{a}"))) for a in self.decays
            ]
            for name, now_BTLE in past:
                new[name] = now_BTLE[:, -1]
                at_BTPHE = at_targets(after(now_BTLE, old.get(name)), now_BTLE, self.horizons)
                blocks.append(self.drop(at_BTPHE.flatten(3) * scale))
        if self.hidden_size is not None:
            blocks += self._hidden_blocks(batch, old, new)
        return torch.cat(blocks, dim=-1), this_BTPE, around_BTF, used_BTLE, new

    def _running_state(
        self, token_BTF: Tensor, used_BTLE: Tensor, weighted_BTLE: Tensor, old: Carry, new: Carry
    ) -> list[Tensor]:
        step_BTLF = torch.einsum("btle,lef->btlf", 0.5 * used_BTLE + weighted_BTLE, self.expert_LEF)
        state_BTPF = torch.cat([self.start_VF(token_BTF)[:, :, None], step_BTLF], dim=2).cumsum(2)
        passed_P1 = torch.arange(1, self.layers + 2, device=state_BTPF.device, dtype=state_BTPF.dtype)[
            :, None
        ]
        state_BTPF = state_BTPF / passed_P1.sqrt()
        seen = state_BTPF[:, :, -1:] if self.phase == "decode" else state_BTPF
        blocks = [state_BTPF]
        for a in STATE_DECAYS:
            name = f"state_{a}"
            mean = decayed_from(seen, a, old.get(name))
            new[name] = mean[:, -1]
            blocks.append(after(mean, old.get(name)).expand_as(state_BTPF) * 2)
        return blocks

    def _hidden_blocks(self, batch: RoutingBatch, old: Carry, new: Carry) -> list[Tensor]:
        assert batch.hidden_BTLD is not None
        hidden_BTLD = batch.hidden_BTLD.float() * batch.valid_BT[:, :, None, None]
        rms_BTL1 = (hidden_BTLD.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        unit_BTLD = hidden_BTLD / rms_BTL1
        mean_BTLD = decayed_from(unit_BTLD, HIDDEN_DECAY, old.get("hidden"))
        new["hidden"] = mean_BTLD[:, -1]
        earlier_BTLD = after(mean_BTLD, old.get("hidden")) * 2
        change_BTLD = unit_BTLD - shift_layer(unit_BTLD)
        return [points(x) for x in (unit_BTLD, change_BTLD, earlier_BTLD, rms_BTL1.log())]
