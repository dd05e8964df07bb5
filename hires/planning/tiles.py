"""Chooses how a stage covers its canvas: tiles, or attention in windows.

No budget plays a part. Imports no torch.
"""

from __future__ import annotations

from dataclasses import replace

from hires.checkpoints.model import ModelSpec
from hires.errors import RequestError
from hires.kernels.attention_policies import NPA, Global, Policy, Windows, make_policy
from hires.options.render import RenderRequest
from hires.options.stage import WindowSpec, parse_policy
from hires.planning.draft import StageSettings
from hires.planning.plan import StagePlan
from hires.planning.resolution import bins_of, stage_canvases
from hires.tiling.geometry import Size, TileGrid, make_grid, round_up

LEAST_WINDOW = 4  # tokens of the lowest level that a window of attention spans


def choose_tile(request: RenderRequest, canvas: Size, spec: ModelSpec, strategy: str) -> tuple[int, int]:
    """Side and overlap of tiles in latent cells: the whole canvas for `direct`, else by default the trained size."""
    step = spec.align_px // spec.cell_px
    if strategy == "direct":
        return max(canvas.height, canvas.width) // spec.cell_px, 0
    tile_px = request.tile_px or spec.defaults.tile_px
    tile = max(step, round_up(tile_px, spec.align_px) // spec.cell_px)
    default_px = min(spec.defaults.overlap_px, tile * spec.cell_px // 4)
    overlap_px = default_px if request.overlap_px is None else request.overlap_px
    if request.overlap_px is not None and overlap_px >= tile * spec.cell_px:
        raise RequestError(
            f"overlap_px {overlap_px}: must be below the tile of {tile * spec.cell_px} px; try {tile * spec.cell_px // 4}"
        )
    return tile, overlap_px // spec.cell_px


def choose_policy(request: RenderRequest, text: str | None, spec: ModelSpec) -> Policy:
    """Which tokens self-attention attends to beyond the trained size, in latent cells; windows default to the trained size.

    RequestError for a window that is too small, and together with tiles.
    """
    policy = parse_policy(text)
    option = f"attention_policy {text}"
    if policy.name == "global":
        return Global()
    if request.strategy == "tiled" or request.tile_px or request.overlap_px is not None:
        raise RequestError(f"{option}: goes over the whole canvas; leave `tile_px`, `overlap_px` and `strategy` tiled out")
    if policy.name == "kvpool" or policy.value is None:
        return make_policy(policy.name, spec.native_px // spec.cell_px, policy.value)
    if policy.value < LEAST_WINDOW * spec.align_px:
        raise RequestError(f"{option}: give a window of {LEAST_WINDOW * spec.align_px} px or more")
    return make_policy(policy.name, spec.native_px // spec.cell_px, policy.value // spec.cell_px)


def place(
    stage: StagePlan, settings: StageSettings, request: RenderRequest, spec: ModelSpec, tile_cells: tuple[int, int]
) -> StagePlan:
    """Give a stage beyond the trained size its tiles, or its attention over the whole canvas.

    tile_cells: side and overlap in latent cells, where the stage sets no others.
    """
    text = policy_text(settings, request, relayed=stage.enlarger is not None)
    beyond = len(stage_canvases(stage.canvas, bins_of(spec), spec.align_px)) > 1
    attention = choose_policy(request, text, spec) if beyond else Global()
    if attention == Global():
        return in_tiles(stage, settings.user.windows or WindowSpec(), spec, tile_cells)
    moves = isinstance(attention, NPA | Windows) and parse_policy(text).shift
    return replace(
        stage,
        grid=whole_grid(stage.canvas, spec),
        attention=attention,
        shift_cells=attention.window // 4 if moves and isinstance(attention, NPA | Windows) else 0,
    )


def policy_text(settings: StageSettings, request: RenderRequest, relayed: bool) -> str | None:
    """The attention policy of a stage as text, None for tiles: the stage's own, the request's, or a relay's preset."""
    user = settings.user
    if user.windows or user.attention:
        return user.attention
    if request.attention_policy:
        return request.attention_policy
    tiled = request.tile_px or request.overlap_px is not None or request.strategy == "tiled"
    return settings.preset.attention if relayed and not tiled else None


def whole_grid(canvas: Size, spec: ModelSpec) -> TileGrid:
    """A canvas, in pixels, as one tile."""
    cells = canvas.divided(spec.cell_px)
    return make_grid(cells, cells, 0)


def in_tiles(stage: StagePlan, windows: WindowSpec, spec: ModelSpec, tile_cells: tuple[int, int]) -> StagePlan:
    """The same stage in tiles: those of `windows` in pixels, else `tile_cells` in latent cells."""
    tile, overlap = tile_cells
    if windows.tile_px is not None:
        tile = max(spec.align_px // spec.cell_px, round_up(windows.tile_px, spec.align_px) // spec.cell_px)
        overlap = min(overlap, tile // 4)
    if windows.overlap_px is not None:
        overlap = windows.overlap_px // spec.cell_px
    if overlap >= tile:
        raise RequestError(f"stage: overlap={overlap * spec.cell_px}: must be below the tile of {tile * spec.cell_px} px")
    return replace(
        stage,
        grid=make_grid(stage.canvas.divided(spec.cell_px), Size(tile, tile), overlap),
        attention=Global(),
        shift_cells=max(1, (tile - overlap) // 2) if windows.shift else 0,
        blend=windows.blend,
    )
