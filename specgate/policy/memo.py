"""Results of slow fits, kept as long as the workload that they are of."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from specgate.policy.workload import Workload

_Options = ParamSpec("_Options")
_Result = TypeVar("_Result")


def once_per_workload(
    fit: Callable[Concatenate[Workload, _Options], _Result],
) -> Callable[Concatenate[Workload, _Options], _Result]:
    """The function, computed once for each workload (the object, which cannot change) and options."""
    kept: WeakKeyDictionary[Workload, dict[Any, _Result]] = WeakKeyDictionary()

    @wraps(fit)
    def remembered(workload: Workload, *args: _Options.args, **options: _Options.kwargs) -> _Result:
        mine = kept.setdefault(workload, {})
        key = (args, tuple(sorted(options.items())))
        if key not in mine:
            mine[key] = fit(workload, *args, **options)
        return mine[key]

    return remembered
