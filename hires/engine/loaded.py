"""Models in memory between requests: which stay, which go, and what they are known by."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hires.checkpoints.spec import ModelSpec
from hires.devices.machines import available_host_bytes
from hires.devices.memory import resident_bytes
from hires.devices.probe import choose_device
from hires.engine.job import RenderJob
from hires.errors import MemoryLadderError
from hires.models.text_encoders import TextEncoders
from hires.options.render import RenderRequest
from hires.pipelines import load
from hires.pipelines.base import Family, Runtime
from hires.planning.plan import MemoryPlan
from hires.resume.journal import NO_JOURNAL, Journal
from hires.sampling.conditioning import Conditioning
from hires.tiling.retry import attempt, free_memory
from hires.units import BYTES_PER_ELEMENT, parse_bytes

log = logging.getLogger(__name__)

CONDITIONS_KEPT = 64
"""Prompts, each with its negative one, whose conditions are kept."""
TEXT_COMPONENTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
HOST_SHARE = 0.5
"""The share of the free host memory that text encoders may take to stay."""

Files = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyKey:
    """What networks in memory are known by: another key is another load."""

    files: Files
    """Path, bytes and time of change of every file they were read from."""
    shape: str
    """The network's shape, KV compression included."""
    loras: tuple[tuple[str, float], ...]
    device: str
    dtype: str
    vae_dtype: str
    offload: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TextKey:
    """What text encoders in memory are known by."""

    files: Files
    loras: tuple[tuple[str, float], ...]
    dtype: str
    on_host: bool


class LoadedModels:
    """The models of one device between requests, the least recently used one first to go.

    Not for several threads at once: an `Engine` and a server's worker run one request at a time.

    Args:
        stay: whether anything stays between requests; without, every request loads what it needs and lets it go.
    """

    def __init__(self, stay: bool = True) -> None:
        self.stay = stay
        self._families: OrderedDict[FamilyKey, Family] = OrderedDict()
        self._encoders: OrderedDict[TextKey, TextEncoders] = OrderedDict()
        self._conditions: OrderedDict[tuple[TextKey, tuple[str, ...]], list[Conditioning]] = OrderedDict()
        self.keys: tuple[FamilyKey, ...] = ()
        """The networks that stayed after the last request, the least recently used ones first."""
        self.names: tuple[str, ...] = ()
        """The models that they belong to."""
        self.weight_bytes = 0
        """Bytes of all weights that stayed after the last request, those of text encoders included."""
        self.device_bytes = 0
        """Those of them that are on the device: on a CPU all, on a card networks that are not offloaded."""

    def conditions(self, job: RenderJob, plan: MemoryPlan, runtime: Runtime, journal: Journal) -> Sequence[Conditioning]:
        """The conditions of a job's prompt and negative prompt: from its journal, from memory, or encoded now."""
        texts = journal.texts()
        if texts is not None:
            return texts
        request = job.request
        prompts, *following = ((prompt, request.negative) for prompt in (request.prompt, *job.following))
        key = TextKey(
            files=files_of(job.spec, TEXT_COMPONENTS, [Path(lora.path) for lora in request.loras]),
            loras=tuple((lora.path, lora.scale) for lora in request.loras),
            dtype=plan.text_dtype,
            on_host=plan.text_on_host or runtime.device.type == "cpu",
        )
        texts = self._conditions.get((key, prompts))
        if texts is None:
            self._encode(key, job, plan, runtime, [prompts, *following])
            texts = self._conditions[key, prompts]
        self._conditions.move_to_end((key, prompts))
        journal.keep_texts(texts)
        return texts

    def _encode(
        self, key: TextKey, job: RenderJob, plan: MemoryPlan, runtime: Runtime, wanted: Sequence[tuple[str, ...]]
    ) -> None:
        """Encode pairs of a prompt and a negative prompt, each by itself as a fresh process would, and keep the conditions."""
        encoders = self._encoders.get(key)
        if encoders is None:
            size = job.spec.text_params * BYTES_PER_ELEMENT[plan.text_dtype]
            self._make_room(lambda: self._text_has_room(key, job, plan, runtime, size))
            keep = self.stay and key.on_host and job.ram is None and size <= HOST_SHARE * available_host_bytes()
            encoders = load.load_encoders(job.spec, plan, runtime.device, job.request.loras, stay=keep or len(wanted) > 1)
            if keep:
                self._encoders[key] = encoders
        for prompts in wanted:
            if (key, prompts) not in self._conditions:
                self._conditions[key, prompts] = load.encode(encoders, prompts)
        while len(self._conditions) > max(CONDITIONS_KEPT, len(wanted)):
            self._conditions.popitem(last=False)
        del encoders
        if runtime.device.type != "cpu":
            free_memory()

    def family(self, job: RenderJob, plan: MemoryPlan, runtime: Runtime) -> Family:
        """The networks of a job, from memory or loaded now; others that leave no room go first."""
        key = family_key(job.request, job.spec, runtime)
        family = self._families.pop(key, None)  # so that it is not among those that go
        self._make_room(lambda: self._networks_have_room(key, job, plan, runtime, loading=family is None))
        if family is None:
            family = load.load_family(job.request, job.spec, runtime)
        self._families[key] = family
        return family

    def load(self, job: RenderJob, plan: MemoryPlan) -> None:
        """Load the networks of a job, and the text encoders where they stay. MemoryLadderError where they have no room."""
        runtime = Runtime.of(job.request, plan, choose_device(job.device))

        def load_all() -> Family:
            if job.ram is None and (plan.text_on_host or runtime.device.type == "cpu"):
                self.conditions(job, plan, runtime, NO_JOURNAL)
            return self.family(job, plan, runtime)

        try:
            family, reason = attempt(lambda _: load_all(), None)
            if family is None:
                raise MemoryLadderError(f"out of memory while loading {job.spec.name} ({reason}): close other programs")
            self.settle(family)
        finally:
            self._count()

    def _make_room(self, has_room: Callable[[], bool]) -> None:
        """Let go of networks, the least recently used ones first, until there is room."""
        while self._families and not has_room():
            _, family = self._families.popitem(last=False)
            log.info("let %s go for another model", family.spec.name)
            del family
            free_memory()

    def _text_has_room(self, key: TextKey, job: RenderJob, plan: MemoryPlan, runtime: Runtime, size: int) -> bool:
        """Whether text encoders of `size` bytes may be loaded beside the networks in memory."""
        if job.ram is not None and key.on_host:
            return resident_bytes() + size <= parse_bytes(str(job.ram))
        if runtime.device.type == "cpu":
            return size <= HOST_SHARE * available_host_bytes()
        peak = next((cost.peak_bytes for cost in plan.costs if cost.stage == "text"), size)
        return key.on_host or self._device_bytes() + peak <= plan.budget_bytes

    def _networks_have_room(self, key: FamilyKey, job: RenderJob, plan: MemoryPlan, runtime: Runtime, loading: bool) -> bool:
        """Whether a job may run beside the other networks in memory; a plan knows of its own alone."""
        if job.ram is not None:
            return not self._families
        if runtime.device.type == "cpu":
            return not loading or sum(size for _, size, _ in key.files) <= HOST_SHARE * available_host_bytes()
        return self._device_bytes() + plan.peak_bytes <= plan.budget_bytes

    def _device_bytes(self) -> int:
        """Bytes of the networks that are on the device."""
        return sum(family.weight_bytes for family in self._families.values() if family.weights.offload == "none")

    def settle(self, family: Family) -> None:
        """After a request: what may not stay goes.

        Networks that went to a smaller place after an out-of-memory are loaded again for the next request.
        """
        for key, held in [*self._families.items()]:
            if not self.stay or (held is family and held.weights.offload != key.offload):
                del self._families[key]
        if not self.stay:
            self._encoders.clear()
            self._conditions.clear()
        self._count()

    def unload(self) -> None:
        """Let everything go."""
        if not (self._families or self._encoders or self._conditions):
            return
        self._families.clear()
        self._encoders.clear()
        self._conditions.clear()
        self._count()
        free_memory()

    def _count(self) -> None:
        """Note what is in memory; other threads read the numbers while a request runs."""
        self.keys = tuple(self._families)
        self.names = tuple(family.spec.name for family in self._families.values())
        encoders = sum(encoders.weight_bytes for encoders in self._encoders.values())
        self.weight_bytes = sum(family.weight_bytes for family in self._families.values()) + encoders
        on_host = all(family.weights.device.type == "cpu" for family in self._families.values())
        self.device_bytes = self._device_bytes() + (encoders if on_host else 0)


def family_key(request: RenderRequest, spec: ModelSpec, runtime: Runtime) -> FamilyKey:
    """The key of the networks that a request runs on."""
    beside = [Path(path) for path in (request.tiny_vae, *(lora.path for lora in request.loras)) if path is not None]
    return FamilyKey(
        files=files_of(spec, ("network", "vae"), beside),
        shape=repr(spec.network),
        loras=tuple((lora.path, lora.scale) for lora in request.loras),
        device=str(runtime.device),
        dtype=runtime.dtype,
        vae_dtype=runtime.decode.rung.dtype,
        offload=runtime.offload,
    )


def files_of(spec: ModelSpec, components: Sequence[str], beside: Sequence[Path]) -> Files:
    """The files of a model's components and others, each with its size and the time of its last change."""
    paths = [part.path for name in components if (part := spec.parts.get(name)) is not None and part.path is not None]
    found = {}
    for path in (*paths, *(extra.expanduser() for extra in beside)):
        for file in sorted(path.rglob("*")) if path.is_dir() else (path,):
            if file.is_file():
                state = file.stat()
                found[str(file)] = (state.st_size, state.st_mtime_ns)
    return tuple((name, *state) for name, state in found.items())
