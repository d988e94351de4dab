"""benchmark.py mode=plan: does a model fit a machine, how fast will it run, and is prediction worth it?

Nothing is loaded and nothing of the planned model runs: sizes come from its configuration, times from a
roofline (specgate.policy.roofline), hit rates from simulating a real trace. docs/planner.md says how far to
trust which of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console

from specgate.moe.offload_plan import GB, size, typed_gb
from specgate.policy.hardware import Hardware
from specgate.policy.roofline import ModelSizes
from specgate.report.plan_case import Case, choose_case, timing
from specgate.report.plan_run import BEST, CACHES, PREDICTION, Run, case_slots, run_all, run_policy
from specgate.report.plan_settings import PlanSettings
from specgate.report.plan_sizes import Footprint, footprint, sizes_of
from specgate.report.plan_verdict import verdict
from specgate.report.replay_shape import ModelShape
from specgate.runtime.layout import CODECS
from specgate.traces.datamodule import RoutingDataModule

#: Contexts that are tried beside the one asked for, as multiples of it.
CONTEXTS = (0.25, 1, 4)
#: Shares of the experts on the device, for the picture.
SHARES = (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.75, 1.0)
FEW = (*CACHES, PREDICTION, BEST)


@dataclass(frozen=True)
class Split:
    """Where everything lies.

    Attributes:
        need: what there is to place.
        budget: bytes of device memory. slots: experts that it holds beside the rest; below 0: not even that.
        in_host: experts that host memory holds. host: its bytes.
    """

    need: Footprint
    budget: int
    host: int

    @property
    def slots(self) -> int:
        """Experts on the device, no more than decoding uses."""
        return min(self.need.decoding, (self.budget - self.need.fixed) // self.need.slot)

    @property
    def fits(self) -> bool:
        """Whether one call's experts have their slots."""
        return self.slots >= min(self.need.least, self.need.decoding)

    @property
    def resident(self) -> bool:
        """Whether every expert that decoding uses has a slot."""
        return self.slots >= self.need.decoding

    @property
    def in_host(self) -> int:
        """Experts in host memory."""
        return min(self.need.blocks, self.host // self.need.block)

    @property
    def least_gb(self) -> float:
        """The smallest budget that runs at all, in GB, rounded up so that it can be typed."""
        return typed_gb(self.need.fixed + min(self.need.least, self.need.decoding) * self.need.slot)

    @property
    def all_gb(self) -> float:
        """The budget with which every expert of decoding has a slot."""
        return typed_gb(self.need.fixed + self.need.decoding * self.need.slot)


class Planner:
    """One run of the mode; :meth:`run` gives the content of metrics.json.

    Args:
        settings: what to plan for.
        shape: of the model. hardware: of the machine.
        traces: whose routing may be simulated, by name.
        run: simulates one policy.

    Raises:
        ConfigError: for what makes no sense, in one sentence.
    """

    def __init__(
        self,
        settings: PlanSettings,
        shape: ModelShape,
        hardware: Hardware,
        traces: Mapping[str, RoutingDataModule],
        run: Run = run_policy,
    ) -> None:
        self.settings, self.shape, self.hardware, self.traces = settings, shape, hardware, traces
        self.budget = int(settings.budget_of(hardware) * GB)
        self.host = int(settings.host_of(hardware) * GB)
        settings.check_context(shape)
        self.sizes: ModelSizes = sizes_of(shape)
        self._run = run

    def split(self, codec: str | None = None, context: int | None = None, budget: int | None = None) -> Split:
        """Where everything lies, with the settings' codec, context and budget unless others are given."""
        settings = self.settings
        need = footprint(
            self.shape,
            settings.context if context is None else context,
            settings.batch_size,
            settings.codec if codec is None else codec,
        )
        return Split(need, self.budget if budget is None else budget, self.host)

    def rows(self, case: Case, split: Split, context: int, names: Sequence[str]) -> list[dict[str, Any]]:
        """Policies in one split.

        Raises:
            BudgetError: if a step of the batch can need more experts than there are slots.
        """
        costs = timing(case, self.sizes, self.hardware, self.settings, split.need.block, context)
        slots = case_slots(split.slots, self.sizes, case)
        share = split.in_host / split.need.blocks
        host = case.blocks if share >= 1 else round(share * case.blocks)
        return run_all(case, costs, slots, host, self._run, names)

    def run(self, console: Console) -> dict[str, Any]:
        """Everything."""
        settings, split = self.settings, self.split()
        found: dict[str, Any] = {
            "mode": "plan",
            "shape": self.shape.describe() | {"parameters": self.shape.parameters},
            "machine": self.hardware.describe() | {"readings": {}},
            "plan": self.about(split),
            "memory": memory_rows(split, settings),
            "traces": [],
            "rows": [],
            "codecs": [],
            "contexts": [],
            "curve": [],
        }
        if not split.fits:
            return found | {"verdict": verdict(found)}
        console.print(f"simulating {self.shape.name} on {self.hardware.device}", highlight=False)
        family = str(self.shape.config["model_type"])
        case = choose_case(settings, self.sizes, family, self.traces)
        found["plan"] |= {
            "trace": case.name,
            "own_trace": case.own,
            "bundled": not case.identity,
            "missing": list(case.missing),
            "forecasts": case.forecasts,
            "documents": len(case.documents) // settings.batch_size * settings.batch_size
            - settings.warmup * settings.batch_size,
            "trace_shape": [case.train.layers, case.train.experts, case.train.top_k],
        }
        found["traces"] = [case.identity] if case.identity else []
        found["rows"] = self.rows(case, split, settings.context, ("on_demand", *FEW))
        found["codecs"] = [self._codec(case, codec) for codec in CODECS]
        found["contexts"] = [self._context(case, factor) for factor in CONTEXTS]
        found["curve"] = self._curve(case, split)
        return found | {"verdict": verdict(found)}

    def about(self, split: Split) -> dict[str, Any]:
        """What a reader must know, plain values."""
        kept = ("context", "batch_size", "codec", "documents", "tokens", "warmup", "split", "runtime")
        return {name: getattr(self.settings, name) for name in kept} | {
            "recall": list(self.settings.recall),
            "budget_gb": self.budget / GB,
            "host_gb": self.host / GB,
            "fits": split.fits,
            "resident": split.resident,
            "slots": max(0, split.slots),
            "blocks": split.need.blocks,
            "decoding": split.need.decoding,
            "in_host": split.in_host,
            "least_gb": split.least_gb,
            "all_gb": split.all_gb,
            "slot_bytes": split.need.slot,
            "block_bytes": split.need.block,
        }

    def _codec(self, case: Case, codec: str) -> dict[str, Any]:
        split = self.split(codec=codec)
        rows = self.rows(case, split, self.settings.context, FEW)
        return {
            "codec": codec,
            "exact": codec == "none",
            "block_bytes": split.need.block,
            "host_bytes": split.in_host * split.need.block,
            "in_host": split.in_host,
            "file_bytes": split.need.blocks * split.need.block,
        } | _speeds(rows)

    def _context(self, case: Case, factor: float) -> dict[str, Any]:
        context = max(1, round(self.settings.context * factor))
        split = self.split(context=context)
        most = self.shape.config.get("max_position_embeddings", context)
        row = {
            "context": context,
            "kv_bytes": split.need.kv_cache,
            "activation_bytes": split.need.activations,
            "slots": max(0, split.slots),
            "fits": split.fits and context <= most,
        }
        if not row["fits"]:
            return row | dict.fromkeys(FEW)
        return row | _speeds(self.rows(case, split, context, FEW))

    def _curve(self, case: Case, split: Split) -> list[dict[str, Any]]:
        """The same at other budgets, up to the one that holds everything."""
        widest = max(case.together(case.documents).widest, case.train.widest)
        need = split.need
        least = max(need.least, -(-widest * need.decoding // case.blocks))
        tried = {round(share * need.decoding) for share in SHARES} | {split.slots}
        out = []
        for slots in sorted(slots for slots in tried if slots >= least):
            budget = need.fixed + slots * need.slot
            rows = self.rows(case, replace(split, budget=budget), self.settings.context, ("on_demand", *FEW))
            out.append({"budget_gb": budget / GB, "slots": slots} | _speeds(rows))
        return out


def _speeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {row["policy"]: row["tokens_per_second"] for row in rows}


def memory_rows(split: Split, settings: PlanSettings) -> list[dict[str, Any]]:
    """What lies where, tier by tier."""
    need, slots = split.need, max(0, split.slots)
    tokens = f"{settings.batch_size} x {settings.context} tokens"
    rows = [
        ("device", "dense weights", need.dense, "everything but the experts"),
        ("device", "KV cache", need.kv_cache, tokens),
        ("device", "activations (estimate)", need.activations, tokens),
        ("device", "expert slots", slots * need.slot, f"{slots} of {need.decoding}, {size(need.slot)} each"),
        ("device", "free", split.budget - need.fixed - slots * need.slot, f"of {size(split.budget)}"),
        (
            "host",
            "experts",
            split.in_host * need.block,
            f"{split.in_host} of {need.blocks}, {size(need.block)} each, codec {settings.codec}",
        ),
        ("host", "free", split.host - split.in_host * need.block, f"of {size(split.host)} for experts"),
        ("file", "experts", need.blocks * need.block, f"all {need.blocks}"),
    ]
    return [{"tier": t, "what": w, "bytes": b, "about": a} for t, w, b, a in rows]


def plan(
    settings: PlanSettings,
    shape: ModelShape,
    hardware: Hardware,
    traces: Mapping[str, RoutingDataModule],
    console: Console | None = None,
    run: Run = run_policy,
) -> dict[str, Any]:
    """Plans one model on one machine; returns the content of metrics.json.

    Args:
        traces: whose routing may be simulated; the model's own is taken if it is among them, else the first
            that is there, else what comes with specgate.
        run: simulates one policy.

    Raises:
        ConfigError: for what makes no sense, in one sentence.
        BudgetError: if a step of the batch can need more experts than there are slots.
    """
    planner = Planner(settings, shape, hardware, traces, run)
    return planner.run(console or Console(quiet=True)) | {"settings": asdict(settings)}
