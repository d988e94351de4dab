"""A predictor's run-time call as tensors in, tensor out: for ``torch.export``, ``torch.compile`` and CUDA
graphs.

Letters: B sequences, T tokens, L MoE layers, H horizons, E experts per layer, K experts per token, D hidden
size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from specgate.predictors.base import Predictor
from specgate.traces.batch import RoutingBatch


class Step(nn.Module):
    """What a loader calls at one layer: calibrated probabilities of the next H layers' experts.

    Args:
        predictor: in evaluation mode, with its calibrator. layer: the last MoE layer whose router input
            exists, -1 before the first.

    Shapes:
        forward: the tensors of :func:`step_inputs`, in their order -> ``[B, H, E]`` float32 in [0, 1] (rows
            beyond what the phase allows mean nothing).
    """

    def __init__(self, predictor: Predictor, layer: int) -> None:
        super().__init__()
        predictor._check_layer("layer", layer, lowest=-1)
        self.predictor, self.layer, self.phase = predictor, layer, predictor.phase

    def forward(
        self,
        experts_BTLK: Tensor,
        weights_BTLK: Tensor,
        token_ids_BT: Tensor,
        positions_BT: Tensor,
        valid_BT: Tensor,
        hidden_BTLD: Tensor | None = None,
        dropped_BTL: Tensor | None = None,
    ) -> Tensor:
        none_B = token_ids_BT[:, 0] * 0
        batch = RoutingBatch(
            experts_BTLK,
            weights_BTLK,
            token_ids_BT,
            positions_BT,
            valid_BT,
            valid_BT,
            none_B,
            none_B,
            hidden_BTLD,
            dropped_BTL,
            self.phase,
        )
        return self.predictor.step_probabilities(batch, self.layer)


def step_inputs(batch: RoutingBatch) -> tuple[Tensor | None, ...]:
    """What :class:`Step` takes of a batch."""
    return (
        batch.experts_BTLK,
        batch.weights_BTLK,
        batch.token_ids_BT,
        batch.positions_BT,
        batch.valid_BT,
        batch.hidden_BTLD,
        batch.dropped_BTL,
    )


def export_step(predictor: Predictor, layer: int, example: RoutingBatch) -> torch.export.ExportedProgram:
    """The call of :class:`Step` as a program without Python, for any number of sequences and tokens.

    Args:
        example: a batch with at least two sequences and two tokens, to trace with.

    Returns:
        A program whose ``module()`` takes :func:`step_inputs`; ``torch.export.save`` writes it to a file.
    """
    inputs = step_inputs(example)
    B, T = torch.export.Dim("B", min=1), torch.export.Dim("T", min=2)
    shapes: Any = tuple(None if x is None else {0: B, 1: T} for x in inputs)
    was_training = predictor.training
    predictor.eval()
    with torch.no_grad():
        program = torch.export.export(Step(predictor, layer), inputs, dynamic_shapes=shapes, strict=False)
    predictor.train(was_training)
    return program
