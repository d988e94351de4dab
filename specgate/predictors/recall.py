"""What happened the last time that the text was here: attention to earlier tokens that returns their routing.

Letters: B sequences, T tokens of a segment, J = M + T keys (M tokens of memory), L MoE layers, P = L + 1
source points, H horizons, E experts, A heads, C width of a head, W width of the trunk, G = 3 ids (a token's
and the two before).

Routing depends strongly on the token's id, and texts repeat their words: the experts that an earlier token of
the same id used are among the best forecasts there are, above all for an id that training never met. As in
kNN language models (Khandelwal et al., 2020, arXiv:1911.00172) the answers lie in a memory, here the
sequence's own past; as in pointer networks (Vinyals et al., 2015, arXiv:1506.03134) attention picks them. The
score of an earlier token is a learned bonus for an equal id, further ones for equal ids before it, a penalty
on distance and a learned product of the two tokens' contexts; a null key lets nothing be found.

Only while decoding: in prefill no token's later layers are known, so there is nothing to return.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specgate.predictors.features import column_PH, shifted
from specgate.predictors.relative import MASKED

GRAMS = 3
GAIN = 10.0
"""Factor on the direct path's weights, so that they move as many times faster."""


class Recall(nn.Module):
    """Attention over earlier tokens whose values are their experts at the targets.

    Args:
        layers, experts, horizons: of the stack. width: of the contexts. heads, head_width: of the attention.

    Shapes:
        forward: see there. bonus_AG (parameter): for an id equal, for two, for three in a row.
    """

    def __init__(
        self, layers: int, experts: int, horizons: int, width: int, heads: int, head_width: int = 16
    ) -> None:
        super().__init__()
        self.layers, self.experts, self.horizons = layers, experts, horizons
        self.heads, self.head_width = heads, head_width
        self.query = nn.Linear(width, heads * head_width)
        self.key = nn.Linear(width, heads * head_width)
        nn.init.normal_(self.query.weight, std=0.2 * width**-0.5)
        self.bonus_AG = nn.Parameter(torch.tensor([8.0, 2.0, 2.0]).repeat(heads, 1))
        self.null_A = nn.Parameter(torch.full((heads,), 4.0))
        self.slope_A = nn.Parameter(torch.linspace(-6.0, -2.0, heads))
        self.gain_PHA = nn.Parameter(torch.zeros(layers + 1, horizons, heads))
        self.size = heads * (horizons * experts + 1)

    def shares(
        self, context_BTW: Tensor, keys_BJW: Tensor, grams_BTG: Tensor, grams_BJG: Tensor, span: int
    ) -> Tensor:
        """Attention ``[B, A, T, J]`` to tokens strictly before t and at most ``span`` back; what lacks to 1
        is the null key's."""
        B, T = context_BTW.shape[:2]
        J = keys_BJW.shape[1]
        q_BATC = self.query(context_BTW).view(B, T, self.heads, -1).transpose(1, 2)
        k_BAJC = self.key(keys_BJW).view(B, J, self.heads, -1).transpose(1, 2)
        score_BATJ = (q_BATC @ k_BAJC.transpose(-1, -2)).float() * self.head_width**-0.5
        equal_BTJG = grams_BTG[:, :, None] == grams_BJG[:, None]
        equal_BTJG = (equal_BTJG & (grams_BJG >= 0)[:, None]).long().cumprod(-1).to(score_BATJ.dtype)
        score_BATJ = score_BATJ + torch.einsum("btjg,ag->batj", equal_BTJG, self.bonus_AG)
        age_TJ = torch.arange(J - T, J, device=score_BATJ.device)[:, None]
        age_TJ = age_TJ - torch.arange(J, device=score_BATJ.device)[None]
        score_BATJ = score_BATJ - F.softplus(self.slope_A)[:, None, None] * age_TJ
        there_BTJ = (age_TJ > 0) & (age_TJ <= span) & (grams_BJG[:, None, :, 0] >= 0)
        score_BATJ = score_BATJ.masked_fill(~there_BTJ[:, None], MASKED)
        null_BAT1 = self.null_A[:, None, None].expand(B, -1, T, 1)
        return torch.cat([score_BATJ, null_BAT1], dim=-1).softmax(-1)[..., :-1]

    def forward(self, share_BATJ: Tensor, used_BJLE: Tensor) -> tuple[Tensor, Tensor]:
        """The found tokens' experts at the targets.

        A target in this token reads the found token's layer; one in the next token reads the token behind the
        found one, if that is an earlier token too.

        Shapes:
            share_BATJ: of :meth:`shares`. used_BJLE: 1 where used.
            output: features ``[B, T, P, size]`` and a direct share of the logits ``[B, T, P, H, E]``.
        """
        B, A, T, J = share_BATJ.shape
        share_BATJ = share_BATJ.to(used_BJLE.dtype)
        behind_BATJ = share_BATJ * (
            torch.arange(J, device=used_BJLE.device)[None] + 1
            < torch.arange(J - T, J, device=used_BJLE.device)[:, None]
        )
        own_BATF = share_BATJ @ used_BJLE.flatten(2)[:, None]
        next_BATF = behind_BATJ @ shifted(used_BJLE, -1).flatten(2)[:, None]
        both = torch.cat([own_BATF, next_BATF], dim=-1).view(B, A, T, 2 * self.layers, self.experts)
        column = column_PH(self.layers, self.horizons, both.device)
        found_BTPHAE = both[:, :, :, column].permute(0, 2, 3, 4, 1, 5)
        direct_BTPHE = torch.einsum("btphae,pha->btphe", found_BTPHAE, self.gain_PHA * GAIN)
        sure_BTPA = share_BATJ.sum(-1).transpose(1, 2)[:, :, None].expand(-1, -1, self.layers + 1, -1)
        return torch.cat([found_BTPHAE.flatten(3) * 2, sure_BTPA], dim=-1), direct_BTPHE
