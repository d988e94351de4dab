"""Train, calibrate and evaluate a predictor: ``python train.py model=router_residual lookahead=3``."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from specgate import training
from specgate.errors import NotApplicableError, SpecgateError
from specgate.report.evaluate import evaluate_data, labels_of
from specgate.report.identity import trace_identity
from specgate.report.record import Run
from specgate.report.sweep import skip
from specgate.report.tables import accuracy_table
from specgate.report.tracking import track


def train(cfg: DictConfig, console: Console) -> float | None:
    """Runs what the configuration says; returns the monitored metric (None on ranks other than 0)."""
    run, folder = Run("train.py", cfg), Path(HydraConfig.get().runtime.output_dir)
    training.quiet()
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    data = training.make(cfg.data)
    predictor = training.build_predictor(cfg.model, data, cfg.lookahead)
    trainer = training.build_trainer(cfg, predictor.learned)
    trained = training.fit(trainer, predictor, data, cfg.ckpt_path)
    if not trainer.is_global_zero:
        return None
    device = trainer.strategy.root_device
    chosen = predictor.fit_on_validation(data.val_dataloader(), device)
    fitted = training.make(cfg.calibration)(predictor, data.val_dataloader(), device)
    splits = ["validation", *(["test"] if cfg.test else [])]
    rows = [row for split in splits for row in evaluate_data(predictor, data, split=split, device=device)]
    checkpoint = training.save_predictor(predictor, folder / "predictor.ckpt")
    trace = trace_identity(data, labels_of(data)["trace"])
    parameters = sum(p.numel() for p in predictor.parameters())
    record = {
        "rows": rows,
        "traces": [trace],
        "calibration": fitted,
        "fitted_on_validation": chosen,
        "checkpoint": str(checkpoint),
        "parameters": parameters,
        "predictor_report": predictor.report(),
        **trained,
    }
    path = run.write(folder, **record)
    track(trainer.loggers, cfg, record)
    console.print(accuracy_table([row for row in rows if row["split"] == splits[-1]]))
    console.print(f"Predictor: {checkpoint}", soft_wrap=True, highlight=False)
    console.print(str(path), soft_wrap=True, highlight=False)
    return training.monitored(rows, "validation")


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Entry point."""
    try:
        return train(cfg, Console())
    except SpecgateError as error:
        Console(stderr=True).print(str(error), style="bold red", markup=False)
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            if isinstance(error, NotApplicableError):
                skip(HydraConfig.get().runtime.output_dir, error)
                return None
            raise  # the other jobs of a sweep go on
        sys.exit(1)
    finally:
        if "wandb" in sys.modules:  # or the jobs of a sweep would become one run
            sys.modules["wandb"].finish()


if __name__ == "__main__":
    main()
