"""The model of reuse fitted while a model runs: from the experts that its own last steps used.

:mod:`specgate.policy.reuse` has the model and fits it to training documents. Where there are none at
hand, the steps that have just been decoded stand for those to come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from specgate.errors import ConfigError
from specgate.policy.reuse import Reuse, fit_reuse
from specgate.policy.workload import Workload

FIRST = 32
"""Steps before the first fit; the next ones are made when there are four times as many."""
LAST = 512
"""Steps that are looked at, and after which nothing is fitted any more."""
TRIED = (4.0, 8.0, 11.0, 16.0, 32.0, 64.0)
"""Half-lives, in steps."""
START = Reuse(half_life=11.0, intercept=-0.04, slope=0.93, discount=1.0, nll=0.0)
"""Before the first fit: gpt-oss-20b's validation documents, with slots for a quarter of the experts."""


class ReuseCounter:
    """Told of every event, says every now and then how likely experts are used again.

    A step counts if it ran every layer once, in order, and if none of its events used more than half of a
    layer's experts: prompts use nearly all of them and say nothing of the tokens that follow.

    Args:
        layers, experts, top_k: of the model.
        slots: of the device, in all.
        tell: called with each new fit.

    Attributes:
        steps: that counted so far.
    """

    def __init__(
        self, layers: int, experts: int, top_k: int, slots: int, tell: Callable[[Reuse], None]
    ) -> None:
        self.steps = 0
        self._layers, self._experts, self._top_k, self._slots = layers, experts, top_k, slots
        self._tell, self._next = tell, FIRST
        self._events: list[Sequence[int]] = []
        self._step: list[Sequence[int]] = []

    def __call__(self, layer: int, experts: Sequence[int]) -> None:
        """An event: the experts in ascending order."""
        if self._next > LAST:
            return
        step = self._step
        if layer == 0:
            step.clear()
        if layer != len(step) or 2 * len(experts) > self._experts:
            step.clear()
            return
        step.append(experts)
        if len(step) < self._layers:
            return
        self._events += step
        step.clear()
        self.steps += 1
        if self.steps >= self._next:
            self._next *= 4
            self._fit()

    def _fit(self) -> None:
        ends_N = np.cumsum([0, *map(len, self._events)], dtype=np.int64)
        expert_M = np.fromiter((e for event in self._events for e in event), dtype=np.int32)
        done = Workload(
            layers=self._layers,
            experts=self._experts,
            top_k=self._top_k,
            event_start_N1=ends_N,
            expert_M=expert_M,
            tokens_M=np.ones_like(expert_M),
            document_S=np.zeros(self.steps, dtype=np.int32),
        )
        try:
            self._tell(fit_reuse(done, self._slots, half_lives=TRIED))
        except (ConfigError, np.linalg.LinAlgError):
            return  # too little was used again to say anything; what was known before stays
