"""Vector scaling: agrees with scipy, falls back to the temperature, survives a checkpoint."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from specgate.calibration.base import Reservoir
from specgate.calibration.temperature import TemperatureScaling
from specgate.calibration.vector import VectorScaling
from specgate.traces.batch import WITHIN, kind_PH

LAYERS, HORIZONS, EXPERTS = 2, 2, 4
KINDS_PH = kind_PH(LAYERS, HORIZONS, "decode")
Stream = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def biased_stream(link: str, offset_E: torch.Tensor, batches: int = 10, seed: int = 0) -> Stream:
    """Logits whose truth is shifted by ``offset_E``; for sigmoid K = 2 of 4 are used, roughly."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(batches):
        shape = (8, 16, LAYERS + 1, HORIZONS)
        logits = 2 * torch.randn(*shape, EXPERTS, generator=generator)
        true = logits + offset_E
        if link == "softmax":
            used = torch.multinomial(true.softmax(-1).view(-1, EXPERTS), 1, generator=generator)
            made.append((logits, used.view(*shape, 1), torch.ones(shape, dtype=torch.bool)))
        else:
            noise = -torch.log(-torch.log(torch.rand(true.shape, generator=generator)))
            made.append((logits, (true + noise).topk(2).indices, torch.ones(shape, dtype=torch.bool)))
    return made


def test_softmax_offsets_are_recovered() -> None:
    offset_E = torch.tensor([0.8, -0.8, 0.4, -0.4])
    scaling = VectorScaling(HORIZONS, "softmax", LAYERS + 1, EXPERTS, prior=1.0)
    scaling.fit(biased_stream("softmax", offset_E, batches=40), KINDS_PH)
    found_E = scaling.expert_offset_PHE[1, 0] - scaling.expert_offset_PHE[1, 0].mean()
    torch.testing.assert_close(found_E, offset_E, atol=0.15, rtol=0)
    assert scaling.log_scale_PHE.abs().max() < 0.2


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_posterior_agrees_with_scipy(link: str) -> None:
    stream = biased_stream(link, torch.tensor([1.0, 0.0, -1.0, 0.5]), batches=2)
    sample = Reservoir(10_000, torch.Generator().manual_seed(0))
    for logits, used, _ in stream:
        sample.add(logits[..., 1, 0, :].flatten(0, 1), used[..., 1, 0, :].flatten(0, 1))
    prior, log_temperature, offset = 0.3, 0.2, 0.1 if link == "sigmoid" else 0.0
    scaling = VectorScaling(HORIZONS, link, LAYERS + 1, EXPERTS, prior=prior)
    scale_E, offset_E, _, fitted = scaling._fit_point(sample, log_temperature, offset)
    x, truth = sample.logits_ME.double().numpy(), np.zeros((len(sample.logits_ME), EXPERTS))
    np.put_along_axis(truth, sample.used_MK.numpy(), 1, axis=1)

    def nll_sum(parameters: np.ndarray) -> float:
        z = x * np.exp(-parameters[:EXPERTS]) + parameters[EXPERTS:]
        if link == "softmax":
            return float((np.log(np.exp(z).sum(1)) - (z * truth).sum(1)).sum())
        return float((np.logaddexp(0, z) - z * truth).sum())

    centre = np.repeat([log_temperature, offset], EXPERTS)

    def negative_log_posterior(parameters: np.ndarray) -> float:
        return nll_sum(parameters) + 0.5 * ((parameters - centre) ** 2).sum() / prior**2

    best = minimize(negative_log_posterior, centre, method="BFGS", options={"gtol": 1e-6})
    np.testing.assert_allclose(torch.cat([scale_E, offset_E]).numpy(), best.x, atol=2e-3)
    per = len(x) * (1 if link == "softmax" else EXPERTS)
    assert fitted == pytest.approx(nll_sum(best.x) / per, abs=1e-5)


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_a_tight_prior_gives_the_temperature(link: str) -> None:
    stream = biased_stream(link, torch.zeros(EXPERTS), batches=4)
    vector = VectorScaling(HORIZONS, link, LAYERS + 1, EXPERTS, prior=1e-4)
    report = vector.fit(stream, KINDS_PH, cells=10**6)
    assert KINDS_PH[1, 0] == WITHIN
    (row,) = [r for r in report if (r["kind"], r["horizon"]) == ("within", 1)]
    expected_E = torch.full((EXPERTS,), row["temperature"])
    torch.testing.assert_close(vector.log_scale_PHE[1, 0].exp(), expected_E, atol=1e-3, rtol=0)
    before = TemperatureScaling(HORIZONS, link)
    logits = torch.randn(2, 3, LAYERS + 1, HORIZONS, EXPERTS)
    torch.testing.assert_close(
        VectorScaling(HORIZONS, link, LAYERS + 1, EXPERTS)(logits, KINDS_PH), before(logits, KINDS_PH)
    )


def test_it_fits_what_one_temperature_cannot_and_survives_a_checkpoint() -> None:
    offset_E = torch.tensor([1.5, -1.5, 0.0, 0.0])
    stream, fresh = biased_stream("sigmoid", offset_E), biased_stream("sigmoid", offset_E, seed=9)
    vector = VectorScaling(HORIZONS, "sigmoid", LAYERS + 1, EXPERTS)
    one = TemperatureScaling(HORIZONS, "sigmoid")
    report = vector.fit(stream, KINDS_PH)
    one.fit(stream, KINDS_PH)
    assert all(row["nll_after"] < row["nll_before"] for row in report)
    assert vector.fitted

    def brier(p: torch.Tensor, used: torch.Tensor) -> float:
        truth = torch.zeros_like(p).scatter_(-1, used, 1.0)
        return float((p - truth)[..., KINDS_PH >= 0, :].square().mean())

    logits, used, _ = fresh[0]
    assert brier(vector(logits, KINDS_PH), used) < 0.97 * brier(one(logits, KINDS_PH), used)
    file = io.BytesIO()
    torch.save(vector.state_dict(), file)
    file.seek(0)
    again = VectorScaling(HORIZONS, "sigmoid", LAYERS + 1, EXPERTS)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(again(logits, KINDS_PH), vector(logits, KINDS_PH))
    half = vector(logits.half(), KINDS_PH)
    assert half.dtype == torch.float32
