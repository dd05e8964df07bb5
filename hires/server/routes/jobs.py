"""`/jobs`: send a picture's description, watch it, fetch the file, stop it. And `/plan`, `/models`, `/health`."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, HTTPException, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from hires._version import __version__
from hires.planning.drawing import svg
from hires.server.job import ENDED, Job
from hires.server.queue import JobQueue
from hires.server.tasks import AnyTask

EVENT_SECONDS = 0.1
COMMENT_SECONDS = 15.0  # keeps proxies from closing a silent stream
MEDIA = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp", ".tif": "image/tiff"}


def router(queue: JobQueue) -> APIRouter:
    """The routes over a queue."""
    routes = APIRouter(tags=["jobs"])
    limits = queue.settings.limits

    def found(name: str) -> Job:
        job = queue.get(name)
        if job is None:
            raise HTTPException(404, f"job {name[:80]!r}: is not here")
        return job

    @routes.post("/jobs", status_code=202)
    async def submit(
        task: Annotated[AnyTask, Body()],
        count: Annotated[int, Query(ge=1)] = 1,
        idempotency_key: Annotated[str | None, Header(max_length=64)] = None,
    ) -> JSONResponse:
        """Queue a picture, or `count` of it with following seeds. The same Idempotency-Key gets the same job."""
        if count > limits.pictures:
            raise HTTPException(422, f"count {count}: this server makes {limits.pictures} at most in one job")
        tasks = [task if task.seed is None else task.model_copy(update={"seed": task.seed + index}) for index in range(count)]
        job = await run_in_threadpool(
            queue.submit,
            tasks,
            id=idempotency_key,
            prepare=lambda task, folder, index: task.stored(folder, limits, f"input-{index}-"),
        )
        return JSONResponse(queue.describe(job), 202, headers={"Location": f"/jobs/{job.id}"})

    @routes.get("/jobs")
    def jobs() -> list[dict[str, Any]]:
        return queue.listed()

    @routes.get("/jobs/{name}")
    def job(name: str) -> dict[str, Any]:
        return queue.describe(found(name))

    @routes.post("/jobs/{name}/cancel")
    def cancel(name: str) -> dict[str, Any]:
        queue.cancel(found(name))
        return queue.describe(found(name))

    @routes.delete("/jobs/{name}", status_code=204)
    def remove(name: str) -> None:
        one = found(name)
        if one.status not in ENDED:
            raise HTTPException(409, f"job {name}: is {one.status}; cancel it first")
        queue.forget(one)

    @routes.get("/jobs/{name}/events")
    def events(name: str, request: Request) -> StreamingResponse:
        """Server-sent events: 'progress' at every change, then one 'end'. Their data is the job as JSON."""
        return StreamingResponse(_events(queue, found(name), request), media_type="text/event-stream", headers=UNBUFFERED)

    @routes.get("/jobs/{name}/preview")
    async def preview(name: str) -> Response:
        """The latest estimate as a PNG; 204 before there is one."""
        pixels = found(name).meter.preview
        if pixels is None:
            return Response(status_code=204)
        return Response(await run_in_threadpool(as_png, pixels), media_type="image/png", headers={"Cache-Control": "no-store"})

    @routes.get("/jobs/{name}/result")
    def result(name: str, picture: Annotated[int, Query(ge=0)] = 0) -> FileResponse:
        """The finished file; byte ranges are answered."""
        path = result_path(found(name), picture)
        return FileResponse(
            path, media_type=MEDIA[path.suffix], filename=f"{name}-{picture}{path.suffix}", content_disposition_type="inline"
        )

    @routes.post("/plan")
    async def plan(task: Annotated[AnyTask, Body()]) -> dict[str, Any]:
        """What a job would do, without doing it: as text, as JSON and drawn as SVG."""
        import tempfile

        def planned() -> Any:
            with tempfile.TemporaryDirectory() as folder:
                return queue.runners[0].plan(task.stored(Path(folder), limits), Path(folder))

        made = await run_in_threadpool(planned)
        if made is None:
            return {"text": "enlarged by rows; no diffusion model runs", "plan": None, "svg": None}
        return {"text": made.explain(), "plan": json.loads(json.dumps(made.to_json(), default=str)), "svg": svg(made)}

    @routes.get("/models")
    def models() -> dict[str, Any]:
        library = queue.library
        kinds = {"models": library.models(), "loras": library.loras(), "upscalers": library.upscalers()}
        return {kind: [offer.name for offer in offers] for kind, offers in kinds.items()}

    @routes.get("/health")
    def health() -> dict[str, Any]:
        return {
            "version": __version__,
            "jobs": queue.count(),
            "devices": [runner.device_name for runner in queue.runners],
            "vram": queue.settings.vram,
        }

    return routes


UNBUFFERED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def result_path(job: Job, picture: int) -> Path:
    """The file of a finished picture. 404 where there is none, 409 while it is being made."""
    if picture < len(job.made):
        path = job.folder / job.made[picture].file
        if path.is_file():
            return path
        raise HTTPException(410, f"picture {picture} of job {job.id}: its file is gone")
    if job.status in ENDED:
        raise HTTPException(404, f"picture {picture} of job {job.id}: there is none, the job is {job.status}")
    raise HTTPException(409, f"picture {picture} of job {job.id}: is not finished; watch /jobs/{job.id}/events")


def as_png(pixels: Any) -> bytes:
    """(h, w, 3) uint8 as a PNG file."""
    from PIL import Image

    into = io.BytesIO()
    Image.fromarray(pixels).save(into, format="PNG", compress_level=1)
    return into.getvalue()


async def _events(queue: JobQueue, job: Job, request: Request) -> AsyncIterator[bytes]:
    last, silent = "", 0.0
    while not await request.is_disconnected():
        described = queue.describe(job)
        ended = job.ended.done()
        text = json.dumps(described)
        if text != last:
            yield f"event: {'end' if ended else 'progress'}\ndata: {text}\n\n".encode()
            last, silent = text, 0.0
        elif silent > COMMENT_SECONDS:
            yield b": still here\n\n"
            silent = 0.0
        if ended:
            return
        await asyncio.sleep(EVENT_SECONDS)
        silent += EVENT_SECONDS
