"""A row of a replay in the simulator's words: what the store did there, as rules and forecasts.

Letters: T tokens of a document, L MoE layers, P = L + 1 source points of a token, H horizons, E experts, K
experts per token.

docs/simulator.md (Validation) says where the store differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from specgate.errors import ConfigError
from specgate.policy.rules import Rules
from specgate.policy.workload import Forecasts, Workload, decoding, join, oracle_forecasts
from specgate.report.replay_script import Script
from specgate.report.replay_settings import LEAST, ReplaySettings, variant_of
from specgate.report.replay_trace import Document
from specgate.report.simulate_trace import within
from specgate.runtime.store import StoreSettings
from specgate.runtime.trust import trusted

#: Why a variant is not simulated.
NOT_SIMULATED = {
    "resident": "the store is not asked; the host launches ahead of the device, and no event waits"
}


@dataclass(frozen=True)
class RowCase:
    """What to simulate for a row.

    Attributes:
        workload: documents to warm up with, then the measured ones; with the forecasts that were asked for.
        rules: as the store decided. slots: on the device. host_slots: in host memory.
        warm: whether every expert was on the device at first.
        warmup: documents that are not measured.
    """

    workload: Workload
    rules: Rules
    slots: int
    host_slots: int
    warm: bool
    warmup: int


@dataclass
class RowCases:
    """Makes the cases of a replay's rows.

    Args:
        settings: of the replay. script: with its documents and what its policies learned.
        experts: E.
    """

    settings: ReplaySettings
    script: Script
    experts: int
    _foreseen: dict[tuple[str, float, bool], Workload] = field(default_factory=dict)

    def of(self, row: Mapping[str, Any]) -> RowCase | str:
        """The case of a row, or why there is none.

        Raises:
            ConfigError: a script without what the row needs.
        """
        kind, own = variant_of(row["variant"])
        base = row["variant"].partition(":")[0]
        if base in NOT_SIMULATED:
            return NOT_SIMULATED[base]
        threshold = own
        if kind.foresight == "forecast" and own is None:
            threshold = LEAST if kind.eviction == "priced" else self.settings.threshold
        trust = self.settings.trust and kind.eviction == "priced" and kind.foresight is not None
        work = self._workload(kind.foresight, threshold or 0.0, trust)
        blocks, settings = work.layers * work.experts, self.settings
        return RowCase(
            workload=work,
            rules=self._rules(kind.eviction, kind.foresight, row["slots"], work),
            slots=int(row["slots"]),
            host_slots=blocks if settings.tier == "memory" else round(settings.host * blocks),
            warm=kind.slots == "residency" and row["slots"] >= blocks,
            warmup=settings.warmup,
        )

    def _workload(self, foresight: str | None, threshold: float, trust: bool) -> Workload:
        key = (str(foresight), threshold, trust)
        if key not in self._foreseen:
            each = [self._document(document, foresight, threshold) for document in self.script.documents]
            self._foreseen[key] = join(trusted(each) if trust else each)
        return self._foreseen[key]

    def _document(self, document: Document, foresight: str | None, threshold: float) -> Workload:
        plain = decoding([np.asarray(document.experts_TLK)], self.experts, [document.name])
        if foresight is None:
            return plain
        if foresight == "oracle":
            return plain.with_forecasts(oracle_forecasts(plain, self.settings.lookahead))
        if document.p_TPHE is None:
            raise ConfigError("This script holds no forecasts and the replay used some; name its own script.")
        p_TPHE = document.p_TPHE
        kept_PHE = p_TPHE.where(p_TPHE >= threshold, 0).flatten(0, 1).float().numpy()
        return plain.with_forecasts(within(Forecasts.from_dense(kept_PHE), plain))

    def _rules(self, eviction: str, foresight: str | None, slots: int, work: Workload) -> Rules:
        fitted = self.script.fitted
        more: dict[str, Any] = {}
        if eviction == "lfru":  # the store counts half lives in events, the rules in steps
            more["half_life"] = StoreSettings().half_life / work.layers
        if eviction in ("static", "priced"):
            if fitted is None:
                raise ConfigError(f"This script was made without training documents, which {eviction} needs.")
            if eviction == "static":
                more["weights_LE"] = np.asarray(fitted.uses_LE, dtype=np.float64)
            else:
                more |= {
                    "half_life": fitted.half_life,
                    "discount": fitted.discount(slots),
                    "intercept": fitted.intercept,
                    "slope": fitted.slope,
                    "price_scale": self.settings.price_scale,
                    "price_floor": self.settings.price_floor,
                }
        if foresight is not None:
            forecasts = work.forecasts
            assert forecasts is not None
            more["depth"] = max(1, int(forecasts.horizon_M.max(initial=1)))
            if eviction == "priced" and self.settings.depth:
                more["depth"] = min(more["depth"], self.settings.depth)
            more["prefetch"] = "priced" if eviction == "priced" else "threshold"
            more["thresholds_L"] = None if eviction == "priced" else np.zeros(work.layers)
        return Rules(eviction=eviction, **more)


def settings_of(record: Mapping[str, Any]) -> ReplaySettings:
    """The settings that a replay ran with.

    Raises:
        ConfigError: a record that does not hold them.
    """
    known = {f.name for f in fields(ReplaySettings)}
    try:
        found: Mapping[str, Any] = record["config"]["replay"]
        older = {"ahead": False, "depth": 0, "price_floor": 0.0, "trust": False}  # of records that do not say
        return ReplaySettings(**older | {name: value for name, value in found.items() if name in known})
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"This record does not say how it was replayed ({error}); give the folder of a finished run."
        ) from None


def check_same(settings: Sequence[ReplaySettings]) -> None:
    """Refuses runs of which one profile cannot be compared with all.

    Raises:
        ConfigError: naming the setting that differs.
    """
    names = (
        "documents",
        "tokens",
        "warmup",
        "codec",
        "tier",
        "host",
        "dense",
        "head",
        "kernels",
        "lookahead",
    )
    for name in (
        *names,
        "ahead",
        "threshold",
        "price_scale",
        "price_floor",
        "trust",
        "depth",
        "prefetch_mib",
    ):
        values = {getattr(one, name) for one in settings}
        if len(values) > 1:
            raise ConfigError(
                f"The runs were replayed with replay.{name} of {' and '.join(map(str, sorted(values)))}; "
                "validate them one by one."
            )
