"""benchmark.py mode=transitions: expert-to-expert transition matrices of traces, and the flows mined from
them.

Letters: N tokens, L MoE layers, H horizons, E experts per layer (a second expert axis is the source's), K
experts per token.

Counted over the training split (the locked test split stays shut). The matrices of each source layer l and
horizon h are written to ``transitions/<trace>.safetensors``: ``count_LHEE`` (int32 tokens that use source and
target), ``trials_LHE`` (int32 tokens that use the source and have such a target), ``p_LHEE`` = P(target used
| source used) (float32; a row sums to K), ``lift_LHEE`` (over the target's popularity), ``popularity_LE``,
``kind_LH`` (int8: 0 the same token, 1 the next token, -1 nothing there) and, of a trace that ranks its
experts, ``first_LEE`` (share of the tokens whose heaviest expert goes from e to f in the next layer). NaN
where there is nothing to divide.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.numpy import save_file

from specgate.errors import ConfigError
from specgate.predictors.markov import Markov
from specgate.report.flows import Array, mine, pair_shares
from specgate.report.identity import trace_identity
from specgate.report.style import slug
from specgate.traces.batch import INVALID, KINDS, RoutingBatch, StackSpec
from specgate.traces.datamodule import RoutingDataModule

FOLDER = "transitions"


@dataclass
class FlowSettings:
    """What to count.

    Attributes:
        horizons: MoE layers ahead of the matrices.
        length: consecutive layers of a path (at most as many as the stack has).
        set_length: the same of paths through all K experts of each layer (K > 1); 0 mines none.
        top: paths kept per ranking.
        min_count: tokens that must take a path, or a transition named as strongest.
        max_tokens: of a trace; None takes all.
        split: ``train`` or ``validation``.
    """

    horizons: int = 3
    length: int = 4
    set_length: int = 3
    top: int = 60
    min_count: int = 20
    max_tokens: int | None = 2_000_000
    split: str = "train"

    def __post_init__(self) -> None:
        if self.split not in ("train", "validation"):
            raise ConfigError(f"split={self.split!r} is not for exploring: choose train or validation")
        for name, least in (("horizons", 1), ("length", 2), ("top", 1), ("min_count", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"transitions.{name} is {getattr(self, name)}: choose {least} or more")
        if self.set_length == 1 or self.set_length < 0:
            raise ConfigError(f"transitions.set_length is {self.set_length}: choose 0 (none), or 2 and more")


def explore(
    settings: FlowSettings,
    traces: Mapping[str, RoutingDataModule],
    output: Path,
    console: Console | None = None,
) -> dict[str, Any]:
    """Count every trace, write its matrices below ``output``; returns the content of metrics.json:
    ``traces``, ``transitions`` and ``flows`` by trace, ``skipped``."""
    console = console or Console(quiet=True)
    transitions: dict[str, Any] = {}
    flows: dict[str, Any] = {}
    identities, skipped = [], []
    for name, data in traces.items():
        identities.append(trace_identity(data, name))
        spec, data = data.spec, without_hidden(data)
        console.print(f"{name}: {data.stack}, {data.phase}, {spec.experts} experts", highlight=False)
        loader = data.train_dataloader() if settings.split == "train" else data.val_dataloader()
        chain, experts_NLK = count(loader, spec, settings)
        file = output / FOLDER / f"{slug(name)}.safetensors"
        ranked = spec.top_k == 1 or all(reader.info(data.stack).has_weights for reader in data.readers)
        arrays = matrices(chain)
        if ranked and spec.layers > 1:
            arrays["first_LEE"] = pair_shares(experts_NLK[:, :, :1], spec.experts).astype(np.float32)
        export(arrays, file, {"trace": name, "split": settings.split, "tokens": len(experts_NLK)})
        transitions[name] = {
            "export": f"{FOLDER}/{file.name}",
            "tokens": len(experts_NLK),
            "pairs": summary(arrays, settings.min_count),
        }
        flows[name] = {}
        length = min(settings.length, spec.layers)
        if length < 2:
            skipped.append({"trace": name, "what": "flows", "reason": "the stack has a single MoE layer"})
            continue
        if ranked:
            first = experts_NLK[:, :, :1]
            flows[name]["heaviest"] = mine(first, spec.experts, length, settings.top, settings.min_count)
        else:
            reason = "the trace has no router weights, so no heaviest expert"
            skipped.append({"trace": name, "what": "flows of the heaviest expert", "reason": reason})
        if spec.top_k > 1 and settings.set_length:
            length = min(settings.set_length, spec.layers)
            flows[name]["all"] = mine(experts_NLK, spec.experts, length, settings.top, settings.min_count)
    return {
        "mode": "transitions",
        "split": settings.split,
        "traces": identities,
        "transitions": transitions,
        "flows": flows,
        "skipped": skipped,
    }


def without_hidden(data: RoutingDataModule) -> RoutingDataModule:
    """The same windows without hidden states (most of a trace's bytes) and without context."""
    return RoutingDataModule(
        data.paths,
        stack=data.stack,
        phase=data.phase,
        window=data.window,
        batch_size=64,
        context=0,
        max_sequences=data.max_sequences,
        splits=data.splits,
        use_hidden=False,
        seed=data.seed,
        verify=False,  # whoever opened ``data`` has done that
    )


def count(batches: Iterable[RoutingBatch], spec: StackSpec, settings: FlowSettings) -> tuple[Markov, Array]:
    """Transition counts (those of the ``markov`` predictor) and the experts themselves, ``[N, L, K]``."""
    chain = Markov(**{**vars(spec), "hidden_size": None}, lookahead=min(settings.horizons, 2 * spec.layers))
    kept: list[Array] = []
    seen, kind = 0, np.uint8 if spec.experts <= 256 else np.uint16
    for batch in batches:
        with torch.no_grad():
            chain.count(batch)
        kept.append(batch.experts_BTLK[batch.mask_BT].numpy().astype(kind))
        seen += len(kept[-1])
        if settings.max_tokens is not None and seen >= settings.max_tokens:
            break
    return chain, np.concatenate(kept)


def matrices(chain: Markov) -> dict[str, Array]:
    """The arrays of the export (see the module's docstring)."""
    count_LHEE, trials_LHE = chain.joint_LHEE.double().numpy(), chain.source_LHE.double().numpy()
    popularity_LE = (chain.popularity_LE / chain.tokens_L[:, None]).double().numpy()
    base_LHE = popularity_LE[(chain.columns[1:] % chain.layers).numpy()]
    with np.errstate(divide="ignore", invalid="ignore"):
        p_LHEE = count_LHEE / np.where(trials_LHE > 0, trials_LHE, np.nan)[..., None]
        lift_LHEE = p_LHEE / np.where(base_LHE > 0, base_LHE, np.nan)[:, :, None]
    return {
        "count_LHEE": count_LHEE.astype(np.int32),
        "trials_LHE": trials_LHE.astype(np.int32),
        "p_LHEE": p_LHEE.astype(np.float32),
        "lift_LHEE": lift_LHEE.astype(np.float32),
        "popularity_LE": popularity_LE.astype(np.float32),
        "kind_LH": chain.kinds[1:].numpy().astype(np.int8),
    }


def export(arrays: Mapping[str, Array], file: Path, about: Mapping[str, Any]) -> None:
    """Write arrays as safetensors; the file is visible only when whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    save_file(
        {k: np.ascontiguousarray(v) for k, v in arrays.items()}, temporary, {"specgate": json.dumps(about)}
    )
    temporary.chmod(0o644)
    temporary.replace(file)


def mutual_information(count_EE: Array) -> tuple[float, float]:
    """Mutual information of source and target in bits, drawing one pair of experts (of K x K) at random, and
    the target's entropy."""
    p_EE = count_EE / count_EE.sum()
    source_E1, target_1E = p_EE.sum(1, keepdims=True), p_EE.sum(0, keepdims=True)
    there = p_EE > 0
    bits = (p_EE[there] * np.log2(p_EE[there] / (source_E1 * target_1E)[there])).sum()
    used = target_1E[target_1E > 0]
    return max(0.0, float(bits)), float(-(used * np.log2(used)).sum())


def summary(arrays: Mapping[str, Array], min_count: int) -> list[dict[str, Any]]:
    """A row per source layer and horizon: how much the source tells of the target, and the strongest
    transition (highest lift of those that at least ``min_count`` tokens make)."""
    rows = []
    layers, horizons = arrays["kind_LH"].shape
    for layer, h0 in np.ndindex(layers, horizons):
        kind, count_EE = int(arrays["kind_LH"][layer, h0]), arrays["count_LHEE"][layer, h0]
        if kind == INVALID or not count_EE.any():
            continue
        bits, entropy = mutual_information(count_EE.astype(np.float64))
        row: dict[str, Any] = {
            "source_layer": layer,
            "target_layer": (layer + h0 + 1) % layers,
            "horizon": h0 + 1,
            "kind": KINDS[kind],
            "information_bits": round(bits, 5),
            "target_entropy_bits": round(entropy, 5),
            "information_share": round(bits / entropy, 5) if entropy > 0 else 0.0,
            "strongest": None,
        }
        lift_EE = np.where(count_EE >= min_count, arrays["lift_LHEE"][layer, h0], -np.inf)
        source, target = (int(i) for i in np.unravel_index(int(lift_EE.argmax()), lift_EE.shape))
        if np.isfinite(lift_EE[source, target]):
            row["strongest"] = {
                "source": source,
                "target": target,
                "p": round(float(arrays["p_LHEE"][layer, h0, source, target]), 5),
                "lift": round(float(lift_EE[source, target]), 4),
                "tokens": int(count_EE[source, target]),
            }
        rows.append(row)
    return rows
