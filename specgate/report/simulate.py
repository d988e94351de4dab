"""benchmark.py mode=simulate: what each policy would reach on a machine, from a real trace and a cost model.

Every policy runs the same documents of the locked split, one after the other (or several as a batch), and is
fitted on training documents alone. docs/simulator.md says what is modelled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from itertools import product
from typing import Any

import numpy as np
import torch
from rich.console import Console

from specgate.calibration.load import find_checkpoint, load_predictor
from specgate.calibration.registry import make_calibrator
from specgate.errors import BudgetError, ConfigError, NotApplicableError
from specgate.moe.hosts import resolve_device
from specgate.policy.base import Policy
from specgate.policy.costs import Costs
from specgate.policy.hardware import Hardware
from specgate.policy.registry import ORACLES
from specgate.policy.roofline import RUNTIMES, ModelSizes, costs_of, step_tokens
from specgate.policy.workload import Workload, join, merge
from specgate.predictors import predictor_class
from specgate.predictors.base import Predictor
from specgate.report.identity import trace_identity
from specgate.report.plan_sizes import sizes_of
from specgate.report.replay import progress
from specgate.report.replay_shape import ModelShape, check_trace
from specgate.report.simulate_rows import COUNTED, cell_rows, compare_to_best, resampled
from specgate.report.simulate_settings import SimulateSettings, slots_for
from specgate.report.simulate_trace import documents_of
from specgate.runtime import native
from specgate.runtime.simulator import simulate as run_simulation
from specgate.traces.datamodule import RoutingDataModule

MAIN = "priced"


class Simulation:
    """One run of the mode; :meth:`run` gives the content of metrics.json.

    Args:
        policies: by label.
        hardware: by name.
        trace: its name. data: the trace.

    Raises:
        SpecgateError: for what makes no sense, before anything is run.
    """

    def __init__(
        self,
        settings: SimulateSettings,
        policies: Mapping[str, Policy],
        shape: ModelShape,
        hardware: Mapping[str, Hardware],
        trace: str,
        data: RoutingDataModule,
        console: Console | None = None,
    ) -> None:
        self.settings, self.shape, self.hardware = settings, shape, hardware
        self.trace, self.data, self.console = trace, data, console or Console(quiet=True)
        native.require()
        spec = data.spec
        check_trace(shape, trace, spec.layers, spec.experts, spec.top_k)
        self.sizes: ModelSizes = sizes_of(shape)
        self.block_bytes = shape.layout(settings.codec).block_bytes
        self.skipped: list[dict[str, str]] = []
        self._seen: dict[tuple[str, str, int, str], list[Workload]] = {}
        self.predictor_name: str | None = None
        self.predictors = self._predictors(policies)
        self.policies = {label: p for label, p in policies.items() if self._possible(label, p)}
        if not self.policies:
            raise ConfigError(
                "None of simulate.policies can run here: " + "; ".join(s["reason"] for s in self.skipped)
            )

    # ------------------------------------------------------------------ what is foreseen

    def _predictors(self, policies: Mapping[str, Policy]) -> dict[str, Predictor]:
        """By the name of the foresight: what the policies ask for and this trace allows."""
        out: dict[str, Predictor] = {}
        wants = {foresight_of(policy) for policy in policies.values()}
        if self.settings.checkpoints and wants & {"predictor", "uncalibrated"}:
            file = find_checkpoint(self.settings.checkpoints[0])
            predictor = load_predictor(file)
            self.predictor_name = predictor.name
            if "predictor" in wants:
                out["predictor"] = predictor
            if "uncalibrated" in wants:
                raw = deepcopy(predictor)
                raw.calibrator = make_calibrator("temperature", raw)  # not fitted: temperature 1
                out["uncalibrated"] = raw
        spec, routers = self.data.spec, None
        if "next_gate" in wants and spec.hidden_size is not None:
            routers = self.data.routers
        if routers is not None:
            depth = max(p.horizons for p in policies.values() if p.forecast_source == "next_gate")
            options: dict[str, Any] = {**vars(spec), "lookahead": depth, "routers": routers}
            gate = predictor_class("router_lookahead")(**options)
            gate.calibrator = make_calibrator("temperature", gate)
            out["next_gate"] = gate
        return out

    def _possible(self, label: str, policy: Policy) -> bool:
        """Whether the policy's foresight is there; else the reason is noted."""
        wants = foresight_of(policy)
        if wants in ("none", "oracle", "eam") or wants in self.predictors:
            return True
        reason = (
            "the trace has no hidden states or routers"
            if wants == "next_gate"
            else "no predictor is named (checkpoints=[...])"
        )
        self.skipped.append({"policy": label, "reason": reason})
        return False

    # ------------------------------------------------------------------ documents

    def _read(self) -> None:
        """The documents to score, to warm up with, and to fit on."""
        settings, device = self.settings, resolve_device(self.settings.device)
        other = "validation" if settings.split == "test" else "train"  # the locked split is for scores alone
        with progress(self.console) as bar:
            task = bar.add_task("reading what was foreseen")

            def tick(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            some: dict[str, Any] = {"predictors": self.predictors, "device": device, "tick": tick}
            self.scored = documents_of(self.data, settings.split, settings.documents, settings.tokens, **some)
            self.before = documents_of(self.data, other, settings.fit_documents, settings.tokens, **some)
            self.train = documents_of(self.data, "train", settings.fit_documents, settings.tokens)["none"]

    def _batches(self, documents: Sequence[Workload], batch: int) -> list[Workload]:
        """Documents in groups that are decoded together; the last ones that fill no group are left out."""
        if batch == 1:
            return list(documents)
        whole = len(documents) - len(documents) % batch
        return [merge(documents[i : i + batch]) for i in range(0, whole, batch)]

    def _foreseen(self, policy: Policy, fit: Workload, which: str) -> list[Workload]:
        """The documents as a policy sees them, one by one; what several policies see is kept once."""
        wants = foresight_of(policy)
        pool = self.scored if which == "scored" else self.before
        documents = pool[wants if wants in pool else "none"]
        own = policy.name + repr(vars(policy)) if wants in ("eam", "oracle") else ""
        key = (which, wants, policy.horizons, own)
        if key not in self._seen:
            self._seen[key] = [d.with_forecasts(policy.foresee(fit, d)) for d in documents]
        return self._seen[key]

    # ------------------------------------------------------------------ running

    def run(self) -> dict[str, Any]:
        """All cells."""
        self._read()
        for left in self.skipped:
            self.console.print(f"{left['policy']} is left out: {left['reason']}.", soft_wrap=True)
        rows: list[dict[str, Any]] = []
        settings = self.settings
        singles = join(self.train)
        foreseen = {label: self._foreseen(p, singles, "scored") for label, p in self.policies.items()}
        warm = {label: self._foreseen(p, singles, "before") for label, p in self.policies.items()}
        cells = len(settings.batches) * len(self.hardware) * len(settings.residency)
        with progress(self.console) as bar:
            task = bar.add_task("simulating", total=cells * len(self.policies))
            for batch in settings.batches:
                few = min(len(self.train), len(next(iter(foreseen.values()))))
                if few < batch:
                    raise ConfigError(
                        f"{few} documents make no batch of {batch}; choose smaller simulate.batches or more "
                        "documents."
                    )
                fit = join(self._batches(self.train, batch))
                made: dict[int, list[Workload]] = {}  # of lists that several policies share

                def batches(documents: list[Workload], size: int = batch, made: Any = made) -> list[Workload]:
                    if id(documents) not in made:
                        made[id(documents)] = self._batches(documents, size)
                    found: list[Workload] = made[id(documents)]
                    return found

                seen = {label: batches(warm[label]) for label in self.policies}
                batched = {
                    label: (seen[label][: settings.warmup], batches(foreseen[label]))
                    for label in self.policies
                }
                for (name, hardware), share in product(self.hardware.items(), settings.residency):
                    rows += self._cell(
                        name, hardware, batch, share, fit, batched, seen, lambda: bar.advance(task)
                    )
        return {
            "mode": "simulate",
            "split": settings.split,
            "traces": [trace_identity(self.data, self.trace)],
            "shape": self.shape.describe(),
            "simulate": asdict(settings)
            | {"predictor": self.predictor_name, "block_bytes": self.block_bytes},
            "hardware_profiles": {name: profile.describe() for name, profile in self.hardware.items()},
            "rows": rows,
            "skipped": self.skipped,
        }

    def _costs(self, workload: Workload, hardware: Hardware) -> Costs:
        settings = self.settings
        return costs_of(
            self.sizes,
            workload,
            hardware,
            block_bytes=self.block_bytes if settings.codec != "none" else None,
            context=settings.context,
            runtime=RUNTIMES[settings.runtime],
            forecast_us=settings.forecast_us,
            chunk_bytes=int(settings.piece_mib * 2**20),
        )

    def _cell(
        self,
        name: str,
        hardware: Hardware,
        batch: int,
        share: float,
        fit: Workload,
        batched: Mapping[str, tuple[list[Workload], list[Workload]]],
        seen: Mapping[str, list[Workload]],
        tick: Callable[[], None],
    ) -> list[dict[str, Any]]:
        """All policies at one budget of one machine."""
        blocks = self.sizes.layers * self.sizes.experts
        _, documents = next(iter(batched.values()))
        widest = max(w.widest for w in [fit, *documents, *next(iter(batched.values()))[0]])
        slots = slots_for(share, blocks, widest)
        host = round(self.settings.host * blocks)
        fit_costs = self._costs(fit, hardware)
        found: dict[str, dict[str, Any]] = {}
        plain: dict[str, Any] = {}
        for label, policy in self.policies.items():
            warm, scored = batched[label]
            whole = join([*warm, *scored])
            costs = self._costs(whole, hardware)
            try:
                room = policy.slots_of(fit, slots)
                try:
                    rules = policy.fit(fit, fit_costs, slots)
                except (
                    NotApplicableError
                ):  # it wants forecasts to fit on; those of training documents flatter
                    others = join(seen[label])
                    rules = policy.fit(others, self._costs(others, hardware), slots)
                result = run_simulation(whole, costs, rules, room, host)
            except BudgetError as error:
                where = f"{name}, batch {batch}, {100 * share:g} %"
                self.skipped.append({"policy": f"{label} ({where})", "reason": str(error).rstrip(".")})
                tick()
                continue
            first = sum(w.documents for w in warm)
            found[label] = {
                key: np.asarray(result.of_documents(key), dtype=np.float64)[first:] for key in COUNTED
            }
            plain[label] = rules.plain()
            tick()
        tokens = np.asarray([float(step_tokens(w).sum()) for w in documents])
        compute = np.asarray([self._costs(w, hardware).compute_ns for w in documents])
        counts = resampled(len(documents), self.settings.resamples, self.settings.seed)
        made = cell_rows(found, tokens, compute, counts)
        references = [
            label
            for label, policy in self.policies.items()
            if policy.name not in (*ORACLES, MAIN) and label == policy.name
        ]
        for label in [label for label, policy in self.policies.items() if policy.name == MAIN]:
            compare_to_best(made, label, references, found, counts)
        about = {"trace": self.trace, "hardware": name, "batch": batch, "residency": share, "slots": slots}
        return [about | row | {"rules": _short(plain[label])} for label, row in made.items()]


def foresight_of(policy: Policy) -> str:
    """Whose forecasts a policy is given: its source, and ``uncalibrated`` for a predictor's raw ones."""
    if policy.forecast_source == "predictor" and not policy.calibrated:
        return "uncalibrated"
    return policy.forecast_source


def _short(rules: Mapping[str, Any]) -> dict[str, Any]:
    """Rules without their long lists, as JSON can say them."""
    return {
        key: value
        for key, value in rules.items()
        if not isinstance(value, list) and not (isinstance(value, float) and not np.isfinite(value))
    }


def simulate(
    settings: SimulateSettings,
    policies: Mapping[str, Policy],
    shape: ModelShape,
    hardware: Mapping[str, Hardware],
    traces: Mapping[str, RoutingDataModule],
    console: Console | None = None,
) -> dict[str, Any]:
    """Simulates one trace; returns the content of metrics.json.

    Raises:
        SpecgateError: for what makes no sense.
    """
    if len(traces) != 1:
        raise ConfigError(
            f"mode=simulate runs one trace and data= names {', '.join(traces)}; name one of them."
        )
    ((trace, data),) = traces.items()
    with torch.no_grad():
        return Simulation(settings, policies, shape, hardware, trace, data, console).run()
