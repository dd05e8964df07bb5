"""Enlarging by rows: real networks tiled and whole, exact sizes, grey, alpha, 16 bits; what cannot be loaded is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hires.errors import ModelError, RequestError
from hires.images.sources import ImageSource
from hires.models.upscalers import UpscalerNetwork, load_upscaler, working_dtype
from hires.pipelines.upscale import PictureRows, bands_of, coded, enlarge, plan_tiles, working_bytes
from hires.tiling.geometry import Size
from hires.tiling.network import Tiling
from hires.tiling.reach import Halo
from tests.support.networks import nearest
from tests.support.spandrel_here import COMPACT, CRAFT, DATA, why_not

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CPU = torch.device("cpu")


def need(file: Path) -> Path:
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    reason = why_not()
    if reason:
        pytest.skip(reason)
    return file


def run(pixels: NDArray[Any], size: Size, upscaler: UpscalerNetwork | None = None, tile: int = 16) -> NDArray[Any]:
    source = ImageSource.open(pixels)
    tiling = None if upscaler is None else plan_tiles(upscaler, source.size, None, tile)
    return np.concatenate(list(bands_of(enlarge(source, source, size, upscaler, tiling), source.dtype)))


def colour(height: int, width: int, bands: int, kind: type = np.uint8) -> NDArray[Any]:
    values = np.random.default_rng(0).random((height, width, bands), dtype=np.float32)
    return values if kind is np.float32 else (values * np.iinfo(kind).max).astype(kind)


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_every_kind_of_picture_through_a_network_whose_answer_is_known(bands: int, kind: type) -> None:
    pixels = colour(31, 45, bands, kind)
    found = run(pixels, Size(62, 90), nearest())
    assert (found.dtype, found.shape) == (kind, (62, 90, bands))
    planes = bands - (bands in (2, 4))
    expected = pixels[..., :planes].repeat(2, 0).repeat(2, 1)
    assert np.abs(found[..., :planes].astype(float) - expected).max() <= (1e-6 if kind is np.float32 else 0)
    if bands in (2, 4):
        alpha = np.clip(run(pixels[..., -1:], Size(62, 90)), 0, 1 if kind is np.float32 else None)
        assert np.abs(found[..., -1:].astype(float) - alpha).max() <= (1e-6 if kind is np.float32 else 1)


def test_lanczos_of_eight_bits_is_pillows_within_a_level() -> None:
    pixels = 60 + colour(40, 33, 3) // 2  # Pillow also clips between the axes
    theirs = np.asarray(Image.fromarray(pixels).resize((132, 160), Image.Resampling.LANCZOS))
    assert np.abs(run(pixels, Size(160, 132)).astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("size", [Size(62, 90), Size(70, 101), Size(31, 45), Size(50, 40), Size(17, 300)])
@pytest.mark.parametrize("through", [True, False])
def test_the_size_is_exact_and_another_shape_is_cut_evenly(size: Size, through: bool) -> None:
    """A ramp across: its middle stays in the middle, whatever is cut away."""
    pixels = np.repeat(np.linspace(0, 255, 45).astype(np.uint8)[None, :, None], 31, axis=0)
    found = run(pixels, size, nearest(channels=1) if through else None)
    assert found.shape == (size.height, size.width, 1)
    assert abs(float(found.mean()) - 127) < 3
    assert abs(float(found[0, 0, 0]) + float(found[-1, -1, 0]) - 255) <= 6


def test_a_grey_network_refuses_colour() -> None:
    with pytest.raises(RequestError, match="takes grey pictures only"):
        run(colour(8, 8, 3), Size(16, 16), nearest(channels=1))


def test_values_beyond_the_range_are_clipped_in_integers_and_kept_in_floats() -> None:
    values = torch.tensor([-0.2, 0.0, 0.5, 1.0, 1.3]).reshape(1, 1, 5)
    assert coded(values, np.dtype(np.uint8))[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert coded(values, np.dtype(np.uint16))[0, :, 0].tolist() == [0, 0, 32768, 65535, 65535]
    assert coded(values, np.dtype(np.float32)).min() < 0


def test_a_network_that_tiles_itself_runs_whole() -> None:
    seen: list[Size] = []

    def network(x: Tensor) -> Tensor:
        seen.append(Size(*x.shape[-2:]))
        return F.interpolate(x, scale_factor=2)

    from dataclasses import replace

    run(colour(31, 45, 3), Size(62, 90), replace(nearest(), network=network, whole=True), tile=8)
    assert seen == [Size(31, 45)]


def crop(name: str, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
    with Image.open(DATA / "photos" / name) as picture:
        return np.asarray(picture.convert("RGB"))[top : top + height, left : left + width]


@pytest.mark.parametrize("tile", [16, 37, 64, 300])
def test_the_compact_network_tiled_is_the_whole(tile: int) -> None:
    """Issue 8's line, at any tile: 1e-5 of [0, 1]."""
    made = load_upscaler(need(COMPACT), CPU)
    assert made.halo == Halo(pixels=34, reach=34, error=0.0), "34 convolutions of 3 x 3"
    pixels = crop("kodim19.png", 100, 50, 43, 61)
    source = ImageSource.open(pixels)
    whole = made.network(PictureRows(source, 3).rows(0, 43)[None])[0]
    tiled = enlarge(source, None, Size(172, 244), made, plan_tiles(made, source.size, None, tile))
    assert torch.allclose(tiled.colour.rows(0, 172), whole, atol=1e-5, rtol=0)


def test_what_rounding_leaves_is_that_of_the_kernels() -> None:
    """A crop whose rounding the network enlarges most. By kernels that do not depend on the shape tiles are the whole, bit for
    bit; by oneDNN's, which do, both are as far from float64 as they are from each other."""
    made = load_upscaler(need(COMPACT), CPU)
    small = np.asarray(Image.fromarray(crop("kodim23.png", 20, 20, 256, 256)).resize((64, 64), Image.Resampling.BICUBIC))
    source = ImageSource.open(small)
    planes = PictureRows(source, 3).rows(0, 64)

    def both() -> tuple[Tensor, Tensor]:
        tiled = enlarge(source, None, Size(256, 256), made, plan_tiles(made, source.size, None, 32))
        return made.network(planes[None])[0], tiled.colour.rows(0, 256)

    with torch.backends.mkldnn.flags(enabled=False):
        whole, tiled = both()
    assert torch.equal(whole, tiled)
    by_onednn = both()
    assert max(float((found - whole).abs().max()) for found in by_onednn) < 3e-5


def test_what_a_network_works_with_is_counted() -> None:
    """The compact one holds two maps of 64 channels at once, in float32, at the least."""
    made = load_upscaler(need(COMPACT), CPU)
    assert 64 * 4 <= working_bytes(made) <= 4 * 64 * 4
    tiling = plan_tiles(made, Size(2000, 3000), 2**26)
    assert (tiling.rows + 68) * (tiling.cols + 68) * working_bytes(made) <= 2**26


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    need(COMPACT)
    (tmp_path / "no.pth").write_bytes(b"no")
    for file, words in (
        (tmp_path / "absent.pth", "is not there"),
        (tmp_path / "no.pth", "cannot be read"),
        (Path(__file__), "must end in .safetensors"),
        (DATA / "upscalers" / "carn_m.pth", "no architecture that spandrel knows"),
    ):
        with pytest.raises(ModelError, match=words):
            load_upscaler(file, CPU)


def test_half_precision_is_taken_on_a_card_by_those_that_bear_it() -> None:
    def facts(half: bool, bfloat: bool) -> Any:
        return SimpleNamespace(supports_half=half, supports_bfloat16=bfloat, architecture=SimpleNamespace(name="HAT"))

    card = torch.device("cuda", 0)
    for known, best in (((True, True), "float16"), ((False, True), "bfloat16"), ((False, False), "float32")):
        assert str(working_dtype(facts(*known), card, "auto")) == f"torch.{best}"
        assert working_dtype(facts(*known), CPU, "auto") == torch.float32
    with pytest.raises(RequestError, match="dtype fp16: HAT does not bear it"):
        working_dtype(facts(False, True), card, "fp16")


def test_without_spandrel_the_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(b"")
    code = """
import sys, torch
sys.modules["spandrel"] = None
from hires.models.upscalers import load_upscaler
try:
    load_upscaler(sys.argv[1], torch.device("cpu"))
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.pth")], capture_output=True, text=True, check=True)
    assert "ModelError" in done.stdout
    assert ".[upscale]" in done.stdout


def luma(rgb: NDArray[np.floating]) -> NDArray[np.floating]:
    """BT.601 Y of 0 to 255, as papers on super-resolution measure it."""
    return 16 + (rgb[..., 0] * 65.481 + rgb[..., 1] * 128.553 + rgb[..., 2] * 24.966) / 255


def y_psnr(found: NDArray[Any], truth: NDArray[Any]) -> float:
    inner = (slice(4, -4), slice(4, -4))
    error = luma(found.astype(float))[inner] - luma(truth.astype(float))[inner]
    return float(10 * np.log10(255**2 / np.mean(error**2)))


@pytest.mark.slow
def test_craft_tiled_is_within_a_tenth_of_a_decibel_and_beats_bicubic() -> None:
    """Issue 8's line on x4 of downsampled photographs; its tiling is an approximation and named one."""
    made = load_upscaler(need(CRAFT), CPU)
    assert "approximation" in made.notes()[1]
    whole, tiled, bicubic = [], [], []
    for name, top, left in (("kodim19.png", 200, 100), ("kodim23.png", 100, 300), ("flower_BSD3_2268x1512.png", 400, 600)):
        truth = crop(name, top, left, 384, 384)
        small = np.asarray(Image.fromarray(truth).resize((96, 96), Image.Resampling.BICUBIC))
        source = ImageSource.open(small)
        for kept, tiling in (
            (whole, Tiling(rows=96, cols=96, halo=made.halo.pixels, multiple=16)),
            (tiled, plan_tiles(made, source.size, None, 48)),
        ):
            rows = bands_of(enlarge(source, None, Size(384, 384), made, tiling), np.dtype(np.uint8))
            kept.append(y_psnr(np.concatenate(list(rows)), truth))
        bicubic.append(y_psnr(np.asarray(Image.fromarray(small).resize((384, 384), Image.Resampling.BICUBIC)), truth))
    print(f"whole {whole} tiled {tiled} bicubic {bicubic}")
    assert np.mean(whole) - np.mean(tiled) <= 0.1
    assert np.mean(tiled) - np.mean(bicubic) >= 1.5
