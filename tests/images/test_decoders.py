"""Only the named picture formats are opened, whatever the name says: an EPS starts no program, an SVG draws no local file."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, features
from typer.testing import CliRunner

import hires
from hires.cli.app import app
from hires.errors import RequestError
from hires.images.decoders import vips_loader
from hires.images.formats import read_text
from hires.images.sources import ImageSource
from hires.images.whole import read_picture
from hires.tiling.geometry import Box

pytest.importorskip("pyvips")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n%%EOF\n"
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="8" height="8">'
    '<image width="8" height="8" xlink:href="secret.png"/></svg>'
)
PDF = b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n"
NAMES = ["a.png", "a.jpg", "a.tif", "a.eps"]


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `gs` on PATH that leaves a file behind; the path of that file."""
    ran, folder = tmp_path / "ran", tmp_path / "bin"
    folder.mkdir()
    (folder / "gs").write_text(f"#!/bin/sh\n: > '{ran}'\necho 10.0\n")
    (folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return ran


def test_the_trap_works(tmp_path: Path, ghostscript: Path) -> None:
    (tmp_path / "a.png").write_bytes(EPS)
    with pytest.raises(OSError), Image.open(tmp_path / "a.png") as picture:  # noqa: PT011  gs draws nothing
        picture.load()
    assert ghostscript.exists()


@pytest.mark.parametrize("name", NAMES)
def test_an_eps_starts_no_ghostscript(tmp_path: Path, ghostscript: Path, name: str) -> None:
    bad, good, out = tmp_path / name, tmp_path / "good.png", tmp_path / "o.png"
    bad.write_bytes(EPS)
    Image.new("RGB", (64, 64)).save(good)
    render = ["render", "a moon", "--size", "64x64", "--steps", "1", "-o", str(out)]
    for command in (
        [*render, "--init", str(bad)],
        [*render, "--init", str(good), "--mask", str(bad)],
        ["measure", str(bad)],
        ["measure", str(good), "--base", str(bad)],
        ["upscale", str(bad), "--scale", "2", "-o", str(out)],
        ["vae-roundtrip", str(bad), str(out)],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2, (command, result.output)
        assert "known file format" in " ".join(result.stderr.split())
        assert not ghostscript.exists()
        assert not out.exists()


@pytest.mark.parametrize("content", [EPS, SVG.encode(), PDF, b"<?xml version='1.0'?>\n" + SVG.encode()])
@pytest.mark.parametrize("name", ["a.png", "a.svg"])
def test_what_draws_other_files_is_opened_by_no_reader(tmp_path: Path, content: bytes, name: str) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "secret.png")
    (tmp_path / name).write_bytes(content)
    for reader in (ImageSource.open, read_picture, read_text):
        with pytest.raises(RequestError, match=r"a\.(png|svg): is not in a known file format; give a picture file such as PNG"):
            reader(tmp_path / name)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "gif", "bmp", "ppm", "avif"])
def test_the_named_formats_are_read(tmp_path: Path, suffix: str) -> None:
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("Pillow cannot write it")
    path = tmp_path / "named.otherwise"
    Image.new("RGB", (16, 12), (200, 100, 50)).save(path, format={"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
    with ImageSource.open(path) as source:
        found = source.read(Box(0, 0, 12, 16))
    for pixels in (found, read_picture(path)):
        assert pixels.shape == (12, 16, 3)
        assert np.abs(pixels.astype(int) - (200, 100, 50)).max() <= 6


def test_heads_that_are_cut_are_of_no_format() -> None:
    for head in (b"", b"\x89PNG", b"RIFF\0\0\0\0AVI ", b"\0\0\0\x20ftypmp42", b"II*"):
        assert vips_loader(head) is None


def test_every_picture_is_opened_by_named_formats() -> None:
    """No call of Pillow's or libvips' guessing openers in hires but the one that reads back its own scratch file."""
    guessing = []
    for file in sorted(Path(hires.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            pillow = ast.unparse(node.func) == "Image.open" and "formats" not in [word.arg for word in node.keywords]
            if pillow or node.func.attr == "new_from_file":
                guessing.append(f"{file.name}: {ast.unparse(node)}")
    assert guessing == ["sources.py: pyvips.Image.new_from_file(file, access='random', revalidate=True)"]
