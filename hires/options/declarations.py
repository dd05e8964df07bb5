"""Every option of a render, declared once, in groups that `render.py` and `upscale.py` compose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from hires.errors import RequestError
from hires.events import OnEvent
from hires.kernels.attention_policies import POLICIES
from hires.options.fields import Option, Options, PictureLike, check
from hires.options.lora import LoraRef, Loras
from hires.options.sizes import SizeLike
from hires.options.stage import StageSpec
from hires.options.stage_text import STAGE_KEYS, StageLike
from hires.sampling import registry
from hires.tiling.geometry import Size

__all__ = ["LoraRef", "Size", "StageSpec"]  # names that the annotations below are resolved with

STRATEGIES = ("auto", "direct", "tiled", "progressive")
PRESETS = ("fast", "balanced", "best")
COLOUR_FIXES = ("wavelet", "adain")
DTYPES = ("auto", "fp32", "bf16", "fp16")
SCHEDULE_NAMES = tuple(registry.SCHEDULE_FACTS)
POSITION_MODES = ("global", "local", "blend")
KV_COMPRESSIONS = ("checkpoint", "average")
PROMPT_SYNTAXES = ("a1111", "comfyui", "none")
KEEP_WEIGHTS = ("auto", "device", "host", "no")
SAMPLER_NAMES = tuple(registry.SAMPLER_FACTS)
WEIGHTS = ("fp8", "int8", "nf4")
BITS = (8, 16)
PREDICTIONS = ("eps", "v", "x0", "edm-v")


@dataclass(frozen=True, kw_only=True)
class MachineOptions(Options):
    device: Annotated[str, Option(help="auto, cpu or cuda:0.", group="machine", panel="Memory", local=True)] = "auto"
    vram: Annotated[
        str | int | None,
        Option(
            help="Memory budget, such as 24GB or 12GiB; default: what is free.", metavar="SIZE", group="machine", panel="Memory"
        ),
    ] = None
    ram: Annotated[
        str | int | None,
        Option(
            help="What the whole process may hold in host memory, such as 3GB.",
            metavar="SIZE",
            group="machine",
            panel="Memory",
            local=True,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    model: Annotated[
        str,
        Option(
            help="demo (ships with hires), a checkpoint file, a diffusers folder, or org/name on the hub.",
            group="model",
            panel="Model",
        ),
    ] = "demo"
    family: Annotated[
        str | None,
        Option(
            help="What the model is where its keys are those of several, such as sdxl-turbo.",
            metavar="NAME",
            group="model",
            panel="Model",
        ),
    ] = None
    few_step: Annotated[
        str | None,
        Option(
            help="How a few-step model is run, such as lightning-4 or dmd2; none: as the plain model. Default: by its name.",
            metavar="NAME",
            group="model",
            panel="Model",
        ),
    ] = None
    parts: Annotated[
        str | Path | None,
        Option(
            help="A diffusers folder with parts that the model lacks: tokenizers, text encoders, VAE.",
            metavar="FOLDER",
            group="model",
            panel="Model",
            local=True,
        ),
    ] = None
    lora_dir: Annotated[
        str | Path | None,
        Option(
            help="Where the LoRAs of prompts are, such as <lora:style:0.8>.",
            metavar="FOLDER",
            group="model",
            panel="Model",
            local=True,
        ),
    ] = None
    embeddings: Annotated[
        str | Path | None,
        Option(
            help="Where the textual inversions of prompts are, such as embedding:style.",
            metavar="FOLDER",
            group="model",
            panel="Model",
            local=True,
        ),
    ] = None
    vae: Annotated[
        str | Path | None,
        Option(
            help="An autoencoder in place of the model's own: a file such as sdxl_vae.safetensors, or its diffusers folder.",
            metavar="FILE|FOLDER",
            group="model",
            panel="Model",
            local=True,
        ),
    ] = None
    prediction: Annotated[
        str | None,
        Option(
            help=f"What the network predicts, where its keys do not tell: {', '.join(PREDICTIONS)}.",
            metavar="NAME",
            choices=PREDICTIONS,
            group="model",
            panel="Model",
        ),
    ] = None
    zero_terminal_snr: Annotated[
        bool,
        Option(
            help="The model was trained to start from pure noise (v-prediction), and its keys do not tell.",
            group="model",
            panel="Model",
        ),
    ] = False
    loras: Annotated[
        Loras,
        Option(
            help="A LoRA to merge, its strength on the network, and on the text; may be given several times.",
            flag="--lora",
            metavar="PATH[:SCALE[:TEXT]]",
            group="model",
            panel="Model",
        ),
    ] = ()


@dataclass(frozen=True, kw_only=True)
class LoadedNetworkOptions(Options):
    """How the network is loaded."""

    dtype: Annotated[str, Option(help=f"One of {', '.join(DTYPES)}.", choices=DTYPES, group="machine", panel="Memory")] = "auto"
    weights: Annotated[
        str | None,
        Option(
            help="Keep the network's and the VAE's weights in 8 or 4 bits (an approximation): fp8, int8 or nf4.",
            metavar="NAME",
            choices=WEIGHTS,
            group="machine",
            panel="Memory",
        ),
    ] = None
    attention: Annotated[
        str | None,
        Option(
            help="Force an attention backend; `hires info` lists them.",
            metavar="NAME",
            group="machine",
            panel="Model",
            local=True,
        ),
    ] = None
    tiny_vae: Annotated[
        str | Path | None,
        Option(
            help="A small autoencoder (TAESDXL): for previews and as the last resort.",
            metavar="FOLDER",
            group="model",
            panel="Model",
            local=True,
        ),
    ] = None
    kv_compression: Annotated[
        str,
        Option(
            help="PixArt: checkpoint, or average (an experiment: keys and values thinned 2 x 2).",
            choices=KV_COMPRESSIONS,
            group="model",
            panel="Quality",
        ),
    ] = "checkpoint"


@dataclass(frozen=True, kw_only=True)
class KeepOptions(Options):
    """Where models stay between requests."""

    keep_weights: Annotated[
        str,
        Option(
            help="Where a model stays between pictures: device, host, no, or auto (the device while the next plan has room).",
            choices=KEEP_WEIGHTS,
            group="machine",
            panel="Memory",
            local=True,
        ),
    ] = "auto"


@dataclass(frozen=True, kw_only=True)
class LoadOptions(MachineOptions, ModelOptions, LoadedNetworkOptions, KeepOptions):
    """The options of `hires.load`: what belongs to the machine and to the model."""


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(LoadedNetworkOptions):
    """How the network runs."""

    position_mode: Annotated[
        str,
        Option(
            help=f"Where a PixArt tile is told that it lies: {', '.join(POSITION_MODES)}.",
            flag="--positions",
            choices=POSITION_MODES,
            panel="Quality",
        ),
    ] = "global"


@dataclass(frozen=True, kw_only=True)
class PromptOptions(Options):
    """How prompts are read."""

    prompt_syntax: Annotated[
        str | None,
        Option(
            help="Of weights such as (word:1.3): a1111 (default), comfyui or none; T5 and the shipped model take words alone.",
            choices=PROMPT_SYNTAXES,
            panel="Prompt",
        ),
    ] = None
    clip_skip: Annotated[
        int | None,
        Option(
            help="CLIP's layer to draw from, counted from the last: 1 or 2 for SD1.5, 2 for SDXL.",
            metavar="N",
            ge=1,
            le=12,
            panel="Prompt",
            advice="a layer from 1 (the last) to 12",
        ),
    ] = None
    prompt_l: Annotated[
        str | None, Option(help="What SDXL's first text tower (CLIP-L) reads instead.", metavar="TEXT", panel="Prompt")
    ] = None
    negative_l: Annotated[str | None, Option(help="The same of the negative prompt.", metavar="TEXT", panel="Prompt")] = None
    original_size: Annotated[
        SizeLike | None,
        Option(help="The original size that SDXL is told; default: the canvas.", metavar="WxH", panel="Prompt"),
    ] = None
    target_size: Annotated[
        SizeLike | None,
        Option(help="The target size that SDXL is told; default: the canvas.", metavar="WxH", panel="Prompt"),
    ] = None
    crop: Annotated[
        str | tuple[int, int] | None,
        Option(help="Where SDXL is told that its crop begins, from the left and the top.", metavar="X,Y", panel="Prompt"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class DrawingOptions(PromptOptions):
    """What every run of a diffusion model has."""

    negative: Annotated[str, Option(help="What to keep out of the picture.")] = ""
    seed: Annotated[int, Option(help="Same seed, same picture.", metavar="N", ge=0, le=2**63 - 1)] = 0
    steps: Annotated[
        int | None,
        Option(
            help="Sampler steps of the base picture; later stages take a share of it.",
            metavar="N",
            ge=1,
            le=1000,
            panel="Quality",
            advice="a whole number of steps from 1 to 1000",
        ),
    ] = None
    guidance: Annotated[
        float | None,
        Option(
            help="How strictly to follow the prompt; 1 turns guidance off.",
            metavar="X",
            ge=0,
            le=100,
            panel="Quality",
            advice="a number from 0 to 100 (1 turns guidance off)",
        ),
    ] = None
    preset: Annotated[str, Option(help=f"How much work is done: {', '.join(PRESETS)}.", choices=PRESETS, panel="Quality")] = (
        "balanced"
    )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Options):
    """Stages, tiles and noise."""

    sampler: Annotated[
        str | None,
        Option(
            help=f"One of {', '.join(SAMPLER_NAMES)}, or such as 'DPM++ 2M Karras'.",
            metavar="NAME",
            panel="Quality",
            advice="a name, such as euler",
        ),
    ] = None
    schedule: Annotated[
        str | None,
        Option(help=f"One of {', '.join(SCHEDULE_NAMES)}.", metavar="NAME", panel="Quality", advice="a name, such as karras"),
    ] = None
    guidance_rescale: Annotated[
        float | None,
        Option(
            help="How far the guided estimate's contrast is drawn back to the unguided one's, from 0 to 1; a stage's own wins.",
            metavar="X",
            ge=0,
            le=1,
            panel="Quality",
            advice="a share from 0 to 1, such as 0.7",
        ),
    ] = None
    strategy: Annotated[str, Option(help=f"One of {', '.join(STRATEGIES)}.", choices=STRATEGIES, panel="Quality")] = "auto"
    tile_px: Annotated[
        int | None,
        Option(
            help="Tile side in pixels; default: the model's training size.",
            flag="--tile",
            metavar="PX",
            ge=1,
            panel="Quality",
            advice="a tile side in pixels, such as 256 or 1024",
        ),
    ] = None
    overlap_px: Annotated[
        int | None,
        Option(
            help="Pixels that neighbouring tiles share.",
            flag="--overlap",
            metavar="PX",
            ge=0,
            panel="Quality",
            advice="a number of pixels from 0 up to below the tile",
        ),
    ] = None
    sigma_max: Annotated[
        float | str | None,
        Option(
            help="Noise level that an EDM model (CosXL) starts from; auto: what goes with the size. Default: the model's.",
            metavar="auto|X",
            gt=0,
            le=1e6,
            words=("auto",),
            panel="Quality",
            advice="'auto' or a noise level above 0, such as 60",
        ),
    ] = None
    attention_policy: Annotated[
        str | None,
        Option(
            help=f"Beyond the trained size: {', '.join(POLICIES[1:])} over the whole canvas (npa:1024: of 1024 px), "
            "global: tiles.",
            metavar="NAME[:N]",
            panel="Quality",
        ),
    ] = None
    relay: Annotated[
        StageLike | None,
        Option(
            help=f"What every stage after the first takes instead: {', '.join(STAGE_KEYS)}; such as "
            "sigma=1,steps=8,guide=none.",
            metavar="KEY=VALUE,...",
            panel="Quality",
        ),
    ] = None
    stages: Annotated[
        Sequence[StageLike],
        Option(
            help="A stage, the base picture first; given once for each, the last of --size.",
            flag="--stage",
            metavar="WxH,KEY=VALUE,...",
            panel="Quality",
        ),
    ] = ()
    colour_fix: Annotated[
        str | None,
        Option(
            help=f"{' or '.join(COLOUR_FIXES)}: the colours of --init, or of the base picture, for the finished picture.",
            metavar="NAME",
            choices=COLOUR_FIXES,
            panel="Quality",
        ),
    ] = None
    allow_approximate: Annotated[
        bool, Option(help="Where nothing exact has room, draw another picture with smaller windows.", panel="Memory")
    ] = False
    clean_caption: Annotated[bool, Option(help="Clean prompts as PixArt's training captions were (lower case, no links).")] = (
        False
    )


@dataclass(frozen=True, kw_only=True)
class SizeOptions(Options):
    size: Annotated[
        SizeLike | None,
        Option(help="Width and height in pixels, such as 4096x4096; default: the picture's.", metavar="WxH"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class StrengthOptions(Options):
    strength: Annotated[
        float | None,
        Option(help="How much of --init is drawn anew, above 0 up to 1; default 0.5.", metavar="X", gt=0, le=1),
    ] = None


@dataclass(frozen=True, kw_only=True)
class StartOptions(StrengthOptions):
    """Pictures that a render starts from or follows."""

    init: Annotated[PictureLike | None, Option(help="A picture to start from instead of noise.", metavar="IMAGE")] = None
    mask: Annotated[
        PictureLike | None,
        Option(help="White where --init is drawn anew; the rest stays as it is.", metavar="IMAGE"),
    ] = None
    control: Annotated[
        PictureLike | None, Option(help="White edges on black that a PixArt ControlNet follows.", metavar="EDGES")
    ] = None


@dataclass(frozen=True, kw_only=True)
class EditingOptions(Options):
    image_guidance: Annotated[
        float | None,
        Option(help="How closely to keep to the picture; default: the model's.", metavar="X", gt=0, le=100, panel="Quality"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class OutputOptions(Options):
    output: Annotated[
        str | Path | None,
        Option(
            help="The file to write: .png, .tif, .jpg, .webp.",
            flag="-o --output",
            metavar="FILE",
            group="run",
            panel="Output",
            local=True,
        ),
    ] = None
    overwrite: Annotated[bool, Option(help="Replace a file that exists.", group="run", panel="Output", local=True)] = False
    bits: Annotated[
        int | None,
        Option(help="8, or 16 of each value (.png, .tif).", metavar="N", choices=BITS, group="run", panel="Output"),
    ] = None
    on_event: Annotated[
        OnEvent | None,
        Option(
            help="Called with an Event after every batch of tiles; raising hires.errors.Cancelled in it stops the run.",
            group="run",
            panel="Output",
            local=True,
            python_only="a function; the command line draws a progress bar",
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalOptions:
    """How unfinished work is kept, so that the same call goes on after whatever stopped it."""

    resume: Annotated[
        bool,
        Option(help="Go on with an unfinished render, and fail where there is none.", group="run", panel="Output", local=True),
    ] = False
    restart: Annotated[
        bool,
        Option(
            help="Throw an unfinished render of the same file away and begin again.", group="run", panel="Output", local=True
        ),
    ] = False
    seconds: Annotated[
        float,
        Option(
            help="Seconds between writes of what is finished.",
            flag="--journal-seconds",
            metavar="S",
            ge=0,
            le=86400,
            advice="seconds from 0 to 86400",
            group="run",
            panel="Output",
            local=True,
        ),
    ] = 20.0

    def __post_init__(self) -> None:
        check(self)
        if self.resume and self.restart:
            raise RequestError("`resume` and `restart`: going on and beginning again; give one of the two")


@dataclass(frozen=True, kw_only=True)
class ResumeOptions(Options):
    journal: Annotated[
        JournalOptions | None,
        Option(
            help="How unfinished work is kept on disk beside the output; None: not at all.",
            group="run",
            panel="Output",
            local=True,
            python_only="four flags instead: --resume, --restart, --no-journal, --journal-seconds",
        ),
    ] = JournalOptions()
