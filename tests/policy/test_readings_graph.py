"""What is made of the readings of a layer as graphs; on a GPU that they can be taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specgate.policy.readings_graph import OPERATIONS, PARTS, fields_of, medians, read_graphs


def readings(**ns: float) -> dict[str, Any]:
    usual = {"write": 20e3, "experts": 10e3, "dense": 8e3, "answer": 90e3, "node": 2e3, "gap": 1e3} | ns
    return {name: {"ns": v, "low": v, "high": v} for name, v in usual.items()}


def test_parts_lie_between_the_times_of_a_step() -> None:
    steps = [(0, 1, 3, 6, 10), (100, 105, 106, 110, 111), (200, 202, 204, 208, 213)]
    assert medians(steps) == {"write": 2, "experts": 2, "dense": 4, "answer": 4, "layer": 11}
    assert list(medians(steps)) == [*PARTS, "layer"]


def test_an_answer_is_less_what_the_device_still_had_to_do() -> None:
    found = fields_of(readings())
    assert found["graph_us"] == 9
    assert (found["write_us"], found["node_us"]) == (20, 2)
    assert found["answer_us"] == pytest.approx(90 - (2 * OPERATIONS + 2 * 1 - 8))
    assert fields_of(readings(answer=1e3))["answer_us"] == 0, "never negative"
    assert fields_of(readings(dense=1e6))["answer_us"] == 90, "the device was done by then"


def test_a_processor_has_no_graphs() -> None:
    assert read_graphs(torch.device("cpu"), 3) is None
    assert fields_of(None) == {}


@pytest.mark.gpu
def test_graphs_cost_the_host_less_than_their_operations() -> None:
    from specgate.policy.readings_layer import read_host

    device = torch.device("cuda")
    found, host = read_graphs(device, 3), read_host(device, 3)
    assert found is not None
    assert found["experts"]["ns"] + found["dense"]["ns"] < host["layer"]["ns"]
    assert 100 < found["node"]["ns"] < 20e3
    assert found["gap"]["ns"] < 50e3
    assert set(fields_of(found)) == {"graph_us", "node_us", "gap_us", "write_us", "answer_us"}
