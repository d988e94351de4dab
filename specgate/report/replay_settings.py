"""What a replay compares and how: variants, residencies, settings.

Letters: K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from specgate.errors import BudgetError, ConfigError
from specgate.report.replay_body import KERNELS
from specgate.report.replay_shape import ModelShape
from specgate.report.replay_store import TIERS
from specgate.runtime.store import StoreSettings


@dataclass(frozen=True)
class Variant:
    """A way of lending experts.

    Attributes:
        about: in words.
        eviction: see ``StoreSettings``.
        foresight: ``forecast`` (of a predictor), ``oracle`` or None.
        slots: ``residency`` (a share of all experts), ``event`` (as many as one call needs) or ``all``.
    """

    about: str
    eviction: str = "lru"
    foresight: str | None = None
    slots: str = "residency"


VARIANTS: dict[str, Variant] = {
    "on_demand": Variant("no cache: as many slots as one call needs", slots="event"),
    "lru": Variant("cache, the least recently used expert goes first"),
    "lfu": Variant("cache, the least frequently used expert goes first", "lfu"),
    "lfru": Variant("cache, the least frequently used of late goes first", "lfru"),
    "lru_forecast": Variant("cache as lru, and the predictor's experts are fetched ahead", "lru", "forecast"),
    "static": Variant("cache, the experts that training documents use least go first", "static"),
    "priced": Variant(
        "the forecast fetches ahead what is worth its bytes, and what is worth least goes",
        "priced",
        "forecast",
    ),
    "forecast": Variant("the forecast fetches ahead and decides what goes", "forecast", "forecast"),
    "belady": Variant("cache, what is needed last goes first (nobody can know that)", "belady"),
    "oracle": Variant("belady, and the next calls' experts are fetched ahead", "belady", "oracle"),
    "resident": Variant("all experts on the device, the store is not asked", slots="all"),
}


LEARNS = ("static", "priced")
"""Evictions that know training documents."""
LEAST = 2.0**-6
"""Forecasts below this probability are not worth a look, where a price decides."""


def variant_of(name: str) -> tuple[Variant, float | None]:
    """The variant that a name means, and its own threshold: ``forecast:0.5`` is ``forecast`` from p = 0.5 on.

    Raises:
        ConfigError: for an unknown name, or a threshold that makes no sense.
    """
    base, found, text = name.partition(":")
    if base not in VARIANTS:
        raise ConfigError(f"replay.variants names {name}; choose among {', '.join(VARIANTS)}.")
    if not found:
        return VARIANTS[base], None
    if VARIANTS[base].foresight != "forecast":
        raise ConfigError(f"replay.variants names {name}, and {base} has no threshold; write {base}.")
    try:
        threshold = float(text)
    except ValueError:
        threshold = -1.0
    if not 0 <= threshold <= 1:
        raise ConfigError(f"replay.variants names {name}; after the colon comes a probability, 0 to 1.")
    return VARIANTS[base], threshold


@dataclass
class ReplaySettings:
    """What to replay and how.

    Attributes:
        variants: of :data:`VARIANTS`; ``forecast:0.5`` has a threshold of its own.
        residency: shares of all experts that have a slot.
        checkpoints: of a predictor of the trace's routing, one at most; without, variants that need it are
            left out.
        threshold: experts less probable are not fetched ahead. lookahead: calls ahead that the oracle knows.
        codec: of the blocks: ``none``, ``int8``, ``int4`` or ``fp8``.
        tier: ``memory`` or ``file``. host: share of the experts in host memory with ``tier=file``.
        script: a file with the documents and the predictor's forecasts of them; written if it is not there,
            else read, and then neither the trace nor the predictor is needed.
        split, documents, tokens: which documents of the trace, how many and how long. warmup: of them, so
            many are run before anything is measured.
        repeats: rounds of all variants.
        dense: whether a layer's dense part runs. head: the language-model head.
        kernels: ``batched_mm`` or ``grouped_mm``.
        ahead: on a GPU, whether slots go over without the host waiting for the copies, as in
            ``specgate.offload``, so that kernels are launched meanwhile.
        graphs: on a GPU and with ``ahead``, each layer's operations are captured once as CUDA graphs, as
            engines do, so that the host launches two a layer instead of some twenty operations.
        price_scale: factor on the price of the link, for ``priced``. price_floor: the least such price.
        trust: whether ``priced`` corrects probabilities by how often earlier ones came true.
        depth: calls ahead that ``priced`` fetches for; what is foreseen beyond them guides eviction alone, 0
            fetches for all.
        prefetch_mib: forecast bytes in flight at most, what a demanded expert can find before it on the link.
        timeline_tokens: tokens in the timeline's picture and file.
        device, seed: as elsewhere.
        resume: folder of an interrupted run to go on from.
    """

    variants: Sequence[str] = ("on_demand", "lru", "lfru", "forecast", "oracle", "resident")
    residency: Sequence[float] = (0.125, 0.25, 0.5, 1.0)
    checkpoints: Sequence[str] = ()
    threshold: float = 0.2
    lookahead: int = 3
    codec: str = "none"
    tier: str = "memory"
    host: float = 0.5
    script: str | None = None
    split: str = "test"
    documents: int = 4
    tokens: int = 32
    warmup: int = 1
    repeats: int = 3
    dense: bool = True
    head: bool = True
    kernels: str = "batched_mm"
    ahead: bool = True
    graphs: bool = True
    prefetch_mib: int = 64
    price_scale: float = 0.5
    price_floor: float = 0.2
    trust: bool = True
    depth: int = 4
    timeline_tokens: int = 3
    device: str = "auto"
    seed: int = 0
    resume: str | None = None

    def __post_init__(self) -> None:
        for name in self.variants:
            variant_of(name)
        if not self.variants or len(set(self.variants)) != len(self.variants):
            raise ConfigError(f"replay.variants={list(self.variants)} must name each variant once, and some.")
        shares = list(self.residency)
        if not shares or len(set(shares)) != len(shares) or not all(0 < share <= 1 for share in shares):
            raise ConfigError(f"replay.residency={shares} are no shares; write numbers above 0 and up to 1.")
        if len(self.checkpoints) > 1:
            raise ConfigError(f"replay.checkpoints names {len(self.checkpoints)} predictors; name one.")
        for name in ("price_scale", "price_floor"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"replay.{name}={getattr(self, name)} is no factor; write 0 or more.")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"replay.threshold={self.threshold} is no probability; write 0 to 1.")
        least = {
            "lookahead": 1,
            "documents": 1,
            "tokens": 1,
            "warmup": 0,
            "repeats": 1,
            "prefetch_mib": 1,
            "depth": 0,
        }
        for name, low in (least | {"timeline_tokens": 1}).items():
            if getattr(self, name) < low:
                raise ConfigError(f"replay.{name}={getattr(self, name)} is too small; write {low} or more.")
        for name, choices in (("tier", TIERS), ("kernels", KERNELS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"replay.{name}={getattr(self, name)}; choose {' or '.join(choices)}.")
        if not 0 <= self.host <= 1:
            raise ConfigError(f"replay.host={self.host} is no share of the experts; write 0 to 1.")


def plan_name(name: str) -> str:
    """Under which name a document keeps the plan of a variant."""
    kind, threshold = variant_of(name)
    if threshold is None and kind.eviction == "priced":
        return f"{kind.foresight}:priced"
    return f"{kind.foresight}" if threshold is None else f"{kind.foresight}:{threshold:g}"


def store_settings(settings: ReplaySettings, eviction: str, timeline: int = 0) -> StoreSettings:
    """How the store of a variant moves bytes; ``timeline``: transfers that it keeps."""
    priced = eviction == "priced"
    return StoreSettings(
        eviction=eviction,
        price_scale=settings.price_scale if priced else None,
        price_floor=settings.price_floor,
        trust=settings.trust and priced,
        prefetch_depth=settings.depth if priced else 0,
        prefetch_copy_bytes=settings.prefetch_mib << 20,
        prefetch_read_bytes=settings.prefetch_mib << 20,
        timeline=timeline,
    )


@dataclass(frozen=True)
class Entry:
    """One variant at one residency.

    Attributes:
        name: of the variant.
        residency: share of all experts; 0 for as many as one call needs.
        slots: on the device.
    """

    name: str
    residency: float
    slots: int

    @property
    def budgeted(self) -> bool:
        """Whether the residency was chosen, not given by the variant."""
        return self.kind.slots == "residency"

    @property
    def kind(self) -> Variant:
        """The variant."""
        return variant_of(self.name)[0]

    def plan(self) -> str | None:
        """Which of a document's plans it follows."""
        return None if self.kind.foresight is None else plan_name(self.name)

    @property
    def key(self) -> str:
        """In file names and tables."""
        return f"{self.name}@{self.residency:g}"


def entries(settings: ReplaySettings, shape: ModelShape, predicts: bool) -> list[Entry]:
    """Every variant at every residency that it knows.

    Raises:
        BudgetError: if a residency holds fewer experts than one call needs.
    """
    count, least = shape.layers * shape.experts, shape.top_k
    found = []
    for name in settings.variants:
        kind = variant_of(name)[0]
        if kind.foresight == "forecast" and not predicts:
            continue
        if kind.slots != "residency":
            found.append(Entry(name, 0.0, least) if kind.slots == "event" else Entry(name, 1.0, count))
            continue
        for share in settings.residency:
            slots = round(share * count)
            if slots < least:
                raise BudgetError(
                    f"replay.residency={share:g} holds {slots} of the {count} experts of {shape.name} and "
                    f"one call needs {least}; the least is {math.ceil(1e4 * least / count) / 1e4:g}."
                )
            found.append(Entry(name, float(share), slots))
    return found
