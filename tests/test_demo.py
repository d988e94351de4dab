"""The demo: its plumbing, with entry points that do nothing but say that they ran."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specgate import demo
from specgate.errors import SpecgateError

FAKE = """
import json, pathlib, sys
if {fails!r} in sys.argv[0]:
    sys.exit(3)
folder = pathlib.Path(next(a.split("=", 1)[1] for a in sys.argv if a.startswith("hydra.run.dir=")))
calls = folder / "calls"
calls.write_text(str(int(calls.read_text()) + 1) if calls.exists() else "1")
(folder / "accuracy.png").write_bytes(b"png")
(folder / "report.html").write_text("<p>")
(folder / "metrics.json").write_text(json.dumps({{"schema_version": 1, "rows": [{{"n": 1}}], "traces": []}}))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    root.mkdir()
    for name in demo.ENTRY_POINTS:
        (root / name).write_text(FAKE.format(fails="nothing"))
    return root


def calls(output: Path) -> dict[str, int]:
    return {file.parent.name: int(file.read_text()) for file in sorted(output.glob("*/calls"))}


def test_plan_runs_the_real_entry_points_in_order(tmp_path: Path) -> None:
    steps = demo.plan(tmp_path)
    entries = [step.command[1] for step in steps]
    assert entries == ["collect.py", "train.py", "collect.py", "train.py", "benchmark.py"]
    assert {step.name.partition("-")[2] for step in steps} == {"switch_ref", "olmoe_ref", ""}
    assert all(step.shown.startswith("python ") for step in steps)
    names = [step.name for step in steps]
    assert all(names.index(need) < i for i, step in enumerate(steps) for need in step.needs)


def test_a_second_run_skips_what_is_done_and_repeats_what_depends_on_a_change(
    checkout: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    file = demo.run(checkout, output)
    assert set(calls(output).values()) == {1}
    record = json.loads(file.read_text())
    assert record["rows"] == [{"n": 1}]
    assert [step["resumed"] for step in record["steps"]] == [False] * 5
    assert record["seconds"] == pytest.approx(sum(step["seconds"] for step in record["steps"]), abs=0.02)
    assert capfd.readouterr().out.splitlines()[-1] == str(file)

    demo.run(checkout, output)
    assert set(calls(output).values()) == {1}
    assert "to run it again" in capfd.readouterr().out

    (output / "collect-olmoe_ref" / "metrics.json").unlink()
    record = json.loads(demo.run(checkout, output).read_text())
    assert calls(output) == {
        "benchmark": 2,
        "collect-olmoe_ref": 2,
        "collect-switch_ref": 1,
        "train-olmoe_ref": 2,
        "train-switch_ref": 1,
    }
    assert [step["resumed"] for step in record["steps"]] == [True, True, False, False, False]


def test_changed_settings_run_again(checkout: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    demo.run(checkout, output)
    demo.run(checkout, output, extra=["trainer.max_epochs=2"])
    assert calls(output)["train-switch_ref"] == 2
    assert calls(output)["collect-switch_ref"] == 1


def test_a_trace_of_another_size_is_replaced(checkout: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    demo.run(checkout, output)
    traces = [output / "traces" / name for name in ("switch_ref", "olmoe_ref")]
    for trace in traces:
        trace.mkdir(parents=True)
    hosts = (demo.HOSTS[0], demo.Host("olmoe_ref", "olmoe_ref_prefill", 7))
    demo.run(checkout, output, hosts)
    assert [trace.exists() for trace in traces] == [True, False]


def test_a_failing_step_is_named_and_the_finished_ones_are_kept(checkout: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (checkout / "train.py").write_text(FAKE.format(fails="train.py"))
    with pytest.raises(SpecgateError, match=r"python train\.py .* ended with exit code 3"):
        demo.run(checkout, output)
    (checkout / "train.py").write_text(FAKE.format(fails="nothing"))
    demo.run(checkout, output)
    assert calls(output)["collect-switch_ref"] == 1


def test_a_step_that_writes_no_metrics_is_an_error(checkout: Path, tmp_path: Path) -> None:
    (checkout / "collect.py").write_text("")
    with pytest.raises(SpecgateError, match=r"wrote no .*metrics\.json"):
        demo.run(checkout, tmp_path / "out")


def test_outside_a_checkout_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(SpecgateError, match=r"has no collect\.py"):
        demo.run(tmp_path, tmp_path / "out")


def test_timing_table_adds_up() -> None:
    table = demo.timing_table(
        [demo.Timing("a", "x", 1.25, 1.5), demo.Timing("bb", "y", 2.5, 2.0, resumed=True)]
    )
    assert "3.8 s" in table
    assert "earlier run" in table.splitlines()[1]
