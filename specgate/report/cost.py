"""benchmark.py mode=cost: what a forecast costs, beside how good it is and what the host's layer costs.

Letters: B sequences, T tokens, L MoE layers, H horizons.

The call that is timed is what a loader makes at run time: one step of B sequences, foreseeing from one layer
with its history (``Predictor.step_logits`` and the calibrator).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from specgate.calibration.load import find_checkpoint, load_predictor
from specgate.errors import ConfigError, NotApplicableError, SpecgateError
from specgate.metrics.flops import count_flops
from specgate.metrics.timing import Timing, as_cuda_graph, time_interleaved
from specgate.moe.flops import LayerFlops, layer_flops
from specgate.predictors.base import Predictor
from specgate.predictors.export import Step, step_inputs
from specgate.predictors.quantize import Packed, stored_bytes
from specgate.predictors.registry import predictor_class
from specgate.report.accuracy import assign, labels
from specgate.report.evaluate import labels_of
from specgate.report.identity import trace_identity
from specgate.report.record import FILE_NAME, read_record
from specgate.report.runs import model_settings
from specgate.traces.batch import RoutingBatch
from specgate.traces.datamodule import RoutingDataModule
from specgate.training import build_predictor, norm_eps


@dataclass
class CostSettings:
    """What to cost and how.

    Attributes:
        checkpoints: ``.ckpt`` files or directories of runs.
        models: configurations to cost untrained, by label: what a call costs does not depend on its weights.
        free: names of free predictors to cost besides (made, not fitted: what a call costs is the same).
        metrics: metrics.json files (or their directories) with recalls of those, and of checkpoints without
        a run. match: see ``AccuracySettings``.
        lookahead: horizons of the free and the untrained predictors.
        context: tokens of history that a call sees.
        batch_sizes: sequences per call.
        layer: the layer that a call foresees from; None: the middle one.
        devices: where to time; None: the CPU and, where there is one, the GPU.
        repeats: readings per number. hosts: configurations of hosts that are not at hand, by the model's id
            in the trace (``model_type`` and what differs from transformers' defaults).
    """

    checkpoints: Sequence[str] = ()
    models: Mapping[str, Any] = field(default_factory=dict)
    free: Sequence[str] = ("router_lookahead",)
    metrics: Sequence[str] = ()
    match: str = "trained"
    lookahead: int = 3
    context: int = 128
    batch_sizes: Sequence[int] = (1, 8, 64)
    layer: int | None = None
    devices: Sequence[str] | None = None
    repeats: int = 15
    hosts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.context < 2:
            raise ConfigError(f"context={self.context} is no history: choose 2 tokens or more")
        for device in self.devices or ():
            if device.startswith("cuda") and not torch.cuda.is_available():
                raise ConfigError(
                    f"devices names {device} but no CUDA device is visible: choose devices=[cpu]"
                )


def measure(
    settings: CostSettings, traces: Mapping[str, RoutingDataModule], console: Console | None = None
) -> dict[str, Any]:
    """Cost everything on every trace.

    Returns:
        The content of metrics.json: ``traces``, ``rows`` (one per predictor and trace), ``hosts``,
        ``threads``.

    Raises:
        CheckpointError: if a checkpoint cannot be loaded or fits none of the traces.
    """
    console = console or Console(quiet=True)
    devices = list(settings.devices or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
    files = [find_checkpoint(path) for path in settings.checkpoints]
    plan = assign(files, traces, settings.match)
    named = labels(sorted(files))
    rows, hosts, identities = [], [], []
    for name, data in traces.items():
        host, reason = host_layer(data, settings)
        hosts.append({"trace": name, **({"missing": reason} if host is None else _flat(host))})
        found: dict[str, tuple[Predictor, Path | None]] = {}
        for free in settings.free:
            predictor = make_free(free, data, settings.lookahead)
            if predictor is not None:
                found[free] = (predictor, None)
        found |= {named[file]: (load_predictor(file), file) for file in named if name in plan[file]}
        for label, config in settings.models.items():
            try:
                fresh = build_predictor(OmegaConf.create(config), data, settings.lookahead)
                found[label] = (fresh.eval().requires_grad_(False), None)
            except NotApplicableError as error:
                console.print(f"{name}: {label} is left out: {error}", soft_wrap=True, highlight=False)
        console.print(f"{name}: {len(found)} predictors on {', '.join(devices)}", highlight=False)
        rows += cost_rows(name, data, found, settings, devices, host)
        identities.append(trace_identity(data, name))
    return {
        "mode": "cost",
        "checkpoints": [str(file) for file in files],
        "traces": identities,
        "hosts": hosts,
        "rows": rows,
        "threads": torch.get_num_threads(),
    }


def cost_rows(
    trace: str,
    data: RoutingDataModule,
    found: Mapping[str, tuple[Predictor, Path | None]],
    settings: CostSettings,
    devices: Sequence[str],
    host: LayerFlops | None,
) -> list[dict[str, Any]]:
    """One flat row per predictor.

    Args:
        found: (predictor, its checkpoint or None) by label.
    """
    window = history(data, settings.context)
    labelled = {k: v for k, v in labels_of(data, trace).items() if k != "split"}
    rows = []
    for label, (predictor, file) in found.items():
        predictor.eval().to("cpu")
        layer = settings.layer if settings.layer is not None else (predictor.layers - 1) // 2
        recall = recalls(label, trace, data, file, settings.metrics)
        row: dict[str, Any] = {**labelled, "predictor": label, "learned": predictor.learned}
        row |= {"checkpoint": None if file is None else str(file), "lookahead": predictor.lookahead}
        row |= {"parameters": weights_in(predictor), "bytes": stored_bytes(predictor)}
        row |= {"precision": f"int{predictor.quantization['bits']}" if predictor.quantization else "float32"}
        row |= {"context": settings.context, "layer": layer} | operations(predictor, window, layer, host)
        row |= {"fast_step": type(predictor).step_logits is not Predictor.step_logits}
        row |= training_of(file) | recall
        if label in settings.models:
            row["settings"] = model_settings({"model": settings.models[label]})
        row |= {"us": {}, "how": {}}
        rows.append(row)
    for device in devices:
        for size in settings.batch_sizes:
            times, how = time_steps(found, window, size, device, settings)
            for row in rows:
                timing = times.get(row["predictor"])
                found_us = [None] * 3 if timing is None else [timing.median, timing.low, timing.high]
                for suffix, us in zip(("", "_p10", "_p90"), found_us, strict=True):
                    row[f"us_{device}_{size}{suffix}"] = None if us is None else round(us, 2)
                row["us"].setdefault(device, {})[str(size)] = row[f"us_{device}_{size}"]
                if timing is None or device not in row["how"]:
                    row["how"][device] = how[row["predictor"]]
    return rows


# ---------------------------------------------------------------------- operations


def operations(
    predictor: Predictor, window: RoutingBatch, layer: int, host: LayerFlops | None
) -> dict[str, Any]:
    """Operations per token and layer of a whole window, and of one run-time call per sequence; shares of the
    host's layer."""
    B, T = window.valid_BT.shape
    counted = count_flops(lambda: predictor(window)) / (B * T * predictor.layers)
    declared = predictor.flops_per_token_layer(T)
    each = counted if declared is None else declared
    step = count_flops(lambda: predictor.step_logits(window, layer)) / B
    active = None if host is None else host.active
    return {
        "flops_per_token_layer": round(each, 1),
        "flops_counted": round(counted, 1),
        "flops_of_a_call": round(step, 1),
        "host_flops": active,
        "share_of_host": None if active is None else each / active,
        "share_of_host_of_a_call": None if active is None else step / active,
    }


def host_layer(data: RoutingDataModule, settings: CostSettings) -> tuple[LayerFlops | None, str]:
    """What a layer of the traced model costs per token at the settings' context, or why nobody knows."""
    import transformers

    from specgate.moe.hosts import local_directory

    model_id, spec = data.readers[0].header.model_id, data.spec
    try:
        if model_id in settings.hosts:
            config: Any = transformers.AutoConfig.for_model(**settings.hosts[model_id])
        elif (folder := local_directory(model_id)) is not None:
            config = transformers.AutoConfig.from_pretrained(folder)
        else:
            return None, f"the configuration of {model_id} is not at hand: describe it in cost.hosts"
        whole = spec.phase == "decode" or spec.bidirectional
        found = layer_flops(config, settings.context if whole else settings.context / 2, data.stack)
    except (SpecgateError, ValueError, TypeError, OSError) as error:
        return None, " ".join(str(error).split())[:200]
    return found, ""


def _flat(host: LayerFlops) -> dict[str, float]:
    return {**vars(host), "attention": host.attention, "active": host.active}


def weights_in(module: nn.Module) -> int:
    """Trained weights of a predictor, packed ones counted one by one (codes, not bytes)."""
    total = 0
    for part in module.modules():
        packed = part[0] if isinstance(part, ParametrizationList) else None
        if isinstance(packed, Packed):
            codes = part.original0
            assert isinstance(codes, Tensor)
            total += codes.numel() // codes.shape[-1] * packed.inputs
        else:
            total += sum(p.numel() for p in part.parameters(recurse=False) if p.is_floating_point())
    return total


# ---------------------------------------------------------------------- time


def history(data: RoutingDataModule, context: int, windows: int = 4) -> RoutingBatch:
    """Some windows of real routing (validation, or what there is) in which every token is valid.

    Raises:
        ConfigError: if no window of the trace is that long.
    """
    loader = data.test_dataloader() if data.everything else data.val_dataloader()
    parts: list[RoutingBatch] = []
    for batch in loader:
        whole_B = batch.valid_BT[:, :context].sum(1) == context
        if batch.valid_BT.shape[1] >= context and bool(whole_B.any()):
            rows = whole_B.nonzero().flatten()
            parts += [_cut(batch, rows[i : i + 1], context) for i in range(len(rows))]
        if len(parts) >= windows:
            break
    if not parts:
        raise ConfigError(f"no window of the trace has {context} tokens: choose a smaller cost.context")
    names = [name for name, value in vars(parts[0]).items() if isinstance(value, Tensor)]
    joined: dict[str, Any] = {n: torch.cat([getattr(p, n) for p in parts[:windows]]) for n in names}
    return replace(parts[0], **joined).to("cpu")  # a loader may hold its batches on a GPU


def _cut(batch: RoutingBatch, rows: Tensor, context: int) -> RoutingBatch:
    def cut(x: Tensor) -> Tensor:
        return x[rows] if x.dim() == 1 else x[rows, :context]

    return batch._map(cut)


def time_steps(
    found: Mapping[str, tuple[Predictor, Path | None]],
    window: RoutingBatch,
    size: int,
    device: str,
    settings: CostSettings,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time every predictor's call for ``size`` sequences, and how it was run: eager, as a CUDA graph, or not
    at all, with the reason."""
    rows = torch.arange(size) % window.valid_BT.shape[0]
    inputs = step_inputs(window._map(lambda x: x[rows]).to(device))
    calls: dict[str, Callable[[], object]] = {}
    how: dict[str, str] = {}
    with torch.no_grad():
        for label, (predictor, _) in found.items():
            layer = settings.layer if settings.layer is not None else (predictor.layers - 1) // 2
            step = Step(predictor, layer).eval().to(device)
            given = inputs if predictor.hidden_size is not None else (*inputs[:5], None, inputs[6])

            def call(step: Step = step, given: tuple[Tensor | None, ...] = given) -> Tensor:
                found_BHE: Tensor = step(*given)
                return found_BHE

            try:
                call()
            except RuntimeError as error:  # too large for the device
                how[label] = f"failed: B={size}, {' '.join(str(error).split())[:100]}"
                continue
            calls[label], how[label] = call, "eager"
            if torch.device(device).type == "cuda":
                try:
                    calls[label], how[label] = as_cuda_graph(call)[0], "CUDA graph"
                except RuntimeError as error:
                    torch.cuda.synchronize()
                    how[label] = f"eager: {' '.join(str(error).split())[:120]}"
        times = time_interleaved(calls, device, settings.repeats)
    return times, how


# ---------------------------------------------------------------------- what is known already


def make_free(name: str, data: RoutingDataModule, lookahead: int) -> Predictor | None:
    """A free predictor for the trace, not fitted; None where the trace lacks what it needs.

    Raises:
        ConfigError: if it is no free predictor.
    """
    cls, spec = predictor_class(name), data.spec
    if cls.learned:
        raise ConfigError(f"free={name!r} is trained: give its checkpoint in checkpoints=")
    if cls.needs_hidden and (spec.hidden_size is None or data.routers is None):
        return None
    options: dict[str, Any] = {**vars(spec), "lookahead": lookahead}
    if cls.needs_hidden:
        options |= {"routers": data.routers, "norm_eps": norm_eps(data)}
    return cls(**options).eval()


def run_record(file: Path | None) -> dict[str, Any] | None:
    """The metrics.json of the run that wrote a checkpoint: beside it or in a directory above."""
    for folder in [] if file is None else list(file.resolve().parents)[:2]:
        if (folder / FILE_NAME).is_file():
            return read_record(folder)
    return None


def training_of(file: Path | None) -> dict[str, Any]:
    """How long training took and on what: seconds of training alone where the run recorded them, else of the
    whole run."""
    record = run_record(file)
    if record is None or record.get("entry") != "train.py":
        nothing = {"training_seconds": None, "training_seconds_of": None, "training_hardware": None}
        return nothing | {"settings": None}
    alone = record.get("training_seconds")
    hardware = record.get("hardware", {})
    on_gpu = record.get("config", {}).get("trainer", {}).get("accelerator") != "cpu" and hardware.get("gpus")
    return {
        "settings": model_settings(record.get("config") or {}),
        "training_seconds": record["wall_seconds"] if alone is None else alone,
        "training_seconds_of": "whole run" if alone is None else "training",
        "training_hardware": hardware["gpus"][0] if on_gpu else hardware.get("cpu"),
    }


def recalls(
    label: str, trace: str, data: RoutingDataModule, file: Path | None, metrics: Iterable[str]
) -> dict[str, Any]:
    """``recall_n1`` ... of targets within the token, on the test split where it was scored, and where they
    are from: the checkpoint's own run, or the first of ``metrics`` that has them."""
    own = run_record(file)
    for source, record in [("run", own), *((str(path), read_record(path)) for path in metrics)]:
        rows = [] if record is None else [r for r in record.get("rows", []) if "recall_at_k" in r]
        names = {label, label.split(" (")[0]} if source == "run" else {label}
        same = {"stack": data.stack, "phase": data.phase}
        rows = [r for r in rows if r["predictor"] in names and r["kind"] == "within"]
        rows = [r for r in rows if all(r.get(key) == value for key, value in same.items())]
        if source != "run":
            rows = [r for r in rows if r["trace"] in {trace, *(path.name for path in data.paths)}]
        for split in ("test", "validation"):
            scored = {r["horizon"]: r["recall_at_k"] for r in rows if r["split"] == split}
            if scored:
                found = {f"recall_n{h}": value for h, value in sorted(scored.items())}
                return {**found, "recall_split": split, "recall_from": source}
    return {"recall_split": None, "recall_from": None}
