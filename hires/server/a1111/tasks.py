"""What A1111's bodies mean as tasks: sizes, hires fix, inpainting, scripts, LoRA tags."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import HTTPException
from PIL import Image

from hires.checkpoints.spec import load_spec
from hires.engine.requests import structure_cutoff
from hires.errors import RequestError
from hires.images import infotext
from hires.images.decoders import PILLOW_FORMATS
from hires.images.formats import read_text
from hires.sampling import registry
from hires.server.a1111 import scripts
from hires.server.a1111.fields import Drawing, Extras, Img2Img, Txt2Img, ignored
from hires.server.a1111.scripts import Scripted
from hires.server.job import Job
from hires.server.pictures import around, from_base64, kept, mask_of, resized, upright
from hires.server.settings import Library, Settings
from hires.server.tasks import EditTask, RenderTask, UpscaleTask
from hires.tiling.geometry import Size

LORA = re.compile(r"<lora:([^:<>]+)(?::([-+]?[\d.]+))?(?::[^<>]*)?>")
AUTOMATIC = ("", "automatic")
INIT_STRENGTH = 0.75  # A1111's, where a client says none


@dataclass(slots=True, kw_only=True)
class TranslatedRequest:
    """A body as tasks; finish(job): what is left to do with the files of the finished job."""

    tasks: list[Any]
    model: str
    notes: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    finish: Callable[[Job], None] = lambda job: None


def scratch(folder: Path) -> Path:
    """A folder for the pictures of a request that is not a job yet; beside the jobs, on their disk."""
    beside = folder.parent / "incoming"
    beside.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=beside))


class Translator:
    """Turns bodies into tasks. HTTPException with A1111's status where it has one, else RequestError."""

    def __init__(self, settings: Settings, library: Library) -> None:
        self.settings, self.library = settings, library

    def txt2img(self, body: Txt2Img, model: str | None, folder: Path) -> TranslatedRequest:
        """A render; hires fix as its second stage."""
        scripted = _scripts(body)
        if scripted.enlarge:
            raise HTTPException(422, f"Script '{body.script_name}' not found")
        made, common = self._common(body, model, scripted)
        width, height = scripted.by_size or (body.width, body.height)
        stages: list[str] = []
        if body.enable_hr:
            width, height, stages = self._hires_fix(body, made)
        task = RenderTask(**common, size=f"{width}x{height}", stages=stages, **_tiles(scripted))
        return self._counted(made, body, [task])

    def img2img(self, body: Img2Img, model: str | None, folder: Path) -> TranslatedRequest:
        """A render from pictures, an edit where the model edits, an enlargement where a script asks for one."""
        scripted = _scripts(body)
        made, common = self._common(body, model, scripted)
        pictures = [upright(from_base64(text, self.settings.limits, "init image")) for text in body.init_images or ()]
        if body.mask is not None:
            return self._inpainted(body, made, common, pictures, folder, scripted)
        tasks = [
            self._from_picture(body, made, common, one, folder, f"init-{i}.png", scripted) for i, one in enumerate(pictures)
        ]
        return self._counted(made, body, tasks)

    def extras(self, body: Extras, pictures: list[str], folder: Path) -> list[Any]:
        """Enlargements, one for each picture."""
        if not pictures:
            raise HTTPException(422, "imageList: is empty; send at least one picture")
        tasks = []
        for index, text in enumerate(pictures):
            picture = from_base64(text, self.settings.limits)
            width, height = picture.size
            if body.resize_mode == 0:
                size = (max(1, round(width * body.upscaling_resize)), max(1, round(height * body.upscaling_resize)))
            else:
                size = (body.upscaling_resize_w, body.upscaling_resize_h)
                if not body.upscaling_crop:
                    by = max(size[0] / width, size[1] / height)
                    size = (round(width * by), round(height * by))
            share = body.extras_upscaler_2_visibility
            task = UpscaleTask(
                picture=kept(picture, folder, f"picture-{index}.png"),
                size=f"{size[0]}x{size[1]}",
                upscaler=body.upscaler_1,
                mixed=(body.upscaler_2, share) if share and body.upscaler_2.lower() != "none" else None,
            )
            tasks.append(task)
        return tasks

    def _common(self, body: Drawing, model: str | None, scripted: Scripted) -> tuple[TranslatedRequest, dict[str, Any]]:
        override = body.override_settings
        name = override.get("sd_model_checkpoint") or model
        found = self.library.model(name if isinstance(name, str) else None)
        made = TranslatedRequest(tasks=[], model=found, notes=list(scripted.notes), ignored=ignored(body))
        made.ignored += [f"override_settings.{key[:80]}" for key in override if key != "sd_model_checkpoint"]
        made.ignored += ["styles"] if body.styles else []
        try:
            wanted = _plain(body.sampler_name) or _plain(body.sampler_index)
            sampler, schedule = registry.resolve(wanted, _plain(body.scheduler))
        except RequestError as error:
            raise HTTPException(400, f"Sampler not found: {error}") from None
        prompt, loras = self._loras(body.prompt, made)
        common = {
            "prompt": prompt,
            "negative": LORA.sub("", body.negative_prompt),
            "model": name,
            "loras": loras,
            "seed": None if body.seed < 0 else body.seed,
            "steps": body.steps,
            "guidance": body.cfg_scale,
            "sampler": sampler,
            "schedule": schedule,
        }
        return made, common

    def _loras(self, prompt: str, made: TranslatedRequest) -> tuple[str, list[str]]:
        """The prompt without its <lora:name:weight> tags, and the LoRAs that are offered."""
        offered = {offer.name for offer in self.library.loras()}
        found = []
        for name, weight in LORA.findall(prompt):
            if name in offered:
                found.append(f"{name}:{weight or 1}")
            else:
                made.notes.append(f"LoRA {name[:80]}: is not offered here, left out")
        return LORA.sub("", prompt), found

    def _hires_fix(self, body: Txt2Img, made: TranslatedRequest) -> tuple[int, int, list[str]]:
        """The final size and both stages: the second from the noise level that its strength means."""
        width, height = body.hr_resize_x, body.hr_resize_y
        if not width and not height:
            width, height = round(body.width * body.hr_scale), round(body.height * body.hr_scale)
        width = width or round(height * body.width / body.height)
        height = height or round(width * body.height / body.width)
        if width < body.width or height < body.height:
            raise RequestError(
                f"hires fix: {width}x{height} is below the first pass's {body.width}x{body.height}; ask for more"
            )
        if body.hr_prompt or body.hr_negative_prompt:
            made.ignored.append("hr_prompt")
        if body.hr_upscaler and body.hr_upscaler.lower() not in ("none", "latent", "lanczos"):
            made.notes.append(f"hires fix: hr_upscaler {body.hr_upscaler[:80]}: the picture is enlarged by Lanczos")
        strength = _strength(body, made.model)
        steps = body.hr_second_pass_steps or body.steps or 20
        taken, sigma = _relay_of(self.library, made.model, strength, steps)
        return width, height, [f"{body.width}x{body.height}", f"{width}x{height},sigma={sigma:.6g},steps={taken}"]

    def _from_picture(
        self,
        body: Img2Img,
        made: TranslatedRequest,
        common: dict[str, Any],
        picture: Image.Image,
        folder: Path,
        name: str,
        scripted: Scripted,
    ) -> Any:
        width, height = scripted.by_size or (body.width, body.height)
        if scripted.scale and (scripted.enlarge or scripted.keep_input):
            width, height = round(picture.width * scripted.scale), round(picture.height * scripted.scale)
        size = f"{width}x{height}"
        strength = _strength(body, made.model)
        larger = width > picture.width and height > picture.height
        if scripted.enlarge or (scripted.guided and larger):
            scripted = replace(scripted, redraw=scripted.redraw and body.denoising_strength != 0)
            return self._enlarged(common, kept(picture, folder, name), size, strength, scripted)
        if load_spec(made.model).facts.image_channels:
            fields = {key: value for key, value in common.items() if key in EditTask.model_fields}
            stored = kept(resized(picture, width, height, body.resize_mode), folder, name)
            return EditTask(**fields, picture=stored, size=size, image_guidance=body.image_cfg_scale or None)
        if body.image_cfg_scale not in (None, 1.5):
            made.ignored.append("image_cfg_scale")
        relay = None
        if scripted.guided:
            cutoff = structure_cutoff(Size(picture.height, picture.width), Size(height, width))
            relay = f"guide=structure:{min(cutoff, 0.25):.6g}"
        stored = kept(resized(picture, width, height, body.resize_mode), folder, name)
        return RenderTask(**common, size=size, init=stored, strength=strength, relay=relay, **_tiles(scripted))

    def _enlarged(self, common: dict[str, Any], name: str, size: str, strength: float, scripted: Scripted) -> UpscaleTask:
        fields = {key: value for key, value in common.items() if key in UpscaleTask.model_fields}
        upscaler = scripted.upscaler
        if isinstance(upscaler, int):
            offers = ["None", *(offer.name for offer in self.library.upscalers())]
            if not 0 <= upscaler < len(offers):
                raise RequestError(f"{scripts.ULTIMATE}: upscaler_index {upscaler}; give 0 to {len(offers) - 1}")
            upscaler = offers[upscaler]
        redraw = scripted.redraw
        return UpscaleTask(
            **fields,
            picture=name,
            size=size,
            upscaler=upscaler,
            refine=redraw,
            strength=strength if redraw else None,
            tile_px=scripted.tile_px if redraw else None,
        )

    def _inpainted(
        self,
        body: Img2Img,
        made: TranslatedRequest,
        common: dict[str, Any],
        pictures: list[Image.Image],
        folder: Path,
        scripted: Scripted,
    ) -> TranslatedRequest:
        """A mask's white drawn anew: within the whole picture, or in a cut-out of it that is drawn at width x height."""
        assert body.mask is not None
        tasks, cuts = [], []
        mask = from_base64(body.mask, self.settings.limits, "mask")
        strength = _strength(body, made.model)
        for index, picture in enumerate(pictures):
            plain = picture.convert("RGB")
            grey = mask_of(mask, plain.size, body.mask_blur, bool(body.inpainting_mask_invert))
            box = around(grey, body.inpaint_full_res_padding, body.width, body.height) if body.inpaint_full_res else None
            cuts.append((plain, grey, box))
            seen = plain if box is None else plain.crop(box)
            hidden = grey if box is None else grey.crop(box)
            mode = body.resize_mode if box is None else 0
            task = RenderTask(
                **common,
                size=f"{body.width}x{body.height}",
                strength=strength,
                **_tiles(scripted),
                init=kept(resized(seen, body.width, body.height, mode), folder, f"init-{index}.png"),
                mask=kept(resized(hidden, body.width, body.height, mode), folder, f"mask-{index}.png"),
            )
            tasks.append(task)
        if body.inpaint_full_res and all(box is None for _, _, box in cuts):
            raise RequestError("mask: nothing in it is white; draw what is to be drawn anew in white")

        def finish(job: Job) -> None:
            job.made = [_pasted(job, index, *cuts[index % len(cuts)]) for index in range(len(job.made))]

        counted = self._counted(made, body, tasks)
        counted.finish = finish
        return counted

    def _counted(self, made: TranslatedRequest, body: Drawing, tasks: list[Any]) -> TranslatedRequest:
        """A task for each picture of batch_size x n_iter, with following seeds."""
        count = body.batch_size * body.n_iter
        most = self.settings.limits.pictures
        if count * len(tasks) > most:
            raise HTTPException(422, f"batch_size x n_iter is {count * len(tasks)} pictures; this server makes {most} at most")
        made.tasks = [
            task if task.seed is None else task.model_copy(update={"seed": task.seed + index})
            for index, task in enumerate(tasks[i % len(tasks)] for i in range(max(count, len(tasks))))
        ]
        return made


def _scripts(body: Drawing) -> Scripted:
    try:
        return scripts.read(body.script_name, body.script_args, body.alwayson_scripts)
    except scripts.ScriptNotFoundError as error:
        raise HTTPException(422, str(error)) from None


def _strength(body: Drawing, model: str) -> float:
    """What is drawn anew; a strength that leaves none of the steps takes one, as A1111's does."""
    asked = INIT_STRENGTH if body.denoising_strength is None else body.denoising_strength
    return max(asked, 1 / (body.steps or load_spec(model).defaults.steps))


def _plain(name: str | None) -> str | None:
    return None if name is None or name.strip().lower() in AUTOMATIC else name


def _tiles(scripted: Scripted) -> dict[str, Any]:
    found = {"strategy": scripted.strategy, "tile_px": scripted.tile_px, "overlap_px": scripted.overlap_px}
    return {key: value for key, value in found.items() if value is not None}


def _relay_of(library: Library, model: str, strength: float, steps: int) -> tuple[int, float]:
    """The steps that a strength takes of `steps`, and the noise level that they begin at."""
    from hires.devices.machines import host_device
    from hires.options.render import RenderRequest
    from hires.planning import planner
    from hires.planning.costs.evaluations import stage_levels

    spec = load_spec(model)
    side = Size(spec.native_px, spec.native_px)
    request = RenderRequest(prompt="", size=side, model=model, steps=steps, strength=min(1.0, strength))
    stage = planner.plan(request, spec, host_device()).stages[0]
    return stage.taken_steps, stage_levels(spec, stage)[0]


def _pasted(job: Job, index: int, picture: Image.Image, mask: Image.Image, box: tuple[int, int, int, int] | None) -> Any:
    """A drawn cut-out back in its place; the whole picture's file stays as it is."""
    made = job.made[index]
    if box is None:
        return made
    path = job.folder / made.file
    text = read_text(path)
    with Image.open(path, formats=PILLOW_FORMATS) as opened:
        drawn = opened.convert("RGB").resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.LANCZOS)
    whole = picture.copy()
    whole.paste(drawn, box[:2], mask.crop(box))
    from hires.images.whole import save_png

    if "parameters" in text:
        old = infotext.parsed(text["parameters"])
        prompt, negative = old.pop("Prompt"), old.pop("Negative prompt")
        text["parameters"] = infotext.written(prompt, negative, old | {"Size": f"{whole.width}x{whole.height}"})
    save_png(path, np.asarray(whole), text, overwrite=True)
    return replace(made, size=Size(whole.height, whole.width))
