"""mode=simulate: documents become workloads, policies run them, what they reached is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console

from specgate.calibration.load import load_predictor
from specgate.errors import ConfigError
from specgate.policy.hardware import Hardware
from specgate.policy.registry import policy
from specgate.policy.roofline import RUNTIMES, costs_of
from specgate.policy.rules import Rules
from specgate.report.modes import run_mode
from specgate.report.plan_sizes import check_decoding, sizes_of
from specgate.report.publish import publish
from specgate.report.record import Run, read_record
from specgate.report.replay_shape import ModelShape
from specgate.report.replay_trace import renewed_PH
from specgate.report.results import make
from specgate.report.simulate import simulate
from specgate.report.simulate_foresight import foresight_of
from specgate.report.simulate_page import policies_of
from specgate.report.simulate_rows import interval, resampled, share_of_gain
from specgate.report.simulate_settings import SimulateSettings, slots_for
from specgate.report.simulate_trace import documents_of
from specgate.runtime import native
from specgate.runtime.simulator import simulate as run_simulation
from specgate.traces.datamodule import RoutingDataModule
from tests.report.replays import E, K, L, data_of, save_predictor, shape, write_decode_trace
from tests.test_configs import CONF
from tests.traces.helpers import header_for, stack_info, write_trace

pytestmark = pytest.mark.skipif(not native.available(), reason="the native core is not built")
SWITCH: dict[str, Any] = {
    "model_type": "switch_transformers", "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2,
    "num_decoder_layers": L, "num_heads": 2, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": L,
    "num_experts": E, "vocab_size": 64,
}  # fmt: skip
NAMES = ["on_demand", "lru", "priced", "priced part=evict_only", "belady", "oracle"]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decode_trace(tmp_path_factory.mktemp("simulate") / "trace")


@pytest.fixture(scope="module")
def checkpoint(trace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_predictor(data_of(trace), tmp_path_factory.mktemp("simulate") / "predictor.ckpt")


def machine(**changes: Any) -> Hardware:
    """A slow link, so that policies differ."""
    values: dict[str, Any] = {
        "name": "slow", "device": "a test's", "device_gb": 1.0, "device_gb_per_s": 100.0, "tflops": 1.0,
        "link_gb_per_s": 0.05, "link_latency_us": 1.0, "host_gb": 8.0, "host_gb_per_s": 10.0,
        "file_gb_per_s": 0.01, "file_latency_us": 50.0, "kernel_us": 1.0, "source": "made up",
    }  # fmt: skip
    return Hardware(**(values | changes))


def quick(checkpoint: Path | None = None, **changes: Any) -> SimulateSettings:
    found = [] if checkpoint is None else [str(checkpoint)]
    values: dict[str, Any] = {
        "policies": NAMES,
        "residency": [0.25, 0.5],
        "checkpoints": found,
        "resamples": 100,
    }
    return SimulateSettings(**(values | {"device": "cpu"} | changes))


def policies(names: list[str] = NAMES) -> dict[str, Any]:
    made = {}
    for name in names:
        first, *options = name.split()
        made[name] = policy(first, **dict(option.split("=") for option in options))
    return made


@pytest.fixture(scope="module")
def record(trace: Path, checkpoint: Path) -> dict[str, Any]:
    return simulate(
        quick(checkpoint, batches=[1, 2]), policies(), shape(), {"slow": machine()}, {"tiny": data_of(trace)}
    )


# ---------------------------------------------------------------------- documents


def test_documents_are_the_trace_and_its_forecasts_are_the_predictors(trace: Path, checkpoint: Path) -> None:
    data, predictor = data_of(trace), load_predictor(checkpoint)
    found = documents_of(data, "test", predictors={"predictor": predictor})
    batches = list(data.test_dataloader())
    assert len(found["none"]) == len(found["predictor"])
    assert found["none"][0].forecasts is None
    seen = {w.names[0]: w for w in found["predictor"]}
    done = dict.fromkeys(seen, 0)  # tokens compared so far; a document may be several sequences
    for batch in batches:
        with torch.no_grad():
            p_BTPHE = predictor.probabilities(batch)
        for b in range(len(batch.document_B)):
            name = data.documents[int(batch.document_B[b])]
            workload, first = seen[name], done[name]
            keep = batch.mask_BT[b].nonzero().flatten()
            done[name] += len(keep)
            for t, token in enumerate(keep.tolist(), first):
                for layer in range(L):
                    wanted = sorted(set(batch.experts_BTLK[b, token, layer].tolist()))
                    assert workload.event(t * L + layer) == wanted
                for point in range(L + 1):
                    assert workload.forecasts is not None
                    got = {(h, e): p for h, e, p in workload.forecasts.at(t * (L + 1) + point)}
                    for (h, e), p in got.items():
                        assert p == pytest.approx(float(p_BTPHE[b, token, point, h - 1, e]), abs=1e-6)
                        assert t * L + point + h - 1 < workload.events
                    if t + 1 < workload.steps:
                        assert len(got) >= K  # an untrained predictor leaves no expert out
    assert done == {name: w.steps for name, w in seen.items()}


def test_far_horizons_are_renewed_now_and_then() -> None:
    renewed = renewed_PH(25, 24)
    assert renewed[:, :6].all()
    assert renewed[:, 6:].any(1).tolist() == [p % 6 == 0 for p in range(25)]


def test_few_documents_and_tokens(trace: Path) -> None:
    found = documents_of(data_of(trace), "train", 3, 5)["none"]
    assert [w.steps for w in found] == [5, 5, 5]
    assert len({w.names for w in found}) == 3


def test_dropped_tokens_need_no_expert(tmp_path: Path) -> None:
    """A Switch decoder's trace: the expert that a dropped token was meant for is not asked for."""
    stacks = {
        "encoder": stack_info(L=2, E=E, K=1, D=None, hidden="none"),
        "decoder": stack_info(L=L, E=E, K=1, D=None, hidden="none", dropped=True),
    }
    header = header_for(stacks, documents=40, phases=["decode"])
    (content,) = write_trace(tmp_path, stacks, [[12] * 40], header=header, phases=(1,), routers=False)[
        "decoder"
    ]
    data = RoutingDataModule(tmp_path, stack="decoder", phase="decode", window=12, batch_size=8)
    used, tokens = 0, 0
    for split in ("train", "validation", "test"):
        for found in documents_of(data, split)["none"]:
            assert found.layers == L
            used, tokens = used + len(found.expert_M), tokens + found.steps
    assert content.dropped is not None
    scored = np.repeat(np.arange(40), 12)  # every token of every sequence
    assert tokens == len(scored)
    assert used == int((~content.dropped.astype(bool)).sum()) < tokens * L
    document = max(documents_of(data, "test")["none"], key=lambda w: w.steps)
    empty = [n for n in range(document.events) if not document.event(n)]
    assert empty
    costs = costs_of(
        sizes_of(ModelShape("tiny", SWITCH, "float32")), document, machine(), runtime=RUNTIMES["replay"]
    )
    result = run_simulation(document, costs, Rules(eviction="lru"), 4)
    assert int(result.demands_D.sum()) == len(document.expert_M)


def test_a_decoder_s_layers_are_what_a_trace_must_have(trace: Path) -> None:
    sizes = sizes_of(ModelShape("tiny", SWITCH, "float32"))
    check_decoding(sizes, "fits", L, E, 1)
    with pytest.raises(
        ConfigError, match=f"12 layers, 1 of {E} experts, and shape tiny decodes with {L} layers"
    ):
        check_decoding(sizes, "both", 12, E, 1)


# ---------------------------------------------------------------------- what is reached


def test_every_cell_holds_every_policy(record: dict[str, Any]) -> None:
    rows = record["rows"]
    assert [(r["batch"], r["residency"], r["policy"]) for r in rows] == [
        (batch, share, name) for batch in (1, 2) for share in (0.25, 0.5) for name in NAMES
    ]
    for row in rows:
        low, speed, high = (row[f"tokens_per_second{x}"] for x in ("_low", "", "_high"))
        if row["documents"] < 2 * row["batch"]:
            assert low is high is None
        else:
            assert low <= speed <= high
        assert 0 < row["against_resident"] <= 1 + 1e-9
        assert row["slots"] >= (K if row["batch"] == 1 else 2)
    by = {(r["batch"], r["residency"], r["policy"]): r for r in rows}
    for batch in (1, 2):
        for share in (0.25, 0.5):
            demand, lru, belady, oracle = (
                by[batch, share, name] for name in ("on_demand", "lru", "belady", "oracle")
            )
            assert demand["hit_rate"] == 0
            assert lru["share_of_gain"] == 0
            assert oracle["share_of_gain"] == 1
            assert lru["hit_rate"] <= belady["hit_rate"] + 1e-12
            assert demand["tokens_per_second"] <= lru["tokens_per_second"] <= oracle["tokens_per_second"]
            assert "best_reference" in by[batch, share, "priced"]
            assert by[batch, share, "priced part=evict_only"]["prefetch_bytes"] == 0


def test_bytes_and_time_add_up(record: dict[str, Any], trace: Path) -> None:
    size = shape().layout().block_bytes
    for row in record["rows"]:
        if row["policy"] == "on_demand" and row["batch"] == 1:
            assert row["demand_bytes"] == pytest.approx(L * K * size)  # nothing stays
    steps = sum(w.steps for w in documents_of(data_of(trace), "test")["none"])
    assert {row["tokens"] for row in record["rows"] if row["batch"] == 1} == {steps}


def test_the_same_again(record: dict[str, Any], trace: Path, checkpoint: Path) -> None:
    again = simulate(
        quick(checkpoint, batches=[1, 2]), policies(), shape(), {"slow": machine()}, {"tiny": data_of(trace)}
    )
    assert again["rows"] == record["rows"]


def test_policies_without_their_foresight_are_left_out(trace: Path) -> None:
    names = ["lru", "priced", "next_gate"]
    found = simulate(quick(), policies(names), shape(), {"slow": machine()}, {"tiny": data_of(trace)})
    assert {row["policy"] for row in found["rows"]} == {"lru"}
    assert {s["policy"]: s["reason"] for s in found["skipped"]} == {
        "priced": "no predictor is named (checkpoints=[...])",
        "next_gate": "the trace has no hidden states or routers",
    }
    with pytest.raises(ConfigError, match=r"None of simulate.policies can run here: no predictor"):
        simulate(quick(), policies(["priced"]), shape(), {"slow": machine()}, {"tiny": data_of(trace)})


def test_raw_probabilities_are_a_foresight_of_their_own() -> None:
    assert foresight_of(policy("priced")) == "predictor"
    assert foresight_of(policy("priced", calibrated=False)) == "uncalibrated"
    assert foresight_of(policy("lru")) == "none"


# ---------------------------------------------------------------------- intervals


def test_share_of_gain() -> None:
    ten = np.array([10.0, 10.0])
    assert share_of_gain(np.array([8.0, 7.0]), ten, np.array([5.0, 5.0])) == 0.5
    assert share_of_gain(ten, ten, ten) is None


def test_resampling_draws_documents() -> None:
    counts = resampled(7, 500, 3)
    assert counts.shape == (500, 7)
    assert (counts.sum(1) == 7).all()
    assert counts.mean() == pytest.approx(1)
    means = counts @ np.arange(7.0) / 7
    low, high = interval(means)
    assert low < 3 < high
    assert np.isnan(interval(np.array([np.nan, np.nan]))).all()


# ---------------------------------------------------------------------- settings and pages


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"residency": [0.0]}, r"simulate.residency names 0.0"),
        ({"residency": []}, "simulate.residency is empty"),
        ({"batches": [0]}, "simulate.batches names 0"),
        ({"documents": 0}, "simulate.documents=0"),
        ({"split": "train"}, "fitted on it"),
        ({"split": "holdout"}, "simulate.split=holdout is unknown"),
        ({"host": 1.5}, "simulate.host=1.5"),
        ({"runtime": "magic"}, "simulate.runtime=magic"),
        ({"context": 0}, "simulate.context=0"),
        ({"resamples": 3}, "simulate.resamples=3"),
    ],
)
def test_nonsense_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SimulateSettings(**changes)


def test_a_trace_of_another_shape_is_refused(trace: Path) -> None:
    other = shape(num_hidden_layers=2)
    with pytest.raises(ConfigError, match="choose the shape= that fits"):
        simulate(quick(), policies(["lru"]), other, {"slow": machine()}, {"tiny": data_of(trace)})


def test_more_sequences_than_documents(trace: Path) -> None:
    with pytest.raises(ConfigError, match="make no batch of 99"):
        simulate(
            quick(batches=[99]), policies(["lru"]), shape(), {"slow": machine()}, {"tiny": data_of(trace)}
        )


def test_slots() -> None:
    assert slots_for(0.25, 100, 4) == 25
    assert slots_for(0.01, 100, 4) == 4
    assert slots_for(1.0, 100, 4) == 100


def test_it_is_published(record: dict[str, Any], trace: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Through benchmark.py's table of modes, its configuration, and docs/RESULTS.md."""
    with initialize_config_dir(str(CONF), version_base=None):
        settings: Any = compose("benchmark", overrides=["shape=tiny"])
        settings.simulate.update(
            {"policies": ["lru", "priced depth=1", "oracle"], "hardware": ["rtx3090", "laptop_8gb"],
             "residency": [0.25], "resamples": 100, "device": "cpu"}
        )  # fmt: skip
        settings.checkpoints = [str(checkpoint)]
        settings.paths.run = str(tmp_path / "run")
        OmegaConf.resolve(settings.simulate)
        found = run_mode("simulate", settings, {"tiny": data_of(trace)}, None, Console(quiet=True))
    path = Run("benchmark.py").write(tmp_path / "run", **found)
    page = publish(read_record(path), tmp_path / "run")
    assert "What is each policy worth?" in page.read_text()
    assert len(list((tmp_path / "run" / "plots").glob("*.png"))) == 1
    text = make(tmp_path / "docs" / "RESULTS.md", [str(tmp_path / "run")]).read_text()
    assert "| priced depth=1 |" in text
    assert "rtx3090: tokens/s" in text
    assert "laptop_8gb: tokens/s" in text
    assert make(tmp_path / "docs" / "RESULTS.md").read_text() == text


def test_oracles_come_last(record: dict[str, Any]) -> None:
    assert set(policies_of(record["rows"])[-2:]) == {"belady", "oracle"}
