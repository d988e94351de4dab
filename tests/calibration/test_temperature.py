"""Temperature scaling: recovers known parameters, never hurts, samples uniformly, survives a checkpoint."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from specgate.calibration.temperature import (
    Reservoir,
    TemperatureScaling,
    minimise,
    sigmoid_nll,
    softmax_nll,
)
from specgate.errors import ConfigError
from specgate.traces.batch import ENTRY, WITHIN, WRAPPED, kind_PH

LAYERS, HORIZONS, EXPERTS = 2, 2, 6
KINDS_PH = kind_PH(LAYERS, HORIZONS, "decode")
Stream = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def honest_stream(link: str, temperature: float, offset: float, batches: int = 12, seed: int = 0) -> Stream:
    """Logits whose true probabilities are link(logits / temperature + offset), with outcomes drawn from
    these.
    """
    generator = torch.Generator().manual_seed(seed)
    stream = []
    for _ in range(batches):
        shape = (8, 16, LAYERS + 1, HORIZONS)
        logits = 3 * torch.randn(*shape, EXPERTS, generator=generator)
        if link == "softmax":
            p = (logits / temperature).softmax(-1)
            used = torch.multinomial(p.view(-1, EXPERTS), 1, generator=generator).view(*shape, 1)
            stream.append((logits, used, torch.ones(shape, dtype=torch.bool)))
        else:  # exactly one expert of two is used: complementary logits make that consistent with sigmoids
            first = torch.rand(shape, generator=generator) < (logits[..., 0] / temperature + offset).sigmoid()
            pair = torch.stack([logits[..., 0], -logits[..., 0] - 2 * offset * temperature], -1)
            stream.append((pair, (~first).long()[..., None], torch.ones(shape, dtype=torch.bool)))
    return stream


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_softmax_temperature_is_recovered(temperature: float) -> None:
    scaling = TemperatureScaling(HORIZONS, "softmax")
    report = scaling.fit(honest_stream("softmax", temperature, 0.0), KINDS_PH)
    assert len(report) == 3 * HORIZONS - 1  # two layers: from layer 0 on, N+2 lies in the next token
    for row in report:
        assert row["temperature"] == pytest.approx(temperature, rel=0.12)
        assert row["offset"] == 0.0
        assert row["nll_after"] <= row["nll_before"]


@pytest.mark.parametrize(("temperature", "offset"), [(2.0, 0.7), (0.6, -0.5)])
def test_sigmoid_temperature_and_offset_are_recovered(temperature: float, offset: float) -> None:
    scaling = TemperatureScaling(HORIZONS, "sigmoid")
    report = scaling.fit(honest_stream("sigmoid", temperature, offset, batches=60), KINDS_PH)
    for row in report:
        assert row["temperature"] == pytest.approx(temperature, rel=0.12)
        assert row["offset"] == pytest.approx(offset, abs=0.12)


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_optimum_agrees_with_scipy(link: str) -> None:
    generator = torch.Generator().manual_seed(4)
    logits_ME = 4 * torch.randn(500, EXPERTS, generator=generator)
    top_k = 1 if link == "softmax" else 2
    used_MK = (logits_ME + 4 * torch.randn(500, EXPERTS, generator=generator)).topk(top_k).indices
    log_t, offset, before, after = minimise(
        softmax_nll if link == "softmax" else sigmoid_nll, logits_ME, used_MK, with_offset=link == "sigmoid"
    )
    x, used = logits_ME.double().numpy(), np.zeros((500, EXPERTS))
    np.put_along_axis(used, used_MK.numpy(), 1, axis=1)

    def nll(parameters: np.ndarray) -> float:
        z = x * np.exp(-parameters[0])
        if link == "softmax":
            return float(np.mean(np.log(np.exp(z).sum(1)) - (z * used).sum(1)))
        z = z + parameters[1]
        return float(np.mean(np.logaddexp(0, z) - z * used))

    best = minimize(nll, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-12})
    assert before == pytest.approx(nll(np.zeros(2)))
    assert after == pytest.approx(best.fun, abs=1e-7)
    assert log_t == pytest.approx(best.x[0], abs=1e-3)
    if link == "sigmoid":
        assert offset == pytest.approx(best.x[1], abs=1e-3)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 10_000), st.sampled_from(["softmax", "sigmoid"]), st.floats(0.01, 60.0), st.integers(1, 3)
)
def test_never_worse_than_the_identity_on_the_fitting_set(
    seed: int, link: str, scale: float, top_k: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_ME = scale * torch.randn(40, EXPERTS, generator=generator)
    used_MK = torch.rand(40, EXPERTS, generator=generator).topk(1 if link == "softmax" else top_k).indices
    loss = softmax_nll if link == "softmax" else sigmoid_nll
    log_t, offset, before, after = minimise(loss, logits_ME, used_MK, with_offset=link == "sigmoid")
    assert after <= before
    assert abs(log_t) <= 3.0
    again = float(
        loss(logits_ME.double() * torch.tensor(-log_t, dtype=torch.float64).exp() + offset, used_MK)
    )
    assert again == pytest.approx(after, abs=1e-9)


def test_a_forecast_that_is_always_right_stays_finite() -> None:
    used_MK = torch.arange(EXPERTS)[:, None]
    logits_ME = torch.full((EXPERTS, EXPERTS), -40.0).scatter(1, used_MK, 40.0)
    for loss, with_offset in ((softmax_nll, False), (sigmoid_nll, True)):
        log_t, offset, before, after = minimise(loss, logits_ME, used_MK, with_offset)
        assert all(np.isfinite([log_t, offset, before, after]))


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_identity_before_fitting(link: str) -> None:
    logits = torch.randn(2, 3, LAYERS + 1, HORIZONS, EXPERTS)
    p = TemperatureScaling(HORIZONS, link)(logits, KINDS_PH)
    torch.testing.assert_close(p, logits.softmax(-1) if link == "softmax" else logits.sigmoid())
    assert TemperatureScaling(HORIZONS, link)(logits.half(), KINDS_PH).dtype == torch.float32


def test_parameters_apply_to_their_kind_and_horizon_only() -> None:
    scaling = TemperatureScaling(HORIZONS, "sigmoid")
    logits = torch.randn(1, 1, LAYERS + 1, HORIZONS, EXPERTS)
    for kind in (WITHIN, WRAPPED, ENTRY):
        for h0 in range(HORIZONS):
            scaling.log_temperature_QH.zero_()
            scaling.log_temperature_QH[kind, h0] = 1.0
            changed = (scaling(logits, KINDS_PH) != logits.sigmoid()).any(-1)[0, 0]
            expected = torch.zeros_like(changed)
            expected[:, h0] = KINDS_PH[:, h0] == kind
            assert torch.equal(changed, expected)


def test_only_valid_events_of_that_kind_and_horizon_are_fitted() -> None:
    stream = honest_stream("softmax", 2.0, 0.0)
    entry_PH = KINDS_PH == ENTRY
    masked = [(x, used, valid & entry_PH & (torch.arange(HORIZONS) == 0)) for x, used, valid in stream]
    scaling = TemperatureScaling(HORIZONS, "softmax")
    report = scaling.fit(masked, KINDS_PH)
    assert [(row["kind"], row["horizon"]) for row in report] == [("entry", 1)]
    assert int(scaling.events_QH.sum()) == report[0]["events"] == 12 * 8 * 16
    untouched = scaling.log_temperature_QH.clone()
    untouched[ENTRY, 0] = 0
    assert not untouched.any()


def test_parameters_survive_a_weights_only_checkpoint() -> None:
    scaling = TemperatureScaling(HORIZONS, "sigmoid")
    scaling.fit(honest_stream("sigmoid", 2.0, 0.7, batches=2), KINDS_PH)
    file = io.BytesIO()
    torch.save(scaling.state_dict(), file)
    file.seek(0)
    again = TemperatureScaling(HORIZONS, "sigmoid")
    again.load_state_dict(torch.load(file, weights_only=True))
    logits = torch.randn(1, 2, LAYERS + 1, HORIZONS, EXPERTS)
    assert torch.equal(again(logits, KINDS_PH), scaling(logits, KINDS_PH))


def test_fit_works_inside_inference_mode_and_is_deterministic() -> None:
    def once() -> torch.Tensor:
        scaling = TemperatureScaling(HORIZONS, "softmax")
        with torch.inference_mode():
            scaling.fit(iter(honest_stream("softmax", 2.0, 0.0, batches=3)), KINDS_PH, cells=600, seed=3)
        return scaling.log_temperature_QH

    assert torch.equal(once(), once())


def test_reservoir_is_bounded_and_uniform() -> None:
    counts = torch.zeros(200)
    for seed in range(300):
        sample = Reservoir(20, torch.Generator().manual_seed(seed))
        for start in range(0, 200, 23):
            ids = torch.arange(start, min(start + 23, 200))
            sample.add(ids[:, None].float(), ids[:, None])
        assert len(sample.used_MK) == 20
        assert torch.equal(sample.logits_ME[:, 0].long(), sample.used_MK[:, 0])
        assert len(set(sample.used_MK[:, 0].tolist())) == 20
        counts[sample.used_MK[:, 0]] += 1
    # Each event is kept with probability 0.1: 30 +- 5.2 times of 300; early and late events alike.
    assert counts.min() > 8
    assert counts.max() < 56
    assert abs(float(counts[:100].sum() - counts[100:].sum())) < 6 * (300 * 20 * 0.25) ** 0.5


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'relu'.*softmax, sigmoid"):
        TemperatureScaling(HORIZONS, "relu")

    def nothing() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        yield from ()

    with pytest.raises(ConfigError, match="cells=0"):
        TemperatureScaling(HORIZONS, "softmax").fit(nothing(), KINDS_PH, cells=0)
    assert TemperatureScaling(HORIZONS, "softmax").fit(nothing(), KINDS_PH) == []
