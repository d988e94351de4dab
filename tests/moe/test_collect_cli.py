"""``python collect.py`` as a person types it, on a tiny host and a little text."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from specgate.errors import TextError
from specgate.moe.batches import SAMPLED
from specgate.moe.sources import dataset_documents
from specgate.moe.summary import LayerLoad, loads, normalised_entropy
from specgate.traces.store import TraceReader
from tests.moe.tiny_hosts import Paths

ROOT = Path(__file__).parent.parent.parent
SMALL = ["sequences=24", "length=16", "batch_size=4", "shard_sequences=8", "hidden=fp16"]


def command(*overrides: str) -> list[str]:
    return [sys.executable, "collect.py", "moe=hf", "moe.device=cpu", *SMALL, *overrides]


def run(*overrides: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "110", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*overrides), cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )


@pytest.fixture(scope="module")
def collected(
    saved_hosts: Paths, text_files: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A prefill collection of the tiny Switch: its run folder and what it printed."""
    root = tmp_path_factory.mktemp("cli")
    done = run(
        f"moe.path={saved_hosts['switch_transformers']}",
        "text=files", f"text.sources=[{','.join(text_files)}]",
        f"paths.root={root}", f"hydra.run.dir={root / 'run'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return root, done.stdout


def test_it_says_what_it_will_do_and_what_it_found(collected: tuple[Path, str]) -> None:
    root, printed = collected
    lines = printed.strip().splitlines()
    assert lines[-1] == str(root / "run" / "metrics.json")
    text = " ".join(printed.split())
    assert "24 sequences from" in text
    assert "encoder: 2 MoE layers, top-1 of 8 experts, fp16 hidden states (32) of 2 layers" in text
    assert "in 3 shards at" in text
    assert "about 0 seconds" in text or "about 1 seconds" in text or "seconds (" in text
    assert "100.00% are what executed" in text
    assert "load entropy" in text
    assert "dropped" in text
    assert "always naming the most popular experts finds" in text


def test_metrics_agree_with_the_trace(collected: tuple[Path, str]) -> None:
    root, _ = collected
    metrics = json.loads((root / "run" / "metrics.json").read_text())
    out = root / "data" / "traces" / "switch_transformers"
    assert metrics["trace"] == str(out)
    reader = TraceReader(out)
    assert metrics["tokens"] == sum(reader.header.tokens(s) for s in reader.header.stacks)
    assert metrics["routing_control"]["agreement"] == 1.0
    assert metrics["threads"] == 1
    for name, found in metrics["stacks"].items():
        view = reader.stack(name)
        everything = np.arange(view.num_tokens)
        experts_NL = view.gather("experts", everything)[..., 0]
        dropped_NL = view.gather("dropped", everything)
        train_S = view.sequences.split_S == 0
        for layer, row in enumerate(found["layers"]):
            counts = [int((experts_NL[:, layer] == e).sum()) for e in range(8)]
            p = [c / sum(counts) for c in counts if c]
            assert row["entropy"] == pytest.approx(-sum(x * math.log(x) for x in p) / math.log(8))
            assert row["drop_rate"] == pytest.approx(dropped_NL[:, layer].mean())
            assert row["top_experts"][0][1] == pytest.approx(max(counts) / sum(counts))
            known: list[int] = []
            scored: list[int] = []
            for s in range(len(view.sequences)):
                start, length = view.sequences.start_S[s], view.sequences.length_S[s]
                piece = experts_NL[start : start + length, layer].tolist()
                known += piece if train_S[s] else []
                scored += piece if view.sequences.split_S[s] == 1 else []
            favourite = max(range(8), key=lambda e: (known.count(e), -e))
            assert row["popularity_recall"] == pytest.approx(scored.count(favourite) / len(scored))


def test_the_heat_map_is_a_picture(collected: tuple[Path, str]) -> None:
    root, _ = collected
    pixels = imread(root / "run" / "expert_load.png")
    assert pixels.shape[0] > 400
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 50


@pytest.mark.slow
def test_decode_goes_to_a_folder_of_its_own_and_survives_sigkill(
    saved_hosts: Paths, text_files: list[str], tmp_path: Path
) -> None:
    arguments = (
        f"moe.path={saved_hosts['olmoe']}", "text=directory", f"text.sources={Path(text_files[0]).parent}",
        "phase=decode", "prompt_length=8", "length=40", "sequences=40", f"paths.root={tmp_path}",
    )  # fmt: skip
    out = tmp_path / "data" / "traces" / "olmoe_decode"
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list((out / "shards").glob("*.safetensors")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "trace.json").exists()
    again = run(*arguments)
    assert again.returncode == 0, again.stderr
    assert "shards are there already" in " ".join(again.stdout.split())
    fresh = run(*arguments, f"out={tmp_path / 'fresh'}")
    assert fresh.returncode == 0, fresh.stderr
    names = sorted(str(f.relative_to(out)) for f in out.rglob("*") if f.is_file())
    assert names == sorted(
        str(f.relative_to(tmp_path / "fresh")) for f in (tmp_path / "fresh").rglob("*") if f.is_file()
    )
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes(), name


def test_a_mistake_is_one_sentence_and_no_traceback(saved_hosts: Paths, tmp_path: Path) -> None:
    done = run(
        f"moe.path={saved_hosts['olmoe']}", "text=files", "text.sources=no.txt", f"paths.root={tmp_path}"
    )
    assert done.returncode == 1
    assert "Text source no.txt does not exist" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_text_from_datasets(tmp_path: Path) -> None:
    rows = [{"body": f"row {i} " * 60, "kind": "ab"[i % 2]} for i in range(6)] + [
        {"body": "short", "kind": "a"}
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    source = str(tmp_path / "rows.jsonl")
    found = dataset_documents("json", column="body", domain_column="kind", data_files=source)
    assert [d.text for d in found] == [row["body"] for row in rows[:6]]
    assert [d.domain for d in found] == list("ababab")
    assert len({d.name for d in found}) == 6
    assert len(dataset_documents("json", column="body", data_files=source, limit=2)) == 2
    with pytest.raises(TextError, match=r"'json' has no column 'text'; text.column can be body, kind"):
        dataset_documents("json", data_files=source)
    with pytest.raises(TextError, match="no row of 5000 characters"):
        dataset_documents("json", column="body", data_files=source, minimum_characters=5000)
    with pytest.raises(TextError, match="Cannot read the data set 'json'"):
        dataset_documents("json", data_files=str(tmp_path / "missing.jsonl"))


def test_entropy_is_normalised() -> None:
    assert normalised_entropy(np.array([5, 5, 5, 5])) == pytest.approx(1.0)
    assert normalised_entropy(np.array([9, 0, 0, 0])) == 0.0
    assert normalised_entropy(np.array([1, 1, 0, 0])) == pytest.approx(0.5)
    assert normalised_entropy(np.zeros(4)) == 0.0
    assert SAMPLED > 1


def test_popularity_never_looks_at_test_documents(collected: tuple[Path, str]) -> None:
    """The figure is the same when the test documents' routing is wiped out."""
    root, _ = collected
    view = TraceReader(root / "data" / "traces" / "switch_transformers").stack("encoder")
    before: list[LayerLoad] = loads(view)
    table = view.sequences
    hidden = np.concatenate(
        [
            np.arange(table.start_S[s], table.start_S[s] + table.length_S[s])
            for s in np.flatnonzero(table.split_S == 2)
        ]
    )
    original = view.gather

    def wiped(field: str, token_index: np.ndarray) -> np.ndarray:
        values = original(field, token_index).copy()
        values[np.isin(token_index, hidden)] = 0
        return values

    view.gather = wiped  # type: ignore[method-assign]
    after = loads(view)
    assert [r.popularity_recall for r in before] == [r.popularity_recall for r in after]
    assert [r.entropy for r in before] != [r.entropy for r in after]


@pytest.mark.slow
def test_ctrl_c_ends_with_the_remedy_and_its_exit_code(
    saved_hosts: Paths, text_files: list[str], tmp_path: Path
) -> None:
    arguments = command(
        f"moe.path={saved_hosts['olmoe']}", "text=directory", f"text.sources={Path(text_files[0]).parent}",
        "phase=decode", "prompt_length=8", "length=100", "sequences=40", f"out={tmp_path / 'trace'}",
        f"paths.root={tmp_path}",
    )  # fmt: skip
    process = subprocess.Popen(
        arguments,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background may have inherited an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list((tmp_path / "trace").glob("shards/*.safetensors")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to go on" in " ".join(printed.split())
    assert "Traceback" not in printed
