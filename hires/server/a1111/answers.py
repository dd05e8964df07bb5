"""Finished and running jobs in the shape that A1111's clients read."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from fastapi.responses import JSONResponse

from hires._version import __version__
from hires.errors import RequestError
from hires.images import infotext
from hires.images.formats import read_text
from hires.sampling.registry import SAMPLER_FACTS
from hires.server.a1111.documents import InfoDocument, ProgressDocument
from hires.server.a1111.fields import Drawing, Img2Img
from hires.server.a1111.translation import TranslatedRequest
from hires.server.job import Job
from hires.server.pictures import link, png_bytes
from hires.server.queue import JobQueue
from hires.server.worker import FinishedPicture

VERSION = f"hires {__version__}"
TIME_FORMAT = "%Y%m%d%H%M%S"


def pictures_answer(job: Job, body: Drawing, translated: TranslatedRequest, folder: Path) -> JSONResponse:
    """The pictures of an ended job, or its error; a cancelled job answers with those that were finished.

    folder: of the server, where `save_images` puts copies.
    """
    if job.status == "failed":
        return JSONResponse({"detail": job.error, "error": "HTTPException", "errors": job.error}, job.error_status or 500)
    translated.finish(job)
    paths = [job.folder / picture.file for picture in job.pictures]
    saved = (
        [_save_copy(*pair, folder / "outputs") for pair in zip(paths, job.pictures, strict=True)] if body.save_images else []
    )
    images = [encode(path) for path in paths] if body.send_images else []
    if isinstance(body, Img2Img) and body.include_init_images and body.init_images:
        images += body.init_images
    hidden = {"init_images", "mask"}
    parameters = body.model_dump(mode="json", exclude=hidden) | {name: None for name in hidden if hasattr(body, name)}
    info = json.dumps(_info(job, body, translated, saved))
    return JSONResponse({"images": images, "parameters": parameters, "info": info})


def encode(path: Path) -> str:
    """A file in base64."""
    return base64.b64encode(path.read_bytes()).decode("ascii")


def html_of(notes: Sequence[str]) -> str:
    """Notes as HTML, a paragraph each."""
    return "".join(f"<p>{escape(note)}</p>" for note in notes)


def progress_answer(queue: JobQueue, without_picture: bool) -> ProgressDocument:
    """How far the running job has come, with its latest preview."""
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
            "job_timestamp": "0" if job is None else time.strftime(TIME_FORMAT, time.localtime(started)),
            "job_no": 0 if now is None else now.picture,
            "sampling_step": 0 if now is None else now.step,
            "sampling_steps": 0 if now is None else now.steps,
        },
        "current_image": None if preview is None else base64.b64encode(png_bytes(preview)).decode("ascii"),
        "textinfo": None if now is None else f"{now.stage}: {now.done} of {now.total}, step {now.step} of {now.steps}",
        "current_task": None if job is None else job.id,
    }


def _info(job: Job, body: Drawing, translated: TranslatedRequest, saved: list[str]) -> InfoDocument:
    first = job.pictures[0] if job.pictures else None
    sampled = first if first is not None and first.sampler else None
    seeds = [picture.seed for picture in job.pictures]
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
        "sampler_name": SAMPLER_FACTS[sampled.sampler].label if sampled else (body.sampler_name or ""),
        "cfg_scale": sampled.guidance if sampled else body.cfg_scale,
        "steps": sampled.steps if sampled else body.steps,
        "batch_size": body.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": Path(translated.model).stem,
        "sd_model_hash": None,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": body.denoising_strength,
        "extra_generation_params": {"Notes": list(translated.notes)} if translated.notes else {},
        "index_of_first_image": 0,
        "infotexts": [_infotext(job, picture, body) for picture in job.pictures],
        "styles": body.styles,
        "job_timestamp": time.strftime(TIME_FORMAT, time.localtime(job.created)),
        "clip_skip": int(str(body.override_settings.get("CLIP_stop_at_last_layers") or 1)),
        "is_using_inpainting_conditioning": False,
        "version": VERSION,
        "ignored": translated.ignored,
        "saved": saved,
        "interrupted": job.status == "cancelled",
    }


def _infotext(job: Job, picture: FinishedPicture, body: Drawing) -> str:
    """The "parameters" text of a picture's file, or one of what is known where the file has none."""
    stored = read_text(job.folder / picture.file).get("parameters")
    values = {"Seed": picture.seed, "Size": picture.size, "Version": VERSION}
    return stored or infotext.written(body.prompt, body.negative_prompt, values)


def _save_copy(path: Path, picture: FinishedPicture, folder: Path) -> str:
    """Copy a picture into a folder under a new name, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for count in range(10_000):
        target = folder / f"{stamp}-{count:04d}-{picture.seed}{path.suffix}"
        try:
            link(path, target)
        except FileExistsError:
            continue
        return str(target)
    raise RequestError(f"{folder}: is full of pictures of this second; try again")
