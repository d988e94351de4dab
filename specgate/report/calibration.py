"""benchmark.py mode=calibration: how honest are the probabilities, in domain and on other text?

For each checkpoint on its trace: every calibrator fitted on the validation documents and scored on the locked
test documents; conformal sets; confidence decay; a drift monitor; and, with ``shift``, the same predictor and
calibrator on other text of the same host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from specgate.calibration.baseline import TokenStream, false_alarms, fit_baseline, watch
from specgate.calibration.conformal import ConformalSets
from specgate.calibration.coverage import BudgetCheck, CoverageByDocument
from specgate.calibration.decay import confidence_decay
from specgate.calibration.fit import CalibratorFitter, fit_conformal, forecast_stream
from specgate.calibration.load import check_compatible, find_checkpoint, load_predictor
from specgate.calibration.monitor import (
    DriftBaseline,
    DriftSettings,
    drift_groups,
    score_names,
    token_scores,
)
from specgate.errors import CheckpointError, ConfigError
from specgate.metrics.classwise import DetailedCalibration
from specgate.predictors.base import LinkCalibrator, Predictor
from specgate.report.accuracy import assign, labels, pick_device
from specgate.report.evaluate import labels_of, open_split
from specgate.report.identity import trace_identity
from specgate.traces.batch import RoutingBatch, targets
from specgate.traces.datamodule import RoutingDataModule

NONE = "none"
CALIBRATORS = (NONE, "temperature", "vector", "isotonic")
CELLS = {"temperature": 200_000, "vector": 100_000, "isotonic": 1_000_000}


@dataclass
class CalibrationSettings:
    """What to look at.

    Attributes:
        checkpoints: ``.ckpt`` files or directories of runs.
        calibrators: which to compare; ``none`` is the bare link.
        main: the one that conformal sets, decay, the monitor and shifted text are about.
        cells: by calibrator, bound of the sample that it is fitted on, see :meth:`Calibrator.fit`.
        levels: nominal coverages to check.
        budget_experts: byte budgets to check, in experts per target layer.
        match: see ``specgate.report.accuracy.AccuracySettings``.
        split: ``test`` (locked) or ``validation``. Then calibrators, sets and monitor are fitted on the same
            documents that they are scored on, so that only mistakes show, not how good they are.
        bins: calibration bins.
        resamples: of documents, for intervals.
        drift: see :class:`DriftSettings`.
        seed: of samples.
        device: ``auto``, ``cpu``, ``cuda``, ...
    """

    checkpoints: Sequence[str] = ()
    calibrators: Sequence[str] = CALIBRATORS
    main: str = "temperature"
    cells: Mapping[str, int] = field(default_factory=lambda: dict(CELLS))
    levels: Sequence[float] = (0.8, 0.9, 0.95)
    budget_experts: Sequence[int] = (4, 6, 8, 12)
    match: str = "trained"
    split: str = "test"
    bins: int = 20
    resamples: int = 1000
    drift: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in [*self.calibrators, self.main]:
            if name not in CALIBRATORS:
                raise ConfigError(f"calibrator {name!r} is unknown: choose among {', '.join(CALIBRATORS)}")
        if missing := sorted(set(self.calibrators) - {NONE} - set(self.cells)):
            raise ConfigError(f"cells says nothing of {missing[0]}: add e.g. cells.{missing[0]}=200000")
        if self.main not in self.calibrators:
            raise ConfigError(f"main={self.main} is not among calibrators={list(self.calibrators)}: add it")
        if not self.checkpoints:
            raise ConfigError(
                "mode=calibration judges trained predictors: name them with checkpoints=[RUN,...]"
            )


def examine(
    settings: CalibrationSettings,
    traces: Mapping[str, RoutingDataModule],
    shift: Mapping[str, RoutingDataModule] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Examine every checkpoint on its traces.

    Args:
        traces: data modules by name; each checkpoint meets those it was trained on (or fits).
        shift: data modules of other text, by name; each is taken for the traces of the same host and stack.

    Returns:
        The content of metrics.json: ``rows`` (per predictor, calibrator, kind and horizon), ``fits``,
        ``conformal``, ``budget``, ``decay``, ``shift``, ``drift``, ``traces``.

    Raises:
        CheckpointError: if a checkpoint fits none of the traces, or a shifted trace none of the hosts.
    """
    console, shift = console or Console(quiet=True), dict(shift or {})
    device = torch.device(pick_device(settings.device))
    files = [find_checkpoint(path) for path in settings.checkpoints]
    plan = assign(files, traces, settings.match)
    record: dict[str, Any] = {
        "mode": "calibration",
        "split": settings.split,
        "main": settings.main,
        "checkpoints": [str(file) for file in files],
        "traces": [trace_identity(data, name) for name, data in traces.items()],
        "shifted_traces": [trace_identity(data, name) for name, data in shift.items()],
        **{key: [] for key in ("rows", "fits", "conformal", "budget", "decay", "shift", "drift")},
    }
    met: set[str] = set()
    for trace, data in traces.items():
        others = {name: other for name, other in shift.items() if same_host(data, other)}
        met |= set(others)
        mine = [file for file, names in plan.items() if trace in names]
        for file, label in labels(sorted(mine)).items():
            console.print(f"{trace}: {label}", highlight=False)
            found = Examination(settings, load_predictor(file), label, trace, data, device).run(others)
            for key, value in found.items():
                record[key] += value
    if lost := sorted(set(shift) - met):
        raise CheckpointError(
            f"shift={lost[0]} comes from another host or stack than {', '.join(traces)}: add to data= what "
            "its predictor was trained on"
        )
    return record


class Examination:
    """One predictor on one trace, and on other text of the same host."""

    def __init__(
        self,
        settings: CalibrationSettings,
        predictor: Predictor,
        label: str,
        trace: str,
        data: RoutingDataModule,
        device: torch.device,
    ) -> None:
        self.settings, self.label, self.trace, self.data = settings, label, trace, data
        self.predictor, self.device = predictor.to(device).eval(), device
        self.front = labels_of(data, trace, settings.split) | {"predictor": label}
        self.calibrators: dict[str, nn.Module] = {}
        self.group_PH, groups = drift_groups(predictor.kinds.cpu())
        self.groups, self.scores = len(groups), score_names(groups, predictor.top_k)

    def run(self, shifted: Mapping[str, RoutingDataModule]) -> dict[str, list[dict[str, Any]]]:
        """Everything, as lists of plain rows by name."""
        check_compatible(self.predictor, self.data.spec)
        fits = self.fit_calibrators()
        self.predictor.calibrator = self.calibrators[self.settings.main]
        sets = fit_conformal(self.predictor, self.data.val_dataloader(), self.device, self.settings.seed)
        fitted = CoverageByDocument(sets, len(self.data.documents), self.settings.levels)
        stream, _ = self.scan(self.data.val_dataloader(), {}, self.data, fitted)
        baseline = fit_baseline(stream, self.scores, DriftSettings(**self.settings.drift))
        batches = open_split(self.data, self.settings.split)
        look = {name: self.metrics(self.data) for name in self.calibrators}
        coverage = CoverageByDocument(sets, len(self.data.documents), self.settings.levels)
        budget = BudgetCheck(sets, self.settings.budget_experts)
        stream, _ = self.scan(batches, look, self.data, coverage, budget)
        rows = [
            self.front | {"calibrator": name, **self.shape(), "kind": kind, "horizon": horizon, **row}
            for name, metric in look.items()
            for kind, horizons in metric.compute().items()
            for horizon, row in horizons.items()
        ]
        main = [row for row in rows if row["calibrator"] == self.settings.main]
        bare = {(r["kind"], r["horizon"]): r["mean_confidence"] for r in rows if r["calibrator"] == NONE}
        decay = confidence_decay(
            [r | {"mean_confidence_uncalibrated": bare.get((r["kind"], r["horizon"]))} for r in main]
        )
        drift = self.front | {
            "documents": baseline.documents,
            "threshold": round(baseline.threshold, 4),
            "settings": vars(baseline.settings),
            "false_alarms": false_alarms(baseline, stream),
            "in_domain": self.watch_domains(baseline, stream, self.data, main, main),
        }
        return {
            "rows": rows,
            "fits": [self.front | row for row in fits],
            "conformal": [
                self.front | row for row in coverage.rows(self.settings.resamples, self.settings.seed, fitted)
            ],
            "budget": [self.front | row for row in budget.rows()],
            "decay": decay,
            "drift": [drift],
            "shift": [
                row for name, other in shifted.items() for row in self.meet(name, other, baseline, sets, main)
            ],
        }

    def fit_calibrators(self) -> list[dict[str, Any]]:
        """Fit every calibrator on the validation split."""
        report = []
        for name in self.settings.calibrators:
            if name == NONE:
                self.calibrators[name] = LinkCalibrator(self.predictor.top_k)
                continue
            fitter = CalibratorFitter(name, self.settings.cells[name], self.settings.seed)
            report += fitter(self.predictor, self.data.val_dataloader(), self.device)
            self.calibrators[name] = self.predictor.calibrator
        return report

    def meet(
        self,
        name: str,
        other: RoutingDataModule,
        baseline: DriftBaseline,
        sets: ConformalSets,
        main: Sequence[Mapping[str, Any]],
    ) -> list[dict[str, Any]]:
        """One row per shifted domain: errors per kind and horizon, ratio to in-domain, monitor, coverage."""
        check_compatible(self.predictor, other.spec)
        metric = self.metrics(other)
        coverage = CoverageByDocument(sets, len(other.documents), self.settings.levels)
        stream, domain_N = self.scan(
            open_split(other, "test"), {self.settings.main: metric}, other, coverage, None
        )
        rows = [
            {"kind": kind, "horizon": horizon, **row}
            for kind, horizons in metric.compute().items()
            for horizon, row in horizons.items()
        ]
        found = self.watch_domains(baseline, stream, other, rows, main, domain_N)
        overall = [
            {
                key: row[key]
                for key in ("mode", "kind", "horizon", "level", "coverage", "low", "high", "mean_size")
            }
            for row in coverage.rows(self.settings.resamples, self.settings.seed)
        ]
        return [self.front | {"shift": name, "domains": found, "coverage": overall}]

    def watch_domains(
        self,
        baseline: DriftBaseline,
        stream: TokenStream,
        data: RoutingDataModule,
        rows: Sequence[Mapping[str, Any]],
        main: Sequence[Mapping[str, Any]],
        domain_N: Any = None,
    ) -> list[dict[str, Any]]:
        """Per domain: calibration errors against those of the whole in-domain split, and a monitor's report
        on a stream of this domain alone.
        """
        if domain_N is None:
            domain_N = self.domain_N
        usual = {(row["kind"], row["horizon"]): row for row in main}
        found = []
        for g, domain in enumerate(data.domains):
            mine = [row for row in rows if domain in row["per_domain"]]
            if not mine:
                continue
            errors = [
                {
                    "kind": row["kind"],
                    "horizon": row["horizon"],
                    "n": row["per_domain"][domain]["n"],
                    "recall_at_k": row["per_domain"][domain]["recall_at_k"],
                    "ece": row["per_domain"][domain]["ece"],
                    "ece_noise": row["per_domain"][domain]["ece_noise"],
                    "ratio": _ratio(
                        row["per_domain"][domain]["ece"], usual[row["kind"], row["horizon"]]["ece"]
                    ),
                }
                for row in mine
            ]
            weights = np.array([row["per_domain"][domain]["n"] for row in mine], dtype=np.float64)
            here = float(np.average([row["ece"] for row in errors], weights=weights))
            there = float(
                np.average([usual[row["kind"], row["horizon"]]["ece"] for row in errors], weights=weights)
            )
            noise = float(np.average([row["ece_noise"] for row in errors], weights=weights))
            found.append(
                {
                    "domain": domain,
                    "ece": round(here, 6),
                    "ece_noise": round(noise, 6),
                    "ratio": _ratio(here, there),
                    "errors": errors,
                    "monitor": watch(baseline, stream.select(domain_N == g).by_document()).report(),
                }
            )
        return found

    def scan(
        self,
        batches: Iterable[RoutingBatch],
        look: Mapping[str, DetailedCalibration],
        data: RoutingDataModule,
        coverage: CoverageByDocument | None = None,
        budget: BudgetCheck | None = None,
    ) -> tuple[TokenStream, Any]:
        """One pass over a split: update metrics and coverage; returns what the monitor sees, and each token's
        domain.
        """
        parts, domains = [], []
        predictor, main = self.predictor, self.settings.main
        for batch, logits_BTPHE in forecast_stream(predictor, batches, self.device):
            experts_BTPHK, valid_BTPH = targets(batch, predictor.lookahead)
            kinds = predictor.kinds
            p_BTPHE = logits_BTPHE
            for name, metric in look.items():
                if metric.device != logits_BTPHE.device:
                    metric.to(logits_BTPHE.device)
                p = self.calibrators[name](logits_BTPHE.float(), kinds)
                p_BTPHE = p if name == main else p_BTPHE
                metric.update(p, experts_BTPHK, valid_BTPH, kinds, batch.domain_B)
            if main not in look:
                p_BTPHE = self.calibrators[main](logits_BTPHE.float(), kinds)
            if coverage is not None:
                coverage.update(p_BTPHE, experts_BTPHK, valid_BTPH, kinds, batch.document_B, batch.domain_B)
            if budget is not None:
                budget.update(p_BTPHE, experts_BTPHK, valid_BTPH, kinds)
            part, domain_N = self.scored(p_BTPHE, experts_BTPHK, valid_BTPH, batch)
            parts.append(part)
            domains.append(domain_N)
        self.domain_N = np.concatenate(domains)
        return TokenStream.join(parts), self.domain_N

    def scored(
        self, p_BTPHE: Tensor, experts_BTPHK: Tensor, valid_BTPH: Tensor, batch: RoutingBatch
    ) -> tuple[tuple[Any, Any], Any]:
        """What the monitor sees of a batch: scores and documents, token by token; and the domains."""
        b_M, t_M, p_M, h_M = valid_BTPH.nonzero().unbind(1)
        seen_BT = valid_BTPH.flatten(2).any(-1)
        number_BT = (seen_BT.flatten().cumsum(0) - 1).view_as(seen_BT)
        group_M = self.group_PH.to(p_M.device)[p_M, h_M]
        score_NF = token_scores(
            p_BTPHE[valid_BTPH],
            experts_BTPHK[valid_BTPH],
            group_M,
            number_BT[b_M, t_M],
            int(seen_BT.sum()),
            self.groups,
        )
        b_N = seen_BT.nonzero()[:, 0]
        document_N = batch.document_B[b_N].cpu().numpy()
        return (score_NF, document_N), batch.domain_B[b_N].cpu().numpy()

    def metrics(self, data: RoutingDataModule) -> DetailedCalibration:
        p = self.predictor
        return DetailedCalibration(
            p.layers, p.experts, p.top_k, p.lookahead, data.domains, self.settings.bins
        )

    def shape(self) -> dict[str, Any]:
        p = self.predictor
        return {"learned": p.learned, "layers": p.layers, "experts": p.experts, "top_k": p.top_k}


def same_host(data: RoutingDataModule, other: RoutingDataModule) -> bool:
    """Whether two traces come from the same model, stack and phase."""

    def host(module: RoutingDataModule) -> set[tuple[str, str, str, str]]:
        return {(r.header.model_id, r.header.revision, module.stack, module.phase) for r in module.readers}

    return host(data) == host(other)


def _ratio(error: float, usual: float) -> float | None:
    return round(error / usual, 3) if usual > 0 else None
