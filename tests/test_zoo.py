"""benchmarks/zoo.py: its jobs are commands that exist; done ones are not run again, failed ones are named."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from benchmarks.zoo import DATA, ENSEMBLED, LEARNED, STAGES, Job, Plan, Scheduler, main
from specgate.predictors.registry import predictor_class
from tests.test_configs import CONF, composed


def plan(tmp_path: Path) -> Plan:
    for name in (
        "switch_ref",
        "olmoe_ref",
        "olmoe_ref_decode",
        "gpt_oss_20b",
        "olmoe_ref_written0",
        "olmoe_ref_shift",
    ):
        (tmp_path / "traces" / name).mkdir(parents=True)
        (tmp_path / "traces" / name / "trace.json").write_text("{}")
    made = Plan(tmp_path, tmp_path / "out", written=15000, shift_text="texts")
    for data in DATA:
        for model in LEARNED:
            run = made._runs(data, model) / "0"
            run.mkdir(parents=True)
            (run / "predictor.ckpt").touch()
    return made


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
        overrides = [c.split(",")[0] if c.startswith(("seed=", "model=")) else c for c in overrides]
        cfg = composed(CONF, entry, overrides, tmp_path)
        assert OmegaConf.is_config(cfg)


def test_every_learned_predictor_takes_part() -> None:
    models = {file.stem for file in (CONF / "model").glob("*.yaml")} - {"ensemble", "shadow"}
    assert set(LEARNED) == {name for name in models if predictor_class(name).learned}
    assert set(ENSEMBLED) <= set(LEARNED)


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
    scheduler.run("test", jobs)
    assert done.read_text() == "old"
    assert (tmp_path / "new" / "metrics.json").is_file()
    assert {name for name, _ in scheduler.failed} == {"broken", "silent"}
    log = dict(scheduler.failed)["broken"].read_text()
    assert "no such trace" in log
    assert log.startswith(sys.executable)


def test_dry_run_says_what_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dry-run", "--stages", "collect", "--root", str(tmp_path), "--out", str(tmp_path / "o")]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "collect/switch_ref",
        "collect/olmoe_ref",
        "collect/olmoe_ref_decode",
    ]
    assert not (tmp_path / "o").exists()
