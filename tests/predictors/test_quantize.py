"""Integer weights: torchao's arithmetic, real bytes, the same forecasts after a round trip.

Letters: R rows of a weight, I inputs of a row, G groups.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torchao.quantization.quant_primitives import _fake_quantize_affine

from specgate import load_predictor, training
from specgate.calibration.load import read_checkpoint
from specgate.errors import ConfigError
from specgate.predictors.layers import PointLinear, lookup, weight_at
from specgate.predictors.qat import QuantizationAwareTraining
from specgate.predictors.quantize import (
    dequantise,
    fake_quantise,
    pack,
    pack_nibbles,
    quantise,
    stored_bytes,
    unpack_nibbles,
)
from tests.predictors.support import LEARNED, fitted, loader, make_batch, make_predictor, trainer


def rows(R: int = 6, inputs: int = 70) -> Tensor:
    return torch.randn(R, inputs, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32), (4, None)])
def test_codes_against_a_loop_over_groups(bits: int, group: int | None) -> None:
    weight = rows()
    codes, scale = quantise(weight, bits, group)
    size = group or 70
    assert codes.shape == (6, -(-70 // size) * size)
    high = 2 ** (bits - 1) - 1
    back = dequantise(codes, scale, 70)
    for r in range(6):
        for g in range(scale.shape[1]):
            part = weight[r, g * size : (g + 1) * size]
            step = float(scale[r, g])
            span = max(float(part.max()) / high, float(-part.min()) / (high + 1))
            assert step == pytest.approx(span, rel=2**-8), "as fine as reaches the largest value, in bfloat16"
            expected = (part / step).round().clamp(-high - 1, high)
            torch.testing.assert_close(codes[r, g * size : (g + 1) * size][: len(part)].float(), expected)
            torch.testing.assert_close(back[r, g * size : (g + 1) * size], expected * step)


def test_rows_of_zeros_stay_zeros() -> None:
    codes, scale = quantise(torch.zeros(2, 32), 4, 32)
    assert torch.equal(dequantise(codes, scale, 32), torch.zeros(2, 32))


def test_nibbles_round_trip() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 1)
    packed = pack_nibbles(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 8)
    assert torch.equal(unpack_nibbles(packed), codes)


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_are_those_of_torchao_fake_quantisation(bits: int) -> None:
    """Rounding weights around forward and backward is torchao's fake quantisation with its gradient."""
    torch.manual_seed(0)
    layer, x, group = nn.Linear(64, 48), torch.randn(5, 64), 64 if bits == 8 else 32
    aware = QuantizationAwareTraining(bits)
    exact = layer.weight.detach().clone()
    aware.round(layer)
    out = layer(x)
    out.square().sum().backward()
    aware.restore()
    assert torch.equal(layer.weight, exact)
    weight = exact.clone().requires_grad_()
    _, scale = quantise(exact, bits, group)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    zero = torch.zeros_like(scale, dtype=torch.int32)
    fake = _fake_quantize_affine(weight, (1, group), scale.float(), zero, torch.int32, low, high)
    expected = nn.functional.linear(x, fake, layer.bias)
    torch.testing.assert_close(out, expected)
    expected.square().sum().backward()
    assert layer.weight.grad is not None
    assert weight.grad is not None
    inside = fake.detach().ne(
        high * scale.float().repeat_interleave(group, 1)
    )  # torchao clips the last half step
    torch.testing.assert_close(layer.weight.grad[inside], weight.grad[inside])


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_modules_read_as_rounded_ones(bits: int) -> None:
    torch.manual_seed(0)
    points, table, linear = PointLinear(3, 50, 20), nn.Embedding(80, 36), nn.Linear(96, 32)
    whole = nn.ModuleList([points, table, linear])
    rounded = QuantizationAwareTraining(bits)
    x, ids, y = torch.randn(3, 7, 50), torch.randint(0, 80, (2, 5)), torch.randn(4, 96)
    rounded.round(whole)
    expected = [points(x).detach(), table(ids).detach(), linear(y).detach(), points.at(x[1], 1).detach()]
    rounded.restore()
    pack(whole, bits)
    torch.testing.assert_close([points(x), table(ids), linear(y), points.at(x[1], 1)], expected)
    torch.testing.assert_close(lookup(table, ids), expected[1])
    torch.testing.assert_close(weight_at(points, 2), points.weight[2])
    assert not any(p.requires_grad for n, p in whole.named_parameters() if "original" in n)
    kinds = {value.dtype for name, value in whole.state_dict().items() if name.endswith("original0")}
    assert kinds == {torch.uint8 if bits == 4 else torch.int8}
    assert points.bias_P1.dtype == torch.float32, "biases and small weights stay"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["mlp", "router_residual"])
def test_checkpoint_of_packed_weights(name: str, bits: int, tmp_path: Path) -> None:
    float_file = training.save_predictor(make_predictor(name, width=256), tmp_path / "float.ckpt")
    predictor, batch = fitted(name, width=256), make_batch()
    with torch.no_grad():
        exact = predictor(batch)
    full = stored_bytes(predictor)
    pack(predictor, bits)
    assert stored_bytes(predictor) < full * {8: 0.34, 4: 0.24}[bits]
    file = training.save_predictor(predictor, tmp_path / "packed.ckpt")
    assert file.stat().st_size < 0.5 * float_file.stat().st_size
    loaded = load_predictor(file)
    assert loaded.quantization == {"bits": bits, "group": 32}
    with torch.no_grad():
        found = loaded(batch)
        assert torch.equal(found, predictor(batch))
        torch.testing.assert_close(loaded.step_logits(batch, 0)[0], found[0, -1, 1], rtol=1e-4, atol=1e-4)
    spread = float((found - exact).std() / exact.std())
    assert 0 < spread < {8: 0.02, 4: 0.3}[bits]
    forecast = loaded.predict_next_experts(batch)
    assert forecast.p_HE.isfinite().all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", sorted(LEARNED))
def test_every_learned_predictor_is_read_back_packed(
    name: str, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specgate.predictors.quantize.SMALLEST", 1)  # as if all of it were large
    predictor, batch = fitted(name), make_batch()
    pack(predictor, bits)
    loaded = load_predictor(training.save_predictor(predictor, tmp_path / "packed.ckpt"))
    with torch.no_grad():
        assert torch.equal(loaded(batch), predictor(batch))


def test_reading_packed_weights_needs_no_torchao(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = fitted("mlp", width=64)
    pack(predictor, 4)
    file = training.save_predictor(predictor, tmp_path / "packed.ckpt")
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization.quant_primitives", None)
    with torch.no_grad():
        assert torch.equal(load_predictor(file)(make_batch()), predictor(make_batch()))
    with pytest.raises(ConfigError, match="need torchao"):
        pack(fitted("mlp", width=64), 4)


def run(folder: Path, aware: QuantizationAwareTraining, steps: int, watch: list[Any]) -> Any:
    """A few training steps with the callback; ``watch`` sees weights in the forward and after each step."""
    predictor = make_predictor("mlp", width=64, heads=0)
    weight = predictor.head.first.weight  # type: ignore[union-attr]

    class Watch(L.Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            watch.append(weight.detach().clone())

        def on_train_batch_end(self, *_: Any) -> None:
            watch.append(weight.detach().clone())

    batches = [make_batch(seed=seed) for seed in range(steps)]
    fit = trainer(folder, max_epochs=1, callbacks=[aware, Watch()], limit_val_batches=0)
    fit.fit(predictor, loader(batches))
    return predictor


def test_training_rounds_from_its_start_on_and_steps_exactly(tmp_path: Path) -> None:
    seen: list[Tensor] = []
    aware = QuantizationAwareTraining(4, start=0.5)
    run(tmp_path, aware, 4, seen)
    # Two looks per step, the first with the weights of the forward pass: rounded from step 2 on.
    rounded = [torch.equal(w, fake_quantise(w, 4, -2, 32)) for w in seen]
    values = [len(w[0, :, 0].unique()) for w in seen]
    assert values[4] < values[1]
    assert values[6] < values[3]
    assert values[5] == values[1], "what is kept between steps is exact"
    assert not any(rounded[1::2])
    assert all(not torch.equal(a, b) for a, b in zip(seen[1::2], seen[3::2], strict=False)), "weights move"


def test_a_run_of_unknown_length_rounds_from_the_start(tmp_path: Path) -> None:
    aware, predictor = QuantizationAwareTraining(4, start=0.9), fitted("mlp", width=64)
    before = predictor.head.first.weight.detach().clone()  # type: ignore[union-attr]
    budget = trainer(tmp_path, max_epochs=-1, max_time="00:00:00:01", callbacks=[aware])
    budget.fit_loop.setup_data = lambda: None
    budget.fit_loop.max_batches = float("inf")
    aware.on_train_start(budget, predictor)
    aware.on_train_batch_start(budget, predictor)
    assert not torch.equal(predictor.head.first.weight, before)  # type: ignore[union-attr]


def test_packing_after_training_changes_nothing_that_was_validated(tmp_path: Path) -> None:
    aware, batch = QuantizationAwareTraining(4, start=0.0), make_batch(seed=9)
    predictor = run(tmp_path, aware, 3, []).eval()
    with torch.no_grad():
        aware.round(predictor)
        expected = predictor(batch)
        aware.restore()
        aware.finish(predictor)
        torch.testing.assert_close(predictor(batch), expected)


def test_interrupted_training_leaves_exact_weights() -> None:
    predictor, aware = fitted("mlp", width=64), QuantizationAwareTraining(4)
    before = {name: value.clone() for name, value in predictor.state_dict().items()}
    aware.round(predictor)
    assert any(not torch.equal(value, before[name]) for name, value in predictor.state_dict().items())
    aware.on_exception(None, predictor, KeyboardInterrupt())  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in predictor.state_dict().items())


def test_what_makes_no_sense_is_refused() -> None:
    for values, words in (({"bits": 2}, "bits=2"), ({"start": 1.5}, "start=1.5")):
        with pytest.raises(ConfigError, match=words):
            QuantizationAwareTraining(**values)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="bits=16"):
        pack(nn.Linear(64, 64), 16)
    with pytest.raises(ConfigError, match="bits=2"):
        quantise(rows(), 2, None)


def test_train_py_packs_and_says_so(tiny_traces: dict[str, Path], tmp_path: Path) -> None:
    from tests.test_configs import CONF, composed
    from tests.test_experiments import QUICK, train

    trace = f"data.traces={tiny_traces['olmoe']}"
    cfg = composed(CONF, "train", ["experiment=quantized_int4", trace, *QUICK], tmp_path)
    _, metrics = train(cfg)
    saved = read_checkpoint(Path(metrics["checkpoint"]))
    assert saved["quantization"] == {"bits": 4, "group": 32}
    assert metrics["training_seconds"] > 0
    assert load_predictor(metrics["checkpoint"]).quantization == {"bits": 4, "group": 32}
