"""The routes `/jobs`, `/plan`, `/models` and `/health`; `server/bodies.py` has the fields that they accept."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Body, Header, HTTPException, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from hires._version import __version__
from hires.client.documents import ENDED, ModelsDocument, PlanDocument
from hires.planning.drawing import svg
from hires.planning.plan import MemoryPlan
from hires.server.bodies import AnyTask, following_seed
from hires.server.job import Job
from hires.server.pictures import png_bytes
from hires.server.queue import JobQueue
from hires.server.routes.waiting import take_in

EVENT_SECONDS = 0.1
COMMENT_SECONDS = 15.0  # keeps proxies from closing a silent stream
MEDIA = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp", ".tif": "image/tiff"}
UNBUFFERED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class JobRoutes:
    """The endpoints over a queue."""

    def __init__(self, queue: JobQueue) -> None:
        self.queue = queue
        self.limits = queue.settings.limits

    async def submit(
        self,
        task: Annotated[AnyTask, Body()],
        count: Annotated[int, Query(ge=1)] = 1,
        idempotency_key: Annotated[str | None, Header(max_length=64)] = None,
    ) -> JSONResponse:
        """Queue a picture, or `count` of it with following seeds. The same Idempotency-Key gets the same job.

        It is refused where it fits none of the server's devices. Without a `model` it is drawn by the one that is the default
        when it is queued.
        """
        if count > self.limits.pictures:
            raise HTTPException(422, f"count {count}: this server makes {self.limits.pictures} at most in one job")

        stored: dict[str, object] = {}  # the pictures of all are the same

        def store_pictures(task: AnyTask, folder: Path, index: int) -> AnyTask:
            if not stored and task.has_pictures:
                first = task.store_pictures(folder, self.limits, "input-")
                stored.update((field, getattr(first, field)) for field in task.pictures)
            return task.model_copy(update=stored)

        def submit() -> Job:
            tasks = [following_seed(task, index) for index in range(count)]
            return self.queue.submit(tasks, id=idempotency_key, prepare=store_pictures)

        job = await (take_in(self.queue, submit) if task.has_pictures else run_in_threadpool(submit))
        return JSONResponse(self.queue.describe(job), 202, headers={"Location": f"/jobs/{job.id}"})

    def jobs(self) -> list[Mapping[str, object]]:
        """All jobs, the latest first."""
        return [*self.queue.documents()]

    def job(self, name: str) -> Mapping[str, object]:
        """A job: its status, position in the queue, progress and results.

        `position` is how many of the waiting jobs came before it. It is no promise of the order: shorter jobs, and those whose
        model is loaded, may go first, until a job has waited for a minute.
        """
        return self.queue.describe(find_job(self.queue, name))

    def cancel(self, name: str) -> Mapping[str, object]:
        """Stop a job, a running one after the tile in progress; its finished pictures stay."""
        job = find_job(self.queue, name)
        self.queue.cancel(job)
        return self.queue.describe(job)

    def remove(self, name: str) -> None:
        """Delete an ended job and its files; 409 while it waits or runs."""
        job = find_job(self.queue, name)
        if job.status not in ENDED:
            raise HTTPException(409, f"job {name}: is {job.status}; cancel it first")
        self.queue.forget(job)

    def events(self, name: str, request: Request) -> StreamingResponse:
        """Server-sent events: 'progress' at every change, then one 'end'. Their data is the job as JSON."""
        events = _events(self.queue, find_job(self.queue, name), request)
        return StreamingResponse(events, media_type="text/event-stream", headers=UNBUFFERED)

    async def preview(self, name: str) -> Response:
        """The latest estimate as a PNG; 204 before there is one."""
        pixels = find_job(self.queue, name).meter.preview
        if pixels is None:
            return Response(status_code=204)
        content = await run_in_threadpool(png_bytes, pixels)
        return Response(content, media_type="image/png", headers={"Cache-Control": "no-store"})

    def result(self, name: str, picture: Annotated[int, Query(ge=0)] = 0) -> FileResponse:
        """The finished file; byte ranges are answered."""
        path = result_path(find_job(self.queue, name), picture)
        return FileResponse(
            path,
            media_type=MEDIA[path.suffix],
            filename=f"{name}-{picture}{path.suffix}",
            content_disposition_type="inline",
        )

    async def plan(self, task: Annotated[AnyTask, Body()]) -> Mapping[str, object]:
        """What a job would do, without doing it, on the first device that it fits: as text, as JSON and drawn as SVG."""
        plan = partial(self._plan, task)
        return _describe_plan(await (take_in(self.queue, plan) if task.has_pictures else run_in_threadpool(plan)))

    def _plan(self, task: AnyTask) -> MemoryPlan | None:
        with tempfile.TemporaryDirectory() as folder:
            stored = task.store_pictures(Path(folder), self.limits)
            return self.queue.plan(stored, Path(folder))

    def models(self) -> Mapping[str, object]:
        """The names of models, LoRAs and upscalers that a request may give; the first model is the default."""
        library = self.queue.library
        document: ModelsDocument = {
            "models": [offer.name for offer in library.models()],
            "loras": [offer.name for offer in library.loras()],
            "upscalers": [offer.name for offer in library.upscalers()],
        }
        return document

    def health(self) -> Mapping[str, object]:
        """The server's version, devices and memory budget, and how many jobs wait or run."""
        return {
            "version": __version__,
            "jobs": self.queue.count(),
            "devices": [worker.spec.name for worker in self.queue.workers],
            "vram": self.queue.settings.vram,
        }


def router(queue: JobQueue) -> APIRouter:
    """The routes over a queue."""
    routes, endpoints = APIRouter(tags=["jobs"]), JobRoutes(queue)
    routes.post("/jobs", status_code=202)(endpoints.submit)
    routes.get("/jobs")(endpoints.jobs)
    routes.get("/jobs/{name}")(endpoints.job)
    routes.post("/jobs/{name}/cancel")(endpoints.cancel)
    routes.delete("/jobs/{name}", status_code=204)(endpoints.remove)
    routes.get("/jobs/{name}/events")(endpoints.events)
    routes.get("/jobs/{name}/preview")(endpoints.preview)
    routes.get("/jobs/{name}/result")(endpoints.result)
    routes.post("/plan")(endpoints.plan)
    routes.get("/models")(endpoints.models)
    routes.get("/health")(endpoints.health)
    return routes


def find_job(queue: JobQueue, name: str) -> Job:
    """The job with this id. 404 where there is none."""
    job = queue.get(name)
    if job is None:
        raise HTTPException(404, f"job {name[:80]!r}: is not here")
    return job


def result_path(job: Job, picture: int) -> Path:
    """The file of a finished picture. 404 where there is none, 409 while it is being made, 410 where it was deleted."""
    if picture < len(job.pictures):
        path = job.folder / job.pictures[picture].file
        if path.is_file():
            return path
        raise HTTPException(410, f"picture {picture} of job {job.id}: its file is gone")
    if job.status in ENDED:
        raise HTTPException(404, f"picture {picture} of job {job.id}: there is none, the job is {job.status}")
    raise HTTPException(409, f"picture {picture} of job {job.id}: is not finished; watch /jobs/{job.id}/events")


def _describe_plan(plan: MemoryPlan | None) -> PlanDocument:
    if plan is None:
        return {"text": "enlarged by rows; no diffusion model runs", "plan": None, "svg": None}
    return {"text": plan.explain(), "plan": json.loads(json.dumps(plan.to_json(), default=str)), "svg": svg(plan)}


async def _events(queue: JobQueue, job: Job, request: Request) -> AsyncIterator[bytes]:
    last, silent, ending = "", 0.0, asyncio.wrap_future(job.ended)
    while not await request.is_disconnected():
        document = queue.describe(job)
        ended = job.ended.done()
        text = json.dumps(document)
        if text != last:
            yield f"event: {'end' if ended else 'progress'}\ndata: {text}\n\n".encode()
            last, silent = text, 0.0
        elif silent > COMMENT_SECONDS:
            yield b": still here\n\n"
            silent = 0.0
        if ended:
            return
        await asyncio.wait([ending], timeout=EVENT_SECONDS)
        silent += EVENT_SECONDS
