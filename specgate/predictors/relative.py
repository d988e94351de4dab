"""Self-attention with relative positions and a memory of earlier segments (Transformer-XL).

Letters: N rows (sequences, or sequences times source points), T tokens of a segment, M tokens of memory, J =
M + T keys, A attention heads, C width of a head, W model width, R relative distances.

Dai et al., "Transformer-XL: Attentive Language Models beyond a Fixed-Length Context", 2019, arXiv:1901.02860:
the score of query i and key j is ``(q_i + u) k_j + (q_i + v) r_(i - j)``, where r is a projected sinusoid of
the distance and u, v are learned per head. Keys reach back at most ``span`` tokens, so a memory of ``span``
tokens per layer makes segments exactly equal to the whole.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MASKED = -1e9
"""Score of a key that is not to be seen (finite: a row of nothing but those must not become NaN)."""


def distances_RW(lowest: int, highest: int, width: int, device: torch.device) -> Tensor:
    """Sinusoids of the distances ``highest`` down to ``lowest`` (query minus key; negative: later keys).

    Shapes:
        output: ``[R, W]`` float32 with R = ``highest - lowest + 1``.
    """
    distance_R1 = torch.arange(highest, lowest - 1, -1, device=device, dtype=torch.float32)[:, None]
    half = torch.arange(0, width, 2, device=device, dtype=torch.float32)
    angle = distance_R1 * 10000.0 ** (-half / width)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[:, :width]


def aligned(score_NATR: Tensor, keys: int) -> Tensor:
    """Scores by distance as scores by key: ``[N, A, T, R] -> [N, A, T, J]``.

    Query i stands at key ``J - T + i``; its distance to key j lies in column ``T - 1 - i + j`` (R = J + T -
    1 columns, distances falling). Reading the flattened rows one column earlier each is that shift.
    """
    N, A, T, R = score_NATR.shape
    if T == 1:
        return score_NATR
    flat = score_NATR.reshape(N, A, T * R)[..., T - 1 : T - 1 + T * (R - 1)]
    return flat.reshape(N, A, T, R - 1)[..., :keys]


def visible_TJ(tokens: int, keys: int, span: int, causal: bool, device: torch.device) -> Tensor:
    """Which keys a query may see: itself, at most ``span`` earlier ones and, if not causal, all others.

    Shapes:
        output: ``[T, J]`` bool; the last T keys are the queries' own tokens.
    """
    at_T1 = torch.arange(keys - tokens, keys, device=device)[:, None]
    distance_TJ = at_T1 - torch.arange(keys, device=device)[None]
    return ((distance_TJ >= 0) & (distance_TJ <= span)) if causal else torch.ones_like(distance_TJ).bool()


class RelativeAttention(nn.Module):
    """Multi-head attention with Transformer-XL's relative positions.

    Shapes:
        forward: queries' tokens ``[N, T, W]``, keys' tokens ``[N, J, W]`` (memory, then the queries'
            own), seen ``[N or 1, T, J]`` bool -> ``[N, T, W]``.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.position = nn.Linear(width, width, bias=False)
        self.content_A1C = nn.Parameter(torch.zeros(heads, 1, self.size))
        self.distance_A1C = nn.Parameter(torch.zeros(heads, 1, self.size))
        self.out = nn.Linear(width, width, bias=False)
        self.drop = nn.Dropout(dropout)

    def forward(self, x_NTW: Tensor, y_NJW: Tensor, seen_NTJ: Tensor) -> Tensor:
        N, T, W = x_NTW.shape
        J = y_NJW.shape[1]
        q_NATC = self._split(self.query(x_NTW))
        k_NAJC, v_NAJC = (self._split(part) for part in self.key_value(y_NJW).chunk(2, dim=-1))
        r_RW = distances_RW(1 - T, J - 1, W, x_NTW.device).to(x_NTW.dtype)
        r_ACR = self.position(r_RW).view(-1, self.heads, self.size).permute(1, 2, 0)
        by_content = (q_NATC + self.content_A1C) @ k_NAJC.transpose(-1, -2)
        by_distance = aligned((q_NATC + self.distance_A1C) @ r_ACR, J)
        score_NATJ = (by_content + by_distance).float() * self.size**-0.5
        share_NATJ = score_NATJ.masked_fill(~seen_NTJ[:, None], MASKED).softmax(-1)
        mixed_NATC = self.drop(share_NATJ).to(v_NAJC.dtype) @ v_NAJC
        out: Tensor = self.out(mixed_NATC.transpose(1, 2).reshape(N, T, W))
        return out

    def _split(self, x_NTW: Tensor) -> Tensor:
        return x_NTW.view(*x_NTW.shape[:2], self.heads, self.size).transpose(1, 2)


class RelativeBlock(nn.Module):
    """Attention and a feed-forward net, each behind a LayerNorm and beside a residual path.

    Shapes:
        forward: x ``[N, T, W]``, this layer's memory ``[N, M, W]`` or None, seen ``[N or 1, T, J]`` ->
            ``[N, T, W]``.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.before_attention, self.before_feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = RelativeAttention(width, heads, dropout)
        self.feed = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, x_NTW: Tensor, memory_NMW: Tensor | None, seen_NTJ: Tensor) -> Tensor:
        y_NJW = x_NTW if memory_NMW is None else torch.cat([memory_NMW.to(x_NTW.dtype), x_NTW], dim=1)
        y_NJW = self.before_attention(y_NJW)
        x_NTW = x_NTW + self.drop(self.attention(y_NJW[:, -x_NTW.shape[1] :], y_NJW, seen_NTJ))
        out: Tensor = x_NTW + self.drop(self.feed(self.before_feed(x_NTW)))
        return out
