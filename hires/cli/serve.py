"""`hires serve`: the HTTP server; registered by `cli`."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer

from hires.cli.display import guarded
from hires.cli.options import Command, Given, keywords
from hires.errors import OutputError, RequestError
from hires.options.declarations import LoadOptions
from hires.options.fields import Option, Options, declared
from hires.units import parse_bytes

if TYPE_CHECKING:
    from hires.server.settings import Settings


KEY_VARIABLE = "HIRES_API_KEY"


def option(help: str, flag: str | None = None, metavar: str | None = None, envvar: str | None = None) -> Option:
    """An option of a server: it describes the machine, and no network may set it."""
    return Option(help=help, flag=flag, metavar=metavar, envvar=envvar, group="machine", panel="Memory", local=True)


@dataclass(frozen=True, kw_only=True)
class ServeOptions(Options):
    """The options of `hires serve`."""

    host: Annotated[str, option("Where to listen; beyond this machine only with a key.", metavar="ADDRESS")] = "127.0.0.1"
    port: Annotated[int, option("7860 is where A1111's clients look.", metavar="N")] = 7860
    api_key: Annotated[
        str | None, option("Clients must send it: as a bearer token, or as the password.", envvar=KEY_VARIABLE)
    ] = None
    folder: Annotated[str, option("Where jobs and outputs are kept.", metavar="FOLDER")] = "hires-server"
    model: Annotated[str, option("The model where a request names none; as of hires render.")] = "demo"
    models: Annotated[str | None, option("Checkpoints that requests may name.", metavar="FOLDER")] = None
    loras: Annotated[str | None, option("LoRAs that requests may name.", metavar="FOLDER")] = None
    upscalers: Annotated[str | None, option("Upscaling networks that requests may name.", metavar="FOLDER")] = None
    embeddings: Annotated[str | None, option("Textual inversions that prompts may name.", metavar="FOLDER")] = None
    tiny_vae: Annotated[str | None, option("Draws the previews; as of hires render.", metavar="FOLDER")] = None
    vram: Annotated[str | None, option("Memory budget of every job, such as 24GB.", metavar="SIZE")] = None
    ram: Annotated[str | None, option("What the whole process may hold in host memory.", metavar="SIZE")] = None
    device: Annotated[Sequence[str], option("auto, cpu or cuda:0; given for each of several cards.")] = ()
    queue: Annotated[int, option("Jobs that may wait; more get 429.", metavar="N")] = 64
    keep: Annotated[int, option("Finished jobs whose files stay.", metavar="N")] = 200
    keep_bytes: Annotated[
        str | None, option("Most that finished jobs and saved outputs hold on disk; the oldest go first.", metavar="SIZE")
    ] = None
    idle_unload: Annotated[float, option("Let models go after so long without a job.", metavar="SECONDS")] = 600.0
    keep_weights: Annotated[str, declared(LoadOptions)["keep_weights"].option] = "auto"
    max_body: Annotated[str, option("Longest body of a request.", metavar="SIZE")] = "256MiB"
    max_pixels: Annotated[int, option("Most pixels of a picture that is asked for.", metavar="N")] = 2**30
    allow_host: Annotated[Sequence[str], option("A further name that the server goes by.", metavar="NAME")] = ()

    def settings(self) -> Settings:
        """The server's own form of them. RequestError for a value that it does not allow."""
        try:
            from hires.server.settings import Limits, Settings
        except ModuleNotFoundError as error:
            raise missing(error) from None
        limits = Limits(
            body_bytes=parse_bytes(self.max_body),
            output_pixels=self.max_pixels,
            waiting=self.queue,
            kept=self.keep,
            kept_bytes=None if self.keep_bytes is None else parse_bytes(self.keep_bytes),
        )
        folders = {
            name: None if (path := getattr(self, name)) is None else Path(path)
            for name in ("models", "loras", "upscalers", "embeddings")
        }
        return Settings(
            folder=Path(self.folder).expanduser(),
            host=self.host,
            port=self.port,
            api_key=self.api_key,
            hosts=tuple(self.allow_host),
            model=self.model,
            **folders,
            tiny_vae=self.tiny_vae,
            vram=self.vram,
            ram=self.ram,
            devices=tuple(self.device) or ("auto",),
            idle_unload_seconds=self.idle_unload,
            keep_weights=self.keep_weights,
            limits=limits,
        )


SERVE = Command(options=(ServeOptions,), sections=False)


def register(app: typer.Typer) -> None:
    """Add the command."""
    SERVE.add(app, "serve", serve)


def serve(given: Given) -> None:
    """Serve pictures over HTTP: A1111's and OpenAI's endpoints, jobs, and a web page.

    A1111's clients find /sdapi/v1, OpenAI's /v1; /docs lists everything. Jobs outlive a restart and go on where they were.
    """
    guarded(
        lambda: run(ServeOptions(**keywords(ServeOptions, given)).settings()),
        "jobs that are not finished go on at the next start",
        SERVE.options,
    )


def run(settings: Settings) -> None:
    """Serve until stopped. RequestError for a model that is not there; OutputError for a folder that another server holds."""
    from hires.checkpoints.spec import load_spec
    from hires.resume.records import hold

    try:
        import uvicorn

        from hires.server.app import create_app
        from hires.server.connections import bounded
    except ModuleNotFoundError as error:
        raise missing(error) from None
    load_spec(settings.model)
    with private_files(), held(settings.folder, hold):
        listening = listener(settings.host, settings.port)
        shown = f"[{settings.host}]" if ":" in settings.host else settings.host
        print(f"hires serves http://{shown}:{listening.getsockname()[1]}/ and keeps its jobs in {settings.folder}", flush=True)
        config = uvicorn.Config(
            create_app(settings),
            log_level="warning",
            timeout_graceful_shutdown=5,
            timeout_keep_alive=30,
            server_header=False,
            h11_max_incomplete_event_size=64 * 1024,
            limit_concurrency=512,
            http=bounded(settings.limits),
            ws="none",
        )
        uvicorn.Server(config).run(sockets=[listening])


@contextmanager
def private_files() -> Iterator[None]:
    """What is written within can be read by this user alone: it is prompts and pictures."""
    others = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(others)


def listener(host: str, port: int) -> socket.socket:
    """A socket that listens there. RequestError where it cannot."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(2048)  # who comes before the server is ready waits
    except OSError as error:
        raise RequestError(f"--host {host} --port {port}: {error.strerror or error}; give another port, or 0 for any") from None
    return opened


def held(folder: Path, hold: Callable[[Path], IO[str]]) -> IO[str]:
    """The lock of a server's folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return hold(folder / "lock")
    except OutputError:
        raise OutputError(f"--folder {folder}: another server works there; give another folder") from None
    except OSError as error:
        raise OutputError(f"--folder {folder}: {error.strerror or error}; give a folder that can be written to") from None


def missing(error: ModuleNotFoundError) -> RequestError:
    """What to do where the extra is not installed."""
    return RequestError(f"hires serve needs {error.name}: pip install -e '.[server]' in the folder of hires")
