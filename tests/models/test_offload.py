"""Where weights are: each part comes when it works and goes when it does not, and a layer at a time gives the same picture."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hires.models.offload import Weights, stream
from hires.models.pixart import PixArtNetwork
from tests.models.test_attention_processors import unet
from tests.support import tiny_pixart

META = torch.device("meta")  # another device than the CPU that is always here; what moves there is lost, and seen to have moved


def places(weights: Weights) -> dict[str, str]:
    return {name: next(module.parameters()).device.type for name, module in weights.parts.items()}


def test_parts_take_turns_where_the_two_are_not_to_meet() -> None:
    weights = Weights(nn.Linear(2, 2), nn.Conv2d(1, 1, 1, device="meta"), META, "components")
    weights.parts["vae"] = nn.Conv2d(1, 1, 1)
    weights.ready("network")
    assert places(weights) == {"network": "meta", "vae": "cpu"}
    weights.parts["network"] = nn.Linear(2, 2)
    weights.ready("vae")
    assert places(weights) == {"network": "cpu", "vae": "meta"}


@pytest.mark.parametrize(("offload", "at_work"), [("none", "meta"), ("components", "cpu"), ("layers", "cpu")])
def test_weights_rest_on_the_host_and_come_back_where_they_stay(
    offload: str, at_work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hires.models.offload.stream", lambda module, device: None)
    weights = Weights(nn.Linear(2, 2), nn.Conv2d(1, 1, 1), META, offload)
    weights.rest(pinned=False)
    assert places(weights) == {"network": "cpu", "vae": "cpu"} and weights.resting
    weights.wake()
    assert places(weights) == {"network": at_work, "vae": at_work} and not weights.resting
    weights.parts |= {"network": nn.Linear(2, 2), "vae": nn.Conv2d(1, 1, 1)}
    weights.ready("vae")
    weights.parts["vae"] = nn.Conv2d(1, 1, 1)
    weights.wake()
    assert places(weights) == {"network": "cpu", "vae": "cpu"}, "what did not rest is left alone"


def test_weights_that_cannot_be_pinned_rest_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: limit of locked memory")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    weights = Weights(nn.Linear(2, 2), nn.Conv2d(1, 1, 1), META)
    assert weights.rest(pinned=True) and weights.resting and "not pinned (CUDA error" in caplog.text
    assert places(weights) == {"network": "cpu", "vae": "cpu"}


def test_weights_that_stay_are_left_alone() -> None:
    weights = Weights(nn.Linear(2, 2), nn.Conv2d(1, 1, 1), torch.device("cpu"))
    for part in ("network", "vae"):
        weights.ready(part)
        assert places(weights) == {"network": "cpu", "vae": "cpu"}
    assert weights.relieve() is None, "a CPU has no other place"


def test_relief_goes_on_to_the_next_place_until_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    streamed: list[nn.Module] = []
    monkeypatch.setattr("hires.models.offload.stream", lambda module, device: streamed.append(module))
    network = nn.Linear(2, 2)
    weights = Weights(network, nn.Conv2d(1, 1, 1), META)
    assert weights.relieve() == "weights of one part at a time on the device"
    weights.parts["network"] = other = nn.Linear(2, 2)
    assert weights.relieve() == "weights in host memory, fetched layer by layer"
    assert streamed == [other]
    assert weights.relieve() is None
    assert Weights(network, network, torch.device("cpu"), "none").offload == "none"


@pytest.mark.parametrize("model", ["unet", "pixart"])
def test_layer_by_layer_the_result_is_the_same(model: str) -> None:
    """The hooks of diffusers around every layer of our networks, processors and positions in place."""
    if model == "unet":
        network, x, cond = unet()
        module = network.unet  # type: ignore[attr-defined]
    else:
        module = tiny_pixart.transformer(16, 0.5)
        network = PixArtNetwork(module, span=32.0)
        x, cond = tiny_pixart.latents(20, 24), tiny_pixart.prompt(5, 9, 1, tiny_pixart.Size(20, 24))
    with torch.inference_mode():
        before = network(x, 100.0, cond)
    state = copy.deepcopy(module.state_dict())
    stream(module, torch.device("cpu"))
    with torch.inference_mode():
        assert torch.equal(network(x, 100.0, cond), before)
        assert torch.equal(network(x, 100.0, cond), before)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
