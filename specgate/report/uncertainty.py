"""benchmark.py mode=uncertainty: what an ensemble gains on its members, and what its doubt is worth: does it
rise on text of another kind, and does it find the forecasts that miss?

Letters: M members, B sequences (windows), T tokens, P source points, H horizons, E experts per layer, K
experts per token, N events (one forecast each: a token, a point, a horizon), G domains.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from specgate.calibration.base import Calibrator
from specgate.calibration.ensemble import fit_stacking, load_members, member_files
from specgate.calibration.fit import MAX_LOGITS, TemperatureFitter
from specgate.calibration.load import check_compatible
from specgate.errors import ConfigError
from specgate.metrics.functional import calibration_bins, calibration_error, event_scores
from specgate.metrics.uncertainty import PARTS, auroc, decompose
from specgate.predictors.base import batch_chunks
from specgate.predictors.ensemble import Ensemble
from specgate.report.accuracy import pick_device
from specgate.report.evaluate import labels_of, open_split
from specgate.report.identity import trace_identity
from specgate.traces.batch import KINDS, RoutingBatch, targets
from specgate.traces.datamodule import RoutingDataModule

SCORED = ("n", "recall_at_k", "exact_set", "nll", "brier", "mean_confidence")
LEVELS = ("token", "sequence")
BINS = 40
TOGETHER = "ensemble"


@dataclass
class UncertaintySettings:
    """What to measure.

    Attributes:
        checkpoints: one ensemble, or the members to make one of (see ``member_files``).
        combine: how members are combined; an ensemble brings its own.
        split: of the trace in domain; ``test`` (locked) or ``validation``. Of the others, always test.
        device: ``auto``, ``cpu``, ``cuda``, ...
        progress: show progress bars.
    """

    checkpoints: Sequence[str] = ()
    combine: str = "mean"
    split: str = "test"
    device: str = "auto"
    progress: bool = True

    def __post_init__(self) -> None:
        if self.split not in ("test", "validation"):
            raise ConfigError(f"split={self.split!r} is unknown: choose test or validation")
        if not self.checkpoints:
            raise ConfigError(
                "mode=uncertainty needs an ensemble or its members: give checkpoints=[RUN] or [RUN,RUN,...]"
            )


def measure_uncertainty(
    settings: UncertaintySettings,
    traces: Mapping[str, RoutingDataModule],
    fitter: Any = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Score an ensemble and its members on the first trace and, as shifted ones, on all others.

    Args:
        traces: data modules by the name they get in tables. The first is the domain that the members were
            trained on; an ensemble that is made here is calibrated on its validation split.
        fitter: calibrates an ensemble that is made here; default :class:`TemperatureFitter`.

    Returns:
        The content of metrics.json: ``rows`` (uncertainty by trace, text domain, kind and horizon),
        ``scores`` (of the ensemble and each member), ``errors`` and ``shift`` (areas under the ROC curve),
        ``histograms``, ``calibration``, ``traces``, ``ensemble``.

    Raises:
        CheckpointError: if a checkpoint cannot be loaded or does not fit a trace.
    """
    console, fitter = console or Console(quiet=True), fitter or TemperatureFitter()
    device = torch.device(pick_device(settings.device))
    home = next(iter(traces))
    ensemble, fitted = make_ensemble(settings, traces[home], fitter, device)
    found: dict[str, Found] = {}
    content: dict[str, Any] = {name: [] for name in ("rows", "scores", "errors", "shift", "traces")}
    for name, data in traces.items():
        check_compatible(ensemble, data.spec)
        console.print(f"{name}: {'the domain trained on' if name == home else 'shifted'}", highlight=False)
        split = settings.split if name == home else "test"
        batches = open_split(data, split)
        quiet = not (settings.progress and sys.stdout.isatty())
        found[name] = Found(ensemble, len(data.domains))
        for batch in track(batches, description=name, transient=True, disable=quiet, console=console):
            found[name].add(batch.to(device))
        front = {**labels_of(data, name, split), "shifted": name != home}
        front |= {"experts": ensemble.experts, "top_k": ensemble.top_k, "learned": True}
        content["traces"].append(trace_identity(data, name))
        content["rows"] += [
            {**front, "predictor": TOGETHER, **row} for row in found[name].means(data.domains)
        ]
        content["scores"] += [{**front, **row} for row in found[name].scores()]
        content["errors"] += [{**front, **row} for row in found[name].errors()]
        if name != home:
            pair = shift_rows(found[home], found[name], data.domains)
            content["shift"] += [{"trace": name, "home": home, **row} for row in pair]
    return {
        "mode": "uncertainty",
        "split": settings.split,
        "home": home,
        "ensemble": ensemble.report(),
        "calibration": fitted,
        **content,
        "histograms": histograms(found),
    }


def make_ensemble(
    settings: UncertaintySettings, home: RoutingDataModule, fitter: Any, device: torch.device
) -> tuple[Ensemble, list[dict[str, Any]]]:
    """The ensemble that the checkpoints are or make, and what was fitted for it on ``home``.

    Raises:
        ConfigError: if one checkpoint is named and it is no ensemble.
    """
    members = load_members(member_files(list(settings.checkpoints)))
    if len(members) == 1:
        (alone,) = members.values()
        if not isinstance(alone, Ensemble):
            raise ConfigError(
                f"checkpoints names one {alone.name}, which cannot disagree with itself: name an ensemble or"
                " at least two members"
            )
        ensemble = alone.to(device)
    else:
        ensemble = Ensemble.of(list(members.values()), list(members), settings.combine).to(device)
    check_compatible(ensemble, home.spec)
    fitted: list[dict[str, Any]] = []
    if not isinstance(ensemble.calibrator, Calibrator):
        if ensemble.combine == "stacking" and len(members) > 1:
            fit_stacking(ensemble, home.val_dataloader(), device)
        fitted = fitter(ensemble, home.val_dataloader(), device)
    return ensemble.eval(), fitted


class Found:
    """What one pass over a trace finds, per kind of target q and horizon h0.

    Args:
        domains: number of text domains that ``domain_B`` counts.
    """

    def __init__(self, ensemble: Ensemble, domains: int) -> None:
        self.ensemble, self.domains = ensemble, domains
        H = ensemble.lookahead
        self.names = [*ensemble.labels, TOGETHER]
        shape = (len(self.names), len(KINDS), H)
        self.sums = torch.zeros(*shape, len(SCORED), dtype=torch.float64)
        self.bins = torch.zeros(*shape, 20, 3, dtype=torch.float64)
        self.events: dict[tuple[int, int], list[Tensor]] = {}  # [N, 4]: total, epistemic, doubt, missed
        self.tokens: dict[int, list[Tensor]] = {q: [] for q in KINDS}  # [B * T, H, 4]: parts, events
        self.windows: dict[int, list[Tensor]] = {q: [] for q in KINDS}  # the same summed over T
        self.domain_N: list[Tensor] = []  # of each token
        self.domain_B: list[Tensor] = []

    @torch.no_grad()
    def add(self, batch: RoutingBatch) -> None:
        """Score a batch, in chunks of bounded size."""
        one = self.ensemble
        per_token = (one.layers + 1) * one.lookahead * one.experts * len(self.names)
        for chunk in batch_chunks(batch, max(1, MAX_LOGITS // (batch.valid_BT.shape[1] * per_token))):
            p_MBTPHE = torch.stack(list(one.member_probabilities(chunk)))
            p_BTPHE = one.calibrator(one.combined(p_MBTPHE, one.kinds), one.kinds)
            weight_MPH = one.weights_at(one.kinds).movedim(-1, 0)
            parts = decompose(p_MBTPHE, one.top_k, weight_MPH[:, None, None])
            truth = targets(chunk, one.lookahead)
            self._score(torch.cat([p_MBTPHE, p_BTPHE[None]]), *truth, parts)
            self._doubt(chunk, truth[1], parts)

    def _score(
        self, p_BTPHE: Tensor, experts_BTPHK: Tensor, valid_BTPH: Tensor, parts: Mapping[str, Tensor]
    ) -> None:
        """Add scores of members and ensemble (first axis), and the ensemble's events."""
        for q, h0, there_P in self._places():
            place_BTP = valid_BTPH[..., h0] & there_P
            if not bool(place_BTP.any()):
                continue
            used_NK = experts_BTPHK[..., h0, :][place_BTP]
            group_N = torch.zeros(len(used_NK), dtype=torch.int64, device=used_NK.device)
            for m, p in enumerate(p_BTPHE):
                p_NE = p[..., h0, :][place_BTP].clamp(max=1.0)
                scores_NJ = event_scores(p_NE, used_NK, SCORED)
                self.sums[m, q, h0] += scores_NJ.sum(0).cpu()
                self.bins[m, q, h0] += calibration_bins(p_NE, used_NK, group_N, 1, 20)[0].cpu()
            doubt_N = 1 - scores_NJ[:, SCORED.index("mean_confidence")]  # of the last, the ensemble
            missed_N = 1 - scores_NJ[:, SCORED.index("exact_set")]
            columns = [parts[part][..., h0][place_BTP] for part in ("total", "epistemic")]
            event_N4 = torch.stack([*columns, doubt_N.float(), missed_N.float()], dim=-1)
            self.events.setdefault((q, h0), []).append(event_N4.float().cpu())

    def _doubt(self, batch: RoutingBatch, valid_BTPH: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Sums over the points of each token, by kind."""
        for q in KINDS:
            there_BTPH = valid_BTPH & (self.ensemble.kinds == q)
            sums = [(parts[part] * there_BTPH).sum(2) for part in PARTS]
            sum_BTH4 = torch.stack([*sums, there_BTPH.sum(2)], dim=-1).float()
            self.tokens[q].append(sum_BTH4[batch.mask_BT].cpu())
            self.windows[q].append(sum_BTH4.sum(1).cpu())
        self.domain_N.append(batch.domain_B[:, None].expand_as(batch.mask_BT)[batch.mask_BT].cpu())
        self.domain_B.append(batch.domain_B.cpu())

    def _places(self) -> Iterator[tuple[int, int, Tensor]]:
        for q in KINDS:
            for h0 in range(self.ensemble.lookahead):
                there_P = self.ensemble.kinds[:, h0] == q
                if bool(there_P.any()):
                    yield q, h0, there_P

    # ------------------------------------------------------------------ results

    def scores(self) -> list[dict[str, Any]]:
        """Every member's and the ensemble's scores."""
        rows = []
        for q, h0, _ in self._places():
            for m, name in enumerate(self.names):
                n, *others = self.sums[m, q, h0].tolist()
                if n:
                    row = {"predictor": name, "kind": KINDS[q], "horizon": h0 + 1, "n": int(n)}
                    row |= {k: round(v / n, 6) for k, v in zip(SCORED[1:], others, strict=True)}
                    rows.append(row | {"ece": round(float(calibration_error(self.bins[m, q, h0])), 6)})
        return rows

    def errors(self) -> list[dict[str, Any]]:
        """How well doubt finds the forecasts whose K most probable experts are not the K used."""
        rows = []
        for (q, h0), parts in sorted(self.events.items()):
            total_N, epistemic_N, doubt_N, missed_N = torch.cat(parts).unbind(-1)
            by = {"total": total_N, "epistemic": epistemic_N, "low_confidence": doubt_N}
            rows.append(
                {"kind": KINDS[q], "horizon": h0 + 1, "n": len(missed_N)}
                | {"missed": round(float(missed_N.mean()), 6)}
                | {f"auroc_{name}": _plain(auroc(score_N, missed_N > 0.5)) for name, score_N in by.items()}
            )
        return rows

    def means(self, domains: Sequence[str]) -> list[dict[str, Any]]:
        """Mean uncertainty per event, of all text and of each domain."""
        rows, domain_B = [], torch.cat(self.domain_B)
        for q, h0, _ in self._places():
            sum_B4 = torch.cat(self.windows[q])[:, h0].double()
            for g, domain in [(None, "all"), *enumerate(domains)]:
                mine_4 = (sum_B4 if g is None else sum_B4[domain_B == g]).sum(0)
                if (events := int(mine_4[3])) == 0:
                    continue
                row = {"domain": domain, "kind": KINDS[q], "horizon": h0 + 1, "n": events}
                values = (mine_4[:3] / events).tolist()
                rows.append(row | {k: round(v, 6) for k, v in zip(PARTS, values, strict=True)})
        return rows

    def per(self, level: str, q: int, h0: int) -> tuple[dict[str, Tensor], Tensor]:
        """Mean uncertainty of every token or sequence that has events of a kind and horizon, and its
        domain."""
        held, place = (self.tokens, self.domain_N) if level == "token" else (self.windows, self.domain_B)
        sum_N4 = torch.cat(held[q])[:, h0]
        some_N = sum_N4[:, 3] > 0
        mean_N3 = sum_N4[some_N, :3] / sum_N4[some_N, 3:]
        return dict(zip(PARTS, mean_N3.unbind(-1), strict=True)), torch.cat(place)[some_N]


def shift_rows(home: Found, away: Found, domains: Sequence[str]) -> list[dict[str, Any]]:
    """Areas under the ROC curve of telling shifted text from text in domain, by each part of uncertainty; all
    shifted text, and each of its domains, against all text in domain."""
    rows = []
    for level in LEVELS:
        for q, h0, _ in home._places():
            inside, _ = home.per(level, q, h0)
            outside, domain_N = away.per(level, q, h0)
            for g, domain in [(None, "all"), *enumerate(domains)]:
                mine_N = torch.ones_like(domain_N, dtype=torch.bool) if g is None else domain_N == g
                n_in, n_out = len(inside["total"]), int(mine_N.sum())
                if not n_in or not n_out:
                    continue
                shifted_N = torch.arange(n_in + n_out) >= n_in
                row = {"level": level, "domain": domain, "kind": KINDS[q], "horizon": h0 + 1}
                row |= {"n_home": n_in, "n_shifted": n_out}
                for part in PARTS:
                    score_N = torch.cat([inside[part], outside[part][mine_N]])
                    row[f"auroc_{part}"] = _plain(auroc(score_N, shifted_N))
                rows.append(row)
    return rows


def histograms(found: Mapping[str, Found]) -> list[dict[str, Any]]:
    """Share of sequences by their mean epistemic uncertainty, over bins common to all traces."""
    rows = []
    first = next(iter(found.values()))
    for q, h0, _ in first._places():
        values = {name: one.per("sequence", q, h0)[0]["epistemic"] for name, one in found.items()}
        some = [value_N for value_N in values.values() if len(value_N)]
        if not some:
            continue
        top = max(float(value_N.max()) for value_N in some) or 1.0
        for name, value_N in values.items():
            count = torch.histc(value_N.clamp(max=top), BINS, 0.0, top)
            share = (count / max(1, len(value_N))).tolist()
            row = {"trace": name, "kind": KINDS[q], "horizon": h0 + 1, "top": round(top, 6)}
            rows.append(row | {"share": [round(value, 5) for value in share]})
    return rows


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
