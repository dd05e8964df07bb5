"""`hires render`, `edit` and `plan`."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from hires.cli.display import KEPT, LOST, guarded, preview_file, progress_display, say, watched
from hires.cli.options import (
    AllowApproximate,
    AsJson,
    AttentionName,
    AttentionPolicy,
    Bits,
    CleanCaption,
    ColourFix,
    Control,
    Device,
    Dtype,
    Family,
    Guidance,
    Init,
    JournalSeconds,
    KvCompression,
    Lora,
    Mask,
    Model,
    Negative,
    NoJournal,
    Output,
    Overlap,
    Overwrite,
    Parts,
    PictureSize,
    Positions,
    PresetName,
    Preview,
    ProfileFile,
    Prompt,
    Quiet,
    Ram,
    Relay,
    Restart,
    Resume,
    SamplerName,
    ScheduleName,
    Seed,
    SigmaMax,
    SizeText,
    Stage,
    Steps,
    Strategy,
    Strength,
    Tile,
    TimelineFile,
    TinyVae,
    Vram,
    number,
)
from hires.errors import RequestError


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
    from hires.engine import engine

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


def kept(resume: bool, restart: bool, no_journal: bool, seconds: float) -> Any:
    """The journal's options of a render; None for none."""
    from hires.options.render import JournalOptions

    if no_journal and (resume or restart):
        raise RequestError("--no-journal: there is nothing to go on from or to throw away without a journal; leave it out")
    return None if no_journal else JournalOptions(resume=resume, restart=restart, seconds=seconds)


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
    from hires.engine import engine

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
    from hires.engine import engine
    from hires.planning import drawing

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


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (render, edit, plan):
        app.command()(command)
