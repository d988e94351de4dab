"""Costs: what they refuse, and the times that follow from them."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest

from specgate.errors import ConfigError
from specgate.policy.costs import Costs


def costs(**changed: Any) -> Costs:
    """Costs of three events, with round numbers."""
    values: dict[str, Any] = {
        "expert_bytes": 1_000_000,
        "link_bytes_per_ns": 20.0,
        "link_latency_ns": 5_000.0,
        "link_chunk_bytes": 65_536,
        "file_bytes_per_ns": 4.0,
        "file_latency_ns": 80_000.0,
        "event_ns": 100.0,
        "forecast_ns": 3_000.0,
        "pre_ns_N": np.array([900.0, 500.0, 500.0]),
        "exec_ns_N": np.array([200.0, 300.0, 400.0]),
    }
    return Costs(**values | changed)


def test_times_follow_from_bytes_and_speeds() -> None:
    found = costs()
    assert found.copy_ns == 5_000 + 50_000
    assert found.read_ns == 80_000 + 250_000
    assert found.compute_ns == 1_900 + 900 + 3 * 100
    assert found.events == 3


def test_a_part_has_the_times_of_its_events() -> None:
    found = costs().part(1, 3)
    assert found.pre_ns_N.tolist() == [500, 500]
    assert found.exec_ns_N.tolist() == [300, 400]
    assert found.copy_ns == costs().copy_ns


def test_parts_and_scales_are_of_all_arrays() -> None:
    arrays = {
        "launch_ns_N": [50.0, 60.0, 70.0],
        "host_pre_ns_N": [9.0, 8.0, 7.0],
        "host_exec_ns_N": [1.0, 2.0, 3.0],
    }
    full = costs(**arrays, link_slowdown=0.2)
    part, double = full.part(1, 3), full.scaled(2.0)
    for name, values in arrays.items():
        assert getattr(part, name).tolist() == values[1:]
        assert getattr(double, name).tolist() == [2 * v for v in values]
    assert double.pre_ns_N.tolist() == [1800, 1000, 1000]
    assert (double.event_ns, double.forecast_ns, double.copy_ns) == (200, 3_000, full.copy_ns)
    assert part.link_slowdown == double.link_slowdown == 0.2
    assert costs().part(1, 3).launch_ns_N is None


def test_times_become_flat_float64() -> None:
    found = costs(pre_ns_N=[1, 2, 3], exec_ns_N=np.arange(6, dtype=np.float32)[::2])
    assert found.pre_ns_N.dtype == found.exec_ns_N.dtype == np.float64
    assert found.exec_ns_N.flags.c_contiguous
    assert found.exec_ns_N.tolist() == [0, 2, 4]


def test_nothing_can_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        costs().event_ns = 1.0  # type: ignore[misc]
    assert replace(costs(), event_ns=1.0).event_ns == 1.0


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("expert_bytes", 0, "expert_bytes=0 is no number of bytes"),
        ("expert_bytes", 1.5, "expert_bytes=1.5"),
        ("expert_bytes", True, "expert_bytes=True"),
        ("link_chunk_bytes", -1, "link_chunk_bytes=-1"),
        ("forecast_share", 0.0, "forecast_share=0.0 is no share"),
        ("forecast_share", 1.5, "forecast_share=1.5 is no share"),
        ("link_bytes_per_ns", 0.0, "link_bytes_per_ns=0.0 moves nothing"),
        ("link_bytes_per_ns", float("nan"), "link_bytes_per_ns=nan"),
        ("file_bytes_per_ns", float("inf"), "file_bytes_per_ns=inf"),
        ("link_latency_ns", -1.0, "link_latency_ns=-1.0 is no time"),
        ("event_ns", float("inf"), "event_ns=inf"),
        ("forecast_ns", float("nan"), "forecast_ns=nan"),
        ("file_latency_ns", -0.5, "file_latency_ns=-0.5"),
        ("pre_ns_N", np.array([1.0, -2.0, 3.0]), r"pre_ns_N\[1\]=-2.0 is no time"),
        ("exec_ns_N", np.array([1.0, 2.0, np.nan]), r"exec_ns_N\[2\]=nan"),
        ("exec_ns_N", np.zeros((3, 1)), "exec_ns_N has 2 axes"),
        ("exec_ns_N", np.zeros(2), "3 times before events and 2 of events"),
        ("link_slowdown", -0.1, "link_slowdown=-0.1 slows nothing down"),
        ("link_slowdown", float("nan"), "link_slowdown=nan"),
        ("link_slowdown", float("inf"), "link_slowdown=inf"),
        ("host_pre_ns_N", np.array([1.0, -2.0, 3.0]), r"host_pre_ns_N\[1\]=-2.0 is no time"),
        ("host_pre_ns_N", np.array([900.0, 501.0, 0.0]), "host_pre_ns_N is no part of pre_ns_N"),
        ("host_exec_ns_N", np.zeros(2), "host_exec_ns_N is no part of exec_ns_N"),
    ],
)
def test_nonsense_is_refused_in_one_sentence(name: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as raised:
        costs(**{name: value})
    assert str(raised.value).endswith(".")


def test_chunks_of_nothing_mean_that_no_copy_is_stopped() -> None:
    assert costs(link_chunk_bytes=0).link_chunk_bytes == 0
