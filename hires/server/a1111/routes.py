"""A1111's `/sdapi/v1`: the routes that its clients call, over the queue. Calls block until their picture is there."""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from hires._version import __version__
from hires.errors import RequestError
from hires.images import infotext
from hires.images.formats import read_text
from hires.sampling.registry import SAMPLERS, SCHEDULES
from hires.server.a1111 import scripts
from hires.server.a1111 import tasks as a1111_tasks
from hires.server.a1111.fields import Drawing, Extras, ExtrasBatch, ExtrasSingle, Img2Img, PngInfo, Txt2Img, ignored
from hires.server.job import Job
from hires.server.pictures import from_base64, linked
from hires.server.queue import JobQueue
from hires.server.routes.jobs import as_png
from hires.server.routes.waiting import finished
from hires.server.worker import FinishedPicture


def router(queue: JobQueue) -> APIRouter:
    """The routes over a queue; `sd_model_checkpoint` of the options is the model of later calls."""
    routes = APIRouter(prefix="/sdapi/v1", tags=["a1111"])
    maker = a1111_tasks.Translator(queue.settings, queue.library)
    current: dict[str, Any] = {"sd_model_checkpoint": queue.library.models()[0].title, "samples_format": "png"}

    async def drawn(
        body: Drawing, request: Request, make: Callable[[Any, str | None, Path], a1111_tasks.TranslatedRequest]
    ) -> JSONResponse:
        folder = a1111_tasks.scratch(queue.folder)
        try:
            model = current["sd_model_checkpoint"] if "sd_model_checkpoint" not in body.override_settings else None
            made = await run_in_threadpool(make, body, model, folder)
            job = await run_in_threadpool(
                queue.submit,
                made.tasks,
                durable=False,
                origin="a1111",
                prepare=lambda task, to, index: task.moved(folder, to),
            )
            await finished(queue, job, request, keep=body.save_images)
            try:
                return await run_in_threadpool(_answer, job, body, made, queue)
            finally:
                queue.forget(job)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @routes.post("/txt2img")
    async def txt2img(body: Txt2Img, request: Request) -> JSONResponse:
        return await drawn(body, request, maker.txt2img)

    @routes.post("/img2img")
    async def img2img(body: Img2Img, request: Request) -> JSONResponse:
        if not body.init_images:
            raise HTTPException(404, "Init image not found")
        return await drawn(body, request, maker.img2img)

    @routes.post("/extra-single-image")
    async def extra_single_image(body: ExtrasSingle, request: Request) -> dict[str, Any]:
        images, html = await enlarged(body, [body.image], request)
        return {"html_info": html, "image": images[0] if images else ""}

    @routes.post("/extra-batch-images")
    async def extra_batch_images(body: ExtrasBatch, request: Request) -> dict[str, Any]:
        images, html = await enlarged(body, [picture.data for picture in body.imageList], request)
        return {"html_info": html, "images": images}

    async def enlarged(body: Extras, pictures: list[str], request: Request) -> tuple[list[str], str]:
        folder = a1111_tasks.scratch(queue.folder)
        try:
            tasks = await run_in_threadpool(maker.extras, body, pictures, folder)
            job = await run_in_threadpool(
                queue.submit, tasks, durable=False, origin="a1111", prepare=lambda task, to, index: task.moved(folder, to)
            )
            await finished(queue, job, request)
            try:
                files = [job.folder / made.file for made in job.made]
                notes = [f"{made.size} in {made.seconds:.1f} s" for made in job.made] + [
                    f"ignored: {name}" for name in ignored(body)
                ]
                return await run_in_threadpool(lambda: [_encoded(path) for path in files]), _html(notes)
            finally:
                queue.forget(job)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @routes.post("/png-info")
    def png_info(body: PngInfo) -> dict[str, Any]:
        folder = a1111_tasks.scratch(queue.folder)
        try:
            picture = from_base64(body.image, queue.settings.limits)  # what is no picture is refused with its reason
            items = {key: value for key, value in picture.info.items() if isinstance(key, str) and isinstance(value, str)}
            if "parameters" not in items and picture.format != "PNG":
                file = folder / "picture"
                picture.save(file, format=picture.format, exif=picture.getexif())
                items |= read_text(file)
        except (OSError, ValueError):
            items = {}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        text = items.pop("parameters", "")
        return {"info": text, "items": items, "parameters": infotext.parsed(text) if text else {}}

    @routes.get("/progress")
    async def progress(skip_current_image: bool = False) -> dict[str, Any]:
        return await run_in_threadpool(_progress, queue, skip_current_image)

    @routes.post("/interrupt")
    def interrupt() -> dict[str, Any]:
        """Stop the job in progress."""
        job = queue.running()
        if job is not None:
            queue.cancel(job)
        return {}

    @routes.post("/skip")
    def skip() -> dict[str, Any]:
        """Leave the picture in progress out."""
        job = queue.running()
        if job is not None:
            queue.skip(job)
        return {}

    @routes.get("/options")
    def options() -> dict[str, Any]:
        return dict(current)

    @routes.post("/options")
    def set_options(body: dict[str, Any]) -> dict[str, Any]:
        if "sd_model_checkpoint" in body:
            name = body["sd_model_checkpoint"]
            queue.library.model(name if isinstance(name, str) else "")
            current["sd_model_checkpoint"] = name
        return {}

    for path, listing in _listings(queue).items():
        routes.add_api_route(f"/{path}", listing, methods=["GET"])
    for path in ("unload-checkpoint", "reload-checkpoint", "refresh-checkpoints", "refresh-vae", "refresh-loras"):
        routes.add_api_route(f"/{path}", lambda: {}, methods=["POST"])  # models are loaded per job, folders read per request
    return routes


def _listings(queue: JobQueue) -> dict[str, Callable[[], Any]]:
    library = queue.library
    samplers = [
        {
            "name": facts.label,
            "aliases": [facts.name, *facts.aliases],
            "options": {} if facts.schedule is None else {"scheduler": facts.schedule},
        }
        for facts in SAMPLERS.values()
    ]
    schedulers = [
        {
            "name": facts.name,
            "label": facts.label,
            "aliases": list(facts.aliases),
            "default_rho": 7.0 if facts.name == "karras" else -1.0,
            "need_inner_model": facts.table,
        }
        for facts in SCHEDULES.values()
    ]
    script = {"name": scripts.ULTIMATE, "is_alwayson": False, "is_img2img": True, "args": []}
    always = [{"name": name, "is_alwayson": True, "is_img2img": True, "args": []} for name in scripts.ALWAYS_ON]
    names = [scripts.ULTIMATE, *scripts.ALWAYS_ON]

    def upscalers() -> list[dict[str, Any]]:
        none = {"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 4}
        return [none, *({**none, "name": offer.name, "model_name": offer.title} for offer in library.upscalers())]

    def sd_models() -> list[dict[str, Any]]:
        return [
            {
                "title": offer.title,
                "model_name": offer.name,
                "hash": None,
                "sha256": None,
                "filename": offer.title,
                "config": None,
            }
            for offer in library.models()
        ]

    return {
        "samplers": lambda: samplers,
        "schedulers": lambda: schedulers,
        "upscalers": upscalers,
        "latent-upscale-modes": lambda: [{"name": "Latent"}],
        "sd-models": sd_models,
        "sd-vae": lambda: [],
        "loras": lambda: [
            {"name": offer.name, "alias": offer.name, "path": offer.title, "metadata": {}} for offer in library.loras()
        ],
        "hypernetworks": lambda: [],
        "face-restorers": lambda: [],
        "realesrgan-models": lambda: [],
        "prompt-styles": lambda: [],
        "embeddings": lambda: {"loaded": {}, "skipped": {}},
        "cmd-flags": lambda: {"api": True, "port": queue.settings.port, "listen": not queue.settings.loopback},
        "memory": _memory,
        "scripts": lambda: {"txt2img": list(scripts.ALWAYS_ON), "img2img": names},
        "script-info": lambda: [script, *always],
    }


def _answer(job: Job, body: Drawing, made: a1111_tasks.TranslatedRequest, queue: JobQueue) -> JSONResponse:
    """A job's pictures in A1111's shape; an interrupted one answers with those that were finished."""
    if job.status == "failed":
        return JSONResponse({"detail": job.error, "error": "HTTPException", "errors": job.error}, job.error_status or 500)
    made.finish(job)
    paths = [job.folder / picture.file for picture in job.made]
    saved = (
        [_saved(path, picture, queue.settings.folder) for path, picture in zip(paths, job.made, strict=True)]
        if body.save_images
        else []
    )
    images = [_encoded(path) for path in paths] if body.send_images else []
    if isinstance(body, Img2Img) and body.include_init_images and body.init_images:
        images += body.init_images
    info = _info(job, body, made)
    info |= {"saved": saved, "interrupted": job.status == "cancelled"}
    hidden = {"init_images", "mask"}
    parameters = body.model_dump(mode="json", exclude=hidden) | {name: None for name in hidden if hasattr(body, name)}
    return JSONResponse({"images": images, "parameters": parameters, "info": json.dumps(info)})


def _info(job: Job, body: Drawing, made: a1111_tasks.TranslatedRequest) -> dict[str, Any]:
    first = job.made[0] if job.made else None
    texts = []
    for picture in job.made:
        with_text = read_text(job.folder / picture.file).get("parameters")
        texts.append(
            with_text
            or infotext.written(
                body.prompt,
                body.negative_prompt,
                {"Seed": picture.seed, "Size": picture.size, "Version": f"hires {__version__}"},
            )
        )
    seeds = [picture.seed for picture in job.made]
    model = made.model
    return {
        "prompt": body.prompt,
        "all_prompts": [body.prompt] * len(seeds),
        "negative_prompt": body.negative_prompt,
        "all_negative_prompts": [body.negative_prompt] * len(seeds),
        "seed": seeds[0] if seeds else body.seed,
        "all_seeds": seeds,
        "subseed": -1,
        "all_subseeds": [-1] * len(seeds),
        "subseed_strength": 0,
        "width": first.size.width if first else body.width,
        "height": first.size.height if first else body.height,
        "sampler_name": SAMPLERS[first.sampler].label if first and first.sampler else (body.sampler_name or ""),
        "cfg_scale": first.guidance if first and first.sampler else body.cfg_scale,
        "steps": first.steps if first and first.sampler else body.steps,
        "batch_size": body.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": Path(model).stem,
        "sd_model_hash": None,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": body.denoising_strength,
        "extra_generation_params": {"Notes": list(made.notes)} if made.notes else {},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": body.styles,
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(job.created)),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
        "version": f"hires {__version__}",
        "ignored": made.ignored,
    }


def _saved(path: Path, picture: FinishedPicture, folder: Path) -> str:
    """A copy in the server's outputs, under a name that is not there yet."""
    outputs = folder / "outputs"
    outputs.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for count in range(10_000):
        target = outputs / f"{stamp}-{count:04d}-{picture.seed}{path.suffix}"
        try:
            linked(path, target)
        except FileExistsError:
            continue
        return str(target)
    raise RequestError(f"{outputs}: is full of pictures of this second; try again")


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")


def _html(notes: list[str]) -> str:
    from html import escape

    return "".join(f"<p>{escape(note)}</p>" for note in notes)


def _progress(queue: JobQueue, without_picture: bool) -> dict[str, Any]:
    job = queue.running()
    now = None if job is None else job.meter.now
    preview = None if job is None or without_picture else job.meter.preview
    started = job.started if job is not None and job.started is not None else time.time()
    return {
        "progress": 0.0 if now is None else min(now.fraction, 0.999),
        "eta_relative": 0.0 if now is None or now.eta_seconds is None else now.eta_seconds,
        "state": {
            "skipped": job is not None and job.skipping,
            "interrupted": job is not None and job.stop == "cancel",
            "stopping_generation": job is not None and job.stop != "",
            "job": "" if now is None else f"{now.stage} {now.done}/{now.total}",
            "job_count": queue.count(),
            "job_timestamp": "0" if job is None else time.strftime("%Y%m%d%H%M%S", time.localtime(started)),
            "job_no": 0 if now is None else now.picture,
            "sampling_step": 0 if now is None else now.step,
            "sampling_steps": 0 if now is None else now.steps,
        },
        "current_image": None if preview is None else base64.b64encode(as_png(preview)).decode("ascii"),
        "textinfo": None if now is None else f"{now.stage}: {now.done} of {now.total}, step {now.step} of {now.steps}",
        "current_task": None if job is None else job.id,
    }


def _memory() -> dict[str, Any]:
    import torch

    from hires.devices.machines import available_host_bytes
    from hires.devices.memory import peak_resident_bytes

    free, used = available_host_bytes(), peak_resident_bytes()
    ram = {"free": free, "used": used, "total": free + used}

    if not torch.cuda.is_available():
        return {"ram": ram, "cuda": {"error": "no CUDA device"}}
    free, whole = torch.cuda.mem_get_info()
    held = {"current": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated()}
    return {"ram": ram, "cuda": {"system": {"free": free, "used": whole - free, "total": whole}, "allocated": held}}
