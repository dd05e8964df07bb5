"""Upscaler networks (ESRGAN, Swin2SR, …): loading by spandrel or by our own code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hires._imports import quiet_imports
from hires.devices.probe import TORCH_DTYPE
from hires.errors import ModelError, RequestError
from hires.tiling.reach import Halo, choose_halo

SUFFIXES = (".safetensors", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True, kw_only=True)
class UpscalerNetwork:
    """A network that enlarges, on its device."""

    name: str
    """Its file's name."""
    architecture: str
    """By spandrel's name."""
    network: Callable[[Tensor], Tensor]
    """From (1, channels, h, w) in [0, 1] to (1, _, scale h, scale w); `multiple` divides h and w."""
    scale: int
    channels: int
    """1 grey, 3 colour."""
    multiple: int
    """What the sides of its input must divide by; others are padded."""
    halo: Halo
    """Pixels of the input that a pixel depends on in each direction."""
    whole: bool
    """Whether it must see the picture in one piece."""
    device: torch.device
    dtype: torch.dtype
    move: Callable[[torch.device], object] = lambda device: None
    """Takes its weights to another device; it runs on its own alone."""

    def notes(self) -> tuple[str, ...]:
        """What is said of it: how it is tiled, and whether that is exact."""
        kind = str(self.dtype).removeprefix("torch.")
        tiling = "not tiled: the network does that itself" if self.whole else str(self.halo)
        return f"{self.name}: {self.architecture}, {self.scale}x, {kind} on {self.device}", tiling


def load_upscaler(file: str | Path, device: torch.device, dtype: str = "auto") -> UpscalerNetwork:
    """A super-resolution network from a file that spandrel knows. ModelError says what it lacks.

    dtype: "auto" takes half precision on a card where the architecture bears it. The halo is measured here, on the CPU.
    """
    descriptor = _described(Path(file))
    facts: Any = descriptor
    required = facts.size_requirements
    kind = working_dtype(facts, device, dtype)
    halo = choose_halo(descriptor, facts.input_channels, facts.scale, required.multiple_of)
    facts.to(device, kind)

    def network(part: Tensor) -> Tensor:
        with torch.inference_mode():
            enlarged: Tensor = descriptor(part.to(device, kind))
        return enlarged

    return UpscalerNetwork(
        name=Path(file).name,
        architecture=str(facts.architecture.name),
        network=network,
        scale=int(facts.scale),
        channels=int(facts.input_channels),
        multiple=int(required.multiple_of),
        halo=halo,
        whole=facts.tiling.name == "INTERNAL" or required.square,
        device=device,
        dtype=kind,
        move=lambda place: facts.to(place, kind),
    )


def _described(path: Path) -> Callable[[Tensor], Tensor]:
    """Spandrel's descriptor of a file, its network on the CPU in float32."""
    if not path.is_file():
        raise ModelError(f"upscaler {path}: is not there; give a network file, or lanczos")
    if path.suffix.lower() not in SUFFIXES:
        raise ModelError(f"upscaler {path}: the name must end in {', '.join(SUFFIXES)}")
    spandrel = _spandrel(path)
    try:
        descriptor = spandrel.ModelLoader(device="cpu").load_from_file(str(path))
    except spandrel.UnsupportedModelError:
        raise ModelError(f"upscaler {path}: no architecture that spandrel knows; give one of those, or lanczos") from None
    except Exception as error:  # noqa: BLE001  a file can be wrong in any way, and each reader has its own error for it
        raise ModelError(f"upscaler {path}: cannot be read ({type(error).__name__}: {str(error)[:200]})") from None
    if not isinstance(descriptor, spandrel.ImageModelDescriptor) or descriptor.purpose not in ("SR", "Restoration"):
        raise ModelError(
            f"upscaler {path}: {descriptor.architecture.name} is for {descriptor.purpose}, not for enlarging; give another"
        )
    if descriptor.input_channels not in (1, 3):
        raise ModelError(
            f"upscaler {path}: takes {descriptor.input_channels} channels; give a network of grey or colour pictures"
        )
    module: nn.Module = descriptor.model
    module.eval().requires_grad_(False)
    described: Callable[[Tensor], Tensor] = descriptor
    return described


def _spandrel(path: Path) -> Any:
    try:
        with quiet_imports():
            import spandrel
    except ModuleNotFoundError:
        raise ModelError(
            f"upscaler {path}: needs spandrel: pip install -e '.[upscale]' in the folder of hires; or give `upscaler` lanczos"
        ) from None
    except (RuntimeError, ImportError, OSError) as error:
        raise ModelError(
            f"upscaler {path}: spandrel does not import ({str(error)[:120]}): install the torchvision that was built for "
            f"torch {torch.__version__}"
        ) from None
    return spandrel


def working_dtype(facts: Any, device: torch.device, requested: str) -> torch.dtype:
    """The type that a network runs in; 'auto' is half precision on a card where that is supported. RequestError otherwise."""
    supported = {"fp32": True, "fp16": facts.supports_half, "bf16": facts.supports_bfloat16}
    if requested != "auto":
        if not supported[requested]:
            raise RequestError(f"dtype {requested}: {facts.architecture.name} does not bear it; give fp32")
        return TORCH_DTYPE[requested]
    best = next(name for name in ("fp16", "bf16", "fp32") if supported[name])
    return TORCH_DTYPE[best] if device.type == "cuda" else torch.float32
