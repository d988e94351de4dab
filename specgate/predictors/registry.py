"""Names of predictors: what ``model=`` chooses and what a checkpoint remembers its class by.

A checkpoint holds a name and plain values, never a class: which code runs is decided here, not by a file.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from specgate.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from specgate.predictors.base import Predictor

_BUILT_IN = {
    "popularity": "Popularity",
    "markov": "Markov",
    "markov2": "Markov2",
    "previous_token": "PreviousToken",
    "recency": "Recency",
    "token_table": "TokenTable",
    "router_lookahead": "RouterLookahead",
    "router_mean_expert": "RouterMeanExpert",
    "mlp": "MLP",
    "router_residual": "RouterResidual",
    "gnn": "GNN",
    "transformer_xl": "TransformerXL",
    "hierarchical": "Hierarchical",
    "meta_moe": "MetaMoE",
    "attention": "Attention",
    "expert_lowrank": "ExpertLowRank",
    "seq2seq": "Seq2Seq",
    "ensemble": "Ensemble",
    "shadow": "Shadow",
}
_REGISTERED: dict[str, type[Predictor]] = {}
_Class = TypeVar("_Class", bound="type[Predictor]")


def register(name: str) -> Callable[[_Class], _Class]:
    """Class decorator that gives a predictor its name, so that its checkpoints can be loaded again.

    Raises:
        ConfigError: if the name is taken by another class.
    """

    def add(cls: _Class) -> _Class:
        taken = _REGISTERED.get(name)
        if name in _BUILT_IN or (taken is not None and taken.__qualname__ != cls.__qualname__):
            raise ConfigError(f"the predictor name {name!r} is taken: choose another")
        cls.name = name
        _REGISTERED[name] = cls
        return cls

    return add


def predictor_names() -> list[str]:
    """Every name that :func:`predictor_class` knows, built-in ones first."""
    return [*_BUILT_IN, *_REGISTERED]


def predictor_class(name: str) -> type[Predictor]:
    """The class of that name.

    Raises:
        CheckpointError: for a name that nobody has registered.
    """
    if name in _BUILT_IN:
        cls: type[Predictor] = getattr(
            importlib.import_module(f"specgate.predictors.{name}"), _BUILT_IN[name]
        )
        return cls
    if name not in _REGISTERED:
        raise CheckpointError(
            f"there is no predictor named {name!r} (known: {', '.join(predictor_names())}):"
            " import the module that registers it first"
        )
    return _REGISTERED[name]
