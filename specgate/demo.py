"""``make demo``: two real MoEs are traced on real text, and a predictor is trained on each and compared.

It runs the same entry points that a person would type, prints each command before it runs, skips the parts
that an earlier run of the demo has finished, and writes ``outputs/demo/metrics.json``: steps, seconds, rows.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from specgate.errors import SpecgateError
from specgate.report.record import Run, read_record

ENTRY_POINTS = ("collect.py", "train.py", "benchmark.py")


@dataclass(frozen=True)
class Host:
    """A bundled MoE as the demo uses it.

    Attributes:
        name: of conf/moe and of the trace.
        data: of conf/data: which stack and phase are foreseen.
        sequences: how many sequences of 128 tokens are traced.
    """

    name: str
    data: str
    sequences: int


HOSTS = (Host("switch_ref", "switch_ref_encoder", 1000), Host("olmoe_ref", "olmoe_ref_prefill", 1000))
#: All training documents are learnt from; of the others, so many sequences are enough for the demo's table.
SCORED = "data.max_sequences={validation:60,test:120}"


@dataclass(frozen=True)
class Step:
    """One command of the demo; it has been done when ``folder`` holds a metrics.json made by this command.

    Attributes:
        needs: names of the steps whose output it reads: when one of them runs again, so does this.
        makes: a folder outside of ``folder`` that it fills; another command's is removed before it runs.
    """

    name: str
    command: list[str]
    folder: Path
    needs: tuple[str, ...] = ()
    makes: Path | None = None

    @property
    def shown(self) -> str:
        """The command as a person would type it."""
        return shlex.join(["python", *self.command[1:]])

    @property
    def metrics(self) -> Path:
        """The file that the entry point writes when it is done."""
        return self.folder / "metrics.json"

    @property
    def stamp(self) -> Path:
        """Which command filled the folder, and how long it took."""
        return self.folder / "demo-step.json"

    def other_command(self) -> bool:
        """Whether the folder was last filled, in part or whole, by another command."""
        began = self.folder / "demo-command.txt"
        return began.is_file() and began.read_text() != self.shown

    def earlier(self) -> Timing | None:
        """What an earlier run of the same command cost, None if it has not finished."""
        if not (self.metrics.is_file() and self.stamp.is_file()):
            return None
        stamp = json.loads(self.stamp.read_text())
        if stamp["command"] != self.shown:
            return None
        return Timing(self.name, self.shown, stamp["seconds"], stamp["cpu_seconds"], resumed=True)


@dataclass
class Timing:
    """What one step cost.

    Attributes:
        seconds: by the clock.
        cpu_seconds: of all its threads; on a busy machine they say more.
        resumed: the seconds are an earlier run's.
    """

    name: str
    command: str
    seconds: float
    cpu_seconds: float
    resumed: bool = False


def plan(output: Path, hosts: Sequence[Host] = HOSTS, extra: Sequence[str] = ()) -> list[Step]:
    """The demo's steps in order: collect and train per host, then one benchmark over all.

    Args:
        output: where runs go; traces go to ``output/traces``.
        hosts: which bundled MoEs.
        extra: overrides for every train.py run (a test makes them short).
    """
    data = f"paths.data={output}"

    def step(name: str, *arguments: str, needs: tuple[str, ...] = (), makes: Path | None = None) -> Step:
        folder = output / name
        return Step(name, [sys.executable, *arguments, data, f"hydra.run.dir={folder}"], folder, needs, makes)

    steps = []
    for host in hosts:
        collect, train = f"collect-{host.name}", f"train-{host.name}"
        size, trace = f"sequences={host.sequences}", output / "traces" / host.name
        steps.append(step(collect, "collect.py", f"moe={host.name}", size, makes=trace))
        steps.append(
            step(
                train,
                "train.py",
                "experiment=demo",
                f"data={host.data}",
                "test=false",
                SCORED,
                *extra,
                needs=(collect,),
            )
        )
    trained = tuple(f"train-{host.name}" for host in hosts)
    data_sets = ",".join(host.data for host in hosts)
    runs = ",".join(str(output / name) for name in trained)
    compared = ("mode=accuracy", f"data=[{data_sets}]", SCORED, f"checkpoints=[{runs}]")
    steps.append(step("benchmark", "benchmark.py", *compared, needs=trained))
    return steps


def run_step(step: Step, root: Path, again: bool = False) -> Timing:
    """Runs one step unless it is done already, its output going straight to the terminal.

    Args:
        again: run it even if it is done, since what it reads has changed.

    Raises:
        SpecgateError: if the command fails.
    """
    before = None if again else step.earlier()
    if before is not None:
        say(
            f"\n$ {step.shown}\n  done in {before.seconds:.0f} s before; delete {step.folder} to run it again"
        )
        return before
    say(f"\n$ {step.shown}")
    if step.makes is not None and step.other_command():
        shutil.rmtree(step.makes, ignore_errors=True)
    step.folder.mkdir(parents=True, exist_ok=True)
    (step.folder / "demo-command.txt").write_text(step.shown)
    start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    # Threads that wait give their core away; spinning ones are four times slower on a busy machine.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    done = subprocess.run(step.command, cwd=root, env=environment, check=False)
    seconds, total = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SpecgateError(
            f"`{step.shown}` ended with exit code {done.returncode}: mend what it says above and run make "
            "demo again; the finished steps are kept"
        )
    if not step.metrics.is_file():
        raise SpecgateError(f"`{step.shown}` wrote no {step.metrics}: run it by hand to see why")
    cpu = total.ru_utime - used.ru_utime + total.ru_stime - used.ru_stime
    timing = Timing(step.name, step.shown, round(seconds, 2), round(cpu, 2))
    step.stamp.write_text(json.dumps(asdict(timing)))
    return timing


def say(text: str) -> None:
    """Prints at once, so that it stands before what the next command prints."""
    print(text, flush=True)


def timing_table(timings: Sequence[Timing]) -> str:
    """Seconds per step and in all, as lines of text."""
    total = Timing("in all", "", sum(t.seconds for t in timings), sum(t.cpu_seconds for t in timings))
    width = max(len(timing.name) for timing in timings)
    return "\n".join(
        f"  {t.name:<{width}}  {t.seconds:7.1f} s  ({t.cpu_seconds:.0f} s of processor time)"
        + ("  earlier run" if t.resumed else "")
        for t in [*timings, total]
    )


def run(root: Path, output: Path, hosts: Sequence[Host] = HOSTS, extra: Sequence[str] = ()) -> Path:
    """The whole demo.

    Returns:
        the path of its metrics.json.

    Raises:
        SpecgateError: if this is not a checkout, or a step fails.
    """
    missing = [name for name in ENTRY_POINTS if not (root / name).is_file()]
    if missing:
        raise SpecgateError(
            f"{root} has no {missing[0]}: the demo runs in a checkout of the repository (make demo)"
        )
    log = Run("demo")
    steps = plan(output, hosts, extra)
    say(f"{len(steps)} steps; each command below can be typed by hand. Results go to {output}.")
    timings: dict[str, Timing] = {}
    for step in steps:
        again = any(not timings[name].resumed for name in step.needs)
        timings[step.name] = run_step(step, root, again)
    benchmark = output / "benchmark"
    result = read_record(benchmark)
    pictures = [str(picture.relative_to(output)) for picture in sorted(benchmark.rglob("*.png"))]
    file = log.write(
        output,
        command="make demo",
        seconds=round(sum(timing.seconds for timing in timings.values()), 2),
        cpu_seconds=round(sum(timing.cpu_seconds for timing in timings.values()), 2),
        steps=[asdict(timing) for timing in timings.values()],
        pictures=pictures,
        traces=result["traces"],
        rows=result["rows"],
    )
    say("\nTime of each step:\n" + timing_table(list(timings.values())))
    say("\nPictures:\n" + "\n".join(f"  {output / picture}" for picture in pictures))
    say(
        "Report, to open in a browser:\n"
        + "\n".join(f"  {page}" for page in sorted(benchmark.rglob("*.html")))
    )
    say(str(file))
    return file


def main(argv: list[str] | None = None) -> int:
    """Command line of the demo; returns its exit code."""
    parser = argparse.ArgumentParser(prog="specgate demo", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="where runs and traces go")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier demo has finished")
    options = parser.parse_args(argv)
    if options.fresh:
        shutil.rmtree(options.output, ignore_errors=True)
    try:
        run(Path(__file__).parent.parent, options.output)
    except SpecgateError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
