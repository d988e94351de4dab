"""What the speculation kernel does not run or take is refused in one sentence."""

from __future__ import annotations

import pytest
import torch

from specgate.errors import ConfigError
from specgate.predictors.mlp import MLP
from specgate.predictors.speculation import speculation_parts
from specgate.runtime import native
from specgate.runtime.speculate import Speculator
from specgate.traces.batch import RoutingBatch
from tests.predictors import support
from tests.runtime.speculation import LOOKAHEAD, MLP_, RESIDUAL, Case, make_predictor

pytestmark = pytest.mark.skipif(not native.available(), reason="the native core was not compiled")


def test_predictors_that_it_does_not_run_are_refused() -> None:
    class Doubled(MLP):
        def forward(self, batch: RoutingBatch) -> torch.Tensor:
            return 2 * super().forward(batch)

    sizes: Case = {"layers": 3, "experts": 6, "top_k": 2, "vocab_size": 11, "phase": "decode"}
    with pytest.raises(ConfigError, match="does not run 'mlp': choose one of router_lookahead"):
        speculation_parts(Doubled(**sizes))
    with pytest.raises(ConfigError, match="does not run 'token_table'"):
        speculation_parts(support.make_predictor("token_table"))
    with pytest.raises(ConfigError, match="phase=prefill and the speculation kernel runs while decoding"):
        speculation_parts(make_predictor(**MLP_, phase="prefill"))
    with pytest.raises(ConfigError, match="does not calibrate by 'isotonic'"):
        speculation_parts(make_predictor(**LOOKAHEAD, calibration="isotonic"))
    with pytest.raises(
        ConfigError, match=r"torch.float16 is unknown: choose torch.float32 or torch.bfloat16"
    ):
        speculation_parts(make_predictor(**LOOKAHEAD), dtype=torch.float16)
    diverged = make_predictor(**MLP_)
    diverged.head.last.weight.data[0, 0, 0] = torch.nan  # type: ignore[union-attr,operator,index]
    with pytest.raises(ConfigError, match=r"not finite \(last\)"):
        speculation_parts(diverged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": None}, "launch at layer 0 has no input"),
        ({"experts": None}, "lacks experts"),
        ({"hidden": torch.zeros(1, 7)}, r"hidden \(1, 7\).*pass \(1, 8\)"),
        ({"hidden": torch.zeros(1, 8, dtype=torch.float64)}, "float32 or bfloat16 or float16"),
        ({"experts": torch.zeros(2, 2, dtype=torch.int64)}, r"experts \(2, 2\)"),
        ({"hidden": torch.zeros(1, 16)[:, ::2].expand(1, 8)}, "not contiguous"),
        ({"layer": 3}, r"layer=3 is outside -1\.\.2"),
        (
            {"hidden": torch.zeros(2, 8), "experts": torch.zeros(2, 2).long(), "weights": torch.zeros(2, 2)},
            "batch=2",
        ),
        ({"layer": -1}, "pass token_ids at layer -1"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: Case, message: str) -> None:
    speculator = Speculator(speculation_parts(make_predictor(**RESIDUAL)))
    inputs: Case = {
        "hidden": torch.zeros(1, 8),
        "experts": torch.zeros(1, 2).long(),
        "weights": torch.zeros(1, 2),
    }
    inputs = {"layer": 0} | inputs | change
    with pytest.raises(ConfigError, match=message):
        speculator.launch(**inputs)


def test_settings_that_make_no_sense_are_refused() -> None:
    parts = speculation_parts(make_predictor(**LOOKAHEAD))
    with pytest.raises(ConfigError, match=r"batch=0"):
        Speculator(parts, batch=0)
    with pytest.raises(ConfigError, match=r"threshold 1\.5 is no probability"):
        Speculator(parts, threshold=1.5)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device cuda is not there: choose device=cpu"):
            Speculator(parts, device="cuda")
        if native.backend() == "native+cuda":
            with pytest.raises(ConfigError, match="CUDA device 0 of 0 that are there"):
                Speculator(parts, backend="cuda")
    with pytest.raises(ConfigError, match="speculation on 'tpu' is not in this build"):
        Speculator(parts, backend="tpu")
    speculator = Speculator(parts)
    with pytest.raises(ConfigError, match="comes out of order"):
        speculator.read(0)
    del parts.tensors["router"]
    with pytest.raises(ConfigError, match="lacks the tensor 'router'"):
        Speculator(parts)
    parts.sizes["colour"] = 1
    with pytest.raises(ConfigError, match="knows no 'colour'"):
        Speculator(parts)
