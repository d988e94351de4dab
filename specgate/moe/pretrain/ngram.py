"""Unigram and 4-gram language models that the reference MoEs must beat.

Interpolated absolute discounting (Ney, Essen and Kneser 1994) over the training tokens, counted exactly.

Letters: N training tokens, M tokens scored, G distinct n-grams.
"""

from __future__ import annotations

import numpy as np

DISCOUNT = 0.75


class NGram:
    """Interpolated n-gram model of token ids.

    Args:
        tokens_N: training tokens, ``[N]`` integers below ``vocab_size``.
        order: longest n-gram (4 bits-packs into 64 bits up to a vocabulary of 65,536).
        vocab_size: number of ids.

    Raises:
        ValueError: if an n-gram does not fit 64 bits or there are fewer tokens than ``order``.
    """

    def __init__(self, tokens_N: np.ndarray, order: int, vocab_size: int) -> None:
        self.order, self.vocab_size = order, vocab_size
        self.bits = max(1, int(vocab_size - 1).bit_length())
        if self.bits * order > 64 or len(tokens_N) < order:
            raise ValueError(
                f"order {order} over {vocab_size} ids and {len(tokens_N)} tokens cannot be counted"
            )
        self.unigram_V = np.bincount(tokens_N, minlength=vocab_size).astype(np.float64)
        self.tables = [self._count(self._pack(tokens_N, n)) for n in range(2, order + 1)]

    def _pack(self, tokens_N: np.ndarray, n: int) -> np.ndarray:
        """Every n-gram as one integer, its last token in the lowest bits: ``[N - n + 1]`` uint64."""
        packed = np.zeros(len(tokens_N) - n + 1, np.uint64)
        for i in range(n):
            packed = (packed << np.uint64(self.bits)) | tokens_N[i : len(tokens_N) - n + 1 + i].astype(
                np.uint64
            )
        return packed

    def _count(self, packed: np.ndarray) -> tuple[np.ndarray, ...]:
        grams_G, counts_G = np.unique(packed, return_counts=True)
        contexts = grams_G >> np.uint64(self.bits)
        first = np.flatnonzero(np.concatenate([[True], contexts[1:] != contexts[:-1]]))
        return (
            grams_G,
            counts_G,
            contexts[first],
            np.add.reduceat(counts_G, first),
            np.diff([*first, len(grams_G)]),
        )

    @staticmethod
    def _find(table: np.ndarray, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
        return np.where(table[at] == keys, values[at], 0)

    def log_probs(self, tokens_M: np.ndarray) -> np.ndarray:
        """Natural log-probability of each token given up to ``order - 1`` before it.

        Shapes:
            tokens_M: ``[M]``; output: ``[M]`` float64, where the first tokens have shorter contexts.
        """
        V = self.vocab_size
        seen = (self.unigram_V > 0).sum()
        total = self.unigram_V.sum()
        p_V = np.maximum(self.unigram_V - DISCOUNT, 0) / total + DISCOUNT * seen / total / V
        p_M = p_V[tokens_M]
        for n, (grams, counts, contexts, sums, distinct) in enumerate(self.tables, start=2):
            if len(tokens_M) < n:
                break
            packed = self._pack(tokens_M, n)
            count = self._find(grams, counts, packed)
            context = packed >> np.uint64(self.bits)
            norm, kinds = self._find(contexts, sums, context), self._find(contexts, distinct, context)
            known = norm > 0
            safe = np.maximum(norm, 1)
            lower = p_M[n - 1 :]
            p_M[n - 1 :] = np.where(
                known, np.maximum(count - DISCOUNT, 0) / safe + DISCOUNT * kinds / safe * lower, lower
            )
        return np.log(p_M)

    def unigram_log_probs(self, tokens_M: np.ndarray) -> np.ndarray:
        """Natural log-probability of each token by its add-one smoothed frequency: ``[M]``."""
        return np.log((self.unigram_V[tokens_M] + 1) / (self.unigram_V.sum() + self.vocab_size))
