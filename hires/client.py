"""A client of `hires serve`: renders on another machine as if they were here."""

from __future__ import annotations

import base64
import io
import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hires.errors import Cancelled, HiresError, OutputError, RequestError, RunError
from hires.events import Event, OnEvent
from hires.options.fields import declared
from hires.options.render import EditOptions, RenderOptions
from hires.options.upscale import UpscaleOptions

if TYPE_CHECKING:
    import httpx
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    PictureLike = str | Path | bytes | Image.Image | NDArray[np.uint8]

PICTURES = ("init", "mask", "control", "picture")
RETRIES, PAUSE_SECONDS = 5, 0.5  # of a request that did not reach the server
CHUNK = 2**20


class UnreachableError(RunError):
    """The server does not answer."""


@dataclass(frozen=True, slots=True)
class RemoteJob:
    """A job on a server, by its id."""

    client: Client
    id: str

    def status(self) -> dict[str, Any]:
        """The job as `GET /jobs/{id}` tells it: status, position, progress, results, error."""
        found: dict[str, Any] = self.client.request("GET", f"/jobs/{self.id}").json()
        return found

    def events(self) -> Iterator[dict[str, Any]]:
        """The job at every change, as `status` tells it, up to its end. A connection that breaks is taken up again."""
        failures = 0
        while True:
            try:
                with self.client.http.stream("GET", f"/jobs/{self.id}/events", timeout=60) as answer:
                    self.client.check(answer)
                    for line in answer.iter_lines():
                        if line.startswith("data: "):
                            failures, found = 0, json.loads(line[6:])
                            yield found
                            if found["status"] in ("done", "failed", "cancelled"):
                                return
            except self.client.errors:
                failures += 1
                self.client.pause(failures)

    def cancel(self) -> None:
        """Stop it; what is finished of it stays."""
        self.client.request("POST", f"/jobs/{self.id}/cancel")

    def wait(self, on_event: OnEvent | None = None) -> dict[str, Any]:
        """Return the job when it is done. RunError where it failed; Cancelled where it was stopped.

        on_event: called with an `Event` at every change; an error raised in it cancels the job.
        """
        found: dict[str, Any] = {}
        try:
            for found in self.events():
                if on_event is not None:
                    on_event(_event(found["progress"]))
        except BaseException:
            self.cancel()
            raise
        if found["status"] == "failed":
            raise RunError(f"job {self.id}: {found['error']}")
        if found["status"] == "cancelled":
            raise Cancelled(f"job {self.id}: was cancelled")
        return found

    def save(self, output: str | Path, *, picture: int = 0, overwrite: bool = False) -> Path:
        """Fetch a finished picture into a file, which appears whole or not at all; a broken transfer goes on where it was.

        OutputError where the file is there already.
        """
        path = Path(output).expanduser()
        if path.exists() and not overwrite:
            raise OutputError(f"output {path}: is there already; give overwrite=True or another name")
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
        """A finished picture in memory."""
        from PIL import Image

        from hires.images.decoders import PILLOW_FORMATS

        into = io.BytesIO()
        self._fetch(picture, into)
        into.seek(0)
        found = Image.open(into, formats=PILLOW_FORMATS)
        found.load()
        return found

    def _fetch(self, picture: int, into: Any) -> None:
        failures = 0
        while True:
            held = into.tell()
            headers = {"Range": f"bytes={held}-"} if held else {}
            try:
                with self.client.http.stream(
                    "GET", f"/jobs/{self.id}/result", params={"picture": picture}, headers=headers, timeout=60
                ) as answer:
                    if held and answer.status_code == 416:  # all of it is there
                        return
                    self.client.check(answer)
                    if held and answer.status_code != 206:
                        into.seek(0)
                        into.truncate()
                    for part in answer.iter_bytes(CHUNK):
                        into.write(part)
                return
            except self.client.errors:
                failures += 1
                self.client.pause(failures)


class Client:
    """A `hires serve` at an address, such as "http://127.0.0.1:7860".

    api_key: the server's, where it has one. Requests that do not reach the server are sent again; a job is sent under an id of
    its own, so that it is queued once.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 60.0) -> None:
        import httpx

        self.errors: tuple[type[Exception], ...] = (httpx.TransportError,)
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        if not url.startswith(("http://", "https://")):
            raise RequestError(f"url {url!r}: give one such as http://127.0.0.1:7860")
        try:
            self.http = httpx.Client(base_url=url, headers=headers, timeout=timeout)
        except (httpx.InvalidURL, TypeError) as error:
            raise RequestError(f"url {url!r}: {error}; give one such as http://127.0.0.1:7860") from None
        self.url = url

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the connections go."""
        self.http.close()

    def submit(self, kind: str = "render", *, count: int = 1, id: str | None = None, **fields: Any) -> RemoteJob:
        """Queue a picture and return at once.

        kind: 'render', 'edit' or 'upscale'. fields: the options of the function of that name, except those of its machine, and
        what else `POST /jobs` takes; images as paths, bytes, PIL images or arrays (H, W, 3) uint8.
        count: how many, with following seeds. RequestError, with the server's reason, where it refuses.
        """
        name = id or uuid.uuid4().hex
        body = _body(kind, fields)
        answer = self.request("POST", "/jobs", params={"count": count}, json=body, headers={"Idempotency-Key": name})
        return RemoteJob(self, answer.json()["id"])

    def job(self, id: str) -> RemoteJob:
        """A job that was queued before. RequestError where the server does not know it."""
        job = RemoteJob(self, id)
        job.status()
        return job

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs that the server has, the latest first."""
        found: list[dict[str, Any]] = self.request("GET", "/jobs").json()
        return found

    def plan(self, kind: str = "render", **fields: Any) -> dict[str, Any]:
        """What the server would do: 'text', 'plan' as JSON and 'svg'."""
        body = _body(kind, fields)
        found: dict[str, Any] = self.request("POST", "/plan", json=body).json()
        return found

    def models(self) -> dict[str, list[str]]:
        """The names that the server offers: 'models', 'loras', 'upscalers'."""
        found: dict[str, list[str]] = self.request("GET", "/models").json()
        return found

    def render(
        self,
        prompt: str,
        *,
        output: str | Path | None = None,
        overwrite: bool = False,
        on_event: OnEvent | None = None,
        **fields: Any,
    ) -> Path | Image.Image:
        """Render on the server and wait: the path of `output`, or a PIL image without one. fields: as of `hires.render`."""
        return self._made("render", output, overwrite, on_event, prompt=prompt, **fields)

    def edit(
        self,
        picture: PictureLike,
        instruction: str,
        *,
        output: str | Path | None = None,
        overwrite: bool = False,
        on_event: OnEvent | None = None,
        **fields: Any,
    ) -> Path | Image.Image:
        """Edit on the server and wait; as `render`."""
        return self._made("edit", output, overwrite, on_event, picture=picture, prompt=instruction, **fields)

    def upscale(
        self,
        picture: PictureLike,
        *,
        output: str | Path | None = None,
        overwrite: bool = False,
        on_event: OnEvent | None = None,
        **fields: Any,
    ) -> Path | Image.Image:
        """Enlarge on the server and wait; as `render`. fields: scale or size, upscaler, refine, strength, ..."""
        return self._made("upscale", output, overwrite, on_event, picture=picture, **fields)

    def _made(
        self, kind: str, output: str | Path | None, overwrite: bool, on_event: OnEvent | None, **fields: Any
    ) -> Path | Image.Image:
        if output is not None:
            path = Path(output).expanduser()
            if path.exists() and not overwrite:
                raise OutputError(f"output {path}: is there already; give overwrite=True or another name")
            fields.setdefault("format", {".jpeg": "jpg", ".tiff": "tif"}.get(path.suffix.lower(), path.suffix.lower()[1:]))
        job = self.submit(kind, **fields)
        job.wait(on_event)
        return job.image() if output is None else job.save(output, overwrite=overwrite)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request, sent again while the server does not answer. UnreachableError, or as of `check`."""
        failures = 0
        while True:
            try:
                answer = self.http.request(method, path, **options)
                self.check(answer)
                return answer
            except self.errors as error:
                failures += 1
                if failures > RETRIES:
                    raise UnreachableError(f"{self.url}: does not answer ({error}); is `hires serve` running there?") from None
                time.sleep(PAUSE_SECONDS * failures)

    def pause(self, failures: int) -> None:
        """Wait before the next try. UnreachableError after too many."""
        if failures > RETRIES:
            raise UnreachableError(f"{self.url}: does not answer; is `hires serve` running there?")
        time.sleep(PAUSE_SECONDS * failures)

    def check(self, answer: httpx.Response) -> None:
        """RequestError or RunError with the server's reason where it refuses."""
        if answer.status_code < 400:
            return
        answer.read()
        try:
            reason = str(answer.json()["detail"])
        except (ValueError, KeyError, TypeError):
            reason = f"HTTP {answer.status_code}"
        kind: type[HiresError] = RequestError if answer.status_code < 500 and answer.status_code != 429 else RunError
        raise kind(f"{self.url}: {reason}")


def _body(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    """A request's body; options at None are left out where that is their default. RequestError for options of a machine."""
    declarations = {"render": RenderOptions, "edit": EditOptions, "upscale": UpscaleOptions}
    known = declared(declarations[kind]) if kind in declarations else {}
    body: dict[str, Any] = {"kind": kind}
    for name, value in fields.items():
        field = known.get(name)
        if field is not None and field.option.local and value not in (None, field.default):
            raise RequestError(
                f"{name} {value!r}: belongs to the machine that renders; the server takes it from its own settings"
            )
        usual = field is None or field.option.local or field.default is None or field.default == value
        if value is not None or not usual:
            body[name] = _sent(name, value)
    return body


def _sent(key: str, value: Any) -> Any:
    """A field as JSON takes it: pictures in base64, sizes as WIDTHxHEIGHT."""
    if key in PICTURES:
        return base64.b64encode(_file(value)).decode("ascii")
    if key == "size" and not isinstance(value, str):
        from hires.options.sizes import as_size

        return str(as_size(value))
    if key == "loras":
        return [str(lora) for lora in value]
    if key == "colour_fix" and value == "none":
        return None
    return value


def _file(picture: PictureLike) -> bytes:
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str | Path):
        try:
            return Path(picture).expanduser().read_bytes()
        except OSError as error:
            raise RequestError(f"picture {picture}: {error.strerror or error}; give a picture file") from None
    from PIL import Image

    opened = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    into = io.BytesIO()
    opened.save(into, format="PNG", compress_level=1)
    return into.getvalue()


def _event(now: dict[str, Any]) -> Event:
    return Event(stage=now["stage"], done=now["done"], total=now["total"], step=now["step"], steps=now["steps"])
