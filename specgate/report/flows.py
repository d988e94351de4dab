"""Frequent routing flows: paths through the experts of consecutive MoE layers that many tokens take.

Letters: N tokens, L MoE layers, E experts per layer, K experts per token, M layers in a path, U distinct
    paths.

A path is one expert per layer, packed into one integer, so that counting is ``np.unique`` or ``np.bincount``
over integers. With one column of experts (K = 1, or the heaviest expert of K) a token takes one path per
start; with all K columns it contains K^M paths (frequent itemsets with one item per layer; Agrawal and
Srikant, VLDB 1994), each once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from specgate.errors import ConfigError

Array = np.ndarray[Any, Any]
_CHUNK = 4_000_000
_DENSE = 1 << 22


def path_codes(experts_NMK: Array, experts: int) -> Array:
    """Every path of every token as a number in base E, the first layer's expert leading: ``[N, K^M]``
    int64."""
    code = np.zeros((len(experts_NMK), 1), dtype=np.int64)
    for column_NK in experts_NMK.astype(np.int64).transpose(1, 0, 2):
        code = (code[:, :, None] * experts + column_NK[:, None, :]).reshape(len(code), -1)
    return code


def unpack(code_U: Array, length: int, experts: int) -> Array:
    """The experts of paths: ``[U, M]``."""
    powers_M = experts ** np.arange(length - 1, -1, -1, dtype=np.int64)
    return code_U[:, None] // powers_M % experts


def count_paths(experts_NMK: Array, experts: int) -> tuple[Array, Array]:
    """How many tokens take each path that occurs.

    Returns:
        codes ``[U]`` in rising order and counts ``[U]``, int64.

    Raises:
        ConfigError: if E^M does not fit into 63 bits.
    """
    N, M, K = experts_NMK.shape
    if M * np.log2(max(experts, 2)) > 62:
        raise ConfigError(
            f"a path of {M} layers of {experts} experts is too long to count: choose a shorter length"
        )
    step, dense = max(1, _CHUNK // K**M), experts**M <= _DENSE
    total = np.zeros(experts**M if dense else 0, dtype=np.int64)
    codes, counts = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    for i in range(0, N, step):
        flat = path_codes(experts_NMK[i : i + step], experts).reshape(-1)
        if dense:
            total += np.bincount(flat, minlength=len(total))
            continue
        new, times = np.unique(flat, return_counts=True)
        codes, where = np.unique(np.concatenate([codes, new]), return_inverse=True)
        counts = np.bincount(where, np.concatenate([counts, times]), len(codes)).astype(np.int64)
    if dense:
        codes = np.nonzero(total)[0]
        counts = total[codes]
    return codes, counts


def shares(experts_NLK: Array, experts: int) -> Array:
    """Share of the tokens that use each expert: ``[L, E]``."""
    counts = [
        np.bincount(layer_NK.reshape(-1), minlength=experts) for layer_NK in experts_NLK.transpose(1, 0, 2)
    ]
    return np.stack(counts) / len(experts_NLK)


def pair_shares(experts_NLK: Array, experts: int) -> Array:
    """Share of the tokens that use e in layer l and f in layer l + 1: ``[L - 1, E, E]``."""
    found = np.zeros((experts_NLK.shape[1] - 1, experts * experts))
    for layer in range(len(found)):
        codes, counts = count_paths(experts_NLK[:, layer : layer + 2], experts)
        found[layer, codes] = counts / len(experts_NLK)
    return found.reshape(-1, experts, experts)


def mine(experts_NLK: Array, experts: int, length: int, top: int, min_count: int) -> dict[str, Any]:
    """The most frequent and the strongest paths of ``length`` consecutive layers.

    A path's lift is its share of the tokens over the product of its experts' shares (1: the layers choose
    independently); ``lift_chain`` compares with what the first-order chain of its steps makes of it (1: no
    memory beyond one layer). Frequent paths are ranked by their count, strong ones by ``share * log2(lift)``,
    what they add to the dependence between the layers; all taken by at least ``min_count`` tokens.

    Returns:
        ``tokens``, ``length``, ``columns`` (experts per token looked at), ``frequent`` and ``strong`` (lists
        of ``{start, experts, count, share, lift, lift_chain}``) and ``starts``: per first layer the number of
        distinct paths and, for one column, how many of them half of the tokens take (``half``) and the share
        of the tokens that take one of the ``top`` most frequent (``top_share``).

    Raises:
        ConfigError: if the stack has fewer layers than a path, or a path is too long to count.
    """
    N, L, K = experts_NLK.shape
    if not 2 <= length <= L:
        raise ConfigError(f"length {length} is outside 2..{L}: a path runs through MoE layers of one token")
    share_LE, pair_LEE = shares(experts_NLK, experts), pair_shares(experts_NLK, experts)
    candidates: list[dict[str, Any]] = []
    starts: list[dict[str, Any]] = []
    for start in range(L - length + 1):
        codes, counts = count_paths(experts_NLK[:, start : start + length], experts)
        about: dict[str, Any] = {"start": start, "distinct": len(codes)}
        if K == 1:
            falling = np.sort(counts)[::-1].cumsum()
            about["half"] = int(np.searchsorted(falling, N / 2) + 1)
            about["top_share"] = round(float(falling[min(top, len(falling)) - 1]) / N, 5)
        starts.append(about)
        enough = counts >= min_count
        codes, counts = codes[enough], counts[enough]
        path_UM, share_U = unpack(codes, length, experts), counts / N
        alone_UM = np.stack([share_LE[start + m][path_UM[:, m]] for m in range(length)], axis=1)
        steps = [pair_LEE[start + m][path_UM[:, m], path_UM[:, m + 1]] for m in range(length - 1)]
        lift_U = share_U / alone_UM.prod(1)
        chain_U = np.prod(steps, axis=0) / alone_UM[:, 1:-1].prod(1)
        gain_U = share_U * np.log2(lift_U)
        best = set(np.lexsort((codes, -counts))[:top]) | set(np.lexsort((codes, -gain_U))[:top])
        candidates += [
            {
                "start": start,
                "experts": path_UM[u].tolist(),
                "count": int(counts[u]),
                "share": round(float(share_U[u]), 7),
                "lift": round(float(lift_U[u]), 4),
                "lift_chain": round(float(share_U[u] / chain_U[u]), 4),
                "gain": float(gain_U[u]),
            }
            for u in sorted(best)
        ]
    place = [(row["start"], row["experts"]) for row in candidates]
    frequent = sorted(range(len(place)), key=lambda i: (-candidates[i]["count"], place[i]))[:top]
    strong = sorted(range(len(place)), key=lambda i: (-candidates[i]["gain"], place[i]))[:top]
    plain = [{k: v for k, v in row.items() if k != "gain"} for row in candidates]
    return {
        "tokens": N,
        "length": length,
        "columns": K,
        "starts": starts,
        "frequent": [plain[i] for i in frequent],
        "strong": [plain[i] for i in strong],
    }
