"""benchmark.py mode=simulate: what each policy would reach on a machine, from a real trace and a cost model.

Every policy runs the same documents of the locked split, one after the other (or several as a batch), and is
fitted on training documents alone. docs/simulator.md says what is modelled.

Letters: D documents, G groups of them that are decoded together, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from rich.console import Console
from rich.progress import Progress

from specgate.errors import BudgetError, ConfigError, NotApplicableError
from specgate.moe.hosts import resolve_device
from specgate.policy.bandit import Bandit
from specgate.policy.base import Policy
from specgate.policy.costs import Costs
from specgate.policy.hardware import Hardware
from specgate.policy.registry import LEARNED, ORACLES
from specgate.policy.registry import policy as make_policy
from specgate.policy.rl import ReinforcementLearning
from specgate.policy.roofline import RUNTIMES, ModelSizes, costs_of, step_tokens
from specgate.policy.rules import Rules
from specgate.policy.workload import Workload, join, merge
from specgate.report.identity import trace_identity
from specgate.report.plan_sizes import check_decoding, sizes_of
from specgate.report.replay import progress
from specgate.report.replay_shape import ModelShape
from specgate.report.simulate_batch import ARM, Batch, Figures, Place, short
from specgate.report.simulate_foresight import Views, foresight_for
from specgate.report.simulate_groups import groups_of, weights_of
from specgate.report.simulate_learned import Shelf, choose, costs_digest, games_of, picked, played, rewards_of
from specgate.report.simulate_rows import COUNTED, cell_rows, compare_to_best, compare_to_main
from specgate.report.simulate_settings import SimulateSettings, slots_for
from specgate.report.simulate_trace import documents_of
from specgate.runtime import native
from specgate.runtime.simulator import Simulator
from specgate.runtime.simulator import simulate as run_simulation
from specgate.traces.datamodule import RoutingDataModule

MAIN = "priced"


class Simulation:
    """One run of the mode; :meth:`run` gives the content of metrics.json.

    Args:
        policies: by label; a bandit is one too.
        hardware: by name.
        trace: its name. data: the trace.
        folder: of the run, where trained agents are kept; None keeps none.

    Raises:
        SpecgateError: for what makes no sense, before anything is run.
    """

    def __init__(
        self,
        settings: SimulateSettings,
        policies: Mapping[str, Policy | Bandit],
        shape: ModelShape,
        hardware: Mapping[str, Hardware],
        trace: str,
        data: RoutingDataModule,
        console: Console | None = None,
        folder: Path | None = None,
    ) -> None:
        self.settings, self.shape, self.hardware = settings, shape, hardware
        self.trace, self.data, self.console = trace, data, console or Console(quiet=True)
        native.require()
        self.sizes: ModelSizes = sizes_of(shape)
        check_decoding(self.sizes, trace, data.spec.layers, data.spec.experts, data.spec.top_k)
        self.block_bytes = shape.layout(settings.codec).block_bytes
        self.skipped: list[dict[str, str]] = []
        self.choices: list[dict[str, Any]] = []
        self.bandits = {label: b for label, b in policies.items() if isinstance(b, Bandit)}
        self.policies = {label: p for label, p in policies.items() if isinstance(p, Policy)}
        self.shown = list(policies)
        for bandit in self.bandits.values():
            self.policies |= {f"{ARM}lru": make_policy("lru")}
            self.policies |= {ARM + arm: p for arm, p in zip(bandit.labels, bandit.policies, strict=True)}
        self.foresight = foresight_for(self.policies.values(), settings.checkpoints, data)
        self._leave_out()
        kept = ("codec", "host", "split", "documents", "tokens", "fit_documents", "context", "runtime",
                "piece_mib", "forecast_us", "groupings", "seed")  # fmt: skip
        self.traces = [trace_identity(data, trace)]
        self.shelf = Shelf(
            Path(settings.agents) if settings.agents else folder / "agents" if folder else None,
            {
                "trace": self.traces[0]["sha256"],
                "shape": shape.describe(),
                "predictor": self.foresight.digest,
                **{key: getattr(settings, key) for key in kept},
            },
        )
        self.bar: Progress | None = None

    def _leave_out(self) -> None:
        """What cannot run here, with the reason."""
        for label, found in list(self.policies.items()):
            reason = self.foresight.missing(found)
            if reason is None:
                continue
            del self.policies[label]
            if label.startswith(ARM):
                gone = [b for b, bandit in self.bandits.items() if label[len(ARM) :] in bandit.labels]
                for name in gone:
                    del self.bandits[name]
            else:
                gone = [label]
            self.shown = [name for name in self.shown if name not in gone]
            self.skipped += [{"policy": name, "reason": reason} for name in gone]
        if not self.bandits:
            self.policies = {k: p for k, p in self.policies.items() if not k.startswith(ARM)}
        if not self.shown:
            raise ConfigError(
                "None of simulate.policies can run here: " + "; ".join(s["reason"] for s in self.skipped)
            )

    # ------------------------------------------------------------------ documents

    def _read(self, bar: Progress) -> None:
        """The documents to score, to learn and to warm up with, and to fit on."""
        settings, device = self.settings, resolve_device(self.settings.device)
        other = "validation" if settings.split == "test" else "train"  # the locked split is for scores alone
        task = bar.add_task("reading what was foreseen")

        def tick(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        some: dict[str, Any] = {"predictors": self.foresight.predictors, "device": device, "tick": tick}
        self.scored = documents_of(self.data, settings.split, settings.documents, settings.tokens, **some)
        self.before = documents_of(self.data, other, settings.fit_documents, settings.tokens, **some)
        self.train = documents_of(self.data, "train", settings.fit_documents, settings.tokens)["none"]
        self.views = Views({"scored": self.scored, "before": self.before}, self.foresight.lookahead)
        bar.remove_task(task)

    def _batch(self, size: int, singles: Workload) -> Batch:
        deals, seed = self.settings.groupings, self.settings.seed
        scored, before, train = len(self.scored["none"]), len(self.before["none"]), len(self.train)
        dealt = groups_of(train, size, 1, seed)
        fit = self.train if size == 1 else [merge([self.train[d] for d in group]) for group in dealt]
        return Batch(
            size,
            join(fit),
            groups_of(scored, size, deals, seed),
            groups_of(before, size, deals, seed),
            {
                label: (self.views.of(p, singles, "scored"), self.views.of(p, singles, "before"))
                for label, p in self.policies.items()
            },
        )

    # ------------------------------------------------------------------ running

    def run(self) -> dict[str, Any]:
        """All cells."""
        for left in self.skipped:
            self.console.print(f"{left['policy']} is left out: {left['reason']}.", soft_wrap=True)
        rows: list[dict[str, Any]] = []
        settings = self.settings
        cells = len(settings.batches) * len(self.hardware) * len(settings.residency)
        with progress(self.console) as bar:
            self.bar = bar
            self._read(bar)
            singles = join(self.train)
            self.task = bar.add_task("simulating", total=cells * len(self.policies))
            for size in settings.batches:
                batch = self._batch(size, singles)
                for (name, hardware), share in product(self.hardware.items(), settings.residency):
                    rows += self._cell(name, hardware, share, batch)
        out = {
            "mode": "simulate",
            "split": settings.split,
            "traces": self.traces,
            "shape": self.shape.describe(),
            "simulate": asdict(settings)
            | {
                "predictor": self.foresight.name,
                "lookahead": self.foresight.lookahead,
                "predictor_sha256": self.foresight.digest,
                "block_bytes": self.block_bytes,
                "layers": self.sizes.layers,
            },
            "hardware_profiles": {name: profile.describe() for name, profile in self.hardware.items()},
            "rows": rows,
            "skipped": self.skipped,
        }
        out |= {"agents": self.shelf.entries} if self.shelf.entries else {}
        return out | ({"choices": self.choices} if self.choices else {})

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

    def _cell(self, name: str, hardware: Hardware, share: float, batch: Batch) -> list[dict[str, Any]]:
        """All policies at one budget of one machine."""
        blocks = self.sizes.layers * self.sizes.experts
        documents, first = batch.of(next(iter(self.policies)), 0), self.settings.warmup
        widest = max(w.widest for w in [batch.fit, *documents, *batch.of(next(iter(self.policies)), 1)])
        slots = slots_for(share, blocks, widest)
        place = Place(name, hardware, batch.size, share, slots, round(self.settings.host * blocks))
        fit_costs = self._costs(batch.fit, hardware)
        found: dict[str, Figures] = {}
        learned: dict[str, Figures] = {}  # of the documents that a bandit learns from
        plain: dict[str, Any] = {}
        for label, policy in self.policies.items():
            try:
                room, rules = self._fitted(label, policy, place, batch, fit_costs)
                warm = batch.of(label, 1, first)
                found[label] = self._figures(
                    label, policy, place, batch, rules, room, warm, batch.of(label, 0)
                )
                if label.startswith(ARM):
                    seen = batch.of(label, 1)
                    learned[label] = self._figures(label, policy, place, batch, rules, room, [], seen)
                plain[label] = short(rules.plain())
            except BudgetError as error:
                if not label.startswith(ARM):
                    self._skip(label, place, str(error))
            if self.bar is not None:
                self.bar.advance(self.task)
        for label, bandit in self.bandits.items():
            self._pick(label, bandit, place, batch, found, learned, plain)
        shown = {label: found[label] for label in self.shown if label in found}
        tokens = np.asarray([float(step_tokens(w).sum()) for w in documents])
        compute = np.asarray([self._costs(w, hardware).compute_ns for w in documents])
        many = len(self.scored["none"])
        weights = weights_of(batch.scored, many, self.settings.resamples, self.settings.seed)
        made = cell_rows(shown, tokens, compute, weights, many)
        names = {label: label.split()[0] for label in made}
        known = (*ORACLES, *LEARNED, MAIN)
        references = [label for label, own in names.items() if own == label and own not in known]
        for label in [label for label, own in names.items() if own == MAIN]:
            compare_to_best(made, label, references, shown, weights)
        compare_to_main(made, MAIN, shown, weights)
        return [
            {"trace": self.trace, **place.about, **row, "rules": plain[label]} for label, row in made.items()
        ]

    def _fitted(
        self, label: str, policy: Policy, place: Place, batch: Batch, fit_costs: Costs
    ) -> tuple[ArrayLike, Rules]:
        room = policy.slots_of(batch.fit, place.slots)
        try:
            return room, policy.fit(batch.fit, fit_costs, place.slots)
        except NotApplicableError:  # it wants forecasts to fit on; those of training documents flatter
            others = join(batch.of(label, 1))
            return room, policy.fit(others, self._costs(others, place.profile), place.slots)

    def _figures(
        self,
        label: str,
        policy: Policy,
        place: Place,
        batch: Batch,
        rules: Rules,
        room: ArrayLike,
        warm: Sequence[Workload],
        documents: Sequence[Workload],
    ) -> Figures:
        """What each of the documents took, after those to warm up with."""
        whole = join([*warm, *documents])
        costs = self._costs(whole, place.profile)
        if isinstance(policy, ReinforcementLearning):
            game = Simulator(whole, costs, rules, room, place.host)
            agent = self._agent(label, policy, place, batch, rules, room)
            result = played(agent, game)
        else:
            result = run_simulation(whole, costs, rules, room, place.host)
        first = sum(w.documents for w in warm)
        return {key: np.asarray(result.of_documents(key), dtype=np.float64)[first:] for key in COUNTED}

    def _agent(
        self,
        label: str,
        policy: ReinforcementLearning,
        place: Place,
        batch: Batch,
        rules: Rules,
        room: ArrayLike,
    ) -> Any:
        bar = self.bar
        assert bar is not None
        task = bar.add_task(f"training {label} ({place})", total=policy.steps, visible=False)

        def tell(done: int, total: int, reward: float) -> None:
            bar.update(task, completed=min(done, total), visible=True)

        costs = costs_digest(self._costs(batch.fit, place.profile))
        about = {**place.about, "host_slots": place.host, "costs": costs}
        agent = self.shelf.agent(
            label,
            policy,
            about,
            lambda: games_of(
                batch.of(label, 1), lambda w: self._costs(w, place.profile), rules, room, place.host
            ),
            tell,
        )
        bar.remove_task(task)
        return agent

    def _pick(
        self,
        label: str,
        bandit: Bandit,
        place: Place,
        batch: Batch,
        found: dict[str, Figures],
        learned: Mapping[str, Figures],
        plain: dict[str, Any],
    ) -> None:
        """What a bandit reaches that picks an arm for each document."""
        arms = [ARM + arm for arm in bandit.labels]
        if any(arm not in learned for arm in [ARM + "lru", *arms]):
            self._skip(label, place, "an arm does not fit the budget")
            return
        rewards = [
            rewards_of([of[arm]["total_ns"] for arm in arms], of[ARM + "lru"]["total_ns"])
            for of in (learned, found)
        ]
        seen = arms[-1]  # whose forecasts tell most, if any do
        for arm in arms:
            if batch.documents[arm][0][0].forecasts is not None:
                seen = arm
        chosen = choose(bandit, (batch.of(seen, 1), rewards[0]), (batch.of(seen, 0), rewards[1]))
        found[label] = picked([found[arm] for arm in arms], chosen.regret.choices_D)
        plain[label] = {"arms": bandit.labels}
        self.choices.append({"policy": label, **place.about, **chosen.entry(bandit.labels)})

    def _skip(self, label: str, place: Place, reason: str) -> None:
        self.skipped.append({"policy": f"{label} ({place})", "reason": reason.rstrip(".")})


def simulate(
    settings: SimulateSettings,
    policies: Mapping[str, Policy | Bandit],
    shape: ModelShape,
    hardware: Mapping[str, Hardware],
    traces: Mapping[str, RoutingDataModule],
    console: Console | None = None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Simulates one trace; returns the content of metrics.json.

    Args:
        folder: where trained agents are kept, in ``agents``; None keeps none.

    Raises:
        SpecgateError: for what makes no sense.
    """
    if len(traces) != 1:
        raise ConfigError(
            f"mode=simulate runs one trace and data= names {', '.join(traces)}; name one of them."
        )
    ((trace, data),) = traces.items()
    with torch.no_grad():
        return Simulation(settings, policies, shape, hardware, trace, data, console, folder).run()
