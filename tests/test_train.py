"""train.py: it ends with its numbers, resumes where it stopped, keeps to its budget, and says what is
wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from rich.console import Console

from specgate import training
from specgate.calibration.load import load_predictor
from specgate.errors import CheckpointError, ConfigError, SpecgateError
from tests.test_configs import CONF, composed

ROOT = Path(__file__).parent.parent
QUICK = ["logger=none", "data.window=32", "threads=1", "model.width=16", "test=false"]
NO_STOP = ["callbacks.early_stopping=null"]


def command(run: Path, trace: Path, *overrides: str) -> list[str]:
    start = [sys.executable, str(ROOT / "train.py"), f"hydra.run.dir={run}", f"data.traces={trace}"]
    return [*start, *QUICK, *overrides]


def in_process(run: Path, trace: Path, *overrides: str) -> dict[str, Any]:
    """train.py's own function in this process; its metrics.json."""
    import train as entry

    cfg = composed(CONF, "train", [f"data.traces={trace}", *QUICK, *overrides], run)
    entry.train(cfg, Console(quiet=True))
    found: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return found


# --- a process of its own ---


def test_ends_with_metrics_and_a_predictor_that_loads(tiny_traces: dict[str, Path], tmp_path: Path) -> None:
    arguments = command(
        tmp_path / "run",
        tiny_traces["olmoe"],
        "trainer.max_epochs=2",
        "logger=both",
        "lookahead=2",
        "test=true",
    )
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    path = Path(done.stdout.strip().splitlines()[-1])
    assert path == tmp_path / "run" / "metrics.json"
    metrics = json.loads(path.read_text())
    assert {row["split"] for row in metrics["rows"]} == {"validation", "test"}
    assert {row["horizon"] for row in metrics["rows"]} == {1, 2}
    assert metrics["calibration"]
    assert all(row["calibrated"] for row in metrics["rows"])
    assert load_predictor(metrics["checkpoint"]).name == "router_residual"
    assert "val/recall" in (tmp_path / "run" / "csv" / "metrics.csv").read_text()
    assert len(list((tmp_path / "run").rglob("*.wandb"))) == 1
    for name in ("best.ckpt", "last.ckpt"):
        saved = torch.load(tmp_path / "run" / "checkpoints" / name, weights_only=True)
        assert saved["hyper_parameters"]["predictor"] == "router_residual"


def test_interrupted_training_says_how_to_resume_and_does(
    tiny_traces: dict[str, Path], tmp_path: Path
) -> None:
    run, trace = tmp_path / "run", tiny_traces["olmoe"]
    process = subprocess.Popen(
        command(run, trace, *NO_STOP, "trainer.max_epochs=100000"),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A job in the background may have inherited an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    last = run / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert f"ckpt_path={last}" in errors
    assert process.returncode != 0
    before = torch.load(last, weights_only=True)
    assert "averaging_state" in before  # the moving average goes on as well
    epochs = int(before["epoch"]) + 2
    in_process(tmp_path / "again", trace, *NO_STOP, f"trainer.max_epochs={epochs}", f"ckpt_path={last}")
    after = torch.load(tmp_path / "again" / "checkpoints" / "last.ckpt", weights_only=True)
    assert after["global_step"] > before["global_step"]
    assert after["epoch"] >= before["epoch"]


def test_two_processes_train_one_predictor(tiny_traces: dict[str, Path], tmp_path: Path) -> None:
    arguments = command(
        tmp_path / "run",
        tiny_traces["olmoe"],
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "trainer.max_epochs=1",
    )
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().splitlines()[-1].endswith("metrics.json")
    assert "2 processes" in done.stdout + done.stderr
    assert load_predictor(tmp_path / "run" / "predictor.ckpt").name == "router_residual"


def test_an_unknown_predictor_prints_the_choices(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path / "run", tmp_path, "model=router9"),
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"COLUMNS": "300"},
    )  # fmt: skip
    assert done.returncode != 0
    for name in ("router_lookahead", "router_residual", "markov"):
        assert name in done.stderr
    assert "Traceback" not in done.stderr


# --- in this process ---


class StopAt(L.Callback):
    """Ctrl-C before the first batch of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt


def train_weights(
    run: Path, trace: Path, stop: int | None = None, ckpt_path: str | None = None
) -> dict[str, torch.Tensor]:
    """Weights after four epochs, or when stopped before epoch ``stop``."""
    overrides = [f"data.traces={trace}", *QUICK, *NO_STOP, "trainer.max_epochs=4", "model.dropout=0.0"]
    cfg = composed(CONF, "train", overrides, run)
    L.seed_everything(0, verbose=False)
    data = instantiate(cfg.data, _convert_="all")
    predictor = training.build_predictor(cfg.model, data, 3)
    trainer = training.build_trainer(cfg, learned=True)
    if stop is not None:
        trainer.callbacks.insert(0, StopAt(stop))  # type: ignore[attr-defined]
        handler = signal.getsignal(signal.SIGINT)
        with pytest.raises(SystemExit):
            training.fit(trainer, predictor, data, ckpt_path)
        signal.signal(signal.SIGINT, handler)
    else:
        training.fit(trainer, predictor, data, ckpt_path)
        trainer.save_checkpoint(run / "end.ckpt")
    return {k: v.clone() for k, v in predictor.state_dict().items()}


def test_training_in_two_parts_is_training_in_one(tiny_traces: dict[str, Path], tmp_path: Path) -> None:
    whole = train_weights(tmp_path / "one", tiny_traces["olmoe"])
    half = train_weights(tmp_path / "two", tiny_traces["olmoe"], stop=2)
    last = tmp_path / "two" / "checkpoints" / "last.ckpt"
    both = train_weights(tmp_path / "three", tiny_traces["olmoe"], ckpt_path=str(last))
    assert not torch.allclose(half["head.first.weight"], whole["head.first.weight"], atol=1e-4)
    torch.testing.assert_close(both, whole, rtol=1e-3, atol=1e-4)


def test_a_budget_ends_training(tiny_traces: dict[str, Path], tmp_path: Path) -> None:
    start = time.monotonic()
    in_process(
        tmp_path, tiny_traces["olmoe"], *NO_STOP, "trainer.max_epochs=-1", "trainer.max_time=00:00:00:02"
    )
    assert time.monotonic() - start < 100


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["ckpt_path=/no/such.ckpt"], CheckpointError, "/no/such.ckpt does not exist"),
        (["trainer.max_epochs=-1"], ConfigError, "training has no end"),
        (["lookahead=0"], ConfigError, "lookahead 0 is outside"),
        (["lookahead=9"], ConfigError, "lookahead 9 is outside"),
        (["data.phase=decode"], SpecgateError, "phase"),
        (["model._target_=lightning.LightningModule"], SpecgateError, "not a predictor"),
    ],
)
def test_mistakes_get_one_clear_sentence(
    overrides: list[str], error: type[Exception], message: str, tiny_traces: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        in_process(tmp_path, tiny_traces["olmoe"], *overrides)


def test_hidden_states_are_needed_where_a_router_is(tiny_traces: dict[str, Path], tmp_path: Path) -> None:
    overrides = ["model=router_lookahead", "logger=none", "data.use_hidden=false"]
    cfg = composed(CONF, "train", [f"data.traces={tiny_traces['olmoe']}", *overrides], tmp_path)
    import train as entry

    with pytest.raises(ConfigError, match="needs hidden states"):
        entry.train(cfg, Console(quiet=True))


def test_the_norms_epsilon_comes_from_the_trace(tiny_traces: dict[str, Path]) -> None:
    from specgate.traces.datamodule import RoutingDataModule

    data = RoutingDataModule(tiny_traces["olmoe"])
    rule = data.readers[0].header.extra["routing_rules"]["decoder"]
    assert training.norm_eps(data) == rule["norm_eps"] == 1e-5


def test_the_routers_own_layer_is_foreseen_exactly(tiny_traces: dict[str, Path]) -> None:
    """The host's router on its own hidden state is the decision: norm, epsilon, weights and bias are the
    host's."""
    from specgate.predictors.host_routers import HostRouters
    from specgate.traces.datamodule import RoutingDataModule

    for trace, stack in (("olmoe", "decoder"), ("switch", "encoder"), ("switch", "decoder")):
        data = RoutingDataModule(tiny_traces[trace], stack=stack, batch_size=32)
        spec = data.spec
        assert spec.hidden_size is not None
        host = HostRouters(
            spec.layers, spec.experts, spec.top_k, spec.hidden_size, training.norm_eps(data), data.routers
        )
        batch = next(iter(data.val_dataloader()))
        assert batch.hidden_BTLD is not None
        scores = host.scores(batch.hidden_BTLD, torch.arange(spec.layers)[:, None])[..., 0, :]
        chosen = scores.topk(spec.top_k, dim=-1).indices.sort(-1).values
        same = chosen.eq(batch.experts_BTLK.sort(-1).values).all(-1)[batch.mask_BT]
        assert float(same.float().mean()) > 0.99  # hidden states are stored in fp16
