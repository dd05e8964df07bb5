"""First pass: makes every decision that changes pixels, once per stage.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import replace

from hires.checkpoints.model import ModelSpec
from hires.devices import machines
from hires.devices.spec import DeviceSpec
from hires.kernels.attention_policies import Global
from hires.options.render import RenderRequest
from hires.options.sizes import check_size
from hires.options.stage import WindowSpec
from hires.planning.draft import Choice, Draft, StageDraft, StageSettings
from hires.planning.plan import StagePlan
from hires.planning.presets import Preset, preset
from hires.planning.resolution import bins_of
from hires.planning.stages import (
    check_combinations,
    check_steps,
    choose_guidance,
    choose_sampler,
    choose_strategy,
    make_stage,
    stage_settings,
    stage_sizes,
)
from hires.planning.tiles import choose_tile, in_tiles
from hires.tiling.geometry import Size, snap


def describe(request: RenderRequest, spec: ModelSpec, device: DeviceSpec) -> Draft:
    """Decide what is drawn. Of the device only its kind matters: it chooses the number type.

    RequestError for values that contradict each other or the model.
    """
    check_size(request.size)
    canvas = choose_canvas(request.size, spec)
    strategy = choose_strategy(request, canvas.value, spec)
    dtype = choose_dtype(request.dtype, device)
    tile_cells = choose_tile(request, canvas.value, spec, strategy.value)
    effort = preset(request.preset, spec)
    sizes = stage_sizes(request, canvas.value, spec, strategy.value, effort.growth)
    settings = settings_of_stages(request, effort, spec, sizes)
    guidance = choose_guidance(request, spec)
    stages = tuple(make_stage(each, request, spec, sizes, strategy.value, tile_cells) for each in settings)
    sampler, schedule = choose_sampler(request, spec)
    check_combinations(stages, spec)
    check_steps(stages, spec)
    spare = choose_tile(request, canvas.value, spec, "progressive")
    drafts = (
        StageDraft(stage=stage, tiled=tiled_instead(stage, each, request, spec, spare))
        for stage, each in zip(stages, settings, strict=True)
    )
    return Draft(
        request=request,
        spec=spec,
        device=device,
        canvas=canvas,
        strategy=strategy,
        dtype=dtype,
        sampler=sampler,
        schedule=schedule,
        guidance=guidance,
        tile_cells=tile_cells,
        bins=bins_of(spec),
        stages=tuple(drafts),
    )


def choose_canvas(size: Size, spec: ModelSpec) -> Choice[Size]:
    """The size rounded up to multiples that the model can render; the excess is cut away in the end."""
    canvas = snap(size, spec.align_px)
    return Choice(canvas, "" if canvas == size else f"the next multiple of {spec.align_px} px; {size} is cut from it")


def choose_dtype(dtype: str, device: DeviceSpec) -> Choice[str]:
    """The network's number type; "auto" depends on the device."""
    if dtype != "auto":
        return Choice(dtype, "as asked for")
    if device.kind == "cpu":
        faster = f"; `dtype` bf16 takes the network about {1 / machines.CPU_BF16_GAIN:.0%} of the time" if device.bf16 else ""
        return Choice("fp32", f"the CPU's exact type, the same picture with any number of tiles at once{faster}")
    return Choice("bf16", "half the bytes, no overflow") if device.bf16 else Choice("fp16", "this card has no bf16")


def settings_of_stages(
    request: RenderRequest, effort: Preset, spec: ModelSpec, sizes: tuple[Size, ...]
) -> tuple[StageSettings, ...]:
    """The settings of every stage, each looked up once."""
    return tuple(stage_settings(request, effort, spec, index) for index in range(len(sizes)))


def tiled_instead(
    stage: StagePlan, settings: StageSettings, request: RenderRequest, spec: ModelSpec, tile_cells: tuple[int, int]
) -> StagePlan | None:
    """The same stage in tiles if only the preset wants it in one piece, else None."""
    if stage.attention == Global() or request.attention_policy or settings.user.attention:
        return None
    return in_tiles(replace(stage, shift_cells=0), WindowSpec(), spec, tile_cells)
