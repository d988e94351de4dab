"""What train.py does between composing its configuration and writing its numbers.

A free predictor is fitted by one pass and no optimizer, a learned one by AdamW; both then get calibrated on
the validation split and evaluated, and end as one file, predictor.ckpt, that ``load_predictor`` reads.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf

from specgate.calibration.load import read_checkpoint
from specgate.errors import ConfigError, SpecgateError
from specgate.predictors.base import Predictor
from specgate.predictors.qat import QuantizationAwareTraining
from specgate.pruning import MedianStopping, TokenCount
from specgate.report.tracking import sweep_group
from specgate.traces.datamodule import RoutingDataModule

LAST = "last.ckpt"


class KeepLast(L.Callback):
    """On Ctrl-C (or any exception) write ``last.ckpt`` and say how to go on from it.

    Args:
        folder: where the checkpoint goes.
    """

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / LAST

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Save, unless nothing was trained yet."""
        if trainer.global_step == 0 or trainer.sanity_checking:
            return
        trainer.save_checkpoint(self.path)
        if trainer.is_global_zero:
            print(
                f"\nstopped at step {trainer.global_step}; go on with the same command and "
                f"ckpt_path={self.path}",
                file=sys.stderr,
                flush=True,
            )


def quiet() -> None:
    """Drop messages of libraries that nobody can act on: an advertisement, and notes on what is meant to be
    so."""
    for text in (
        ".*LeafSpec.* is deprecated",
        ".*configure_optimizers. returned .None.",
        ".*does not have many workers",
        ".*Checkpoint directory .* exists and is not empty",
    ):
        warnings.filterwarnings("ignore", text)
    boring = ("litlogger", "TPU available", "to estimate number of stepping batches")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: not any(b in record.getMessage() for b in boring))


def make(cfg: DictConfig, **kwargs: Any) -> Any:
    """``instantiate`` with plain lists and dicts; an error of the user's is raised as itself, not as
    Hydra's."""
    try:
        return instantiate(cfg, _convert_="all", **kwargs)
    except InstantiationException as error:
        if isinstance(error.__cause__, SpecgateError):
            raise error.__cause__ from None
        raise


def norm_eps(data: RoutingDataModule) -> float:
    """The epsilon of the host's norms as its trace records it, 1e-6 if it does not."""
    rules = data.readers[0].header.extra.get("routing_rules", {})
    rule = rules.get(data.stack) if isinstance(rules, Mapping) else None
    return float(rule["norm_eps"]) if isinstance(rule, Mapping) and "norm_eps" in rule else 1e-6


def build_predictor(cfg: DictConfig, data: RoutingDataModule, lookahead: int) -> Predictor:
    """The predictor that ``model=`` names, made for the stack that ``data`` serves.

    It gets plain values only (a checkpoint keeps them), and the host's routers if it asks for them.

    Raises:
        ConfigError: if the predictor does not exist or cannot work on this trace.
        SpecgateError: if it is built from files and they are missing or do not fit.
    """
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    if not isinstance(values, dict) or "_target_" not in values:
        raise ConfigError("model names no class: choose one of conf/model, e.g. model=router_residual")
    cls = get_class(values.pop("_target_"))
    if not issubclass(cls, Predictor):
        raise ConfigError(f"{cls.__name__} is not a predictor: see docs/adding-a-predictor.md")
    spec = data.spec
    fields: dict[str, Any] = {
        "layers": spec.layers,
        "experts": spec.experts,
        "top_k": spec.top_k,
        "vocab_size": spec.vocab_size,
        "phase": spec.phase,
        "hidden_size": spec.hidden_size,
        "bidirectional": spec.bidirectional,
        "lookahead": lookahead,
    }
    if cls.uses_routers and spec.hidden_size is not None:
        fields |= {"routers": data.routers, "norm_eps": norm_eps(data)}
    return cls(**(cls.resolve(values, data) | fields))


def build_trainer(cfg: DictConfig, learned: bool) -> L.Trainer:
    """The Trainer with its callbacks and loggers; a free predictor gets one epoch on one device and no
    callback that presupposes an optimizer.

    Raises:
        ConfigError: if training has no end.
    """
    chosen = cfg.get("callbacks") or {}
    plain = ("progress",) if not learned else tuple(chosen)
    callbacks = [*(make(chosen[key]) for key in plain if chosen.get(key)), TokenCount()]
    loggers = [make(one, **sweep_group(one)) for one in (cfg.get("logger") or {}).values() if one]
    overrides: dict[str, Any] = {}
    if not learned:
        overrides = {"max_epochs": 1, "max_steps": -1, "devices": 1, "strategy": "auto"}
        overrides |= {"gradient_clip_val": None, "accumulate_grad_batches": 1, "precision": "32-true"}
    elif cfg.trainer.get("max_epochs") == -1 and not any(
        cfg.trainer.get(key) not in (None, -1) for key in ("max_steps", "max_time")
    ):
        raise ConfigError(
            "training has no end: set trainer.max_epochs, trainer.max_steps or trainer.max_time"
        )
    if not any(isinstance(c, ModelCheckpoint) for c in callbacks):
        overrides["enable_checkpointing"] = False
    trainer: L.Trainer = make(cfg.trainer, callbacks=callbacks, logger=loggers or False, **overrides)
    return trainer


def fit(
    trainer: L.Trainer, predictor: Predictor, data: RoutingDataModule, ckpt_path: str | None
) -> dict[str, Any]:
    """Train (or count), then give the predictor the best weights of the run; nothing if it does not train.

    Args:
        ckpt_path: a ``last.ckpt`` to go on from, or None.

    Returns:
        ``training_seconds`` (the fit alone), ``steps`` of the optimizer, ``tokens_seen`` (scored tokens of
        all batches, on this rank) and ``pruned`` (None, or why a sweep stopped the run early).

    Raises:
        CheckpointError: if ``ckpt_path`` is missing, truncated or poisoned.
    """
    clock = time.perf_counter()
    if not predictor.trains:
        predictor.eval()
        return {"training_seconds": 0.0, "steps": 0, "tokens_seen": 0, "pruned": None}
    if ckpt_path is not None:
        read_checkpoint(Path(ckpt_path))
    trainer.fit(predictor, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    best = next(
        (c.best_model_path for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), ""
    )
    if best and Path(best).is_file():
        predictor.load_state_dict(read_checkpoint(Path(best))["state_dict"])
    predictor.eval()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, QuantizationAwareTraining):
            callback.finish(predictor)
    if torch.distributed.is_initialized():  # what follows is rank 0's alone
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return {
        "training_seconds": round(time.perf_counter() - clock, 3),
        "steps": trainer.global_step,
        "tokens_seen": sum(int(c.total) for c in callbacks if isinstance(c, TokenCount)),
        "pruned": next((c.pruned for c in callbacks if isinstance(c, MedianStopping)), None),
    }


def save_predictor(predictor: Predictor, path: Path) -> Path:
    """Write weights, calibrator and hyperparameters (no optimizer) as a checkpoint of tensors and plain
    values; it is visible only when whole."""
    content = {
        "state_dict": {key: value.detach().cpu() for key, value in predictor.state_dict().items()},
        "hyper_parameters": dict(predictor.hparams),
        "pytorch-lightning_version": L.__version__,
    }
    if predictor.quantization is not None:
        content["quantization"] = dict(predictor.quantization)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        torch.save(content, file)
    os.replace(file.name, path)
    return path


def monitored(rows: list[dict[str, Any]], split: str) -> float | None:
    """Mean recall@K over the horizons of targets within the token: what a sweep maximises."""
    values = [r["recall_at_k"] for r in rows if r["split"] == split and r["kind"] == "within"]
    return sum(values) / len(values) if values else None
