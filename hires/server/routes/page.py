"""The web page at `/`, the tiles of its viewer, and the page at `/docs`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query
from fastapi.responses import FileResponse, Response
from starlette.concurrency import run_in_threadpool

from hires.checkpoints.locate import ASSETS
from hires.server.queue import JobQueue
from hires.server.routes.deepzoom import Pyramid, pyramid_of
from hires.server.routes.jobs import find_job, result_path

WEB = ASSETS / "web"
SWAGGER = ASSETS / "swagger"
FILES = {
    "app.js": WEB,
    "style.css": WEB,
    "openseadragon.min.js": WEB,
    "openseadragon.LICENSE.txt": WEB,
    "docs.js": WEB,
    "swagger-ui.css": SWAGGER,
    "swagger-ui-bundle.js": SWAGGER,
    "swagger-ui-bundle.js.LICENSE.txt": SWAGGER,
}
"""The files of both pages, by the folder that they are in."""
MEDIA = {".js": "text/javascript", ".css": "text/css", ".txt": "text/plain"}
UNCACHED = {"Cache-Control": "no-cache"}


class PageRoutes:
    """The endpoints over a queue."""

    def __init__(self, queue: JobQueue) -> None:
        self.queue = queue

    def index(self) -> FileResponse:
        """The page."""
        return FileResponse(WEB / "index.html", media_type="text/html", headers=UNCACHED)

    def docs(self) -> FileResponse:
        """Every request and its fields, drawn from `/openapi.json` without a script from elsewhere."""
        return FileResponse(WEB / "docs.html", media_type="text/html", headers=UNCACHED)

    def file(self, name: str) -> FileResponse:
        """A script, style or licence of a page. 404 for any other name."""
        if name not in FILES:
            raise HTTPException(404, f"{name[:80]!r}: is not here")
        return FileResponse(FILES[name] / name, media_type=MEDIA[Path(name).suffix], headers=UNCACHED)

    def favicon(self) -> Response:
        """No icon, and no error for asking."""
        return Response(status_code=204)

    def zoom(self, name: str, picture: Annotated[int, Query(ge=0)] = 0) -> Mapping[str, object]:
        """The size of a finished picture and of its tiles."""
        return self._pyramid(name, picture).to_json()

    async def tile(self, name: str, picture: int, level: int, column: int, row: int) -> Response:
        """A tile of a finished picture as a JPEG. 404 outside the picture."""
        content = await run_in_threadpool(lambda: self._pyramid(name, picture).tile(level, column, row))
        if content is None:
            raise HTTPException(404, f"tile {column}_{row} of level {level}: is outside the picture")
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=86400"})

    def _pyramid(self, name: str, picture: int) -> Pyramid:
        return pyramid_of(result_path(find_job(self.queue, name), picture))


def router(queue: JobQueue) -> APIRouter:
    """The routes over a queue; they are not in the API's description."""
    routes, endpoints = APIRouter(include_in_schema=False), PageRoutes(queue)
    routes.get("/")(endpoints.index)
    routes.get("/docs")(endpoints.docs)
    routes.get("/web/{name}")(endpoints.file)
    routes.get("/favicon.ico")(endpoints.favicon)
    routes.get("/jobs/{name}/zoom")(endpoints.zoom)
    routes.get("/jobs/{name}/zoom/{picture}/{level}/{column}_{row}.jpg")(endpoints.tile)
    return routes
