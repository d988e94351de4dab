"""Rows and records that look like a real run's, made by the real evaluation on small random batches."""

from __future__ import annotations

from functools import cache
from typing import Any

from specgate.calibration.fit import TemperatureFitter
from specgate.predictors.base import Predictor
from specgate.report.evaluate import Oracle, evaluate
from specgate.report.identity import expert_load
from specgate.traces.batch import StackSpec
from tests.predictors.support import EXPERTS, LAYERS, VOCAB, fitted, make_batch

DOMAINS = ("prose", "code")


def spec_of(phase: str, K: int) -> StackSpec:
    return StackSpec(LAYERS, EXPERTS, K, None, VOCAB, phase)


def oracle(phase: str = "decode", K: int = 2) -> Oracle:
    return Oracle(
        layers=LAYERS, experts=EXPERTS, top_k=K, vocab_size=VOCAB, phase=phase, hidden_size=None, lookahead=3
    )


def batches(phase: str, K: int, seed: int) -> list[Any]:
    made = [make_batch(phase, K=K, B=4, T=10, hidden=False, seed=seed + i) for i in range(2)]
    for batch in made:
        batch.domain_B[::2] = 1
    return made


def rows_of(predictor: Predictor, trace: str, phase: str, K: int, seed: int = 50) -> list[dict[str, Any]]:
    labels = {
        "trace": trace,
        "model": "tests/random",
        "stack": "decoder",
        "phase": phase,
        "split": "test",
        "predictor": predictor.name,
    }
    return evaluate(predictor, batches(phase, K, seed), labels=labels, domains=DOMAINS, progress=False)


@cache
def record() -> dict[str, Any]:
    """A record of two traces (decode with K = 2, prefill with K = 1), four predictors each."""
    rows: list[dict[str, Any]] = []
    traces, load = [], {}
    for trace, phase, K in (("alpha", "decode", 2), ("beta/decoder/prefill", "prefill", 1)):
        for name in ("popularity", "previous_token", "mlp"):
            predictor = fitted(name, phase, K=K, hidden=False)
            TemperatureFitter(cells=3000)(predictor, batches(phase, K, 0))
            rows += rows_of(predictor, trace, phase, K)
        rows += rows_of(oracle(phase, K), trace, phase, K)
        load[trace] = expert_load(spec_of(phase, K), batches(phase, K, 50))
        traces.append(
            {
                "name": trace,
                "model": ["tests/random"],
                "stack": "decoder",
                "phase": phase,
                "layers": LAYERS,
                "experts": EXPERTS,
                "top_k": K,
                "domains": list(DOMAINS),
                "tokens": {"train": 1000, "validation": 100, "test": 80},
                "documents": {"train": 10, "validation": 2, "test": 2},
                "sha256": ["ab" * 32],
            }
        )
    return {
        "schema_version": 1,
        "entry": "benchmark.py",
        "mode": "accuracy",
        "command": "python benchmark.py mode=accuracy",
        "started": "2026-01-01T00:00:00+00:00",
        "wall_seconds": 12.0,
        "git": {"commit": "c" * 40, "dirty": False},
        "hardware": {"cpu": "Test CPU", "cores": 2, "memory_gb": 8, "gpus": []},
        "versions": {"python": "3.11", "torch": "2.13"},
        "config": {"paths": "/secret/place"},
        "split": "test",
        "traces": traces,
        "rows": rows,
        "load": load,
        "skipped": [
            {"trace": "alpha", "predictor": "router_lookahead", "reason": "the trace has no hidden states"}
        ],
    }
