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
from torch import nn

from specgate.calibration.load import load_predictor
from specgate.errors import CheckpointError, ConfigError, StoreError
from specgate.moe.families import MoELayer, moe_layers, router_tensors
from specgate.moe.hosts import fingerprint, quiet_imports, resolve_device
from specgate.moe.offload_experts import ExpertRunner
from specgate.moe.offload_forecast import Forecaster, Foresees, check_predictor, stack_of, window_bytes
from specgate.moe.offload_load import BUILDING, Blueprint, checkpoint_folder, draw, load_dense
from specgate.moe.offload_plan import GB, OffloadPlan, dense_bytes, make_plan
from specgate.moe.offload_slots import Store
from specgate.moe.offload_speculate import KernelForecaster
from specgate.moe.offload_state import Offloaded, not_whole, stays
from specgate.moe.offload_verify import CheckpointExperts, verify_model
from specgate.policy.priced import Priced
from specgate.policy.reuse import Reuse
from specgate.policy.reuse_online import START, ReuseCounter
from specgate.predictors.base import Predictor
from specgate.predictors.router_lookahead import RouterLookahead
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
PRICED = Priced()
ROUTERS = "router_lookahead"
"""The predictor that needs no training: the model's own routers."""
LEAST = 2.0**-6
"""Forecasts below this probability are not worth a look, where a price decides."""
SPARE = 0.9  # share of the free memory that is taken when no budget is named

AnyPredictor = str | Path | Predictor


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
            for predictor in self._predictors:
                _give_routers(predictor, layers)
            if not resident and self._options["eviction"] == "priced":
                _know_reuse(runner, store, self.plan, self._options["reuse"])
            if self._predictors and not resident:
                state.forecaster = self._forecaster(model, runner)
                runner.observer = state.forecaster.routed
                stack.enter_context(state.forecaster)
            model.specgate = state
            for name, refusal in (("_apply", stays(model)), ("save_pretrained", not_whole)):
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
        direct = options["direct"] if options["direct"] is not None else not paged
        settings = StoreSettings(
            eviction=options["eviction"],
            poison=options["poison"],
            direct=direct,
            price_scale=PRICED.price_scale if options["eviction"] == "priced" else None,
            price_floor=PRICED.price_floor,
            trust=PRICED.trust and options["eviction"] == "priced",
            prefetch_depth=PRICED.depth if options["eviction"] == "priced" else 0,
        )
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
    eviction: str = "auto",
    reuse: Reuse | None = None,
    experts_implementation: str | None = None,
    verify: bool = False,
    revision: str | None = None,
    batch_size: int = 1,
    context: int | None = None,
    threshold: float | None = None,
    history: int = 128,
    forecasts: str = "auto",
    store: str = "auto",
    direct: bool | None = None,
    poison: bool = False,
) -> Offload:
    """Plans a model that keeps its experts outside the device; entering the result loads it.

    Args:
        model: a bundled name (``olmoe_ref``, ``switch_ref``), a directory, or a name on the hub.
        budget_gb: device memory in GB (10^9 bytes) for everything: dense weights, KV cache, activations and
            experts. None takes nine tenths of what is free.
        predictor: a checkpoint, a run's directory or a :class:`Predictor`, or several for other stacks and
            phases; it speaks in the phase that it was trained for. ``router_lookahead`` asks the next layers'
            own routers, which needs no training. None: a plain cache of experts.
        device: ``auto`` (the GPU where there is one), ``cpu``, ``cuda``, ``cuda:1``.
        dtype: ``auto`` is the model's own.
        host_gb: host memory for experts; None is half of what is free beside a GPU, and none beside the CPU,
            where the system's page cache does as well.
        packed: a file written by ``python -m specgate.runtime.pack``; None reads the model's own files.
        eviction: which expert goes when room is needed: ``lru``, ``lfu``, ``lfru``, ``static``, ``forecast``,
            or ``priced``, which also decides by price what is fetched ahead (:mod:`specgate.policy.priced`).
            ``auto`` is ``priced`` with a predictor and ``lru`` without.
        reuse: what ``priced`` knows of reuse; None fits it to the experts that the model uses as it runs.
        experts_implementation: ``eager``, ``batched_mm``, ``grouped_mm``; None is transformers' choice.
        verify: compare every MoE layer with the resident one on a few tokens before anything else runs.
        revision: branch, tag or commit on the hub.
        batch_size, context: sequences and tokens of each that memory is set aside for (context None: 2048, or
            what the model can).
        threshold: experts that are less probable are not fetched ahead. None: with ``priced``, which weighs
            each of them, 2^-6; else 0.2, or 0.5 of ``router_lookahead``, which is not calibrated.
        history: tokens that a predictor looks back at most.
        forecasts: ``kernel`` (one launch per layer, nothing is waited for; ``router_lookahead``, ``mlp`` and
            ``router_residual`` while decoding, with the native store), ``torch`` (any predictor), or
            ``auto``, the kernel where it runs the predictor.
        store: ``native`` (the compiled core), ``simple`` (plain torch: nothing moves in the background), or
            ``auto``, the native one where it is built for the device.
        direct: read past the system's page cache; None: beside a GPU.
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
    if eviction not in (*POLICIES, "auto"):
        raise ConfigError(f"eviction={eviction!r} is not known; choose one of {', '.join(POLICIES)}.")
    if threshold is not None and not 0 <= threshold <= 1:
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
    if eviction == "auto":
        eviction = "priced" if predictors else "lru"
    kind = _store_kind(store, target)
    options = {
        "store": kind,
        "eviction": eviction,
        "reuse": reuse,
        "direct": direct,
        "verify": verify,
        "poison": poison,
        "threshold": _threshold(predictors, eviction, kind) if threshold is None else threshold,
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
    found = [_predictor(one, blueprint) for one in several]
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


def _predictor(given: AnyPredictor, blueprint: Blueprint) -> Predictor:
    if isinstance(given, Predictor):
        return given
    if given != ROUTERS or Path(given).exists():
        return load_predictor(given)
    layers = [layer for layer in blueprint.layers if layer.stack != "encoder"]
    config = blueprint.config
    made = RouterLookahead(
        layers=len(layers),
        experts=layers[0].num_experts,
        top_k=layers[0].top_k,
        vocab_size=int(config.vocab_size),
        phase="decode",
        hidden_size=int(config.hidden_size),
        lookahead=min(2, len(layers)),
        norm_eps=layers[0].rule.norm_eps,
        rows=1,
    )
    made.say_nothing_of_the_rest()
    return made


def _give_routers(predictor: Predictor, layers: Sequence[MoELayer]) -> None:
    """The loaded model's routers, to the predictor that asks them and has none."""
    if isinstance(predictor, RouterLookahead) and not bool(predictor.host.known):
        stack = stack_of(predictor, [layer.stack for layer in layers])
        predictor.host.fill({x.index: router_tensors(x) for x in layers if x.stack == stack})


def _threshold(predictors: Sequence[Predictor], eviction: str, store: str) -> float:
    """From which probability on experts are fetched ahead, unless the user says so."""
    if eviction == "priced" and store == "native":
        return LEAST  # it learns what its probabilities are worth
    untrained = any(isinstance(one, RouterLookahead) and not bool(one.host.known) for one in predictors)
    return 0.5 if untrained else 0.2


def _know_reuse(runner: ExpertRunner, store: Store, plan: OffloadPlan, reuse: Reuse | None) -> None:
    """Tells a store how experts are used again: as given, or as they are used from now on."""
    if not isinstance(store, ExpertStore):
        return
    share = 1.0 if PRICED.discount is None else PRICED.discount ** (1 / plan.layers)

    def tell(found: Reuse) -> None:
        store.set_reuse(found.half_life, share, found.intercept, found.slope)

    tell(reuse or START)
    if reuse is None:
        runner.counter = ReuseCounter(plan.layers, plan.experts, plan.top_k, plan.slots, tell)


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
