"""Enlarges one picture or many to an exact size, by rows."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self, Unpack

import numpy as np
import torch
from numpy.typing import NDArray

from hires._version import __version__
from hires.checkpoints.model import ModelSpec
from hires.devices.describe import describe_device
from hires.devices.memory import FreedPages, freed_pages, peak_resident_bytes
from hires.devices.probe import choose_device, probe
from hires.engine.engine import render_on
from hires.engine.output import MARK, path_of
from hires.engine.requests import DEFAULT_SCALE, request_from, scaled, spec_for, structure_relay, text_to_image
from hires.engine.results import RenderResult, UpscaleResult
from hires.errors import Cancelled, HiresError, RequestError
from hires.events import Event, OnEvent
from hires.images.boxes import Pixels
from hires.images.formats import check_fits, check_output, format_of, read_text
from hires.images.sinks import ArraySink, ImageSink
from hires.images.sources import ImageSource
from hires.models.upscalers import UpscalerNetwork, load_upscaler
from hires.options.declarations import DrawingOptions, ModelOptions
from hires.options.fields import chosen, declared
from hires.options.keywords import UpscaleKeywords
from hires.options.render import RenderOptions, RenderRequest
from hires.options.sizes import as_size
from hires.options.table import with_options
from hires.options.upscale import REFINE_STRENGTH, REFINEMENT, Refinement, UpscaleOptions, UpscaleRequest
from hires.pipelines.clock import as_part, clocked
from hires.pipelines.upscale import bands_of, enlarge, plan_tiles
from hires.planning import planner
from hires.tiling.geometry import Size
from hires.tiling.retry import empty_cache, free_memory
from hires.units import Json, parse_bytes

if TYPE_CHECKING:
    from hires.engine.loaded import LoadedModels
    from hires.images.sources import PictureLike


log = logging.getLogger(__name__)
ENLARGE_SHARE = 0.1
"""The share of the whole time that enlarging is taken for where the result is then drawn over."""
OWN_TEXT = ("hires:plan", "hires:predictions", "hires:upscale", MARK)  # of another picture than the enlarged one


@with_options(UpscaleOptions)
def upscale(image: PictureLike, **options: Unpack[UpscaleKeywords]) -> UpscaleResult:
    """Enlarge a picture to exactly `size`, or by `scale`, keeping its profile, its transparency and its bits.

    Files are read and written by rows, so memory does not grow with the height of the picture; `refine` holds it.

    Args:
        image: a path, a PIL picture, or an array (H, W) or (H, W, 1 to 4) of uint8, uint16 or float in [0, 1]. It fills `size`,
            cut evenly where its shape is another.
        **options: listed below. `refine` draws over the enlarged picture with the diffusion `model` at `strength`, held to what
            the given picture can show and, by `colour_fix`, to its colours.

    Raises:
        RequestError: a value, a file or a network that cannot be used. RunError: memory or disk ran out. No file is left then.
    """
    return upscale_on(None, image, chosen(UpscaleOptions, "upscale", options))


def upscale_on(models: LoadedModels | None, image: PictureLike, wanted: UpscaleOptions) -> UpscaleResult:
    """An enlargement whose refinement runs on what `models` holds, or on a model of its own; errors as in `upscale`."""
    return Upscaler(upscale_request(wanted), models).run(image, wanted.output, wanted.overwrite, wanted.on_event)


def upscale_request(options: UpscaleOptions) -> UpscaleRequest:
    """What a call asks for every picture. SizeError for an invalid size."""
    drawn: Json = {name: getattr(options, name) for name in REFINEMENT}
    drawn["strength"] = REFINE_STRENGTH if options.strength is None else options.strength
    drawn["colour_fix"] = None if options.colour_fix == "none" else options.colour_fix
    same = ("scale", "bits", "tile_px", "device", "dtype", "vram", "ram")
    shared: Json = {name: getattr(options, name) for name in same}
    return UpscaleRequest(
        size=None if options.size is None else as_size(options.size),
        upscaler="lanczos" if options.upscaler in (None, "demo") else str(options.upscaler),
        refinement=Refinement(**drawn) if options.refined else None,
        **shared,
    )


PER_PICTURE = ("output", "overwrite", "on_event")
"""Options of `upscale` that belong to one picture."""
CPU = torch.device("cpu")


def refinement_options(wanted: Refinement, size: Size) -> RenderOptions:
    """The options of the render that draws over an enlarged picture of a size."""
    shared = {name: getattr(wanted, name) for cls in (ModelOptions, DrawingOptions) for name in declared(cls)}
    return RenderOptions(size=size, strength=wanted.strength, tile_px=wanted.tile_px, colour_fix=wanted.colour_fix, **shared)


class Upscaler:
    """Enlarges pictures one after another; the network, and the model of a refinement, are loaded once.

    Both are loaded when they are first needed. Use it as a context manager, or `close` it. Not for several threads at once.

    Args:
        options: what applies to every picture, already as a request; None where it is given by keyword.
        models: what a refinement finds in memory, with `options`, while the caller has their turn; None loads its model for
            each picture.
        **keywords: those of `hires.upscale`, but for `output`, `overwrite` and `on_event`, which `run` takes.

    Raises:
        RequestError: a value that cannot be used.
    """

    @with_options(UpscaleOptions)
    def __init__(
        self, options: UpscaleRequest | None = None, models: LoadedModels | None = None, **keywords: Unpack[UpscaleKeywords]
    ) -> None:
        if options is None:
            options = _request_of_all(keywords)
        elif keywords:
            raise TypeError(f"Upscaler() takes a request, or options by keyword such as {next(iter(keywords))!r}; not both")
        self.options, self.models, self.device = options, models, choose_device(options.device)
        self._budget = None if options.vram is None else parse_bytes(str(options.vram))
        self._upscaler: UpscalerNetwork | None = None
        self._closed = self._shares = False
        if keywords and models is None:
            self.share()

    def share(self) -> None:
        """Let a refinement's model stay on the device between pictures, beside those of engines."""
        from hires.engine.loaded import models_on

        if self.options.refinement is not None:
            self.models, self._shares = models_on(str(self.device)), True

    @property
    def upscaler(self) -> UpscalerNetwork | None:
        """The network, loaded when it is first needed; None for Lanczos."""
        if self._upscaler is None and self.options.upscaler != "lanczos":
            self._upscaler = load_upscaler(self.options.upscaler, self.device, self.options.dtype)
        if self._upscaler is not None:
            self._upscaler.move(self.device)
        return self._upscaler

    def run(
        self,
        image: PictureLike,
        output: str | Path | None = None,
        overwrite: bool = False,
        on_event: OnEvent | None = None,
    ) -> UpscaleResult:
        """Enlarge one picture.

        Args:
            image: as `hires.upscale` takes it.
            output: the file to write; without one the picture stays in memory.
            overwrite: whether a file that is there is replaced.
            on_event: called with an Event as the work goes on; raising Cancelled in it stops the picture.

        Returns:
            An UpscaleResult, as `hires.upscale` gives it.

        Raises:
            RequestError, RunError, Cancelled: as `hires.upscale` does; RequestError also for one that is closed.
        """
        if self._closed:
            raise RequestError("upscaler: is closed; make another hires.Upscaler")
        path = None if output is None else check_output(path_of(output), overwrite)
        with self.models.at_work() if self._shares and self.models is not None else nullcontext():
            return self._run(image, path, overwrite, on_event or (lambda event: None))

    def _run(self, image: PictureLike, path: Path | None, overwrite: bool, tell: OnEvent) -> UpscaleResult:
        begun = time.monotonic()
        with ImageSource.open(image) as source:
            size = target_size(source.size, self.options, self.upscaler)
            dtype = values_of(source, path, self.options.bits)
            if path is not None:
                check_fits(path, size, source.bands, dtype)
            text = text_of(image)
            with _sink(path, source, size, dtype, overwrite, text) as sink, _beside(image, source) as beside:
                if self.options.refinement is None:
                    outcome = self._enlarged(source, beside, size, sink, clocked(tell, str(self.device), ("enlarge",)))
                else:
                    outcome = self._refined(source, beside, size, sink, tell)
                sink.close({"hires:upscale": json.dumps({"source": str(source.size), "notes": outcome.notes})} | outcome.text)
            result = UpscaleResult(
                path=path,
                source=source.size,
                size=size,
                upscaler=self.options.upscaler,
                notes=outcome.notes,
                tiles=outcome.tiles,
                retries=outcome.retries,
                seconds=time.monotonic() - begun,
                peak_rss_bytes=peak_resident_bytes(),
                refined=outcome.refined,
            )
            if isinstance(sink, ArraySink):
                result = replace(result, drawn=sink.pixels, icc=source.icc, text=text | sink.text)
            return result

    def close(self) -> None:
        """Let the network and the model go, for good."""
        self._upscaler, self._closed = None, True
        if self.models is not None:
            self.models = None  # the last one who holds them lets them go
            free_memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        refinement = self.options.refinement
        drawn_over = "" if refinement is None else f", refined by {refinement.model}"
        return f"<hires.Upscaler {self.options.upscaler}{drawn_over} on {self.device}{', closed' if self._closed else ''}>"

    def _enlarged(
        self, source: ImageSource, beside: ImageSource | None, size: Size, sink: ImageSink, tell: OnEvent
    ) -> _Enlarged:
        """The picture by rows into a sink."""
        upscaler = self.upscaler
        tiling = None if upscaler is None else plan_tiles(upscaler, source.size, self._working_bytes(), self.options.tile_px)

        def on_tile(done: int, total: int) -> None:
            tell(Event(stage="enlarge", done=done, total=total))

        enlarged = enlarge(source, beside, size, upscaler, tiling, on_tile)
        with freed_pages(self._freed()):
            for rows in bands_of(enlarged, sink.dtype):
                sink.write(rows)
                if upscaler is None:
                    tell(Event(stage="enlarge", done=sink.rows, total=size.height))
        if upscaler is None or enlarged.network is None:
            return _Enlarged()
        return _Enlarged(tiles=enlarged.network.tiles, retries=enlarged.network.retries, notes=upscaler.notes())

    def _refined(
        self, source: ImageSource, beside: ImageSource | None, size: Size, sink: ImageSink, tell: OnEvent
    ) -> _Enlarged:
        """The picture enlarged in memory, drawn over, and written with its alpha beside."""
        options, wanted = self.options, self.options.refinement
        assert wanted is not None
        self._check_refinement(wanted, size)
        whole, begun = ArraySink(size, source.bands, sink.dtype), time.monotonic()
        first = clocked(as_part(tell, 0.0, ENLARGE_SHARE, begun), str(self.device), ("enlarge",))
        enlarged = self._enlarged(source, beside, size, whole, first)
        self._step_aside()
        planes = source.bands - source.has_alpha
        colour = whole.pixels[..., :planes]
        refinement = replace(
            refinement_options(wanted, size),
            init=_bytes(colour),
            device=options.device,
            relay=structure_relay(source.size, size) if wanted.structure else None,
            vram=options.vram,
            ram=options.ram,
            on_event=as_part(tell, ENLARGE_SHARE, 1.0, begun),
            bits=8 if sink.dtype == np.uint8 else 16,
        )
        drawn = render_on(self.models, wanted.prompt, refinement)
        rows = max(1, 2**22 // (size.width * source.bands))
        for top in range(0, size.height, rows):
            fine = drawn.pixels[top : top + rows]
            own = np.rint(fine.mean(axis=2, keepdims=True)).astype(fine.dtype) if planes == 1 else fine
            coded = np.concatenate([_as(own, sink.dtype), whole.pixels[top : top + rows, :, planes:]], axis=2)
            sink.write(coded)
        text = {"prompt": wanted.prompt, "seed": str(wanted.seed), "model": wanted.model}
        text["hires:plan"] = json.dumps(drawn.plan.to_json(), default=str, sort_keys=True)
        return replace(enlarged, refined=replace(drawn, drawn=None, text={}), text=text)

    def _step_aside(self) -> None:
        """Leave the device to the diffusion model: the network waits in host memory, or goes where that is counted."""
        if self._upscaler is None:
            return
        if self.options.ram is None:
            self._upscaler.move(CPU)
            empty_cache()
        else:
            self._upscaler = None
            free_memory()

    def _freed(self) -> FreedPages:
        """What becomes of freed memory: it goes back where host memory is counted, and a network keeps it where nothing is."""
        if self.options.ram is not None:
            return "returned"
        return "kept" if self._upscaler is not None and self.device.type == "cpu" and self._budget is None else "usual"

    def prepare(self) -> None:
        """Load the network and read the model's facts, so that their errors come before any picture. Errors as in `upscale`."""
        _ = self.upscaler
        if self.options.refinement is not None:
            self._refinement_of(self.options.refinement, Size(1024, 1024))

    def _check_refinement(self, wanted: Refinement, size: Size) -> None:
        """Plan the refinement, so that what cannot run is an error before anything is enlarged."""
        request, spec = self._refinement_of(wanted, size)
        ram = None if self.options.ram is None else parse_bytes(str(self.options.ram))
        own = 0 if self.models is None else self.models.device_bytes
        planner.plan(request, spec, describe_device(str(self.device), self._budget, ram, own))

    def _refinement_of(self, wanted: Refinement, size: Size) -> tuple[RenderRequest, ModelSpec]:
        request = request_from(wanted.prompt, refinement_options(wanted, size), size, strength=wanted.strength)
        return request, text_to_image(spec_for(request), wanted.prompt)

    def _working_bytes(self) -> int | None:
        """What a tile may take on the device: on a card what the budget leaves beside models in memory; on a CPU the budget.

        Models that take over half of a card's budget go first.
        """
        if self.device.type != "cuda":
            return self._budget
        held = 0 if self.models is None else self.models.device_bytes
        budget = probe(self.device, self._budget, own_bytes=held).budget_bytes
        if self.models is not None and 2 * held > budget:
            self.models.unload()
            held = 0
        return budget - held


def _request_of_all(keywords: UpscaleKeywords) -> UpscaleRequest:
    """The request that applies to every picture. RequestError for an option that belongs to one."""
    for name in PER_PICTURE:
        if name in keywords:
            raise RequestError(f"{name}: belongs to one picture; give it to Upscaler.run")
    return upscale_request(chosen(UpscaleOptions, "Upscaler", keywords))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Enlarged:
    notes: tuple[str, ...] = ()
    tiles: int = 0
    retries: int = 0
    refined: RenderResult | None = None
    text: dict[str, str] = field(default_factory=dict)


@contextmanager
def _beside(image: PictureLike, source: ImageSource) -> Iterator[ImageSource | None]:
    """The same picture opened once more where it has an alpha, which is read at another pace."""
    if not source.has_alpha:
        yield None
        return
    with ImageSource.open(image) as beside:
        yield beside


def target_size(source: Size, options: UpscaleRequest, upscaler: UpscalerNetwork | None) -> Size:
    """The exact size of the result. SizeError for an invalid one."""
    if options.size is not None:
        return options.size
    by = options.scale or (DEFAULT_SCALE if upscaler is None else upscaler.scale)
    return scaled(source, by)


def values_of(source: ImageSource, path: Path | None, bits: int | None) -> np.dtype[np.generic]:
    """The type of values that is written: the requested one, else the picture's own, else the most that the format holds."""
    if bits is not None:
        return np.dtype(f"uint{bits}")
    if path is None:
        return source.dtype
    held: tuple[np.dtype[np.generic], ...] = format_of(path).dtypes
    return source.dtype if source.dtype in held else held[-1]


def text_of(image: PictureLike) -> dict[str, str]:
    """The text in a file, without the entries that describe its own size only."""
    if not isinstance(image, str | Path):
        return {}
    try:
        text = read_text(Path(image))
    except RequestError:  # a format that brings none
        return {}
    return {key: value for key, value in text.items() if key not in OWN_TEXT}


def _sink(
    path: Path | None, source: ImageSource, size: Size, dtype: np.dtype[np.generic], overwrite: bool, text: dict[str, str]
) -> ImageSink:
    if path is None:
        return ArraySink(size, source.bands, dtype)
    text = text | {"Software": f"hires {__version__}"}
    return ImageSink.open(path, size, source.bands, dtype, source.icc, text, overwrite=overwrite)


def _bytes(pixels: Pixels) -> NDArray[np.uint8]:
    """Pixels (H, W, 1 or 3) as (H, W, 3) uint8, which a diffusion model starts from."""
    eight = _as(pixels, np.dtype(np.uint8))
    return np.ascontiguousarray(np.broadcast_to(eight, (*eight.shape[:2], 3)))


def _as(pixels: Pixels, dtype: np.dtype[np.generic]) -> Pixels:
    """Coded values as those of another type: white stays white."""
    if pixels.dtype == dtype:
        return pixels
    most, least = (1.0 if np.issubdtype(kind, np.floating) else float(np.iinfo(kind).max) for kind in (dtype, pixels.dtype))
    scaled = pixels.astype(np.float32) * np.float32(most / least)
    if np.issubdtype(dtype, np.floating):
        return scaled.astype(dtype)
    whole: Pixels = np.clip(np.rint(scaled), 0, most).astype(dtype)
    return whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One picture of a batch."""

    file: Path
    result: UpscaleResult | None = None
    """None where it was skipped."""
    error: HiresError | None = None
    """What it was skipped with."""


def upscale_files(
    files: Sequence[Path],
    folder: Path,
    options: UpscaleRequest,
    *,
    suffix: str | None = None,
    overwrite: bool = False,
    on_event: OnEvent | None = None,
) -> Iterator[Outcome]:
    """Enlarge files into a folder under their own names, with another `suffix` if given; bad ones are reported and skipped.

    Events tell of the files, stage "files", and of each one's own stages. RequestError where the network cannot be used or two
    files would get one name.
    """
    named = {file: folder / (file.name if suffix is None else file.stem + suffix) for file in files}
    doubled = sorted({path.name for path in named.values() if list(named.values()).count(path) > 1})
    if doubled:
        raise RequestError(f"output {folder}: {doubled[0]} would be written more than once; give the files in turn")
    tell: OnEvent = on_event or (lambda event: None)
    with Upscaler(options) as batch:
        batch.share()
        batch.prepare()
        for done, (file, path) in enumerate(named.items()):
            tell(Event(stage="files", done=done, total=len(named)))
            try:
                yield Outcome(file=file, result=batch.run(file, check_output(path, overwrite), overwrite, on_event))
            except Cancelled:
                raise
            except HiresError as error:
                log.debug("%s: %s", file, error)
                yield Outcome(file=file, error=error)
        tell(Event(stage="files", done=len(named), total=len(named)))
