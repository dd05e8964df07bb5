"""Options that several commands take, and what their help says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hires.kernels.attention_policies import POLICIES
from hires.options.render import COLOUR_FIXES, DTYPES, POSITION_MODES, PRESETS, SAMPLERS, SCHEDULES, STRATEGIES
from hires.options.stage_text import STAGE_KEYS

Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.", show_default=False)]
SizeText = Annotated[str, typer.Option("--size", metavar="WxH", help="Width and height in pixels, such as 4096x4096.")]
PictureSize = Annotated[
    str | None,
    typer.Option("--size", metavar="WxH", help="Width and height in pixels, such as 4096x4096; default: the picture's."),
]
Init = Annotated[Path | None, typer.Option("--init", metavar="IMAGE", help="A picture to start from instead of noise.")]
Mask = Annotated[
    Path | None, typer.Option("--mask", metavar="IMAGE", help="White where --init is drawn anew; the rest stays as it is.")
]
Control = Annotated[
    Path | None, typer.Option("--control", metavar="EDGES", help="White edges on black that a PixArt ControlNet follows.")
]
Output = Annotated[
    Path, typer.Option("-o", "--output", metavar="FILE", help="The file to write: .png, .tif, .jpg, .webp.", show_default=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no summary.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")]
Model = Annotated[
    str, typer.Option(help="demo (ships with hires), a .safetensors or .pth file, a diffusers folder, or org/name on the hub.")
]
Family = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="What the model is where its keys are those of several, such as sdxl-turbo."),
]
Parts = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="A diffusers folder with parts that the model lacks: tokenizers, text encoders, VAE."),
]
Lora = Annotated[
    list[str] | None, typer.Option("--lora", metavar="PATH[:SCALE]", help="A LoRA to merge; may be given several times.")
]
Positions = Annotated[
    str, typer.Option("--positions", help=f"Where a PixArt tile is told that it lies: {', '.join(POSITION_MODES)}.")
]
KvCompression = Annotated[
    str,
    typer.Option("--kv-compression", help="PixArt: checkpoint, or average (an experiment: keys and values thinned 2 x 2)."),
]
TinyVae = Annotated[
    str | None,
    typer.Option("--tiny-vae", metavar="FOLDER", help="A small autoencoder (TAESDXL): for previews and as the last resort."),
]
Preview = Annotated[
    Path | None,
    typer.Option("--preview", metavar="FILE", help="A PNG that shows each step, sharper with --tiny-vae; overwritten."),
]
AttentionName = Annotated[
    str | None, typer.Option("--attention", metavar="NAME", help="Force an attention backend; `hires info` lists them.")
]
AttentionPolicy = Annotated[
    str | None,
    typer.Option(
        "--attention-policy",
        metavar="NAME[:N]",
        help=f"Beyond the trained size: {', '.join(POLICIES[1:])} over the whole canvas (npa:1024: of 1024 px), global: tiles.",
    ),
]
PresetName = Annotated[str, typer.Option("--preset", help=f"How much work is done: {', '.join(PRESETS)}.")]
Relay = Annotated[
    str | None,
    typer.Option(
        metavar="KEY=VALUE,...",
        help=f"What every stage after the first takes instead: {', '.join(STAGE_KEYS)}; such as sigma=1,steps=8,guide=none.",
    ),
]
Stage = Annotated[
    list[str] | None,
    typer.Option(metavar="WxH,KEY=VALUE,...", help="A stage, the base picture first; given once for each, the last of --size."),
]
ColourFix = Annotated[
    str | None,
    typer.Option(
        "--colour-fix",
        metavar="NAME",
        help=f"{' or '.join(COLOUR_FIXES)}: the colours of --init, or of the base picture, for the finished picture.",
    ),
]
AllowApproximate = Annotated[
    bool, typer.Option("--allow-approximate", help="Where nothing exact has room, draw another picture with smaller windows.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an unfinished render, and fail where there is none.")]
Restart = Annotated[bool, typer.Option("--restart", help="Throw an unfinished render of the same file away and begin again.")]
NoJournal = Annotated[bool, typer.Option("--no-journal", help="Keep no track of the render: what stops it loses it.")]
ProfileFile = Annotated[
    Path | None,
    typer.Option("--profile", metavar="FILE", help="Write a trace (.json) of the first steps; print the costliest operators."),
]
TimelineFile = Annotated[
    Path | None,
    typer.Option("--memory-timeline", metavar="FILE", help="Draw planned and measured memory (.png, .svg; extra plot)."),
]
CleanCaption = Annotated[
    bool, typer.Option("--clean-caption", help="Clean prompts as PixArt's training captions were (lower case, no links).")
]
Negative = Annotated[str, typer.Option(help="What to keep out of the picture.")]
SamplerName = Annotated[
    str | None,
    typer.Option("--sampler", metavar="NAME", help=f"One of {', '.join(SAMPLERS)}, or such as 'DPM++ 2M Karras'."),
]
ScheduleName = Annotated[str | None, typer.Option("--schedule", metavar="NAME", help=f"One of {', '.join(SCHEDULES)}.")]
Strategy = Annotated[str, typer.Option(help=f"One of {', '.join(STRATEGIES)}.")]
Vram = Annotated[str | None, typer.Option(metavar="SIZE", help="Memory budget, such as 24GB or 12GiB; default: what is free.")]
Ram = Annotated[str | None, typer.Option(metavar="SIZE", help="What the whole process may hold in host memory, such as 3GB.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda:0.")]
Dtype = Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]


def whole(text: str) -> int:
    """An integer."""
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no whole number") from None


Bits = Annotated[int | None, typer.Option("--bits", parser=whole, metavar="N", help="8, or 16 of each value (.png, .tif).")]
Steps = Annotated[
    int | None,
    typer.Option(parser=whole, metavar="N", help="Sampler steps of the base picture; later stages take a share of it."),
]
Seed = Annotated[int, typer.Option(parser=whole, metavar="N", help="Same seed, same picture.")]
Tile = Annotated[
    int | None, typer.Option(parser=whole, metavar="PX", help="Tile side in pixels; default: the model's training size.")
]
Overlap = Annotated[int | None, typer.Option(parser=whole, metavar="PX", help="Pixels that neighbouring tiles share.")]


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number") from None


Strength = Annotated[
    float | None,
    typer.Option(parser=number, metavar="X", help="How much of --init is drawn anew, above 0 up to 1; default 0.5."),
]
JournalSeconds = Annotated[
    float, typer.Option("--journal-seconds", parser=number, metavar="S", help="Seconds between writes of what is finished.")
]
Guidance = Annotated[
    float | None, typer.Option(parser=number, metavar="X", help="How strictly to follow the prompt; 1 turns guidance off.")
]


def level(text: str) -> float | str:
    """'auto' or a number."""
    return text if text == "auto" else number(text)


SigmaMax = Annotated[
    Any,
    typer.Option(
        "--sigma-max",
        parser=level,
        metavar="auto|X",
        help="Noise level that an EDM model (CosXL) starts from; auto: what goes with the size. Default: the model's.",
    ),
]
