"""benchmark.py mode=replay: a real trace drives real transfers and real kernels at any model's true shapes.

The experts hold random weights; which of them a token needs is the trace's. Every variant decodes the same
documents, in rounds whose order is turned, each with a store of its own; a last round of each is watched,
for shares of time and for the timeline, and gives no speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from specgate.calibration.load import find_checkpoint, load_predictor
from specgate.errors import ConfigError
from specgate.moe.hosts import resolve_device
from specgate.report.meters import NO_ENERGY, EnergyCounter, Meter
from specgate.report.partial import Partial
from specgate.report.replay_body import Body, SlotExperts
from specgate.report.replay_rows import make_rows
from specgate.report.replay_run import Probe, Runner
from specgate.report.replay_script import Script, load_script, make_script, save_script
from specgate.report.replay_settings import (
    LEARNS,
    LEAST,
    Entry,
    ReplaySettings,
    entries,
    plan_name,
    store_settings,
    variant_of,
)
from specgate.report.replay_shape import ModelShape, check_trace
from specgate.report.replay_steps import BodyGraphs, Captured, OneByOne, Steps
from specgate.report.replay_store import RandomBlocks, Stores
from specgate.report.replay_trace import all_events, make_plans
from specgate.report.spans import Span, hidden, total, transfers, write_chrome
from specgate.report.style import slug
from specgate.runtime import native
from specgate.traces.datamodule import RoutingDataModule


class Replay:
    """One run of the mode; :meth:`run` gives the content of metrics.json.

    Args:
        settings: what to do.
        shape: of the model.
        trace: its name. data: the trace.
        folder: of the run, for the timelines, what is measured so far, and the packed file.
        console: where to say what is going on.

    Raises:
        SpecgateError: for what makes no sense, before anything is measured.
    """

    def __init__(
        self,
        settings: ReplaySettings,
        shape: ModelShape,
        trace: str,
        data: RoutingDataModule,
        folder: Path,
        console: Console | None = None,
    ) -> None:
        self.settings, self.shape, self.trace, self.data = settings, shape, trace, data
        self.folder, self.console = folder, console or Console(quiet=True)
        shape.layout(settings.codec)
        self.device = resolve_device(settings.device)
        native.require()
        wanted = [name for name in settings.variants if variant_of(name)[0].foresight == "forecast"]
        self.script = self._script(bool(wanted))
        predicts = self.script.predictor is not None
        self.entries = entries(settings, shape, predicts)
        if not self.entries:
            raise ConfigError("All of replay.variants need a predictor; name its run in checkpoints=[...].")
        learning = [name for name in settings.variants if variant_of(name)[0].eviction in LEARNS]
        if learning and self.script.fitted is None:
            raise ConfigError(
                f"{settings.script} was made without training documents, which {learning[0]} needs; delete "
                "it and make it again."
            )
        left = [] if predicts else wanted
        self.skipped = [{"variant": name, "reason": "no predictor is named"} for name in left]
        own = {name: variant_of(name)[1] for name in wanted}
        thresholds = {plan_name(n): self._least(n) if p is None else p for n, p in own.items()}
        self.documents = self.script.documents
        make_plans(self.documents, settings.lookahead, thresholds)
        known = asdict(settings) | {"resume": None, "trace": trace, "shape": shape.describe()}
        self.partial = Partial(folder, known, settings.resume)
        self.energy = EnergyCounter(self.device)

    @property
    def captures(self) -> bool:
        """Whether layers are launched as graphs."""
        return self.settings.graphs and self.settings.ahead and self.device.type == "cuda"

    def _least(self, name: str) -> float:
        """The threshold of a variant that names none."""
        return LEAST if variant_of(name)[0].eviction == "priced" else self.settings.threshold

    def _script(self, predicts: bool) -> Script:
        """From the file, or from the trace; then the file is written, if one is named."""
        settings, data = self.settings, self.data
        file = None if settings.script is None else Path(settings.script)
        count = settings.warmup + settings.documents
        if file is not None and file.exists():
            script = load_script(file)
            self.trace = script.trace
            made = script.identity
            check_trace(self.shape, script.trace, made["layers"], made["experts"], made["top_k"])
            return script.part(count, settings.tokens)
        spec, predictor = data.spec, None
        check_trace(self.shape, self.trace, spec.layers, spec.experts, spec.top_k)
        if settings.checkpoints and predicts:
            predictor = load_predictor(find_checkpoint(settings.checkpoints[0]))
        learns = file is not None or any(variant_of(n)[0].eviction in LEARNS for n in settings.variants)
        script = make_script(self.trace, data, settings.split, count, settings.tokens, predictor, learns)
        if file is not None:
            save_script(script, file)
            self.console.print(f"{file}: {count} documents, to be replayed elsewhere", highlight=False)
        return script

    def plan(self) -> list[tuple[int, Entry]]:
        """Rounds and entries in the order of measurement; the last round is the watched one."""
        turns = []
        for turn in range(self.settings.repeats + 1):
            by = turn * max(1, len(self.entries) // (self.settings.repeats + 1)) % len(self.entries)
            turns += [(turn, entry) for entry in [*self.entries[by:], *self.entries[:by]]]
        return turns

    def run(self) -> dict[str, Any]:
        """Measures everything that is still to be measured."""
        plan = self.plan()
        for left in self.skipped:
            self.console.print(f"{left['variant']} is left out: {left['reason']} (checkpoints=[...]).")
        if not self.energy.available and self.device.type == "cuda":
            self.console.print(NO_ENERGY)
        try:
            done = self.partial.measured
            self._measure_all([(t, e) for t, e in plan if f"{t}:{e.key}" not in done], len(plan))
        except KeyboardInterrupt:
            self.console.print(self.partial.farewell(len(plan), "replay"), style="bold", soft_wrap=True)
            raise SystemExit(130) from None
        measured = {(t, e.key): self.partial.measured[f"{t}:{e.key}"] for t, e in plan}
        rows, timelines = make_rows(self, measured)
        self.partial.finish()
        return {
            "mode": "replay",
            "split": self.script.split,
            "traces": [dict(self.script.identity)],
            "shape": self.shape.describe(),
            "replay": self.about(),
            "rows": rows,
            "timelines": timelines,
            "skipped": [{"trace": self.trace, **left} for left in self.skipped],
            "threads": torch.get_num_threads(),
        }

    def about(self) -> dict[str, Any]:
        """What a reader must know of the run, plain values."""
        layout = self.shape.layout(self.settings.codec)
        kept = (
            "codec",
            "tier",
            "host",
            "documents",
            "tokens",
            "warmup",
            "repeats",
            "dense",
            "head",
            "kernels",
            "ahead",
        )
        return {
            name: getattr(self.settings, name) for name in (*kept, "threshold", "lookahead", "prefetch_mib")
        } | {
            "device": str(self.device),
            "graphs": self.captures,
            "predictor": self.script.predictor,
            "slot_bytes": layout.slot_bytes,
            "block_bytes": layout.block_bytes,
            "energy": self.energy.available,
            "resumed": self.partial.taken,
        }

    def _measure_all(self, todo: list[tuple[int, Entry]], whole: int) -> None:
        if not todo:
            return
        with ExitStack() as stack:
            bar = stack.enter_context(progress(self.console))
            making = bar.add_task("making random experts", total=self.shape.layers * self.shape.experts)
            body = Body(self.shape, self.device, self.settings.dense, self.settings.head, self.settings.seed)
            graphs = self._graphs(body)
            blocks = RandomBlocks(self.shape, self.settings.codec, self.settings.seed)
            stores = stack.enter_context(
                Stores(
                    blocks, self.device, self.settings.tier, self.folder, self.settings.host,
                    lambda done, count: bar.update(making, completed=done, total=count),
                )
            )  # fmt: skip
            task = bar.add_task("measuring", total=whole, completed=whole - len(todo))
            for turn, entry in todo:
                bar.update(task, description=f"{entry.key}, round {turn + 1}")
                watched = turn == self.settings.repeats
                self.partial.add(f"{turn}:{entry.key}", self.measure(entry, stores, body, watched, graphs))
                bar.advance(task)

    def _graphs(self, body: Body) -> BodyGraphs | None:
        """The body as graphs, if that is how it runs."""
        if not self.captures:
            return None
        rows = self.shape.layers * max(len(document) for document in self.documents)
        return BodyGraphs(body, self.shape.layers, self.shape.top_k, rows)

    def measure(
        self, entry: Entry, stores: Stores, body: Body, watched: bool, graphs: BodyGraphs | None = None
    ) -> dict[str, Any]:
        """One entry: a new store, the warm-up documents, the others."""
        kind = entry.kind
        settings = store_settings(self.settings, kind.eviction, 1 << 20 if watched else 0)
        blocks = self.shape.layers * self.shape.experts
        warm, timed = self.documents[: self.settings.warmup], self.documents[self.settings.warmup :]
        with stores.open(entry.slots, settings) as store:
            if self.script.fitted is not None:
                self.script.fitted.tell(store, kind.eviction)
            if kind.eviction == "belady":
                store.set_future(all_events(self.documents))
            arenas = {name: store.arena(name) for name in self.shape.pieces}
            experts = SlotExperts(self.shape, arenas, self.settings.kernels)
            everything = kind.slots == "all"
            steps: Steps
            if graphs is None:
                body.restart()
                steps = OneByOne(body, experts, self.settings.ahead)
            else:
                steps = Captured(graphs, experts, everything)
            runner = Runner(steps, store, self.shape.torch_dtype, entry.plan(), everything)
            if entry.slots >= blocks and kind.slots == "residency":
                store.warm()
            for document in warm:
                runner.run(document)
            before = store.stats()
            probe = Probe(self.device) if watched else None
            seconds: list[float] = []
            with Meter(self.device, self.energy) as meter:
                for document in timed:
                    seconds += runner.run(document, probe)
            after = store.stats()
            found: dict[str, Any] = {
                "seconds": seconds,
                "meter": meter.as_dict(),
                "digest": body.digest(),
                "stats": {k: after[k] - before[k] for k in before if isinstance(before[k], int | float)},
                "device_bytes": after["device_bytes"] + body.bytes,
                "host_bytes": after["host_bytes"],
            }
            if probe is not None:
                found["watched"] = self._watched(entry, store.timeline(), probe, sum(seconds))
            del experts, steps, runner, arenas
        return found

    def _watched(
        self, entry: Entry, timeline: Sequence[Mapping[str, Any]], probe: Probe, seconds: float
    ) -> dict[str, Any]:
        """Shares of time, and the timeline of a few tokens in the middle."""
        lanes = probe.spans
        every = [span for spans in lanes.values() for span in spans]
        window: Span = (min(b for b, _ in every), max(e for _, e in every))
        moved = transfers(timeline, window)
        compute = [*lanes["dense"], *lanes["experts"]]
        shown = self._timeline_window(lanes)
        cut = {
            lane: [(max(b, shown[0]), min(e, shown[1])) for b, e in spans if e > shown[0] and b < shown[1]]
            for lane, spans in {**lanes, **moved}.items()
        }
        cut = {lane: spans for lane, spans in cut.items() if spans}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = write_chrome(self.folder / f"timeline-{slug(entry.name)}-{entry.residency:g}.json", cut)
        behind = hidden(moved, compute)
        return {
            "seconds": seconds,
            "compute": total(compute) * 1e-9,
            "wait": total(lanes["wait"]) * 1e-9,
            "copying": behind.copying,
            "copying_behind_compute": behind.behind,
            "copied_bytes": sum(
                event["args"]["bytes"]
                for event in timeline
                if event["name"].startswith(("copy", "direct")) and event["ts"] * 1e3 >= window[0]
            ),
            "file": path.name,
            "timeline": {
                lane: [[b - shown[0], e - shown[0]] for b, e in spans] for lane, spans in cut.items()
            },
        }

    def _timeline_window(self, lanes: Mapping[str, Sequence[Span]]) -> Span:
        """A few tokens in the middle of the last document."""
        dense, experts = lanes["dense"], lanes["experts"]
        layers, tokens = self.shape.layers, self.settings.timeline_tokens
        per_document = min(self.settings.tokens, len(dense) // layers)
        first = len(dense) // layers - per_document + max(0, (per_document - tokens) // 2)
        last = min(first + tokens, len(dense) // layers)
        return dense[first * layers][0], experts[last * layers - 1][1]


@contextmanager
def progress(console: Console) -> Iterator[Progress]:
    """A bar with the time that is left."""
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
        *(TextColumn("left"), TimeRemainingColumn()),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar


def replay(
    settings: ReplaySettings,
    shape: ModelShape,
    traces: Mapping[str, RoutingDataModule],
    folder: Path,
    console: Console | None = None,
) -> dict[str, Any]:
    """Replays one trace; returns the content of metrics.json.

    Raises:
        SpecgateError: for what makes no sense, or if variants compute different values.
    """
    if len(traces) != 1:
        raise ConfigError(
            f"mode=replay runs one trace and data= names {', '.join(traces)}; name one of them."
        )
    ((trace, data),) = traces.items()
    return Replay(settings, shape, trace, data, folder, console).run()
