"""Translates A1111's bodies: sizes, hires fix, inpainting, scripts, LoRA tags."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastapi import HTTPException
from PIL import Image

from hires.checkpoints.spec import load_spec
from hires.devices.machines import host_device
from hires.engine.requests import structure_cutoff
from hires.errors import RequestError, SizeError
from hires.options.lora import parse_lora_tag
from hires.options.render import RenderRequest
from hires.options.sizes import parse_size
from hires.planning import planner
from hires.planning.costs.evaluations import stage_levels
from hires.prompts.tags import KINDS
from hires.sampling import registry
from hires.server.a1111 import scripts
from hires.server.a1111.fields import Drawing, Extras, Img2Img, Txt2Img, ignored
from hires.server.a1111.inpainting import MaskedPicture, mask_picture
from hires.server.a1111.scripts import ScriptSettings
from hires.server.a1111.translation import PictureRequest, TranslatedRequest, redraw_strength
from hires.server.bodies import AnyTask, EditTask, RenderTask, Task, UpscaleTask, check_limit, following_seed
from hires.server.job import Job
from hires.server.pictures import check_sum, from_base64, resize, store_png, turn_upright
from hires.server.settings import Library, Settings
from hires.tiling.geometry import Size

TAG = re.compile(r"<(\w+):([^<>]*)>")
HONOURED_SETTINGS = ("sd_model_checkpoint", "CLIP_stop_at_last_layers")
AUTOMATIC = ("", "automatic")
INSTRUCTION_GUIDANCE = 1.5
"""A1111's `image_cfg_scale` where a client sends none."""
FINEST_CUTOFF = 0.25
"""The finest structure that ControlNet tile keeps, in cycles per latent cell."""


class Translator:
    """Translates bodies to tasks. Raises HTTPException with A1111's status where it has one, else RequestError."""

    def __init__(self, settings: Settings, library: Library) -> None:
        self.settings, self.library = settings, library

    def txt2img(self, body: Txt2Img, folder: Path) -> TranslatedRequest:
        """A render; hires fix is its second stage."""
        script = _read_scripts(body)
        if script.enlarge:
            raise HTTPException(422, f"Script '{body.script_name}' not found")
        translated, options = self._common(body, script)
        width, height = script.size or (body.width, body.height)
        stages: list[str] = []
        if body.enable_hr:
            width, height, stages = self._hires_fix(body, translated)
        task = RenderTask(**options, size=f"{width}x{height}", stages=stages, **_tile_options(script))
        return self._repeat(translated, body, [task])

    def img2img(self, body: Img2Img, folder: Path) -> TranslatedRequest:
        """A render from each picture, an edit where the model edits, an enlargement where a script asks for one."""
        script = _read_scripts(body)
        translated, options = self._common(body, script)
        texts = body.init_images or []
        self._check_count(body, len(texts))
        masks = [] if body.mask is None else [("mask", body.mask)]
        check_sum([*(("init image", text) for text in texts), *masks], self.settings.limits)
        request = PictureRequest(body=body, translated=translated, options=options, script=script, folder=folder)
        if body.mask is not None:
            return self._inpaint(request, body.mask, texts)
        tasks = [self._from_picture(request, self._picture(text), f"init-{i}.png") for i, text in enumerate(texts)]
        return self._repeat(translated, body, tasks)

    def extras(self, body: Extras, pictures: Sequence[str], folder: Path) -> list[UpscaleTask]:
        """An enlargement of each picture."""
        if not pictures:
            raise HTTPException(422, "imageList: is empty; send at least one picture")
        self._check_most(len(pictures), "imageList")
        check_sum((("image", text) for text in pictures), self.settings.limits)
        tasks = []
        for index, text in enumerate(pictures):
            picture = from_base64(text, self.settings.limits)
            width, height = _extras_size(body, picture)
            share = body.extras_upscaler_2_visibility
            task = UpscaleTask(
                picture=store_png(picture, folder, f"picture-{index}.png"),
                size=f"{width}x{height}",
                upscaler=body.upscaler_1,
                mixed=(body.upscaler_2, share) if share and body.upscaler_2.lower() != "none" else None,
            )
            tasks.append(task)
        return tasks

    def _common(self, body: Drawing, script: ScriptSettings) -> tuple[TranslatedRequest, dict[str, object]]:
        """A request without tasks yet, and the options that all its tasks share."""
        override = body.override_settings
        name = str(override.get("sd_model_checkpoint") or self.library.default_model().name)
        translated = TranslatedRequest(model=self.library.model(name), notes=list(script.notes), ignored=ignored(body))
        translated.ignored += [f"override_settings.{key[:80]}" for key in override if key not in HONOURED_SETTINGS]
        translated.ignored += ["styles"] if body.styles else []
        try:
            sampler_name = _chosen_name(body.sampler_name) or _chosen_name(body.sampler_index)
            sampler, schedule = registry.resolve(sampler_name, _chosen_name(body.scheduler))
        except RequestError as error:
            raise HTTPException(400, f"Sampler not found: {error}") from None
        prompt, loras = self._loras(body.prompt, translated)
        if TAG.search(body.negative_prompt):
            translated.notes.append("negative_prompt: its tags are left out; give them in the prompt")
        options: dict[str, object] = {
            "prompt": prompt,
            "negative": TAG.sub("", body.negative_prompt),
            "model": name,
            "loras": loras,
            "seed": None if body.seed < 0 else body.seed,
            "steps": body.steps,
            "guidance": body.cfg_scale,
            "sampler": sampler,
            "schedule": schedule,
            "clip_skip": _clip_skip(override.get("CLIP_stop_at_last_layers"), translated),
        }
        return translated, options

    def _loras(self, prompt: str, translated: TranslatedRequest) -> tuple[str, list[str]]:
        """The prompt without its <lora:...> tags, and those of the LoRAs that are offered."""
        offered = {offer.name for offer in self.library.loras()}
        loras = []
        for kind, inside in TAG.findall(prompt):
            if kind not in KINDS:
                translated.notes.append(f"prompt tag <{kind}:{inside[:60]}>: is not known, left out")
                continue
            lora, left_out = parse_lora_tag(inside)
            translated.notes += [f"LoRA {lora.path[:80]}: {argument[:80]} is not supported, left out" for argument in left_out]
            if lora.path in offered:
                loras.append(str(lora))
            else:
                translated.notes.append(f"LoRA {lora.path[:80]}: is not offered here, left out")
        return TAG.sub("", prompt), loras

    def _hires_fix(self, body: Txt2Img, translated: TranslatedRequest) -> tuple[int, int, list[str]]:
        """The final width and height, and both stages; the second starts at the noise level of its strength."""
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
            translated.ignored.append("hr_prompt")
        if body.hr_upscaler and body.hr_upscaler.lower() not in ("none", "latent", "lanczos"):
            translated.notes.append(f"hires fix: hr_upscaler {body.hr_upscaler[:80]}: the picture is enlarged by Lanczos")
        strength = redraw_strength(body, translated.model)
        steps = body.hr_second_pass_steps or body.steps or 20
        taken, sigma = _relay_start(translated.model, strength, steps)
        return width, height, [f"{body.width}x{body.height}", f"{width}x{height},sigma={sigma:.6g},steps={taken}"]

    def _from_picture(self, request: PictureRequest, picture: Image.Image, name: str) -> AnyTask:
        """The task for one picture without a mask; its file gets the name."""
        body, script, model = request.body, request.script, request.translated.model
        width, height = script.size or (body.width, body.height)
        if script.scale and (script.enlarge or script.keep_input):
            width, height = round(picture.width * script.scale), round(picture.height * script.scale)
        size = str(check_limit(parse_size(f"{width}x{height}"), self.settings.limits))
        larger = width > picture.width and height > picture.height
        if script.enlarge or (script.guided and larger):
            return self._enlarge(request, request.save(picture, name), size)
        if load_spec(model).facts.image_channels:
            init = request.save(self._resize(picture, width, height, body.resize_mode), name)
            fields = _fields_of(EditTask, request.options)
            return EditTask(**fields, picture=init, size=size, image_guidance=body.image_cfg_scale or None)
        if body.image_cfg_scale not in (None, INSTRUCTION_GUIDANCE):
            request.translated.ignored.append("image_cfg_scale")
        relay = None
        if script.guided:
            cutoff = structure_cutoff(Size(picture.height, picture.width), Size(height, width))
            relay = f"guide=structure:{min(cutoff, FINEST_CUTOFF):.6g}"
        init = request.save(self._resize(picture, width, height, body.resize_mode), name)
        tiles = _tile_options(script)
        return RenderTask(**request.options, size=size, init=init, strength=request.strength, relay=relay, **tiles)

    def _resize(self, picture: Image.Image, width: int, height: int, mode: int) -> Image.Image:
        """The picture at a size. SizeError where that is over the limit of pictures in memory."""
        limits = self.settings.limits
        size = check_limit(parse_size(f"{width}x{height}"), limits)
        if size.area > limits.input_pixels:
            most = f"{limits.input_pixels / 1e6:.0f} megapixels"
            raise SizeError(f"size {size}: img2img resizes pictures up to {most}; ask for less, or send the picture to /jobs")
        return resize(picture, width, height, mode)

    def _enlarge(self, request: PictureRequest, picture: str, size: str) -> UpscaleTask:
        """An enlargement of a stored picture, drawn over in tiles unless the body or its script forbids that."""
        script = request.script
        upscaler = script.upscaler
        if isinstance(upscaler, int):
            names = ["None", *(offer.name for offer in self.library.upscalers())]
            if not 0 <= upscaler < len(names):
                raise RequestError(f"{scripts.ULTIMATE}: upscaler_index {upscaler}; give 0 to {len(names) - 1}")
            upscaler = names[upscaler]
        redraw = script.redraw and request.body.denoising_strength != 0
        return UpscaleTask(
            **_fields_of(UpscaleTask, request.options),
            picture=picture,
            size=size,
            upscaler=upscaler,
            refine=redraw,
            strength=request.strength if redraw else None,
            tile_px=script.tile_px if redraw else None,
        )

    def _picture(self, text: str) -> Image.Image:
        return turn_upright(from_base64(text, self.settings.limits, "init image"))

    def _inpaint(self, request: PictureRequest, mask: str, texts: Sequence[str]) -> TranslatedRequest:
        """The white of a mask drawn anew: within the whole picture, or in a part of it that is drawn at width x height.

        One picture is in memory at a time, here and when the results are pasted: none while the job waits.
        """
        body = request.body

        def masked() -> Iterator[MaskedPicture]:
            decoded = from_base64(mask, self.settings.limits, "mask")
            return (mask_picture(body, self._picture(text), decoded) for text in texts)

        tasks, boxes = [], []
        for index, each in enumerate(masked()):
            picture, grey = each.drawn_part()
            mode = body.resize_mode if each.box is None else 0
            task = RenderTask(
                **request.options,
                size=f"{body.width}x{body.height}",
                strength=request.strength,
                **_tile_options(request.script),
                init=request.save(self._resize(picture, body.width, body.height, mode), f"init-{index}.png"),
                mask=request.save(self._resize(grey, body.width, body.height, mode), f"mask-{index}.png"),
            )
            tasks.append(task)
            boxes.append(each.box)
        if body.inpaint_full_res and not any(boxes):
            raise RequestError("mask: nothing in it is white; draw what is to be drawn anew in white")

        def paste_results(job: Job) -> None:
            for first, each in enumerate(masked()):
                for index in range(first, len(job.pictures), len(texts)):
                    job.pictures[index] = each.paste_result(job, index)

        translated = self._repeat(request.translated, body, tasks)
        if any(boxes):
            translated.finish = paste_results
        return translated

    def _check_count(self, body: Drawing, tasks: int) -> None:
        """422 for more pictures than one request may ask for."""
        self._check_most(body.batch_size * body.n_iter * tasks, "batch_size x n_iter")

    def _check_most(self, count: int, what: str) -> None:
        most = self.settings.limits.pictures
        if count > most:
            raise HTTPException(422, f"{what} is {count} pictures; this server makes {most} at most")

    def _repeat(self, translated: TranslatedRequest, body: Drawing, tasks: Sequence[AnyTask]) -> TranslatedRequest:
        """The request with a task for each of batch_size x n_iter pictures, with following seeds."""
        self._check_count(body, len(tasks))
        count = body.batch_size * body.n_iter
        translated.tasks = [following_seed(tasks[i % len(tasks)], i) for i in range(max(count, len(tasks)))]
        return translated


def _clip_skip(value: object, translated: TranslatedRequest) -> int | None:
    """A1111's CLIP_stop_at_last_layers as `clip_skip`, where the model reads prompts with CLIP. RequestError for no layer."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise RequestError(f"override_settings.CLIP_stop_at_last_layers {value!r}: give a layer from 1 (the last) to 12")
    model = load_spec(translated.model).text_model
    if not model.towers or int(value) == 1:  # 1 is A1111's own default, whatever the model
        return None
    return int(value)


def _read_scripts(body: Drawing) -> ScriptSettings:
    try:
        return scripts.read(body.script_name, body.script_args, body.alwayson_scripts)
    except scripts.ScriptNotFoundError as error:
        raise HTTPException(422, str(error)) from None


def _extras_size(body: Extras, picture: Image.Image) -> tuple[int, int]:
    """The width and height to enlarge a picture to."""
    width, height = picture.size
    if body.resize_mode == 0:
        return max(1, round(width * body.upscaling_resize)), max(1, round(height * body.upscaling_resize))
    if body.upscaling_crop:
        return body.upscaling_resize_w, body.upscaling_resize_h
    factor = max(body.upscaling_resize_w / width, body.upscaling_resize_h / height)
    return round(width * factor), round(height * factor)


def _chosen_name(name: str | None) -> str | None:
    """A sampler's or schedule's name; None where the server chooses."""
    return None if name is None or name.strip().lower() in AUTOMATIC else name


def _fields_of(kind: type[Task], options: dict[str, object]) -> dict[str, object]:
    """Those of the options that a kind of task has."""
    return {name: value for name, value in options.items() if name in kind.model_fields}


def _tile_options(script: ScriptSettings) -> dict[str, object]:
    """The tiling that a script asks for."""
    options = {"strategy": script.strategy, "tile_px": script.tile_px, "overlap_px": script.overlap_px}
    return {name: value for name, value in options.items() if value is not None}


def _relay_start(model: str, strength: float, steps: int) -> tuple[int, float]:
    """How many of `steps` a strength takes, and the noise level they start at."""
    spec = load_spec(model)
    side = Size(spec.native_px, spec.native_px)
    request = RenderRequest(prompt="", size=side, model=model, steps=steps, strength=min(1.0, strength))
    stage = planner.plan(request, spec, host_device()).stages[0]
    return stage.taken_steps, stage_levels(spec, stage)[0]
