"""The run-time call as a program: exported and compiled it gives what eager gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specgate.calibration.base import Calibrator
from specgate.calibration.isotonic import IsotonicCalibration
from specgate.calibration.temperature import TemperatureScaling
from specgate.calibration.vector import VectorScaling
from specgate.errors import SpecgateError
from specgate.predictors.base import Predictor
from specgate.predictors.export import Step, export_step, step_inputs
from specgate.predictors.quantize import pack
from specgate.traces.batch import INVALID
from tests.predictors.support import LAYERS, fitted, make_batch

RUN = ("router_lookahead", "router_residual", "mlp")


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("name", RUN)
def test_exported_program_gives_the_forecast(name: str, phase: str, tmp_path: Path) -> None:
    predictor = fitted(name, phase)
    program = export_step(predictor, 0, make_batch(phase))
    torch.export.save(program, tmp_path / "step.pt2")
    loaded = torch.export.load(tmp_path / "step.pt2").module()
    for B, T in ((3, 8), (1, 5), (6, 13)):  # shapes that it was not traced with
        batch = make_batch(phase, B=B, T=T, seed=B)
        found_BHE = loaded(*step_inputs(batch))
        with torch.no_grad():
            expected_BHE = predictor.calibrator(
                predictor.step_logits(batch, 0)[:, None], predictor.kinds[1:2]
            )[:, 0]
        torch.testing.assert_close(found_BHE, expected_BHE, rtol=1e-4, atol=1e-6)
    forecast = predictor.predict_next_experts(make_batch(phase, B=1, padded=False), layer=0)
    found_BHE = loaded(*step_inputs(make_batch(phase, B=1, padded=False)))
    rows = (predictor.kinds[1] != INVALID).nonzero().flatten()
    torch.testing.assert_close(found_BHE[0, rows], forecast.p_HE, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layer", [-1, LAYERS - 1])
def test_export_at_the_ends_of_the_stack(layer: int) -> None:
    predictor, batch = fitted("router_residual", "decode", hidden=False), make_batch("decode", hidden=False)
    found_BHE = export_step(predictor, layer, batch).module()(*step_inputs(batch))
    with torch.no_grad():
        torch.testing.assert_close(found_BHE, Step(predictor, layer)(*step_inputs(batch)))
    with pytest.raises(SpecgateError, match="layer 3 is outside"):
        Step(predictor, LAYERS)


def test_packed_weights_are_exported_packed() -> None:
    predictor, batch = fitted("router_residual", "decode", width=64), make_batch("decode")
    pack(predictor, 4)
    program = export_step(predictor, 1, batch)
    found_BHE = program.module()(*step_inputs(batch))
    with torch.no_grad():
        torch.testing.assert_close(found_BHE, Step(predictor, 1)(*step_inputs(batch)))
    assert torch.uint8 in {value.dtype for value in program.state_dict.values()}


def compiled_equals_eager(predictor: Predictor, phase: str, backend: str) -> None:
    step = Step(predictor, 0)
    torch.compiler.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=False)
    inputs = step_inputs(make_batch(phase, seed=3))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), step(*inputs), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("name", RUN)
def test_one_graph_without_a_break(name: str, phase: str) -> None:
    compiled_equals_eager(fitted(name, phase), phase, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("name", RUN)
def test_compiled_to_machine_code(name: str, phase: str) -> None:
    compiled_equals_eager(fitted(name, phase), phase, "inductor")


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUN)
def test_one_cuda_graph(name: str) -> None:
    from specgate.metrics.timing import as_cuda_graph

    predictor, batch = fitted(name, "decode").cuda(), make_batch("decode").to("cuda")
    step, inputs = Step(predictor, 0), step_inputs(batch)
    with torch.no_grad():
        replay, found = as_cuda_graph(lambda: step(*inputs))
        replay()
        torch.testing.assert_close(found, step(*inputs))


@pytest.mark.parametrize("calibrator", [TemperatureScaling, VectorScaling, IsotonicCalibration])
def test_the_calibrator_is_part_of_the_program(calibrator: type[Calibrator]) -> None:
    predictor, batch = fitted("router_lookahead", "decode"), make_batch("decode")
    predictor.calibrator = calibrator(3, "sigmoid", LAYERS + 1, predictor.experts)
    g = torch.Generator().manual_seed(0)
    for name, value in predictor.calibrator.named_buffers():
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=g)
            value.copy_(noise.cumsum(-1) - 3 if name.endswith("QHI") else noise)
    found_BHE = export_step(predictor, 1, batch).module()(*step_inputs(batch))
    with torch.no_grad():
        p_BTPHE = predictor.probabilities(batch)
    for b, tokens in enumerate(batch.valid_BT.sum(1)):
        torch.testing.assert_close(found_BHE[b], p_BTPHE[b, int(tokens) - 1, 2], rtol=1e-4, atol=1e-6)
