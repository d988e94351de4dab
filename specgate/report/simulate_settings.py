"""What a simulation compares and how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from specgate.errors import ConfigError
from specgate.policy.roofline import RUNTIMES
from specgate.report.simulate_trace import SPLITS


@dataclass(frozen=True)
class SimulateSettings:
    """Settings of ``mode=simulate``; conf/benchmark.yaml says what each means.

    Attributes:
        policies: names, each with options of its own: ``priced part=evict_only``.
        hardware: profiles of conf/hardware.
        residency: shares of all experts that have a slot on the device.
        batches: sequences decoded together.
        documents, tokens: of the split at most, and of each; None: all.
        fit_documents: of the training split, from which policies are fitted; None: all.
        warmup: validation documents that run first and do not count, for each sequence of a batch.
        groupings: how often documents are dealt into batches larger than 1, each time anew.
        agents: folder of trained agents to go on from and to add to; None: ``agents`` in the run's folder.
        host: share of the experts in host memory; the rest lies in the file.

    Raises:
        ConfigError: naming the value that makes no sense.
    """

    policies: Sequence[str] = ("on_demand", "lru", "priced", "oracle")
    hardware: Sequence[str] = ("rtx3090",)
    residency: Sequence[float] = (0.0625, 0.125, 0.25, 0.5)
    batches: Sequence[int] = (1,)
    checkpoints: Sequence[str] = field(default_factory=list)
    codec: str = "none"
    host: float = 1.0
    split: str = "test"
    documents: int | None = None
    tokens: int | None = None
    fit_documents: int | None = None
    warmup: int = 1
    groupings: int = 4
    agents: str | None = None
    context: int = 1024
    runtime: str = "replay"
    piece_mib: float = 2.0
    forecast_us: float = 20.0
    resamples: int = 1000
    seed: int = 0
    device: str = "auto"
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("policies", "hardware", "residency", "batches"):
            if not getattr(self, name):
                raise ConfigError(f"simulate.{name} is empty; name at least one.")
        for share in self.residency:
            if not 0 < share <= 1:
                raise ConfigError(f"simulate.residency names {share}; write shares above 0, up to 1.")
        for batch in self.batches:
            if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
                raise ConfigError(f"simulate.batches names {batch}; write whole numbers from 1.")
        for name in ("documents", "tokens", "fit_documents"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(
                    f"simulate.{name}={value} leaves nothing; write 1 or more, or null for all."
                )
        if self.split not in SPLITS:
            raise ConfigError(f"simulate.split={self.split} is unknown; choose one of {', '.join(SPLITS)}.")
        if self.split == "train":
            raise ConfigError("simulate.split=train: policies are fitted on it; choose test or validation.")
        if not 0 <= self.host <= 1:
            raise ConfigError(f"simulate.host={self.host} is no share of the experts; write 0 to 1.")
        if self.runtime not in RUNTIMES:
            raise ConfigError(
                f"simulate.runtime={self.runtime} is unknown; choose one of {', '.join(RUNTIMES)}."
            )
        for name, least in (
            ("warmup", 0),
            ("groupings", 1),
            ("context", 1),
            ("piece_mib", 0),
            ("forecast_us", 0),
        ):
            value = getattr(self, name)
            if not math.isfinite(value) or value < least:
                raise ConfigError(f"simulate.{name}={value} makes no sense; write {least} or more.")
        if self.resamples < 100:
            raise ConfigError(f"simulate.resamples={self.resamples} gives no interval; write 100 or more.")


def slots_for(share: float, blocks: int, widest: int) -> int:
    """Slots of a share of all experts, and at least as many as the widest event needs."""
    return min(max(round(share * blocks), widest), blocks)
