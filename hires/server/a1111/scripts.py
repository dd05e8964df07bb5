"""The positional arguments of A1111's scripts, translated to the options of hires."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from hires.errors import RequestError

CELL = 8  # px of a latent cell
MOST_SCALE = 64.0
ULTIMATE = "ultimate sd upscale"
Value = TypeVar("Value")


class ScriptNotFoundError(RequestError):
    """A script that is not emulated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptSettings:
    """What the scripts of a request ask for; None and 0 leave the request as it is."""

    strategy: str | None = None
    tile_px: int | None = None
    overlap_px: int | None = None
    scale: float = 0.0
    """The factor to enlarge by."""
    size: tuple[int, int] | None = None
    """The exact size, (width, height)."""
    upscaler: str | int | None = None
    """A name, or a place in the list of upscalers."""
    keep_input: bool = False
    """Whether `scale` applies to the size of the picture that was sent."""
    enlarge: bool = False
    """Enlarge with an upscaler instead of rendering at once."""
    redraw: bool = True
    """Draw over what was enlarged, in tiles."""
    guided: bool = False
    """Hold to the structure of the picture."""
    notes: tuple[str, ...] = field(default=())


class _Arguments:
    """Positional arguments of a script."""

    def __init__(self, script: str, values: Sequence[object]) -> None:
        self.script, self.values = script, values

    def get(self, index: int, name: str, kind: Callable[[Any], Value], default: Value) -> Value:
        """An argument, or its default where the caller left it out. RequestError for one of another type."""
        value = self.values[index] if index < len(self.values) else None
        if value is None or value == "":
            return default
        try:
            return kind(value)
        except (TypeError, ValueError, OverflowError):
            raise RequestError(
                f"{self.script}: argument {index} ({name}) is {str(value)[:60]!r}; give {kind.__name__}"
            ) from None


def ultimate(arguments: Sequence[object]) -> ScriptSettings:
    """Ultimate SD upscale: the picture enlarged, then drawn over tile by tile."""
    args = _Arguments(ULTIMATE, arguments)
    tile = args.get(1, "tile_width", int, 512) or args.get(2, "tile_height", int, 0) or 512
    kind = args.get(14, "target_size_type", int, 0)
    custom = (args.get(15, "custom_width", int, 2048), args.get(16, "custom_height", int, 2048))
    settings = ScriptSettings(
        enlarge=True,
        tile_px=_within(ULTIMATE, "tile_width", tile, 64, 8192),
        redraw=args.get(10, "redraw_mode", int, 0) != 2,
        upscaler=args.get(8, "upscaler_index", int, 0),
        scale=args.get(17, "custom_scale", float, 2.0) if kind == 2 else 0.0,
        size=custom if kind == 1 else None,
        notes=("ultimate sd upscale: tiles are blended into one canvas at every step, so there are no seams to fix",),
    )
    if kind == 2 and not 0 < settings.scale <= MOST_SCALE:
        raise RequestError(f"{ULTIMATE}: custom_scale is {settings.scale:g}; give a factor above 0, such as 2")
    return settings


def tiled_diffusion(arguments: Sequence[object]) -> ScriptSettings:
    """Tiled Diffusion: MultiDiffusion or Mixture of Diffusers in tiles of latent cells, the picture enlarged before."""
    name = "Tiled Diffusion"
    args = _Arguments(name, arguments)
    if not args.get(0, "enabled", bool, False):
        return ScriptSettings()
    cells = max(args.get(6, "tile_width", int, 96), args.get(7, "tile_height", int, 96))
    overlap = args.get(8, "overlap", int, 48)
    overwrite = args.get(2, "overwrite_size", bool, False)
    upscaler = args.get(10, "upscaler_name", str, "None")
    settings = ScriptSettings(
        strategy="tiled",
        tile_px=CELL * _within(name, "tile_width", cells, 8, 1024),
        overlap_px=CELL * min(_within(name, "overlap", overlap, 0, 1024), cells - 1),
        upscaler=upscaler,
        scale=args.get(11, "scale_factor", float, 1.0) if upscaler != "None" else 1.0,
        keep_input=args.get(3, "keep_input_size", bool, True),
        size=(args.get(4, "image_width", int, 0), args.get(5, "image_height", int, 0)) if overwrite else None,
        notes=(f"Tiled Diffusion: {args.get(1, 'method', str, 'MultiDiffusion')[:40]} as our tiles with Hann weights",),
    )
    if not 0 < settings.scale <= MOST_SCALE:
        raise RequestError(f"{name}: scale_factor is {settings.scale:g}; give a factor above 0, such as 2")
    if args.get(12, "noise_inverse", bool, False):
        settings = replace(settings, notes=(*settings.notes, "Tiled Diffusion: noise inversion is not done"))
    if args.get(18, "enable_bbox_control", bool, False):
        settings = replace(settings, notes=(*settings.notes, "Tiled Diffusion: regions are not done"))
    return settings


def tiled_vae(arguments: Sequence[object]) -> ScriptSettings:
    """Tiled VAE: nothing to do, as every decode runs in bands that fit, and is exact."""
    if not _Arguments("Tiled VAE", arguments).get(0, "enabled", bool, False):
        return ScriptSettings()
    return ScriptSettings(notes=("Tiled VAE: the plan chooses the bands; the decode is exact whatever their size",))


def controlnet(arguments: Sequence[object]) -> ScriptSettings:
    """ControlNet: only its tile model, which keeps a picture's structure; here a frequency guide does, without a network."""
    settings = ScriptSettings()
    for unit in arguments:
        if not isinstance(unit, dict) or not unit.get("enabled", True):
            continue
        module = str(unit.get("module", "none"))
        if not module.startswith("tile"):
            raise RequestError(f"controlnet: module {module[:60]!r} is not here; tile_resample is, without a network")
        settings = replace(
            settings, guided=True, notes=("controlnet tile: structure is held in the frequency domain, no network runs",)
        )
    return settings


ALWAYS_ON: dict[str, Callable[[Sequence[object]], ScriptSettings]] = {
    "tiled diffusion": tiled_diffusion,
    "tiled vae": tiled_vae,
    "controlnet": controlnet,
}
SILENT = ("seed", "refiner", "sampler", "soft inpainting", "extra options", "hypertile", "never oom integrated")


def read(script_name: str | None, script_args: Sequence[object], always_on: Mapping[str, object]) -> ScriptSettings:
    """What all scripts of a request ask for.

    ScriptNotFoundError for a script that is not emulated; RequestError for arguments that are not understood.
    """
    settings = ScriptSettings()
    if script_name and script_name.lower() != "none":
        if script_name.lower() != ULTIMATE:
            raise ScriptNotFoundError(f"Script '{script_name}' not found")
        settings = ultimate(script_args)
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
        settings = _merge(settings, script(args))
    return settings


def _merge(one: ScriptSettings, other: ScriptSettings) -> ScriptSettings:
    """What either asks for; where both do, the first."""
    return ScriptSettings(
        strategy=one.strategy or other.strategy,
        tile_px=one.tile_px or other.tile_px,
        overlap_px=one.overlap_px if one.overlap_px is not None else other.overlap_px,
        scale=one.scale or other.scale,
        size=one.size or other.size,
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
