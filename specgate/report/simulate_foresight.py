"""Who foresees what in mode=simulate: the predictors that policies ask for, as far as a trace allows them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from specgate.calibration.load import find_checkpoint, load_predictor
from specgate.calibration.registry import make_calibrator
from specgate.policy.base import Policy
from specgate.policy.workload import Workload
from specgate.predictors import predictor_class
from specgate.predictors.base import Predictor
from specgate.runtime.trust import trusted
from specgate.traces.datamodule import RoutingDataModule

#: Foresight that needs neither a predictor nor the trace's hidden states.
FREE = ("none", "oracle", "eam")


def foresight_of(policy: Policy) -> str:
    """Whose forecasts a policy is given: its source, and ``uncalibrated`` for a predictor's raw ones."""
    if policy.forecast_source == "predictor" and not policy.calibrated:
        return "uncalibrated"
    return policy.forecast_source


@dataclass
class Foresight:
    """Predictors by the name of the foresight.

    Attributes:
        name: of the checkpoint's predictor. lookahead: its horizons. digest: SHA-256 of its file.
    """

    predictors: dict[str, Predictor] = field(default_factory=dict)
    name: str | None = None
    lookahead: int | None = None
    digest: str | None = None

    def missing(self, policy: Policy) -> str | None:
        """Why the policy cannot run here; None if it can."""
        wants = foresight_of(policy)
        if wants in FREE or wants in self.predictors:
            return None
        if wants == "next_gate":
            return "the trace has no hidden states or routers"
        return "no predictor is named (checkpoints=[...])"


def foresight_for(
    policies: Iterable[Policy], checkpoints: Sequence[str], data: RoutingDataModule
) -> Foresight:
    """What the policies ask for and this trace allows.

    Raises:
        CheckpointError: a checkpoint that cannot be read.
    """
    policies, out = list(policies), Foresight()
    wants = {foresight_of(policy) for policy in policies}
    if checkpoints and wants & {"predictor", "uncalibrated"}:
        file = find_checkpoint(checkpoints[0])
        predictor = load_predictor(file)
        out.name, out.lookahead = predictor.name, predictor.lookahead
        out.digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if "predictor" in wants:
            out.predictors["predictor"] = predictor
        if "uncalibrated" in wants:
            raw = deepcopy(predictor)
            raw.calibrator = make_calibrator("temperature", raw)  # not fitted: temperature 1
            out.predictors["uncalibrated"] = raw
    spec = data.spec
    routers = data.routers if "next_gate" in wants and spec.hidden_size is not None else None
    if routers is not None:
        depth = max(p.horizons for p in policies if p.forecast_source == "next_gate")
        options: dict[str, Any] = {**vars(spec), "lookahead": depth, "routers": routers}
        gate = predictor_class("router_lookahead")(**options)
        gate.calibrator = make_calibrator("temperature", gate)
        out.predictors["next_gate"] = gate
    return out


class Views:
    """The documents as policies see them, one by one; what several policies see is kept once.

    Args:
        documents: by part of the split (``before`` those that are scored, ``scored``) and foresight.
        lookahead: of the predictor, if there is one.
    """

    def __init__(self, documents: Mapping[str, Mapping[str, list[Workload]]], lookahead: int | None) -> None:
        self._documents, self._lookahead = documents, lookahead
        self._kept: dict[tuple[object, ...], list[Workload]] = {}

    def of(self, policy: Policy, fit: Workload, part: str) -> list[Workload]:
        """A part's documents with what the policy foresees.

        Where it learns how far to trust that, it does so on the documents before the scored ones, and on
        these as they come, one sequence at a time.
        """
        wants, horizons = foresight_of(policy), policy.horizons
        if wants in ("predictor", "uncalibrated") and self._lookahead is not None:
            horizons = min(horizons, self._lookahead)
        key = (wants, horizons, policy.name + repr(vars(policy)) if wants in ("eam", "oracle") else "")
        if not policy.trust:
            return self._keep((part, *key), lambda: self._plain(policy, fit, part))

        def believed() -> list[Workload]:
            before = self._plain(policy, fit, "before") if part == "scored" else []
            return trusted([*before, *self._plain(policy, fit, part)])[len(before) :]

        return self._keep((part, *key, "trust"), believed)

    def _keep(self, key: tuple[object, ...], make: Callable[[], list[Workload]]) -> list[Workload]:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def _plain(self, policy: Policy, fit: Workload, part: str) -> list[Workload]:
        pool, wants = self._documents[part], foresight_of(policy)
        return [d.with_forecasts(policy.foresee(fit, d)) for d in pool[wants if wants in pool else "none"]]
