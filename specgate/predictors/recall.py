"""What happened the last time that the text was here: attention to earlier tokens that returns their routing.

Letters: B sequences, T tokens of a segment, J = M + T keys (M tokens of memory), L MoE layers, P = L + 1
source points, H horizons, E experts, A heads, C width of a head, W width of the trunk, G = 3 ids (a token's
and the two before).

Routing depends strongly on the token's id, and texts repeat their words: the experts that an earlier token of
the same id used are among the best forecasts there are, above all for an id that training never met. As in
kNN language models (Khandelwal et al., 2020, arXiv:1911.00172) the answers lie in a memory, here the
sequence's own past; as in pointer networks (Vinyals et al., 2015, arXiv:1506.03134) attention picks them. The
score of an earlier token is a learned bonus for an equal id, further ones for equal ids before it, for every
expert that it used at the layers passed as this token did, a penalty on distance and a learned product of the
two tokens' contexts; a null key lets nothing be found.

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
        layers, experts, top_k, horizons: of the stack. width: of the contexts. heads, head_width: of the
            attention.

    Shapes:
        forward: see there. bonus_AG (parameter): for an id equal, for two, for three in a row; the first
            head starts with ids, the others with paths. path_PAL: for an equal choice at each layer passed.
    """

    passed_PL: Tensor
    column_PH: Tensor

    def __init__(
        self,
        layers: int,
        experts: int,
        top_k: int,
        horizons: int,
        width: int,
        heads: int,
        head_width: int = 16,
    ) -> None:
        super().__init__()
        self.layers, self.experts, self.horizons, self.top_k = layers, experts, horizons, top_k
        self.heads, self.head_width = heads, head_width
        self.query = nn.Linear(width, heads * head_width)
        self.key = nn.Linear(width, heads * head_width)
        nn.init.normal_(self.query.weight, std=0.2 * width**-0.5)
        self.bonus_AG = nn.Parameter(torch.tensor([[8.0, 2.0, 2.0], *[[2.0, 1.0, 1.0]] * (heads - 1)]))
        self.null_PA = nn.Parameter(torch.full((layers + 1, heads), 4.0))
        self.slope_A = nn.Parameter(torch.linspace(-6.0, -2.0, heads))
        since_PL = torch.arange(layers + 1)[:, None] - 1 - torch.arange(layers)[None]
        self.register_buffer("passed_PL", (since_PL >= 0).float(), persistent=False)
        self.path_PAL = nn.Parameter(2.0 * 0.7 ** since_PL.clamp(min=0)[:, None].repeat(1, heads, 1))
        self.gain_PHA = nn.Parameter(torch.zeros(layers + 1, horizons, heads))
        self.register_buffer("column_PH", column_PH(layers, horizons), persistent=False)
        self.size = heads * (horizons * experts + 1)

    def shares(
        self,
        context_BTW: Tensor,
        keys_BJW: Tensor,
        grams_BTG: Tensor,
        grams_BJG: Tensor,
        used_BTLE: Tensor,
        used_BJLE: Tensor,
        span: int,
    ) -> Tensor:
        """Attention ``[B, P, A, T, J]`` to tokens strictly before t and at most ``span`` back; what lacks to
        1 is the null key's."""
        B, T = context_BTW.shape[:2]
        J, P = keys_BJW.shape[1], self.layers + 1
        q_BATC = self.query(context_BTW).view(B, T, self.heads, -1).transpose(1, 2)
        k_BAJC = self.key(keys_BJW).view(B, J, self.heads, -1).transpose(1, 2)
        score_BATJ = (q_BATC @ k_BAJC.transpose(-1, -2)).float() * self.head_width**-0.5
        equal_BTJG = grams_BTG[:, :, None] == grams_BJG[:, None]
        in_a_row = [(equal_BTJG & (grams_BJG >= 0)[:, None])[..., 0]]
        for g in range(1, equal_BTJG.shape[-1]):
            in_a_row.append(in_a_row[-1] & equal_BTJG[..., g] & (grams_BJG[:, None, :, g] >= 0))
        equal_BTJG = torch.stack(in_a_row, dim=-1).to(score_BATJ.dtype)
        score_BATJ = score_BATJ + torch.einsum("btjg,ag->batj", equal_BTJG, self.bonus_AG)
        age_TJ = torch.arange(J - T, J, device=score_BATJ.device)[:, None]
        age_TJ = age_TJ - torch.arange(J, device=score_BATJ.device)[None]
        score_BATJ = score_BATJ - F.softplus(self.slope_A)[:, None, None] * age_TJ
        there_BTJ = (age_TJ > 0) & (age_TJ <= span) & (grams_BJG[:, None, :, 0] >= 0)
        score_BATJ = score_BATJ.masked_fill(~there_BTJ[:, None], MASKED)
        common_BLTJ = used_BTLE.transpose(1, 2) @ used_BJLE.permute(0, 2, 3, 1) / self.top_k
        path_PAL = self.path_PAL * self.passed_PL[:, None]
        same_BPATJ = torch.einsum("pal,bltj->bpatj", path_PAL, common_BLTJ)
        null_BPAT1 = self.null_PA[:, :, None, None].expand(B, -1, -1, T, 1)
        score_BPATJ = score_BATJ[:, None] + same_BPATJ.float().view(B, P, self.heads, T, J)
        return torch.cat([score_BPATJ, null_BPAT1], dim=-1).softmax(-1)[..., :-1]

    def forward(self, share_BPATJ: Tensor, used_BJLE: Tensor) -> tuple[Tensor, Tensor]:
        """The found tokens' experts at the targets.

        A target in this token reads the found token's layer; one in the next token reads the token behind the
        found one, if that is an earlier token too.

        Shapes:
            share_BPATJ: of :meth:`shares`. used_BJLE: 1 where used.
            output: features ``[B, T, P, size]`` and a direct share of the logits ``[B, T, P, H, E]``.
        """
        P, T, J = share_BPATJ.shape[1], *share_BPATJ.shape[3:]
        share_BPATJ = share_BPATJ.to(used_BJLE.dtype)
        both_BJME = torch.cat([used_BJLE, shifted(used_BJLE, -1)], dim=2)
        value_BPJF = both_BJME[:, :, self.column_PH].transpose(1, 2).flatten(3)
        found_BPATF = share_BPATJ @ value_BPJF[:, :, None]
        late = slice(max(0, P - self.horizons), P)  # the points with targets in the next token
        steps_J = torch.arange(J, device=used_BJLE.device)
        earlier_TJ = steps_J[None] + 1 < steps_J[J - T :, None]
        behind = (share_BPATJ[:, late] * earlier_TJ) @ value_BPJF[:, late, None]
        across_pF = (self.column_PH[late] >= self.layers).repeat_interleave(self.experts, dim=1)
        late_found = torch.where(across_pF[:, None, None], behind, found_BPATF[:, late])
        found_BPATF = torch.cat([found_BPATF[:, : late.start], late_found], dim=1)
        found_BTPAF = found_BPATF.permute(0, 3, 1, 2, 4)
        found_BTPAHE = found_BTPAF.unflatten(-1, (self.horizons, self.experts))
        direct_BTPHE = torch.einsum("btpahe,pha->btphe", found_BTPAHE, self.gain_PHA * GAIN)
        sure_BTPA = share_BPATJ.sum(-1).permute(0, 3, 1, 2)
        return torch.cat([found_BTPAF.flatten(3) * 2, sure_BTPA], dim=-1), direct_BTPHE
