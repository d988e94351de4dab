"""A monitor that tells at run time that calibration has drifted: which way the forecasts lean, and how far.

Letters: N tokens, M events of one token, E experts per layer, K experts per token, P source points, H
horizons, G groups of (point, horizon), F scores, D documents.

The loader sees the true routing soon after each forecast. Per group of (kind of target, horizon, third of the
layers) and token the monitor adds up the score of the calibrator's own parameters,

    sum over experts of (used - p) ln(p / (1 - p))       and, for K > 1,       sum over experts of (used - p),

the slopes of the experts' own log-likelihoods in the inverse temperature and in the offset: positive where
forecasts are too timid (too low), negative where they are too sure (too high). Honest probabilities give zero
on average. No domain is exactly honest, so what counts is the direction: documents that were calibrated on
lean their own way, and their scatter says how much of each direction is usual.

Tokens of a document are alike, and a long document says less than many short ones. So the t-th token of a
document weighs about 1 / (1 + t / half)^2: a document of n tokens weighs n / (1 + n / half), which is what
its mean deserves if its own lean is as large as the noise of ``half`` of its tokens. With x the scores, their
mean and C (variance, per unit of weight, of a document's weighted sum) from validation documents, and S the
sum of weights w after so many tokens,

    statistic = |sum of w (x - mean)| / sqrt(S + S^2 / S_fit + warmup),    the length taken under C,

Hotelling's T with the uncertainty of the mean itself (S_fit is the weight that it was fitted on; Anderson, An
Introduction to Multivariate Statistical Analysis, ch. 5). C is shrunk towards no correlation. It costs O(E)
work per event and F numbers of memory.

The threshold knows no theory: again and again a baseline is fitted on one half of the validation documents,
and streams of a stated length made of the other half are monitored; it is the quantile of the largest
statistic of such streams, of whole documents or of their first ``half`` tokens, whichever is higher. That no
more than ``alarm_rate`` of such streams of in-domain documents raise an alarm holds as far as the validation
documents are like those to come.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specgate.errors import ConfigError
from specgate.traces.batch import KINDS, WITHIN

Float = NDArray[np.float64]
Int = NDArray[np.int64]
LIMIT = 4.0
"""Log-odds beyond this count as this."""
PARTS = ("early", "middle", "late")


@dataclass(frozen=True)
class DriftSettings:
    """How the monitor looks.

    Attributes:
        half: tokens of a document that weigh half of what an endless document does.
        block: tokens from one look at the statistic to the next.
        warmup: weight added to the evidence: little evidence raises no alarm.
        shrink: share of the correlations between scores that is not believed.
        alarm_rate: share of in-domain streams that may raise an alarm.
        stream: length of these streams, in tokens; the sum starts anew after so many tokens without alarm.
        splits, streams: halvings of the documents, and streams per halving, that the threshold comes from.
        seed: of both.
    """

    half: int = 256
    block: int = 128
    warmup: float = 384.0
    shrink: float = 0.2
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
        if not (self.half >= 1 and self.warmup >= 0 and 0 < self.shrink <= 1):
            raise ConfigError(
                f"drift half={self.half}, warmup={self.warmup}, shrink={self.shrink} make no monitor: "
                "choose half >= 1, warmup >= 0 and 0 < shrink <= 1"
            )

    def weight(self, age: int) -> float:
        """Weight of the token that has ``age`` tokens of its document before it."""
        return 1 / ((1 + age / self.half) * (1 + (age + 1) / self.half))


@dataclass(frozen=True)
class DriftBaseline:
    """What in-domain tokens look like, in numbers that are fixed once fitted.

    Attributes:
        names: of the F scores. weight: S_fit. threshold: of the statistic.
        documents, tokens: how many it was fitted on.

    Shapes:
        mean_F: weighted mean of the scores; whiten_FF: z = (x - mean_F) @ whiten_FF has unit variance.
    """

    settings: DriftSettings
    names: tuple[str, ...]
    mean_F: Float
    whiten_FF: Float
    weight: float
    threshold: float
    documents: int
    tokens: int

    def statistic(self, sum_NF: Float, weight_N: Float) -> Float:
        """The statistic of weighted sums of scores, ``[N]``."""
        z_NF = (sum_NF - weight_N[:, None] * self.mean_F) @ self.whiten_FF
        scale_N = weight_N + weight_N**2 / self.weight + self.settings.warmup
        return np.asarray(np.linalg.norm(z_NF, axis=1) / np.sqrt(np.maximum(scale_N, 1e-12)))

    def values(self) -> dict[str, Any]:
        """Tensors and plain values only, for a checkpoint."""
        plain = {k: getattr(self, k) for k in ("weight", "threshold", "documents", "tokens")}
        tensors = {k: torch.from_numpy(getattr(self, k).copy()) for k in ("mean_F", "whiten_FF")}
        return {"settings": asdict(self.settings), "names": list(self.names), **plain, **tensors}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> DriftBaseline:
        """What :meth:`values` gave."""
        kept = dict(values)
        settings, names = DriftSettings(**kept.pop("settings")), tuple(kept.pop("names"))
        arrays = {k: kept.pop(k).double().numpy() for k in ("mean_F", "whiten_FF")}
        return cls(settings=settings, names=names, **arrays, **kept)


@dataclass(frozen=True)
class DriftState:
    """The monitor's whole memory.

    Attributes:
        sum_F, weight: weighted sums since the stream began.
        tokens: seen since the start. statistic: at the last look. peak: largest so far.
        alarm_at: token at which the first alarm was raised, None so far.
    """

    sum_F: Float
    weight: float = 0.0
    tokens: int = 0
    statistic: float = 0.0
    peak: float = 0.0
    alarm_at: int | None = None


def advance(baseline: DriftBaseline, state: DriftState, score_F: Float, age: int) -> DriftState:
    """The state after one more token (a pure function).

    Args:
        score_F: see :func:`token_scores`. age: how many tokens of the same document (request) came before.
    """
    settings = baseline.settings
    begins = state.alarm_at is None and state.tokens % settings.stream == 0  # a new stream
    g = settings.weight(age)
    sum_F = (0.0 if begins else state.sum_F) + g * score_F
    weight, tokens = (0.0 if begins else state.weight) + g, state.tokens + 1
    if tokens % settings.block:
        return replace(state, sum_F=sum_F, weight=weight, tokens=tokens)
    statistic = float(baseline.statistic(sum_F[None], np.array([weight]))[0])
    alarm = tokens if state.alarm_at is None and statistic > baseline.threshold else state.alarm_at
    return DriftState(sum_F, weight, tokens, statistic, max(state.peak, statistic), alarm)


@dataclass
class DriftMonitor:
    """Watches one stream of forecasts.

    >>> monitor.update(p_ME, used_MK, group_M, age)   # after the routing of a token is known
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
        self.state = DriftState(np.zeros(len(self.baseline.names)))

    def update(self, p_ME: Tensor, used_MK: Tensor, group_M: Tensor, age: int) -> DriftState:
        """One token: its forecasts and what was used.

        Args:
            age: how many tokens of the same document or request came before; requests may alternate.

        Shapes:
            p_ME: calibrated probabilities of the token's M forecasts; used_MK: int64 experts used;
            group_M: int64, ``drift_groups(...)[0]`` at each forecast's (point, horizon).
        """
        zero_M = torch.zeros_like(group_M)
        groups = len(self.baseline.names) // (1 if used_MK.shape[1] == 1 else 2)
        score_1F = token_scores(p_ME, used_MK, group_M, zero_M, 1, groups)
        self.state = advance(self.baseline, self.state, score_1F[0], age)
        return self.state

    @property
    def drifted(self) -> bool:
        """Whether an alarm was raised since the last reset."""
        return self.state.alarm_at is not None

    def report(self) -> dict[str, Any]:
        """Plain values: ``drifted``, ``alarm_at`` (token), ``tokens``, ``statistic``, ``peak``,
        ``threshold``, ``alarm_rate``, ``stream``, and ``lean``: by score, its mean since the stream began
        less the usual one, per token (negative: more sure, or higher, than usual).
        """
        state, settings = self.state, self.baseline.settings
        mean_F = state.sum_F / state.weight - self.baseline.mean_F if state.weight else state.sum_F
        return {
            "drifted": self.drifted,
            "alarm_at": state.alarm_at,
            "tokens": state.tokens,
            "statistic": round(state.statistic, 4),
            "peak": round(state.peak, 4),
            "threshold": round(self.baseline.threshold, 4),
            "alarm_rate": settings.alarm_rate,
            "stream": settings.stream,
            "lean": {n: round(v, 6) for n, v in zip(self.baseline.names, mean_F.tolist(), strict=True)},
        }


def drift_groups(kind_PH: Tensor) -> tuple[Tensor, list[str]]:
    """Which group every (point, horizon) belongs to, ``[P, H]`` int64 (-1: none), and the groups' names.

    A group is a kind of target, a horizon (1, 2, 3 to 4, 5 to 8, ...) and, within the token, a third of the
    target layers: no more than a few dozen groups for any number of layers.
    """
    P, H = kind_PH.shape
    layers = P - 1
    found: dict[str, int] = {}
    group_PH = torch.full((P, H), -1, dtype=torch.int64)
    for kind in KINDS:
        for h0 in range(H):
            far = math.ceil(math.log2(h0 + 1))
            first, last = (h0 + 1, h0 + 1) if far < 2 else (2 ** (far - 1) + 1, min(2**far, H))
            ahead = f"N+{first}" if first == last else f"N+{first}..{last}"
            for p in (kind_PH[:, h0] == kind).nonzero().flatten().tolist():
                name = f"{KINDS[kind]} {ahead}"
                if kind == WITHIN:
                    name += f" {PARTS[(p + h0) * len(PARTS) // layers]}"
                group_PH[p, h0] = found.setdefault(name, len(found))
    return group_PH, list(found)


def score_names(groups: Iterable[str], top_k: int) -> tuple[str, ...]:
    """Names of the F scores: one per group, and for K > 1 another."""
    found = list(groups)
    return tuple(found if top_k == 1 else [f"{n} {what}" for what in ("slope", "offset") for n in found])


def token_scores(
    p_ME: Tensor, used_MK: Tensor, group_M: Tensor, token_M: Tensor, tokens: int, groups: int
) -> Float:
    """The scores of every token, ``[N, F]``: F = G for K = 1 (an offset changes no softmax), else 2 G.

    Args:
        token_M: int64 in [0, tokens), the token each event belongs to; group_M: int64 in [0, groups).
    """
    p_ME = p_ME.double()
    odds_ME = torch.logit(p_ME, 1e-9).clamp(-LIMIT, LIMIT)
    slope_M = odds_ME.gather(1, used_MK).sum(1) - (p_ME * odds_ME).sum(1)
    parts_M = [slope_M] if used_MK.shape[1] == 1 else [slope_M, used_MK.shape[1] - p_ME.sum(1)]
    at_M, size = token_M * groups + group_M, tokens * groups
    found = [torch.bincount(at_M, weights=part_M, minlength=size).view(tokens, groups) for part_M in parts_M]
    return np.asarray(torch.cat(found, 1).cpu().numpy())
