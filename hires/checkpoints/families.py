"""The families of models: what their files do not tell, and how they are run.

Imports no torch.

`identify` finds the row from a checkpoint's keys; where keys cannot tell (Turbo, a merged LCM, DMD) the user names it.
Facts from the model cards, the papers and the upstream configurations.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hires.options.render import SAMPLER_NAMES, SCHEDULE_NAMES
from hires.options.stage import ENLARGERS, GUIDES
from hires.sampling.registry import FEW_STEP

REFINES = ("npa", "tiles")
SDXL_BETAS = ("scaled_linear", 0.00085, 0.012)
TURBO_RELAY = 1.6129  # of timestep 499: the relay takes 499 and 249
SDXL_LEAST = 0.03  # the lowest level of SDXL's own timesteps; below it eight bits show nothing
DMD_SIGMA = 2.0411  # of timestep 400, the only one that DMD knows
PIXART_BETAS = ("linear", 0.0001, 0.02)


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetShape:
    """What decides the cost of a UNet; levels are counted from the finest."""

    channels: tuple[int, ...]
    """Channels per level."""
    resnets: int
    """Resnet blocks per level of the down path."""
    transformer_layers: tuple[int | tuple[int, ...], ...]
    """Transformer blocks per resnet, per level: one number, or one for each resnet; 0 for a level without attention."""
    context_width: int
    """Width of the text states."""
    latent_channels: int
    """Channels of the input."""
    mid_layers: int | None = None
    """Transformer blocks of the mid block; None for as many as the last level has (SD1.5's last level has none, its mid block
    one).
    """
    head_dims: tuple[int, ...] = ()
    """Width of an attention head per level."""
    guidance_width: int = 0
    """Width of the embedding that tells an LCM's UNet the guidance scale, instead of two evaluations; 0 without one."""
    up_transformer_layers: tuple[int | tuple[int, ...], ...] = ()
    """The transformer blocks of the up path, as `transformer_layers`; empty where they are the same numbers."""
    mid_resnets: int = 2
    """Resnet blocks of the mid block: 1 for one without attention, 0 for none at all."""

    def down(self, level: int) -> tuple[int, ...]:
        """Transformer blocks after each resnet of a level of the down path."""
        layers = self.transformer_layers[level]
        return (layers,) * self.resnets if isinstance(layers, int) else layers

    def up(self, level: int) -> tuple[int, ...]:
        """Transformer blocks after each resnet of a level of the up path, which has one resnet more."""
        layers = (self.up_transformer_layers or self.transformer_layers)[level]
        return (layers,) * (self.resnets + 1) if isinstance(layers, int) else layers

    @property
    def middle(self) -> int:
        """Transformer blocks of the mid block."""
        return self.down(len(self.channels) - 1)[-1] if self.mid_layers is None else self.mid_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class PixArtShape:
    """What decides the cost of a PixArt transformer: blocks of `heads` x `head_dim` channels on patches of cells."""

    layers: int
    """Transformer blocks."""
    heads: int
    head_dim: int
    patch: int
    """Cells per side of a token."""
    caption_width: int
    """Width of the text states."""
    latent_channels: int
    """Channels of the latents."""
    kv_compression: tuple[int, ...] = ()
    """The factor per axis by which keys and values are thinned in each block, 1 for none."""
    kv_pooled: bool = False
    """Whether they are thinned by their mean, in a checkpoint that was not trained to (an experiment)."""
    control_blocks: int = 0
    """Copied blocks of a ControlNet that run beside blocks 1, 2, and so on."""

    @property
    def width(self) -> int:
        """Channels of the transformer's tokens."""
        return self.heads * self.head_dim


NetworkShape = UNetShape | PixArtShape


def second_half_factors(layers: int, factor: int = 2) -> tuple[int, ...]:
    """Factors of key-value compression as the Σ paper places them: dense in the first half of the blocks (0..13 of 28)."""
    return (1,) * (layers - layers // 2) + (factor,) * (layers // 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """How a model is run unless the request says otherwise.

    The first stage starts from noise; each later one enlarges the picture, adds noise and takes steps down again (the relay).
    A tuple of the relay holds one value per later stage; its last value applies to all further ones.
    """

    sampler: str
    """A name of `sampling.registry.SAMPLER_FACTS`."""
    schedule: str
    """A name of `sampling.registry.SCHEDULE_FACTS`."""
    steps: int
    """Steps of the first stage."""
    guidance: float
    """The CFG scale of the first stage."""
    relay_sigma: float
    """The noise level that an enlarged picture is given."""
    relay_steps: tuple[int, ...]
    """Steps of each later stage."""
    relay_guidance: float
    """The CFG scale of later stages; 1 turns guidance off and halves the cost."""
    tile_px: int
    """The side of a tile: the size that the model was trained at."""
    overlap_px: int
    """How far tiles overlap."""
    enlarger: tuple[str, ...]
    """How each later stage enlarges, one of `ENLARGERS`."""
    image_guidance: float = 1.5
    """How closely an edit keeps to the picture."""
    few_step: str | None = None
    """What a folder's hires.json says that its checkpoint was distilled for: lcm, turbo or dmd."""
    relay_sigma_end: float = 0.0
    """The last noise level of later stages before 0; 0 for the model's least."""
    relay_sampler: tuple[str, ...] = ()
    """The sampler of each later stage; without one, and where tiles move and it would reuse estimates, `sampler`."""
    refine: str = "npa"
    """How later stages see the canvas: whole, with attention in neighbourhoods (npa), or in tiles."""
    guides: tuple[str, ...] = ("structure",)
    """What holds a later stage to the picture before it, of `GUIDES`."""
    words_only: bool = False
    """Whether its text towers know no weights and no other syntax of prompts."""
    latent_rgb: tuple[tuple[float, ...], ...] | None = None
    """A linear map from latents to colours as in `previews.RGB_OF_LATENTS`, for an autoencoder of its own."""

    def check(self) -> None:
        """ValueError or TypeError for values that no run could use."""
        if not (
            self.steps >= 1
            and self.relay_steps
            and min(self.relay_steps) >= 1
            and 0 <= self.overlap_px < self.tile_px
            and self.relay_sigma > 0
        ):
            raise ValueError("steps, tile or relay values out of range")
        if not {self.sampler, *self.relay_sampler} <= set(SAMPLER_NAMES):
            raise ValueError(f"sampler {self.sampler!r} or one of relay_sampler {self.relay_sampler!r} is unknown")
        if self.schedule not in SCHEDULE_NAMES or not self.enlarger or not set(self.enlarger) <= set(ENLARGERS):
            raise ValueError(f"schedule {self.schedule!r} or one of enlarger {self.enlarger!r} is unknown")
        if self.refine not in REFINES or not set(self.guides) <= set(GUIDES):
            raise ValueError(f"refine {self.refine!r} or guides {self.guides!r}: one is unknown")
        if self.latent_rgb is not None and not all(len(row) == 3 for row in self.latent_rgb):
            raise ValueError("latent_rgb: a row holds three colours")
        if self.few_step is not None and self.few_step not in FEW_STEP:
            raise ValueError(f"few_step {self.few_step!r} is none of {', '.join(FEW_STEP)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Relay:
    """How a model draws the stages after the first; few-step models start from a timestep that they know."""

    steps: tuple[int, ...] = (10, 8, 6)
    """Steps of the second stage, the third and so on."""
    guidance: float = 4.0
    sigma: float = 1.0
    """The noise level at which a stage starts."""
    sigma_end: float = 0.0
    """The last noise level before 0; 0 for the model's least."""


METHODS_RELAY = Relay()
"""The values of the methods' reference."""


def _defaults(sampler: str, schedule: str, steps: int, guidance: float, tile_px: int, relay: Relay = METHODS_RELAY) -> Defaults:
    """A model's defaults; tiles overlap by a quarter, and stages are enlarged in pixels."""
    return Defaults(
        sampler=sampler,
        schedule=schedule,
        steps=steps,
        guidance=guidance,
        relay_sigma=relay.sigma,
        relay_steps=relay.steps,
        relay_guidance=relay.guidance,
        tile_px=tile_px,
        overlap_px=tile_px // 4,
        enlarger=("pixel",),
        relay_sigma_end=relay.sigma_end,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyFacts:
    """The facts of one family."""

    name: str
    title: str
    """Its name for people."""
    network: str
    """The kind of network: unet or pixart."""
    parameterisation: str
    """What the network predicts: edm_v, eps, v or x0."""
    latent_scale: float
    """The factor on the VAE's latents."""
    native_px: int
    """The side of the pictures that it was trained on."""
    text: tuple[str, ...]
    """Its text encoders."""
    tokens: int
    """The length of their input."""
    configs: str
    """The folder under assets/configs with the JSON that a single file lacks."""
    defaults: Defaults
    betas: tuple[str, float, float] | None = None
    """(kind, first, last) of the 1000 timesteps of a variance-preserving model; None for EDM."""
    sigma_range: tuple[float, float] | None = None
    """The least and the largest sigma of an EDM model, where its file has none."""
    zero_terminal_snr: bool = False
    """Whether the last timestep is pure noise."""
    latent_channels: int = 4
    image_channels: int = 0
    """Further input channels that hold a picture to edit."""
    image_scaled: bool = True
    """Whether these are multiplied by `latent_scale`."""
    bins: int | None = None
    """The size class in px of its aspect-ratio table; None for the engine's own."""
    position_span: float | None = None
    """How many units PixArt's position embedding spans per axis, whatever the size."""
    size_conditions: str | None = None
    """The conditions on the size: sdxl (six numbers), pixart (resolution, aspect ratio) or None."""
    few_step: str | None = None
    """How it was distilled: lcm, turbo, dmd or None."""
    start_timestep: int | None = None
    """The timestep that a model starts from which knows no more noise."""
    same_keys_as: str | None = None
    """The family whose files look alike, so that the user must name this one."""
    parts_from: tuple[str, ...] = field(default=())
    """Repositories on the Hugging Face hub with the parts that a single file lacks."""


CLIP_TOWERS = ("clip_l", "clip_g")
SDXL_PARTS = ("stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/sdxl-turbo", "diffusers/sdxl-instructpix2pix-768")
SD15_PARTS = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5")
SIGMA_PARTS = ("PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS")
ALPHA_PARTS = ("PixArt-alpha/PixArt-XL-2-1024-MS", "PixArt-alpha/PixArt-XL-2-512x512", "PixArt-alpha/PixArt-LCM-XL-2-1024-MS")
# Parameters of the published parts, for plans of files whose parts are not here.
PART_PARAMS = {"clip_l": 123_060_480, "clip_g": 694_659_840, "t5": 4_762_310_656, "vae": 83_653_863}


def _sdxl(name: str, title: str, parameterisation: str, defaults: Defaults, **facts: object) -> FamilyFacts:
    """A member of the SDXL layout."""
    shared: dict[str, object] = {
        "network": "unet",
        "latent_scale": 0.13025,
        "native_px": 1024,
        "text": CLIP_TOWERS,
        "tokens": 77,
        "bins": 1024,
        "configs": "sdxl",
        "betas": SDXL_BETAS,
        "size_conditions": "sdxl",
        "parts_from": SDXL_PARTS,
    }
    return FamilyFacts(name=name, title=title, parameterisation=parameterisation, defaults=defaults, **(shared | facts))  # type: ignore[arg-type]


def _pixart(name: str, title: str, native_px: int, defaults: Defaults, **facts: object) -> FamilyFacts:
    """A member of the PixArt layout; Σ unless said otherwise."""
    shared: dict[str, object] = {
        "network": "pixart",
        "parameterisation": "eps",
        "latent_scale": 0.13025,
        "text": ("t5",),
        "tokens": 300,
        "configs": "pixart",
        "betas": PIXART_BETAS,
        "bins": native_px,
        "position_span": 32.0,
        "parts_from": SIGMA_PARTS,
    }
    return FamilyFacts(name=name, title=title, native_px=native_px, defaults=defaults, **(shared | facts))  # type: ignore[arg-type]


ALPHA = {"latent_scale": 0.18215, "tokens": 120, "parts_from": ALPHA_PARTS}
COSXL_RUN = _defaults("euler", "exponential", 30, 7.0, 1024, relay=Relay(sigma_end=SDXL_LEAST))
PIXART_RUN = ("dpmpp_2m", "linspace", 20, 4.5)
_ROWS = (
    _sdxl("cosxl", "CosXL", "edm_v", COSXL_RUN, betas=None, sigma_range=(0.002, 120.0)),
    _sdxl(
        "cosxl-edit",
        "CosXL-Edit",
        "edm_v",
        replace(COSXL_RUN, steps=20),
        betas=None,
        sigma_range=(0.002, 120.0),
        image_channels=4,
    ),
    _sdxl("sdxl", "SDXL", "eps", _defaults("dpmpp_2m", "karras", 30, 6.0, 1024)),
    _sdxl("sdxl-v", "SDXL, v-prediction", "v", _defaults("euler", "linear", 28, 5.0, 1024)),
    _sdxl(
        "sdxl-ip2p",
        "SDXL InstructPix2Pix",
        "eps",
        _defaults("euler", "linear", 30, 5.0, 768),
        native_px=768,
        bins=None,
        image_channels=4,
        image_scaled=False,
    ),
    _sdxl(
        "sdxl-turbo",
        "SDXL-Turbo",
        "eps",
        _defaults("euler_ancestral", "trailing", 4, 1.0, 512, Relay(steps=(2,), guidance=1.0, sigma=TURBO_RELAY)),
        native_px=512,
        bins=512,
        few_step="turbo",
        same_keys_as="sdxl",
    ),
    _sdxl(
        "sdxl-lcm",
        "SDXL with LCM-LoRA",
        "eps",
        _defaults("lcm", "lcm", 4, 1.0, 1024, Relay(steps=(2,), guidance=1.0)),
        few_step="lcm",
        same_keys_as="sdxl",
    ),
    _sdxl(
        "sd15",
        "Stable Diffusion 1.5",
        "eps",
        _defaults("dpmpp_2m", "karras", 25, 7.0, 512),
        latent_scale=0.18215,
        native_px=512,
        bins=512,
        text=("clip_l",),
        configs="sd15",
        size_conditions=None,
        parts_from=SD15_PARTS,
    ),
    _pixart("pixart-sigma-256", "PixArt-Σ 256", 256, _defaults(*PIXART_RUN, 256)),
    _pixart("pixart-sigma-512", "PixArt-Σ 512", 512, _defaults(*PIXART_RUN, 512)),
    _pixart("pixart-sigma-1024", "PixArt-Σ 1024", 1024, _defaults(*PIXART_RUN, 1024)),
    _pixart("pixart-sigma-2k", "PixArt-Σ 2K", 2048, _defaults(*PIXART_RUN, 2048)),
    _pixart(
        "pixart-sigma-4k", "PixArt-Σ 2K at 4K settings", 2880, _defaults(*PIXART_RUN, 2048), same_keys_as="pixart-sigma-2k"
    ),
    _pixart("pixart-alpha-256", "PixArt-α 256", 256, _defaults(*PIXART_RUN, 256), position_span=16.0, **ALPHA),
    _pixart("pixart-alpha-512", "PixArt-α 512", 512, _defaults(*PIXART_RUN, 512), **ALPHA),
    _pixart("pixart-alpha-1024", "PixArt-α 1024", 1024, _defaults(*PIXART_RUN, 1024), size_conditions="pixart", **ALPHA),
    _pixart(
        "pixart-delta",
        "PixArt-δ (LCM) 1024",
        1024,
        _defaults("lcm", "lcm", 4, 1.0, 1024, Relay(steps=(2,), guidance=1.0)),
        size_conditions="pixart",
        few_step="lcm",
        same_keys_as="pixart-alpha-1024",
        **ALPHA,
    ),
    _pixart(
        "pixart-dmd",
        "PixArt-α DMD 512",
        512,
        _defaults("euler", "trailing", 1, 1.0, 512, Relay(steps=(1,), guidance=1.0, sigma=DMD_SIGMA)),
        few_step="dmd",
        start_timestep=400,
        same_keys_as="pixart-alpha-512",
        **ALPHA,
    ),
    _pixart(
        "yoso-pixart-512",
        "YOSO PixArt-α 512",
        512,
        _defaults("lcm", "lcm", 2, 1.5, 512, Relay(steps=(1,), guidance=1.0)),
        few_step="lcm",
        same_keys_as="pixart-alpha-512",
        **ALPHA,
    ),
)
FAMILIES = {facts.name: facts for facts in _ROWS}
