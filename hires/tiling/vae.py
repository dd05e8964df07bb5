"""Runs an AutoencoderKL in bands, with the pixels of the whole.

`TiledVAE(vae).decode(z)` equals `vae.decode(z)` up to rounding. Every layer runs over all rows before the next one starts:
convolutions read one neighbour row, GroupNorm statistics are merged over bands, the mid block attends to all tokens in
chunks. Storage policies, from fast to small, decide which maps are kept between layers; they never change the values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypedDict, Unpack

import torch
from torch import Tensor, nn

from hires.errors import RequestError, unknown
from hires.kernels.attention_policies import EVERYWHERE, NPA, Global, Policy, Rows, Windows
from hires.tiling.bands import finite
from hires.tiling.bands.layers import Layer, Progress, band_setting, decode_layers, encode_layers, kept_bands, last_rows
from hires.tiling.bands.memory import VaeShape
from hires.tiling.bands.rows import BandSetting, Given, RowMap, join
from hires.tiling.bands.storage import VAE_POLICIES, BandStorage, VaeTask, vae_ladder
from hires.tiling.geometry import Box, Size
from hires.tiling.retry import Ladder, attempt

log = logging.getLogger(__name__)
OnBand = Callable[[int, int], None]
"""Called with the bands done and in all; may raise to cancel."""


class StorageChoice(Protocol):
    """One way to run: a rung of a plan's ladder, or a `BandStorage`."""

    @property
    def policy(self) -> str:
        """The storage policy, one of `VAE_POLICIES`."""
        ...

    @property
    def band_rows(self) -> int:
        """Rows per band."""
        ...


class PixelSource(Protocol):
    """A picture that is read box by box, values in [-1, 1]."""

    @property
    def size(self) -> Size:
        """Height and width in pixels."""
        ...

    def crop(self, part: Box) -> Tensor:
        """Pixels (B, 3, part.height, part.width)."""
        ...


@dataclass(frozen=True, slots=True)
class WholePicture:
    """A tensor (B, 3, H, W) as a `PixelSource`."""

    pixels: Tensor

    @property
    def size(self) -> Size:
        """Height and width in pixels."""
        return Size(self.pixels.shape[-2], self.pixels.shape[-1])

    def crop(self, part: Box) -> Tensor:
        """Pixels (B, 3, part.height, part.width)."""
        return self.pixels[..., part.rows, part.cols]


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeRun:
    """What one decode or encode took."""

    policy: str
    """The policy that finished."""
    taken: int = 0
    """How many policies before it ran out of memory."""
    recomputed: int = 0
    """Bands computed again in float32 after an overflow."""
    halved: int = 0
    """How often the last map's bands were halved after an out-of-memory."""


class MidBlockKeywords(TypedDict, total=False):
    """How the mid block of a `TiledVAE` attends; the meanings are those of `MidBlock`."""

    attention: Policy
    attention_window: int | None
    backend: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MidBlock:
    """How the mid block of an autoencoder attends. RequestError for what cannot be."""

    attention: Policy = EVERYWHERE
    """Which latent cells it attends to."""
    attention_window: int | None = None
    """Short for `Rows(n)`."""
    backend: str | None = None
    """The attention backend, by its name in `kernels.dispatch`."""

    def __post_init__(self) -> None:
        if self.attention_window is not None and self.attention_window < 1:
            raise RequestError(f"attention_window={self.attention_window}: give at least 1 row")
        if self.attention_window is not None and self.attention != EVERYWHERE:
            raise RequestError(f"attention_window={self.attention_window} and attention {self.attention}: give one of the two")
        if isinstance(self.attention, Global) and self.attention.trained is not None:
            raise RequestError(
                f"attention {self.attention}: scores are not scaled in an autoencoder; give Global() or a window"
            )

    @property
    def policy(self) -> Policy:
        """The policy that either of the two gives."""
        return self.attention if self.attention_window is None else Rows(self.attention_window)


class TiledVAE:
    """Runs an AutoencoderKL of any widths in the memory of a few bands. Works beside any diffusers pipeline; no gradients.

    Args:
        vae: a diffusers AutoencoderKL; runs in its own dtype on its own device.
        budget_bytes: what it may hold on the device beyond its weights; the fastest policy that fits is used.
        policy: one of `VAE_POLICIES`, in place of a budget.
        band_px: rows of each map at a time (default 64).
        wrap: whether rows, columns wrap around (seamless textures); by default if the module's convolutions are circular. The
            encoder's downsampling wraps as well, which diffusers pads with zeros even then.
        attention: which latent cells the mid block attends to; every policy but `Global()` is an approximation, never chosen
            automatically.
        attention_window: short for `Rows(n)`: each row of latents attends to n rows around it.
        backend: the attention backend, by its name in `kernels.dispatch`; BackendRefused, with the reason, if it cannot run.

    After an out-of-memory the next smaller policy resumes from the last feature map if that is still whole, else from the
    start; finished rows stay. RequestError for an unknown policy, BudgetError if none fits, MemoryLadderError if the smallest
    one runs out of memory, NotFiniteError if the module gives NaN or infinity even in float32. `last` describes the last
    call; `retries` and `recomputed` count over all calls.
    """

    def __init__(
        self,
        vae: nn.Module,
        *,
        budget_bytes: int | None = None,
        policy: str | None = None,
        band_px: int | None = None,
        wrap: tuple[bool, bool] | None = None,
        **mid_block: Unpack[MidBlockKeywords],
    ) -> None:
        if policy is not None and policy not in VAE_POLICIES:
            raise RequestError(unknown("VAE policy", policy, VAE_POLICIES))
        if band_px is not None and band_px < 1:
            raise RequestError(f"band_px={band_px}: give at least 1 row")
        config: Any = vae.config
        self.vae, self.budget_bytes, self.policy, self.band_px = vae, budget_bytes, policy, band_px
        attending = MidBlock(**mid_block)
        self.attention, self.backend = attending.policy, attending.backend
        self.ladder: Ladder[Any] | None = None
        self.cell_px = 2 ** (len(config.block_out_channels) - 1)
        circular = is_circular(vae)
        self.wrap = (circular, circular) if wrap is None else wrap
        self.shape = VaeShape(
            channels=tuple(config.block_out_channels),
            resnets=config.layers_per_block,
            latent_channels=config.latent_channels,
            mid_attention=getattr(config, "mid_block_add_attention", True),
        )
        self.last: VaeRun | None = None
        self.retries = self.recomputed = 0

    @classmethod
    def on_ladder(cls, vae: nn.Module, ladder: Ladder[Any]) -> TiledVAE:
        """An autoencoder that runs on the rungs of a plan; after a descent later calls start at the lower rung."""
        tiled = cls(vae)
        tiled.ladder = ladder
        return tiled

    def plan(self, h: int, w: int, *, batch: int = 1, encode: bool = False) -> tuple[BandStorage, ...]:
        """The policies for latents of h x w cells in the order they are tried, with their bytes."""
        bring_home(self.vae)
        first = next(self.vae.parameters())
        if self.policy is not None:
            at = VAE_POLICIES.index(self.policy)
            names, budget = VAE_POLICIES[at:], None
        else:  # on a CPU, host memory is the same memory
            names = VAE_POLICIES[:-1] if first.device.type == "cpu" else VAE_POLICIES
            budget = self.budget_bytes
        task = VaeTask(
            shape=self.shape,
            cells=Size(h, w),
            element=first.element_size(),
            batch=batch,
            cpu=first.device.type == "cpu",
            encode=encode,
            attention=self.attention,
        )
        return vae_ladder(task, budget, names=names, band_rows=self.band_px)

    def descend(self, message: str) -> None:
        """Go to the next rung of the plan after an out-of-memory outside the bands. MemoryLadderError after the last rung."""
        assert self.ladder is not None, "only an autoencoder with a plan's ladder descends"
        self.ladder.descend(message)
        self.retries += 1

    def _ladder(self, h: int, w: int, *, batch: int = 1, encode: bool = False) -> Ladder[Any]:
        return self.ladder or Ladder(self.plan(h, w, batch=batch, encode=encode), str)

    def decode(self, z: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) of latents (B, C, h, w) as `vae.decode` takes them."""
        return join(list(self.decode_bands(z)))

    @torch.no_grad()
    def decode_bands(self, z: Tensor, on_band: OnBand | None = None, start: int = 0) -> Iterator[Tensor]:
        """Yield finished rows (B, 3, rows, W) from `start` to the bottom, in the module's dtype on its device.

        `on_band(done, total)` is called for every band of every feature map and may raise to cancel.
        """
        run = Run(self.vae, self.wrap, self.attention, self.backend, on_band)
        height, done = z.shape[2] * self.cell_px, start
        ladder = self._ladder(z.shape[2], z.shape[3], batch=z.shape[0])
        begun = ladder.taken
        while done < height:
            bands, message = run.decode(z, ladder.rung, done), ""
            while done < height and not message:
                band, message = attempt(next, bands)
                if band is not None:
                    done += band.shape[2]
                    yield band
            del bands, band
            if message:
                ladder.descend(message)
        self._finished(run, ladder, begun)

    def encode(self, x: Tensor | PixelSource, on_band: OnBand | None = None) -> Tensor:
        """The posterior's unscaled mean (B, C, h, w) of pixels (B, 3, H, W) in [-1, 1], or of a picture read box by box."""
        return self.moments(x, on_band).chunk(2, dim=1)[0]

    @torch.no_grad()
    def moments(self, x: Tensor | PixelSource, on_band: OnBand | None = None) -> Tensor:
        """The posterior's mean and log-variance (B, 2 C, h, w), the argument of diffusers' DiagonalGaussianDistribution."""
        source = WholePicture(x) if isinstance(x, Tensor) else x
        run = Run(self.vae, self.wrap, self.attention, self.backend, on_band)
        cells, batch = source.size.divided(self.cell_px), x.shape[0] if isinstance(x, Tensor) else 1
        ladder = self._ladder(cells.height, cells.width, batch=batch, encode=True)
        begun = ladder.taken
        parameters = ladder.run(lambda rung: run.encode(source, rung))
        self._finished(run, ladder, begun)
        return parameters

    def _finished(self, run: Run, ladder: Ladder[Any], begun: int) -> None:
        taken = ladder.taken - begun
        self.last = VaeRun(policy=ladder.rung.policy, taken=taken, recomputed=run.recomputed, halved=run.halved)
        self.retries, self.recomputed = self.retries + taken + run.halved, self.recomputed + run.recomputed


def bring_home(vae: nn.Module) -> None:
    """Run accelerate's offload hook of the module (`enable_model_cpu_offload`), as its own `decode` would.

    RequestError under `enable_sequential_cpu_offload`, which loads layers one by one: bands read their weights directly.
    """
    hook: Any = getattr(vae, "_hf_hook", None)
    if hook is not None and hasattr(hook, "pre_forward"):
        hook.pre_forward(vae)
    if any(parameter.device.type == "meta" for parameter in vae.parameters()):
        raise RequestError(
            "the autoencoder's weights are not loaded: enable_sequential_cpu_offload loads them one layer at a time; "
            "use enable_model_cpu_offload, or exclude the autoencoder from it"
        )


def is_circular(module: nn.Module) -> bool:
    """Whether a convolution of the module wraps around."""
    return any(isinstance(part, nn.Conv2d) and part.padding_mode == "circular" for part in module.modules())


class Run:
    """One decode or encode. A rung can resume from what the previous one finished before it ran out of memory."""

    def __init__(
        self,
        vae: nn.Module,
        wrap: tuple[bool, bool] = (False, False),
        attention: Policy = EVERYWHERE,
        backend: str | None = None,
        on_band: OnBand | None = None,
    ) -> None:
        self.vae, self.wrap, self.attention, self.backend, self.on_band = vae, wrap, attention, backend, on_band
        self.progress = Progress()
        self._settings: list[BandSetting] = []
        bring_home(vae)
        first = next(vae.parameters())
        self.device, self.dtype = first.device, first.dtype

    @property
    def recomputed(self) -> int:
        """Bands that overflowed in half precision so far and were computed again."""
        return sum(setting.recomputed for setting in self._settings)

    @property
    def halved(self) -> int:
        """How often the bands of the last map were halved so far."""
        return sum(setting.halved for setting in self._settings)

    def decode(self, z: Tensor, rung: StorageChoice, start: int = 0) -> Iterator[Tensor]:
        """Yield decoded rows from `start` on under one policy; `whole` runs the module itself."""
        if self._is_module(rung):
            rows: Tensor = self.vae.decode(z.to(self.device, self.dtype), return_dict=False)[0]  # type: ignore[operator]
            if self._finite(rows):
                self._report(1, 1)
                yield rows[:, :, start:]
                return
            del rows
        setting = self._setting(rung, z.shape[2])
        layers = decode_layers(self.vae)

        def read(top: int, bottom: int) -> Tensor:
            return z[..., top:bottom, :].to(self.device, setting.dtype)

        picture = self._through(layers, Given(z.shape[1], z.shape[2], z.shape[3], read), setting, start)
        yield from last_rows(picture, setting, start)

    def encode(self, source: PixelSource, rung: StorageChoice) -> Tensor:
        """The posterior's mean and log-variance under one policy."""
        size = source.size
        if self._is_module(rung):
            pixels = source.crop(Box(0, 0, size.height, size.width)).to(self.device, self.dtype)
            parameters: Tensor = self.vae.encode(pixels).latent_dist.parameters  # type: ignore[operator]
            if self._finite(parameters):
                self._report(1, 1)
                return parameters
            del parameters, pixels
        setting = self._setting(rung, size.height)

        def read(top: int, bottom: int) -> Tensor:
            return source.crop(Box(top, 0, bottom - top, size.width)).to(self.device, setting.dtype)

        latents = self._through(encode_layers(self.vae), Given(3, size.height, size.width, read), setting)
        return join(list(last_rows(latents, setting)))

    def _through(self, layers: list[Layer], given: RowMap, setting: BandSetting, start: int = 0) -> RowMap:
        """The last layer's map, resumed from the last whole one. Reports the bands from there on."""
        x = self.progress.resume(setting, given)
        total, done = kept_bands(layers[self.progress.layers :], x.height, setting, start), 0

        def count() -> None:
            nonlocal done
            done += 1
            self._report(min(done, total), total)

        setting.on_band = count
        return self.progress.run(layers, x, setting)

    def _is_module(self, rung: StorageChoice) -> bool:
        """Whether a rung runs the module itself; otherwise `whole` means one band per map.

        The module chooses its own attention backend and padding, so it runs only if neither is set here, and only if its own
        tiling is off.
        """
        wraps = any(self.wrap) or is_circular(self.vae) or getattr(self.vae, "use_tiling", False)
        return rung.policy == "whole" and not wraps and self.attention == EVERYWHERE and self.backend is None

    def _finite(self, result: Tensor) -> bool:
        """Whether the whole result is finite; False if half precision overflowed and bands must compute it again.

        NotFiniteError if a float32 result is not finite.
        """
        if finite.all_finite(result):
            return True
        if result.dtype not in finite.LOWER:
            finite.check_finite(result, "the whole result")
        log.warning("the whole result overflowed in half precision and is computed again in one band")
        return False

    def _setting(self, rung: StorageChoice, height: int) -> BandSetting:
        whole = rung.policy == "whole"
        setting = band_setting(
            "bands" if whole else rung.policy, 64 * height if whole else rung.band_rows, self.wrap, self.dtype
        )
        setting.attention, setting.backend = self.attention, self.backend
        if isinstance(self.attention, NPA | Windows):
            setting.attention = replace(self.attention, circular=self.wrap)
        self._settings.append(setting)
        return setting

    def _report(self, done: int, total: int) -> None:
        if self.on_band is not None:
            self.on_band(done, total)
