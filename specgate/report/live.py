"""benchmark.py mode=live: real generation through the expert store, the resident model and accelerate.

Every variant generates from the same prompts on the same machine in the same run, in rounds whose order is
turned; each time its model is opened anew, so that memory is its own. A last round is watched, for shares of
time and the timeline, and gives no speed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from specgate.errors import ConfigError
from specgate.moe.hosts import resolve_device
from specgate.report.live_models import dtype_of, forget, make_offload, opened, quiet, read_prompts, save_wide
from specgate.report.live_rows import make_rows
from specgate.report.live_run import Generated, Watched, generate
from specgate.report.live_settings import WAYS, WIDE, Budget, LiveSettings, budgets
from specgate.report.meters import NO_ENERGY, EnergyCounter, Meter
from specgate.report.padded import save_padded
from specgate.report.partial import Partial
from specgate.report.replay import progress
from specgate.report.replay_shape import ModelShape
from specgate.report.spans import Span, hidden, outside, overlap, total, transfers, write_chrome
from specgate.report.style import slug


class Live:
    """One run of the mode; :meth:`run` gives the content of metrics.json.

    Args:
        settings: what to do.
        shape: of the model with ``model=wide``.
        folder: of the run, for the timelines and what is measured so far.
        console: where to say what is going on.

    Raises:
        SpecgateError: for what makes no sense, before anything is measured.
    """

    def __init__(
        self, settings: LiveSettings, shape: ModelShape, folder: Path, console: Console | None = None
    ) -> None:
        self.settings, self.shape, self.folder = settings, shape, folder
        self.console = console or Console(quiet=True)
        self.device = resolve_device(settings.device)
        self.energy = EnergyCounter(self.device)
        self.wide = settings.model == WIDE
        self.name = shape.name if self.wide else Path(settings.model).name
        if settings.expert_mib is not None:
            self.name += f", experts padded to {settings.expert_mib:g} MiB"
        self.forced = settings.text == "forced" or (settings.text == "auto" and self.wide)
        known = asdict(settings) | {"resume": None, "shape": shape.describe() if self.wide else None}
        self.partial = Partial(folder, known, settings.resume)
        self.skipped: list[dict[str, str]] = []
        if not settings.checkpoints:
            wanted = [name for name in settings.variants if Budget(name, 1.0).way.predicts]
            self.skipped = [{"variant": name, "reason": "no predictor is named"} for name in wanted]

    def run(self) -> dict[str, Any]:
        """Measures everything that is still to be measured."""
        for left in self.skipped:
            self.console.print(f"{left['variant']} is left out: {left['reason']} (checkpoints=[...]).")
        if not self.energy.available and self.device.type == "cuda":
            self.console.print(NO_ENERGY)
        with ExitStack() as stack:
            stack.enter_context(quiet())
            self.scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="specgate-live-")))
            self.model = self.settings.model
            if self.wide:
                self.console.print(f"writing {self.name}, random weights", highlight=False)
                self.model = str(
                    save_wide(self.shape, self.scratch / self.name, self.device, self.settings.seed)
                )
            self.dtype = dtype_of(self.model, self.settings.dtype)
            if self.settings.expert_mib is not None:
                self.console.print(f"writing {self.name}", highlight=False)
                sizes = (self.settings.expert_mib, self.scratch / "padded", getattr(torch, self.dtype))
                self.model = str(save_padded(self.model, *sizes))
            self.prompts = read_prompts(self.model, self.settings)
            self.budgets = self._budgets()
            measured = self._measure_all()
        rows, timelines = make_rows(self, measured)
        self.partial.finish()
        return {
            "mode": "live",
            "model": self.name,
            "live": self.about(),
            "rows": rows,
            "timelines": timelines,
            "skipped": self.skipped,
            "threads": torch.get_num_threads(),
        }

    def _budgets(self) -> list[Budget]:
        def planned(name: str) -> Any:
            way = replace(WAYS[name], host=False)
            return make_offload(self.model, self.settings, self.device, self.dtype, None, way).plan

        self.plan = planned("offload")
        predicted = planned("offload_predictor") if self.settings.checkpoints else None
        routers = any(WAYS[name].routers for name in self.settings.variants)
        routed = planned("offload:lru_routers") if routers else None
        found = budgets(self.settings, self.plan, predicted, self.name, routed)
        if not found:
            raise ConfigError("All of live.variants need a predictor; name its run in checkpoints=[...].")
        return found

    def about(self) -> dict[str, Any]:
        """What a reader must know of the run, plain values."""
        kept = ("prompts", "prompt_tokens", "new_tokens", "repeats", "threshold", "eviction")
        return {name: getattr(self.settings, name) for name in kept} | {
            "device": str(self.device),
            "dtype": self.dtype,
            "forced": self.forced,
            "random_weights": self.wide,
            "expert_mib": self.settings.expert_mib,
            "layers": self.plan.layers,
            "experts": self.plan.experts,
            "top_k": self.plan.top_k,
            "slot_bytes": self.plan.slot,
            "dense_bytes": self.plan.dense,
            "codec": self.plan.codec,
            "energy": self.energy.available,
            "resumed": self.partial.taken,
        }

    def _measure_all(self) -> Mapping[tuple[int, str], Mapping[str, Any]]:
        plan = []
        for turn in range(self.settings.repeats + 1):
            by = turn * max(1, len(self.budgets) // (self.settings.repeats + 1)) % len(self.budgets)
            plan += [(turn, budget) for budget in [*self.budgets[by:], *self.budgets[:by]]]
        done = self.partial.measured
        todo = [(turn, budget) for turn, budget in plan if f"{turn}:{budget.key}" not in done]
        try:
            with progress(self.console) as bar:
                task = bar.add_task("measuring", total=len(plan), completed=len(plan) - len(todo))
                for turn, budget in todo:
                    bar.update(task, description=f"{budget.key}, round {turn + 1}")
                    watched = turn == self.settings.repeats
                    self.partial.add(f"{turn}:{budget.key}", self.measure(budget, watched))
                    bar.advance(task)
        except KeyboardInterrupt:
            self.console.print(self.partial.farewell(len(plan), "live"), style="bold", soft_wrap=True)
            raise SystemExit(130) from None
        return {(turn, budget.key): done[f"{turn}:{budget.key}"] for turn, budget in plan}

    def measure(self, budget: Budget, watched: bool) -> dict[str, Any]:
        """One variant: opened, warmed up, then every prompt."""
        warmup, *prompts = self.prompts
        tokens = self.settings.new_tokens
        with opened(budget, self.model, self.settings, self.device, self.dtype, self.scratch) as model:
            generate(model, warmup, min(self.settings.warmup_tokens, tokens), self.device, self.forced)
            before = self._stats(model)
            watch = Watched(model, self.device)
            with Meter(self.device, self.energy) as meter, ExitStack() as stack:
                if watched:
                    stack.enter_context(watch)
                found = [generate(model, prompt, tokens, self.device, self.forced) for prompt in prompts]
            after = self._stats(model)
            measured: dict[str, Any] = {
                "first": [one.first for one in found],
                "each": [second for one in found for second in one.each],
                "tokens": [one.tokens for one in found],
                "digests": [one.digest for one in found],
                "meter": meter.as_dict(),
                "stats": {k: after[k] - before[k] for k in after if isinstance(after[k], int | float)},
                "slots": self._slots(model, budget),
                "host_bytes": after.get("host_bytes", 0),
            }
            if watched:
                store = getattr(getattr(model, "specgate", None), "store", None)
                timeline = [] if store is None else store.timeline()
                measured["watched"] = self._watched(budget, timeline, watch, found)
                del store
            del model
        forget(self.device)
        return measured

    def _stats(self, model: Any) -> dict[str, Any]:
        state = getattr(model, "specgate", None)
        return {} if state is None else dict(state.stats())

    def _slots(self, model: Any, budget: Budget) -> int:
        state = getattr(model, "specgate", None)
        return budget.slots if state is None else int(state.store.num_slots)

    def _watched(
        self, budget: Budget, timeline: list[Any], watch: Watched, found: list[Generated]
    ) -> dict[str, Any]:
        """Shares of the time between the first and the last token of each prompt, and a timeline of some."""
        windows: list[Span] = [one.window for one in found]
        whole = (windows[0][0], windows[-1][1])
        moved = transfers(timeline, whole)
        inside = {
            lane: [_cut(s, w) for s in spans for w in windows if _touch(s, w)]
            for lane, spans in moved.items()
        }
        free = [span for window in windows for span in outside(watch.waits, window)]
        behind = hidden(inside, free)
        shown = self._shown(found[-1])
        lanes = {
            lane: [_cut(span, shown) for span in spans if _touch(span, shown)]
            for lane, spans in {"wait": watch.waits, **moved}.items()
        }
        lanes = {lane: spans for lane, spans in lanes.items() if spans}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = write_chrome(self.folder / f"timeline-{slug(budget.name)}-{budget.residency:g}.json", lanes)
        return {
            "seconds": total(windows) * 1e-9,
            "wait": overlap(watch.waits, windows) * 1e-9,
            "copying": behind.copying,
            "copying_behind_compute": behind.behind,
            "file": path.name,
            "timeline": {
                lane: [[b - shown[0], e - shown[0]] for b, e in spans] for lane, spans in lanes.items()
            },
        }

    def _shown(self, last: Generated) -> Span:
        """A few tokens in the middle of a generation."""
        begin, end = last.window
        at, tokens = len(last.each) // 2, self.settings.timeline_tokens
        start = begin + round(1e9 * sum(last.each[:at]))
        return start, min(end, start + round(1e9 * sum(last.each[at : at + tokens])))


def _touch(span: Span, window: Span) -> bool:
    return span[1] > window[0] and span[0] < window[1]


def _cut(span: Span, window: Span) -> Span:
    return max(span[0], window[0]), min(span[1], window[1])


def live(
    settings: LiveSettings, shape: ModelShape, folder: Path, console: Console | None = None
) -> dict[str, Any]:
    """Runs the mode; returns the content of metrics.json.

    Raises:
        SpecgateError: for what makes no sense, or if an offloaded model gives other values than the resident.
    """
    return Live(settings, shape, folder, console).run()
