"""OpenAI's `/v1/images`; calls return when the pictures are finished."""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, HTTPException, Request
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from hires.checkpoints.spec import load_spec
from hires.errors import ModelError
from hires.server.bodies import EditTask, RenderTask
from hires.server.job import Job
from hires.server.pictures import check_sum, from_bytes, resize, store_png, turn_upright
from hires.server.queue import JobQueue
from hires.server.routes.waiting import submit_waiting, take_in, wait_for
from hires.server.settings import PROMPT_CHARACTERS

EDIT_STRENGTH = 0.6
"""The strength of an edit by a model that only draws from text."""
REDRAW_STRENGTH = 1.0
"""The strength within the transparent part of a mask."""
MODELS = ("dall-e-2", "dall-e-3", "gpt-image-1", "gpt-image-1-mini", "gpt-image-1.5", "chatgpt-image-latest")
PRESETS = {"low": "fast", "standard": "balanced", "medium": "balanced", "auto": "balanced", "high": "best", "hd": "best"}
FORMAT = {"png": "png", "jpeg": "jpg", "webp": "webp"}


class Generation(BaseModel):
    """The body of `generations`; fields that ask for nothing here (user, moderation, style, ...) are accepted."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: Annotated[str, Field(max_length=PROMPT_CHARACTERS)]
    model: Annotated[str, Field(max_length=300)] | None = None
    n: Annotated[int, Field(ge=1, le=1000)] | None = None
    size: Annotated[str, Field(max_length=40)] | None = None
    quality: Annotated[str, Field(max_length=40)] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    stream: bool | None = None

    @property
    def model_name(self) -> str | None:
        """The server's model; None for one of OpenAI's names, which stand for the default."""
        return None if self.model in MODELS else self.model

    def task_fields(self, queue: JobQueue) -> dict[str, object]:
        """The fields of a task. HTTPException for what this server does not do."""
        if self.stream:
            raise HTTPException(400, "stream: is not done here; send the request without it, or use /jobs and its events")
        if self.quality is not None and self.quality not in PRESETS:
            raise HTTPException(400, f"quality {self.quality!r}: give one of {', '.join(PRESETS)}")
        model = queue.library.default_model().name if self.model_name is None else self.model_name
        _model_path(queue, model)
        return {
            "prompt": self.prompt,
            "model": model,
            "preset": PRESETS[self.quality or "auto"],
            "format": FORMAT[self.output_format or "png"],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class EditForm:
    """What the form of an edit holds."""

    fields: Generation
    picture: bytes
    """The file of the picture to edit."""
    mask: bytes | None
    """The file of the mask, transparent where the picture is drawn anew."""


class OpenAIRoutes:
    """The endpoints over a queue."""

    def __init__(self, queue: JobQueue) -> None:
        self.queue = queue
        self.limits = queue.settings.limits

    def models(self) -> Mapping[str, object]:
        """The models that a request may name."""
        return {"object": "list", "data": [_model_document(offer.name) for offer in self.queue.library.models()]}

    def model(self, name: str) -> Mapping[str, object]:
        """A model; 404 for one that is not offered."""
        _model_path(self.queue, name)
        return _model_document(name)

    async def generations(self, body: Generation, request: Request) -> Mapping[str, object]:
        """Render a prompt, `n` times, and return the pictures in base64 or as addresses."""
        count = self._count(body)
        size = "1024x1024" if body.size in (None, "auto") else body.size
        task = RenderTask(**body.task_fields(self.queue), size=size)
        job = await submit_waiting(self.queue, [task] * count, "openai")
        return await self._response(job, body, request)

    async def edits(self, request: Request) -> Mapping[str, object]:
        """Edit the picture of a multipart form; with a mask, redraw what is transparent in it."""
        form = await _read_form(request)
        count = self._count(form.fields)
        with self.queue.staging.open() as folder:
            task = await take_in(self.queue, lambda: self._edit_task(form, folder))
            job = await submit_waiting(self.queue, [task] * count, "openai", folder)
            return await self._response(job, form.fields, request)

    def _edit_task(self, form: EditForm, folder: Path) -> EditTask | RenderTask:
        """An edit where the model edits pictures, else a render that starts from the picture."""
        body = form.fields
        common = body.task_fields(self.queue)
        sent = {"image": form.picture} if form.mask is None else {"image": form.picture, "mask": form.mask}
        check_sum(sent.items(), self.limits)
        picture = turn_upright(from_bytes(form.picture, self.limits))
        size = f"{picture.width}x{picture.height}" if body.size in (None, "auto") else str(body.size)
        if load_spec(_model_path(self.queue, str(common["model"]))).facts.image_channels:
            if form.mask is not None:
                raise HTTPException(400, "mask: this model edits whole pictures; send the picture without one")
            name = store_png(picture.convert("RGB"), folder, "picture.png")
            return EditTask(**common, picture=name, size=size)
        redraw = None
        if form.mask is not None:
            redraw = _redraw_mask(from_bytes(form.mask, self.limits, "mask"), picture.size)
        elif picture.mode == "RGBA":
            redraw = _redraw_mask(picture, picture.size)
        mask = None if redraw is None else store_png(redraw, folder, "mask.png")
        init = store_png(resize(picture.convert("RGB"), *picture.size, 0), folder, "init.png")
        strength = EDIT_STRENGTH if mask is None else REDRAW_STRENGTH
        return RenderTask(**common, size=size, init=init, mask=mask, strength=strength)

    async def _response(self, job: Job, body: Generation, request: Request) -> Mapping[str, object]:
        """Wait for a job and answer with its pictures, in base64 or as addresses."""
        await wait_for(self.queue, job, request)
        if job.status == "failed":
            raise HTTPException(job.error_status or 500, str(job.error))
        if job.status == "cancelled":
            raise HTTPException(409, f"job {job.id} was cancelled")
        if body.response_format == "url":
            base = str(request.base_url).rstrip("/")
            data = [{"url": f"{base}/jobs/{job.id}/result?picture={i}"} for i in range(len(job.pictures))]
            self.queue.keep(job)
        else:
            files = [job.folder / picture.file for picture in job.pictures]
            data = await run_in_threadpool(_in_base64, files)
            self.queue.forget(job)
        size = str(job.pictures[0].size) if job.pictures else None
        return {"created": int(time.time()), "data": data, "output_format": body.output_format or "png", "size": size}

    def _count(self, body: Generation) -> int:
        count = body.n or 1
        if count > self.limits.pictures:
            raise HTTPException(400, f"n {count}: this server makes {self.limits.pictures} at most in one request")
        return count


def router(queue: JobQueue) -> APIRouter:
    """The routes over a queue."""
    routes, endpoints = APIRouter(prefix="/v1", tags=["openai"]), OpenAIRoutes(queue)
    routes.get("/models")(endpoints.models)
    routes.get("/models/{name}")(endpoints.model)
    routes.post("/images/generations")(endpoints.generations)
    routes.post("/images/edits")(endpoints.edits)
    return routes


def _model_path(queue: JobQueue, name: str) -> str:
    """The model of a name. 404 where it is not offered."""
    try:
        return queue.library.model(name)
    except ModelError as error:
        raise HTTPException(404, str(error)) from None


def _redraw_mask(picture: Image.Image, size: tuple[int, int]) -> Image.Image | None:
    """White where a picture is transparent, in grey at that size; None where it is opaque. 400 without transparency."""
    if "A" not in picture.getbands():
        raise HTTPException(400, "mask: has no transparency; make transparent what is to be drawn anew")
    opacity = picture.getchannel("A").resize(size)
    if min(opacity.tobytes()) == 255:
        return None
    white = Image.new("L", size, 255)
    white.paste(0, (0, 0, *size), opacity)
    return white


def _in_base64(files: Sequence[Path]) -> list[dict[str, str]]:
    return [{"b64_json": base64.b64encode(file.read_bytes()).decode()} for file in files]


async def _read_form(request: Request) -> EditForm:
    """The form of an edit. 400 where it is not understood."""
    form = await _form(request)
    fields = _fields(form)
    picture, mask = await _pictures(form)
    return EditForm(fields=fields, picture=picture, mask=mask)


async def _form(request: Request) -> FormData:
    try:
        return await request.form(max_files=20, max_fields=50)
    except Exception as error:  # noqa: BLE001  a multipart body can be wrong in any way
        raise HTTPException(400, f"body: is no multipart form ({str(error)[:200]})") from None


def _fields(form: FormData) -> Generation:
    plain = {key: value for key, value in form.multi_items() if isinstance(value, str)}
    try:
        return Generation.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        raise HTTPException(400, f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from None


async def _pictures(form: FormData) -> tuple[bytes, bytes | None]:
    """The files of the picture and of the mask."""
    pictures = [value for key, value in form.multi_items() if key in ("image", "image[]") and isinstance(value, UploadFile)]
    if not pictures:
        raise HTTPException(400, "image: send the picture to edit as a file")
    if len(pictures) > 1:
        raise HTTPException(400, f"image: {len(pictures)} pictures; one is edited here, send one")
    mask = form.get("mask")
    return await pictures[0].read(), await mask.read() if isinstance(mask, UploadFile) else None


def _model_document(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "hires"}
