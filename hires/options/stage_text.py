"""Stages as text: '4096x4096,steps=8,sigma=1' for `--stage` and `--relay`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hires.errors import RequestError, unknown
from hires.options.sizes import parse_size
from hires.options.stage import NOTHING_SAID, GuidePlan, StageSpec, WindowSpec

StageLike = str | StageSpec


def relay_of(relay: StageLike | None) -> StageSpec:
    """The stage that applies to every one after the first. RequestError for a size, which only one stage can have."""
    if relay is None:
        return NOTHING_SAID
    stage = parse_stage(relay, "relay") if isinstance(relay, str) else relay
    if stage.size is not None:
        raise RequestError(f"relay {stage.size}: applies to every stage after the first; give a stage of a size with `stages`")
    return stage


def stages_of(stages: Sequence[StageLike]) -> tuple[StageSpec, ...]:
    """Stages given as text or as specifications. RequestError names what is not understood."""
    return tuple(parse_stage(stage) if isinstance(stage, str) else stage for stage in stages)


def parse_stage(text: str, option: str = "stages") -> StageSpec:
    """'[WxH,]key=value,...' as a stage; `STAGE_KEYS` lists the keys. RequestError names what is not understood."""
    given: dict[str, object] = {}
    windows: dict[str, object] = {}
    for part in (part.strip() for part in text.split(",") if part.strip()):
        key, equals, value = part.partition("=")
        if not equals:
            given["size"] = parse_size(part)
            continue
        if key not in STAGE_KEYS:
            raise RequestError(f"{option} {text}: " + unknown("key", key, tuple(STAGE_KEYS)))
        try:
            values = STAGE_KEYS[key](value)
        except (ValueError, KeyError):
            raise RequestError(f"{option} {text}: {part} is not understood; {STAGE_HELP}") from None
        (windows if key in ("tile", "overlap", "blend", "move") else given).update(values)
    if windows:
        given["windows"] = WindowSpec(**windows)  # type: ignore[arg-type]
    return StageSpec(**given)  # type: ignore[arg-type]


Found = dict[str, object]


def _sigma(text: str) -> Found:
    """'1', '1:0.03' (down to), 'area:0.57' (FreCaS's rule)."""
    rule, _, rest = text.partition(":")
    if rule == "area":
        return {"renoise": "area", "sigma_start": float(rest)}
    return {"renoise": "fixed", "sigma_start": float(rule)} | ({"sigma_end": float(rest)} if rest else {})


def _guides(text: str) -> Found:
    """'structure', 'structure:0.125', 'structure+pull', 'none'."""
    if text == "none":
        return {"guides": ()}
    guides = []
    for part in text.split("+"):
        kind, _, cutoff = part.partition(":")
        guides.append(GuidePlan(kind=kind, cutoff=float(cutoff) if cutoff else None))
    return {"guides": tuple(guides)}


def _interval(text: str) -> Found:
    low, high = text.split(":")
    return {"guidance_interval": (float(low or 0), float(high or "inf"))}


def _as(name: str, read: Callable[[str], object]) -> Callable[[str], Found]:
    return lambda text: {name: read(text)}


def _yes(text: str) -> bool:
    return {"yes": True, "no": False}[text]


STAGE_KEYS: dict[str, Callable[[str], Found]] = {
    "sigma": _sigma,
    "steps": _as("steps", int),
    "sampler": _as("sampler", str),
    "schedule": _as("schedule", str),
    "enlarger": _as("enlarger", str),
    "guide": _guides,
    "attention": _as("attention", str),
    "tile": _as("tile_px", int),
    "overlap": _as("overlap_px", int),
    "blend": _as("blend", str),
    "move": _as("shift", _yes),
    "guidance": _as("guidance", float),
    "high": _as("guidance_high", float),
    "rescale": _as("guidance_rescale", float),
    "interval": _interval,
}
STAGE_HELP = (
    "write such as sigma=1, sigma=1:0.03 or sigma=area:0.57, steps=8, guide=structure:0.125+pull or none, attention=npa:1024, "
    "tile=1024, overlap=256, blend=hann, move=yes, guidance=4, high=7, rescale=0.7, interval=0.28:inf, enlarger=pixel"
)
