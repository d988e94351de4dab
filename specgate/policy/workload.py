"""What a model asks of its experts, call by call, and what was foreseen: the input of a simulation.

Letters: L MoE layers, E experts of a layer, K experts per token, S steps, N = S * L events, M entries of a
list of lists, P = S * (L + 1) points, H horizons.

A step decodes one token of every sequence of a batch, or reads one piece of a prompt. An event is one MoE
layer of a step: its experts are needed at once. Event n is layer ``n % L`` of step ``n // L``. Point p = 0 of
a step lies before its first MoE layer, p = l + 1 where layer l's router has chosen; a forecast of point p at
horizon h is about event ``step * L + p + h - 1``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from specgate.errors import ConfigError

Int = NDArray[np.int64]
Small = NDArray[np.int32]
Float = NDArray[np.float32]
NO_EXPERT = -1
"""Of a token that a layer's capacity dropped."""


@dataclass(frozen=True, eq=False)
class Forecasts:
    """Probabilities that experts are used, a list per point, nearest horizon and most probable first.

    Attributes:
        start_P1: where each point's list begins; the last is M.
        horizon_M: uint8, 1 is the next event.
        expert_M: int32.
        p_M: float32, 0 to 1.
    """

    start_P1: Int
    horizon_M: NDArray[np.uint8]
    expert_M: Small
    p_M: Float

    def __post_init__(self) -> None:
        M = len(self.expert_M)
        if len(self.horizon_M) != M or len(self.p_M) != M or self.start_P1[-1] != M or self.start_P1[0] != 0:
            raise ConfigError(
                f"Forecasts have lists of {M} experts that do not fit together; make them anew."
            )
        if M and not (float(self.p_M.min()) >= 0 and float(self.p_M.max()) <= 1):
            raise ConfigError(f"A forecast says p={float(self.p_M.max())}; probabilities are 0 to 1.")

    def at(self, point: int) -> Iterator[tuple[int, int, float]]:
        """Horizon, expert and probability of each entry of a point."""
        for i in range(int(self.start_P1[point]), int(self.start_P1[point + 1])):
            yield int(self.horizon_M[i]), int(self.expert_M[i]), float(self.p_M[i])

    @classmethod
    def from_dense(cls, p_PHE: NDArray[np.floating], least: float = 0.0) -> Forecasts:
        """Those of at least ``least`` (and above 0) of dense probabilities ``[P, H, E]``."""
        p_PHE = np.asarray(p_PHE, dtype=np.float32)
        P, H, _ = p_PHE.shape
        point_M, horizon_M, expert_M = np.nonzero((p_PHE >= least) & (p_PHE > 0))
        p_M = p_PHE[point_M, horizon_M, expert_M]
        rank_M = (point_M * H + horizon_M) << 32  # one key: positive floats are in the order of their bits
        order = np.argsort(rank_M + (2**32 - 1 - p_M.view(np.uint32).astype(np.int64)), kind="stable")
        start_P1 = np.zeros(P + 1, dtype=np.int64)
        np.cumsum(np.bincount(point_M, minlength=P), out=start_P1[1:])
        return cls(
            start_P1,
            (horizon_M[order] + 1).astype(np.uint8),
            expert_M[order].astype(np.int32),
            p_M[order].astype(np.float32),
        )


@dataclass(frozen=True, eq=False)
class Workload:
    """Steps of one or more documents, one after the other.

    Attributes:
        layers, experts, top_k: L, E, K.
        event_start_N1: where each event's experts begin; the last is M.
        expert_M: int32, ascending within an event.
        tokens_M: int32, how many tokens each of them serves in that event.
        document_S: int32, the document that each step belongs to: 0, 1, ... ascending.
        forecasts: what was foreseen, or None.
        names: of the documents.
    """

    layers: int
    experts: int
    top_k: int
    event_start_N1: Int
    expert_M: Small
    tokens_M: Small
    document_S: Small
    forecasts: Forecasts | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        N, M = len(self.event_start_N1) - 1, len(self.expert_M)
        if len(self.document_S) * self.layers != N or self.event_start_N1[-1] != M or len(self.tokens_M) != M:
            raise ConfigError(
                f"{N} events of {M} experts are not {len(self.document_S)} steps of {self.layers} layers; "
                "make the workload anew."
            )
        if M and not (int(self.expert_M.min()) >= 0 and int(self.expert_M.max()) < self.experts):
            raise ConfigError(f"Expert {int(self.expert_M.max())} is none of the {self.experts} of a layer.")
        if self.forecasts is not None and len(self.forecasts.start_P1) != self.points + 1:
            raise ConfigError(
                f"Forecasts of {len(self.forecasts.start_P1) - 1} points do not fit {self.points} points."
            )

    @property
    def steps(self) -> int:
        """S."""
        return len(self.document_S)

    @property
    def events(self) -> int:
        """N."""
        return len(self.event_start_N1) - 1

    @property
    def points(self) -> int:
        """P."""
        return self.steps * (self.layers + 1)

    @property
    def documents(self) -> int:
        """How many documents."""
        return int(self.document_S[-1]) + 1 if self.steps else 0

    @property
    def widest(self) -> int:
        """Experts of the largest event: with fewer slots it cannot be run."""
        return int(np.diff(self.event_start_N1).max(initial=0))

    def event(self, n: int) -> list[int]:
        """Experts of event n, ascending."""
        return [int(e) for e in self.expert_M[self.event_start_N1[n] : self.event_start_N1[n + 1]]]

    def event_layers_M(self) -> Small:
        """The layer of each entry of ``expert_M``."""
        of_N = np.arange(self.events, dtype=np.int64) % self.layers
        return np.repeat(of_N, np.diff(self.event_start_N1)).astype(np.int32)

    def use_counts_LE(self) -> Int:
        """In how many events each expert is used."""
        counts = np.zeros(self.layers * self.experts, dtype=np.int64)
        np.add.at(counts, self.event_layers_M().astype(np.int64) * self.experts + self.expert_M, 1)
        return counts.reshape(self.layers, self.experts)

    def with_forecasts(self, forecasts: Forecasts | None) -> Workload:
        """The same calls with other foresight."""
        return replace(self, forecasts=forecasts)

    def document(self, d: int) -> Workload:
        """One document alone."""
        steps = np.nonzero(self.document_S == d)[0]
        return self.part(int(steps[0]), int(steps[-1]) + 1)

    def part(self, first: int, last: int) -> Workload:
        """Steps ``first`` to ``last`` - 1; documents are counted from 0 again."""
        L = self.layers
        start = self.event_start_N1[first * L : last * L + 1]
        forecasts = None
        if self.forecasts is not None:
            f = self.forecasts
            points = f.start_P1[first * (L + 1) : last * (L + 1) + 1]
            cut = slice(int(points[0]), int(points[-1]))
            forecasts = Forecasts(points - points[0], f.horizon_M[cut], f.expert_M[cut], f.p_M[cut])
        cut = slice(int(start[0]), int(start[-1]))
        of_S = self.document_S[first:last]
        names = self.names[int(of_S[0]) : int(of_S[-1]) + 1] if len(of_S) else ()
        return replace(
            self,
            event_start_N1=start - start[0],
            expert_M=self.expert_M[cut],
            tokens_M=self.tokens_M[cut],
            document_S=(of_S - of_S[0]).astype(np.int32) if len(of_S) else of_S,
            forecasts=forecasts,
            names=names,
        )


def decoding(
    documents: Sequence[NDArray[np.integer]], experts: int, names: Sequence[str] = (), chunk: int = 1
) -> Workload:
    """Documents that are decoded token by token, one sequence at a time.

    Args:
        documents: experts ``[T, L, K]`` of each token; NO_EXPERT where it was dropped (a Switch layer's
            capacity) and needs none.
        experts: E.
        chunk: tokens of a step: 1 decodes, more read a prompt in pieces.

    Raises:
        ConfigError: no documents, or of different shapes.
    """
    if not documents or len({d.shape[1:] for d in documents}) != 1:
        raise ConfigError(
            "A workload needs documents of one model, [T, L, K] each; there are none, or several."
        )
    _, L, K = documents[0].shape
    rows_DSCLK = [
        [d[t : t + chunk] for t in range(0, len(d), chunk)] for d in documents
    ]  # C tokens in each, the last may be shorter
    used: list[NDArray[np.int64]] = []
    for pieces in rows_DSCLK:
        for piece_CLK in pieces:
            counts_LE = np.zeros((L, experts), dtype=np.int64)
            layer_CLK = np.broadcast_to(np.arange(L)[None, :, None], piece_CLK.shape)
            needed_CLK = piece_CLK != NO_EXPERT
            at = (layer_CLK[needed_CLK], piece_CLK[needed_CLK].astype(np.int64))
            np.add.at(counts_LE, at, 1)
            used.append(counts_LE)
    of_S = np.repeat(np.arange(len(documents)), [len(p) for p in rows_DSCLK]).astype(np.int32)
    return _from_counts(np.stack(used), K, of_S, tuple(names))


def _from_counts(
    counts_SLE: NDArray[np.int64], top_k: int, document_S: Small, names: tuple[str, ...]
) -> Workload:
    S, L, E = counts_SLE.shape
    flat_NE = counts_SLE.reshape(S * L, E)
    event_M, expert_M = np.nonzero(flat_NE)
    start_N1 = np.zeros(S * L + 1, dtype=np.int64)
    np.cumsum(np.bincount(event_M, minlength=S * L), out=start_N1[1:])
    tokens_M = flat_NE[event_M, expert_M].astype(np.int32)
    return Workload(L, E, top_k, start_N1, expert_M.astype(np.int32), tokens_M, document_S, None, names)


def oracle_forecasts(workload: Workload, depth: int) -> Forecasts:
    """What one foresees who knows the next ``depth`` events of the same document, each with p = 1."""
    L, S, N = workload.layers, workload.steps, workload.events
    counts = np.diff(workload.event_start_N1)
    point_P = np.arange(workload.points)
    first_P = (point_P // (L + 1)) * L + point_P % (L + 1)  # the event of horizon 1
    document_N = np.repeat(workload.document_S, L)
    own_P = np.repeat(workload.document_S, L + 1)
    parts: list[tuple[Int, Int, Small]] = []
    for h in range(1, depth + 1):
        event_P = first_P + h - 1
        inside_P = event_P < N
        inside_P[inside_P] &= document_N[event_P[inside_P]] == own_P[inside_P]
        points, events = point_P[inside_P], event_P[inside_P]
        at = np.repeat(workload.event_start_N1[events], counts[events])
        at += np.arange(len(at)) - np.repeat(np.cumsum(counts[events]) - counts[events], counts[events])
        expert_M = workload.expert_M[at]
        parts.append((np.repeat(points, counts[events]), np.full(len(at), h), expert_M))
    point_M = np.concatenate([p for p, _, _ in parts])
    horizon_M = np.concatenate([h for _, h, _ in parts])
    expert_M = np.concatenate([e for _, _, e in parts])
    order = np.lexsort((expert_M, horizon_M, point_M))
    start_P1 = np.zeros(S * (L + 1) + 1, dtype=np.int64)
    np.cumsum(np.bincount(point_M, minlength=S * (L + 1)), out=start_P1[1:])
    ones = np.ones(len(order), dtype=np.float32)
    return Forecasts(start_P1, horizon_M[order].astype(np.uint8), expert_M[order].astype(np.int32), ones)


def merge(workloads: Sequence[Workload]) -> Workload:
    """One document each, decoded together as a batch: step s of all of them is one step.

    A sequence that has ended takes no part any more. Forecasts: P(any needs it) = 1 - prod(1 - p).

    Raises:
        ConfigError: workloads of different models, or not one document each.
    """
    shapes = {(w.layers, w.experts, w.top_k) for w in workloads}
    if len(shapes) != 1 or any(w.documents != 1 for w in workloads):
        raise ConfigError(f"A batch is made of one document of one model each, not of {sorted(shapes)}.")
    ((L, E, K),) = shapes
    S = max(w.steps for w in workloads)
    counts_SLE = np.zeros((S, L, E), dtype=np.int64)
    for w in workloads:
        flat = counts_SLE[: w.steps].reshape(w.steps * L, E)
        event_M = np.repeat(np.arange(w.events), np.diff(w.event_start_N1))
        np.add.at(flat, (event_M, w.expert_M), w.tokens_M)
    merged = _from_counts(
        counts_SLE, K, np.zeros(S, dtype=np.int32), ("+".join(n for w in workloads for n in w.names),)
    )
    if any(w.forecasts is None for w in workloads):
        return merged
    P, H = merged.points, max(int(w.forecasts.horizon_M.max(initial=1)) for w in workloads if w.forecasts)
    spared_PHE = np.ones((P, H, E), dtype=np.float32)
    for w in workloads:
        f = w.forecasts
        assert f is not None
        point_M = np.repeat(np.arange(w.points), np.diff(f.start_P1))
        spared_PHE[point_M, f.horizon_M.astype(np.int64) - 1, f.expert_M] *= 1 - f.p_M
    return merged.with_forecasts(Forecasts.from_dense(1 - spared_PHE))


def join(workloads: Sequence[Workload]) -> Workload:
    """Workloads of one model, one after the other.

    Raises:
        ConfigError: of different models, or only some with forecasts.
    """
    shapes = {(w.layers, w.experts, w.top_k, w.forecasts is None) for w in workloads}
    if len(shapes) != 1:
        raise ConfigError("Workloads of one model, all with forecasts or all without, can be joined.")
    ((L, E, K, _),) = shapes
    starts, points, of_S = [np.zeros(1, dtype=np.int64)], [np.zeros(1, dtype=np.int64)], []
    at = entries = first = 0
    for w in workloads:
        starts.append(w.event_start_N1[1:] + at)
        at += len(w.expert_M)
        of_S.append(w.document_S + first)
        first += w.documents
        if w.forecasts is not None:
            points.append(w.forecasts.start_P1[1:] + entries)
            entries += len(w.forecasts.expert_M)
    forecasts = None
    found = [w.forecasts for w in workloads if w.forecasts is not None]
    if found:
        forecasts = Forecasts(
            np.concatenate(points),
            np.concatenate([f.horizon_M for f in found]),
            np.concatenate([f.expert_M for f in found]),
            np.concatenate([f.p_M for f in found]),
        )
    return Workload(
        L,
        E,
        K,
        np.concatenate(starts),
        np.concatenate([w.expert_M for w in workloads]),
        np.concatenate([w.tokens_M for w in workloads]),
        np.concatenate(of_S).astype(np.int32),
        forecasts,
        tuple(name for w in workloads for name in w.names),
    )
