"""Guides against closed forms: what is promised of low bands, costs and policies."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hires.errors import RequestError
from hires.protocols import LowPass
from hires.refine.low_pass import Area, Fourier, Wavelet
from hires.refine.structure import centre_pulled, constant, masked, power_ramp, structure_guided, variance_ramp
from hires.sampling.conditioning import Conditioning
from hires.sampling.guidance import Guidance, Regions, guided, rescaled, within
from hires.sampling.noise import StepNoise
from hires.sampling.samplers import SAMPLERS
from hires.tiling.denoise import tiled
from hires.tiling.geometry import Size, make_grid


def canvas(h: int, w: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(batch, 4, h, w, generator=torch.Generator().manual_seed(h * 1000 + w + 77 * seed))


def shrinking(x: Tensor, sigma: float, cond: object) -> Tensor:
    return torch.tanh(x) / (1 + sigma**2)


class Prompted:
    """An estimate that depends on the prompt (its tokens' mean); remembers the batch of every call."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, sigma: float, cond: Conditioning) -> Tensor:
        self.batches.append(len(x))
        push = cond.tokens.mean((1, 2))[:, None, None, None]
        return torch.tanh(x + push) / (1 + sigma) + push * torch.cos(3 * x)


def prompt(value: float, batch: int = 1) -> Conditioning:
    return Conditioning(tokens=torch.full((batch, 2, 3), value))


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 70), st.integers(3, 70), st.sampled_from([Fourier(0.1), Fourier(0.25), Wavelet(1), Wavelet(3, 1)]))
def test_a_whole_pull_by_a_projector_gives_the_low_band_of_the_reference(h: int, w: int, low_pass: LowPass) -> None:
    reference, x = canvas(h, w), canvas(h, w, 2, seed=1)
    result = structure_guided(shrinking, reference, constant(1.0), low_pass)(x, 0.7, None)
    torch.testing.assert_close(low_pass(result), low_pass(reference).expand_as(result), rtol=0, atol=1e-5)
    high = shrinking(x, 0.7, None)
    torch.testing.assert_close(result - low_pass(result), high - low_pass(high), rtol=0, atol=1e-5)  # detail is the model's


def test_half_a_pull_goes_half_the_way_and_none_is_the_model_bit_for_bit() -> None:
    reference, x, low_pass = canvas(31, 45), canvas(31, 45, seed=1), Area(4)
    estimate = shrinking(x, 0.7, None)
    half = structure_guided(shrinking, reference, constant(0.5), low_pass)(x, 0.7, None)
    wanted = estimate + 0.5 * (low_pass(reference) - low_pass(estimate))
    torch.testing.assert_close(half, wanted, rtol=0, atol=1e-6)
    assert torch.equal(structure_guided(shrinking, reference, constant(0.0), low_pass)(x, 0.7, None), estimate)


def test_a_sampler_under_a_whole_pull_ends_at_the_references_low_band() -> None:
    reference, low_pass = canvas(24, 37), Fourier(0.12)
    sigmas = torch.tensor([3.0, 1.5, 0.8, 0.3, 0.0])
    for name in ("euler", "heun", "dpmpp_2m"):
        denoise = structure_guided(shrinking, reference, constant(1.0), low_pass)
        end = SAMPLERS[name](
            denoise, canvas(24, 37, seed=2) * 3, sigmas, None, StepNoise(source=lambda step, part=0: torch.zeros(1))
        )
        torch.testing.assert_close(low_pass(end), low_pass(reference), rtol=0, atol=2e-5)


def test_ramps_begin_at_one_and_end_at_none() -> None:
    for ramp in (power_ramp(3.0), power_ramp(3.0, 0.25), variance_ramp(3.0)):
        values = [ramp(s) for s in (5.0, 3.0, 1.0, 0.3, 0.01)]
        assert values[:2] == pytest.approx([1.0, 1.0]) and values == sorted(values, reverse=True)
        assert ramp(0.0) == 0.0
    assert power_ramp(2.0, 0.5)(0.5) == pytest.approx(0.5)
    abar, start = 1 / (1 + 0.5**2), 1 / (1 + 2.0**2)
    assert variance_ramp(2.0)(0.5) == pytest.approx((1 - abar) / (1 - start))


def test_a_centre_pull_is_supirs() -> None:
    reference, x = canvas(19, 26), canvas(19, 26, seed=1)
    pull = centre_pulled(shrinking, reference, 14.6, power=4.0, sigma_least=0.05)
    estimate = shrinking(x, 7.3, None)
    torch.testing.assert_close(pull(x, 7.3, None), estimate - (estimate - reference) * 0.5**4)
    torch.testing.assert_close(pull(x, 20.0, None), reference)
    assert torch.equal(pull(x, 0.05, None), shrinking(x, 0.05, None))


def test_what_a_mask_leaves_out_ends_at_what_is_known() -> None:
    known, drawn = canvas(23, 35), torch.zeros(1, 1, 23, 35)
    drawn[..., 5:12, 7:21] = 1.0
    denoise = masked(shrinking, known, drawn)
    x, free = canvas(23, 35, seed=1), drawn.bool().expand(1, 4, 23, 35)
    found = denoise(x, 0.6, None)
    assert torch.equal(found[~free], known[~free])
    torch.testing.assert_close(found[free], shrinking(x, 0.6, None)[free], rtol=0, atol=1e-6)
    sigmas = torch.tensor([2.0, 1.0, 0.4, 0.0])
    end = SAMPLERS["dpmpp_2m"](denoise, known + 2 * x, sigmas, None, StepNoise(source=lambda step, part=0: torch.zeros(1)))
    torch.testing.assert_close(end[~free], known[~free], rtol=0, atol=1e-5)
    assert (end[free] - known[free]).abs().mean() > 0.1


@pytest.mark.parametrize("low_pass", [None, Area(4), Fourier(0.1)])
def test_equal_weights_are_classifier_free_guidance(low_pass: LowPass | None) -> None:
    x, network = canvas(29, 43), Prompted()
    split = guided(network, prompt(-0.3), Guidance(low=7.5, high=7.5, low_pass=low_pass))(x, 0.5, prompt(0.4))
    with_prompt, without = network(x, 0.5, prompt(0.4)), network(x, 0.5, prompt(-0.3))
    assert torch.equal(split, without + 7.5 * (with_prompt - without))


def test_split_weights_act_on_their_own_bands() -> None:
    x, network, low_pass = canvas(29, 43), Prompted(), Fourier(0.1)
    result = guided(network, prompt(-0.3), Guidance(low=2.0, high=9.0, low_pass=low_pass))(x, 0.5, prompt(0.4))
    with_prompt, without = network(x, 0.5, prompt(0.4)), network(x, 0.5, prompt(-0.3))
    delta = (with_prompt - without).double()
    low = low_pass(delta.float()).double()
    torch.testing.assert_close(result.double(), without.double() + 2 * low + 9 * (delta - low), rtol=0, atol=2e-5)
    torch.testing.assert_close(low_pass(result), low_pass(without + 2 * (with_prompt - without)), rtol=0, atol=2e-5)


def test_a_low_weight_of_one_keeps_the_prompts_own_low_band() -> None:
    x, network, low_pass = canvas(29, 43), Prompted(), Wavelet(1)
    result = guided(network, prompt(-0.3), Guidance(low=1.0, high=7.5, low_pass=low_pass))(x, 0.5, prompt(0.4))
    torch.testing.assert_close(low_pass(result), low_pass(network(x, 0.5, prompt(0.4))), rtol=0, atol=2e-5)


def test_rescale_is_lin_et_al() -> None:
    estimate, conditional = canvas(21, 33, 2) * 5 + 1, canvas(33, 21, 2).mT * 2
    for share in (0.0, 0.7, 1.0):
        found = rescaled(estimate, conditional, share)
        for i in range(2):  # every picture by its own deviations
            factor = conditional[i].double().std() / estimate[i].double().std()
            wanted = share * factor * estimate[i].double() + (1 - share) * estimate[i].double()
            torch.testing.assert_close(found[i].double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rescaled(estimate, conditional, 1.0).std((1, 2, 3)), conditional.std((1, 2, 3)))


def test_outside_its_interval_the_prompt_stands_alone_and_costs_half() -> None:
    x, network = canvas(22, 35, 2), Prompted()
    cond, uncond = prompt(0.4, 2), prompt(-0.3, 2)
    policy = Guidance(low=7.0, high=7.0, rescale=0.5, interval=(0.3, 2.0))
    denoise = guided(network, uncond, policy)
    for sigma, doubled in ((3.0, False), (2.0, True), (1.0, True), (0.3, False), (0.1, False)):
        network.batches.clear()
        found = denoise(x, sigma, cond)
        assert network.batches == [4 if doubled else 2], sigma
        assert policy.needs_uncond(sigma) == doubled
        if not doubled:
            assert torch.equal(found, network(x, sigma, cond))


def test_weights_of_one_cost_one_estimate_always() -> None:
    x, network = canvas(22, 35), Prompted()
    guided(network, prompt(-0.3), Guidance(low=1.0, high=1.0))(x, 1.0, prompt(0.4))
    assert network.batches == [1] and not Guidance(low=1.0, high=1.0).needs_uncond(1.0)


def test_regions_draw_where_their_masks_are_and_cost_one_estimate_each() -> None:
    x, network, low_pass = canvas(22, 35, 2), Prompted(), Fourier(0.1)
    left, soft = torch.zeros(1, 1, 22, 35), torch.rand(2, 1, 22, 35, generator=torch.Generator().manual_seed(3)) * 0.5
    left[..., :12] = 0.5
    cond, uncond, first, second = (prompt(v, 2) for v in (0.4, -0.3, 0.9, -1.1))
    regions = Regions(conds=(first, second), masks=(left, soft))
    policy = Guidance(low=2.0, high=5.0, low_pass=low_pass, interval=(0.3, 2.0))
    found = guided(network, uncond, policy, regions)(x, 1.0, cond)
    assert network.batches == [8]
    mixed = (1 - left - soft) * network(x, 1.0, cond) + left * network(x, 1.0, first) + soft * network(x, 1.0, second)
    torch.testing.assert_close(found, policy.combined(mixed, network(x, 1.0, uncond)), rtol=0, atol=1e-5)
    network.batches.clear()
    outside = guided(network, uncond, policy, regions)(x, 0.1, cond)
    assert network.batches == [6]
    late = (1 - left - soft) * network(x, 0.1, cond) + left * network(x, 0.1, first) + soft * network(x, 0.1, second)
    torch.testing.assert_close(outside, late, rtol=0, atol=1e-5)
    whole = Regions(conds=(first,), masks=(torch.ones(1, 1, 22, 35),))
    only = guided(network, uncond, Guidance(low=1.0, high=1.0), whole)(x, 1.0, cond)
    torch.testing.assert_close(only, network(x, 1.0, first), rtol=0, atol=1e-6)


def test_a_choice_by_noise_level_evaluates_only_what_it_chooses() -> None:
    called: list[str] = []

    def named(name: str):  # type: ignore[no-untyped-def]
        def denoise(x: Tensor, sigma: float, cond: object) -> Tensor:
            called.append(name)
            return x

        return denoise

    denoise = within(named("in"), named("out"), 0.5, 1.0)
    for sigma in (1.5, 1.0, 0.7, 0.5):
        denoise(torch.zeros(1, 1, 2, 2), sigma, None)
    assert called == ["out", "in", "in", "out"]


def test_a_guided_tiled_estimate_is_a_plain_loops() -> None:
    """anchored(guided(tiled(D))) against loops over tiles in float64, with boxes, weights and bands written out."""
    h, w, tile, stride = 37, 53, 16, 12
    x, reference, network, low_pass = canvas(h, w), canvas(h, w, seed=3), Prompted(), Fourier(0.1)
    grid = make_grid(Size(h, w), Size(tile, tile), tile - stride)
    policy = Guidance(low=3.0, high=6.0, low_pass=low_pass)
    on_canvas = tiled(network, grid, batch=3, kind="linear")
    denoise = structure_guided(guided(on_canvas, prompt(-0.3), policy), reference, constant(0.4), low_pass)

    def fused(cond: Conditioning) -> Tensor:
        total, weight = torch.zeros(1, 4, h, w, dtype=torch.float64), torch.zeros(h, w, dtype=torch.float64)
        triangle = torch.tensor([min(i + 1, tile - i) for i in range(tile)], dtype=torch.float64)
        for top in grid.tops:
            for left in grid.lefts:
                part = x[..., top : top + tile, left : left + tile]
                shape = triangle[:, None] * triangle[None, :]
                total[..., top : top + tile, left : left + tile] += shape * network(part, 0.5, cond).double()
                weight[top : top + tile, left : left + tile] += shape
        return total / weight

    def low(picture: Tensor) -> Tensor:
        twice = torch.cat([picture, picture.flip(-2)], -2)
        twice = torch.cat([twice, twice.flip(-1)], -1)
        radius = torch.hypot(torch.fft.fftfreq(2 * h)[:, None].double(), torch.fft.fftfreq(2 * w)[None, :].double())
        return torch.fft.ifft2(torch.fft.fft2(twice) * (radius <= 0.1)).real[..., :h, :w]

    delta = fused(prompt(0.4)) - fused(prompt(-0.3))
    wanted = fused(prompt(-0.3)) + 3 * low(delta) + 6 * (delta - low(delta))
    wanted = wanted + 0.4 * (low(reference.double()) - low(wanted))
    torch.testing.assert_close(denoise(x, 0.5, prompt(0.4)).double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Guidance(low=1.0, high=2.0),
        lambda: Guidance(low=2.0, high=2.0, rescale=1.5),
        lambda: Guidance(low=2.0, high=2.0, interval=(1.0, 1.0)),
        lambda: Guidance(low=2.0, high=2.0, interval=(-1.0, math.inf)),
        lambda: Regions(conds=(prompt(1.0),), masks=()),
        lambda: Regions(conds=(prompt(1.0),), masks=(torch.full((1, 1, 2, 2), 1.5),)),
        lambda: Regions(conds=(prompt(1.0),), masks=(torch.full((1, 1, 2, 2), -0.5),)),
    ],
)
def test_policies_out_of_range_are_refused(make: object) -> None:
    with pytest.raises(RequestError, match="give"):
        make()  # type: ignore[operator]
