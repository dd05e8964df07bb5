"""A job on a server: watched, cancelled, and its images fetched."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from hires.client.connection import Connection
from hires.client.documents import ENDED, JobDocument, ProgressDocument
from hires.errors import Cancelled, OutputError, RunError
from hires.events import Event, OnEvent

if TYPE_CHECKING:
    from PIL import Image

CHUNK = 2**20
TIMEOUT_SECONDS = 60


@dataclass(frozen=True, slots=True)
class RemoteJob:
    """A job on a server, by its id."""

    client: Connection
    id: str

    def status(self) -> JobDocument:
        """The job as `GET /jobs/{id}` describes it: status, position, progress, results, error."""
        document: JobDocument = self.client.request("GET", f"/jobs/{self.id}").json()
        return document

    def events(self) -> Iterator[JobDocument]:
        """The job at every change, as `status` describes it, up to its end. A broken connection is opened again."""
        failures = 0
        while True:
            try:
                with self.client.http.stream("GET", f"/jobs/{self.id}/events", timeout=TIMEOUT_SECONDS) as response:
                    self.client.check(response)
                    for line in response.iter_lines():
                        if line.startswith("data: "):
                            failures = 0
                            document: JobDocument = json.loads(line[6:])
                            yield document
                            if document["status"] in ENDED:
                                return
            except self.client.errors:
                failures += 1
                self.client.pause(failures)

    def cancel(self) -> None:
        """Stop it; the images that are finished stay."""
        self.client.request("POST", f"/jobs/{self.id}/cancel")

    def wait(self, on_event: OnEvent | None = None) -> JobDocument:
        """Return the job when it is done. RunError where it failed; Cancelled where it was cancelled.

        on_event: called with an `Event` at every change; an error raised in it cancels the job.
        """
        document: JobDocument | None = None
        try:
            for document in self.events():
                if on_event is not None:
                    on_event(_event(document["progress"]))
        except BaseException:
            self.cancel()
            raise
        assert document is not None, "events go on until the job has ended"
        if document["status"] == "failed":
            raise RunError(f"job {self.id}: {document['error']}")
        if document["status"] == "cancelled":
            raise Cancelled(f"job {self.id}: was cancelled")
        return document

    def save(self, output: str | Path, *, picture: int = 0, overwrite: bool = False) -> Path:
        """Fetch a finished image into a file, which appears whole or not at all; a broken transfer goes on where it stopped.

        OutputError where the file exists.
        """
        path = free_path(output, overwrite)
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            with part.open("wb") as opened:
                self._fetch(picture, opened)
            part.replace(path)
        except OSError as error:
            raise OutputError(f"output {path}: {error.strerror or error}; give another name") from None
        finally:
            part.unlink(missing_ok=True)
        return path

    def image(self, picture: int = 0) -> Image.Image:
        """A finished image in memory."""
        from PIL import Image

        from hires.images.decoders import PILLOW_FORMATS

        content = io.BytesIO()
        self._fetch(picture, content)
        content.seek(0)
        image = Image.open(content, formats=PILLOW_FORMATS)
        image.load()
        return image

    def _fetch(self, picture: int, into: BinaryIO) -> None:
        """Write the file of an image, after a broken connection from where it broke."""
        failures = 0
        while True:
            received = into.tell()
            headers = {"Range": f"bytes={received}-"} if received else {}
            try:
                with self.client.http.stream(
                    "GET",
                    f"/jobs/{self.id}/result",
                    params={"picture": picture},
                    headers=headers,
                    timeout=TIMEOUT_SECONDS,
                ) as response:
                    if received and response.status_code == 416:  # nothing is left to fetch
                        return
                    self.client.check(response)
                    if received and response.status_code != 206:
                        into.seek(0)
                        into.truncate()
                    for part in response.iter_bytes(CHUNK):
                        into.write(part)
                return
            except self.client.errors:
                failures += 1
                self.client.pause(failures)


def free_path(output: str | Path, overwrite: bool) -> Path:
    """The path of a file to write. OutputError where it exists and `overwrite` is not set."""
    path = Path(output).expanduser()
    if path.exists() and not overwrite:
        raise OutputError(f"output {path}: is there already; give overwrite=True or another name")
    return path


def _event(progress: ProgressDocument) -> Event:
    return Event(
        stage=progress["stage"],
        done=progress["done"],
        total=progress["total"],
        step=progress["step"],
        steps=progress["steps"],
        fraction=progress["fraction"],
        eta_seconds=progress["eta_seconds"],
        elapsed=progress["elapsed"],
        device=progress["device"],
    )
