"""What stays in memory between requests, and what goes: on a card by stand-ins, that note when they are moved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import hires
from hires.engine.loaded import LoadedModels, Merged
from hires.errors import ModelError
from hires.options.lora import LoraRef
from hires.pipelines import load as loading

SMALL: dict[str, Any] = {"size": "96x64", "steps": 1}


@pytest.mark.parametrize(("budget", "stays"), [(100, ("a", "b")), (70, ("b",)), (50, ())])
def test_on_a_card_others_stay_while_the_plan_fits_beside_them(budget: int, stays: tuple[str, ...]) -> None:
    """Two networks of 20 bytes and 30, and a plan that takes 40: the least recently used one goes first."""
    models = LoadedModels("cuda")
    models.keep_weights = "device"
    for name, size in (("a", 20), ("b", 30)):
        key: Any = SimpleKey(name)
        models._families[key] = networks(name, size)
    demand: Any = demanded(budget)
    text: Any = SimpleNamespace(on_host=True)
    assert models._text_has_room(text, demand, 10**15), "encoders in host memory take nothing from the card"
    models._make_room(lambda: models._networks_have_room(key, demand, loading=True))
    models._count()
    assert models.names == stays and models.device_bytes == models.weight_bytes


@dataclass(frozen=True)
class SimpleKey:
    model: str
    files: tuple[Any, ...] = ()
    offload: str = "none"


def networks(name: str, size: int, offload: str = "none") -> Any:
    """Networks on a card, whose weights note when they are moved."""
    weights = SimpleNamespace(offload=offload, device=torch.device("cuda"), resting=False)
    weights.rest = lambda pinned: vars(weights).update(resting=True) or True
    weights.wake = lambda: setattr(weights, "resting", False)
    return SimpleNamespace(spec=SimpleNamespace(name=name, path=name), weight_bytes=size, weights=weights, control=())


def demanded(budget: int) -> Any:
    job, plan = SimpleNamespace(ram=None), SimpleNamespace(peak_bytes=40, budget_bytes=budget, costs=())
    return SimpleNamespace(job=job, plan=plan, on_cpu=False)


@pytest.mark.parametrize(("keep", "free", "rests"), [("auto", 1000, ("a", "b")), ("auto", 10, ()), ("device", 1000, ())])
def test_what_leaves_a_card_rests_on_the_host_where_that_has_room(
    keep: str, free: int, rests: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hires.engine.loaded.available_host_bytes", lambda: free)
    models = LoadedModels("cuda")
    models.keep_weights = keep
    for name, size in (("a", 20), ("b", 30)):
        key: Any = SimpleKey(name)
        models._families[key] = networks(name, size)
    models._make_room(lambda: models._networks_have_room(key, demanded(50), loading=True))
    models._count()
    assert models.names == rests and models.device_bytes == 0, "the plan and either of the two exceed the budget"
    assert all(family.weights.resting for family in models._families.values())


def test_weights_on_the_host_between_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    models, family, key = LoadedModels("cuda"), networks("a", 20), SimpleKey("a")
    models._families[key] = family  # type: ignore[index]
    for keep, resting in (("auto", False), ("host", True)):
        models.keep_weights = keep
        models.settle(family)
        assert family.weights.resting == resting and models.names == ("a",)
    models.keep_weights = "no"
    models.settle(family)
    assert models.names == ()


def test_what_is_on_the_host_makes_no_room_on_a_card() -> None:
    models = LoadedModels("cuda")
    for name, offload in (("a", "layers"), ("b", "none")):
        key: Any = SimpleKey(name)
        models._families[key] = networks(name, 30, offload)
    models._make_room(lambda: models._networks_have_room(key, demanded(50), loading=True))
    assert len(models._families) == 2 and models._families[key].weights.resting, "the one on the card rests, the other stays"


def test_encoders_on_the_host_are_no_bytes_of_a_card() -> None:
    for device, held in (("cuda", 0), ("cpu", 50)):
        models = LoadedModels(device)
        key: Any = SimpleKey("a")
        models._encoders[key] = SimpleNamespace(weight_bytes=50)  # type: ignore[assignment]
        models._count()
        assert (models.weight_bytes, models.device_bytes) == (50, held)


def test_on_a_cpu_others_go_where_the_plan_has_no_room_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hires.engine.loaded.available_host_bytes", lambda: 50)
    models, key, demand = LoadedModels(), SimpleKey("a"), demanded(50)
    demand.on_cpu = True
    assert models._networks_have_room(key, demand, loading=False)  # type: ignore[arg-type]
    demand.plan.peak_bytes = 60
    assert not models._networks_have_room(key, demand, loading=False)  # type: ignore[arg-type]


def test_what_keeps_nothing_lets_nothing_of_others_go(eps_folder: Path) -> None:
    with hires.load() as kept, hires.load(str(eps_folder), keep_weights="no") as passing:
        kept.render("a hill", **SMALL)
        passing.render("a hill", **SMALL)
        assert kept.loaded == passing.loaded == ("demo",)


def test_a_merge_that_fails_leaves_true_counts(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.safetensors"
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{name}.lora_A.weight": torch.ones(2, 3), f"{name}.lora_B.weight": torch.ones(3, 2)}, wrong)
    with hires.load() as plain, hires.load(loras=[str(wrong)]) as broken:
        plain.render("a hill", **SMALL)
        with pytest.raises(ModelError, match="do not fit a weight"):
            broken.render("a hill", **SMALL)
        assert plain.loaded == () and plain._models is not None and plain._models.weight_bytes_of.total() < 10**7
        plain.render("a hill", **SMALL)
        assert plain.loaded == ("demo",)


def test_encoders_that_ran_out_of_memory_are_tried_again_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    real, places = loading.encode, list[str]()

    def fails_once(encoders: Any, prompts: Any) -> Any:
        if not places:
            encoders.device = torch.device("cpu", 0)  # as if the card had no room
        places.append(str(encoders.device))
        return real(encoders, prompts)

    monkeypatch.setattr(loading, "encode", fails_once)
    with hires.load() as engine:
        for _ in range(3):
            engine.render("a hill", **SMALL)
    assert places == ["cpu:0", "cpu"], "the second request encodes anew, the third finds its conditions"


def test_the_alpha_beside_a_lora_is_part_of_it(tmp_path: Path) -> None:
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file({"unet.x.lora_A.weight": torch.ones(1, 1)}, file)
    config.write_text('{"lora_alpha": 1}')
    merged = Merged.of([LoraRef(str(file), 1.0)])
    assert merged.unchanged and merged == Merged.of([LoraRef(str(file), 1.0)])
    config.write_text('{"lora_alpha": 30}')
    assert not merged.unchanged and merged != Merged.of([LoraRef(str(file), 1.0)])
