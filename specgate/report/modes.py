"""The modes of benchmark.py, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from specgate.errors import ConfigError
from specgate.policy.bandit import Bandit
from specgate.policy.base import Policy
from specgate.report.accuracy import AccuracySettings, compare
from specgate.report.calibration import CalibrationSettings, examine
from specgate.report.cost import CostSettings, measure
from specgate.report.live import live as run_live
from specgate.report.live_settings import LiveSettings
from specgate.report.plan import plan as run_plan
from specgate.report.plan_settings import PlanSettings
from specgate.report.quantized import QuantizeSettings, compare_precisions
from specgate.report.replay import replay as run_replay
from specgate.report.replay_settings import ReplaySettings
from specgate.report.simulate import simulate as run_simulate
from specgate.report.simulate_settings import SimulateSettings
from specgate.report.transitions import FlowSettings, explore
from specgate.report.uncertainty import UncertaintySettings, measure_uncertainty
from specgate.traces.datamodule import RoutingDataModule
from specgate.training import make

Mode = Callable[[Any, Mapping[str, RoutingDataModule], Any, Console], dict[str, Any]]


def accuracy(
    cfg: DictConfig, traces: Mapping[str, RoutingDataModule], fitter: Any, console: Console
) -> dict[str, Any]:
    """How well routing is foreseen (``specgate.report.accuracy``)."""
    values: Any = OmegaConf.to_container(cfg.accuracy, resolve=True)
    return compare(AccuracySettings(**values), traces, fitter, console)


def cost(
    cfg: DictConfig, traces: Mapping[str, RoutingDataModule], fitter: Any, console: Console
) -> dict[str, Any]:
    """What a forecast costs (``specgate.report.cost``)."""
    values: Any = OmegaConf.to_container(cfg.cost, resolve=True)
    values["models"] = dict(model_config(line) for line in values["models"])
    return measure(CostSettings(**values), traces, console)


def model_config(line: str) -> tuple[str, dict[str, Any]]:
    """``attention width=64`` -> its label, ``attention (width=64)``, and conf/model's settings so changed.

    Raises:
        ConfigError: if there is no such model or setting.
    """
    name, *options = line.split()
    try:
        cfg = compose("train", overrides=[f"model={name}", *(f"model.{option}" for option in options)])
    except HydraException as error:
        raise ConfigError(f"cost.models names {line!r}: {' '.join(str(error).split())[:200]}") from None
    values: Any = OmegaConf.to_container(cfg.model, resolve=True)
    return (f"{name} ({' '.join(options)})" if options else name), values


def quantize(
    cfg: DictConfig, traces: Mapping[str, RoutingDataModule], fitter: Any, console: Console
) -> dict[str, Any]:
    """What integer weights cost in recall (``specgate.report.quantized``)."""
    values: Any = OmegaConf.to_container(cfg.quantize, resolve=True)
    return compare_precisions(QuantizeSettings(**values), traces, fitter, console)


def transitions(
    cfg: DictConfig, traces: Mapping[str, RoutingDataModule], fitter: Any, console: Console
) -> dict[str, Any]:
    """Which experts follow which, and the flows that many tokens take (``specgate.report.transitions``)."""
    values: Any = OmegaConf.to_container(cfg.transitions, resolve=True)
    return explore(FlowSettings(**values), traces, Path(cfg.paths.run), console)


def uncertainty(
    cfg: DictConfig, traces: Mapping[str, RoutingDataModule], fitter: Any, console: Console
) -> dict[str, Any]:
    """What an ensemble's doubt is worth (``specgate.report.uncertainty``)."""
    values: Any = OmegaConf.to_container(cfg.uncertainty, resolve=True)
    return measure_uncertainty(UncertaintySettings(**values), traces, fitter, console)


def calibration(
    cfg: DictConfig, traces: Mapping[str, RoutingDataModule], fitter: Any, console: Console
) -> dict[str, Any]:
    """How honest the probabilities are, in domain and on other text (``specgate.report.calibration``)."""
    values: Any = OmegaConf.to_container(cfg.calibrate, resolve=True)
    shift = {name: instantiate(composed_data(name), _convert_="all") for name in cfg.shift}
    return examine(CalibrationSettings(**values), traces, shift, console)


def replay(
    cfg: DictConfig, traces: Mapping[str, RoutingDataModule], fitter: Any, console: Console
) -> dict[str, Any]:
    """A trace drives real transfers and kernels at a model's true shapes (``specgate.report.replay``)."""
    values: Any = OmegaConf.to_container(cfg.replay, resolve=True)
    shape = instantiate(cfg.shape, _convert_="all")
    return run_replay(ReplaySettings(**values), shape, traces, Path(cfg.paths.run), console)


def simulate(
    cfg: DictConfig, traces: Mapping[str, RoutingDataModule], fitter: Any, console: Console
) -> dict[str, Any]:
    """What each policy would reach on a machine (``specgate.report.simulate``)."""
    values: Any = OmegaConf.to_container(cfg.simulate, resolve=True)
    settings = SimulateSettings(**values)
    policies = dict(policy_config(line) for line in settings.policies)
    hardware = {name: make(composed("hardware", name)) for name in settings.hardware}
    shape = instantiate(cfg.shape, _convert_="all")
    return run_simulate(settings, policies, shape, hardware, traces, console, Path(cfg.paths.run))


def plan(
    cfg: DictConfig, traces: Mapping[str, RoutingDataModule], fitter: Any, console: Console
) -> dict[str, Any]:
    """Whether a model fits a machine, how fast it would be (``specgate.report.plan``)."""
    values: Any = OmegaConf.to_container(cfg.plan, resolve=True)
    return run_plan(PlanSettings(**values), make(cfg.shape), make(cfg.hardware), traces, console)


def policy_config(line: str) -> tuple[str, Policy | Bandit]:
    """``priced part=evict_only`` -> itself, and conf/policy's object so changed.

    Raises:
        ConfigError: if there is no such policy or option, or a value makes no sense.
    """
    name, *options = line.split()
    made: Policy | Bandit = make(composed("policy", name, *options))
    return " ".join([name, *options]), made


def composed(group: str, name: str, *options: str) -> DictConfig:
    """What ``<group>=<name>`` chooses, with the group's own options, and otherwise as the command line says.

    Raises:
        ConfigError: if there is no such choice or option.
    """
    ours = HydraConfig.initialized() and HydraConfig.get().job.config_name == "benchmark"
    given = list(HydraConfig.get().overrides.task) if ours else []
    kept = [o for o in given if not o.startswith((f"{group}=", "data=")) and o.split("=")[0] != group]
    own = [f"{group}={name}", *(f"{group}.{option}" for option in options)]
    try:
        chosen_group: DictConfig = compose("benchmark", overrides=[*kept, *own])[group]
    except HydraException as error:
        raise ConfigError(
            f"{group}={' '.join([name, *options])}: {' '.join(str(error).split())[:200]}"
        ) from None
    return chosen_group


def live(
    cfg: DictConfig, traces: Mapping[str, RoutingDataModule], fitter: Any, console: Console
) -> dict[str, Any]:
    """Real generation through the expert store (``specgate.report.live``); ``data=`` is not looked at."""
    values: Any = OmegaConf.to_container(cfg.live, resolve=True)
    shape = instantiate(cfg.shape, _convert_="all")
    return run_live(LiveSettings(**values), shape, Path(cfg.paths.run), console)


MODES: dict[str, Mode] = {
    "accuracy": accuracy,
    "calibration": calibration,
    "cost": cost,
    "live": live,
    "plan": plan,
    "quantize": quantize,
    "replay": replay,
    "simulate": simulate,
    "transitions": transitions,
    "uncertainty": uncertainty,
}


def run_mode(
    name: str, cfg: DictConfig, traces: Mapping[str, RoutingDataModule], fitter: Any, console: Console
) -> dict[str, Any]:
    """Run one mode; returns the content of metrics.json.

    Raises:
        ConfigError: for an unknown mode.
    """
    if name not in MODES:
        raise ConfigError(f"mode={name} is unknown: choose one of {', '.join(MODES)}")
    return MODES[name](cfg, traces, fitter, console)


def composed_data(name: str) -> DictConfig:
    """The configuration of one data set, as if ``data=name`` had been given (inside a Hydra run)."""
    settings = HydraConfig.get()
    others = [override for override in settings.overrides.task if not override.startswith("data=")]
    data: DictConfig = compose(config_name=settings.job.config_name, overrides=[*others, f"data={name}"]).data
    return data


def chosen(
    group: str, overrides: Sequence[str], config: Path, otherwise: Sequence[str] | None = None
) -> list[str]:
    """Which options of a group that takes lists are chosen (Hydra itself remembers single choices only).

    Args:
        overrides: of the command line; the last one for the group counts.
        config: the primary YAML file, whose defaults list says what holds otherwise.
        otherwise: what holds instead of that.

    Raises:
        ConfigError: if nothing is chosen.
    """
    primary: Any = OmegaConf.to_container(OmegaConf.load(config))
    listed = [
        default[group] for default in primary["defaults"] if isinstance(default, dict) and group in default
    ]
    value: Any = list(otherwise) if otherwise is not None else listed[-1] if listed else None
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.key_or_group == group and not override.is_delete():
            value = override.value()
    names = [str(name) for name in value] if isinstance(value, list) else [str(value)] if value else []
    if not names:
        raise ConfigError(f"{group} names nothing: choose one or several of conf/{group}, e.g. {group}=[a,b]")
    return names
