"""Fitting the drift monitor: streams of validation documents, their mean, scatter and a threshold.

Letters: N tokens, F scores, D documents, R streams, S looks at a stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from specgate.calibration.monitor import (
    DriftBaseline,
    DriftMonitor,
    DriftSettings,
    Float,
    Int,
    advance,
)
from specgate.errors import ConfigError

_RIDGE = 1e-3


@dataclass
class TokenStream:
    """Scores of many tokens in order, with the document of each.

    Shapes:
        score_NF: see :func:`specgate.calibration.monitor.token_scores`; document_N: int64; age_N: int64, how
            many tokens of the same document came before.
    """

    score_NF: Float
    document_N: Int
    age_N: Int

    @classmethod
    def of(cls, score_NF: Float, document_N: Int) -> TokenStream:
        """A stream whose ages are counted."""
        order_N = np.argsort(document_N, kind="stable")
        number_N = np.arange(len(order_N))
        starts_N = np.diff(document_N[order_N], prepend=-1) != 0
        age_N = np.empty(len(order_N), dtype=np.int64)
        age_N[order_N] = number_N - np.maximum.accumulate(np.where(starts_N, number_N, 0))
        return cls(score_NF, document_N, age_N)

    @classmethod
    def join(cls, parts: Iterable[tuple[Float, Int]]) -> TokenStream:
        """Scores and documents of batches, one after the other."""
        found = list(parts)
        return cls.of(np.concatenate([s for s, _ in found]), np.concatenate([d for _, d in found]))

    def select(self, index_N: Any) -> TokenStream:
        """Some of the tokens, at the age they had, in the order of the index (or under a mask)."""
        return TokenStream(self.score_NF[index_N], self.document_N[index_N], self.age_N[index_N])

    def by_document(self) -> TokenStream:
        """One whole document after the other."""
        return self.select(np.concatenate(self.documents()))

    def documents(self) -> list[Int]:
        """Indices of every document's tokens, in order."""
        order_N = np.lexsort((self.age_N, self.document_N))
        starts = np.nonzero(np.diff(self.document_N[order_N], prepend=-1))[0]
        return np.split(order_N, starts[1:])

    def weight_N(self, settings: DriftSettings) -> Float:
        """Weight of every token."""
        before_N = 1 + self.age_N / settings.half
        return np.asarray(1 / (before_N * (before_N + 1 / settings.half)))


def shuffled(documents: Sequence[Int], generator: np.random.Generator, tokens: int) -> Int:
    """Indices of at most ``tokens`` tokens of whole documents in random order, none of them twice."""
    chosen: list[Int] = []
    length = 0
    for number in generator.permutation(len(documents)).tolist():
        chosen.append(documents[number])
        length += len(documents[number])
        if length >= tokens:
            break
    return np.concatenate(chosen)[:tokens]


def fit_baseline(
    stream: TokenStream, names: Sequence[str], settings: DriftSettings | None = None
) -> DriftBaseline:
    """Mean, whitening and threshold from the tokens of validation documents.

    Args:
        names: of the F scores, see :func:`specgate.calibration.monitor.score_names`.

    Raises:
        ConfigError: if there are fewer than four documents, or no block of tokens in a half.
    """
    settings = settings or DriftSettings()
    documents = np.unique(stream.document_N)
    if len(documents) < 4:
        raise ConfigError(
            f"a drift monitor fitted on {len(documents)} documents has no false-alarm rate: give at least 4 "
            "validation documents"
        )
    generator = np.random.default_rng(settings.seed)
    whole: list[Float] = []
    short: list[Float] = []
    for _ in range(settings.splits):
        mixed = generator.permutation(documents)
        mine_N = np.isin(stream.document_N, mixed[: len(mixed) // 2])
        half, rest = _moments(stream.select(mine_N), names, settings), stream.select(~mine_N)
        whole.append(peaks(half, rest, settings.streams, generator))
        short.append(peaks(half, beginnings(rest, settings), settings.streams, generator))
    high = [float(np.quantile(np.concatenate(found), 1 - settings.alarm_rate)) for found in (whole, short)]
    return replace(_moments(stream, names, settings), threshold=max(high))


def beginnings(stream: TokenStream, settings: DriftSettings) -> TokenStream:
    """Every document cut to its first ``half`` tokens."""
    return stream.select(stream.age_N < settings.half)


def peaks(baseline: DriftBaseline, stream: TokenStream, count: int, generator: np.random.Generator) -> Float:
    """The largest statistic of each of ``count`` streams of whole documents in random order, ``[R]``."""
    settings = baseline.settings
    if len(stream.document_N) < settings.block:
        raise ConfigError(
            f"{len(stream.document_N)} tokens of validation documents make no block of {settings.block}: "
            "lower drift block or give more validation documents"
        )
    weight_N, documents = stream.weight_N(settings), stream.documents()
    found = []
    for _ in range(count):
        index_N = shuffled(documents, generator, settings.stream)
        looks = slice(settings.block - 1, None, settings.block)
        sum_SF = np.cumsum(weight_N[index_N, None] * stream.score_NF[index_N], axis=0)[looks]
        found.append(baseline.statistic(sum_SF, np.cumsum(weight_N[index_N])[looks]).max())
    return np.array(found)


def false_alarms(
    baseline: DriftBaseline, stream: TokenStream, count: int = 200, seed: int = 1
) -> dict[str, Any]:
    """How many of ``count`` streams of documents in random order raise an alarm.

    Returns:
        ``rate`` for whole documents, ``rate_beginnings`` for their first ``half`` tokens, ``streams``,
        ``stream`` (tokens each, or fewer if there are fewer), ``documents``, ``median_peak``.
    """
    generator = np.random.default_rng(seed)
    whole_R = peaks(baseline, stream, count, generator)
    short_R = peaks(baseline, beginnings(stream, baseline.settings), count, generator)
    return {
        "rate": round(float((whole_R > baseline.threshold).mean()), 4),
        "rate_beginnings": round(float((short_R > baseline.threshold).mean()), 4),
        "streams": count,
        "stream": baseline.settings.stream,
        "documents": len(np.unique(stream.document_N)),
        "median_peak": round(float(np.median(whole_R)), 4),
    }


def watch(baseline: DriftBaseline, stream: TokenStream) -> DriftMonitor:
    """A monitor that has seen the stream's tokens, one by one."""
    monitor = DriftMonitor(baseline)
    for score_F, age in zip(stream.score_NF, stream.age_N.tolist(), strict=True):
        monitor.state = advance(baseline, monitor.state, score_F, age)
    return monitor


def _moments(stream: TokenStream, names: Sequence[str], settings: DriftSettings) -> DriftBaseline:
    """Mean and whitening of some documents; nothing is above its threshold yet."""
    weight_N = stream.weight_N(settings)
    total = float(weight_N.sum())
    mean_F = weight_N @ stream.score_NF / total
    documents, place_N = np.unique(stream.document_N, return_inverse=True)
    lean_DF = np.zeros((len(documents), len(mean_F)))
    np.add.at(lean_DF, place_N, weight_N[:, None] * (stream.score_NF - mean_F))
    scatter_FF = lean_DF.T @ lean_DF / total
    size_F = np.sqrt(np.diag(scatter_FF))
    correlations = (1 - settings.shrink) * scatter_FF + settings.shrink * np.diag(size_F**2)
    ridge = _RIDGE * float(np.mean(size_F**2)) + 1e-12
    whiten_FF = np.linalg.cholesky(np.linalg.inv(correlations + ridge * np.eye(len(size_F))))
    return DriftBaseline(
        settings=settings,
        names=tuple(names),
        mean_F=mean_F,
        whiten_FF=whiten_FF,
        weight=total,
        threshold=float("inf"),
        documents=len(documents),
        tokens=len(weight_N),
    )
