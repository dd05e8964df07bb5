"""What overflows in half precision is evaluated again in float32; what is no number there either is an error."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from torch import nn

import hires
from hires.errors import NotFiniteError
from hires.kernels.single_precision import in_single
from hires.models.pixart import PixArtNetwork
from hires.models.precision import Guarded
from hires.models.unet import UNetNetwork
from hires.sampling.conditioning import Conditioning
from hires.tiling.denoise import tiled
from hires.tiling.geometry import Size, make_grid
from tests.models.test_attention_processors import unet
from tests.support import tiny_pixart


@pytest.mark.parametrize("model", ["unet", "pixart"])
def test_in_single_a_half_network_computes_in_float32(model: str) -> None:
    """Within its weights' rounding of the float32 network, far nearer than half precision gets; and the weights stay half."""
    if model == "unet":
        wide, x, cond = unet()
        other, _, _ = unet()
        half = UNetNetwork(other.unet.bfloat16(), torch.bfloat16)  # type: ignore[attr-defined]
        for a, b in zip(wide.unet.parameters(), half.unet.parameters(), strict=True):  # type: ignore[attr-defined]
            a.data = b.data.float()
    else:
        x, cond = tiny_pixart.latents(20, 24), tiny_pixart.prompt(5, 9, 1, Size(20, 24))
        made = [tiny_pixart.transformer(16, 0.5).bfloat16() for _ in range(2)]
        wide = PixArtNetwork(made[0].float(), span=32.0)
        half = PixArtNetwork(made[1], span=32.0)
    few = cond.to("cpu", torch.bfloat16)  # as a family hands its conditions over
    with torch.inference_mode():
        exact = wide(x, 100.0, few.to("cpu", torch.float32))
        rough = half(x, 100.0, few).float()
        with half.in_single():
            found = half(x, 100.0, few.to("cpu", torch.float32))  # as the guard hands them over
    scale = exact.abs().max()
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() <= 0.2 * (rough - exact).abs().max()
    assert (rough - exact).abs().max() > 1e-3 * scale
    module = half.unet if model == "unet" else half.transformer  # type: ignore[attr-defined]
    assert all(p.dtype == torch.bfloat16 for p in module.parameters())
    with torch.inference_mode():
        assert torch.equal(half(x, 100.0, few).float(), rough), "nothing of it stays"


class Overflowing:
    """A network in half precision whose values pass its range where the latents are large."""

    def __init__(self, broken: bool = False) -> None:
        self.layer, self.broken, self.calls, self.single = nn.Conv2d(4, 4, 1, bias=False).half(), broken, 0, False
        nn.init.dirac_(self.layer.weight)
        self.layer.weight.data *= 1000

    @contextmanager
    def in_single(self) -> Iterator[None]:
        self.single = True
        with in_single(self.layer):
            yield
        self.single = False

    def __call__(self, x: torch.Tensor, time: float, cond: object) -> torch.Tensor:
        self.calls += 1
        if self.broken:
            return torch.full_like(x, float("nan"))
        wide = x if self.single else x.half()
        return self.layer(wide) / 1000  # type: ignore[no-any-return]


def test_only_the_tile_that_overflows_is_done_again_and_counted() -> None:
    network, guard = Overflowing(), Guarded()
    x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    x[..., :8, :8] *= 100  # a thousand times this is past 65504
    cond = Conditioning(tokens=torch.zeros(1, 1, 1), canvas=Size(32, 32))
    watched = guard.of(network)
    fused = tiled(lambda x, sigma, c: watched(x, sigma, c), make_grid(Size(32, 32), Size(16, 16), 0), batch=2)(x, 0.5, cond)
    assert guard.redone == 1
    torch.testing.assert_close(fused, x, rtol=2e-3, atol=2e-3)
    assert network.calls == 3, "two batches, and one of them again"


def test_what_is_no_number_in_float32_either_names_the_tile() -> None:
    watched = Guarded().of(Overflowing(broken=True))
    cond = Conditioning(tokens=torch.zeros(1, 1, 1), canvas=Size(32, 32))
    grid = make_grid(Size(32, 32), Size(16, 16), 0)
    with pytest.raises(NotFiniteError, match=r"NaN or infinity at time 0\.5, tile at .*16.* in float32 too.*download it again"):
        tiled(lambda x, sigma, c: watched(x, sigma, c), grid)(torch.zeros(1, 4, 32, 32), 0.5, cond)


def test_a_layer_that_fails_gets_its_weights_back() -> None:
    layer = nn.Linear(3, 3).half()
    with pytest.raises(RuntimeError), in_single(layer):
        layer(torch.zeros(2, 5))
    assert all(p.dtype == torch.float16 for p in layer.parameters())


class Stream:
    def synchronize(self) -> None:
        pass


class Accelerator:
    """What diffusers asks of a card that copies on a stream, on a machine without one."""

    def __init__(self, device: torch.device) -> None:
        pass

    def stream(self, stream: Stream) -> AbstractContextManager[None]:
        return nullcontext()

    def current_stream(self) -> Stream:
        return Stream()


def test_weights_that_are_fetched_layer_by_layer_are_left_to_their_offload(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' group offloading knows parameters by identity and brings them when a layer's forward begins, not before."""
    from diffusers.hooks import group_offloading as offloading

    monkeypatch.setattr(offloading, "TorchDeviceBackend", Accelerator)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    layers = (nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 1))
    network = nn.Sequential(*layers).half().requires_grad_(False)
    x = torch.randn(1, 4, 6, 7, generator=torch.Generator().manual_seed(1))
    wide = copy.deepcopy(network).float()(x)
    here = torch.device("cpu")
    config = offloading.GroupOffloadingConfig(
        onload_device=here, offload_device=here, offload_type=offloading.GroupOffloadingType.LEAF_LEVEL, non_blocking=False,
        record_stream=True, low_cpu_mem_usage=False, stream=Stream(),
    )  # fmt: skip
    offloading._apply_group_offloading(network, config)
    with torch.inference_mode():
        rough = network(x.half())
        for _ in range(2):
            with in_single(network):
                torch.testing.assert_close(network(x), wide, rtol=1e-6, atol=1e-6)
            assert torch.equal(network(x.half()), rough)
    assert {p.dtype for p in network.parameters()} == {torch.float16}


def test_an_error_names_stage_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that is broken from its third evaluation on."""
    real, calls = UNetNetwork.__call__, 0

    def broken(network: UNetNetwork, x: torch.Tensor, time: float, cond: Conditioning) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return real(network, x, time, cond) * (float("nan") if calls > 2 else 1.0)

    monkeypatch.setattr(UNetNetwork, "__call__", broken)
    with pytest.raises(NotFiniteError, match=r"^stage base, step 3 of 4: .*download it again"):
        hires.render("a", size="256x256", steps=4, sampler="euler")
