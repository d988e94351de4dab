"""Whose routing a plan is simulated with: the model's own trace, or another model's in its place.

Letters: L MoE layers, E experts of a layer, K experts per token, N events, M entries of a list of lists, H
horizons, S steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from specgate.calibration.load import find_checkpoint, load_predictor
from specgate.errors import ConfigError
from specgate.policy.base import Policy
from specgate.policy.costs import Costs
from specgate.policy.hardware import Hardware
from specgate.policy.roofline import RUNTIMES, ModelSizes, costs_of, roofline
from specgate.policy.workload import Forecasts, Workload, decoding, join, merge, oracle_forecasts
from specgate.predictors.base import Predictor
from specgate.report.identity import trace_identity
from specgate.report.plan_sample import load_sample
from specgate.report.plan_settings import PlanSettings
from specgate.report.simulate_trace import documents_of
from specgate.runtime.store_settings import StoreSettings
from specgate.traces.datamodule import RoutingDataModule


@dataclass(frozen=True, eq=False)
class Case:
    """Documents that a plan is simulated with.

    Attributes:
        name: of the trace. own: whether it is the model's own; else its routing stands in.
        train: documents that policies are fitted on, with forecasts.
        documents: one by one, with forecasts.
        batch_size: so many are decoded together. warmup: batches that are not counted.
        forecasts: whose, in words.
        identity: of the trace, plain values; empty for routing that comes with specgate.
        missing: traces that were named and are not there.
        seen: what policies foresaw, by name.
    """

    name: str
    own: bool
    train: Workload
    documents: tuple[Workload, ...]
    batch_size: int
    warmup: int
    forecasts: str
    identity: dict[str, Any]
    missing: tuple[str, ...] = ()
    seen: dict[str, Workload] = field(default_factory=dict, repr=False)

    def foreseen(self, policy: Policy) -> Workload:
        """All documents as a policy sees them, in batches; worked out once."""
        if policy.name not in self.seen:
            documents = [d.with_forecasts(policy.foresee(self.train, d)) for d in self.documents]
            self.seen[policy.name] = self.together(documents)
        return self.seen[policy.name]

    @property
    def blocks(self) -> int:
        """Experts of the trace's model, over all layers."""
        return self.train.layers * self.train.experts

    def together(self, documents: Sequence[Workload]) -> Workload:
        """Documents in batches, one after the other."""
        size = self.batch_size
        groups = [documents[i : i + size] for i in range(0, len(documents) - size + 1, size)]
        return join([merge(group) if size > 1 else group[0] for group in groups])


@dataclass(frozen=True)
class Timing:
    """What the events of a case cost.

    Attributes:
        train, run: of the documents that policies are fitted on, and of those that are run.
        steps_per_step: steps of the model for one of the case, in time: L over the case's L.
        shares: what bounds the time if everything is on the device.
    """

    train: Costs
    run: Costs
    steps_per_step: float
    shares: dict[str, float]


def choose_case(
    settings: PlanSettings, sizes: ModelSizes, family: str, traces: Mapping[str, RoutingDataModule]
) -> Case:
    """The trace of the model's own shape if there is one among ``traces``, else the first that was recorded
    while decoding, else the routing of a bundled model.

    Args:
        family: of the architecture.

    Raises:
        ConfigError: too few documents, or a predictor for another trace.
        TraceError: a damaged trace.
    """
    there = {name: data for name, data in traces.items() if all(Path(p).exists() for p in data.paths)}
    missing = tuple(name for name in traces if name not in there)
    want = (sizes.layers, sizes.experts, sizes.top_k)
    own = [n for n, d in there.items() if (d.spec.layers, d.spec.experts, d.spec.top_k) == want]
    if settings.checkpoints and not own:
        raise ConfigError(
            f"plan.checkpoints names a predictor, and there is no trace of {sizes.name} that it could "
            "foresee; leave it out, or name the model's trace with data=."
        )
    count = (settings.documents + settings.warmup) * settings.batch_size
    predictor = None
    decoded = [n for n, d in there.items() if d.spec.phase == "decode"]
    usable = [*(n for n in own if n in decoded), *own, *decoded]
    if usable:
        name = usable[0]
        if settings.checkpoints:
            predictor = load_predictor(find_checkpoint(settings.checkpoints[0]))
        documents = _documents(there[name], settings.split, count, settings, predictor, settings.seed)
        fitted = settings.train_documents
        train = _documents(there[name], "train", fitted, settings, predictor, settings.seed + 1)
        identity = trace_identity(there[name], name)
    else:
        sample = load_sample(family, settings.tokens)
        name, identity = sample.name, {}
        own = [name] if name == sizes.name else []
        documents = _with_forecasts(sample.documents["validation"][:count], settings, settings.seed)
        train = sample.documents["train"][: settings.train_documents]
        train = _with_forecasts(train, settings, settings.seed + 1)
    if len(documents) < (settings.warmup + 1) * settings.batch_size:
        raise ConfigError(
            f"There are {len(documents)} documents of {name}, too few for plan.batch_size="
            f"{settings.batch_size} and plan.warmup={settings.warmup}; write less of them."
        )
    shares = " / ".join(f"{100 * r:g}" for r in settings.recall)
    words = f"that foresee {shares} % of the experts used" if predictor is None else f"of {predictor.name}"
    return Case(
        name, bool(own), join(train), tuple(documents), settings.batch_size, settings.warmup, words,
        identity, missing,
    )  # fmt: skip


def _documents(
    data: RoutingDataModule,
    split: str,
    count: int,
    settings: PlanSettings,
    predictor: Predictor | None,
    seed: int,
) -> list[Workload]:
    foreseen = {} if predictor is None else {"predictor": predictor}
    found = documents_of(data, split, count, settings.tokens, foreseen)
    if predictor is not None:
        return found["predictor"]
    return _with_forecasts(found["none"], settings, seed)


def _with_forecasts(documents: Sequence[Workload], settings: PlanSettings, seed: int) -> list[Workload]:
    return [
        work.with_forecasts(likely_forecasts(work, settings.recall, seed + 1000 * i))
        for i, work in enumerate(documents)
    ]


def likely_forecasts(workload: Workload, recall: Sequence[float], seed: int) -> Forecasts:
    """Honest forecasts that name as many experts as are used, the share ``recall[h - 1]`` of them rightly.

    Each name has a confidence q, drawn from a Beta distribution with mean ``recall`` (a + b = 2: often sure,
    sometimes not); it says p = q and is right with probability q. A wrong one is another expert of the layer,
    drawn as often as the document uses it. What is said of an event at several horizons has one origin, so
    that a forecast corrects itself as it comes nearer, instead of naming ever new experts.
    """
    rng = np.random.default_rng(seed)
    L, E = workload.layers, workload.experts
    event_M = np.repeat(np.arange(workload.events), np.diff(workload.event_start_N1))
    place_M = np.arange(len(event_M)) - workload.event_start_N1[event_M]
    nearest = float(np.clip(recall[0], 1e-6, 1 - 1e-6))
    sure_M = (
        rng.beta(2 * nearest, 2 * (1 - nearest), len(event_M)) if recall[0] < 1 else np.ones(len(event_M))
    )
    luck_M = rng.random(len(event_M))
    # The Gumbel trick draws without replacement, by weight; what is really used is left out.
    key_NE = np.log(workload.use_counts_LE() + 1.0)[np.arange(workload.events) % L]
    key_NE = key_NE + rng.gumbel(size=key_NE.shape)
    key_NE[event_M, workload.expert_M] = -np.inf
    order_NE = np.argsort(-key_NE, axis=1, kind="stable")
    other_M = order_NE[event_M, place_M.clip(max=E - 1)]
    there_M = np.isfinite(key_NE[event_M, other_M])

    known = oracle_forecasts(workload, len(recall))
    point_M = np.repeat(np.arange(workload.points), np.diff(known.start_P1))
    horizon_M = known.horizon_M.astype(np.int64) - 1
    about_M = (point_M // (L + 1)) * L + point_M % (L + 1) + horizon_M
    entry_M = np.searchsorted(event_M * E + workload.expert_M, about_M * E + known.expert_M)
    p_M = np.minimum(1.0, sure_M[entry_M] * np.asarray(recall, dtype=np.float64)[horizon_M] / recall[0])
    right = luck_M[entry_M] < p_M
    named = right | there_M[entry_M]
    expert_M = np.where(right, known.expert_M, other_M[entry_M])
    p_PHE = np.zeros((workload.points, len(recall), E), dtype=np.float32)
    p_PHE[point_M[named], horizon_M[named], expert_M[named]] = p_M[named]
    return Forecasts.from_dense(p_PHE)


def timing(
    case: Case, sizes: ModelSizes, hardware: Hardware, settings: PlanSettings, block_bytes: int, context: int
) -> Timing:
    """Costs of the case's events on the machine.

    Where another model's routing stands in, each of its events takes what an event of the planned model takes
    on average, and its experts are as many bytes as those of such an event in all.
    """
    work = case.together(case.documents)
    runtime = RUNTIMES[settings.runtime]
    pieces = StoreSettings().chunk_bytes

    def costs(of: Workload) -> Costs:
        return costs_of(
            sizes,
            of,
            hardware,
            block_bytes=block_bytes,
            context=context,
            runtime=runtime,
            chunk_bytes=pieces,
            piece_bytes=StoreSettings().piece_bytes,
        )

    if case.own:
        shares = roofline(sizes, work, hardware, context, runtime=runtime).shares
        return Timing(costs(case.train), costs(work), 1.0, shares)
    like = _likeness(sizes, settings.batch_size, settings.seed)
    times, base = roofline(sizes, like, hardware, context, runtime=runtime), costs(like)
    ratio = (len(like.expert_M) / like.events) / (len(work.expert_M) / work.events)

    def stretched(of: Workload) -> Costs:
        return replace(
            base,
            expert_bytes=max(1, round(base.expert_bytes * ratio)),
            link_latency_ns=base.link_latency_ns * ratio,
            file_latency_ns=base.file_latency_ns * ratio,
            pre_ns_N=_mean(times.pre_ns_N, of.events),
            exec_ns_N=_mean(times.exec_ns_N, of.events),
            launch_ns_N=_mean(times.launch_ns_N, of.events),
            host_pre_ns_N=_mean(times.host_pre_ns_N, of.events),
            host_exec_ns_N=_mean(times.host_exec_ns_N, of.events),
        )

    return Timing(stretched(case.train), stretched(work), sizes.layers / work.layers, times.shares)


def _mean(values_N: Any, events: int) -> Any:
    return None if values_N is None else np.full(events, float(values_N.mean()))


def _likeness(sizes: ModelSizes, batch_size: int, seed: int) -> Workload:
    """Steps of a batch whose tokens choose their experts at random: for times, never for what is cached."""
    rng = np.random.default_rng(seed)
    keys_TLE = rng.random((8 * batch_size, sizes.layers, sizes.experts))
    experts_TLK = np.argsort(keys_TLE, axis=-1)[..., : sizes.top_k]
    return decoding([experts_TLK], sizes.experts, chunk=batch_size)
