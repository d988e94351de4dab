"""What a plan is asked for, and what of it makes no sense."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specgate.errors import ConfigError
from specgate.policy.hardware import Hardware
from specgate.policy.roofline import RUNTIMES
from specgate.report.replay_shape import ModelShape
from specgate.report.replay_trace import SPLITS
from specgate.runtime.layout import CODECS

#: Share of the host memory that experts may take unless the user says otherwise: the system needs some, and
#: pinned memory cannot be swapped out.
HOST_SHARE = 0.75
#: Groups of the configuration whose options :func:`check_choices` knows.
GROUPS = ("shape", "hardware", "nvme")


@dataclass(frozen=True)
class PlanSettings:
    """What to plan for.

    Attributes:
        budget_gb: device memory for all of the model; None: all that the card has free.
        host_gb: host memory for experts; None: three quarters of what there is.
        context: tokens that each sequence's cache must hold. batch_size: sequences decoded together.
        codec: of the blocks in host memory and in the file: ``none``, ``int8``, ``int4`` or ``fp8``. The
            others are shown beside it.
        recall: of the forecasts that stand in for a predictor's, one per horizon: the share of the experts
            used that are foreseen.
        checkpoints: one predictor, whose own forecasts are used instead; only with the model's own trace.
        split, documents, tokens: which documents of the trace, how many and how long. warmup: so many more
            come before what is counted. train_documents: that the policies are fitted on.
        runtime: how kernels are launched, one of :data:`specgate.policy.roofline.RUNTIMES`.
        seed: of the forecasts that stand in.

    Raises:
        ConfigError: for what makes no sense.
    """

    budget_gb: float | None = None
    host_gb: float | None = None
    context: int = 4096
    batch_size: int = 1
    codec: str = "none"
    recall: Sequence[float] = (0.82, 0.82, 0.81)
    checkpoints: Sequence[str] = ()
    split: str = "validation"
    documents: int = 8
    tokens: int = 128
    warmup: int = 2
    train_documents: int = 8
    runtime: str = "transformers"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("budget_gb", "host_gb"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value > 0):
                raise ConfigError(f"{name}={value} is no amount of memory; write a number of GB above 0.")
        least = {"context": 1, "batch_size": 1, "documents": 1, "tokens": 2, "warmup": 0}
        for name, low in (least | {"train_documents": 1}).items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"plan.{name}={value} makes no sense; write a whole number from {low}.")
        for name, choices in (("codec", CODECS), ("split", SPLITS), ("runtime", tuple(RUNTIMES))):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"plan.{name}={getattr(self, name)} is unknown; choose one of {', '.join(choices)}."
                )
        if not self.recall or not all(_is_number(r) and 0 < r <= 1 for r in self.recall):
            raise ConfigError(
                f"plan.recall={list(self.recall)} are no shares; write numbers above 0, up to 1."
            )
        if len(self.checkpoints) > 1:
            raise ConfigError(f"plan.checkpoints names {len(self.checkpoints)} predictors; name one.")

    def budget_of(self, hardware: Hardware) -> float:
        """GB of device memory that the plan may use.

        Raises:
            ConfigError: more than the card has.
        """
        if self.budget_gb is None:
            return hardware.free_gb
        if self.budget_gb > hardware.device_gb:
            raise ConfigError(
                f"budget_gb={self.budget_gb:g} is more than the {hardware.device_gb:g} GB of "
                f"{hardware.name}; write {hardware.free_gb:g} or less."
            )
        return self.budget_gb

    def host_of(self, hardware: Hardware) -> float:
        """GB of host memory for experts.

        Raises:
            ConfigError: more than the machine has.
        """
        if self.host_gb is None:
            return HOST_SHARE * hardware.host_gb
        if self.host_gb > hardware.host_gb:
            raise ConfigError(
                f"host_gb={self.host_gb:g} is more than the {hardware.host_gb:g} GB of "
                f"{hardware.name}; write less, or say what you have with hardware.host_gb=."
            )
        return self.host_gb

    def check_context(self, shape: ModelShape) -> None:
        """Refuses more context than an architecture of fixed positions can have.

        Raises:
            ConfigError: naming both.
        """
        most = shape.config.get("max_position_embeddings")
        if most is not None and self.context > most:
            raise ConfigError(
                f"plan.context={self.context} is more than the {most} tokens that {shape.name} can see; "
                "write that or less."
            )


#: Traces whose routing a plan may simulate, if none is named; those that are not there are passed over.
TRACES = ("gpt_oss_20b", "olmoe_ref_decode")


def planned(overrides: Sequence[str]) -> Sequence[str] | None:
    """The traces of a run that names none: those of a plan; None: those of the configuration."""
    return TRACES if "mode=plan" in overrides else None


def checked(arguments: Sequence[str], conf: Path) -> list[str]:
    """The command line of benchmark.py: ``moe=`` means ``shape=``. Ends the program, with one sentence, if it
    names an option that is not there."""
    names = {path.stem for path in (conf / "shape").glob("*.yaml")}
    out = [
        f"shape={argument[4:]}" if argument.startswith("moe=") and argument[4:] in names else argument
        for argument in arguments
    ]
    try:
        check_choices([a.replace("moe=", "shape=", 1) if a.startswith("moe=") else a for a in out], conf)
    except ConfigError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    return out


def check_choices(
    overrides: Sequence[str], conf: Path, groups: Sequence[str] = ("shape", "hardware", "nvme")
) -> None:
    """Refuses options that are not there before Hydra does, which takes a screen to say so.

    Args:
        overrides: of the command line.
        conf: folder of the configuration.

    Raises:
        ConfigError: naming what comes nearest and all there is.
    """
    for override in overrides:
        group, found, name = override.partition("=")
        if not found or group not in groups or not name or name.startswith(("[", "{", "$")):
            continue
        known = sorted(path.stem for path in (conf / group).glob("*.yaml"))
        if known and name.strip("'\"") not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}? There are" if near else "choose one of"
            raise ConfigError(f"{group}={name} is unknown; {hint} {', '.join(known)}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
