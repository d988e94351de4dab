"""mode=cost: flat rows with what each predictor costs, beside its recall and the host's layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console

from specgate import training
from specgate.errors import ConfigError
from specgate.metrics.flops import count_flops
from specgate.moe.flops import layer_flops
from specgate.predictors.base import Predictor
from specgate.predictors.quantize import pack
from specgate.report.cost import CostSettings, history, make_free, measure, time_steps, weights_in
from specgate.report.cost_page import frontier
from specgate.report.modes import model_config, run_mode
from specgate.report.publish import publish
from specgate.report.record import Run, read_record
from specgate.traces.datamodule import RoutingDataModule
from tests.test_configs import CONF

T = 20


@pytest.fixture(scope="module")
def data(tiny_traces: dict[str, Path]) -> RoutingDataModule:
    return RoutingDataModule(tiny_traces["olmoe"], phase="prefill", batch_size=16, verify=False)


def residual(data: RoutingDataModule) -> Predictor:
    cfg = OmegaConf.create(
        {"_target_": "specgate.predictors.router_residual.RouterResidual", "width": 64, "heads": 2}
    )
    return training.build_predictor(cfg, data, 3).eval()


def score(predictor: str, trace: str, horizon: int, recall: float, **values: Any) -> dict[str, Any]:
    row = {"predictor": predictor, "trace": trace, "stack": "decoder", "phase": "prefill", "split": "test"}
    return {**row, "kind": "within", "horizon": horizon, "recall_at_k": recall, **values}


@pytest.fixture(scope="module")
def record(data: RoutingDataModule, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a run's float32 checkpoint, its packed copy without a run, and two free predictors."""
    folder, packed = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("packed")
    predictor = residual(data)
    training.save_predictor(predictor, folder / "predictor.ckpt")
    rows = [score("router_residual", "olmoe", h, 0.9 - 0.1 * h) for h in (1, 2, 3)]
    rows += [score("router_residual", "olmoe", 1, 0.1, split="validation"), score("other", "olmoe", 1, 0.2)]
    config = {
        "data": {"traces": str(data.paths[0]), "stack": "decoder", "phase": "prefill"},
        "trainer": {"accelerator": "cpu"},
    }
    Run("train.py", config).write(folder, rows=rows, training_seconds=12.5)
    pack(predictor, 4)
    training.save_predictor(predictor, packed / "predictor.ckpt")
    scored = [score("router_lookahead", "tiny", h, 0.5) for h in (1, 2)]
    scored += [score("router_lookahead", "another", h, 0.1) for h in (1, 2)]
    Run("benchmark.py").write(packed / "scores", rows=scored)
    settings = CostSettings(
        checkpoints=[str(folder), str(packed / "predictor.ckpt")],
        free=("router_lookahead", "markov"),
        metrics=[str(packed / "scores")],
        context=T,
        batch_sizes=(1, 3),
        devices=["cpu"],
        repeats=3,
        match="shape",
    )
    found = measure(settings, {"tiny": data})
    Run("benchmark.py").write(folder / "cost", **found)
    return read_record(folder / "cost")


def rows_by(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = {}
    for row in record["rows"]:
        packed = row["precision"] != "float32"
        found["packed" if packed else row["predictor"].split(" (")[0]] = row
    return found


def test_rows_say_what_each_costs(record: dict[str, Any], data: RoutingDataModule) -> None:
    rows = rows_by(record)
    assert set(rows) == {"router_lookahead", "markov", "router_residual", "packed"}
    for row in rows.values():
        for size in ("1", "3"):
            assert row["us"]["cpu"][size] == row[f"us_cpu_{size}"] > 0
            assert row[f"us_cpu_{size}_p10"] <= row[f"us_cpu_{size}"] <= row[f"us_cpu_{size}_p90"]
        assert row["how"] == {"cpu": "eager"}
        assert (row["context"], row["layer"], row["trace"]) == (T, 1, "tiny")
    predictor, window = residual(data), history(data, T)
    B = window.valid_BT.shape[0]
    counted = count_flops(lambda: predictor(window)) / (B * T * 4)
    assert rows["router_residual"]["flops_per_token_layer"] == pytest.approx(counted, rel=1e-4)
    step = count_flops(lambda: predictor.step_logits(window, 1)) / B
    assert rows["router_residual"]["flops_of_a_call"] == pytest.approx(step, rel=1e-4)
    parameters = sum(p.numel() for p in predictor.parameters())
    assert rows["router_residual"]["parameters"] == rows["packed"]["parameters"] == parameters
    assert rows["packed"]["precision"] == "int4"
    assert rows["packed"]["bytes"] < 0.5 * rows["router_residual"]["bytes"]
    assert rows["router_residual"]["fast_step"]
    assert not rows["markov"]["fast_step"]


def test_recall_and_training_come_from_the_run(record: dict[str, Any]) -> None:
    rows = rows_by(record)
    trained, free = rows["router_residual"], rows["router_lookahead"]
    assert [trained[f"recall_n{h}"] for h in (1, 2, 3)] == [0.8, 0.7, pytest.approx(0.6)]
    assert (trained["recall_split"], trained["recall_from"]) == ("test", "run")
    assert (trained["training_seconds"], trained["training_seconds_of"]) == (12.5, "training")
    assert trained["training_hardware"] == record["hardware"]["cpu"]
    assert [free["recall_n1"], free["recall_n2"]] == [0.5, 0.5]
    assert "recall_n3" not in free
    assert free["training_seconds"] is None
    assert "recall_n1" not in rows["packed"]


def test_an_unknown_host_is_said_and_a_described_one_counted(
    record: dict[str, Any], data: RoutingDataModule, tiny_olmoe: Path
) -> None:
    import transformers

    assert "is not at hand" in record["hosts"][0]["missing"]
    assert all(row["share_of_host"] is None for row in record["rows"])
    config = json.loads((tiny_olmoe / "config.json").read_text())
    model_id = data.readers[0].header.model_id
    settings = CostSettings(
        free=["router_lookahead"],
        context=T,
        batch_sizes=[1],
        devices=["cpu"],
        repeats=3,
        hosts={model_id: config},
    )
    found = measure(settings, {"tiny": data})
    active = layer_flops(transformers.AutoConfig.from_pretrained(tiny_olmoe), T / 2).active
    row = found["rows"][0]
    assert row["host_flops"] == found["hosts"][0]["active"] == active
    assert row["share_of_host"] == pytest.approx(row["flops_per_token_layer"] / active, rel=1e-3)


def test_the_history_is_real_and_whole(data: RoutingDataModule) -> None:
    window = history(data, T, windows=3)
    assert window.valid_BT.shape == (3, T)
    assert window.valid_BT.all()
    assert window.hidden_BTLD is not None
    assert window.hidden_BTLD.shape == (3, T, 4, 32)
    with pytest.raises(ConfigError, match="no window of the trace has 500 tokens"):
        history(data, 500)


def test_frontier_keeps_what_no_other_beats() -> None:
    points = [(1.0, 0.5), (2.0, 0.4), (3.0, 0.8), (3.0, 0.7), (5.0, 0.8), (9.0, 0.9)]
    assert frontier(points) == [(1.0, 0.5), (3.0, 0.8), (9.0, 0.9)]


def test_page_and_pictures(record: dict[str, Any], tmp_path: Path) -> None:
    console = Console(record=True, width=200, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    page = publish(record, tmp_path, console)
    html = page.read_text()
    assert html.count("data:image/png;base64,") == 1
    assert (tmp_path / "plots" / "tiny-pareto.png").stat().st_size > 20_000
    table = (tmp_path / "tables.md").read_text()
    for words in ("router_residual", "int4", "µs CPU×3", "Host layer: unknown", "80.0", "‡"):
        assert words in table
    assert "router_lookahead" in console.export_text()


class TooLarge(Predictor):
    """Does not fit for more than one sequence."""

    def forward(self, batch: Any) -> torch.Tensor:
        if len(batch.valid_BT) > 1:
            raise torch.OutOfMemoryError("no room")
        return torch.zeros(1, T, 5, 3, 8)


def test_a_call_that_does_not_fit_is_said_and_left_out(data: RoutingDataModule, tmp_path: Path) -> None:
    spec = {k: v for k, v in vars(data.spec).items() if k != "hidden_size"}
    settings = CostSettings(context=T, batch_sizes=[1, 2], repeats=3)
    found: Any = {"large": (TooLarge(**spec), None), "markov": (make_free("markov", data, 3), None)}
    one, _ = time_steps(found, history(data, T), 1, "cpu", settings)
    assert set(one) == {"large", "markov"}
    two, how = time_steps(found, history(data, T), 2, "cpu", settings)
    assert set(two) == {"markov"}
    assert how["large"] == "failed: B=2, no room"


def test_benchmark_mode(data: RoutingDataModule) -> None:
    cfg = OmegaConf.load(CONF / "benchmark.yaml")
    cfg.cost.update({"context": T, "batch_sizes": [1], "devices": ["cpu"], "repeats": 3})
    found = run_mode("cost", cfg, {"tiny": data}, None, Console(quiet=True))  # type: ignore[arg-type]
    assert found["mode"] == "cost"
    assert [row["predictor"] for row in found["rows"]] == ["router_lookahead"]
    assert found["threads"] == torch.get_num_threads()


def test_what_makes_no_sense_is_refused(data: RoutingDataModule) -> None:
    with pytest.raises(ConfigError, match="context=1"):
        CostSettings(context=1)
    with pytest.raises(ConfigError, match="'mlp' is trained"):
        make_free("mlp", data, 3)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            CostSettings(devices=["cuda"])


def test_weights_are_counted_alike_packed_or_not(data: RoutingDataModule) -> None:
    predictor = residual(data)
    whole = weights_in(predictor)
    pack(predictor, 8)
    assert weights_in(predictor) == whole == sum(p.numel() for p in residual(data).parameters())


def test_untrained_models_cost_what_trained_ones_do(data: RoutingDataModule, record: dict[str, Any]) -> None:
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        models = dict(model_config(line) for line in ("router_residual width=64 heads=2", "mlp"))
        with pytest.raises(ConfigError, match=r"cost.models names 'nothing'"):
            model_config("nothing")
    assert list(models) == ["router_residual (width=64 heads=2)", "mlp"]
    settings = CostSettings(models=models, context=T, batch_sizes=[1], devices=["cpu"], repeats=3)
    rows = {row["predictor"]: row for row in measure(settings, {"olmoe": data})["rows"]}
    assert list(rows) == ["router_lookahead", *models]
    mine = rows["router_residual (width=64 heads=2)"]
    trained = next(row for row in record["rows"] if row["predictor"].startswith("router_residual"))
    for name in ("parameters", "flops_per_token_layer", "flops_of_a_call", "share_of_host"):
        assert mine[name] == trained[name], name
    assert mine["settings"]["model.width"] == 64
    assert mine["training_seconds"] is None
