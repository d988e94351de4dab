"""Everything that docs/RESULTS.md says of predictors, made anew: ``python -m benchmarks.zoo --out
outputs/zoo``.

Runs in stages, each a set of independent jobs, several at a time on every GPU (without one: one at a time,
and slowly). A job whose result is there is not run again, so an interrupted run is resumed by the same
command; a job that fails is listed at the end, with its log, and the others go on.

    collect    traces of the two reference models (prefill and decode), of text that olmoe_ref writes itself,
    and,
               if ``--shift-text`` names a folder, of text unlike theirs
    free       the free predictors and the oracle on every trace
    grid       every learned predictor on every trace, three seeds, the same number of steps
    best       settings of their own for two that ``docs/predictors.md`` makes claims of, on more text
    shadow     the host's own next layers at reduced precision
    ensemble   of the grid's seeds of the most accurate predictors
    more       calibration, uncertainty, quantisation, cost
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

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

ROOT = Path(__file__).parent.parent
STAGES = ("collect", "free", "grid", "best", "shadow", "ensemble", "more")
DATA = ("switch_ref_encoder", "switch_ref_decoder", "olmoe_ref_prefill", "olmoe_ref_decode", "gpt_oss_20b")
TRACE = {
    "switch_ref_encoder": "switch_ref",
    "switch_ref_decoder": "switch_ref",
    "olmoe_ref_prefill": "olmoe_ref",
}
GROUPS = (
    ("attention",),
    ("transformer_xl", "seq2seq"),
    ("gnn", "meta_moe"),
    ("hierarchical", "expert_lowrank"),
    ("router_residual", "mlp"),
)
"""What one process trains, one after the other: it reads the trace once, and imports everything once."""
LEARNED = tuple(model for group in GROUPS for model in group)
ENSEMBLED = ("attention", "transformer_xl", "router_residual")


@dataclass(frozen=True)
class Job:
    """One command; ``result`` exists once it has succeeded."""

    name: str
    command: tuple[str, ...]
    result: Path


@dataclass
class Plan:
    """What is run where (see ``--help``)."""

    root: Path
    out: Path
    data: Sequence[str] = DATA
    models: Sequence[str] = LEARNED
    seeds: Sequence[int] = (0, 1, 2)
    epochs: int = 6
    ids_epochs: int = 20
    sequences: int = 20000
    decode_sequences: int = 8000
    written: int = 0
    shift_text: str | None = None
    gpu: bool = True

    def jobs(self, stage: str) -> list[Job]:
        """The jobs of a stage, longest first."""
        jobs: list[Job] = getattr(self, f"_{stage}")()
        return jobs

    def _job(self, name: str, *command: str, result: Path | None = None) -> Job:
        return Job(name, command, result or self.out / name / "metrics.json")

    def _data(self, name: str, *more: str) -> list[str]:
        """Which data set; with ``more``, on these traces besides its own."""
        options = [f"data={name}", f"paths.data={self.root}", "data.verify=false", "data.cache=auto"]
        if more:
            folders = [self.traces / folder for folder in (TRACE.get(name, name), *more)]
            options.append(f"data.traces=[{','.join(map(str, folders))}]")
        return options

    @property
    def traces(self) -> Path:
        """Where the traces are."""
        return self.root / "traces"

    def _here(self, names: Iterable[str] | None = None) -> list[str]:
        """The data sets whose traces exist."""
        return [n for n in (names or self.data) if (self.traces / TRACE.get(n, n) / "trace.json").is_file()]

    def _collected(self, name: str, *options: str) -> Job:
        out = self.traces / name
        common = [
            "batch_size=256",
            "shard_sequences=1024",
            "control=sample",
            "moe.dtype=float32",
            f"out={out}",
        ]
        return self._job(
            f"collect/{name}",
            *("collect.py", *common, *options, f"hydra.run.dir={self.out}/collect/{name}"),
            result=out / "trace.json",
        )

    def _collect(self) -> list[Job]:
        most = f"sequences={self.sequences}"
        jobs = [
            self._collected("switch_ref", "moe=switch_ref", most),
            self._collected("olmoe_ref", "moe=olmoe_ref", most),
            self._collected(
                "olmoe_ref_decode", "moe=olmoe_ref", "phase=decode", f"sequences={self.decode_sequences}"
            ),
        ]
        if self.shift_text is not None:
            shift = ("text=directory", f"text.sources={self.shift_text}", f"sequences={self.sequences // 20}")
            jobs += [self._collected(f"{m}_shift", f"moe={m}", *shift) for m in ("olmoe_ref", "switch_ref")]
        for part in range(-(-self.written // 10000)):
            name, count = f"olmoe_ref_written{part}", min(10000, self.written - 10000 * part)
            text = self.out / "text" / f"{name}.txt.xz"
            write = f"-m specgate.moe.generate olmoe_ref --out {text} --documents {count} --seed {part}"
            read = (
                "moe=olmoe_ref",
                "text=files",
                f"text.sources={text}",
                "text.split=train",
                f"sequences={count}",
            )
            read_job = self._collected(name, *read)
            both = (
                f"{sys.executable} {write} --batch-size 2048 && {sys.executable} {' '.join(read_job.command)}"
            )
            jobs.append(Job(read_job.name, ("sh", "-c", both), read_job.result))
        return jobs

    def _free(self) -> list[Job]:
        return [
            self._job(
                f"free/{name}",
                *("benchmark.py", "mode=accuracy", *self._data(name), "data.batch_size=32"),
                f"hydra.run.dir={self.out}/free/{name}",
            )
            for name in self._here()
        ]

    def _train(self, name: str, data: str, *options: str, more: Sequence[str] = ()) -> Job:
        """One job for all seeds: they share the process, and with it what the GPU holds of the trace."""
        ids = data == "gpt_oss_20b"
        command = ["train.py", "-m", "experiment=zoo", *self._data(data, *more), "logger=none"]
        command += [
            f"trainer.max_epochs={self.ids_epochs if ids else self.epochs}",
            "callbacks.progress=null",
        ]
        command += ["data.batch_size=16"] * ids + ["trainer=cpu"] * (not self.gpu)
        command += [f"seed={','.join(map(str, self.seeds))}", *options]
        command += [f"hydra.sweep.dir={self.out}/{name}"]
        if not any(option.startswith("hydra.sweep.subdir=") for option in options):
            command.append("hydra.sweep.subdir=${seed}")
        return self._job(name, *command, result=self.out / name / "sweep.json")

    def _grid(self) -> list[Job]:
        jobs = []
        for group in GROUPS:
            models = [model for model in group if model in self.models]
            for data in self._here() if models else ():
                name = f"grid/{data}/{'-'.join(models)}"
                subdir = "hydra.sweep.subdir=${hydra.runtime.choices.model}/${seed}"
                jobs.append(self._train(name, data, f"model={','.join(models)}", subdir))
        return jobs

    def _ensembled(self) -> list[str]:
        return [model for model in ENSEMBLED if model in self.models]

    def _runs(self, data: str, model: str) -> Path:
        """The folder of the grid's runs of a predictor, one per seed."""
        group = next(group for group in GROUPS if model in group)
        return self.out / "grid" / data / "-".join(m for m in group if m in self.models) / model

    def _best(self) -> list[Job]:
        written = [path.parent.name for path in sorted(self.traces.glob("olmoe_ref_written*/trace.json"))]
        settings = {
            ("olmoe_ref_prefill", "attention"): ["model.width=64", "model.regress=40.0"],
            ("olmoe_ref_prefill", "expert_lowrank"): [
                *("model.units=[24,12,6,6]", "model.heads=2", "model.value_width=24", "model.dropout=0.1")
            ],
            ("switch_ref_encoder", "attention"): ["model.units=64", "model.regress=8.0"],
            ("switch_ref_encoder", "expert_lowrank"): [
                "model.units=64",
                "model.heads=2",
                "model.dropout=0.1",
            ],
        }
        longer = f"trainer.max_epochs={self.epochs * 2}"
        return [
            self._train(
                f"best/{data}/{model}",
                data,
                *(f"model={model}", *options, longer),
                more=written if data == "olmoe_ref_prefill" else (),
            )
            for (data, model), options in settings.items()
            if data in self._here()
        ]

    def _shadow(self) -> list[Job]:
        return [
            self._job(
                f"shadow/{data}/{experts}",
                *(
                    "train.py",
                    "model=shadow",
                    f"model.experts_run={experts}",
                    *self._data(data),
                    "logger=none",
                ),
                *("data.batch_size=32", "callbacks.progress=null", *(["trainer=gpu"] if self.gpu else [])),
                f"hydra.run.dir={self.out}/shadow/{data}/{experts}",
            )
            for data in self._here()
            if data != "gpt_oss_20b"
            for experts in ("none", "one", "all")
        ]

    def _ensemble(self) -> list[Job]:
        jobs = []
        for data in self._here():
            for model in self._ensembled():
                for combine in ("mean", "stacking"):
                    name = f"ensemble/{data}/{model}_{combine}"
                    jobs.append(
                        self._job(
                            name,
                            *("train.py", "model=ensemble", f"model.combine={combine}", *self._data(data)),
                            *("logger=none", "data.batch_size=16", "callbacks.progress=null"),
                            *(["trainer=gpu"] if self.gpu else []),
                            f"model.checkpoints=[{self._runs(data, model)}]",
                            f"hydra.run.dir={self.out}/{name}",
                        )
                    )
        return jobs

    def _more(self) -> list[Job]:
        jobs = []
        for data in self._here():
            runs = {m: self._runs(data, m) / str(self.seeds[0]) for m in self.models}
            runs = {m: run for m, run in runs.items() if (run / "predictor.ckpt").is_file()}
            if not runs:
                continue
            every = f"checkpoints=[{','.join(map(str, runs.values()))}]"
            shifted = f"{data.removesuffix('_prefill')}_shift"
            there = (self.traces / f"{TRACE.get(data, data)}_shift" / "trace.json").is_file()
            shift = [f"shift=[{shifted}]"] if there and data in TRACE and "decoder" not in data else []
            best = sorted((self.out / "best" / data).glob(f"*/{self.seeds[0]}/predictor.ckpt"))
            costed = ",".join(map(str, [*runs.values(), *(file.parent for file in best)]))
            settings = [*self._data(data), "cost.match=shape"]  # the best ones saw more traces than this
            free = self.out / "free" / data
            if (free / "metrics.json").is_file():  # recall of the free predictors, for the picture
                settings.append(f"cost.metrics=[{free}]")
            jobs.append(self._benchmark("cost", data, settings, f"checkpoints=[{costed}]"))
            jobs.append(self._benchmark("calibration", data, self._data(data), every, *shift))
            if "router_residual" in runs:
                one = f"checkpoints=[{runs['router_residual']}]"
                jobs.append(self._benchmark("quantize", data, self._data(data), one))
            if shift:
                for model in self._ensembled():
                    members = f"checkpoints=[{self._runs(data, model)}]"
                    both = [f"data=[{data},{shifted}]", *self._data(data)[1:]]
                    job = self._benchmark("uncertainty", data, both, members, name=f"{data}_{model}")
                    jobs.append(job)
        return jobs

    def _benchmark(
        self, mode: str, data: str, overrides: Sequence[str], *more: str, name: str | None = None
    ) -> Job:
        name = f"{mode}/{name or data}"
        run = f"hydra.run.dir={self.out}/{name}"
        return self._job(name, "benchmark.py", f"mode={mode}", *overrides, *more, run)


class Scheduler:
    """Runs jobs, ``per_gpu`` at a time on each GPU; keeps each one's output in ``<out>/logs``."""

    def __init__(self, out: Path, gpus: int, per_gpu: int, console: Console) -> None:
        self.out, self.console = out, console
        self.places: SimpleQueue[int | None] = SimpleQueue()
        self.workers = max(1, gpus * per_gpu)
        for i in range(self.workers):
            self.places.put(i % gpus if gpus else None)
        self.failed: list[tuple[str, Path]] = []

    def run(self, stage: str, jobs: Sequence[Job]) -> None:
        """Run what has no result yet."""
        left = [job for job in jobs if not job.result.is_file()]
        if len(left) < len(jobs):
            self.console.print(f"{stage}: {len(jobs) - len(left)} of {len(jobs)} jobs are done already")
        columns = (
            *(TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
            *(TextColumn("left"), TimeRemainingColumn()),
        )
        with Progress(*columns, console=self.console) as bar, ThreadPoolExecutor(self.workers) as pool:
            task = bar.add_task(stage, total=len(left))
            waiting: set[Future[tuple[Job, int, float]]] = {pool.submit(self._one, job) for job in left}
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    job, code, seconds = future.result()
                    bar.advance(task)
                    if code or not job.result.is_file():
                        self.failed.append((job.name, self._log(job)))
                        self.console.print(f"{job.name} failed after {seconds:.0f} s: see {self._log(job)}")

    def _log(self, job: Job) -> Path:
        return self.out / "logs" / f"{job.name.replace('/', '-')}.log"

    def _one(self, job: Job) -> tuple[Job, int, float]:
        place, started = self.places.get(), time.perf_counter()
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", "2")
        if place is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(place)
        command = job.command if job.command[0] == "sh" else (sys.executable, *job.command)
        log = self._log(job)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            file.write(" ".join(command) + "\n")
            file.flush()
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
            ).returncode
        self.places.put(place)
        return job, code, time.perf_counter() - started


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 1 if a job failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description="Make all results anew.")
    parser.add_argument("--root", type=Path, default=Path("data"), help="traces are in its folder traces/")
    parser.add_argument("--out", type=Path, default=Path("outputs/zoo"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--models", nargs="+", default=list(LEARNED))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--ids-epochs", type=int, default=20, help="on traces without hidden states")
    parser.add_argument("--sequences", type=int, default=20000)
    parser.add_argument("--decode-sequences", type=int, default=8000)
    parser.add_argument(
        "--written", type=int, default=0, help="documents that olmoe_ref writes, for stage best"
    )
    parser.add_argument("--shift-text", default=None, help="a folder of text unlike the bundled one")
    parser.add_argument("--per-gpu", type=int, default=4, help="jobs at a time on each GPU")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be run")
    args = vars(parser.parse_args(arguments))
    stages, per_gpu, dry = args.pop("stages"), args.pop("per_gpu"), args.pop("dry_run")
    console, gpus = Console(), torch.cuda.device_count()
    plan = Plan(**(args | {"root": args["root"].resolve(), "out": args["out"].resolve()}), gpu=gpus > 0)
    scheduler = Scheduler(plan.out, gpus, per_gpu, console)
    for stage in stages:
        if dry:
            for job in plan.jobs(stage):
                print(job.name, *job.command)
        else:
            scheduler.run(stage, plan.jobs(stage))
    for name, log in scheduler.failed:
        console.print(f"failed: {name} ({log})", style="red")
    return 1 if scheduler.failed else 0


if __name__ == "__main__":
    sys.exit(main())
