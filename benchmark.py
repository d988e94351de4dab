"""Compares predictors on the locked test split: `python benchmark.py mode=accuracy checkpoints=[RUN,...]`."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from specgate.errors import SpecgateError
from specgate.report.modes import chosen, run_mode
from specgate.report.plan_settings import checked, planned
from specgate.report.publish import publish
from specgate.report.record import Run, read_record


def data_configs() -> dict[str, DictConfig]:
    """The configuration of each data set of ``data=a`` or ``data=[a,b]``, as if it alone had been chosen."""
    settings = HydraConfig.get()
    name, overrides = settings.job.config_name, list(settings.overrides.task)
    folder = next(source.path for source in settings.runtime.config_sources if source.provider == "main")
    others = [override for override in overrides if not override.startswith("data=")]
    names = chosen("data", overrides, Path(folder) / f"{name}.yaml", planned(overrides))
    return {data: compose(config_name=name, overrides=[*others, f"data={data}"]).data for data in names}


def run(cfg: DictConfig, console: Console) -> Path:
    """Measures what the configuration says and writes the report; returns the path of metrics.json."""
    configs = data_configs()
    config = OmegaConf.merge(cfg, {"data": None})
    config.data = {name: OmegaConf.to_container(data, resolve=True) for name, data in configs.items()}
    log, output = Run("benchmark.py", config), Path(HydraConfig.get().runtime.output_dir)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    traces = {name: instantiate(data, _convert_="all") for name, data in configs.items()}
    path = log.write(output, **run_mode(cfg.mode, cfg, traces, instantiate(cfg.calibration), console))
    page = publish(read_record(path), output, console)
    console.print(f"Report, to open in a browser: {page}", soft_wrap=True, highlight=False)
    return path


@hydra.main(version_base="1.3", config_path="conf", config_name="benchmark")
def main(cfg: DictConfig) -> None:
    """Entry point."""
    console = Console() if sys.stdout.isatty() else Console(width=132)
    try:
        path = run(cfg, console)
    except SpecgateError as error:
        Console(stderr=True).print(str(error), style="bold red", markup=False)
        sys.exit(1)
    console.print(str(path), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    sys.argv[1:] = checked(sys.argv[1:], Path(__file__).parent / "conf")
    main()
