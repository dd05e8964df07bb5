"""Arguments of A1111 scripts that other tools send, by position, in the terms of our strategies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hires.errors import RequestError

CELL = 8  # px of a latent cell
ULTIMATE = "ultimate sd upscale"


class ScriptNotFoundError(RequestError):
    """A script that is not emulated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scripted:
    """What scripts make of a request; None and 0 leave it as it is. enlarge: by an upscaler, then drawn over in tiles (or not:
    redraw); by_size: exact (width, height). guided: held to the picture's structure."""

    strategy: str | None = None
    tile_px: int | None = None
    overlap_px: int | None = None
    scale: float = 0.0
    by_size: tuple[int, int] | None = None
    upscaler: str | int | None = None
    keep_input: bool = False
    enlarge: bool = False
    redraw: bool = True
    guided: bool = False
    notes: tuple[str, ...] = field(default=())


class _Arguments:
    """Positional arguments; those that a caller left out have their default. RequestError for one of another type."""

    def __init__(self, script: str, given: Sequence[Any]) -> None:
        self.script, self.given = script, given

    def get(self, index: int, name: str, kind: Callable[[Any], Any], default: Any) -> Any:
        if index >= len(self.given) or self.given[index] is None or self.given[index] == "":
            return default
        value = self.given[index]
        try:
            return kind(value)
        except (TypeError, ValueError, OverflowError):
            raise RequestError(
                f"{self.script}: argument {index} ({name}) is {str(value)[:60]!r}; give {kind.__name__}"
            ) from None


def ultimate(given: Sequence[Any]) -> Scripted:
    """Ultimate SD upscale: the picture enlarged, then drawn over tile by tile."""
    args = _Arguments(ULTIMATE, given)
    tile = args.get(1, "tile_width", int, 512) or args.get(2, "tile_height", int, 0) or 512
    kind = args.get(14, "target_size_type", int, 0)
    custom = (args.get(15, "custom_width", int, 2048), args.get(16, "custom_height", int, 2048))
    made = Scripted(
        enlarge=True,
        tile_px=_within(ULTIMATE, "tile_width", tile, 64, 8192),
        redraw=args.get(10, "redraw_mode", int, 0) != 2,
        upscaler=args.get(8, "upscaler_index", int, 0),
        scale=args.get(17, "custom_scale", float, 2.0) if kind == 2 else 0.0,
        by_size=custom if kind == 1 else None,
        notes=("ultimate sd upscale: tiles are blended into one canvas at every step, so there are no seams to fix",),
    )
    if kind == 2 and not 0 < made.scale <= 64:
        raise RequestError(f"{ULTIMATE}: custom_scale is {made.scale:g}; give a factor above 0, such as 2")
    return made


def tiled_diffusion(given: Sequence[Any]) -> Scripted:
    """Tiled Diffusion: MultiDiffusion or Mixture of Diffusers in tiles of latent cells, the picture enlarged before."""
    name = "Tiled Diffusion"
    args = _Arguments(name, given)
    if not args.get(0, "enabled", bool, False):
        return Scripted()
    cells = max(args.get(6, "tile_width", int, 96), args.get(7, "tile_height", int, 96))
    overlap = args.get(8, "overlap", int, 48)
    overwrite = args.get(2, "overwrite_size", bool, False)
    upscaler = args.get(10, "upscaler_name", str, "None")
    made = Scripted(
        strategy="tiled",
        tile_px=CELL * _within(name, "tile_width", cells, 8, 1024),
        overlap_px=CELL * min(_within(name, "overlap", overlap, 0, 1024), cells - 1),
        upscaler=upscaler,
        scale=args.get(11, "scale_factor", float, 1.0) if upscaler != "None" else 1.0,
        keep_input=args.get(3, "keep_input_size", bool, True),
        by_size=(args.get(4, "image_width", int, 0), args.get(5, "image_height", int, 0)) if overwrite else None,
        notes=(f"Tiled Diffusion: {args.get(1, 'method', str, 'MultiDiffusion')[:40]} as our tiles with Hann weights",),
    )
    if args.get(12, "noise_inverse", bool, False):
        made = replace(made, notes=(*made.notes, "Tiled Diffusion: noise inversion is not done"))
    if args.get(18, "enable_bbox_control", bool, False):
        made = replace(made, notes=(*made.notes, "Tiled Diffusion: regions are not done"))
    return made


def tiled_vae(given: Sequence[Any]) -> Scripted:
    """Tiled VAE: ours always decodes in bands that fit, and exactly."""
    if not _Arguments("Tiled VAE", given).get(0, "enabled", bool, False):
        return Scripted()
    return Scripted(notes=("Tiled VAE: the plan chooses the bands; the decode is exact whatever their size",))


def controlnet(given: Sequence[Any]) -> Scripted:
    """ControlNet: its tile model holds a picture's structure while detail is drawn; ours holds it without the network."""
    made = Scripted()
    for unit in given:
        if not isinstance(unit, dict) or not unit.get("enabled", True):
            continue
        module = str(unit.get("module", "none"))
        if not module.startswith("tile"):
            raise RequestError(f"controlnet: module {module[:60]!r} is not here; tile_resample is, without a network")
        made = replace(
            made, guided=True, notes=("controlnet tile: structure is held in the frequency domain, no network runs",)
        )
    return made


ALWAYS_ON: dict[str, Callable[[Sequence[Any]], Scripted]] = {
    "tiled diffusion": tiled_diffusion,
    "tiled vae": tiled_vae,
    "controlnet": controlnet,
}
SILENT = ("seed", "refiner", "sampler", "soft inpainting", "extra options", "hypertile", "never oom integrated")


def read(script_name: str | None, script_args: Sequence[Any], always_on: dict[str, Any]) -> Scripted:
    """What all scripts of a request ask for. ScriptNotFoundError for one that is not emulated; RequestError for arguments."""
    made = Scripted()
    if script_name and script_name.lower() != "none":
        if script_name.lower() != ULTIMATE:
            raise ScriptNotFoundError(f"Script '{script_name}' not found")
        made = ultimate(script_args)
    for name, body in always_on.items():
        if name.lower() in SILENT:
            continue
        script = ALWAYS_ON.get(name.lower())
        args = body.get("args", []) if isinstance(body, dict) else body
        args = list(args.values()) if isinstance(args, dict) else args
        if script is None:
            raise ScriptNotFoundError(f"always on script {name[:100]} not found")
        if not isinstance(args, list):
            raise RequestError(f"{name}: args must be a list")
        made = _joined(made, script(args))
    return made


def _joined(one: Scripted, other: Scripted) -> Scripted:
    """What either says; the first that speaks is heard."""
    return Scripted(
        strategy=one.strategy or other.strategy,
        tile_px=one.tile_px or other.tile_px,
        overlap_px=one.overlap_px if one.overlap_px is not None else other.overlap_px,
        scale=one.scale or other.scale,
        by_size=one.by_size or other.by_size,
        upscaler=one.upscaler if one.upscaler is not None else other.upscaler,
        keep_input=one.keep_input or other.keep_input,
        enlarge=one.enlarge or other.enlarge,
        redraw=one.redraw and other.redraw,
        guided=one.guided or other.guided,
        notes=(*one.notes, *other.notes),
    )


def _within(script: str, name: str, value: int, least: int, most: int) -> int:
    if not least <= value <= most:
        raise RequestError(f"{script}: {name} is {value}; give {least} to {most}")
    return value
