"""The oracle against dense Gaussian algebra, against its own prior, and through the samplers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.oracle import Oracle, find_objects, prior_of
from hires.sampling.noise import StepNoise
from hires.sampling.samplers import SAMPLERS, karras
from hires.tiling.denoise import tiled
from hires.tiling.geometry import Size, make_grid

SMALL = Oracle(native=8, spread=1.0, amplitude=2.0, presence=0.7)
FULL = Oracle()
QUIET = StepNoise(source=lambda step, part=0: torch.zeros(1))


def covariance(oracle: Oracle) -> Tensor:
    """The field's covariance (n^2, n^2), cosine by cosine."""
    n = oracle.native
    k = torch.fft.fftfreq(n, dtype=torch.float64)
    power = (k[:, None] ** 2 + k[None, :] ** 2 + n**-2.0) ** (-oracle.beta / 2)
    power = power * oracle.variance / power.mean()
    cells = torch.cartesian_prod(torch.arange(n), torch.arange(n)).double()
    apart = cells[:, None] - cells[None, :]
    phase = 2 * math.pi * (apart[..., 0, None] * k.repeat_interleave(n) + apart[..., 1, None] * k.repeat(n))
    return (torch.cos(phase) * power.flatten()).mean(-1)


def every_object(oracle: Oracle) -> Tensor:
    """The object at each cell of the window, (n^2, n^2)."""
    n = oracle.native
    cells = torch.cartesian_prod(torch.arange(n), torch.arange(n)).double()
    apart = (cells[:, None] - cells[None, :]).abs()
    return oracle.object_at(torch.minimum(apart, n - apart).norm(dim=-1))


def posterior_mean(oracle: Oracle, x: Tensor, sigma: float) -> Tensor:
    """E[x0 | x] by solving, for every position and none, the Gaussian it leaves; x (n^2,) float64."""
    cov, means = covariance(oracle), every_object(oracle)
    means = torch.cat([means, torch.zeros_like(means[:1])])
    noisy = cov + sigma**2 * torch.eye(len(cov), dtype=torch.float64)
    density = torch.distributions.MultivariateNormal(torch.zeros_like(x), noisy)
    ways = torch.full((len(means),), oracle.presence / len(cov), dtype=torch.float64)
    ways[-1] = 1 - oracle.presence
    weights = torch.softmax(density.log_prob(x - means) + ways.log(), 0)
    return weights @ (means + torch.linalg.solve(noisy, (x - means).T).T @ cov)


@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0, 4.0, 30.0])
def test_the_estimate_is_the_posterior_mean_of_dense_gaussian_algebra(sigma: float) -> None:
    clean, _ = SMALL.draw(6, 3)
    x = clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = SMALL(x, sigma)
    for index in range(len(x)):
        wanted = posterior_mean(SMALL, x[index].flatten(), sigma)
        torch.testing.assert_close(found[index].flatten(), wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.slow
def test_the_estimate_is_what_weighted_draws_of_the_prior_average_to() -> None:
    """Monte Carlo, with no formula but Bayes': E[x0 | x] = sum_i x0_i p(x | x0_i) / sum_i p(x | x0_i)."""
    oracle, sigma = Oracle(native=4, spread=0.7, amplitude=1.5, presence=0.6), 1.2
    clean, _ = oracle.draw(1, 5)
    x = clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    draws, _ = oracle.draw(200_000, 7)
    weights = torch.softmax(-((x - draws) ** 2).sum((1, 2, 3)) / (2 * sigma**2), 0)
    average = (weights[:, None, None, None] * draws).sum(0, keepdim=True)
    error = (weights**2).sum().sqrt() * draws.std()  # of the average, about
    assert float(error) < 0.05
    assert float((oracle(x, sigma) - average).abs().max()) < 5 * float(error)


def test_its_error_is_orthogonal_to_whatever_is_seen() -> None:
    """E[(x0 - D(x)) f(x)] = 0 for every f: what makes an estimate the posterior mean. A linear filter fails it."""
    sigma = 0.6
    clean, _ = FULL.draw(256, 8)
    x = clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    prior = prior_of(FULL, Size(64, 64))
    linear = torch.fft.irfft2(torch.fft.rfft2(x) * prior.spectrum / (prior.spectrum + sigma**2), s=(64, 64))
    for seen in (x, x**3, x.clamp_min(1.5), torch.tanh(FULL(x, sigma))):
        products = ((clean - FULL(x, sigma)) * seen).mean((1, 2, 3))
        assert abs(float(products.mean())) < 4 * float(products.std()) / 16
    peaks = ((clean - linear) * x.clamp_min(1.5)).mean((1, 2, 3))
    assert abs(float(peaks.mean())) > 8 * float(peaks.std()) / 16
    assert ((clean - FULL(x, sigma)) ** 2).mean() < 0.9 * ((clean - linear) ** 2).mean()


def test_it_moves_and_turns_with_what_it_sees() -> None:
    x = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    whole = FULL(x, 1.0)
    for change in (lambda t: t.roll((5, -17), (-2, -1)), lambda t: t.mT, lambda t: t.flip(-1), lambda t: t.rot90(1, (-2, -1))):
        torch.testing.assert_close(FULL(change(x), 1.0), change(whole), rtol=0, atol=1e-10)


def test_its_ends_are_the_data_and_the_prior() -> None:
    clean, _ = FULL.draw(3, 2)
    torch.testing.assert_close(FULL(clean, 1e-4), clean, rtol=0, atol=1e-3)
    far = FULL(torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 1e5, 1e5)
    mean = FULL.presence * prior_of(FULL, Size(64, 64)).object[0, 0].real / 64**2
    torch.testing.assert_close(far, torch.full_like(far, float(mean)), rtol=0, atol=2e-3)


def test_draws_have_the_priors_spectrum_and_objects() -> None:
    clean, places = FULL.draw(400, 11)
    assert float((places[:, 0] >= 0).double().mean()) == pytest.approx(0.95, abs=0.035)
    none = clean[places[:, 0] < 0]
    power = (torch.fft.fft2(none).abs() ** 2).mean((0, 1)) / 64**2
    spectrum = prior_of(FULL, Size(64, 64)).spectrum
    for band in (slice(1, 4), slice(4, 10), slice(10, 31)):
        assert float((power[band, :33] / spectrum[band]).mean()) == pytest.approx(1.0, abs=0.1)
    for picture, place in zip(clean[:40], places[:40].tolist(), strict=True):
        found = find_objects(picture[0], FULL)
        inside = place[0] >= 0 and all(12 <= p < 52 for p in place)
        assert not inside or any(abs(r - place[0]) <= 1 and abs(c - place[1]) <= 1 for r, c in found)


def test_a_sampler_on_a_window_draws_the_prior_at_most_one_object() -> None:
    noise = torch.randn(80, 1, 64, 64, generator=torch.Generator().manual_seed(5)) * 20
    drawn = SAMPLERS["heun"](FULL, noise, karras(30, 0.02, 20.0), None, QUIET)
    counts = torch.tensor([len(find_objects(picture[0], FULL)) for picture in drawn])
    prior = torch.tensor([len(find_objects(picture[0], FULL)) for picture in FULL.draw(200, 6)[0]])
    assert counts.max() <= 2  # one that lies across a mirrored edge may be seen twice; in draws of the prior too
    assert abs(float(counts.double().mean() - prior.double().mean())) < 0.25
    power, wanted = (torch.fft.rfft2(p.double()).abs().square().mean((0, 1)) for p in (drawn, FULL.draw(200, 7)[0]))
    for band in (slice(1, 4), slice(4, 10), slice(10, 31)):
        assert float(power[band].mean() / wanted[band].mean()) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("shape", [(64, 64), (65, 64), (96, 131)])
def test_a_canvas_is_seen_as_convolutions_see_it_and_a_window_exactly(shape: tuple[int, int]) -> None:
    logits = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 5
    found = FULL.present(logits)
    row, col = 10, shape[1] - 5
    near_rows = [(row + i) % shape[0] for i in range(-31, 33)]
    near_cols = [(col + i) % shape[1] for i in range(-31, 33)]
    rivals = logits[0, 0][near_rows][:, near_cols].exp().sum()
    wanted = logits[0, 0, row, col].exp() / (1 + rivals)
    torch.testing.assert_close(found[0, 0, row, col], wanted, rtol=1e-9, atol=0)
    assert found.max() <= 1
    if shape == (64, 64):
        assert float(found.sum()) < 1


def test_windows_that_do_not_know_each_other_repeat_the_object_and_a_relay_does_not() -> None:
    noise = torch.randn(1, 1, 192, 192, generator=torch.Generator().manual_seed(6))
    sigmas = karras(30, 0.02, 20.0)
    windows = tiled(FULL, make_grid(Size(192, 192), Size(64, 64), 32), batch=25)
    assert len(find_objects(SAMPLERS["euler"](windows, noise * 20, sigmas, None, QUIET)[0, 0], FULL)) >= 4
    clean, _ = FULL.draw(1, 12)
    large = torch.nn.functional.interpolate(clean.float(), size=(192, 192), mode="bicubic", antialias=True)
    late = sigmas[sigmas <= 1.0]
    relay = SAMPLERS["euler"](windows, large + noise * late[0], late, None, QUIET)
    assert len(find_objects(relay[0, 0], FULL)) == 0


def test_counting_finds_what_was_put_there() -> None:
    size = Size(150, 201)
    picture = FULL.variance**0.5 * 0.3 * torch.randn(150, 201, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    single = torch.fft.irfft2(prior_of(FULL, size).object, s=(150, 201))
    places = [(30, 40), (30, 75), (110, 60), (90, 170)]
    for place in places:
        picture = picture + single.roll(place, (0, 1))
    assert find_objects(picture, FULL) == sorted(places)
    assert find_objects(picture - picture, FULL) == []


def test_a_canvas_below_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="smaller than the oracle's window of 64"):
        FULL(torch.zeros(1, 1, 63, 80), 1.0)
