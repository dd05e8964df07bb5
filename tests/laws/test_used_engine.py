"""A used engine draws what a fresh process draws, bit for bit, for every kind of model (law 10)."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import hires
from hires.checkpoints.spec import load_spec
from hires.errors import Cancelled, MemoryLadderError, NotFiniteError
from hires.events import Event
from hires.models.loading import network_state
from hires.models.text_encoders import TextEncoders
from hires.pipelines import load as loading
from tests.laws.test_faults import Faults
from tests.support.checkpoints import Checkpoint

Get = Callable[[str, str], Checkpoint]
FAMILIES = [
    "pixart-sigma-256",
    *(
        pytest.param(name, marks=pytest.mark.slow) for name in ("demo", "cosxl", "cosxl-edit", "sd15")
    ),  # tests/engine has parts of it
]
PROMPTS = ("a red sun", "a pale moon over a lake", "a hill")
SAMPLERS = ("euler", "dpmpp_2m", "heun", "euler_ancestral")
SIZES = ("96x64", "64x128", "64x64")
TOWERS = {"demo": 2, "cosxl": 2, "cosxl-edit": 2, "sd15": 1, "pixart-sigma-256": 1}


class Drawing:
    """A model with LoRA scales, drawn by an engine or by a fresh load."""

    def __init__(self, family: str, checkpoint: Get, folder: Path) -> None:
        made = None if family == "demo" else checkpoint(family, "folder")
        self.model = "demo" if made is None else str(made.path)
        self.parts = None if made is None else made.parts
        self.edits, self.lora = family == "cosxl-edit", folder / "style.safetensors"
        prefix = "transformer" if family.startswith("pixart") else "unet"
        save_lora(self.lora, network_state(load_spec(self.model, parts=self.parts)), prefix)

    def loras(self, scale: float) -> tuple[str, ...]:
        return (f"{self.lora}:{scale}",) if scale else ()

    def engine(self, scale: float) -> hires.Engine:
        return hires.load(self.model, parts=self.parts, device="cpu", vram="2GB", loras=self.loras(scale))

    def drawn(self, engine: hires.Engine, index: int, on_event: Any = None) -> Any:
        options: dict[str, Any] = {"size": SIZES[index % 3], "seed": index, "steps": 2, "on_event": on_event}
        options["sampler"], prompt = SAMPLERS[index % 4], PROMPTS[index % 3]
        if self.edits:
            return engine.edit(np.full((64, 96, 3), 60 + 20 * index, np.uint8), prompt, **options).pixels
        return engine.render(prompt, **options).pixels


def save_lora(path: Path, weights: dict[str, torch.Tensor], prefix: str) -> None:
    generator, state = torch.Generator().manual_seed(0), dict[str, torch.Tensor]()
    for name in [name for name in weights if name.endswith(("attn1.to_q.weight", "attn2.to_k.weight"))]:
        rows, cols = weights[name].shape
        state[f"{prefix}.{name.removesuffix('.weight')}.lora_A.weight"] = torch.randn(2, cols, generator=generator)
        state[f"{prefix}.{name.removesuffix('.weight')}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    save_file(state, path)


def disturb(drawing: Drawing, engine: hires.Engine, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancel, run out of memory at a random operator, or lose all numbers, in turn."""

    def stop(event: Event) -> None:
        if event.step == 1:
            raise Cancelled("stop")

    if index % 3 == 0:
        with pytest.raises(Cancelled):
            drawing.drawn(engine, index, stop)
    elif index % 3 == 1:
        with Faults(set()) as counted:
            drawing.drawn(engine, index)
        with Faults({random.Random(index).randrange(1, counted.calls)}) as faults, contextlib.suppress(MemoryLadderError):
            drawing.drawn(engine, index)
        assert faults.raised, "the fault happened"
    else:
        with monkeypatch.context() as disturbed:
            disturbed.setattr("hires.models.precision.finite_pictures", lambda x: torch.zeros(len(x), dtype=torch.bool))
            with pytest.raises(NotFiniteError):
                drawing.drawn(engine, index)


def counted_loads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    counts: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def load(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return real(*args, **options)

        monkeypatch.setattr(owner, name, load)

    for owner, name in ((loading, "load_network"), (loading, "load_vae"), (TextEncoders, "_load")):
        count(owner, name)
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_pictures_of_a_used_engine(family: str, checkpoint: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawing, scales = Drawing(family, checkpoint, tmp_path), (0.0, 0.5, 1.0, 0.5, 0.0, -1.0, 0.25, 0.0)
    fresh = []
    for index, scale in enumerate(scales):
        with drawing.engine(scale) as engine:
            fresh.append(drawing.drawn(engine, index))
    loads, used = counted_loads(monkeypatch), []
    with contextlib.ExitStack() as stack:
        for index, scale in enumerate(scales):
            engine = stack.enter_context(drawing.engine(scale))  # views of one model on one device
            used.append(drawing.drawn(engine, index))
            disturb(drawing, engine, index, monkeypatch)
    assert [index for index in range(8) if not np.array_equal(used[index], fresh[index])] == []
    assert loads == {"load_network": 1, "load_vae": 1, "_load": TOWERS[family]}
