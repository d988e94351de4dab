"""How far forecasts may be trusted: their probabilities corrected by what happened before (csrc/trust.h).

A store with ``StoreSettings.trust`` does this while it runs. Here it is done for a workload: what was learned
up to a point depends on the calls alone, not on what lies where, so a simulation can be given the result.

Letters: L MoE layers, E experts of a layer, M forecasts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from specgate.errors import ConfigError
from specgate.policy.workload import Workload
from specgate.runtime.native import require


def trusted(workloads: Sequence[Workload]) -> list[Workload]:
    """The workloads, read one after the other, with each forecast as a store would believe it.

    A horizon's forecasts are sorted by what they are believed.

    Args:
        workloads: of one model, each with forecasts.

    Raises:
        ConfigError: a workload without forecasts, or of another model.
        StoreError: there is no native core.
    """
    found: list[Workload] = []
    learner: Any = None
    for workload in workloads:
        forecasts = workload.forecasts
        if forecasts is None:
            raise ConfigError("A workload without forecasts has nothing to trust; leave trust=true out.")
        if learner is None:
            learner = require().Trust(workload.layers, workload.experts)
        elif (workload.layers, workload.experts) != (workloads[0].layers, workloads[0].experts):
            raise ConfigError(
                f"A workload of {workload.layers} layers of {workload.experts} experts is another model's; "
                "give those of one model."
            )
        p_M, expert_M = np.empty_like(forecasts.p_M), np.empty_like(forecasts.expert_M)
        arrays = (workload.document_S, workload.event_start_N1, workload.expert_M, forecasts.start_P1)
        learner.read(*arrays, forecasts.horizon_M, forecasts.expert_M, forecasts.p_M, expert_M, p_M)
        found.append(workload.with_forecasts(replace(forecasts, expert_M=expert_M, p_M=p_M)))
    return found
