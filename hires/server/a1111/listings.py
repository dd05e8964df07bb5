"""What A1111's clients list: samplers, models, upscalers, scripts, memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hires.checkpoints.headers import read_header
from hires.errors import ModelError
from hires.prompts.embeddings import find_embeddings
from hires.sampling.registry import SAMPLER_FACTS, SCHEDULE_FACTS
from hires.server.a1111 import scripts
from hires.server.a1111.documents import ModelDocument, UpscalerDocument
from hires.server.queue import JobQueue
from hires.server.settings import Offer

Listing = Mapping[str, object] | Sequence[object]


SAMPLERS_LISTED: list[dict[str, object]] = [
    {
        "name": facts.label,
        "aliases": [facts.name, *facts.aliases],
        "options": {} if facts.schedule is None else {"scheduler": facts.schedule},
    }
    for facts in SAMPLER_FACTS.values()
]
SCHEDULERS_LISTED: list[dict[str, object]] = [
    {
        "name": facts.name,
        "label": facts.label,
        "aliases": list(facts.aliases),
        "default_rho": 7.0 if facts.name == "karras" else -1.0,
        "need_inner_model": facts.table,
    }
    for facts in SCHEDULE_FACTS.values()
]


def listings(queue: JobQueue) -> dict[str, Callable[[], Listing]]:
    """The endpoint of each listing by its path. The functions' names are part of the API's operation ids."""
    library = queue.library

    def upscalers() -> list[Mapping[str, object]]:
        return [_upscaler("None", None), *(_upscaler(offer.name, offer.title) for offer in library.upscalers())]

    def sd_models() -> list[Mapping[str, object]]:
        return [_model(offer) for offer in library.models()]

    return {
        "samplers": lambda: SAMPLERS_LISTED,
        "schedulers": lambda: SCHEDULERS_LISTED,
        "upscalers": upscalers,
        "latent-upscale-modes": lambda: [{"name": "Latent"}],
        "sd-models": sd_models,
        "sd-vae": lambda: [],
        "loras": lambda: [_lora(offer) for offer in library.loras()],
        "hypernetworks": lambda: [],
        "face-restorers": lambda: [],
        "realesrgan-models": lambda: [],
        "prompt-styles": lambda: [],
        "embeddings": lambda: _embeddings(queue.settings.embeddings),
        "cmd-flags": lambda: {"api": True, "port": queue.settings.port, "listen": not queue.settings.loopback},
        "memory": _memory,
        "scripts": lambda: {"txt2img": [*scripts.ALWAYS_ON], "img2img": [scripts.ULTIMATE, *scripts.ALWAYS_ON]},
        "script-info": lambda: [_script(scripts.ULTIMATE, False), *(_script(name, True) for name in scripts.ALWAYS_ON)],
    }


def _embeddings(folder: Path | None) -> Mapping[str, object]:
    """The textual inversions that prompts may name; those whose file cannot be read are skipped."""
    loaded: dict[str, object] = {}
    skipped: dict[str, object] = {}
    for file in find_embeddings(folder).values():
        try:
            shapes = [shape for shape in read_header(file.path).shapes.values() if shape]
            rows, width = max((shape[0] if len(shape) > 1 else 1, shape[-1]) for shape in shapes)
        except (ModelError, ValueError):
            skipped[file.name] = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None, "shape": 0, "vectors": 0}
            continue
        loaded[file.name] = {
            "step": None,
            "sd_checkpoint": None,
            "sd_checkpoint_name": None,
            "shape": width,
            "vectors": rows,
        }
    return {"loaded": loaded, "skipped": skipped}


def _upscaler(name: str, title: str | None) -> UpscalerDocument:
    return {"name": name, "model_name": title, "model_path": None, "model_url": None, "scale": 4}


def _model(offer: Offer) -> ModelDocument:
    return {
        "title": offer.title,
        "model_name": offer.name,
        "hash": None,
        "sha256": None,
        "filename": offer.title,
        "config": None,
    }


def _lora(offer: Offer) -> dict[str, object]:
    return {"name": offer.name, "alias": offer.name, "path": offer.title, "metadata": {}}


def _script(name: str, always_on: bool) -> dict[str, object]:
    return {"name": name, "is_alwayson": always_on, "is_img2img": True, "args": []}


def _memory() -> Mapping[str, object]:
    import torch

    from hires.devices.machines import available_host_bytes
    from hires.devices.memory import peak_resident_bytes

    free, used = available_host_bytes(), peak_resident_bytes()
    ram = {"free": free, "used": used, "total": free + used}
    if not torch.cuda.is_available():
        return {"ram": ram, "cuda": {"error": "no CUDA device"}}
    free, total = torch.cuda.mem_get_info()
    system = {"free": free, "used": total - free, "total": total}
    allocated = {"current": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated()}
    return {"ram": ram, "cuda": {"system": system, "allocated": allocated}}
