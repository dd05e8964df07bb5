"""Enlargers, sharpening and re-noise rules against what other libraries and the papers' own forms give."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hires.errors import RequestError
from hires.refine.enlargers import ENLARGERS, Sharpened, Target, frequency_mix
from hires.refine.low_pass import Area, Fourier
from hires.refine.renoise import RULES, area_rule, relay_sigma
from hires.tiling.geometry import Box, Size
from hires.tiling.resize import KERNELS, Enlarged
from hires.tiling.vae import OnBand, PixelSource, WholePicture


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


class Shuffled:
    """A codec without loss: three channels of 2 x 2 pixels are twelve channels of a cell. Notes the size it encodes."""

    def decode_bands(self, latents: Tensor, on_band: OnBand) -> Iterator[Tensor]:
        picture = F.pixel_shuffle(latents, 2)
        for index, rows in enumerate(picture.split(6, -2)):
            on_band(index, -(-picture.shape[-2] // 6))
            yield rows

    def encode(self, source: PixelSource, on_band: OnBand) -> Tensor:
        on_band(0, 1)
        return F.pixel_unshuffle(source.crop(Box(0, 0, source.size.height, source.size.width)), 2)


def target(height: int, width: int, told: list[str] | None = None) -> Target:
    def hear(word: str) -> OnBand:
        return lambda done, total: None if told is None else told.append(word)

    return Target(
        canvas=Size(2 * height, 2 * width), cells=Size(height, width), decoding=hear("decode"), encoding=hear("encode")
    )


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_enlarging_is_pillows_inside(kernel: str) -> None:
    source = noise(1, 1, 18, 23)
    found = Enlarged(source, Size(41, 60), Box(0, 0, 41, 60), kernel).crop(Box(0, 0, 41, 60))
    way = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}[kernel]
    wanted = np.asarray(Image.fromarray(source[0, 0].numpy()).resize((60, 41), way))
    np.testing.assert_allclose(found[0, 0, 9:-9, 9:-9], wanted[9:-9, 9:-9], atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(KERNELS)), st.integers(1, 30), st.integers(1, 30), st.floats(1, 4), st.data())
def test_any_kernel_keeps_constants_and_crops_as_it_enlarges(
    kernel: str, h: int, w: int, by: float, data: st.DataObject
) -> None:
    size = Size(int(h * by), int(w * by))
    whole = Box(0, 0, size.height, size.width)
    flat = Enlarged(torch.full((1, 1, h, w), 0.7), size, whole, kernel).crop(whole)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.7), rtol=0, atol=1e-5)
    view = Enlarged(noise(1, 2, h, w), size, whole, kernel)
    top, left = data.draw(st.integers(0, size.height - 1)), data.draw(st.integers(0, size.width - 1))
    part = Box(top, left, data.draw(st.integers(1, size.height - top)), data.draw(st.integers(1, size.width - left)))
    torch.testing.assert_close(view.crop(part), view.crop(whole)[..., part.rows, part.cols], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", sorted(ENLARGERS))
def test_every_enlarger_gives_the_targets_latents_and_keeps_a_flat_picture(name: str) -> None:
    told: list[str] = []
    found = ENLARGERS[name](Shuffled(), noise(1, 12, 13, 18), target(27, 37, told))
    assert found.shape == (1, 12, 27, 37)
    assert ("decode" in told and "encode" in told) == (name != "latent")
    flat = ENLARGERS[name](Shuffled(), torch.full((1, 12, 13, 18), 0.3), target(27, 37))
    torch.testing.assert_close(flat, torch.full_like(flat, 0.3), rtol=0, atol=2e-6)


def test_enlargers_differ_where_they_should() -> None:
    latents = noise(1, 12, 16, 16)
    made = {name: enlarge(Shuffled(), latents, target(32, 32)) for name, enlarge in ENLARGERS.items()}
    bicubic = F.interpolate(latents, size=(32, 32), mode="bicubic", antialias=True)
    torch.testing.assert_close(made["latent"][..., 6:-6, 6:-6], bicubic[..., 6:-6, 6:-6], rtol=0, atol=1e-5)
    pictures = {name: F.pixel_shuffle(made[name], 2) for name in ("pixel", "lanczos", "unsharp")}
    energy = {name: float(Fourier(0.1)(p).sub(p).square().mean()) for name, p in pictures.items()}
    assert energy["pixel"] < energy["lanczos"] < energy["unsharp"]


def test_a_mix_has_the_low_band_of_one_and_the_high_band_of_the_other() -> None:
    ours, theirs, low_pass = noise(1, 4, 29, 43), noise(1, 4, 29, 43, seed=1), Fourier(0.1)
    found = frequency_mix(ours, theirs, low_pass)
    torch.testing.assert_close(low_pass(found), low_pass(ours), rtol=0, atol=1e-5)
    torch.testing.assert_close(found - low_pass(found), theirs - low_pass(theirs), rtol=0, atol=1e-5)
    wanted = Area(8)(ours) + (theirs - Area(8)(theirs))  # ScaleDiff, as written
    torch.testing.assert_close(frequency_mix(ours, theirs, Area(8)), wanted, rtol=0, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.floats(0.3, 3), st.data())
def test_sharpening_is_the_same_box_by_box(h: int, w: int, std: float, data: st.DataObject) -> None:
    view = Sharpened(WholePicture(noise(1, 3, h, w)), 1.0, std)
    whole = view.crop(Box(0, 0, h, w))
    top, left = data.draw(st.integers(0, h - 1)), data.draw(st.integers(0, w - 1))
    part = Box(top, left, data.draw(st.integers(1, h - top)), data.draw(st.integers(1, w - left)))
    torch.testing.assert_close(view.crop(part), whole[..., part.rows, part.cols], rtol=0, atol=1e-5)


def test_sharpening_is_the_unsharp_mask_of_a_gaussian() -> None:
    picture, std = noise(1, 3, 31, 40), 1.3
    reach = math.ceil(3 * std)
    i = np.arange(-reach, reach + 1)
    taps = np.exp(-(i**2) / (2 * std**2))
    taps /= taps.sum()
    padded = np.pad(picture[0].double().numpy(), ((0, 0), (reach, reach), (reach, reach)), mode="edge")
    rows = sum(t * padded[:, k : k + 31] for k, t in enumerate(taps))
    blurred = sum(t * rows[:, :, k : k + 40] for k, t in enumerate(taps))
    found = Sharpened(WholePicture(picture), 0.8, std).crop(Box(0, 0, 31, 40))[0]
    np.testing.assert_allclose(found, picture[0] + 0.8 * (picture[0] - blurred), atol=1e-5)


@pytest.mark.parametrize(("gamma", "sides"), [(1.5, 2.0), (2.0, 4.0), (1.0, 1.3)])
def test_the_area_rule_is_frecas_in_its_own_form(gamma: float, sides: float) -> None:
    before, after, sigma = Size(100, 160), Size(round(100 * sides), round(160 * sides)), 0.572
    abar, s = 1 / (1 + sigma**2), (before.height / after.height) ** gamma
    there = s * abar / (1 + (s - 1) * abar)
    assert area_rule(sigma, before, after, gamma) == pytest.approx(math.sqrt((1 - there) / there), rel=1e-9)
    if (gamma, sides) == (1.5, 2.0):
        assert area_rule(sigma, before, after, gamma) == pytest.approx(0.962, abs=1e-3)


def test_a_gamma_of_two_keeps_the_noise_that_cells_average_to() -> None:
    sigma = area_rule(0.5, Size(16, 16), Size(64, 64), 2.0)
    averaged = F.avg_pool2d(noise(1, 8, 512, 512) * sigma, 4)
    assert float(averaged.std()) == pytest.approx(0.5, rel=0.01)


def test_relay_sigmas_by_rule() -> None:
    before, after = Size(64, 64), Size(128, 128)
    assert relay_sigma("fixed", 1.2, before, after, sigma_max=14.6) == 1.2
    assert relay_sigma("area", 0.572, before, after, sigma_max=14.6) == pytest.approx(0.962, abs=1e-3)
    assert relay_sigma("area", 9.0, before, after, sigma_max=14.6) == 14.6
    assert set(RULES) == {"fixed", "area"}
    with pytest.raises(RequestError, match="re-noise rule"):
        relay_sigma("cubic", 1.0, before, after, sigma_max=14.6)
    with pytest.raises(RequestError, match="above 0"):
        relay_sigma("fixed", 0.0, before, after, sigma_max=14.6)
