"""benchmark.py mode=accuracy on a small trace: everything is compared, written and printed; errors are
sentences.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

import benchmark
from specgate.errors import CheckpointError, ConfigError
from specgate.predictors.registry import predictor_class
from specgate.report.accuracy import AccuracySettings, assign, compare, labels, trained_on
from specgate.report.modes import chosen
from specgate.report.record import read_record, write_json
from specgate.traces.datamodule import RoutingDataModule
from tests.traces.helpers import header_for, stack_info, write_trace

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two small traces under the names that conf/data knows."""
    folder = tmp_path_factory.mktemp("data") / "traces"
    stack = {"decoder": stack_info(L=3, E=8, K=2, D=4)}
    header = header_for(stack, documents=40)
    write_trace(folder / "olmoe_ref", stack, shards=[[12] * 40, [9] * 40], header=header)
    id_only = {"decoder": stack_info(L=3, E=8, K=2, D=None, hidden="none")}
    decode = header_for(id_only, documents=40, phases=["decode"])
    write_trace(
        folder / "gpt_oss_20b", id_only, shards=[[12] * 60], header=decode, phases=(1,), routers=False
    )
    return folder


def data_of(traces: Path, name: str = "olmoe_ref", phase: str = "prefill") -> RoutingDataModule:
    return RoutingDataModule(traces / name, phase=phase, window=8, batch_size=16)


def save(data: RoutingDataModule, path: Path, name: str = "mlp") -> Path:
    torch.manual_seed(0)
    predictor = predictor_class(name)(**vars(data.spec), lookahead=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": predictor.state_dict(), "hyper_parameters": dict(predictor.hparams)}, path)
    return path


def call(monkeypatch: pytest.MonkeyPatch, traces: Path, output: Path, *arguments: str) -> None:
    GlobalHydra.instance().clear()
    fixed = [f"paths.data={traces.parent}", f"hydra.run.dir={output}"]
    place = [
        "--config-path",
        str(Path(benchmark.__file__).parent / "conf"),
    ]  # run as a module, Hydra must be told
    monkeypatch.setattr("sys.argv", ["benchmark.py", *place, *arguments, *fixed])
    benchmark.main()


def test_everything_is_compared_and_published(
    monkeypatch: pytest.MonkeyPatch, traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("specgate.report.canvas.DPI", 40)
    run = tmp_path / "train"
    save(data_of(traces), run / "predictor.ckpt")
    output = tmp_path / "out"
    call(
        monkeypatch,
        traces,
        output,
        "mode=accuracy",
        "data=[olmoe_ref_prefill,gpt_oss_20b]",
        f"checkpoints=[{run}]",
        "data.window=8",
        "lookahead=2",
    )
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[-1] == str(output / "metrics.json")
    record = read_record(output)
    assert [trace["name"] for trace in record["traces"]] == ["olmoe_ref_prefill", "gpt_oss_20b"]
    assert record["config"]["data"]["gpt_oss_20b"]["window"] == 8
    assert record["command"].startswith("python benchmark.py ")
    prefill = {row["predictor"] for row in record["rows"] if row["trace"] == "olmoe_ref_prefill"}
    decode = {row["predictor"] for row in record["rows"] if row["trace"] == "gpt_oss_20b"}
    free = {"popularity", "markov", "markov2", "previous_token", "recency", "token_table"}
    routers = {"router_lookahead", "router_mean_expert"}
    assert prefill == free | routers | {"mlp", "oracle"}
    assert decode == free | {"oracle"}
    assert {(left["trace"], left["predictor"]) for left in record["skipped"]} == {
        ("gpt_oss_20b", name) for name in routers
    }
    for row in record["rows"]:
        assert row["split"] == "test"
        assert row["calibrated"] == (row["predictor"] != "oracle")
        if row["predictor"] == "oracle":
            assert row["recall_at_k"] == 1.0
    assert {row["kind"] for row in record["rows"] if row["trace"] == "gpt_oss_20b"} == {
        "within",
        "entry",
        "wrapped",
    }
    assert len(list((output / "plots").glob("*.png"))) == 12
    assert (output / "report.html").stat().st_size > 30_000
    assert (output / "tables.md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mode=speed"], "mode=speed is unknown: choose one of accuracy"),
        (["data=[]"], "data names nothing"),
        (["data=olmoe_ref_prefill", "checkpoints=[/nowhere.ckpt]"], "/nowhere.ckpt does not exist"),
        (["data=olmoe_ref_prefill", "accuracy.free=[mlp]"], "free='mlp' is no free predictor"),
        (["data=olmoe_ref_prefill", "accuracy.match=all"], "match='all' is unknown"),
        (["data=olmoe_ref_decode"], "There is no trace at"),
    ],
)
def test_mistakes_end_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    traces: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, traces, tmp_path / "out", *arguments)
    assert stop.value.code == 1
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split())
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_choice_of_data_follows_the_command_line(root: Path) -> None:
    config = root / "conf" / "benchmark.yaml"
    assert chosen("data", [], config) == ["switch_ref_encoder", "olmoe_ref_prefill"]
    assert chosen("data", ["mode=accuracy", "data=x"], config) == ["x"]
    assert chosen("data", ["data=x", "data.window=8", "data=[y,z]"], config) == ["y", "z"]
    with pytest.raises(ConfigError, match="nothing names nothing"):
        chosen("nothing", [], config)


def test_checkpoints_meet_the_traces_they_were_trained_on(traces: Path, tmp_path: Path) -> None:
    modules = {"first": data_of(traces), "second": data_of(traces, "gpt_oss_20b", "decode")}
    file = save(modules["first"], tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert trained_on(file) is None
    assert assign([file], modules, "trained") == {file: ["first"]}  # the other phase does not fit
    config = {"data": {"traces": "elsewhere/olmoe_ref", "stack": "decoder", "phase": "prefill"}}
    write_json(tmp_path / "run" / "metrics.json", {"schema_version": 1, "config": config})
    assert trained_on(file) == {("olmoe_ref", "decoder", "prefill")}
    assert assign([file], modules, "trained") == {file: ["first"]}
    with pytest.raises(CheckpointError, match="phase=prefill and the trace has phase=decode"):
        assign([file], {"second": modules["second"]}, "shape")
    config["data"]["traces"] = ["another"]
    write_json(tmp_path / "run" / "metrics.json", {"schema_version": 1, "config": config})
    with pytest.raises(CheckpointError, match=r"was trained on another trace than first \(match=shape"):
        assign([file], modules, "trained")
    assert assign([file], modules, "shape") == {file: ["first"]}


def test_equal_predictors_are_told_apart(traces: Path, tmp_path: Path) -> None:
    data = data_of(traces)
    files = [save(data, tmp_path / run / "predictor.ckpt") for run in ("a", "b")]
    other = save(data, tmp_path / "c" / "predictor.ckpt", "popularity")
    assert labels([*files, other]) == {files[0]: "mlp (a)", files[1]: "mlp (b)", other: "popularity"}
    deep = [save(data, tmp_path / run / "mlp" / "predictor.ckpt") for run in ("int4", "int8")]
    assert list(labels(deep).values()) == ["mlp (int4/mlp)", "mlp (int8/mlp)"]


def test_free_predictors_learn_from_the_train_split_only(
    traces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(traces)
    touched: list[str] = []
    loaders = {split: getattr(data, f"{split}_dataloader") for split in ("train", "val", "test")}
    for split, loader in loaders.items():
        monkeypatch.setattr(
            data, f"{split}_dataloader", lambda s=split, make=loader: touched.append(s) or make()
        )
    settings = AccuracySettings(free=["popularity"], lookahead=2, progress=False)
    content = compare(settings, {"t": data})
    assert touched == ["test", "train", "val"]  # the locked split is opened once
    assert json.loads(json.dumps(content))["mode"] == "accuracy"
    (row,) = [
        row
        for row in content["rows"]
        if (row["predictor"], row["kind"], row["horizon"]) == ("popularity", "within", 1)
    ]
    assert row["n"] == sum(2 * int(batch.mask_BT.sum()) for batch in loaders["test"]())
