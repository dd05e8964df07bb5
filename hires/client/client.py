"""Render, edit, upscale and plan on a server, and find its jobs."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hires.client.bodies import request_body
from hires.client.connection import Connection
from hires.client.jobs import RemoteJob, free_path
from hires.events import OnEvent

if TYPE_CHECKING:
    from PIL import Image

    from hires.client.bodies import PictureLike
    from hires.client.documents import JobDocument, ModelsDocument, PlanDocument

FORMATS = {".jpeg": "jpg", ".tiff": "tif"}
"""The format of a suffix that is not the format's name."""


class Client(Connection):
    """A `hires serve` at an address, such as "http://127.0.0.1:7860".

    api_key: the server's key, where it has one. Requests that do not reach the server are sent again; a job is sent under an
    id of its own, so that it is queued once.
    """

    def submit(self, kind: str = "render", *, count: int = 1, id: str | None = None, **fields: object) -> RemoteJob:
        """Queue a picture and return at once.

        kind: 'render', 'edit' or 'upscale'. fields: the options of the function of that name, except those of its machine, and
        what else `POST /jobs` takes; images as paths, bytes, PIL images or arrays (H, W, 3) uint8.
        count: how many, with following seeds. RequestError, with the server's reason, where it refuses.
        """
        name = id or uuid.uuid4().hex
        body = request_body(kind, fields)
        response = self.request("POST", "/jobs", params={"count": count}, json=body, headers={"Idempotency-Key": name})
        document: JobDocument = response.json()
        return RemoteJob(self, document["id"])

    def job(self, id: str) -> RemoteJob:
        """A job that was queued before. RequestError where the server does not know it."""
        job = RemoteJob(self, id)
        job.status()
        return job

    def jobs(self) -> list[JobDocument]:
        """All jobs that the server has, the latest first."""
        documents: list[JobDocument] = self.request("GET", "/jobs").json()
        return documents

    def plan(self, kind: str = "render", **fields: object) -> PlanDocument:
        """What the server would do: 'text', 'plan' as JSON and 'svg'."""
        document: PlanDocument = self.request("POST", "/plan", json=request_body(kind, fields)).json()
        return document

    def models(self) -> ModelsDocument:
        """The names that the server offers: 'models', 'loras', 'upscalers'."""
        document: ModelsDocument = self.request("GET", "/models").json()
        return document

    def render(
        self,
        prompt: str,
        *,
        output: str | Path | None = None,
        overwrite: bool = False,
        on_event: OnEvent | None = None,
        **fields: object,
    ) -> Path | Image.Image:
        """Render on the server and wait: the path of `output`, or a PIL image without one. fields: as of `hires.render`."""
        return self._run("render", output, overwrite, on_event, prompt=prompt, **fields)

    def edit(
        self,
        picture: PictureLike,
        instruction: str,
        *,
        output: str | Path | None = None,
        overwrite: bool = False,
        on_event: OnEvent | None = None,
        **fields: object,
    ) -> Path | Image.Image:
        """Edit on the server and wait; as `render`."""
        return self._run("edit", output, overwrite, on_event, picture=picture, prompt=instruction, **fields)

    def upscale(
        self,
        picture: PictureLike,
        *,
        output: str | Path | None = None,
        overwrite: bool = False,
        on_event: OnEvent | None = None,
        **fields: object,
    ) -> Path | Image.Image:
        """Enlarge on the server and wait; as `render`. fields: scale or size, upscaler, refine, strength, ..."""
        return self._run("upscale", output, overwrite, on_event, picture=picture, **fields)

    def _run(
        self, kind: str, output: str | Path | None, overwrite: bool, on_event: OnEvent | None, **fields: Any
    ) -> Path | Image.Image:
        """Queue a picture, wait for it and fetch it. OutputError, before it is queued, where the output exists."""
        if output is not None:
            suffix = free_path(output, overwrite).suffix.lower()
            fields.setdefault("format", FORMATS.get(suffix, suffix[1:]))
        job = self.submit(kind, **fields)
        job.wait(on_event)
        return job.image() if output is None else job.save(output, overwrite=overwrite)
