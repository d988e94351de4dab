"""The optimizer, and its learning rate over a run."""

from __future__ import annotations

import math
from typing import Any

import torch


def adamw(groups: list[dict[str, Any]], **options: Any) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019, arXiv:1711.05101), one kernel where all parameters are on a GPU."""
    fused = all(parameter.is_cuda for group in groups for parameter in group["params"])
    optimizer = torch.optim.AdamW(groups, fused=fused or None, **options)
    if fused:  # it could divide out a gradient scaler's factor itself, and Lightning then refuses to clip
        optimizer._step_supports_amp_scaling = False
    return optimizer


class WarmupCosine:
    """Learning-rate factor at a step: linear rise over the first ``warmup`` of ``steps``, then a cosine to
    ``floor``."""

    def __init__(self, steps: float, warmup: float, floor: float = 0.02) -> None:
        self.steps, self.floor = steps, floor
        self.rise = max(1.0, warmup * steps) if math.isfinite(steps) else 100.0

    def __call__(self, step: int) -> float:
        if step < self.rise:
            return (step + 1) / (self.rise + 1)
        if not math.isfinite(self.steps):
            return 1.0
        done = min(1.0, (step - self.rise) / max(1.0, self.steps - self.rise))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))
