"""Rules say what is wrong with them, cannot be changed, and survive being written as plain values."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specgate.errors import ConfigError
from specgate.policy.rules import ADMISSIONS, EVICTIONS, PREFETCHES, Rules


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"eviction": "random"}, "eviction=random"),
        ({"admission": "never"}, "admission=never"),
        ({"prefetch": "all"}, "prefetch=all"),
        ({"half_life": 0.0}, "half_life=0.0"),
        ({"half_life": float("nan")}, "half_life=nan"),
        ({"depth": 0}, "depth=0"),
        ({"depth": 256}, "depth=256"),
        ({"load_rise": -0.1}, "load_rise=-0.1"),
        ({"price_scale": float("nan")}, "price_scale=nan"),
        ({"discount": 1.01}, "discount=1.01"),
        ({"slope": -0.5}, "slope=-0.5"),
        ({"intercept": float("inf")}, "intercept=inf"),
        ({"prefetch": "top"}, "width=0"),
        ({"prefetch": "cumulative", "mass": 1.2}, "mass=1.2"),
        ({"low_bytes": -1}, "low_bytes=-1"),
        ({"low_bytes": 10, "prefetch": "top", "width": 1}, "prefetch=priced"),
        ({"eviction": "static"}, "weights_LE"),
        ({"prefetch": "threshold"}, "thresholds_L"),
        ({"prefetch": "threshold", "thresholds_L": [[0.5]]}, "shape (1, 1)"),
        ({"prefetch": "threshold", "thresholds_L": [0.5, 1.5]}, "0 to 1"),
        ({"eviction": "static", "weights_LE": [[np.nan]]}, "finite"),
    ],
)
def test_nonsense_is_refused_in_one_sentence_with_its_value(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Rules(**values)
    assert says in str(refused.value)
    assert str(refused.value).count(". ") == 0


def test_rules_cannot_be_changed() -> None:
    rules = Rules(eviction="static", weights_LE=[[1, 2], [3, 4]])  # type: ignore[arg-type]
    with pytest.raises(FrozenInstanceError):
        rules.depth = 2  # type: ignore[misc]
    assert rules.weights_LE is not None
    assert rules.weights_LE.dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        rules.weights_LE[0, 0] = 5


def test_the_caller_keeps_an_array_of_its_own() -> None:
    weights = np.ones((2, 2))
    rules = Rules(eviction="static", weights_LE=weights)
    weights[:] = 7
    assert rules.weights_LE is not None
    assert (rules.weights_LE == 1).all()


@given(
    eviction=st.sampled_from([e for e in EVICTIONS if e != "static"]),
    admission=st.sampled_from(ADMISSIONS),
    prefetch=st.sampled_from(PREFETCHES),
    depth=st.integers(1, 255),
    half_life=st.floats(0.1, 1e6),
    thresholds=st.lists(st.floats(0, 1), min_size=1, max_size=4),
)
def test_plain_values_give_the_same_rules_again(
    eviction: str, admission: str, prefetch: str, depth: int, half_life: float, thresholds: list[float]
) -> None:
    rules = Rules(
        eviction=eviction,
        admission=admission,
        prefetch=prefetch,
        depth=depth,
        half_life=half_life,
        width=2,
        mass=0.5,
        thresholds_L=thresholds,  # type: ignore[arg-type]
    )
    again = Rules.from_plain(json.loads(json.dumps(rules.plain())))
    assert again.plain() == rules.plain()


def test_unknown_plain_fields_are_refused() -> None:
    with pytest.raises(ConfigError, match="speed are no rules"):
        Rules.from_plain({"eviction": "lru", "speed": 3})


def test_what_makes_use_of_forecasts() -> None:
    assert not Rules(eviction="belady").foresees
    assert Rules(eviction="priced").foresees
    assert Rules(prefetch="top", width=1).foresees
