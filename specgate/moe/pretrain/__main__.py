"""``python -m specgate.moe.pretrain moe=switch_ref``: prepare the text, train, save, evaluate, write
the model card.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from transformers import AutoTokenizer

from specgate.errors import SpecgateError
from specgate.moe.pretrain.card import write_card
from specgate.moe.pretrain.evaluate import add_baselines, evaluate, load_reference
from specgate.moe.pretrain.module import Pretraining, PretrainingData
from specgate.moe.pretrain.tokens import Corpus, prepare

CONF = Path(__file__).parents[3] / "conf" / "pretrain"


def train(cfg: DictConfig, corpus: Corpus, output: Path) -> dict[str, Any]:
    """Trains (or goes on training) and saves the model in ``output/model``."""
    L.seed_everything(cfg.seed)
    torch.set_float32_matmul_precision("high")
    moe: Any = OmegaConf.to_container(cfg.moe, resolve=True)
    steps = max(1, int(cfg.tokens) // int(cfg.tokens_per_step))
    architecture = moe["architecture"] | {"vocab_size": corpus.info["vocab_size"]}
    module = Pretraining(moe["family"], architecture, total_steps=steps, **moe["optimiser"])
    objective = "switch" if moe["family"] == "switch" else "causal"
    data = PretrainingData(
        str(corpus.directory), objective, cfg.tokens_per_step, moe["length"], steps, cfg.seed, cfg.num_workers
    )
    saver = ModelCheckpoint(
        dirpath=output / "checkpoints", save_last=True, every_n_train_steps=cfg.checkpoint_steps
    )
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator=cfg.accelerator,
        devices=1,
        precision=cfg.precision,
        gradient_clip_val=1.0,
        callbacks=[saver, RichProgressBar(refresh_rate=20)] if cfg.progress else [saver],
        enable_progress_bar=cfg.progress,
        logger=CSVLogger(str(output), name="log", version=0),
        log_every_n_steps=50,
        enable_model_summary=False,
    )
    last = output / "checkpoints" / "last.ckpt"
    began = time.perf_counter()
    trainer.fit(module, data, ckpt_path=str(last) if last.is_file() else None, weights_only=True)
    seconds = time.perf_counter() - began
    if trainer.interrupted:
        raise KeyboardInterrupt
    model: Any = module.model.to(torch.bfloat16)
    model.save_pretrained(output / "model")
    AutoTokenizer.from_pretrained(corpus.directory / "tokenizer").save_pretrained(output / "model")
    return {
        "tokens": int(module.tokens_seen),
        "steps": int(trainer.global_step),
        "seconds_of_this_run": seconds,
        "device": module.trained_on,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def settings_of(cfg: DictConfig) -> dict[str, Any]:
    """What the run was made with, without the paths of the machine that it ran on."""
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    return {k: v for k, v in values.items() if k not in ("corpus", "output", "progress")}


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(cfg: DictConfig) -> None:
    """Entry point; every part that is finished already is left as it is."""
    output = Path(cfg.output)
    output.mkdir(parents=True, exist_ok=True)
    record = output / "metrics.json"
    try:
        corpus = prepare(**OmegaConf.to_container(cfg.corpus, resolve=True))  # type: ignore[arg-type]
        metrics: dict[str, Any] = json.loads(record.read_text()) if record.is_file() else {}
        if "training" not in metrics:
            metrics["training"] = train(cfg, corpus, output)
            metrics["config"] = settings_of(cfg)
            metrics["corpus"] = {k: v for k, v in corpus.info.items() if k != "wanted"}
            _write(record, metrics)
        if "evaluation" not in metrics:
            device = "cuda" if torch.cuda.is_available() and cfg.accelerator != "cpu" else "cpu"
            model = load_reference(output / "model", cfg.moe.family, device)
            top_k = 1 if cfg.moe.family == "switch" else cfg.moe.architecture.num_experts_per_tok
            metrics["evaluation"] = evaluate(model, cfg.moe.family, corpus, top_k, cfg.evaluate.length)
            _write(record, metrics)
        if cfg.evaluate.baselines:
            add_baselines(metrics["evaluation"]["loss"], cfg.moe.family, corpus, cfg.evaluate.length)
            _write(record, metrics)
        write_card(metrics, output / "model" / "README.md")
    except SpecgateError as err:
        sys.exit(f"error: {err}")
    except KeyboardInterrupt:
        sys.exit(f"Interrupted; the same command goes on from {output / 'checkpoints' / 'last.ckpt'}.")
    Console().print((output / "model" / "README.md").read_text())
    print(record)


def _write(path: Path, metrics: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(metrics, indent=1))
    os.replace(part, path)


if __name__ == "__main__":
    main()
