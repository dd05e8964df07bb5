"""Bytes of packed weights: full-size models, plans, budgets of the host."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.full_size import full_spec
from hires.checkpoints.containers.layers import count_layers
from hires.checkpoints.families import VAE_COUNT
from hires.checkpoints.model import ModelSpec
from hires.devices.machines import described_card, host_device
from hires.options.declarations import WEIGHTS
from hires.options.render import RenderRequest
from hires.planning.costs.weights import storage_of, stored_bytes
from hires.planning.planner import plan
from hires.tiling.geometry import Size
from hires.units import parse_bytes
from tests.models.test_loading import full_size

SIDE = Size(1024, 1024)


def asked(**options: object) -> RenderRequest:
    return RenderRequest(prompt="", size=SIDE, **options)  # type: ignore[arg-type]


def test_counts_of_full_size_are_those_of_their_modules() -> None:
    cosxl = count_layers((name, tuple(value.shape)) for name, value in full_size("sdxl/unet").state_dict().items())
    assert cosxl == full_spec("cosxl").network_count
    vae = count_layers((name, tuple(value.shape)) for name, value in full_size("sdxl/vae").state_dict().items())
    assert vae == VAE_COUNT


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_full_size_cosxl_has_room_in_less_than_3_gb(weights: str) -> None:
    spec = full_spec("cosxl")
    network = stored_bytes(spec.network_count, storage_of(weights, "network"), 2)
    both = network + stored_bytes(spec.vae_count, storage_of(weights, "vae"), 2)
    assert both <= (1.5e9 if weights == "nf4" else 2.7e9) < 2.9e9
    made = plan(asked(weights=weights), spec, described_card(parse_bytes("8GB")))
    assert made.weights == weights and made.weight_bytes == both and made.offload == "none"
    plain = plan(asked(), spec, described_card(parse_bytes("8GB")))
    assert made.peak_bytes < plain.peak_bytes or plain.offload != "none"
    assert plain.weights is None and plain.weight_bytes == 2 * (spec.network_params + spec.vae_params)
    (note,) = [note for note in made.notes if note.startswith("approximation")]
    assert note.endswith("as asked for") and "VAE in 8 bits (int8)" in note
    assert made.to_json()["weights"] == weights


def test_a_host_without_room_takes_packed_weights_where_another_picture_is_allowed() -> None:
    spec = full_spec("cosxl")
    host = replace(host_device(parse_bytes("6GiB")), ram_bytes=parse_bytes("9GB"))
    made = plan(asked(allow_approximate=True), spec, host)
    assert made.weights == "int8"
    assert any("`allow_approximate` was given" in note for note in made.notes)


def test_the_shipped_model_is_counted(demo: ModelSpec) -> None:
    assert demo.network_count.values == demo.network_params and demo.vae_count.values == demo.vae_params
    assert 0.97 < demo.network_count.packable / demo.network_params < 1
