"""spandrel for tests on a CPU torch, whose torchvision from the package index is a CUDA build that does not import.

It may lie apart from the environment, where transformers would trip over it: in the folder `upscale` of the environment or in
HIRES_TEST_SPANDREL, made by `pip install --no-deps --target FOLDER spandrel torchvision einops`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch

DATA = Path(os.environ.get("HIRES_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
FOLDER = Path(os.environ.get("HIRES_TEST_SPANDREL", Path(sys.prefix) / "upscale"))
COMPACT = DATA / "upscalers" / "RealESRGAN_General_x4_v3.safetensors"
CRAFT = DATA / "upscalers" / "craft_x4.pth"
untyped: Any = torch.library.Library
_kept: list[Any] = []  # the library lives as long as its definitions


def why_not() -> str | None:
    """Makes spandrel importable; the reason where it cannot be."""
    if importlib.util.find_spec("spandrel") is None:
        if not (FOLDER / "spandrel").is_dir():
            return f"spandrel is not installed, nor in {FOLDER}"
        sys.path.append(str(FOLDER))
    if not _kept and torch.version.cuda is None:
        library = untyped("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)
    try:
        import spandrel  # noqa: F401
    except (ImportError, RuntimeError) as error:
        return f"spandrel does not import: {error}"
    return None
