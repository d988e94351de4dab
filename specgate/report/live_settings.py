"""What mode=live compares and how: variants, budgets, settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from specgate.errors import BudgetError, ConfigError
from specgate.moe.offload_plan import OffloadPlan

WIDE = "wide"
TEXTS = ("auto", "own", "forced")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Way:
    """A way of running a model.

    Attributes:
        about: in words.
        kind: ``resident``, ``offload``, ``accelerate_cpu`` or ``accelerate_disk``.
        predicts: whether the predictors of ``checkpoints`` foresee.
        slots: ``residency`` (a share of all experts), ``event`` (as few as one token needs) or ``all``.
        host: whether all experts lie in host memory, rather than in the file alone.
        eviction: of the cache; None: the settings'.
        routers: whether the next layers' own routers foresee, which need no training.
    """

    about: str
    kind: str
    predicts: bool = False
    slots: str = "residency"
    host: bool = True
    eviction: str | None = None
    routers: bool = False


WAYS: dict[str, Way] = {
    "resident": Way("transformers, everything on the device", "resident", slots="all"),
    "on_demand": Way(
        "specgate.offload without a cache: as many slots as one token needs", "offload", slots="event"
    ),
    "offload": Way("specgate.offload, a cache of experts", "offload"),
    "offload_predictor": Way("specgate.offload, with a predictor", "offload", predicts=True),
    "offload_file": Way("specgate.offload, no experts in host memory: from the file", "offload", host=False),
    "offload:lru": Way("specgate.offload, the least recently used expert goes", "offload", eviction="lru"),
    "offload:lfu": Way("specgate.offload, the least frequently used expert goes", "offload", eviction="lfu"),
    "offload:lfru": Way("specgate.offload, the least used expert of late goes", "offload", eviction="lfru"),
    "offload:lru_forecast": Way(
        "specgate.offload, a predictor fetches ahead, the least recently used expert goes",
        "offload",
        predicts=True,
        eviction="lru",
    ),
    "offload:forecast": Way(
        "specgate.offload, a predictor fetches ahead and says which expert goes",
        "offload",
        predicts=True,
        eviction="forecast",
    ),
    "offload:priced": Way(
        "specgate.offload as it is by default: a predictor's forecasts and what was used of late decide by "
        "price what is fetched ahead and what goes",
        "offload",
        predicts=True,
        eviction="priced",
    ),
    "offload:reuse": Way(
        "specgate.offload, the price without a predictor: what was used of late decides what goes",
        "offload",
        eviction="priced",
    ),
    "offload:lru_routers": Way(
        "specgate.offload, the next layers' own routers fetch ahead, the least recently used expert goes",
        "offload",
        eviction="lru",
        routers=True,
    ),
    "offload:priced_routers": Way(
        "specgate.offload, the price with the next layers' own routers as predictor",
        "offload",
        eviction="priced",
        routers=True,
    ),
    "accelerate_cpu": Way(
        "accelerate.cpu_offload: every module's weights when it runs", "accelerate_cpu", slots="all"
    ),
    "accelerate_disk": Way("accelerate.disk_offload: the same from a disk", "accelerate_disk", slots="all"),
}
PLAIN = tuple(name for name in WAYS if ":" not in name)
"""Those that are compared unless others are named."""


@dataclass
class LiveSettings:
    """What to run and how.

    Attributes:
        model: a bundled name, a directory, a name on the hub, or ``wide``: one of the chosen shape with
            random weights.
        expert_mib: the model's experts are padded with zeros to this size at least, in the dtype that it runs
            in; it generates the same. None: as they are.
        variants: of :data:`WAYS`.
        residency: shares of all experts that have a slot.
        checkpoints: predictors of the model's routing, one per stack and phase; without, variants that need
            one are left out.
        threshold: experts less probable are not fetched ahead. eviction: of the cache, where the variant
            names none. None and ``auto``: what ``specgate.offload`` does by itself.
        packed: a file of ``python -m specgate.runtime.pack``, for its codec; None: the model's own files.
        domains: of the bundled text; None: those that the reference models have read.
        prompts, prompt_tokens, new_tokens: how many prompts, how long, and how much is generated after each.
        warmup_tokens: generated after another prompt before anything is measured.
        text: what is generated: ``own`` (greedy), ``forced`` (the document goes on, whatever the model would
            say: a model of random weights repeats itself), ``auto`` (forced with ``model=wide``).
        repeats: rounds of all variants.
        timeline_tokens, dtype, device, seed, resume: see ``ReplaySettings``.
    """

    model: str = "olmoe_ref"
    expert_mib: float | None = None
    variants: Sequence[str] = PLAIN
    residency: Sequence[float] = (0.125, 0.25, 0.5, 1.0)
    checkpoints: Sequence[str] = ()
    threshold: float | None = None
    eviction: str = "auto"
    packed: str | None = None
    domains: Sequence[str] | None = None
    prompts: int = 2
    prompt_tokens: int = 64
    new_tokens: int = 32
    warmup_tokens: int = 8
    text: str = "auto"
    repeats: int = 3
    timeline_tokens: int = 3
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    resume: str | None = None

    def __post_init__(self) -> None:
        for name in self.variants:
            if name not in WAYS:
                raise ConfigError(f"live.variants names {name}; choose among {', '.join(WAYS)}.")
        if not self.variants or len(set(self.variants)) != len(self.variants):
            raise ConfigError(f"live.variants={list(self.variants)} must name each variant once, and some.")
        shares = list(self.residency)
        if not shares or len(set(shares)) != len(shares) or not all(0 < share <= 1 for share in shares):
            raise ConfigError(f"live.residency={shares} are no shares; write numbers above 0 and up to 1.")
        least = {"prompts": 1, "prompt_tokens": 1, "new_tokens": 2, "warmup_tokens": 1, "repeats": 1}
        for name, low in (least | {"timeline_tokens": 1}).items():
            if getattr(self, name) < low:
                raise ConfigError(f"live.{name}={getattr(self, name)} is too small; write {low} or more.")
        if self.expert_mib is not None and self.model == WIDE:
            raise ConfigError(
                "live.expert_mib pads a model that is there; of live.model=wide choose the shape."
            )
        for name, choices in (("text", TEXTS), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"live.{name}={getattr(self, name)}; choose one of {', '.join(choices)}.")


@dataclass(frozen=True)
class Budget:
    """One variant with one budget.

    Attributes:
        name: of the variant.
        residency: share of all experts; 0 for as few as one token needs, 1 where everything is there.
        slots: on the device; 0 where there are none.
        gb: what ``specgate.offload`` is given; None where it is not used.
    """

    name: str
    residency: float
    slots: int = 0
    gb: float | None = None

    @property
    def way(self) -> Way:
        """The variant."""
        return WAYS[self.name]

    @property
    def budgeted(self) -> bool:
        """Whether the residency was chosen, not given by the variant."""
        return self.way.slots == "residency"

    @property
    def key(self) -> str:
        """In file names and tables."""
        return f"{self.name}@{self.residency:g}"


def budgets(
    settings: LiveSettings,
    plan: OffloadPlan,
    predicted: OffloadPlan | None,
    model: str,
    routed: OffloadPlan | None = None,
) -> list[Budget]:
    """Every variant with every budget that it knows.

    Args:
        plan: of the model without a predictor. predicted: with it, None if there is none. routed: with the
            model's own routers as one, None if no variant wants them.

    Raises:
        BudgetError: if a residency holds fewer experts than one token needs.
    """
    count, least = plan.blocks, plan.least_slots
    caches = [n for n in settings.variants if WAYS[n].kind == "offload" and WAYS[n].slots == "residency"]
    plain = [n for n in caches if WAYS[n].host and not WAYS[n].predicts and not WAYS[n].routers]
    whole = next(iter(plain), None)
    found = []
    for name in settings.variants:
        way = WAYS[name]
        mine = predicted if way.predicts else routed if way.routers else plan
        if mine is None:
            continue
        if way.slots == "all":
            found.append(Budget(name, 1.0, count if way.kind == "resident" else 0))
        elif way.slots == "event":
            found.append(Budget(name, 0.0, least, mine.budget_for(least)))
        else:
            for share in settings.residency:
                slots = round(share * count)
                if slots < least:
                    raise BudgetError(
                        f"live.residency={share:g} holds {slots} of the {count} experts of {model} and "
                        f"one token needs {least}; the least is {math.ceil(1e4 * least / count) / 1e4:g}."
                    )
                if slots < count or name == whole:  # all resident: the others would be the same
                    found.append(Budget(name, float(share), slots, mine.budget_for(slots)))
    return found
