"""Runs a diffusers pipeline with our VAE, attention dispatch and tiled denoiser.

The pipeline's objects stay the same ones: `attach` sets methods on its modules, `detach` takes exactly those away.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hires.checkpoints.families import FAMILIES, FamilyFacts, NetworkShape
from hires.checkpoints.spec import pixart_shape, unet_shape
from hires.devices.probe import probe
from hires.errors import BudgetError, RequestError
from hires.models.attention_processors import DispatchedAttention, dispatch_attention
from hires.planning.costs.network_memory import network_live_bytes
from hires.tiling.blend import blend_weights
from hires.tiling.denoise import fused
from hires.tiling.geometry import Box, Size, make_grid
from hires.tiling.retry import Batcher
from hires.tiling.vae import TiledVAE
from hires.units import gib, parse_bytes

log = logging.getLogger(__name__)
MARK = "_hires_attached"
PLAIN = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "FusedAttnProcessor2_0")
ROOM = 1.5  # times the trained area: up to it a canvas is evaluated whole, as aspect-ratio buckets are
OVERLAP = 4  # the tiles' share of overlap is one in so many
WHOLE_CANVAS = ("down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals")
FAMILY_OF = {
    "StableDiffusionXL": "sdxl",
    "StableDiffusion": "sd15",
    "PixArtSigma": "pixart-sigma-1024",
    "PixArtAlpha": "pixart-alpha-1024",
}


@dataclass
class Attached:
    """What `attach` changed in a pipeline."""

    pipe: Any
    """The pipeline."""
    vae: TiledVAE
    """The tiled autoencoder, whose `last` describes the last call."""
    budget_bytes: int
    """What may be held beyond the weights."""
    tile: Size
    """In latent cells."""
    overlap: int
    """In latent cells."""
    batch: int
    """Tiles at once."""
    kept: tuple[str, ...]
    """Attention processors of other libraries, which were left in place."""
    batcher: Batcher = field(init=False)
    """How many tiles are evaluated at once after out-of-memories."""
    _undo: list[Callable[[], None]] = field(default_factory=list)
    _set: list[tuple[nn.Module, str, Callable[..., object]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.batcher = Batcher(self.batch)

    @property
    def retries(self) -> int:
        """Batches of tiles that were repeated after an out-of-memory."""
        return self.batcher.retries

    def explain(self) -> str:
        """What runs differently now, in a few lines."""
        lines = [
            f"{type(self.pipe).__name__}: budget {gib(self.budget_bytes)} beyond its weights",
            f"  autoencoder in bands, exact, as many rows as fit; larger canvases than {ROOM:g} x the trained area in tiles of "
            f"{self.tile} cells, {self.overlap} shared, {self.batch} pictures at once",
            "  attention through hires.kernels.dispatch",
        ]
        lines += [f"  - {name} keeps its own attention processor" for name in self.kept]
        return "\n".join(lines)

    def replace(self, module: nn.Module, name: str, method: Callable[..., object]) -> None:
        """Set a method on one module only; undone by `restore`."""
        before = module.__dict__.get(name)
        there = name in module.__dict__
        setattr(module, name, method)
        self._set.append((module, name, method))

        def undo() -> None:
            if there:
                setattr(module, name, before)
            else:
                delattr(module, name)

        self._undo.append(undo)

    def restore(self) -> None:
        """Take everything away again, the last first. RequestError where something was put on top since."""
        for module, name, method in self._set:
            if module.__dict__.get(name) is not method:
                raise RequestError(
                    f"detach: {type(module).__name__}.{name} was replaced after attach; undo that first, such as by "
                    "pipe.remove_all_hooks()"
                )
        while self._undo:
            self._undo.pop()()


def attach(pipe: Any, vram: str | int | None = None, *, tile_px: int | None = None, overlap_px: int | None = None) -> Attached:
    """Give a diffusers pipeline of SDXL, Stable Diffusion 1 or PixArt our autoencoder, attention and tiles.

    The pipeline is called as before: its autoencoder works in bands that fit (the same pixels, to rounding), attention goes
    through the dispatch, and a canvas above the trained area is denoised in overlapping tiles fused at every step, SDXL's crop
    offsets given to each. After an out-of-memory fewer are evaluated at once, and finished ones stay. From noise each tile may
    draw a subject of its own; from a picture (img2img) tiles refine what is there.

    Args:
        pipe: a StableDiffusionXL..., StableDiffusion..., PixArtSigma... or PixArtAlpha... pipeline, also from images.
        vram: what the process may hold on its device, such as "24GB", weights included; default: what is free.
        tile_px: the side of a tile; default: the size the model was trained at.
        overlap_px: how far tiles overlap; default: a quarter of a tile.

    Raises:
        RequestError: another kind of pipeline, one that is attached already, or values out of range. BudgetError: not even one
        tile fits.
    """
    if getattr(pipe, MARK, None) is not None:
        raise RequestError(f"attach: this {type(pipe).__name__} is attached already; hires.detach(pipe) first")
    facts = family_of(pipe)
    network = pipe.transformer if facts.network == "pixart" else pipe.unet
    cell_px = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    native = int(network.config.sample_size) * cell_px
    tile = Size(*(2 * (cells(tile_px if tile_px is not None else native, "tile_px", cell_px),)))
    overlap = cells(overlap_px if overlap_px is not None else tile.width * cell_px // OVERLAP, "overlap_px", cell_px, least=0)
    if overlap >= tile.width:
        raise RequestError(f"overlap_px={overlap_px}: must be below the tile's {tile.width * cell_px} px")
    budget = room(pipe, vram)
    shape = shape_of(network, facts)
    attached = Attached(
        pipe=pipe,
        vae=TiledVAE(pipe.vae, budget_bytes=budget),
        budget_bytes=budget,
        tile=tile,
        overlap=overlap,
        batch=most_at_once(network, shape, tile, budget),
        kept=(),
    )
    attached.kept = _attention(attached, network)
    _autoencoder(attached, pipe.vae)
    trained = int(network.config.sample_size) ** 2 if tile_px is None else tile.area
    tiles = TiledNetwork(network.forward, type(network), attached, trained, cell_px)
    attached.replace(network, "forward", tiles)
    setattr(pipe, MARK, attached)
    log.info("%s", attached.explain())
    return attached


def detach(pipe: object) -> None:
    """Undo `attach`: the pipeline has the methods and processors that it had. RequestError where it is not attached."""
    attached = getattr(pipe, MARK, None)
    if attached is None:
        raise RequestError(f"detach: this {type(pipe).__name__} is not attached")
    attached.restore()
    delattr(pipe, MARK)


def family_of(pipe: object) -> FamilyFacts:
    """The family of a pipeline by its class. RequestError lists those that can be attached."""
    name, vae = type(pipe).__name__, getattr(pipe, "vae", None)
    for start, family in FAMILY_OF.items():
        if name.startswith(start):
            network = getattr(pipe, "transformer" if family.startswith("pixart") else "unet", None)
            if isinstance(network, nn.Module) and hasattr(getattr(vae, "config", None), "layers_per_block"):
                return FAMILIES[family]
    known, beside = ", ".join(f"{start}..." for start in FAMILY_OF), f", with {type(vae).__name__}," if vae is not None else ""
    raise RequestError(f"attach: {name}{beside} is none of {known} with an AutoencoderKL; give one of those pipelines")


def cells(px: int, name: str, cell_px: int, least: int = 1) -> int:
    """Pixels as latent cells. RequestError for less than `least` cells."""
    if isinstance(px, bool) or not isinstance(px, int) or px < least * cell_px:
        raise RequestError(f"{name}={px!r}: give a number of pixels from {least * cell_px}")
    return px // cell_px


def room(pipe: Any, vram: str | int | None) -> int:
    """Bytes that a pipeline may hold beyond its weights. BudgetError where those alone are above the budget."""
    device = torch.device(pipe._execution_device)
    whole = probe(device, None if vram is None else parse_bytes(str(vram))).budget_bytes
    if device.type == "cpu":  # a budget there is of working memory, as everywhere in hires
        return whole
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    sizes = [sum(p.numel() * p.element_size() for p in module.parameters()) for module in modules]
    offloaded = any(hasattr(module, "_hf_hook") for module in modules)
    weights = max(sizes) if offloaded else sum(sizes)
    here = sum(size for size, module in zip(sizes, modules, strict=True) if next(module.parameters()).device.type == "cuda")
    left = whole - weights if vram is not None else whole - (weights - here)
    if left <= 0:
        raise BudgetError(
            f"vram: the weights take {gib(weights)} of {gib(whole)}; give more, or pipe.enable_model_cpu_offload()"
        )
    return left


def shape_of(network: nn.Module, facts: FamilyFacts) -> NetworkShape:
    """What decides a network's cost, from its config."""
    config: Any = network.config
    if facts.network == "unet":
        return unet_shape(config, facts)
    return pixart_shape(config)


MOST_AT_ONCE = 64


def most_at_once(network: nn.Module, shape: NetworkShape, tile: Size, budget: int) -> int:
    """How many pictures of a tile's size fit a budget at once. BudgetError where not one does."""
    first = next(network.parameters())
    one = network_live_bytes(shape, tile, 1, first.element_size(), first.device.type == "cpu")
    if one > budget:
        raise BudgetError(
            f"one tile of {tile} cells needs {gib(one)}, {gib(budget)} are left: give more vram, or a smaller tile_px"
        )
    return max(1, min(MOST_AT_ONCE, budget // one))


def _attention(attached: Attached, network: Any) -> tuple[str, ...]:
    """Send attention through the dispatch, but for processors of other libraries, whose names are returned."""
    before = dict(network.attn_processors)
    kept = tuple(name for name, processor in before.items() if type(processor).__name__ not in PLAIN)
    if hasattr(network, "down_blocks"):
        dispatch_attention(network)
    else:
        network.set_attn_processor({name: DispatchedAttention() for name in before})
    if kept:
        now = dict(network.attn_processors)
        network.set_attn_processor(now | {name: before[name] for name in kept})
    attached._undo.append(lambda: network.set_attn_processor(dict(before)))
    return kept


def _autoencoder(attached: Attached, vae: Any) -> None:
    """`encode` and `decode` in bands; where a band is the whole, the module's own are called."""
    from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput

    encode, decode, inside = vae.encode, vae.decode, [False]

    def within(work: Callable[[], Tensor]) -> Tensor:
        inside[0] = True
        try:
            return work()
        finally:
            inside[0] = False

    def tiled_decode(z: Tensor, return_dict: bool = True, generator: object = None) -> object:
        if inside[0]:
            return decode(z, return_dict=return_dict)
        pixels = within(lambda: attached.vae.decode(z))
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    def tiled_encode(x: Tensor, return_dict: bool = True) -> object:
        if inside[0]:
            return encode(x, return_dict=return_dict)
        posterior = DiagonalGaussianDistribution(within(lambda: attached.vae.moments(x)))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    attached.replace(vae, "decode", tiled_decode)
    attached.replace(vae, "encode", tiled_encode)


class TiledNetwork:
    """The forward of a UNet or a PixArt transformer, in tiles where the canvas is above what it was trained at.

    The networks' outputs at one timestep are affine in the denoised estimate, with the same factors for all tiles, so blending
    outputs is blending estimates.
    """

    def __init__(
        self, forward: Callable[..., Any], kind: type[nn.Module], attached: Attached, trained: int, cell_px: int
    ) -> None:
        self.forward, self.attached, self.trained, self.cell_px = forward, attached, trained, cell_px
        self.signature = inspect.signature(kind.forward)
        self.__signature__ = inspect.Signature(list(self.signature.parameters.values())[1:])

    def __call__(self, *args: object, **kwargs: object) -> object:
        """The network's output, as its own forward gives it. RequestError for what cannot be cut into tiles."""
        given = self.signature.bind(None, *args, **kwargs).arguments
        del given["self"]
        first = next(iter(given))
        canvas: Tensor = given.pop(first)
        whole = Size(*canvas.shape[-2:])
        if whole.area <= ROOM * self.trained:
            return self.forward(canvas, **given)
        refused = [name for name in WHOLE_CANVAS if given.get(name) is not None]
        if refused:
            raise RequestError(f"attach: {refused[0]} (a ControlNet's) is of the whole canvas and cannot be cut; detach first")
        return_dict = given.pop("return_dict", True)
        fused = self._fused(canvas, whole, given)
        if not return_dict:
            return (fused,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=fused) if first == "sample" else Transformer2DModelOutput(sample=fused)

    def _fused(self, canvas: Tensor, whole: Size, given: Mapping[str, object]) -> Tensor:
        grid = make_grid(whole, self.attached.tile, self.attached.overlap)
        weights = blend_weights(grid, "hann", canvas.device)
        return fused(partial(self._estimates, canvas, given), canvas, grid, weights, self.attached.batcher).to(canvas.dtype)

    def _estimates(self, canvas: Tensor, given: Mapping[str, object], units: Sequence[tuple[Box, int]]) -> Sequence[Tensor]:
        """The network's outputs (1, C, h, w) for tiles of pictures."""
        tiles = torch.cat([canvas[picture : picture + 1, :, box.rows, box.cols] for box, picture in units])
        chosen = [picture for _, picture in units]
        cut = {name: _of(value, chosen, canvas.shape[0]) for name, value in given.items()}
        added = cut.get("added_cond_kwargs")
        if added and added.get("time_ids") is not None:
            offsets = [[box.top * self.cell_px, box.left * self.cell_px] for box, _ in units]
            ids = added["time_ids"].clone()
            ids[:, 2:4] += torch.tensor(offsets, dtype=ids.dtype, device=ids.device)
            cut["added_cond_kwargs"] = {**added, "time_ids": ids}
        outputs: Tensor = self.forward(tiles, **cut, return_dict=False)[0]
        return [outputs[i : i + 1] for i in range(len(units))]


def _of(value: object, chosen: Sequence[int], pictures: int) -> Any:
    """What goes with the chosen pictures: rows of tensors that have one per picture, everything else as it is."""
    if isinstance(value, Mapping):
        return {name: _of(entry, chosen, pictures) for name, entry in value.items()}
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == pictures:
        return value[list(chosen)]
    return value
