"""A monitor that tells at run time that calibration has drifted: forecast mass against uses, bin by bin.

Letters: N tokens, M events of one token, E experts per layer, K experts per token, C bins of probability,
D documents, R streams, S blocks.

The loader sees the true routing soon after each forecast. Per bin of probability the monitor adds up
used - p; over a block of tokens these sums, divided by the number of cells, are the signed contributions to
the calibration error of that block. On text like the validation documents they scatter around a known mean;
where calibration is lost they lean to one side, in whatever direction. Crosier's multivariate cumulative sum
(Technometrics 1988) of the whitened contributions z finds that:

    c = |s + z|,   s <- (s + z) max(0, 1 - k / c),   alarm when |s| > threshold,

a vector of C numbers and O(1) work per update; k is the reference value (half the shift worth finding, in
standard deviations of a block).

Tokens of a document are alike, so no bound for independent draws gives a true false-alarm rate. The threshold
comes from whole documents instead: again and again a baseline is fitted on one half of the validation
documents, and streams of a stated length made of whole documents of the other half are monitored; the
threshold is the quantile of the largest |s| of such streams. That no more than ``alarm_rate`` of such streams
of in-domain documents raise an alarm holds as far as the validation documents are like those to come; it
includes how badly the mean is known from few documents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specgate.errors import ConfigError

Float = NDArray[np.float64]
Int = NDArray[np.int64]
_RIDGE = 0.02


@dataclass(frozen=True)
class DriftSettings:
    """How the monitor looks.

    Attributes:
        bins: C bins of equal width of the probability.
        block: tokens per step of the cumulative sum.
        reference: k, in standard deviations of a block.
        alarm_rate: share of in-domain streams that may raise an alarm.
        stream: length of these streams, in tokens; the sum starts anew after so many tokens without alarm.
        splits, streams: halvings of the documents, and streams per halving, that the threshold comes from.
        seed: of both.
    """

    bins: int = 10
    block: int = 128
    reference: float = 0.75
    alarm_rate: float = 0.05
    stream: int = 12_800
    splits: int = 25
    streams: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.alarm_rate < 1:
            raise ConfigError(f"drift alarm_rate={self.alarm_rate} is no share: choose e.g. 0.05")
        if not 1 <= self.block <= self.stream:
            raise ConfigError(
                f"drift block={self.block} does not fit stream={self.stream}: choose 1 <= block <= stream"
            )


@dataclass(frozen=True)
class DriftBaseline:
    """What in-domain blocks look like, in numbers that are fixed once fitted.

    Shapes:
        mean_C: mean contributions per cell; whiten_CC: z = (x - mean_C) @ whiten_CC.
    """

    settings: DriftSettings
    mean_C: Float
    whiten_CC: Float
    threshold: float
    documents: int
    tokens: int


@dataclass(frozen=True)
class DriftState:
    """The monitor's whole memory: two vectors of C numbers and counters.

    Attributes:
        tokens: seen since the start; block_tokens: of them in the unfinished block.
        residual_C, cells: sums of the unfinished block.
        sum_C: the cumulative sum; statistic: its length.
        lean_C, lean_cells: sums of used - p and of cells since the sum last was zero, for the report.
        alarm_at: token at which the first alarm was raised, None so far.
        peak: largest statistic so far.
    """

    residual_C: Float
    sum_C: Float
    lean_C: Float
    tokens: int = 0
    block_tokens: int = 0
    cells: float = 0.0
    lean_cells: float = 0.0
    statistic: float = 0.0
    peak: float = 0.0
    alarm_at: int | None = None

    @classmethod
    def start(cls, bins: int) -> DriftState:
        """Nothing seen yet."""
        return cls(np.zeros(bins), np.zeros(bins), np.zeros(bins))


def advance(baseline: DriftBaseline, state: DriftState, residual_C: Float, cells: float) -> DriftState:
    """The state after one more token (a pure function).

    Args:
        residual_C: the token's sums of used - p per bin; cells: number of its (event, expert) pairs.
    """
    settings = baseline.settings
    state = replace(
        state,
        residual_C=state.residual_C + residual_C,
        cells=state.cells + cells,
        tokens=state.tokens + 1,
        block_tokens=state.block_tokens + 1,
    )
    if state.block_tokens < settings.block or not state.cells:
        return state
    z_C = (state.residual_C / state.cells - baseline.mean_C) @ baseline.whiten_CC
    sum_1C = cusum_step(state.sum_C[None], z_C[None], settings.reference)
    statistic = float(np.linalg.norm(sum_1C))
    alarm = state.tokens if state.alarm_at is None and statistic > baseline.threshold else state.alarm_at
    quiet = alarm is None and state.tokens % settings.stream < settings.block  # a new stream begins
    zero = quiet or statistic == 0
    state = replace(
        state,
        residual_C=np.zeros_like(state.residual_C),
        cells=0.0,
        block_tokens=0,
        sum_C=np.zeros_like(z_C) if quiet else sum_1C[0],
        lean_C=np.zeros_like(z_C) if zero else state.lean_C + state.residual_C,
        lean_cells=0.0 if zero else state.lean_cells + state.cells,
        statistic=statistic,
        peak=max(state.peak, statistic),
        alarm_at=alarm,
    )
    return state


@dataclass
class DriftMonitor:
    """Watches one stream of forecasts.

    >>> monitor.update(p_ME, used_MK)   # after the routing of a token is known
    >>> monitor.drifted

    Args:
        baseline: from :func:`fit_baseline`, of the same predictor and calibrator.
    """

    baseline: DriftBaseline
    state: DriftState = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything seen (after recalibrating, or for a new user)."""
        self.state = DriftState.start(self.baseline.settings.bins)

    def update(self, p_ME: Tensor, used_MK: Tensor) -> DriftState:
        """One token: its forecasts and what was used.

        Shapes:
            p_ME: calibrated probabilities of the token's M forecasts; used_MK: int64 experts used.
        """
        zero_M = torch.zeros(len(p_ME), dtype=torch.int64, device=p_ME.device)
        residual_1C, cells_1 = token_residuals(p_ME, used_MK, zero_M, 1, self.baseline.settings.bins)
        self.state = advance(self.baseline, self.state, residual_1C[0], float(cells_1[0]))
        return self.state

    @property
    def drifted(self) -> bool:
        """Whether an alarm was raised since the last reset."""
        return self.state.alarm_at is not None

    def report(self) -> dict[str, Any]:
        """Plain values: ``drifted``, ``alarm_at`` (token), ``tokens``, ``statistic``, ``peak``,
        ``threshold``, ``alarm_rate``, ``stream``, and ``lean``: by bin, used - p per cell since the sum was
        last zero (negative: overconfident); ``error``, the sum of their sizes, is that stretch's calibration
        error.
        """
        state, settings = self.state, self.baseline.settings
        lean_C = state.lean_C / state.lean_cells if state.lean_cells else np.zeros(settings.bins)
        return {
            "drifted": self.drifted,
            "alarm_at": state.alarm_at,
            "tokens": state.tokens,
            "statistic": round(state.statistic, 4),
            "peak": round(state.peak, 4),
            "threshold": round(self.baseline.threshold, 4),
            "alarm_rate": settings.alarm_rate,
            "stream": settings.stream,
            "lean": [round(value, 6) for value in lean_C.tolist()],
            "error": round(float(np.abs(lean_C).sum()), 6),
        }


def token_residuals(
    p_ME: Tensor, used_MK: Tensor, token_M: Tensor, tokens: int, bins: int
) -> tuple[Float, Float]:
    """Sums of used - p per token and bin ``[N, C]``, and the number of cells per token ``[N]``.

    Args:
        token_M: int64 in [0, tokens), the token each event belongs to.
    """
    bin_ME = (p_ME * bins).long().clamp_(0, bins - 1) + (token_M * bins)[:, None]
    size = tokens * bins
    mass = torch.bincount(bin_ME.flatten(), weights=p_ME.flatten().double(), minlength=size)
    used = torch.bincount(bin_ME.gather(1, used_MK).flatten(), minlength=size)
    cells_N = torch.bincount(token_M, minlength=tokens) * p_ME.shape[1]
    return (used - mass).view(tokens, bins).cpu().numpy(), cells_N.double().cpu().numpy()


@dataclass
class TokenStream:
    """Residuals of many tokens in order, with the document of each.

    Shapes:
        residual_NC, cells_N: see :func:`token_residuals`; document_N: int64.
    """

    residual_NC: Float
    cells_N: Float
    document_N: Int

    @classmethod
    def join(cls, parts: Iterable[TokenStream]) -> TokenStream:
        """One after the other."""
        found = list(parts)
        return cls(
            np.concatenate([part.residual_NC for part in found]),
            np.concatenate([part.cells_N for part in found]),
            np.concatenate([part.document_N for part in found]),
        )

    def select(self, index_N: Any) -> TokenStream:
        """Some of the tokens, in the order of the index (or under a mask)."""
        return TokenStream(self.residual_NC[index_N], self.cells_N[index_N], self.document_N[index_N])

    def shuffled(self, generator: np.random.Generator, tokens: int) -> Int:
        """Indices of ``tokens`` tokens of whole documents in random order, all of them before any again."""
        order_N = np.argsort(self.document_N, kind="stable")
        starts = np.nonzero(np.diff(self.document_N[order_N], prepend=-1))[0]
        groups = np.split(order_N, starts[1:])
        chosen: list[Int] = []
        length = 0
        while length < tokens:
            for number in generator.permutation(len(groups)).tolist():
                chosen.append(groups[number])
                length += len(groups[number])
                if length >= tokens:
                    break
        return np.concatenate(chosen)[:tokens]

    def blocks(self, block: int) -> Float:
        """Contributions per cell of consecutive whole blocks, ``[S, C]``."""
        count = len(self.cells_N) // block
        residual_SC = (
            self.residual_NC[: count * block].reshape(count, block, self.residual_NC.shape[1]).sum(1)
        )
        cells_S1 = self.cells_N[: count * block].reshape(count, block).sum(1)[:, None]
        return residual_SC / np.maximum(cells_S1, 1)


def cusum_step(sum_RC: Float, z_RC: Float, reference: float) -> Float:
    """One step of Crosier's multivariate cumulative sum for R streams at once."""
    moved_RC = sum_RC + z_RC
    length_R1 = np.linalg.norm(moved_RC, axis=1, keepdims=True)
    return moved_RC * np.maximum(0.0, 1 - reference / np.maximum(length_R1, 1e-12))


def peaks(x_RSC: Float, mean_C: Float, whiten_CC: Float, reference: float) -> Float:
    """The largest statistic of each of R streams of S blocks, ``[R]``."""
    z_RSC = (x_RSC - mean_C) @ whiten_CC
    sum_RC = np.zeros(z_RSC[:, 0].shape)
    peak_R = np.zeros(len(z_RSC))
    for s in range(z_RSC.shape[1]):
        sum_RC = cusum_step(sum_RC, z_RSC[:, s], reference)
        peak_R = np.maximum(peak_R, np.linalg.norm(sum_RC, axis=1))
    return peak_R


def fit_baseline(stream: TokenStream, settings: DriftSettings | None = None) -> DriftBaseline:
    """Mean, whitening and threshold from the tokens of validation documents.

    Raises:
        ConfigError: if there are fewer than four documents, or less than two blocks of tokens in a half.
    """
    settings = settings or DriftSettings()
    documents = np.unique(stream.document_N)
    if len(documents) < 4:
        raise ConfigError(
            f"a drift monitor fitted on {len(documents)} documents has no false-alarm rate: give at least 4 "
            "validation documents"
        )
    generator = np.random.default_rng(settings.seed)
    found = []
    for _ in range(settings.splits):
        mixed = generator.permutation(documents)
        half = mixed[: len(mixed) // 2]
        mine_N = np.isin(stream.document_N, half)
        mean_C, whiten_CC = _moments(stream.select(mine_N), settings)
        streams_RSC = draw_streams(stream.select(~mine_N), settings, generator, settings.streams)
        found.append(peaks(streams_RSC, mean_C, whiten_CC, settings.reference))
    threshold = float(np.quantile(np.concatenate(found), 1 - settings.alarm_rate))
    threshold = max(threshold, settings.reference)  # what a single step forgets is no drift
    mean_C, whiten_CC = _moments(stream, settings)
    return DriftBaseline(settings, mean_C, whiten_CC, threshold, len(documents), len(stream.cells_N))


def draw_streams(
    stream: TokenStream, settings: DriftSettings, generator: np.random.Generator, count: int
) -> Float:
    """Blocks of ``count`` streams of whole documents in random order, ``[R, S, C]``."""
    return np.stack(
        [
            stream.select(stream.shuffled(generator, settings.stream)).blocks(settings.block)
            for _ in range(count)
        ]
    )


def false_alarms(
    baseline: DriftBaseline, stream: TokenStream, count: int = 200, seed: int = 1
) -> dict[str, Any]:
    """How many of ``count`` streams of whole documents in random order raise an alarm.

    Returns:
        ``rate``, ``streams``, ``stream`` (tokens each), ``documents``, ``median_peak``.
    """
    settings = baseline.settings
    streams_RSC = draw_streams(stream, settings, np.random.default_rng(seed), count)
    peak_R = peaks(streams_RSC, baseline.mean_C, baseline.whiten_CC, settings.reference)
    return {
        "rate": round(float((peak_R > baseline.threshold).mean()), 4),
        "streams": count,
        "stream": settings.stream,
        "documents": len(np.unique(stream.document_N)),
        "median_peak": round(float(np.median(peak_R)), 4),
    }


def watch(baseline: DriftBaseline, stream: TokenStream) -> DriftMonitor:
    """A monitor that has seen the stream's tokens, one by one."""
    monitor = DriftMonitor(baseline)
    for residual_C, cells in zip(stream.residual_NC, stream.cells_N.tolist(), strict=True):
        monitor.state = advance(baseline, monitor.state, residual_C, cells)
    return monitor


def _moments(stream: TokenStream, settings: DriftSettings) -> tuple[Float, Float]:
    """Mean of the blocks, and the factor that whitens them (a little ridge: some bins are almost empty)."""
    x_SC = stream.blocks(settings.block)
    if len(x_SC) < 2:
        raise ConfigError(
            f"{len(stream.cells_N)} validation tokens make no two blocks of {settings.block}: lower drift "
            "block or give more validation documents"
        )
    spread_CC = np.cov(x_SC.T)
    ridge = _RIDGE * np.trace(spread_CC) / settings.bins + 1e-18
    whiten_CC = np.linalg.cholesky(np.linalg.inv(spread_CC + ridge * np.eye(settings.bins)))
    return x_SC.mean(0), whiten_CC
