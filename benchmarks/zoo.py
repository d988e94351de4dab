"""Everything that docs/RESULTS.md says of predictors, made anew: ``python -m benchmarks.zoo --out
outputs/zoo``.

Jobs run several at a time on every GPU (without one: one at a time, and slowly), each as soon as what it
reads is there; those that are timed run last, one at a time. A job whose result is there is not run again,
so an interrupted run is resumed by the same command; a job that fails is listed at the end, with its log,
and the others go on.

    collect    traces of the two reference models (prefill and decode), of further text to train on
               (``--more-text``, folders; ``--written``, olmoe_ref's own) and, if ``--shift-text`` names a
               folder, of text unlike theirs
    free       the free predictors and the oracle on every trace
    grid       every learned predictor on every trace, three seeds, the same number of steps
    quantized  two of them again, in float32 and trained for int8 and int4 weights
    best       the most accurate on each trace, and the best cheap one, trained longer and on more text
    shadow     the host's own next layers at reduced precision
    ensemble   of the seeds of the most accurate predictors
    more       calibration, uncertainty, quantisation
    cost       time and operations of a forecast
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.best import BEST
from benchmarks.scheduler import Job, Scheduler

STAGES = ("collect", "best", "grid", "quantized", "free", "shadow", "ensemble", "more", "cost")
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
QUANTIZED = ("router_residual", "expert_lowrank")
QUANTIZED_ON = ("olmoe_ref_prefill", "switch_ref_encoder")
PRECISIONS = {
    "float32": (),
    "int8": ("callbacks=quantized", "callbacks.quantize.bits=8"),
    "int4": ("callbacks=quantized", "callbacks.quantize.bits=4"),
}
IDS = ("gpt_oss_20b",)
"""Data sets without hidden states."""
SHIFTED = {"switch_ref_encoder": "switch_ref_encoder_shift", "olmoe_ref_prefill": "olmoe_ref_shift"}


WRITTEN_PART = 10000


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
    best_share: float = 1.0
    sequences: int = 20000
    decode_sequences: int = 8000
    written: int = 0
    more_text: Sequence[str] = ()
    shift_text: str | None = None
    cost_devices: Sequence[str] | None = None
    grid: bool = True
    best: bool = True
    gpu: bool = True

    def jobs(self, stage: str) -> list[Job]:
        """The jobs of a stage, longest first."""
        jobs: list[Job] = getattr(self, f"_{stage}")()
        return jobs

    # ------------------------------------------------------------------ traces

    @property
    def traces(self) -> Path:
        """Where the traces are."""
        return self.root / "traces"

    def _trace(self, folder: str) -> Path:
        return self.traces / folder / "trace.json"

    def _needs(self, data: str, *folders: str) -> tuple[Path, ...]:
        return tuple(self._trace(name) for name in (TRACE.get(data, data), *folders))

    @property
    def _written(self) -> list[str]:
        """Names of the traces of text that olmoe_ref writes itself."""
        return [f"olmoe_ref_written{part}" for part in range(-(-self.written // WRITTEN_PART))]

    @property
    def _further(self) -> list[str]:
        """Names of all traces that olmoe_ref's best predictors learn from besides its own."""
        return [f"olmoe_ref_text{part}" for part, _ in enumerate(self.more_text)] + self._written

    def _collect(self) -> list[Job]:
        most = f"sequences={self.sequences}"
        decode = ("phase=decode", f"sequences={self.decode_sequences}")
        jobs = [
            self._collected("switch_ref", "moe=switch_ref", most),
            self._collected("olmoe_ref", "moe=olmoe_ref", most),
            self._collected("olmoe_ref_decode", "moe=olmoe_ref", *decode),
        ]
        jobs += [self._written_and_collected(part, name) for part, name in enumerate(self._written)]
        for part, folder in enumerate(self.more_text):
            text = (f"text.sources={Path(folder).resolve()}", f"text.prefix=text{part}_")
            text += ("text.split=train", "text.exclude_bundled=true", "sequences=1000000")
            jobs.append(self._collected(f"olmoe_ref_text{part}", "moe=olmoe_ref", "text=directory", *text))
        if self.shift_text is not None:
            shift = ("text=directory", f"text.sources={self.shift_text}", f"sequences={self.sequences // 20}")
            jobs += [self._collected(f"{m}_shift", f"moe={m}", *shift) for m in ("olmoe_ref", "switch_ref")]
        used = {TRACE.get(name, name).removesuffix("_decode") for name in self.data}
        return [job for job in jobs if any(job.name.startswith(f"collect/{name}") for name in used)]

    def _collected(self, name: str, *options: str) -> Job:
        common = ("batch_size=256", "shard_sequences=1024", "control=sample", "moe.dtype=float32")
        command = ("collect.py", *common, f"out={self.traces / name}", *options)
        folder = f"hydra.run.dir={self.out}/collect/{name}"
        return Job(f"collect/{name}", (*command, folder), self._trace(name))

    def _written_and_collected(self, part: int, name: str) -> Job:
        text = self.out / "text" / f"{name}.txt.xz"
        count = min(WRITTEN_PART, self.written - WRITTEN_PART * part)
        write = f"{sys.executable} -m specgate.moe.generate olmoe_ref --out {text} --documents {count}"
        files = ("text=files", f"text.sources={text}", "text.split=train", f"sequences={count}")
        job = self._collected(name, "moe=olmoe_ref", *files)
        read = f"{sys.executable} {' '.join(job.command)}"
        both = f"{write} --seed {part} --batch-size 2048 && {read}"
        return replace(job, command=("sh", "-c", both))

    # ------------------------------------------------------------------ predictors

    def _data(self, name: str, *more: str) -> list[str]:
        """Which data set; with ``more``, on these traces besides its own."""
        options = [f"data={name}", f"paths.data={self.root}", "data.verify=false", "data.cache=auto"]
        if more:  # several processes' copies of so much would not fit: read from disk
            options[-1] = "data.cache=null"
            folders = [self.traces / folder for folder in (TRACE.get(name, name), *more)]
            options.append(f"data.traces=[{','.join(map(str, folders))}]")
        return options

    def _free(self) -> list[Job]:
        return [
            self._benchmark("accuracy", data, "data.batch_size=32", name=f"free/{data}") for data in self.data
        ]

    def _train(
        self, name: str, data: str, seeds: Sequence[int], *options: str, epochs: int, more: Sequence[str] = ()
    ) -> Job:
        """One run, or one job for several: they share the process, and with it what the GPU holds of the
        trace."""
        many = any(option.startswith("hydra.sweep.subdir=") for option in options)
        command = ["train.py", *(["-m"] if many else []), "experiment=zoo", *self._data(data, *more)]
        command += ["logger=none", f"trainer.max_epochs={epochs}", "callbacks.progress=null"]
        command += ["data.batch_size=16"] * (data in IDS) + ["trainer=cpu"] * (not self.gpu)
        folder = self.out / name
        command += [f"seed={','.join(map(str, seeds))}", *options]
        command.append(f"hydra.{'sweep' if many else 'run'}.dir={folder}")
        result = folder / ("sweep.json" if many else "metrics.json")
        return Job(name, tuple(command), result, self._needs(data, *more))

    def _grid(self) -> list[Job]:
        jobs = []
        for group in GROUPS:
            models = [model for model in group if model in self.models]
            for data in self.data if models else ():
                name, epochs = self._group(data, group), self.ids_epochs if data in IDS else self.epochs
                subdir = "hydra.sweep.subdir=${hydra.runtime.choices.model}/${seed}"
                options = (f"model={','.join(models)}", subdir)
                jobs.append(self._train(name, data, self.seeds, *options, epochs=epochs))
        return jobs

    def _group(self, data: str, group: Sequence[str]) -> str:
        return f"grid/{data}/{'-'.join(model for model in group if model in self.models)}"

    def _runs(self, data: str, model: str) -> Path:
        """The folder of the grid's runs of a predictor, one per seed."""
        return self.out / self._group(data, next(group for group in GROUPS if model in group)) / model

    def _ensembled(self, data: str) -> dict[str, Path]:
        """Folders of several seeds, by name: planned, or there from before."""
        runs = {model: self._runs(data, model) for model in ENSEMBLED if model in self.models}
        best = {f"best_{m}": self.out / f"best/{data}/{m}" for name, m in BEST if name == data}

        def there(folder: Path) -> bool:
            return (folder / str(self.seeds[0]) / "predictor.ckpt").is_file()

        found = {name: folder for name, folder in runs.items() if self.grid or there(folder)}
        return found | {name: folder for name, folder in best.items() if self.best or there(folder)}

    def _best(self) -> list[Job]:
        jobs = []
        for (data, model), run in BEST.items():
            more = () if run.more is None else (*run.more, *self._further)
            for seed in self.seeds if data in self.data else ():
                name = f"best/{data}/{model}/{seed}"
                epochs = max(1, round(self.best_share * run.epochs))
                options = (f"model={model}", *run.options)
                jobs.append(self._train(name, data, [seed], *options, epochs=epochs, more=more))
        return jobs

    def _quantized(self) -> list[Job]:
        jobs = []
        for data in (name for name in QUANTIZED_ON if name in self.data):
            models = f"model={','.join(QUANTIZED)}"
            for precision, quantize in PRECISIONS.items():
                subdir = "hydra.sweep.subdir=${hydra.runtime.choices.model}"
                name = f"quantized/{data}/{precision}"
                options = (models, *quantize, subdir)
                jobs.append(self._train(name, data, self.seeds[:1], *options, epochs=self.epochs))
        return jobs

    def _shadow(self) -> list[Job]:
        jobs = []
        for data in (name for name in self.data if name not in IDS):
            for experts in ("none", "one", "all"):
                model = ("model=shadow", f"model.experts_run={experts}", "data.batch_size=32")
                jobs.append(self._fitted(f"shadow/{data}/{experts}", data, model))
        return jobs

    def _fitted(self, name: str, data: str, options: Sequence[str], needs: Sequence[Path] = ()) -> Job:
        """A run of train.py that optimises nothing."""
        command = ("train.py", *self._data(data), *options, "logger=none", "callbacks.progress=null")
        place = ("trainer=gpu",) if self.gpu else ()
        run = (f"hydra.run.dir={self.out}/{name}",)
        needed = (*self._needs(data), *needs)
        return Job(name, (*command, *place, *run), self.out / name / "metrics.json", needed)

    def _ensemble(self) -> list[Job]:
        jobs = []
        for data in self.data:
            for name, runs in self._ensembled(data).items():
                files = [runs / f"{seed}" / "predictor.ckpt" for seed in self.seeds]
                for combine in ("mean", "stacking"):
                    model = ("model=ensemble", f"model.combine={combine}", "data.batch_size=16")
                    options = (*model, f"model.checkpoints=[{','.join(map(str, files))}]")
                    jobs.append(self._fitted(f"ensemble/{data}/{name}_{combine}", data, options, files))
        return jobs

    # ------------------------------------------------------------------ benchmarks

    def _more(self) -> list[Job]:
        jobs, first = [], str(self.seeds[0])
        for data, members in ((data, self._ensembled(data)) for data in self.data):
            shifted = (f"{TRACE[data]}_shift",) if self.shift_text and data in SHIFTED else ()
            shift = [f"shift=[{SHIFTED[data]}]"] if shifted else []
            checkpoints = [folder / first for folder in members.values()]
            # by shape, not by trace: the best ones saw more traces than this
            options = ("calibrate.match=shape", *shift)
            job = self._benchmark("calibration", data, *options, checkpoints=checkpoints, more=shifted)
            jobs += [job] if members else []
            if data in QUANTIZED_ON:
                files = [
                    self.out / f"quantized/{data}/{p}/{model}" for p in PRECISIONS for model in QUANTIZED
                ]
                jobs.append(self._benchmark("quantize", data, checkpoints=files))
            for label, folder in members.items() if shifted else ():
                name, seeds = f"uncertainty/{data}_{label}", [folder / str(seed) for seed in self.seeds]
                job = self._benchmark("uncertainty", data, checkpoints=seeds, name=name, more=shifted)
                both = (f"data=[{data},{SHIFTED[data]}]",)
                command = tuple(c for c in job.command if c != f"data={data}") + both
                jobs.append(replace(job, command=command))
        return jobs

    def _cost(self) -> list[Job]:
        jobs = []
        for data in self.data:
            best = {
                model: [o for o in run.options if o.startswith("model.")]
                for (name, model), run in BEST.items()
                if name == data
            }
            models = [
                *self.models,
                *(" ".join([m, *(o[6:] for o in options)]) for m, options in best.items() if options),
            ]
            options = [f"cost.models=[{','.join(map(_quoted, models))}]"]  # weights do not matter to it
            if self.cost_devices:
                options.append(f"cost.devices=[{','.join(self.cost_devices)}]")
            jobs.append(replace(self._benchmark("cost", data, *options), alone=True))
        return jobs

    def _benchmark(
        self,
        mode: str,
        data: str,
        *options: str,
        checkpoints: Sequence[Path] = (),
        name: str | None = None,
        more: Sequence[str] = (),
    ) -> Job:
        """``benchmark.py`` on a data set; ``more``: names of further traces that it reads."""
        name = name or f"{mode}/{data}"
        command = ["benchmark.py", f"mode={mode}", *self._data(data), *options]
        if checkpoints:
            command.append(f"checkpoints=[{','.join(map(str, checkpoints))}]")
        command.append(f"hydra.run.dir={self.out}/{name}")
        needs = (*self._needs(data, *more), *(run / "predictor.ckpt" for run in checkpoints))
        return Job(name, tuple(command), self.out / name / "metrics.json", needs)


def _quoted(text: str) -> str:
    """As one value of a list on Hydra's command line."""
    return f"'{text}'" if set(text) & set(" =[],") else text


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 1 if a job failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description="Make all results anew.")
    parser.add_argument("--root", type=Path, default=Path("data"), help="traces are in its folder traces/")
    parser.add_argument("--out", type=Path, default=Path("outputs/zoo"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="first come first")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--models", nargs="+", choices=LEARNED, default=list(LEARNED))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--ids-epochs", type=int, default=20, help="on traces without hidden states")
    parser.add_argument("--best-share", type=float, default=1.0, help="of the epochs of stage best")
    parser.add_argument("--sequences", type=int, default=20000)
    parser.add_argument("--decode-sequences", type=int, default=8000)
    parser.add_argument("--written", type=int, default=0, help="documents that olmoe_ref writes")
    parser.add_argument(
        "--more-text",
        nargs="+",
        default=[],
        help="folders of text that stage best learns from, one trace each",
    )
    parser.add_argument("--shift-text", default=None, help="a folder of text unlike the bundled one")
    parser.add_argument("--cost-devices", nargs="+", default=None, help="cpu, cuda (all there are)")
    parser.add_argument("--per-gpu", type=int, default=4, help="jobs at a time on each GPU")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be run")
    args = vars(parser.parse_args(arguments))
    stages, per_gpu, dry = args.pop("stages"), args.pop("per_gpu"), args.pop("dry_run")
    console, gpus = Console(), torch.cuda.device_count()
    plan = Plan(**(args | {"root": args["root"].resolve(), "out": args["out"].resolve()}), gpu=gpus > 0)
    made = {job.result for job in plan.jobs("collect") if "collect" in stages}
    absent = [name for name in plan.data if any(p not in made and not p.is_file() for p in plan._needs(name))]
    for name in absent:
        console.print(f"left out: {name}, no trace in {plan.traces} (see docs/traces.md)", soft_wrap=True)
    plan.data = [name for name in plan.data if name not in absent]
    plan.grid, plan.best = "grid" in stages, "best" in stages
    jobs = [job for stage in stages for job in plan.jobs(stage)]
    if dry:
        for job in jobs:
            print(job.name, *job.command)
        return 0
    scheduler = Scheduler(plan.out, gpus, per_gpu, console)
    scheduler.run(jobs)
    for name, why in scheduler.failed:
        console.print(f"failed: {name} ({why})", style="red")
    return 1 if scheduler.failed else 0


if __name__ == "__main__":
    sys.exit(main())
