"""Where a stage is computed: in tiles, or in one piece with self-attention in neighbourhoods. Core: no budget, no torch."""

from __future__ import annotations

from dataclasses import replace

from hires.checkpoints.spec import ModelSpec
from hires.errors import RequestError
from hires.kernels.attention_policies import NPA, Global, Policy, Windows, make_policy
from hires.options.render import RenderRequest
from hires.options.stage import StageSpec, WindowSpec, parse_policy
from hires.planning.plan import StagePlan
from hires.planning.resolution import bins_of, stage_canvases
from hires.tiling.geometry import Size, TileGrid, make_grid, round_up

LEAST_WINDOW = 4  # tokens of the lowest level that a window of attention spans


def choose_tile(request: RenderRequest, canvas: Size, spec: ModelSpec, strategy: str) -> tuple[int, int]:
    """Tile and overlap in cells. Beyond `direct`, the trained size unless asked otherwise."""
    step = spec.align_px // spec.cell_px
    if strategy == "direct":
        return max(canvas.height, canvas.width) // spec.cell_px, 0
    tile_px = request.tile_px or spec.defaults.tile_px
    tile = max(step, round_up(tile_px, spec.align_px) // spec.cell_px)
    default_px = min(spec.defaults.overlap_px, tile * spec.cell_px // 4)
    overlap_px = default_px if request.overlap_px is None else request.overlap_px
    if request.overlap_px is not None and overlap_px >= tile * spec.cell_px:
        raise RequestError(
            f"--overlap {overlap_px}: must be below the tile of {tile * spec.cell_px} px; try {tile * spec.cell_px // 4}"
        )
    return tile, overlap_px // spec.cell_px


def choose_policy(request: RenderRequest, text: str | None, spec: ModelSpec) -> Policy:
    """Whom self-attention attends to beyond the trained size, counted in latent cells; windows are of the trained size
    unless one is asked for. RequestError for a window that is none, and beside tiles."""
    asked = parse_policy(text)
    option = f"--attention-policy {text}"
    if asked.name == "global":
        return Global()
    if request.strategy == "tiled" or request.tile_px or request.overlap_px:
        raise RequestError(f"{option}: goes over the whole canvas; leave --tile, --overlap and --strategy tiled out")
    if asked.name == "kvpool" or asked.value is None:
        return make_policy(asked.name, spec.native_px // spec.cell_px, asked.value)
    if asked.value < LEAST_WINDOW * spec.align_px:
        raise RequestError(f"{option}: give a window of {LEAST_WINDOW * spec.align_px} px or more")
    return make_policy(asked.name, spec.native_px // spec.cell_px, asked.value // spec.cell_px)


def place(
    stage: StagePlan, told: StageSpec, behind: StageSpec, request: RenderRequest, spec: ModelSpec, tiles: tuple[int, int]
) -> StagePlan:
    """A stage of a canvas beyond the trained size with its tiles, or its attention over the whole canvas.

    told: what the user says of this stage, behind which stand `--attention-policy`, `--tile` and the preset, which speaks of
    relays only. tiles: side and overlap in cells where no stage says more.
    """
    text = policy_text(told, behind, request, relayed=stage.enlarger is not None)
    beyond = len(stage_canvases(stage.canvas, bins_of(spec), spec.align_px)) > 1
    attention = choose_policy(request, text, spec) if beyond else Global()
    if attention == Global():
        return in_tiles(stage, told.windows or WindowSpec(), spec, tiles)
    moves = parse_policy(text).shift and isinstance(attention, NPA | Windows)
    return replace(
        stage,
        grid=whole_grid(stage.canvas, spec),
        attention=attention,
        shift_cells=attention.window // 4 if moves else 0,  # type: ignore[union-attr]
    )


def policy_text(told: StageSpec, behind: StageSpec, request: RenderRequest, relayed: bool) -> str | None:
    """Who has the say on a stage's attention, and what it says; None for tiles."""
    if told.windows or told.attention:
        return told.attention
    if request.attention_policy:
        return request.attention_policy
    tiled = request.tile_px or request.overlap_px is not None or request.strategy == "tiled"
    return behind.attention if relayed and not tiled else None


def whole_grid(canvas: Size, spec: ModelSpec) -> TileGrid:
    """A canvas, in pixels, as one tile."""
    cells = canvas.divided(spec.cell_px)
    return make_grid(cells, cells, 0)


def in_tiles(stage: StagePlan, windows: WindowSpec, spec: ModelSpec, tiles: tuple[int, int]) -> StagePlan:
    """The same stage in tiles: side and overlap of the windows in pixels, else `tiles` in cells."""
    tile, overlap = tiles
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
