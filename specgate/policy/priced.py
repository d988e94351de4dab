"""The default: fetch, keep and evict by one price, the expected time that an expert saves.

Letters: L MoE layers, E experts of a layer. docs/policies.md has the formula, specgate.policy.pricing the
arithmetic, specgate.policy.rules the exact meaning of each number.
"""

from __future__ import annotations

from typing import ClassVar

from specgate.errors import ConfigError
from specgate.policy.base import ForecastSource, Policy, check_depth, check_slots
from specgate.policy.costs import Costs
from specgate.policy.reuse import fit_reuse
from specgate.policy.rules import Rules
from specgate.policy.workload import Workload

PARTS = ("both", "evict_only", "prefetch_only")


class Priced(Policy):
    """The ``priced`` policy: prefetch if p times the stall saved exceeds the cost of the bytes now.

    Evicted is what is worth least: its expected next use, from the newest forecast and, where there is none,
    from a model of recency and frequency that is fitted to training documents (specgate.policy.reuse).

    Args:
        part: ``both``; ``evict_only`` fetches nothing ahead; ``prefetch_only`` evicts by LRU.
        depth: the largest horizon that is fetched ahead.
        foresight: the largest horizon that eviction looks at; at least ``depth``.
        adaptive: fetch only the next event ahead where the forecast is unsure or the link is behind.
        entropy_high: normalised entropy of the next event's forecast above which it is unsure.
        backlog_high: mean events of work that the link may be behind.
        price_scale: factor on the price of the link where demands can interrupt a prefetch.
        price_floor: the least price of the link.
        discount: of value per step, that is after all L events of one; None: the chance that a slot of an LRU
            cache is not handed over in that time (specgate.policy.reuse).
        half_life: of uses, in steps; None fits it.
        calibrated: whether a predictor's probabilities are calibrated first.
        trust: whether they are corrected by how often earlier ones came true (specgate.runtime.trust).
        approximate: fetch a smaller, approximate copy where only that is worth its bytes. Changes values.
        low_share: bytes of the approximate copy as a share of the expert's.
    """

    name: ClassVar[str] = "priced"
    forecast_source: ClassVar[ForecastSource] = "predictor"

    def __init__(
        self,
        part: str = "both",
        depth: int = 4,
        foresight: int = 24,
        adaptive: bool = False,
        entropy_high: float = 0.9,
        backlog_high: float = 4.0,
        price_scale: float = 0.6,
        price_floor: float = 0.2,
        discount: float | None = 0.3,
        half_life: float | None = None,
        calibrated: bool = True,
        trust: bool = True,
        approximate: bool = False,
        low_share: float = 0.28125,
    ) -> None:
        if part not in PARTS:
            raise ConfigError(f"part={part} is unknown; choose one of {', '.join(PARTS)}.")
        if not 0 < low_share < 1:
            raise ConfigError(f"low_share={low_share} saves no bytes; choose between 0 and 1 (int4: 0.28).")
        self.part, self.calibrated, self.trust = part, calibrated, trust
        self.depth = check_depth(self.name, depth)
        self.foresight = max(check_depth(self.name, foresight, "foresight"), self.depth)
        self.adaptive, self.entropy_high, self.backlog_high = adaptive, entropy_high, backlog_high
        self.price_scale, self.price_floor = price_scale, price_floor
        self.discount, self.half_life = discount, half_life
        self.approximate, self.low_share = approximate, low_share
        Rules(  # checks them
            entropy_high=entropy_high,
            backlog_high=backlog_high,
            price_scale=price_scale,
            price_floor=price_floor,
            discount=1.0 if discount is None else discount,
            half_life=1.0 if half_life is None else half_life,
        )

    @property
    def horizons(self) -> int:
        return self.foresight

    def fit(self, train: Workload, costs: Costs, slots: int) -> Rules:
        check_slots(train, slots)
        half_lives = {} if self.half_life is None else {"half_lives": (self.half_life,)}
        reuse = fit_reuse(train, slots, **half_lives)
        prefetch = "none" if self.part == "evict_only" else "priced"
        low = int(costs.expert_bytes * self.low_share) if self.approximate and prefetch == "priced" else 0
        return Rules(
            eviction="lru" if self.part == "prefetch_only" else "priced",
            prefetch=prefetch,
            depth=self.depth,
            adaptive=self.adaptive,
            entropy_high=self.entropy_high,
            backlog_high=self.backlog_high,
            price_scale=self.price_scale,
            price_floor=self.price_floor,
            discount=reuse.discount if self.discount is None else self.discount ** (1 / train.layers),
            half_life=reuse.half_life,
            intercept=reuse.intercept,
            slope=reuse.slope,
            low_bytes=low,
        )
