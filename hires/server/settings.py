"""The settings of a server, and the models that it offers."""

from __future__ import annotations

import ipaddress
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

from hires.checkpoints.detect_folder import is_model_folder
from hires.checkpoints.locate import NAMED_MODELS, missing
from hires.checkpoints.spec import load_spec
from hires.errors import ModelError, RequestError, unknown
from hires.options.declarations import KEEP_WEIGHTS
from hires.options.lora import LoraRef, parse_lora
from hires.units import parse_bytes

WEIGHTS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
PROMPT_CHARACTERS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What requests may ask for."""

    body_bytes: int = 256 * 2**20
    """The longest body of a request."""
    body_seconds: float = 30.0
    """The longest silence within a body."""
    whole_body_seconds: float = 600.0
    """How long a body may take."""
    header_seconds: float = 10.0
    """How long the header of a request may take."""
    connections: int = 128
    """How many connections an address may have."""
    input_pixels: int = 150_000_000
    """The most pixels of a picture that is sent."""
    request_pixels: int = 300_000_000
    """The most pixels of all pictures that a request sends."""
    output_pixels: int = 2**30
    """The most pixels of a picture that is rendered or enlarged."""
    side_px: int = 65_536
    """The longest side of either."""
    pictures: int = 64
    """The most pictures of one job."""
    waiting: int = 64
    """How many jobs may wait for a device."""
    kept: int = 200
    """How many finished jobs keep their files."""
    kept_bytes: int | None = None
    """What the files of finished jobs and saved outputs may hold; the latest of them stays in any case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A server's own options. Requests can name files in its folders of models, LoRAs and so on, and no other file."""

    folder: Path
    """Where jobs and outputs are stored."""
    host: str = "127.0.0.1"
    port: int = 7860
    api_key: str | None = None
    """Clients must send it; required beyond this machine."""
    hosts: tuple[str, ...] = ()
    """Further host names that the server answers to."""
    model: str = "demo"
    """The model where a request names none, until the server is switched to another."""
    models: Path | None = None
    loras: Path | None = None
    upscalers: Path | None = None
    embeddings: Path | None = None
    """Textual inversions that prompts may name."""
    tiny_vae: str | None = None
    """The autoencoder that draws the previews."""
    vram: str | None = None
    """The memory budget of every job."""
    ram: str | None = None
    """What the whole process may hold in host memory."""
    devices: tuple[str, ...] = ("auto",)
    """One job runs on each at a time."""
    idle_unload_seconds: float = 600.0
    """After how long without a job a device's models are let go."""
    keep_weights: str = "auto"
    """Where models stay between pictures, one of `KEEP_WEIGHTS`."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise RequestError(f"port {self.port}: give a port from 1 to 65535, or 0 for any that is free")
        if not self.loopback and not self.api_key:
            raise RequestError(f"host {self.host}: is open to the network; add an `api_key`, or serve on 127.0.0.1")
        if self.api_key is not None and len(self.api_key) < 8:
            raise RequestError(f"api_key of {len(self.api_key)} characters: give 8 or more")
        for option in ("models", "loras", "upscalers", "embeddings"):
            folder: Path | None = getattr(self, option)
            if folder is not None and not folder.is_dir():
                raise RequestError(f"{option} {folder}: is not a folder; give the one that the files are in")
        for amount in (self.vram, self.ram):
            if amount is not None:
                parse_bytes(amount)
        if not 1 <= self.idle_unload_seconds <= threading.TIMEOUT_MAX:
            raise RequestError(f"idle_unload {self.idle_unload_seconds:g}: give seconds, 1 or more")
        if self.keep_weights not in KEEP_WEIGHTS:
            raise RequestError(unknown("keep_weights", self.keep_weights, KEEP_WEIGHTS))
        if self.limits.waiting < 1:
            raise RequestError(f"waiting {self.limits.waiting}: give how many jobs may wait, 1 or more")
        if len(set(self.devices)) < len(self.devices) or not self.devices:
            raise RequestError(f"device {', '.join(self.devices)}: give each device once")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


@dataclass(frozen=True, slots=True)
class Offer:
    """A model, LoRA or upscaling network that a request may name."""

    name: str
    path: str
    """What the engine takes: a file, a folder, or the name of a shipped model or filter."""
    title: str
    """The name as A1111 shows it."""


class Library:
    """The models, LoRAs and upscaling networks that a server offers by name; threads may call all methods."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._lock = threading.Lock()
        self._default = _stem(settings.model)

    def models(self) -> list[Offer]:
        """The default model first, then the server's own, the shipped one and those of the folder."""
        own = self.settings.model
        paths = {_stem(own): own} | {name: name for name in NAMED_MODELS}
        for path in _listed(self.settings.models):
            if path.suffix in WEIGHTS or (path.is_dir() and is_model_folder(path)):
                paths.setdefault(path.stem if path.suffix in WEIGHTS else path.name, str(path))
        offers = [Offer(name, path, name if name == path else Path(path).name) for name, path in paths.items()]
        with self._lock:
            default = self._default
        return sorted(offers, key=lambda offer: offer.name != default)

    def default_model(self) -> Offer:
        """The model of requests that name none. ModelError where it is offered no more."""
        with self._lock:
            default = self._default
        return self._offered_model(default)

    def switch_model(self, name: str) -> None:
        """Make another model the default, until the server stops. ModelError, and no change, for one that cannot be used."""
        offer = self._offered_model(name)
        spec = load_spec(offer.path)
        if spec.missing:
            raise missing(spec.missing, spec.facts)
        with self._lock:
            self._default = offer.name

    def model(self, name: str | None) -> str:
        """What `hires.render(model=)` takes for a name, title or file name; None is the default model.

        ModelError lists what is offered.
        """
        return (self.default_model() if name is None else self._offered_model(name)).path

    def _offered_model(self, name: str) -> Offer:
        offers = self.models()
        for wanted in (name, name.split(" [")[0].strip()):  # A1111 shows "file.safetensors [hash]"
            for offer in offers:
                if wanted in (offer.name, offer.title):
                    return offer
        raise ModelError(unknown("model", name[:200], [offer.name for offer in offers]))

    def loras(self) -> list[Offer]:
        """The LoRAs of the folder."""
        return _offers(self.settings.loras)

    def lora(self, text: str) -> LoraRef:
        """The LoRA of 'style', 'style:0.8' or what else `parse_lora` reads. RequestError lists what is offered."""
        ref = parse_lora(text)
        for offer in self.loras():
            if ref.path in (offer.name, offer.title):
                return replace(ref, path=offer.path)
        raise RequestError(unknown("LoRA", ref.path[:200], [offer.name for offer in self.loras()]))

    def upscalers(self) -> list[Offer]:
        """Lanczos and Nearest, then the networks of the folder."""
        return [
            Offer("Lanczos", "lanczos", "Lanczos"),
            Offer("Nearest", "nearest", "Nearest"),
            *_offers(self.settings.upscalers),
        ]

    def upscaler(self, name: str | None) -> str:
        """'lanczos', 'nearest' or the file of a network. RequestError lists what is offered."""
        if name is None or name.lower() in ("", "none"):
            return "lanczos"
        for offer in self.upscalers():
            if name in (offer.name, offer.title) or name.lower() == offer.path:
                return offer.path
        raise RequestError(unknown("upscaler", name[:200], [offer.name for offer in self.upscalers()]))


def _listed(folder: Path | None) -> list[Path]:
    return [] if folder is None else sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _offers(folder: Path | None) -> list[Offer]:
    return [Offer(path.stem, str(path), path.name) for path in _listed(folder) if path.is_file() and path.suffix in WEIGHTS]


def _stem(model: str) -> str:
    path = Path(model)
    return path.stem if path.suffix in WEIGHTS else path.name
