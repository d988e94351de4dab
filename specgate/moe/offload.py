"""``specgate.offload``: a Mixture-of-Experts model whose experts need not fit the device.

::

    with specgate.offload("olmoe_ref", budget_gb=0.02, predictor="outputs/…/best.ckpt") as model:
        model.generate(...)

The one place where the host, the forecast and the store meet: the model is loaded without its experts, a
store lends them in slots, and a predictor says which will be wanted. What is computed is what the resident
model computes, bit for bit with codec ``none``; forecasts change when an expert arrives and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from specgate.calibration.load import load_predictor
from specgate.errors import CheckpointError, ConfigError, StoreError
from specgate.moe.families import moe_layers
from specgate.moe.hosts import fingerprint, quiet_imports, resolve_device
from specgate.moe.offload_experts import ExpertRunner
from specgate.moe.offload_slots import Store
from specgate.moe.offload_forecast import Forecaster, Foresees, check_predictor, stack_of, window_bytes
from specgate.moe.offload_load import BUILDING, Blueprint, checkpoint_folder, draw, load_dense
from specgate.moe.offload_plan import GB, OffloadPlan, dense_bytes, make_plan
from specgate.moe.offload_speculate import KernelForecaster
from specgate.moe.offload_verify import CheckpointExperts, verify_model
from specgate.predictors.base import Predictor
from specgate.predictors.speculation import SpeculationParts, speculation_parts
from specgate.runtime import native
from specgate.runtime.layout import BlockLayout
from specgate.runtime.reference_policies import POLICIES
from specgate.runtime.simple_store import SimpleStore
from specgate.runtime.source import ExpertSource
from specgate.runtime.speculate import Speculator
from specgate.runtime.store import ExpertStore, StoreSettings

FORECASTS = ("auto", "kernel", "torch")
STORES = ("auto", "native", "simple")
SPARE = 0.9  # share of the free memory that is taken when no budget is named

AnyPredictor = str | Path | Predictor


class Offloaded:
    """What is to be known of an offloaded model while it runs: ``model.specgate``.

    Attributes:
        plan: where the memory goes; print it.
        store: that lends the experts.
        forecaster: that asks the predictors, or None.
        verified: with ``verify``, per MoE layer the largest relative difference from the resident layer.
    """

    def __init__(self, plan: OffloadPlan, store: Store) -> None:
        self.plan, self.store = plan, store
        self.forecaster: Forecaster | KernelForecaster | None = None
        self.verified: list[float] | None = None
        self._last: dict[str, Any] | None = None

    def stats(self) -> dict[str, Any]:
        """The store's counters, and how often predictors were asked; after the block, as they were then."""
        if self._last is not None:
            return dict(self._last)
        found = dict(self.store.stats())
        if self.forecaster is not None:
            found |= {"forecasts": self.forecaster.asked, "ignored": self.forecaster.ignored}
        return found

    def timeline(self) -> list[Any]:
        """Transfers as events of the Chrome trace format."""
        return self.store.timeline()

    def close(self) -> None:
        """Keeps the counters for later."""
        self._last = self.stats()


class Offload:
    """Made by :func:`offload`; a context whose value is the model. It may be entered again after it was left.

    Attributes:
        plan: where the memory would go; nothing is loaded for that.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        plan: OffloadPlan,
        source: ExpertSource | None,
        device: torch.device,
        predictors: Sequence[Predictor],
        options: Mapping[str, Any],
    ) -> None:
        self.plan = plan
        self._blueprint, self._source, self._device = blueprint, source, device
        self._predictors, self._options = predictors, options
        self._open: ExitStack | None = None

    def __enter__(self) -> Any:
        if self._open is not None:
            raise StoreError(
                "This offload block is already open; call specgate.offload again for a second model."
            )
        with ExitStack() as stack:
            model: Any = load_dense(self._blueprint, self._device)
            layers = moe_layers(model)
            folder = checkpoint_folder(self._blueprint)
            with BUILDING:
                source = self._source or ExpertSource.open(folder, self._blueprint.dtype)
            store = self._open_store(source)
            stack.callback(store.close)
            state = Offloaded(self.plan, store)
            stack.callback(state.close)
            runner = ExpertRunner(store, [layer.experts for layer in layers])
            stack.callback(runner.close)
            resident = self.plan.resident and runner.load_all()
            if self._predictors and not resident:
                state.forecaster = self._forecaster(model, runner)
                runner.observer = state.forecaster.routed
                stack.enter_context(state.forecaster)
            model.specgate = state
            for name, refusal in (("_apply", _stays(model)), ("save_pretrained", _not_whole)):
                setattr(model, name, refusal)
                stack.callback(model.__dict__.pop, name)
            if self._options["verify"]:
                original = CheckpointExperts(folder, layers, self._blueprint.dtype)
                state.verified = verify_model(model, layers, original, exact=self.plan.codec == "none")
            self._open = stack.pop_all()
        return model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._open = self._open, None
        if stack is not None:
            stack.close()

    def _open_store(self, source: ExpertSource) -> Store:
        plan, options = self.plan, self._options
        if options["store"] == "simple":
            return SimpleStore(source, plan.slots, self._device, options["eviction"], options["poison"])
        # On the CPU host memory is the device's, which the budget bounds: the page cache is the host tier.
        paged = self._device.type == "cpu" and plan.host is None
        settings = StoreSettings(eviction=options["eviction"], poison=options["poison"], direct=not paged)
        return ExpertStore(source, plan.slots, 0 if paged else plan.host, self._device, settings)

    def _forecaster(self, model: nn.Module, runner: ExpertRunner) -> Forecaster | KernelForecaster:
        """The kernel if it runs the predictors, else torch."""
        options, layers = self._options, moe_layers(model)
        predictors = [predictor.to(self._device).eval() for predictor in self._predictors]
        kind, parts = options["forecasts"], None
        if kind != "torch":
            try:
                parts = _kernel_parts(predictors, runner.store)
            except ConfigError:
                if kind == "kernel":
                    raise
        if parts is None:
            return Forecaster(
                model, layers, predictors, runner.prefetch, options["threshold"], options["history"]
            )
        runner.follows = True
        stack = stack_of(predictors[0], [layer.stack for layer in layers])
        more = {"threshold": options["threshold"], "device": self._device, "context": options["history"]}
        store: Any = runner.store
        return KernelForecaster(
            model, layers, stack, lambda batch: Speculator(parts, batch=batch, **more), store
        )


def offload(
    model: str | Path,
    budget_gb: float | None = None,
    predictor: AnyPredictor | Sequence[AnyPredictor] | None = None,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    host_gb: float | None = None,
    packed: str | Path | None = None,
    eviction: str = "lru",
    experts_implementation: str | None = None,
    verify: bool = False,
    revision: str | None = None,
    batch_size: int = 1,
    context: int | None = None,
    threshold: float = 0.2,
    history: int = 128,
    forecasts: str = "auto",
    store: str = "auto",
    poison: bool = False,
) -> Offload:
    """Plans a model that keeps its experts outside the device; entering the result loads it.

    Args:
        model: a bundled name (``olmoe_ref``, ``switch_ref``), a directory, or a name on the hub.
        budget_gb: device memory in GB (10^9 bytes) for everything: dense weights, KV cache, activations and
            experts. None takes nine tenths of what is free.
        predictor: a checkpoint, a run's directory or a :class:`Predictor`, or several for other stacks and
            phases; it speaks in the phase that it was trained for. None: a plain cache of experts.
        device: ``auto`` (the GPU where there is one), ``cpu``, ``cuda``, ``cuda:1``.
        dtype: ``auto`` is the model's own.
        host_gb: host memory for experts; None is half of what is free beside a GPU, and none beside the CPU,
            where the system's page cache does as well.
        packed: a file written by ``python -m specgate.runtime.pack``; None reads the model's own files.
        eviction: which expert goes when room is needed: ``lru``, ``lfu``, ``lfru``, ``static``, ``forecast``.
        experts_implementation: ``eager``, ``batched_mm``, ``grouped_mm``; None is transformers' choice.
        verify: compare every MoE layer with the resident one on a few tokens before anything else runs.
        revision: branch, tag or commit on the hub.
        batch_size, context: sequences and tokens of each that memory is set aside for (context None: 2048, or
            what the model can).
        threshold: experts that are less probable are not fetched ahead.
        history: tokens that a predictor looks back at most.
        forecasts: ``kernel`` (one launch per layer, nothing is waited for; ``router_lookahead``, ``mlp`` and
            ``router_residual`` while decoding, with the native store), ``torch`` (any predictor), or
            ``auto``, the kernel where it runs the predictor.
        store: ``native`` (the compiled core), ``simple`` (plain torch: nothing moves in the background), or
            ``auto``, the native one where it is built for the device.
        poison: fill free slots with NaN (for tests).

    A backward pass is refused; :func:`torch.compile` leaves the experts out of its graphs, and so does not
    take ``fullgraph=True``. The model cannot be moved or saved while it is offloaded.

    Raises:
        UnknownArchitectureError: no adapter, a broken implementation, no experts, or quantised weights.
        CheckpointError: model or predictor is missing, unreadable, or not made for each other.
        BudgetError: the budget is too small; says the least one that works.
        ConfigError: a value that makes no sense.
    """
    quiet_imports()
    target = resolve_device(device)
    if forecasts not in FORECASTS:
        raise ConfigError(f"forecasts={forecasts!r} is not known; choose one of {', '.join(FORECASTS)}.")
    if eviction not in POLICIES:
        raise ConfigError(f"eviction={eviction!r} is not known; choose one of {', '.join(POLICIES)}.")
    if not 0 <= threshold <= 1:
        raise ConfigError(f"threshold={threshold} is no probability; write a number from 0 to 1.")
    if history < 1:
        raise ConfigError(f"history={history} leaves a predictor nothing to look at; write 1 or more.")
    blueprint = draw(str(model), revision, dtype, experts_implementation)
    predictors = _predictors(predictor, blueprint)
    pieces = [(name, shape, blueprint.dtype) for name, shape in blueprint.shapes.items()]
    source = None if packed is None else _packed(packed, blueprint)
    layout = BlockLayout.make(pieces) if source is None else source.layout
    foreseen = sum(dense_bytes(p) + window_bytes(p, batch_size, history) for p in predictors)
    plan = make_plan(
        blueprint.model,
        blueprint.layers,
        name=blueprint.name,
        device=str(target),
        slot=layout.slot_bytes,
        block=layout.block_bytes,
        codec=layout.codec,
        budget_gb=_free(target) * SPARE / GB if budget_gb is None else budget_gb,
        host_gb=host_gb,
        batch_size=batch_size,
        context=context,
        predictor=foreseen,
        itemsize=blueprint.dtype.itemsize,
        dtype=str(blueprint.dtype).removeprefix("torch."),
    )
    options = {
        "store": _store_kind(store, target),
        "eviction": eviction,
        "verify": verify,
        "poison": poison,
        "threshold": threshold,
        "forecasts": forecasts,
        "history": history,
    }
    return Offload(blueprint, plan, source, target, predictors, options)


def _packed(path: str | Path, blueprint: Blueprint) -> ExpertSource:
    """A packed file, if it was made of this model."""
    source = ExpertSource.open(Path(path), blueprint.dtype)
    own = fingerprint(blueprint.path) if isinstance(blueprint.path, Path) else _commit(blueprint)
    shapes = {piece.name: piece.shape for piece in source.layout.pieces}
    made_of = (source.family, source.layers, shapes)
    if made_of != (blueprint.family.name, len(blueprint.layers), blueprint.shapes) or own != source.revision:
        raise CheckpointError(
            f"{path} was packed from {source.model_id} ({source.revision}), and {blueprint.name} ({own}) is "
            "another model; pack it again."
        )
    return source


def _commit(blueprint: Blueprint) -> str:
    return str(getattr(blueprint.config, "_commit_hash", None) or blueprint.revision or "")


def _predictors(given: AnyPredictor | Sequence[AnyPredictor] | None, blueprint: Blueprint) -> list[Predictor]:
    """The predictors that were named, loaded and found to fit."""
    if given is None:
        return []
    several = [given] if isinstance(given, str | Path | Predictor) else list(given)
    found = [one if isinstance(one, Predictor) else load_predictor(one) for one in several]
    places: set[tuple[str, str]] = set()
    stacks = list(dict.fromkeys(layer.stack for layer in blueprint.layers))
    for one in found:
        foresees: Foresees = one
        stack = stack_of(foresees, stacks)
        check_predictor(foresees, [x for x in blueprint.layers if x.stack == stack], blueprint.model)
        if (stack, one.phase) in places:
            raise ConfigError(f"Two predictors are for the {stack}'s {one.phase}; name one.")
        places.add((stack, one.phase))
    return found


def _kernel_parts(predictors: Sequence[Predictor], store: Store) -> SpeculationParts:
    """What the speculation kernel needs of the one predictor there is.

    Raises:
        ConfigError: if it cannot run here.
    """
    if not isinstance(store, ExpertStore):
        raise ConfigError("forecasts='kernel' needs the native store; build it, or choose forecasts='torch'.")
    if [predictor.phase for predictor in predictors] != ["decode"]:
        raise ConfigError(
            "forecasts='kernel' runs one predictor, trained for decoding; name one, or choose "
            "forecasts='torch'."
        )
    return speculation_parts(predictors[0])


def _store_kind(store: str, device: torch.device) -> str:
    """``native`` or ``simple``."""
    if store not in STORES:
        raise ConfigError(f"store={store!r} is not known; choose one of {', '.join(STORES)}.")
    if store != "auto":
        return store
    wanted = ("native+cuda",) if device.type == "cuda" else ("native", "native+cuda")
    return "native" if native.backend() in wanted else "simple"


def _free(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available)


def _stays(model: nn.Module) -> Any:
    """``Module._apply`` of a model that must not be moved or cast: what changes nothing is let through."""

    def refuse(change: Any, recurse: bool = True) -> nn.Module:
        first = next(model.parameters())
        probe: Tensor = change(first.new_empty(0))
        if (probe.device, probe.dtype) != (first.device, first.dtype):
            raise ConfigError(
                f"An offloaded model stays on {first.device} in {first.dtype}; name device= and dtype= in "
                "specgate.offload."
            )
        return model

    return refuse


def _not_whole(*args: Any, **kwargs: Any) -> None:
    raise ConfigError("An offloaded model has no experts to save; copy the directory that it came from.")
