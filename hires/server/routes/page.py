"""The web page at `/` and the tiles of its viewer."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query
from fastapi.responses import FileResponse, Response
from starlette.concurrency import run_in_threadpool

from hires.checkpoints.locate import ASSETS
from hires.server.queue import JobQueue
from hires.server.routes.deepzoom import Pyramid, pyramid_of
from hires.server.routes.jobs import result_path

WEB = ASSETS / "web"
FILES = {
    "app.js": "text/javascript",
    "style.css": "text/css",
    "openseadragon.min.js": "text/javascript",
    "openseadragon.LICENSE.txt": "text/plain",
}


def router(queue: JobQueue) -> APIRouter:
    """The routes over a queue."""
    routes = APIRouter(include_in_schema=False)

    def pyramid(name: str, picture: int) -> Pyramid:
        job = queue.get(name)
        if job is None:
            raise HTTPException(404, f"job {name[:80]!r}: is not here")
        return pyramid_of(result_path(job, picture))

    @routes.get("/")
    def index() -> FileResponse:
        return FileResponse(WEB / "index.html", media_type="text/html", headers={"Cache-Control": "no-cache"})

    @routes.get("/web/{name}")
    def file(name: str) -> FileResponse:
        if name not in FILES:
            raise HTTPException(404, f"{name[:80]!r}: is not here")
        return FileResponse(WEB / name, media_type=FILES[name], headers={"Cache-Control": "no-cache"})

    @routes.get("/favicon.ico")
    def favicon() -> Response:
        return Response(status_code=204)

    @routes.get("/jobs/{name}/zoom")
    def zoom(name: str, picture: Annotated[int, Query(ge=0)] = 0) -> dict[str, Any]:
        return pyramid(name, picture).to_json()

    @routes.get("/jobs/{name}/zoom/{picture}/{level}/{column}_{row}.jpg")
    async def tile(name: str, picture: int, level: int, column: int, row: int) -> Response:
        found = await run_in_threadpool(lambda: pyramid(name, picture).tile(level, column, row))
        if found is None:
            raise HTTPException(404, f"tile {column}_{row} of level {level}: is outside the picture")
        return Response(found, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=86400"})

    return routes
