"""OpenAI's `/v1/images`: generations and edits, as its client packages send them. Calls block until the pictures are there."""

from __future__ import annotations

import base64
import shutil
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Request
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from hires.checkpoints.spec import load_spec
from hires.errors import ModelError
from hires.server.a1111.tasks import scratch
from hires.server.job import Job
from hires.server.pictures import from_bytes, kept, resized, upright
from hires.server.queue import JobQueue
from hires.server.routes.waiting import finished
from hires.server.settings import PROMPT_CHARACTERS
from hires.server.tasks import EditTask, RenderTask

EDIT_STRENGTH = 0.6  # of a picture that a text-to-image model edits
REDRAW_STRENGTH = 1.0  # within a mask, whose inside is transparent
MODELS = ("dall-e-2", "dall-e-3", "gpt-image-1", "gpt-image-1-mini", "gpt-image-1.5", "chatgpt-image-latest")
PRESETS = {"low": "fast", "standard": "balanced", "medium": "balanced", "auto": "balanced", "high": "best", "hd": "best"}
FORMAT = {"png": "png", "jpeg": "jpg", "webp": "webp"}


class Generation(BaseModel):
    """Fields that ask for nothing here (user, moderation, style, ...) are let through."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: Annotated[str, Field(max_length=PROMPT_CHARACTERS)]
    model: Annotated[str, Field(max_length=300)] | None = None
    n: Annotated[int, Field(ge=1, le=1000)] | None = None
    size: Annotated[str, Field(max_length=40)] | None = None
    quality: Annotated[str, Field(max_length=40)] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    stream: bool | None = None

    def task_fields(self, queue: JobQueue) -> dict[str, Any]:
        """What a task takes. HTTPException for what is not done here."""
        if self.stream:
            raise HTTPException(400, "stream: is not done here; send the request without it, or use /jobs and its events")
        if self.quality is not None and self.quality not in PRESETS:
            raise HTTPException(400, f"quality {self.quality!r}: give one of {', '.join(PRESETS)}")
        model = None if self.model in MODELS else self.model
        try:
            queue.library.model(model)
        except ModelError as error:
            raise HTTPException(404, str(error)) from None
        return {
            "prompt": self.prompt,
            "model": model,
            "preset": PRESETS[self.quality or "auto"],
            "format": FORMAT[self.output_format or "png"],
        }


def router(queue: JobQueue) -> APIRouter:
    """The routes over a queue."""
    routes = APIRouter(prefix="/v1", tags=["openai"])
    limits = queue.settings.limits

    @routes.get("/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(offer.name) for offer in queue.library.models()]}

    @routes.get("/models/{name}")
    def model(name: str) -> dict[str, Any]:
        try:
            queue.library.model(name)
        except ModelError as error:
            raise HTTPException(404, str(error)) from None
        return _model(name)

    @routes.post("/images/generations")
    async def generations(body: Generation, request: Request) -> dict[str, Any]:
        count = _count(body)
        size = "1024x1024" if body.size in (None, "auto") else body.size
        task = RenderTask(**body.task_fields(queue), size=size)
        job = await run_in_threadpool(queue.submit, [task] * count, durable=False, origin="openai")
        return await answered(job, body, request)

    @routes.post("/images/edits")
    async def edits(request: Request) -> dict[str, Any]:
        form = await _form(request)
        body = _fields(form)
        count = _count(body)
        pictures, mask = await _pictures(form)
        folder = scratch(queue.folder)
        try:
            task = await run_in_threadpool(edit_task, body, pictures, mask, folder)

            job = await run_in_threadpool(
                queue.submit,
                [task] * count,
                durable=False,
                origin="openai",
                prepare=lambda task, to, index: task.moved(folder, to),
            )
            return await answered(job, body, request)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def edit_task(body: Generation, pictures: list[bytes], mask: bytes | None, folder: Any) -> Any:
        common = body.task_fields(queue)
        picture = upright(from_bytes(pictures[0], limits))
        size = f"{picture.width}x{picture.height}" if body.size in (None, "auto") else str(body.size)
        if load_spec(queue.library.model(common["model"])).facts.image_channels:
            if mask is not None:
                raise HTTPException(400, "mask: this model edits whole pictures; send the picture without one")
            return EditTask(**common, picture=kept(picture.convert("RGB"), folder, "picture.png"), size=size)
        area = from_bytes(mask, limits, "mask") if mask is not None else picture if picture.mode == "RGBA" else None
        redrawn = None
        if area is not None:
            if "A" not in area.getbands():
                raise HTTPException(400, "mask: has no transparency; make transparent what is to be drawn anew")
            opaque = area.getchannel("A").resize(picture.size)
            if min(opaque.tobytes()) < 255:
                white = Image.new("L", picture.size, 255)
                white.paste(0, (0, 0, *picture.size), opaque)
                redrawn = kept(white, folder, "mask.png")
        first = kept(resized(picture.convert("RGB"), *picture.size, 0), folder, "init.png")
        strength = EDIT_STRENGTH if redrawn is None else REDRAW_STRENGTH
        return RenderTask(**common, size=size, init=first, mask=redrawn, strength=strength)

    async def answered(job: Job, body: Generation, request: Request) -> dict[str, Any]:
        await finished(queue, job, request)
        if job.status == "failed":
            raise HTTPException(job.error_status or 500, str(job.error))
        if job.status == "cancelled":
            raise HTTPException(409, f"job {job.id} was cancelled")
        if body.response_format == "url":
            base = str(request.base_url).rstrip("/")
            data = [{"url": f"{base}/jobs/{job.id}/result?picture={i}"} for i in range(len(job.made))]
            queue.keep(job)
        else:
            files = [job.folder / made.file for made in job.made]
            data = await run_in_threadpool(
                lambda: [{"b64_json": base64.b64encode(file.read_bytes()).decode()} for file in files]
            )
            queue.forget(job)
        size = str(job.made[0].size) if job.made else None
        return {"created": int(time.time()), "data": data, "output_format": body.output_format or "png", "size": size}

    def _count(body: Generation) -> int:
        count = body.n or 1
        if count > limits.pictures:
            raise HTTPException(400, f"n {count}: this server makes {limits.pictures} at most in one request")
        return count

    return routes


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
        found = error.errors()[0]
        raise HTTPException(400, f"{'.'.join(str(part) for part in found['loc'])}: {found['msg']}") from None


async def _pictures(form: FormData) -> tuple[list[bytes], bytes | None]:
    pictures = [value for key, value in form.multi_items() if key in ("image", "image[]") and isinstance(value, UploadFile)]
    if not pictures:
        raise HTTPException(400, "image: send the picture to edit as a file")
    if len(pictures) > 1:
        raise HTTPException(400, f"image: {len(pictures)} pictures; one is edited here, send one")
    mask = form.get("mask")
    return [await pictures[0].read()], await mask.read() if isinstance(mask, UploadFile) else None


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "hires"}
