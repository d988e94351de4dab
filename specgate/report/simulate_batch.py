"""Parts of a simulation: a cell, and documents that are decoded together as each policy foresees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from specgate.policy.hardware import Hardware
from specgate.policy.workload import Workload, merge
from specgate.report.simulate_groups import Groups
from specgate.report.simulate_rows import Floats

ARM = "arm "
"""Before the names of a bandit's arms, which are run but not shown."""
Figures = dict[str, Floats]


@dataclass(frozen=True)
class Place:
    """One cell: a machine, a batch and a budget."""

    name: str
    profile: Hardware
    batch: int
    residency: float
    slots: int
    host: int

    @property
    def about(self) -> dict[str, Any]:
        """For rows."""
        return {
            "hardware": self.name, "batch": self.batch, "residency": self.residency, "slots": self.slots,
        }  # fmt: skip

    def __str__(self) -> str:
        return f"{self.name}, batch {self.batch}, {100 * self.residency:g} %"


@dataclass
class Batch:
    """Documents in groups that are decoded together, as each policy foresees them."""

    size: int
    fit: Workload
    scored: Groups
    before: Groups
    documents: Mapping[str, tuple[list[Workload], list[Workload]]]  # label -> scored, before; one by one
    made: dict[tuple[int, int], list[Workload]] = field(default_factory=dict)

    def of(self, label: str, which: int, most: int | None = None) -> list[Workload]:
        """Groups of the scored documents (``which`` 0) or of those before (1), the first ``most``."""
        documents = self.documents[label][which]
        groups = (self.scored, self.before)[which][:most]
        if self.size == 1:
            return [documents[g[0]] for g in groups]
        key = (id(documents), len(groups))  # several policies share a list
        if key not in self.made:
            self.made[key] = [merge([documents[d] for d in g]) for g in groups]
        return self.made[key]


def short(rules: Mapping[str, Any]) -> dict[str, Any]:
    """Rules without their long lists, as JSON can say them."""
    return {
        key: value
        for key, value in rules.items()
        if not isinstance(value, list) and not (isinstance(value, float) and not np.isfinite(value))
    }
