"""What policies would reach on a planned machine: simulations of a case, and what they come to per token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from specgate.errors import BudgetError
from specgate.policy.costs import Costs
from specgate.policy.registry import policy
from specgate.policy.roofline import ModelSizes, step_tokens
from specgate.report.plan_case import Case, Timing
from specgate.runtime.simulator import simulate

#: Policy -> what a reader is told.
POLICIES = {
    "on_demand": "no cache: every expert is loaded when it is needed",
    "lru": "a cache of experts, least recently used out first; no prediction",
    "lfru": "a cache of experts, least often used out first, old uses counting less; no prediction",
    "priced": "fetches ahead, keeps and evicts by the price of a forecast",
    "oracle": "knows the future: no predictor can do better",
}
PREDICTION, BEST = "priced", "oracle"
#: Without prediction; the better of them is what prediction has to beat.
CACHES = ("lru", "lfru")
COUNTED = (
    *("hits", "late", "host_hits", "misses", "demand_bytes", "prefetch_bytes", "wasted_bytes", "file_bytes"),
    *("steps", "total_ns", "stall_ns", "link_busy_ns"),
)


@dataclass(frozen=True)
class Outcome:
    """Totals of the documents that count.

    Attributes:
        hits, late, host_hits, misses: demanded experts: on the device, on their way, in host memory, in the
            file.
        demand_bytes, prefetch_bytes, wasted_bytes: over the link. file_bytes: read.
        steps, tokens: of decoding. total_ns, stall_ns, link_busy_ns: their time.
    """

    hits: float
    late: float
    host_hits: float
    misses: float
    demand_bytes: float
    prefetch_bytes: float
    wasted_bytes: float
    file_bytes: float
    steps: float
    tokens: float
    total_ns: float
    stall_ns: float
    link_busy_ns: float

    @property
    def demands(self) -> float:
        """Experts that events asked for."""
        return self.hits + self.late + self.host_hits + self.misses


#: Policy, case, costs, slots, experts in host memory -> what happened.
Run = Callable[[str, Case, Timing, int, int], Outcome]


def run_policy(name: str, case: Case, timing: Timing, slots: int, host: int) -> Outcome:
    """One policy, fitted on the training documents and simulated on the others.

    Raises:
        BudgetError: if an event needs more than the slots.
    """
    chosen = policy(name)
    train = case.train
    work = case.foreseen(chosen)
    rules = chosen.fit(train, timing.train, max(slots, train.widest))
    warmest = np.argsort(train.use_counts_LE().reshape(-1), kind="stable")[case.blocks - host :]
    room = chosen.slots_of(train, slots)
    result = simulate(work, timing.run, rules, room, host, warm_host=warmest.tolist())
    counted = {key: float(result.of_documents(key)[case.warmup :].sum()) for key in COUNTED}
    return Outcome(**counted, tokens=float(result.tokens_D[case.warmup :].sum()))


def row_of(name: str, outcome: Outcome, timing: Timing, bytes_per_expert: int) -> dict[str, Any]:
    """An outcome per token of the planned model."""
    # Where another model's routing stands in, a step of the planned model is so many of the case's.
    whole_ns = outcome.total_ns * timing.steps_per_step
    unit = timing.steps_per_step / max(1.0, outcome.tokens)
    return {
        "policy": name,
        "about": POLICIES.get(name, ""),
        "tokens_per_second": outcome.tokens * 1e9 / whole_ns,
        "ms_per_step": whole_ns * 1e-6 / max(1.0, outcome.steps),
        "hit_rate": outcome.hits / max(1.0, outcome.demands),
        "late_rate": outcome.late / max(1.0, outcome.demands),
        "file_rate": outcome.misses / max(1.0, outcome.demands),
        "stall_share": outcome.stall_ns / max(1.0, outcome.total_ns),
        "link_share": outcome.link_busy_ns / max(1.0, outcome.total_ns),
        "demand_bytes": outcome.demand_bytes * unit,
        "prefetch_bytes": outcome.prefetch_bytes * unit,
        "wasted_bytes": outcome.wasted_bytes * unit,
        "file_bytes": outcome.file_bytes * unit,
        "expert_bytes": bytes_per_expert,
    }


def resident_row(case: Case, timing: Timing, bytes_per_expert: int) -> dict[str, Any]:
    """With every expert on the device: what no policy can beat."""
    work = case.together(case.documents)
    first = int(np.searchsorted(work.document_S, case.warmup))
    counted = work.part(first, work.steps)
    costs = timing.run.part(first * work.layers, work.events)
    values = dict.fromkeys((*COUNTED, "tokens"), 0.0)
    values |= {"hits": float(len(counted.expert_M)), "steps": float(counted.steps)}
    values |= {"tokens": float(step_tokens(counted).sum()), "total_ns": costs.compute_ns}
    row = row_of("resident", Outcome(**values), timing, bytes_per_expert)
    return row | {"about": "every expert on the device: what the machine's memory and kernels allow"}


def binds(row: Mapping[str, Any], shares: Mapping[str, float], costs: Costs) -> str:
    """What takes most of a policy's time: ``link``, ``file``, or what bounds the device's work.

    Args:
        row: see :func:`row_of`.
        shares: of the time with everything on the device (see :class:`specgate.policy.roofline.Roofline`).
    """
    stall = float(row["stall_share"])
    moved = float(row["demand_bytes"]) + float(row["prefetch_bytes"])
    copying = moved / costs.expert_bytes * costs.copy_ns
    reading = float(row["file_bytes"]) / costs.expert_bytes * costs.read_ns
    waits = {"file" if reading > copying else "link": stall}
    parts = waits | {name: (1 - stall) * share for name, share in shares.items()}
    return max(parts, key=lambda name: parts[name])


def run_all(
    case: Case, timing: Timing, slots: int, host: int, run: Run = run_policy, names: Any = tuple(POLICIES)
) -> list[dict[str, Any]]:
    """Rows of some policies with so many slots of the case's experts, and of everything on the device.

    Args:
        slots: of the case's model, see :func:`case_slots`.
        host: its experts that lie in host memory.

    Raises:
        BudgetError: if an event needs more than the slots.
    """
    size = timing.run.expert_bytes
    resident = resident_row(case, timing, size)
    if slots >= case.blocks:
        rows = [resident | {"policy": name, "about": POLICIES[name]} for name in names]
    else:
        rows = [row_of(n, run(n, case, timing, slots, host), timing, size) for n in names]
    rows.append(resident)
    for row in rows:
        row["binds"] = binds(row, timing.shares, timing.run)
    base = base_of(rows)
    oracle = next((row["ms_per_step"] for row in rows if row["policy"] == BEST), base["ms_per_step"])
    gain = base["ms_per_step"] - oracle
    for row in rows:
        saved = base["ms_per_step"] - row["ms_per_step"]
        row["share_of_gain"] = saved / gain if gain > 1e-9 * base["ms_per_step"] else None
    return rows


def base_of(rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The faster of the caches without prediction."""
    return max((row for row in rows if row["policy"] in CACHES), key=lambda row: row["tokens_per_second"])


def case_slots(slots: int, sizes: ModelSizes, case: Case) -> int:
    """As many of the case's experts as ``slots`` are of the planned model's.

    With another model's routing the measure is what a step uses: a cache of one step's experts stays a cache
    of one step's experts, one of all stays one of all, and between them shares go over evenly.

    Raises:
        BudgetError: if not even one event of the case fits.
    """
    blocks = sizes.layers * sizes.experts
    if slots >= blocks:
        return case.blocks
    widest = max(case.train.widest, case.together(case.documents).widest)
    if case.own:
        if slots < widest:
            raise BudgetError(
                f"{slots} slots hold fewer experts than the {widest} that one step of {case.batch_size} "
                "sequences can need at once; raise budget_gb, or lower plan.batch_size."
            )
        return slots
    mine = 1 - (1 - sizes.top_k / sizes.experts) ** case.batch_size
    theirs = 1 - (1 - case.train.top_k / case.train.experts) ** case.batch_size
    share = scaled_share(slots / blocks, mine, theirs)
    return min(case.blocks, max(widest, round(share * case.blocks)))


def scaled_share(share: float, mine: float, theirs: float) -> float:
    """A share of one model's experts as one of another's, in the measure of what a step uses of each.

    Args:
        share: of the first model's experts. mine, theirs: shares of their experts that a step uses.
    """
    if share <= mine or mine >= 1 or theirs >= 1:
        return min(1.0, share / mine * theirs)
    return theirs + (share - mine) / (1 - mine) * (1 - theirs)
