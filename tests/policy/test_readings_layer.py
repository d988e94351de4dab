"""Readings of what a layer costs the host: the operations are those counted, and what follows from them."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from specgate.policy import readings_layer
from specgate.policy.operations import operations_of
from specgate.policy.readings_layer import (
    DENSE_OPERATIONS,
    EXPERT_OPERATIONS,
    SmallLayer,
    read_gathered,
    read_host,
)

CPU = torch.device("cpu")


def test_the_operations_of_a_small_layer_are_those_that_are_counted() -> None:
    layer = SmallLayer(CPU)
    with torch.inference_mode():
        assert operations_of(layer.dense) == DENSE_OPERATIONS
        assert operations_of(layer.experts) == EXPERT_OPERATIONS


def test_what_is_read_back_and_sent_over_is_as_long_as_a_token_s_experts() -> None:
    layer = SmallLayer(CPU)
    assert layer.send(layer.read_back()).shape == (1, 4)


def test_a_slow_read_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(self: SmallLayer) -> list[int]:
        time.sleep(0.004)
        return [0, 1, 2, 3]

    monkeypatch.setattr(SmallLayer, "read_back", slow)
    monkeypatch.setattr(readings_layer, "COPY_MIB", 1)
    monkeypatch.setattr(readings_layer, "ROUND_NS", 5e6)
    found = read_host(CPU, 3)
    assert 3e6 < found["readback"]["ns"] < 8e6
    assert found["upload"]["ns"] < 2e6
    assert found["synchronous"]["ns"] > found["layer"]["ns"] + 3e6
    assert found["operation"]["ns"] == pytest.approx(found["layer"]["ns"] / 23, abs=0.1)


def test_gathered_experts_are_counted_three_times() -> None:
    found: dict[str, Any] = read_gathered(2, 64, 32, 3, CPU)
    assert found["bytes"] == 3 * 2 * (3 * 64 * 32) * 2
    assert found["gb_per_s"] == pytest.approx(found["bytes"] / found["ns"], rel=0.01, abs=1e-4)
    assert found["low"] <= found["ns"] <= found["high"]
