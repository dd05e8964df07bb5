"""The command line: `hires render`, `edit`, `upscale`, `plan`, `inspect`, `measure`, `info`, `vae-roundtrip`."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from hires import __version__, cli_bench, cli_serve, cli_upscale
from hires.cli_typed import level, number, whole
from hires.errors import HiresError, RequestError
from hires.kernels.policies import POLICIES
from hires.presets import STAGE_KEYS
from hires.types import (
    COLOUR_FIXES,
    DTYPES,
    POSITION_MODES,
    PRESETS,
    SAMPLERS,
    SCHEDULES,
    STRATEGIES,
    VAE_POLICIES,
    Event,
    OnEvent,
    gib,
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Render 2K to 8K pictures and larger with diffusion models, planned before they run.",
)


Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.", show_default=False)]
SizeText = Annotated[str, typer.Option("--size", metavar="WxH", help="Width and height in pixels, such as 4096x4096.")]
PictureSize = Annotated[
    str | None,
    typer.Option("--size", metavar="WxH", help="Width and height in pixels, such as 4096x4096; default: the picture's."),
]
Init = Annotated[Path | None, typer.Option("--init", metavar="IMAGE", help="A picture to start from instead of noise.")]
Strength = Annotated[
    float | None,
    typer.Option(parser=number, metavar="X", help="How much of --init is drawn anew, above 0 up to 1; default 0.5."),
]
Mask = Annotated[
    Path | None, typer.Option("--mask", metavar="IMAGE", help="White where --init is drawn anew; the rest stays as it is.")
]
Control = Annotated[
    Path | None, typer.Option("--control", metavar="EDGES", help="White edges on black that a PixArt ControlNet follows.")
]
Output = Annotated[
    Path, typer.Option("-o", "--output", metavar="FILE", help="The file to write: .png, .tif, .jpg, .webp.", show_default=False)
]
Bits = Annotated[int | None, typer.Option("--bits", parser=whole, metavar="N", help="8, or 16 of each value (.png, .tif).")]
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
JournalSeconds = Annotated[
    float, typer.Option("--journal-seconds", parser=number, metavar="S", help="Seconds between writes of what is finished.")
]
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
Steps = Annotated[
    int | None,
    typer.Option(parser=whole, metavar="N", help="Sampler steps of the base picture; later stages take a share of it."),
]
Guidance = Annotated[
    float | None, typer.Option(parser=number, metavar="X", help="How strictly to follow the prompt; 1 turns guidance off.")
]
SamplerName = Annotated[
    str | None,
    typer.Option("--sampler", metavar="NAME", help=f"One of {', '.join(SAMPLERS)}, or such as 'DPM++ 2M Karras'."),
]
ScheduleName = Annotated[str | None, typer.Option("--schedule", metavar="NAME", help=f"One of {', '.join(SCHEDULES)}.")]
Seed = Annotated[int, typer.Option(parser=whole, metavar="N", help="Same seed, same picture.")]
Strategy = Annotated[str, typer.Option(help=f"One of {', '.join(STRATEGIES)}.")]
Vram = Annotated[str | None, typer.Option(metavar="SIZE", help="Memory budget, such as 24GB or 12GiB; default: what is free.")]
Ram = Annotated[str | None, typer.Option(metavar="SIZE", help="What the whole process may hold in host memory, such as 3GB.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda:0.")]
Dtype = Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")]
Tile = Annotated[
    int | None, typer.Option(parser=whole, metavar="PX", help="Tile side in pixels; default: the model's training size.")
]
Overlap = Annotated[int | None, typer.Option(parser=whole, metavar="PX", help="Pixels that neighbouring tiles share.")]
SigmaMax = Annotated[
    Any,
    typer.Option(
        "--sigma-max",
        parser=level,
        metavar="auto|X",
        help="Noise level that an EDM model (CosXL) starts from; auto: what goes with the size. Default: the model's.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]


def fail(error: HiresError) -> NoReturn:
    """One message on stderr, the error's exit code, no traceback."""
    print(f"error: {error}", file=sys.stderr)
    raise typer.Exit(error.exit_code)


LOST = "nothing was written"
KEPT = "nothing was written, the same command goes on from here (see hires jobs)"


def guarded(work: Callable[[], Any], stopped: str = LOST) -> Any:
    """Run; errors that hires raises on purpose and Ctrl-C end the program without a traceback, saying what is `stopped`."""
    try:
        return work()
    except HiresError as error:
        fail(error)
    except KeyboardInterrupt:
        print(f"stopped; {stopped}", file=sys.stderr)
        raise typer.Exit(130) from None


@app.command()
def render(
    prompt: Prompt,
    output: Output,
    size: PictureSize = None,
    bits: Bits = None,
    init: Init = None,
    strength: Strength = None,
    mask: Mask = None,
    control: Control = None,
    model: Model = "demo",
    negative: Negative = "",
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: SamplerName = None,
    schedule: ScheduleName = None,
    seed: Seed = 0,
    strategy: Strategy = "auto",
    vram: Vram = None,
    ram: Ram = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    tile: Tile = None,
    overlap: Overlap = None,
    sigma_max: SigmaMax = None,
    family: Family = None,
    parts: Parts = None,
    lora: Lora = None,
    positions: Positions = "global",
    kv_compression: KvCompression = "checkpoint",
    tiny_vae: TinyVae = None,
    attention: AttentionName = None,
    attention_policy: AttentionPolicy = None,
    preset: PresetName = "balanced",
    relay: Relay = None,
    stage: Stage = None,
    colour_fix: ColourFix = None,
    allow_approximate: AllowApproximate = False,
    preview: Preview = None,
    profile: ProfileFile = None,
    memory_timeline: TimelineFile = None,
    clean_caption: CleanCaption = False,
    resume: Resume = False,
    restart: Restart = False,
    no_journal: NoJournal = False,
    journal_seconds: JournalSeconds = 20.0,
    as_json: AsJson = False,
    quiet: Quiet = False,
    overwrite: Overwrite = False,
) -> None:
    """Render PROMPT at exactly WxH pixels into a file; with --init from a picture instead of noise."""
    from hires import engine

    def work() -> Any:
        with watched(quiet, preview, profile, memory_timeline) as (on_event, after):
            result = engine.render(
                prompt, size=size, bits=bits, init=None if init is None else str(init), strength=strength,
                mask=None if mask is None else str(mask), control=None if control is None else str(control), output=output,
                overwrite=overwrite, device=device, vram=vram, ram=ram,
                journal=kept(resume, restart, no_journal, journal_seconds), on_event=on_event,
                model=model, negative=negative, steps=steps, guidance=guidance, sampler=sampler, schedule=schedule, seed=seed,
                strategy=strategy, dtype=dtype, tile_px=tile, overlap_px=overlap, sigma_max=sigma_max, family=family,
                parts=parts, loras=lora or (), position_mode=positions, kv_compression=kv_compression,
                clean_caption=clean_caption, tiny_vae=tiny_vae, attention=attention,
                attention_policy=attention_policy, preset=preset, relay=relay,
                stages=stage or (), colour_fix=colour_fix, allow_approximate=allow_approximate,
            )  # fmt: skip
        for report in after:
            print(report(result.plan), file=sys.stderr)
        return result

    say(guarded(work, LOST if no_journal else KEPT), as_json, quiet)


@contextmanager
def watched(quiet: bool, preview: Path | None, profile: Path | None, timeline: Path | None) -> Iterator[Any]:
    """The display of a render and what else listens to its events: on_event, and what reports when it is done."""
    if profile is not None and timeline is not None:
        raise RequestError("--profile and --memory-timeline: each falsifies the other; give one at a time")
    with progress_display(shown=not quiet, preview=preview_file(preview)) as shown, ExitStack() as stack:
        on_event, after = shown, []
        if profile is not None:
            os.environ |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "5"}  # before torch: its profiler is chatty
            from hires.profiling import Profile

            traced = stack.enter_context(Profile(profile, on_event))
            on_event, after = traced.hear, [traced.report]
        if timeline is not None:
            from hires.profiling import MemoryTimeline

            drawn = stack.enter_context(MemoryTimeline(timeline, on_event))
            on_event, after = drawn.hear, [drawn.draw, *after]
        yield on_event, after


def kept(resume: bool, restart: bool, no_journal: bool, seconds: float) -> Any:
    """The journal's options of a render; None for none."""
    from hires.engine import JournalOptions

    if no_journal and (resume or restart):
        raise RequestError("--no-journal: there is nothing to go on from or to throw away without a journal; leave it out")
    return None if no_journal else JournalOptions(resume=resume, restart=restart, seconds=seconds)


def preview_file(path: Path | None) -> Path | None:
    """The file for previews, if it can be written."""
    from hires.imageio import check_png

    if path is None:
        return None
    return check_png(path, overwrite=True)


def say(result: Any, as_json: bool, quiet: bool) -> None:
    """What a finished render prints on stdout."""
    if as_json:
        print(json.dumps(result.to_json(), default=str))
    elif not quiet:
        print(f"{result.path}: {result.size}, {result.seconds:.1f} s, peak memory {gib(result.peak_rss_bytes)}")


@app.command()
def edit(
    picture: Annotated[Path, typer.Argument(metavar="IN", help="The picture to change.", show_default=False)],
    instruction: Annotated[str, typer.Argument(metavar="INSTRUCTION", help="What to change, such as 'make it winter'.")],
    output: Output,
    model: Annotated[str, typer.Option(help="A model that edits, such as cosxl_edit.safetensors.", show_default=False)],
    size: PictureSize = None,
    bits: Bits = None,
    negative: Negative = "",
    steps: Steps = None,
    guidance: Guidance = None,
    image_guidance: Annotated[
        float | None, typer.Option(parser=number, metavar="X", help="How closely to keep to the picture; default: the model's.")
    ] = None,
    sampler: SamplerName = None,
    schedule: ScheduleName = None,
    seed: Seed = 0,
    strategy: Strategy = "auto",
    vram: Vram = None,
    ram: Ram = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    tile: Tile = None,
    overlap: Overlap = None,
    sigma_max: SigmaMax = None,
    family: Family = None,
    parts: Parts = None,
    lora: Lora = None,
    tiny_vae: TinyVae = None,
    attention: AttentionName = None,
    attention_policy: AttentionPolicy = None,
    preset: PresetName = "balanced",
    relay: Relay = None,
    stage: Stage = None,
    allow_approximate: AllowApproximate = False,
    preview: Preview = None,
    resume: Resume = False,
    restart: Restart = False,
    no_journal: NoJournal = False,
    journal_seconds: JournalSeconds = 20.0,
    as_json: AsJson = False,
    quiet: Quiet = False,
    overwrite: Overwrite = False,
) -> None:
    """Change the picture IN as INSTRUCTION says, at its own size or WxH, into a file."""
    from hires import engine

    def work() -> Any:
        with progress_display(shown=not quiet, preview=preview_file(preview)) as on_event:
            return engine.edit(
                str(picture), instruction, model=model, size=size, bits=bits, output=output, overwrite=overwrite,
                negative=negative, seed=seed, steps=steps, guidance=guidance, image_guidance=image_guidance,
                sampler=sampler, schedule=schedule, strategy=strategy,
                tile_px=tile, overlap_px=overlap, sigma_max=sigma_max, dtype=dtype, device=device, vram=vram, ram=ram,
                family=family, parts=parts, loras=lora or (), tiny_vae=tiny_vae, attention=attention,
                attention_policy=attention_policy, preset=preset, relay=relay,
                stages=stage or (),  allow_approximate=allow_approximate,
                journal=kept(resume, restart, no_journal, journal_seconds), on_event=on_event,
            )  # fmt: skip

    say(guarded(work, LOST if no_journal else KEPT), as_json, quiet)


@app.command()
def plan(
    size: SizeText,
    prompt: Annotated[
        str, typer.Argument(metavar="[PROMPT]", help="May be left out: plans do not depend on it.", show_default=False)
    ] = "",
    model: Model = "demo",
    negative: Negative = "",
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: SamplerName = None,
    schedule: ScheduleName = None,
    seed: Seed = 0,
    strategy: Strategy = "auto",
    vram: Vram = None,
    ram: Ram = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    tile: Tile = None,
    overlap: Overlap = None,
    sigma_max: SigmaMax = None,
    family: Family = None,
    parts: Parts = None,
    lora: Lora = None,
    positions: Positions = "global",
    kv_compression: KvCompression = "checkpoint",
    tiny_vae: TinyVae = None,
    attention: AttentionName = None,
    attention_policy: AttentionPolicy = None,
    preset: PresetName = "balanced",
    relay: Relay = None,
    stage: Stage = None,
    colour_fix: ColourFix = None,
    allow_approximate: AllowApproximate = False,
    clean_caption: CleanCaption = False,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Draw the plan to an SVG.")] = None,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Draw the plan to a PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print what `hires render` would do, and why, without rendering. With --vram also for a card that is elsewhere."""
    from hires import drawing, engine

    def planned(budget: str | int | None) -> Any:
        return engine.plan(
            prompt,
            size=size,
            device=device,
            vram=budget,
            ram=ram,
            model=model,
            negative=negative,
            steps=steps,
            guidance=guidance,
            sampler=sampler,
            schedule=schedule,
            seed=seed,
            strategy=strategy,
            dtype=dtype,
            tile_px=tile,
            overlap_px=overlap,
            sigma_max=sigma_max,
            family=family,
            parts=parts,
            loras=lora or (),
            position_mode=positions,
            kv_compression=kv_compression,
            tiny_vae=tiny_vae,
            attention=attention,
            attention_policy=attention_policy,
            preset=preset,
            relay=relay,
            stages=stage or (),
            colour_fix=colour_fix,
            allow_approximate=allow_approximate,
            clean_caption=clean_caption,
        )

    made = guarded(lambda: planned(vram))
    for path in (svg, png):
        if path is not None:
            guarded(partial(drawing.save_drawing, made, path))
    if as_json:
        print(json.dumps(made.to_json(), default=str))
        return
    print(made.explain())
    print(drawing.terminal(made))
    if device == "auto" and vram is not None:
        print("with other budgets:")
        print(drawing.table(drawing.other_budgets(planned)))


@app.command()
def inspect(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="A file, a folder, or org/name on the hub.", show_default=False)],
    family: Family = None,
    parts: Parts = None,
    as_json: AsJson = False,
) -> None:
    """Print what a checkpoint, LoRA or autoencoder is and why, what it holds, what it lacks, and how to run it."""
    from hires import report

    document = guarded(lambda: report.inspect(name, family=family, parts=parts))
    print(json.dumps(document) if as_json else "\n".join(report.lines(document)))


@app.command()
def measure(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The picture to measure.", show_default=False)],
    base: Annotated[
        Path | None, typer.Option("--base", metavar="FILE", help="The small picture that it was drawn from.")
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option("--grid", metavar="TILE:OVERLAP", help="Its tiles in px, such as 1024:256; default: the plan in the PNG."),
    ] = None,
    report_file: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.png", help="Draw the measures into a PNG; overwritten.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a picture: contrast, detail beyond its base, seams against random grids, drift, duplicates."""
    from hires import readout

    def work() -> Any:
        from hires.errors import OutputError
        from hires.imageio import check_png, save_png

        target = None if report_file is None else check_png(report_file, overwrite=True)
        if target is not None and target.resolve() in (file.resolve(), file if base is None else base.resolve()):
            raise OutputError(f"--report {target}: is a picture to be measured; give another name")
        found, source = readout.measure_file(file, base, grid)
        if target is not None:
            from hires.chart import report as drawn

            save_png(target, drawn(file.name, source, found), {"Software": f"hires {__version__}"}, overwrite=True)
        return found

    found = guarded(work)
    print(json.dumps(found.to_json()) if as_json else "\n".join(readout.lines(str(file), found)))


@app.command("vae-roundtrip")
def vae_roundtrip(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A picture file of any size.", show_default=False)],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.", show_default=False)],
    vae: Annotated[str, typer.Option(help="demo, or a diffusers folder of a model or of an autoencoder.")] = "demo",
    vram: Vram = None,
    policy: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(VAE_POLICIES)}; default: the fastest that fits.")
    ] = None,
    band: Annotated[int | None, typer.Option(parser=whole, metavar="PX", help="Rows of a feature map at a time.")] = None,
    attention_policy: Annotated[
        str | None,
        typer.Option(metavar="NAME[:N]", help="Approximation of its attention: npa, windows or kvpool; npa:1024 is in px."),
    ] = None,
    attention_window: Annotated[
        int | None,
        typer.Option(parser=whole, metavar="ROWS", help="Approximation: each row of latents attends to so many rows only."),
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
    overwrite: Overwrite = False,
) -> None:
    """Encode a picture with an autoencoder and decode it again, exactly, in the memory given."""
    from hires import roundtrip

    def work() -> Any:
        with progress_display(shown=not quiet) as on_event:
            return roundtrip.vae_roundtrip(
                source, output, vae=vae, vram=vram, policy=policy, band_px=band, attention_policy=attention_policy,
                attention_window=attention_window,
                overwrite=overwrite, device=device, on_event=on_event,
            )  # fmt: skip

    result = guarded(work)
    if as_json:
        print(json.dumps(result.to_json()))
    elif not quiet:
        print(f"{result.path}: {result.size}, {result.psnr_db} dB, {result.seconds:.1f} s, encoded with {result.encode}, "
              f"decoded with {result.decode}, peak memory {gib(result.peak_rss_bytes)}")  # fmt: skip


@app.command()
def jobs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where the outputs are.", show_default=False)] = Path(),
    clean: Annotated[bool, typer.Option("--clean", help="Remove those that no process works on.")] = False,
    as_json: AsJson = False,
) -> None:
    """List unfinished renders, which the same command goes on with, or remove what is kept of them."""
    from hires import jobs as unfinished_jobs

    found = guarded(lambda: unfinished_jobs.unfinished(folder))
    removed = unfinished_jobs.clean(found) if clean else []
    if as_json:
        document = {"jobs": [job.to_json() for job in found], "removed": [job.output for job in removed]}
        print(json.dumps(document))
        return
    for job in found:
        state = "removed" if job in removed else job.progress
        print(
            f"{job.output}  {job.size}  {state}  {job.age_seconds / 60:.0f} min ago  {gib(job.held_bytes)}  {job.prompt[:60]}"
        )
    if not found:
        print(f"nothing unfinished in {folder.resolve()}")


@app.command()
def info(as_json: AsJson = False) -> None:
    """Show the device, the attention backends with their reasons, libraries and models."""
    facts = guarded(collect_info)
    if as_json:
        print(json.dumps(facts))
        return
    for title, rows in facts.items():
        print(title)
        for name, value in rows.items():
            print(f"  {name:<14} {value}")


def collect_info() -> dict[str, dict[str, str]]:
    """What `hires info` prints, by section."""
    import importlib
    import importlib.metadata

    import torch

    from hires.device import choose_device, probe
    from hires.kernels import blend, group_norm
    from hires.kernels.dispatch import AttentionSpec, table
    from hires.specs import NAMED_MODELS, load_spec
    from hires.weights import quiet_imports

    device = choose_device("auto")
    facts = probe(device)
    dtype = torch.bfloat16 if facts.kind == "cuda" and facts.bf16 else torch.float32
    spec = AttentionSpec(device=device.type, dtype=dtype, head_dim=64, queries=4096, keys=4096, masked=False)
    maps = group_norm.MapSpec(device=device.type, dtype=dtype)
    libraries = {"hires": __version__, "python": sys.version.split()[0]}
    for name in ("torch", "diffusers", "transformers", "triton", "xformers", "tifffile", "pyvips", "spandrel"):
        with quiet_imports() as said:
            try:
                importlib.import_module(name)
                state = importlib.metadata.version(name)
            except Exception as error:  # any failure of an optional library is what this table is for
                state = f"not usable: {type(error).__name__}: {error}"
        libraries[name] = "; ".join([state, *(" ".join(line.split()) for line in said)])
    return {
        "device": {"name": facts.name, "budget": gib(facts.budget_bytes), "bf16": "yes" if facts.bf16 else "no"},
        "attention backends": {name: reason or "runs" for name, reason in table(spec)},
        "group norm backends": {name: reason or "runs" for name, reason in group_norm.table(maps)},
        "blend backends": {name: reason or "runs" for name, reason in blend.table(maps)},
        "libraries": libraries,
        "models": {name: _describe(load_spec(name)) for name in NAMED_MODELS},
    }


def _describe(spec: Any) -> str:
    params = (spec.network_params + spec.text_params + spec.vae_params) / 1e6
    return f"{spec.family}, {spec.native_px} px native, {spec.parameterisation}, {params:.1f} M parameters, {spec.path}"


class progress_display:
    """A live line on stderr: stage, step, tile, time left, memory. Plain lines where stderr is no terminal."""

    def __init__(self, shown: bool, preview: Path | None = None) -> None:
        self.shown, self.preview = shown, preview
        self._bar: Any = None
        self._task: Any = None
        self._stage, self._begun = "", 0.0

    def __enter__(self) -> OnEvent | None:
        if not self.shown:
            return None if self.preview is None else self._draw
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description:<22}"),
                BarColumn(),
                TextColumn("{task.fields[detail]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
        return self._on_event

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _draw(self, event: Event) -> None:
        from hires.imageio import save_png

        if self.preview is not None and event.preview is not None:
            step = f"{event.stage}, step {event.step} of {event.steps}"
            save_png(self.preview, event.preview, {"Software": f"hires {__version__}", "Comment": step}, overwrite=True)

    def _on_event(self, event: Event) -> None:
        from hires.device import peak_bytes_so_far

        self._draw(event)

        fresh = event.stage != self._stage
        if fresh:
            self._stage, self._begun = event.stage, time.monotonic()
        detail = (
            f"step {event.step}/{event.steps} tile {event.done}/{event.total}" if event.steps else f"{event.done}/{event.total}"
        )
        detail += f"  peak {gib(peak_bytes_so_far())}"
        if self._bar is None:
            if event.done == event.total and event.step == event.steps and event.total > 0:
                print(f"{event.stage}: {detail}, {time.monotonic() - self._begun:.1f} s", file=sys.stderr)
            return
        if fresh:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(event.stage, total=event.total, detail=detail)
        self._bar.update(self._task, completed=event.done, detail=detail)


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log what happens to stderr.")] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")
    if version:
        print(f"hires {__version__}")
        raise typer.Exit


cli_upscale.register(app, progress_display, guarded)
cli_serve.register(app, guarded)
cli_bench.register(app, guarded)

if __name__ == "__main__":
    app()
