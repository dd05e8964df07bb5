"""`hires serve`: the HTTP server; registered by `cli`."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hires.cli.display import guarded
from hires.cli.options import whole
from hires.errors import OutputError, RequestError

if TYPE_CHECKING:
    from hires.server.settings import Settings


KEY_VARIABLE = "HIRES_API_KEY"


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def serve(
        host: Annotated[
            str, typer.Option(metavar="ADDRESS", help="Where to listen; beyond this machine only with a key.")
        ] = "127.0.0.1",
        port: Annotated[int, typer.Option(parser=whole, metavar="N", help="7860 is where A1111's clients look.")] = 7860,
        api_key: Annotated[
            str | None,
            typer.Option("--api-key", envvar=KEY_VARIABLE, help="Clients must send it: as a bearer token, or as the password."),
        ] = None,
        folder: Annotated[Path, typer.Option("--folder", metavar="FOLDER", help="Where jobs and outputs are kept.")] = Path(
            "hires-server"
        ),
        model: Annotated[str, typer.Option(help="The model where a request names none; as of hires render.")] = "demo",
        models: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Checkpoints that requests may name.")] = None,
        loras: Annotated[Path | None, typer.Option(metavar="FOLDER", help="LoRAs that requests may name.")] = None,
        upscalers: Annotated[
            Path | None, typer.Option(metavar="FOLDER", help="Upscaling networks that requests may name.")
        ] = None,
        tiny_vae: Annotated[
            str | None, typer.Option("--tiny-vae", metavar="FOLDER", help="Draws the previews; as of hires render.")
        ] = None,
        vram: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory budget of every job, such as 24GB.")] = None,
        ram: Annotated[str | None, typer.Option(metavar="SIZE", help="What the whole process may hold in host memory.")] = None,
        device: Annotated[list[str] | None, typer.Option(help="auto, cpu or cuda:0; given for each of several cards.")] = None,
        queue: Annotated[
            int, typer.Option("--queue", parser=whole, metavar="N", help="Jobs that may wait; more get 429.")
        ] = 64,
        keep: Annotated[int, typer.Option("--keep", parser=whole, metavar="N", help="Finished jobs whose files stay.")] = 200,
        max_body: Annotated[str, typer.Option("--max-body", metavar="SIZE", help="Longest body of a request.")] = "256MiB",
        max_pixels: Annotated[
            int, typer.Option("--max-pixels", parser=whole, metavar="N", help="Most pixels of a picture that is asked for.")
        ] = 2**30,
        allow_host: Annotated[
            list[str] | None, typer.Option("--allow-host", metavar="NAME", help="A further name that the server goes by.")
        ] = None,
    ) -> None:
        """Serve pictures over HTTP: A1111's and OpenAI's endpoints, jobs, and a web page.

        A1111's clients find /sdapi/v1, OpenAI's /v1; /docs lists everything. Jobs outlive a restart and go on where they were.
        """

        def work() -> None:
            from hires.units import parse_bytes

            try:
                from hires.server.settings import Limits, Settings
            except ModuleNotFoundError as error:
                raise missing(error) from None
            limits = Limits(body_bytes=parse_bytes(max_body), output_pixels=max_pixels, waiting=queue, kept=keep)
            settings = Settings(
                folder=folder.expanduser(),
                host=host,
                port=port,
                api_key=api_key,
                hosts=tuple(allow_host or ()),
                model=model,
                models=models,
                loras=loras,
                upscalers=upscalers,
                tiny_vae=tiny_vae,
                vram=vram,
                ram=ram,
                devices=tuple(device or ("auto",)),
                limits=limits,
            )
            run(settings)

        guarded(work, "jobs that are not finished go on at the next start")


def run(settings: Settings) -> None:
    """Serve until stopped. RequestError for a model that is not there; OutputError for a folder that another server holds."""
    from hires.checkpoints.spec import load_spec
    from hires.resume.records import hold

    try:
        import uvicorn

        from hires.server.app import create_app
    except ModuleNotFoundError as error:
        raise missing(error) from None
    load_spec(settings.model)
    lock = held(settings.folder, hold)
    try:
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
        )
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        lock.close()


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


def held(folder: Path, hold: Callable[[Path], Any]) -> Any:
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
