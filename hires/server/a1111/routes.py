"""A1111's `/sdapi/v1`; calls return when their pictures are finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from hires.images import infotext
from hires.images.formats import read_text
from hires.server.a1111.answers import encode, html_of, pictures_answer, progress_answer
from hires.server.a1111.fields import Drawing, Extras, ExtrasBatch, ExtrasSingle, Img2Img, PngInfo, Txt2Img, ignored
from hires.server.a1111.listings import listings
from hires.server.a1111.tasks import Translator
from hires.server.a1111.translation import TranslatedRequest
from hires.server.pictures import from_base64
from hires.server.queue import JobQueue
from hires.server.routes.waiting import submit_waiting, take_in, wait_for

ORIGIN = "a1111"
FIXED_OPTIONS = {"samples_format": "png"}
"""Options that tell how this server works, and cannot be set."""
Body = TypeVar("Body", bound=Drawing)


class A1111Routes:
    """The endpoints over a queue."""

    def __init__(self, queue: JobQueue) -> None:
        self.queue = queue
        self.translator = Translator(queue.settings, queue.library)

    async def txt2img(self, body: Txt2Img, request: Request) -> JSONResponse:
        """Render a prompt, with `enable_hr` in two stages."""
        return await self._render(body, request, self.translator.txt2img)

    async def img2img(self, body: Img2Img, request: Request) -> JSONResponse:
        """Render from pictures, within a mask where one is sent."""
        if not body.init_images:
            raise HTTPException(404, "Init image not found")
        return await self._render(body, request, self.translator.img2img)

    async def extra_single_image(self, body: ExtrasSingle, request: Request) -> Mapping[str, object]:
        """Enlarge a picture."""
        images, html = await self._upscale(body, [body.image], request)
        return {"html_info": html, "image": images[0] if images else ""}

    async def extra_batch_images(self, body: ExtrasBatch, request: Request) -> Mapping[str, object]:
        """Enlarge several pictures."""
        images, html = await self._upscale(body, [picture.data for picture in body.imageList], request)
        return {"html_info": html, "images": images}

    async def png_info(self, body: PngInfo) -> Mapping[str, object]:
        """The texts that a picture holds, and its "parameters" parsed."""
        return await take_in(self.queue, lambda: self._png_info(body))

    def _png_info(self, body: PngInfo) -> Mapping[str, object]:
        with self.queue.staging.open() as folder:
            try:
                picture = from_base64(body.image, self.queue.settings.limits)  # refused with a reason where it cannot be read
                items = {key: text for key, text in picture.info.items() if isinstance(key, str) and isinstance(text, str)}
                if "parameters" not in items and picture.format != "PNG":
                    file = folder / "picture"
                    picture.save(file, format=picture.format, exif=picture.getexif())
                    items |= read_text(file)
            except (OSError, ValueError):
                items = {}
        text = items.pop("parameters", "")
        return {"info": text, "items": items, "parameters": infotext.parsed(text) if text else {}}

    async def progress(self, skip_current_image: bool = False) -> Mapping[str, object]:
        """How far the job in progress has come, with its latest preview."""
        return await run_in_threadpool(progress_answer, self.queue, skip_current_image)

    def interrupt(self) -> Mapping[str, object]:
        """Stop the job in progress."""
        job = self.queue.running()
        if job is not None:
            self.queue.cancel(job)
        return {}

    def skip(self) -> Mapping[str, object]:
        """Leave the picture in progress out."""
        job = self.queue.running()
        if job is not None:
            self.queue.skip(job)
        return {}

    def options(self) -> Mapping[str, object]:
        """The options that can be read; `sd_model_checkpoint` is the model of requests that name none, of every API."""
        return {"sd_model_checkpoint": self.queue.library.default_model().title, **FIXED_OPTIONS}

    def set_options(self, body: dict[str, object]) -> Mapping[str, object]:
        """Switch the server to another model: `sd_model_checkpoint`, as `GET /sdapi/v1/sd-models` lists it.

        It draws all later requests that name none, those of the other APIs too, until the server stops; jobs that wait keep
        theirs. The model before stays in memory while there is room. Other options are left as they are; those that ask for
        something else than they are get named in the answer's `ignored`.
        """
        if "sd_model_checkpoint" in body:
            self.queue.library.switch_model(str(body["sd_model_checkpoint"]))
        others = body.keys() - {"sd_model_checkpoint"}
        ignored = sorted(name[:100] for name in others if name not in FIXED_OPTIONS or body[name] != FIXED_OPTIONS[name])
        return {"ignored": ignored} if ignored else {}

    def unload_checkpoint(self) -> Mapping[str, object]:
        """Let the models of all devices go, after the pictures in progress; the next job loads what it needs."""
        self.queue.unload()
        return {}

    def reload_checkpoint(self) -> Mapping[str, object]:
        """Load the model of `sd_model_checkpoint` on all devices that it fits, after the pictures in progress.

        The next picture of its trained size loads nothing. One whose plan keeps the weights elsewhere, as a much larger one may
        on a small card, loads them there.
        """
        self.queue.load_default()
        return {}

    async def _render(self, body: Body, request: Request, translate: Callable[[Body, Path], TranslatedRequest]) -> JSONResponse:
        with self.queue.staging.open() as folder:
            translated = await take_in(self.queue, lambda: translate(body, folder))
            job = await submit_waiting(self.queue, translated.tasks, ORIGIN, folder)
            await wait_for(self.queue, job, request, keep=body.save_images)
            try:
                return await run_in_threadpool(pictures_answer, job, body, translated, self.queue.settings.folder)
            finally:
                self.queue.forget(job)
                if body.save_images:
                    await run_in_threadpool(self.queue.make_room)

    async def _upscale(self, body: Extras, pictures: Sequence[str], request: Request) -> tuple[list[str], str]:
        """The enlarged pictures in base64, and notes about them in HTML."""
        with self.queue.staging.open() as folder:
            tasks = await take_in(self.queue, lambda: self.translator.extras(body, pictures, folder))
            job = await submit_waiting(self.queue, tasks, ORIGIN, folder)
            await wait_for(self.queue, job, request)
            try:
                files = [job.folder / picture.file for picture in job.pictures]
                notes = [f"{picture.size} in {picture.seconds:.1f} s" for picture in job.pictures]
                notes += [f"ignored: {name}" for name in ignored(body)]
                return await run_in_threadpool(lambda: [encode(path) for path in files]), html_of(notes)
            finally:
                self.queue.forget(job)


def router(queue: JobQueue) -> APIRouter:
    """The routes over a queue."""
    routes, endpoints = APIRouter(prefix="/sdapi/v1", tags=["a1111"]), A1111Routes(queue)
    routes.post("/txt2img")(endpoints.txt2img)
    routes.post("/img2img")(endpoints.img2img)
    routes.post("/extra-single-image")(endpoints.extra_single_image)
    routes.post("/extra-batch-images")(endpoints.extra_batch_images)
    routes.post("/png-info")(endpoints.png_info)
    routes.get("/progress")(endpoints.progress)
    routes.post("/interrupt")(endpoints.interrupt)
    routes.post("/skip")(endpoints.skip)
    routes.get("/options")(endpoints.options)
    routes.post("/options")(endpoints.set_options)
    for path, listing in listings(queue).items():
        routes.add_api_route(f"/{path}", listing, methods=["GET"])
    routes.post("/unload-checkpoint")(endpoints.unload_checkpoint)
    routes.post("/reload-checkpoint")(endpoints.reload_checkpoint)
    for path in ("refresh-checkpoints", "refresh-vae", "refresh-loras"):
        routes.add_api_route(f"/{path}", lambda: {}, methods=["POST"])  # folders are read per request
    return routes
