"""Which MoE layers belong together: contiguous groups of layers that route alike.

Letters: L MoE layers, E experts per layer, K experts per token, N tokens, G groups.

Expert numbers mean nothing across layers, so two layers are compared by what does not depend on numbering:
how well one layer's choice of experts tells the other's, measured from their co-activation (transition)
counts as linear centred kernel alignment of the two 0/1 matrices tokens x experts (Kornblith et al.,
"Similarity of Neural Network Representations Revisited", 2019, arXiv:1905.00414). The cut into G runs of
layers is the exact minimum of the kernel change-point cost (Arlot, Celisse and Harchaoui, 2019,
arXiv:1202.3878), by dynamic programming.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from specgate.errors import ConfigError
from specgate.traces.batch import RoutingBatch


def routing_similarity(
    batches: Iterable[RoutingBatch],
    layers: int,
    experts: int,
    tokens: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Centred kernel alignment of every two layers' routing over the first ``tokens`` scored tokens.

    Memory is (L E)^2 float32: 2.4 MB for 24 layers of 32 experts, 151 MB for 48 of 128.

    Shapes:
        output: ``[L, L]`` float32 in 0..1, ones on the diagonal; 0 between layers of which one never varies.
    """
    size, seen = layers * experts, 0
    sum_M = torch.zeros(size, device=device)
    product_MM = torch.zeros(size, size, device=device)
    for batch in batches:
        experts_NLK = batch.experts_BTLK[batch.mask_BT][: tokens - seen].to(device)
        used_NLE = torch.zeros(len(experts_NLK), layers, experts, device=device)
        used_NM = used_NLE.scatter_(-1, experts_NLK, 1.0).flatten(1)
        sum_M += used_NM.sum(0)
        product_MM.addmm_(used_NM.T, used_NM)
        seen += len(used_NM)
        if seen >= tokens:
            break
    if seen == 0:
        return torch.eye(layers)
    mean_M = sum_M / seen
    covariance = (product_MM / seen).addr_(mean_M, mean_M, alpha=-1).view(layers, experts, layers, experts)
    square_LL = covariance.pow(2).sum((1, 3)).cpu()
    norm_L = square_LL.diagonal().sqrt()
    similarity_LL = square_LL / (norm_L[:, None] * norm_L[None]).clamp(min=1e-12)
    similarity_LL = (similarity_LL + similarity_LL.T) / 2
    return similarity_LL.clamp(0, 1).fill_diagonal_(1.0)


def segment(similarity_LL: Tensor, groups: int) -> list[list[int]]:
    """Cut layers 0..L-1 into ``groups`` runs of least total scatter: of each run the sum of self-similarities
    minus the mean row sum of its block (0 for a single layer).

    Returns:
        The layers of each run; among equally good cuts the one whose last runs start first.
    """
    S = similarity_LL.double()
    layers = len(S)
    corner = torch.zeros(layers + 1, layers + 1, dtype=torch.float64)
    corner[1:, 1:] = S.cumsum(0).cumsum(1)
    trace = torch.cat([torch.zeros(1, dtype=torch.float64), S.diagonal().cumsum(0)])

    def scatter(a: int, b: int) -> float:
        block = corner[b, b] - corner[a, b] - corner[b, a] + corner[a, a]
        return float(trace[b] - trace[a] - block / (b - a))

    best = [0.0 if b == 0 else float("inf") for b in range(layers + 1)]
    starts: list[list[int]] = []
    for g in range(1, groups + 1):
        found, start = [float("inf")] * (layers + 1), [0] * (layers + 1)
        for b in range(g, layers + 1):
            costs = [best[a] + scatter(a, b) for a in range(g - 1, b)]
            start[b] = g - 1 + min(range(len(costs)), key=lambda i: round(costs[i], 9))
            found[b] = costs[start[b] - g + 1]
        best = found
        starts.append(start)
    runs, end = [], layers
    for start in reversed(starts):
        runs.append(list(range(start[end], end)))
        end = start[end]
    return runs[::-1]


def equal_groups(layers: int, groups: int) -> list[list[int]]:
    """``groups`` runs of layers, as equal as can be."""
    return [chunk.tolist() for chunk in torch.arange(layers).tensor_split(groups)]


def check_groups(groups: Sequence[Sequence[int]], layers: int) -> list[list[int]]:
    """The groups as they were given, each layer in exactly one.

    Raises:
        ConfigError: otherwise, naming the first layer that is not.
    """
    given = sorted(int(layer) for group in groups for layer in group)
    if given != list(range(layers)) or not all(len(group) for group in groups):
        odd = next((x for x in [*range(layers), *given] if given.count(x) != 1 or not 0 <= x < layers), None)
        what = "one of them is empty" if odd is None else f"layer {odd} is not in exactly one of them"
        raise ConfigError(
            f"groups must hold each of the layers 0..{layers - 1} once and {what}: correct model.groups, or"
            " give a number to have them found"
        )
    return [[int(layer) for layer in group] for group in groups]


def contrast(similarity_LL: Tensor, groups: Sequence[Sequence[int]]) -> tuple[float | None, float | None]:
    """Mean similarity of two layers of the same group and of two layers of different groups (None: no such
    pair)."""
    layers = len(similarity_LL)
    group_L = torch.zeros(layers, dtype=torch.int64)
    for number, group in enumerate(groups):
        group_L[list(group)] = number
    same_LL = group_L[:, None] == group_L[None]
    pairs_LL = torch.ones(layers, layers, dtype=torch.bool).triu(1)
    means = [similarity_LL[pairs_LL & mask] for mask in (same_LL, ~same_LL)]
    inside, between = (round(float(x.mean()), 4) if len(x) else None for x in means)
    return inside, between
