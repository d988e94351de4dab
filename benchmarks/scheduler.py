"""Commands that depend on each other's results, run several at a time on every GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Job:
    """One command, started once ``needs`` exist; ``result`` exists once it has succeeded. A job that is timed
    runs ``alone``, after all others."""

    name: str
    command: tuple[str, ...]
    result: Path
    needs: tuple[Path, ...] = ()
    alone: bool = False


class Scheduler:
    """Runs jobs, ``per_gpu`` at a time on each GPU; keeps each one's output in ``<out>/logs``."""

    def __init__(self, out: Path, gpus: int, per_gpu: int, console: Console) -> None:
        self.out, self.console = out, console
        self.places: list[int | None] = [gpu for _ in range(per_gpu) for gpu in range(gpus)] or [None]
        self.failed: list[tuple[str, str]] = []
        self.running: dict[subprocess.Popen[bytes], tuple[Job, int | None, float]] = {}

    def run(self, jobs: Sequence[Job]) -> None:
        """Run what has no result yet, in this order as far as their needs allow."""
        waiting = [job for job in jobs if not job.result.is_file()]
        if len(waiting) < len(jobs):
            self.console.print(f"{len(jobs) - len(waiting)} of {len(jobs)} jobs are done already")
        columns = (
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
            *(TextColumn("left"), TimeRemainingColumn()),
        )
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task("jobs", total=len(waiting))
            try:
                while waiting or self.running:
                    while job := self._next(waiting):
                        waiting.remove(job)
                        self._start(job)
                    if not self.running:
                        break
                    time.sleep(0.2)
                    for _ in range(self._collect()):
                        bar.advance(task)
            finally:
                for process in self.running:
                    process.terminate()
        for job in waiting:
            missing = next((path for path in job.needs if not path.is_file()), job.result)
            self.failed.append((job.name, f"nothing made {missing}"))

    def _next(self, waiting: Sequence[Job]) -> Job | None:
        """The first job that may start now; None if there is no place or none is ready."""
        if not self.places or any(job.alone for job, _, _ in self.running.values()):
            return None
        ready = [job for job in waiting if all(path.is_file() for path in job.needs)]
        together = next((job for job in ready if not job.alone), None)
        return together or (ready[0] if ready and not self.running else None)

    def _start(self, job: Job) -> None:
        place = self.places.pop(0)
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
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
            )
        self.running[process] = (job, place, time.perf_counter())

    def _collect(self) -> int:
        """Take the processes that have ended off the list; how many there were."""
        ended = [process for process in self.running if process.poll() is not None]
        for process in ended:
            job, place, started = self.running.pop(process)
            self.places.append(place)
            if process.returncode or not job.result.is_file():
                self.failed.append((job.name, str(self._log(job))))
                seconds = time.perf_counter() - started
                self.console.print(f"{job.name} failed after {seconds:.0f} s: see {self._log(job)}")
        return len(ended)

    def _log(self, job: Job) -> Path:
        return self.out / "logs" / f"{job.name.replace('/', '-')}.log"
