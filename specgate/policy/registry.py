"""Names of policies: what ``policy=`` chooses."""

from __future__ import annotations

import importlib
from typing import Any

from specgate.errors import ConfigError
from specgate.policy.base import Policy

#: Name -> class; each has its own file of that name.
POLICIES = {
    "on_demand": "OnDemand",
    "static": "Static",
    "lru": "LRU",
    "lfu": "LFU",
    "lfru": "LFRU",
    "lru2": "LRU2",
    "gate": "Gate",
    "layer_sizes": "LayerSizes",
    "eam": "ExpertActivationMatrices",
    "next_gate": "NextGate",
    "cumulative": "Cumulative",
    "threshold": "Threshold",
    "priced": "Priced",
    "known_tokens": "KnownTokens",
    "belady": "Belady",
    "perfect_prefetch": "PerfectPrefetch",
    "oracle": "Oracle",
    "rl": "ReinforcementLearning",
}
#: Chooses among policies, document by document; it has a configuration of its own and is no policy.
SELECTION = "bandit"
#: What learns in the simulator: not a reference, for it chooses among others or builds on the default.
LEARNED = ("rl", SELECTION)
#: Policies that know the future: they bound what any other can reach.
ORACLES = ("known_tokens", "belady", "perfect_prefetch", "oracle")


def policy_class(name: str) -> type[Policy]:
    """The class of that name.

    Raises:
        ConfigError: unknown.
    """
    if name not in POLICIES:
        raise ConfigError(f"policy={name} is unknown; choose one of {', '.join(POLICIES)}.")
    cls: type[Policy] = getattr(importlib.import_module(f"specgate.policy.{name}"), POLICIES[name])
    return cls


def policy(name: str, **options: Any) -> Policy:
    """A policy with its options.

    Raises:
        ConfigError: an unknown name or option, or a value that makes no sense.
    """
    cls = policy_class(name)
    try:
        return cls(**options)
    except TypeError as error:
        raise ConfigError(f"policy={name} does not take these options: {error}.") from None
