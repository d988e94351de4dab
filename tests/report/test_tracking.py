"""What a run leaves for Weights & Biases, read back from its offline file."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

from specgate.report.tracking import summary_of, sweep_group

ROOT = Path(__file__).parent.parent.parent
BLOCK = 32768
FULL, FIRST, LAST = 1, 2, 4


def records(file: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file: a log of LevelDB's format after a header of seven bytes."""
    data, at, parts = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # no header fits: the rest of the block is padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        piece, at = data[at + 7 : at + 7 + length], at + 7 + length
        parts = piece if kind in (FULL, FIRST) else parts + piece
        if kind in (FULL, LAST):
            found = wandb_internal_pb2.Record()
            found.ParseFromString(parts)
            yield found


def contents(file: Path) -> dict[str, Any]:
    """Group, configuration, summary, history keys and artifacts of a run."""
    found: dict[str, Any] = {"group": "", "config": {}, "summary": {}, "history": set(), "artifacts": []}

    def key(item: Any) -> str:
        return item.key or "/".join(item.nested_key)

    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["group"] = record.run.run_group or found["group"]
            found["config"] |= {key(i): json.loads(i.value_json) for i in record.run.config.update}
        elif kind == "config":
            found["config"] |= {key(i): json.loads(i.value_json) for i in record.config.update}
        elif kind == "summary":
            found["summary"] |= {key(i): json.loads(i.value_json) for i in record.summary.update}
        elif kind == "history":
            found["history"] |= {i.key or i.nested_key[0] for i in record.history.item}
        elif kind == "artifact":
            entries = [entry.path for entry in record.artifact.manifest.contents]
            found["artifacts"].append((record.artifact.type, record.artifact.name, entries))
    return found


def test_two_jobs_are_two_whole_runs_of_one_group(tiny_traces: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "monday" / "sweep"
    command = [
        sys.executable, str(ROOT / "train.py"), "-m", f"hydra.sweep.dir={folder}", "logger=wandb",
        "model=mlp", "model.width=8,16", f"data.traces={tiny_traces['olmoe']}", "data.window=32", "threads=1",
        "trainer=debug", "trainer.log_every_n_steps=1",
        "data.max_sequences={train: 24, validation: 8, test: 8}", "data.batch_size=8",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
        env=os.environ | {"WANDB_DATA_DIR": str(tmp_path / "data"), "WANDB_MODE": "offline"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted(folder.rglob("*.wandb"))
    assert len(files) == 2
    assert len({file.stem for file in files}) == 2
    for file, width in zip(sorted(files, key=lambda f: f.relative_to(folder).parts[0]), (8, 16), strict=True):
        found = contents(file)
        metrics = json.loads((folder / file.relative_to(folder).parts[0] / "metrics.json").read_text())
        assert found["group"] == "monday_sweep"
        assert found["config"]["model"]["width"] == width
        assert found["config"]["data"]["window"] == 32
        expected = summary_of(metrics["rows"])
        assert len(expected) > 50
        summary = {key: found["summary"].get(key) for key in expected}
        assert summary == pytest.approx(expected)
        assert found["summary"]["parameters"] == metrics["parameters"]
        assert {"train/loss", "val/recall", "pictures/reliability", "pictures/layers"} <= found["history"]
        (artifact,) = [one for one in found["artifacts"] if one[0] == "predictor"]
        assert artifact[2] == ["predictor.ckpt"]
        images = [image.read_bytes() for image in file.parent.glob("files/media/images/pictures/*.png")]
        assert len(images) == 2
        assert all(image.startswith(b"\x89PNG") for image in images)


def test_only_a_logger_without_a_group_gets_one() -> None:
    assert sweep_group({"group": "mine"}) == {}
    assert sweep_group({"save_dir": "x"}) == {}
