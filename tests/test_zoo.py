"""benchmarks/zoo.py: its jobs are commands that exist; done ones are not run again, failed ones are named."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from benchmarks.scheduler import Job, Scheduler
from benchmarks.zoo import ENSEMBLED, LEARNED, STAGES, Plan, main
from specgate.predictors.registry import predictor_class
from tests.test_configs import CONF, composed

MANY = ("seed=", "model=")


def plan(tmp_path: Path) -> Plan:
    return Plan(tmp_path, tmp_path / "out", written=15000, more_text=("more",), shift_text="texts")


@pytest.mark.parametrize("stage", STAGES)
def test_jobs_are_commands_that_compose(stage: str, tmp_path: Path) -> None:
    jobs = plan(tmp_path).jobs(stage)
    assert len({job.name for job in jobs}) == len(jobs) > 0
    assert len({job.result for job in jobs}) == len(jobs)
    for job in jobs[:: max(1, len(jobs) // 6)]:
        command = list(job.command)
        if command[0] == "sh":
            command = command[2].split("&&")[1].split()[1:]
        entry = command[0].removesuffix(".py")
        overrides = [c for c in command[1:] if c != "-m" and not c.startswith("hydra.")]
        overrides = [c.split(",")[0] if c.startswith(MANY) else c for c in overrides]
        cfg = composed(CONF, entry, overrides, tmp_path)
        assert OmegaConf.is_config(cfg)


def test_every_learned_predictor_takes_part() -> None:
    models = {file.stem for file in (CONF / "model").glob("*.yaml")} - {"ensemble", "shadow"}
    assert set(LEARNED) == {name for name in models if predictor_class(name).learned}
    assert set(ENSEMBLED) <= set(LEARNED)


def test_every_need_is_made_by_a_job(tmp_path: Path) -> None:
    made = plan(tmp_path)
    jobs = [job for stage in STAGES for job in made.jobs(stage)]
    results = {job.result for job in jobs} | {made.traces / "gpt_oss_20b" / "trace.json"}
    sweeps = {job.result.parent for job in jobs if job.result.name == "sweep.json"}
    for path in {path for job in jobs for path in job.needs}:
        run = path.parent  # of a checkpoint: <sweep>/<model>/<seed>, or the folder of a single run
        known = path in results or run / "metrics.json" in results
        known = known or run.parent in sweeps or run.parent.parent in sweeps
        assert known, f"nothing makes {path}"


def script(tmp_path: Path, name: str, code: str = "", **more: Any) -> Job:
    """A job that notes when it starts and ends, runs ``code`` in between, and leaves its result."""
    result = tmp_path / name / "metrics.json"
    lines = (
        f"import pathlib, time; log = pathlib.Path({str(tmp_path / 'order')!r}).open('a')",
        f"log.write('start {name}\\n'); log.flush(); time.sleep(0.1)",
        code,
        f"p = pathlib.Path({str(result)!r}); p.parent.mkdir(); p.write_text('x')",
        f"log.write('end {name}\\n')",
    )
    return Job(name, ("-c", "\n".join(lines)), result, **more)


def test_scheduler_waits_for_needs_and_runs_timed_jobs_alone(tmp_path: Path) -> None:
    first = script(tmp_path, "first")
    timed = script(tmp_path, "timed", alone=True)
    after = script(tmp_path, "after", needs=(first.result,))
    never = script(tmp_path, "never", needs=(tmp_path / "absent",))
    scheduler = Scheduler(tmp_path, 0, 1, Console(quiet=True))
    scheduler.places = [None, None]
    scheduler.run([timed, after, first, never])
    order = (tmp_path / "order").read_text().splitlines()
    assert order == ["start first", "end first", "start after", "end after", "start timed", "end timed"]
    assert scheduler.failed == [("never", f"nothing made {tmp_path / 'absent'}")]


def test_scheduler_resumes_and_lists_failures(tmp_path: Path) -> None:
    def job(name: str, code: str) -> Job:
        return Job(name, ("-c", code), tmp_path / name / "metrics.json")

    done = tmp_path / "done" / "metrics.json"
    done.parent.mkdir()
    done.write_text("old")
    new = str(tmp_path / "new")
    make = f"import pathlib; p = pathlib.Path({new!r}); p.mkdir(); (p / 'metrics.json').write_text('x')"
    jobs = [
        job("done", "raise SystemExit('must not run')"),
        job("new", make),
        job("broken", "raise SystemExit('no such trace')"),
        job("silent", "pass"),
    ]
    scheduler = Scheduler(tmp_path, 0, 1, Console(quiet=True))
    scheduler.run(jobs)
    assert done.read_text() == "old"
    assert (tmp_path / "new" / "metrics.json").is_file()
    assert {name for name, _ in scheduler.failed} == {"broken", "silent"}
    log = Path(dict(scheduler.failed)["broken"]).read_text()
    assert "no such trace" in log
    assert log.startswith(sys.executable)


def test_dry_run_says_what_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dry-run", "--stages", "collect", "--root", str(tmp_path), "--out", str(tmp_path / "o")]
    assert main(arguments) == 0
    told, *lines = capsys.readouterr().out.splitlines()
    assert told.startswith("left out: gpt_oss_20b")
    assert [line.split()[0] for line in lines] == [
        "collect/switch_ref",
        "collect/olmoe_ref",
        "collect/olmoe_ref_decode",
    ]
    assert not (tmp_path / "o").exists()
