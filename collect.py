"""Collects routing traces of a Mixture-of-Experts model: `python collect.py moe=switch_ref`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from specgate.errors import SpecgateError
from specgate.moe.batches import Settings
from specgate.moe.collection import Interrupted, choose_threads, collect
from specgate.moe.hosts import load_host
from specgate.moe.summary import report as summarise
from specgate.report.record import Run
from specgate.traces.store import TraceReader


def folder_of(cfg: DictConfig) -> Path:
    """Where the trace goes: ``out``, or data/traces/<model>, with the phase behind it while decoding."""
    if cfg.out:
        return Path(cfg.out)
    name = cfg.moe.name or Path(cfg.moe.path).name
    return Path(cfg.paths.traces) / (name if cfg.phase == "prefill" else f"{name}_{cfg.phase}")


def run(cfg: DictConfig, console: Console) -> dict[str, Any]:
    """Collects what the configuration says; returns the numbers for metrics.json."""
    out = folder_of(cfg)
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    settings = Settings.of(values)
    host = load_host(cfg.moe.path, cfg.moe.revision, cfg.moe.dtype, cfg.moe.device, cfg.moe.device_map)
    torch.set_num_threads(choose_threads(host, out, cfg.threads))
    outcome = collect(host, instantiate(cfg.text, _convert_="all"), settings, out, console)
    folder = Path(HydraConfig.get().runtime.output_dir)
    stacks = summarise(TraceReader(out), folder, console)
    return {
        "trace": str(out),
        "model": host.model_id,
        "revision": host.revision,
        **outcome.numbers(),
        "stacks": stacks,
        "picture": str(folder / "expert_load.png"),
        "device": str(host.device),
        "threads": torch.get_num_threads(),
    }


@hydra.main(version_base="1.3", config_path="conf", config_name="collect")
def main(cfg: DictConfig) -> None:
    """Entry point."""
    console, log = Console(), Run("collect.py", cfg)
    try:
        metrics = run(cfg, console)
    except SpecgateError as error:
        Console(stderr=True).print(str(error), style="bold red", markup=False, soft_wrap=True)
        sys.exit(130 if isinstance(error, Interrupted) else 1)
    except KeyboardInterrupt:
        sys.exit("Stopped before the first batch; nothing is lost.")
    path = log.write(HydraConfig.get().runtime.output_dir, **metrics)
    console.print(f"Heat map: {metrics['picture']}", soft_wrap=True)
    console.print(str(path), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
