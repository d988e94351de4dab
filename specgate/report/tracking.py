"""Weights & Biases: what a finished run adds to the curves that its logger has drawn already.

One run per job, offline unless ``logger.wandb.offline=false``; the jobs of a sweep share a group named after
its folder. The run gets the resolved configuration, the scores of every row as its summary, the checkpoint as
an artifact of type ``predictor``, and the reliability diagrams and heat maps as images. ``wandb sync FOLDER``
sends an offline run later.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig

from specgate.report.record import plain_config
from specgate.report.style import scored_rows, traces_of

SCORES = ("recall_at_k", "recall_at_2k", "exact_set", "top1", "ece", "ece_uncalibrated", "nll", "brier")
PICTURES = ("reliability", "layers")


def sweep_group(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """``{"group": name of the sweep's folder}`` for a logger that has a ``group`` and no name for it, inside
    a sweep; else nothing.
    """
    if "group" not in cfg or cfg["group"] is not None or not HydraConfig.initialized():
        return {}
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        return {}
    folder = Path(HydraConfig.get().sweep.dir)
    return {"group": "_".join(folder.parts[-2:])}  # date and time


def track(loggers: Iterable[Logger], cfg: DictConfig, record: Mapping[str, Any]) -> None:
    """Complete the run of every W&B logger; other loggers are left alone.

    Args:
        record: what goes into metrics.json: ``rows``, ``checkpoint``, ``parameters``, ...
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _complete(logger.experiment, plain_config(cfg), record)


def summary_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """``{"test/within/n1/recall_at_k": 0.83, ...}``."""
    return {
        f"{row['split']}/{row['kind']}/n{row['horizon']}/{name}": row[name]
        for row in rows
        for name in SCORES
        if row.get(name) is not None
    }


def _complete(run: Any, config: Any, record: Mapping[str, Any]) -> None:
    import wandb

    from specgate.report.plots import PER_TRACE

    rows = scored_rows(record)
    run.config.update(config, allow_val_change=True)
    run.summary.update(summary_of(record["rows"]))
    run.summary.update(
        {key: record[key] for key in ("parameters", "training_seconds", "tokens_seen") if key in record}
    )
    artifact = wandb.Artifact(f"{rows[0]['predictor']}-{run.id}", type="predictor")
    artifact.add_file(record["checkpoint"])
    run.log_artifact(artifact)
    with tempfile.TemporaryDirectory() as folder:
        for trace in traces_of(rows):
            images = {}
            for name in PICTURES:
                file = Path(folder) / f"{name}.png"
                PER_TRACE[name](rows, trace).savefig(file, metadata={"Software": None})
                images[f"pictures/{name}"] = wandb.Image(str(file), caption=f"{name}: {trace}")
            run.log(images)
