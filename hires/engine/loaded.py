"""Models in memory between requests: which stay, which go, and what they are known by."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hires.checkpoints.adapters.loras import lora_files, tower_loras
from hires.checkpoints.file_states import Files, files_of, states
from hires.checkpoints.model import ModelSpec
from hires.devices.machines import available_host_bytes
from hires.devices.memory import resident_bytes
from hires.devices.probe import choose_device
from hires.engine.background import TurnLock
from hires.engine.job import RenderJob
from hires.errors import MemoryLadderError, RequestError
from hires.models.text_encoders import TextEncoders
from hires.options.lora import LoraRef
from hires.options.render import RenderRequest
from hires.pipelines import load
from hires.pipelines.base import Family, Runtime
from hires.pipelines.clock import Paces
from hires.planning.plan import MemoryPlan
from hires.prompts.script import Wording
from hires.resume.journal import NO_JOURNAL, Journal
from hires.sampling.conditioning import Conditioning
from hires.tiling.halo import HaloVAE
from hires.tiling.retry import attempt, empty_cache, free_memory
from hires.units import BYTES_PER_ELEMENT, parse_bytes

log = logging.getLogger(__name__)

CONDITIONS_KEPT = 64
"""Prompts, each with its negative one, whose conditions are kept."""
TEXT_COMPONENTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
HOST_SHARE = 0.5
"""The share of the free host memory that weights may take to stay there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyKey:
    """What networks in memory are known by, their LoRAs apart: another key is another load."""

    model: str
    """The model's path."""
    files: Files
    """Every file that they were read from."""
    shape: str
    """The network's shape, KV compression included."""
    device: str
    dtype: str
    vae_dtype: str
    offload: str
    weights: str | None
    """How they are packed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextKey:
    """What text encoders in memory are known by, their LoRAs apart."""

    model: str
    """The model's path."""
    files: Files
    dtype: str
    on_host: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """The LoRAs that weights in memory hold, and their files as they were read."""

    loras: tuple[LoraRef, ...] = ()
    files: Files = ()

    @classmethod
    def of(cls, loras: Sequence[LoraRef]) -> Merged:
        """These LoRAs as they are on disk now."""
        return cls(loras=tuple(loras), files=states(path for lora in loras for path in lora_files(lora)))

    @property
    def unchanged(self) -> bool:
        """Whether the files are on disk as they were read: only then is it known which weights they are in."""
        return self.files == Merged.of(self.loras).files


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """A request that is about to run, which needs a model."""

    job: RenderJob
    plan: MemoryPlan
    runtime: Runtime

    @property
    def on_cpu(self) -> bool:
        """Whether it runs on the CPU, where there is one memory."""
        return self.runtime.device.type == "cpu"


class LoadedModels:
    """The models of one device between requests, the least recently used one first to go.

    One request at a time, within `at_work`.

    Args:
        device: the torch device's name.
        stay: whether anything stays between requests; without, every request loads what it needs and lets it go.
    """

    def __init__(self, device: str = "cpu", stay: bool = True) -> None:
        self.device = device
        self.keep_weights = "auto" if stay else "no"
        """Where networks stay after a request: on the 'device', on the 'host', 'auto' for the device as long as the next plan
        leaves room and then the host, 'no' for nowhere."""
        self.lock = TurnLock()
        """Held by whoever runs a request, or lets models go."""
        self._busy = False
        self._viewing = threading.Lock()
        self._viewers: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()
        self._families: OrderedDict[FamilyKey, Family] = OrderedDict()
        self._merged: dict[FamilyKey | TextKey, Merged] = {}
        self._encoders: OrderedDict[TextKey, TextEncoders] = OrderedDict()
        self._tiny: tuple[Files, str, HaloVAE] | None = None
        self._conditions: OrderedDict[tuple[TextKey, Merged, tuple[Wording, ...]], list[Conditioning]] = OrderedDict()
        self.keys: tuple[FamilyKey, ...] = ()
        """The networks that stayed after the last request, the least recently used ones first."""
        self.names: tuple[str, ...] = ()
        """The models that they belong to."""
        self.weight_bytes = 0
        """Bytes of all weights that stayed after the last request, those of text encoders included."""
        self.weight_bytes_of: Counter[str] = Counter()
        """Those of each model, by its path."""
        self.device_bytes = 0
        """Those of them that are on the device: on a CPU all, on a card networks that are not offloaded."""
        self.paces: dict[str, Paces] = {}
        """How the last render of each model went beside its plan, by the model's name."""

    @contextmanager
    def at_work(self, keep_weights: str = "auto") -> Iterator[None]:
        """Wait for the turn of one request and hold it. RequestError inside another request of this thread."""
        with self.lock:
            if self._busy:
                raise RequestError(
                    "engine: a render cannot begin inside the `on_event` of another one; begin it when that one has ended"
                )
            self._busy, self.keep_weights = True, keep_weights
            try:
                yield
            finally:
                self._busy = False

    def view(self, viewer: object, model: str) -> None:
        """Register a user of the model at this path: it stays loaded when another user of it leaves."""
        with self._viewing:
            self._viewers[viewer] = model

    def leave(self, viewer: object) -> bool:
        """Remove a user; returns whether its model has no other user."""
        with self._viewing:
            model = self._viewers.pop(viewer, "")
            return model not in [*self._viewers.values()]

    def conditions(self, demand: Demand, journal: Journal) -> Sequence[Conditioning]:
        """The conditions of a job's texts, in the order of its script: from its journal, from memory, or encoded now."""
        texts = journal.texts()
        if texts is not None:
            return texts
        job, plan = demand.job, demand.plan
        prompts = texts_of(job.request, demand)
        following = [later for request in job.following if (later := readable_texts(request, demand))]
        key = TextKey(
            model=str(job.spec.path),
            files=files_of(job.spec, TEXT_COMPONENTS),
            dtype=plan.text_dtype,
            on_host=plan.text_on_host or demand.on_cpu,
        )
        merged = Merged.of(tower_loras(job.request.loras))
        texts = self._conditions.get((key, merged, prompts))
        if texts is None:
            texts = self._encode(key, merged, demand, [prompts, *following])
        else:
            self._conditions.move_to_end((key, merged, prompts))
        journal.keep_texts(texts)
        return texts

    def _encode(
        self, key: TextKey, merged: Merged, demand: Demand, wanted: Sequence[tuple[Wording, ...]]
    ) -> list[Conditioning]:
        """Encode the texts of requests, those of each by themselves as a fresh process would; the conditions of the first.

        All are kept, but not what encoders gave that ran out of memory and went on elsewhere: the next request tries again.
        """
        encoders = self._encoders_of(key, merged, demand, several=len(wanted) > 1)
        try:
            where, texts = encoders.device, {}
            for prompts in wanted:
                known = self._conditions.get((key, merged, prompts))
                texts[prompts] = load.encode(encoders, prompts) if known is None else known
            if encoders.device == where:
                self._conditions.update(((key, merged, prompts), each) for prompts, each in texts.items())
            else:
                self._encoders.pop(key, None)
        finally:
            if key in self._encoders:
                encoders.rest_on_host()
            del encoders
            empty_cache()
            self._count()
        while len(self._conditions) > max(CONDITIONS_KEPT, len(wanted)):
            self._conditions.popitem(last=False)
        return texts[wanted[0]]

    def _encoders_of(self, key: TextKey, merged: Merged, demand: Demand, several: bool) -> TextEncoders:
        """The text encoders with these LoRAs, from memory or to be loaded; kept where the host has room."""
        job, plan = demand.job, demand.plan
        size = job.spec.text_params * BYTES_PER_ELEMENT[plan.text_dtype]
        encoders, before = self._encoders.pop(key, None), self._merged.pop(key, merged)
        if encoders is not None and before != merged and not before.unchanged:
            encoders = None
        self._make_room(lambda: self._text_has_room(key, demand, 0 if encoders is not None else size))
        keep = encoders is not None
        if encoders is None:
            room = job.ram is None and size <= HOST_SHARE * available_host_bytes()
            keep = self.keep_weights != "no" and room
            encoders = load.load_encoders(job.spec, plan, demand.runtime.device, merged.loras, stay=keep or several)
        else:
            encoders.take_loras(merged.loras)
        if keep:
            self._encoders[key], self._merged[key] = encoders, merged
        return encoders

    def family(self, demand: Demand) -> Family:
        """The networks of a job, from memory or loaded now; others that leave no room go first."""
        try:
            return self._family(demand)
        finally:
            self._count()

    def _family(self, demand: Demand) -> Family:
        job, runtime = demand.job, demand.runtime
        key, merged = family_key(job.request, job.spec, runtime), Merged.of(job.request.loras)
        family, before = self._families.pop(key, None), self._merged.pop(key, merged)  # not among those that go
        if family is not None and before != merged and not (before.unchanged and load.can_remerge(family)):
            family = None
            free_memory()
        self._make_room(lambda: self._networks_have_room(key, demand, loading=family is None))
        if family is None:
            family = load.load_family(job.request, job.spec, runtime)
        else:
            family.weights.wake()
            if before != merged:
                load.remerge(family, before.loras, merged.loras)
        family.spec, family.tiny = job.spec, self._tiny_of(demand)  # the facts with these LoRAs
        self._families[key], self._merged[key] = family, merged
        return family

    def _tiny_of(self, demand: Demand) -> HaloVAE | None:
        """The small autoencoder of a request, the last one kept."""
        folder, runtime = demand.job.request.tiny_vae, demand.runtime
        if folder is None:
            return None
        files, dtype = states((Path(folder),)), runtime.decode.rung.dtype
        if self._tiny is None or self._tiny[:2] != (files, dtype):
            self._tiny = (files, dtype, load.load_tiny(folder, demand.job.spec, dtype, runtime.device))
        return self._tiny[2]

    def load(self, job: RenderJob, plan: MemoryPlan) -> None:
        """Load the networks of a job, and the text encoders where they stay. MemoryLadderError where they have no room."""
        demand = Demand(job=job, plan=plan, runtime=Runtime.of(job.request, plan, choose_device(job.device)))

        def load_all() -> Family:
            if job.ram is None:
                self.conditions(demand, NO_JOURNAL)
            return self.family(demand)

        try:
            family, reason = attempt(lambda _: load_all(), None)
            if family is None:
                raise MemoryLadderError(f"out of memory while loading {job.spec.name} ({reason}): close other programs")
            self.settle(family)
        finally:
            self._count()

    def _make_room(self, has_room: Callable[[], bool]) -> None:
        """Let networks go, the least recently used ones first, until there is room: to the host where they fit, or for good."""
        held = {key: _on_device(family) for key, family in self._families.items()}
        for on_device in (True, False):  # what is on the host makes room on the host alone
            for key in [key for key in held if held[key] == on_device]:
                if has_room():
                    return
                log.info("let %s go for another model", self._families[key].spec.name)
                if not (on_device and self._rest(self._families[key])):
                    self._drop(key)
                free_memory()

    def _rest(self, family: Family) -> bool:
        """Move networks from a card to the host where there is room; False where that is not to be, or saves nothing."""
        on_card = family.weights.device.type != "cpu" and family.weights.offload == "none" and not family.control
        free = available_host_bytes()
        if not on_card or self.keep_weights not in ("auto", "host") or family.weight_bytes > HOST_SHARE * free:
            return False
        pinned = family.weight_bytes <= HOST_SHARE * HOST_SHARE * free
        rested, reason = attempt(family.weights.rest, pinned)
        if not rested:
            log.warning("no room in host memory for %s (%s)", family.spec.name, reason)
        return bool(rested)

    def _drop(self, key: FamilyKey) -> None:
        del self._families[key]
        self._merged.pop(key, None)

    def _text_has_room(self, key: TextKey, demand: Demand, size: int) -> bool:
        """Whether text encoders of which `size` bytes are not in memory yet may run beside the networks in memory."""
        job, plan = demand.job, demand.plan
        if job.ram is not None and key.on_host:
            return resident_bytes() + size <= parse_bytes(str(job.ram))
        if demand.on_cpu:
            return size <= HOST_SHARE * available_host_bytes()
        peak = next((cost.peak_bytes for cost in plan.costs if cost.stage == "text"), size)
        return key.on_host or self._device_bytes() + peak <= plan.budget_bytes

    def _networks_have_room(self, key: FamilyKey, demand: Demand, loading: bool) -> bool:
        """Whether a job may run beside the other networks in memory; a plan knows of its own alone."""
        plan = demand.plan
        if demand.job.ram is not None:
            return not self._families
        if demand.on_cpu:
            size = 0
            if loading:  # a file may hold 8 or 4 bits of each value
                size = max(sum(file.size for file in key.files), plan.weight_bytes)
            return size <= HOST_SHARE * available_host_bytes() and size + plan.peak_bytes <= available_host_bytes()
        return self._device_bytes() + plan.peak_bytes <= plan.budget_bytes

    def _device_bytes(self) -> int:
        """Bytes of the networks that are on the device."""
        return sum(family.weight_bytes for family in self._families.values() if _on_device(family))

    def settle(self, family: Family) -> None:
        """After a request: what may not stay goes.

        Networks that went to a smaller place after an out-of-memory are loaded again for the next request.
        """
        key = next((key for key, held in self._families.items() if held is family), None)
        if key is not None and self.keep_weights == "no":
            self._forget(key.model)
        elif key is not None and family.weights.offload != key.offload:
            self._drop(key)
        elif key is not None and self.keep_weights == "host" and _on_device(family) and not self._rest(family):
            if family.weights.device.type != "cpu":
                self._drop(key)
        elif family.weights.offload != "none":  # the part that worked last is still on the device
            family.weights.rest(pinned=False)
        self._count()

    def unload(self, model: str | None = None) -> None:
        """Let everything go, or all of one model by its path."""
        if self._forget(model):
            free_memory()
        self._count()

    def _forget(self, model: str | None) -> bool:
        """Drop everything, or all of one model; whether anything was there."""
        families = [key for key in self._families if model in (None, key.model)]
        encoders = [key for key in self._encoders if model in (None, key.model)]
        for key in families:
            self._drop(key)
        for text in encoders:
            del self._encoders[text]
            self._merged.pop(text, None)
        for entry in [entry for entry in self._conditions if model in (None, entry[0].model)]:
            del self._conditions[entry]
        if model is None:
            self._tiny = None
        return bool(families or encoders)

    def _count(self) -> None:
        """Note what is in memory; other threads read the numbers while a request runs."""
        self.keys = tuple(self._families)
        self.names = tuple(family.spec.name for family in self._families.values())
        sizes: Counter[str] = Counter()
        for key, family in self._families.items():
            sizes[key.model] += family.weight_bytes
        for text, towers in self._encoders.items():
            sizes[text.model] += towers.weight_bytes
        self.weight_bytes_of, self.weight_bytes = sizes, sizes.total()
        encoders = sum(encoders.weight_bytes for encoders in self._encoders.values())
        self.device_bytes = self._device_bytes() + (encoders if self.device == "cpu" else 0)


_devices: weakref.WeakValueDictionary[str, LoadedModels] = weakref.WeakValueDictionary()
_finding = threading.Lock()


def models_on(device: str) -> LoadedModels:
    """The models of a device of this process, shared by all who hold them; gone with the last of these."""
    with _finding:
        models = _devices.get(device)
        if models is None:
            models = _devices[device] = LoadedModels(device)
        return models


def texts_of(request: RenderRequest, demand: Demand) -> tuple[Wording, ...]:
    """The texts of a request on a demand's model. RequestError for a prompt that cannot be read."""
    return load.prompted_by(request, demand.job.spec, demand.plan).script.texts


def readable_texts(request: RenderRequest, demand: Demand) -> tuple[Wording, ...]:
    """The texts of a later request; none of one that fails, which is told in its own turn."""
    try:
        return texts_of(request, demand)
    except RequestError:
        return ()


def _on_device(family: Family) -> bool:
    """Whether a family's networks are on its device between requests."""
    return family.weights.offload == "none" and not family.weights.resting


def family_key(request: RenderRequest, spec: ModelSpec, runtime: Runtime) -> FamilyKey:
    """The key of the networks that a request runs on."""
    return FamilyKey(
        model=str(spec.path),
        files=files_of(spec, ("network", "vae")),
        shape=repr(spec.network),
        device=str(runtime.device),
        dtype=runtime.dtype,
        vae_dtype=runtime.decode.rung.dtype,
        offload=runtime.offload,
        weights=runtime.weights,
    )
