"""PixArt's ControlNet: a checkpoint in its published layout, loaded, run, and held against a forward written out here."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

import hires
from hires.checkpoints.model import ModelSpec
from hires.checkpoints.spec import load_spec
from hires.errors import ModelError, RequestError
from hires.models.adapters.controlnet import load_control
from hires.models.loading import Home, load_network
from hires.models.pixart import PixArtNetwork
from hires.planning.costs.flops import pixart_flops
from hires.sampling.conditioning import Conditioning
from hires.tiling.geometry import Box, Size
from tests.support import checkpoints
from tests.support.original_names import pixart_to_pth

CPU = torch.device("cpu")
COPIES = 2


class Made:
    """A base of four blocks and two copies, as modules and as a file."""

    def __init__(self, folder: Path, *, zero: bool = False, family: str = "pixart-alpha-512") -> None:
        small = checkpoints.make(folder, family)
        torch.manual_seed(1)
        config = dict(small.network.config) | {"num_layers": 4}
        self.base: Any = PixArtTransformer2DModel.from_config(config).eval().requires_grad_(False)
        for parameter in self.base.parameters():
            nn.init.normal_(parameter, 0, 0.2)
        width = self.base.config.cross_attention_dim
        self.before = nn.Linear(width, width)
        self.copies = [copy.deepcopy(self.base.transformer_blocks[i]) for i in range(COPIES)]
        self.after = [nn.Linear(width, width) for _ in range(COPIES)]
        for module in (*self.copies, self.before, *self.after):
            for parameter in module.requires_grad_(False).parameters():
                nn.init.zeros_(parameter) if zero and module in self.after else nn.init.normal_(parameter, 0, 0.2)
        self.path, self.parts = folder / "controlled.pth", small.parts
        torch.save({"state_dict": self.state(family)}, self.path)

    def state(self, family: str) -> dict[str, Tensor]:
        state = {f"base_model.{key}": value for key, value in pixart_to_pth(self.base, family).items()}
        holder = copy.deepcopy(self.base)
        for index, block in enumerate(self.copies):
            holder.transformer_blocks[0] = block
            for key, value in pixart_to_pth(holder, family).items():
                if key.startswith("blocks.0."):
                    state[f"controlnet.{index}.copied_block.{key.removeprefix('blocks.0.')}"] = value
            for key, value in self.after[index].state_dict().items():
                state[f"controlnet.{index}.after_proj.{key}"] = value
        return state | {f"controlnet.0.before_proj.{key}": value for key, value in self.before.state_dict().items()}

    def spec(self) -> ModelSpec:
        return load_spec(str(self.path), parts=self.parts)

    def network(self, dtype: torch.dtype = torch.float32) -> PixArtNetwork:
        spec = self.spec()
        base = load_network(spec, dtype, CPU)
        return PixArtNetwork(base, span=32.0, control=load_control(spec, base, Home(device=CPU, dtype=dtype)))

    def by_hand(self, x: Tensor, time: float, words: Tensor, edges: Tensor) -> Tensor:
        """The base with what the copies add laid in before its blocks 1 and 2."""
        base, state = copy.deepcopy(self.base), {}

        def first(block: nn.Module, args: tuple[Tensor, ...], call: dict[str, Any]) -> None:
            state["c"] = base.pos_embed(edges)

        def steer(index: int) -> Any:
            def hook(
                block: nn.Module, args: tuple[Tensor, ...], call: dict[str, Any]
            ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
                start = args[0] + self.before(state["c"]) if index == 0 else state["c"]
                state["c"] = self.copies[index](start, **call)
                return (args[0] + self.after[index](state["c"]), *args[1:]), call

            return hook

        base.transformer_blocks[0].register_forward_pre_hook(first, with_kwargs=True)
        for index in range(COPIES):
            base.transformer_blocks[index + 1].register_forward_pre_hook(steer(index), with_kwargs=True)
        sizes = {"resolution": None, "aspect_ratio": None}
        times = torch.full((x.shape[0],), time)
        output: Tensor = base(x, encoder_hidden_states=words, timestep=times, added_cond_kwargs=sizes, return_dict=False)[0]
        return output[:, :4]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("control"))


def conditions(made: Made, size: Size, seed: int = 0) -> Conditioning:
    torch.manual_seed(seed)
    words = torch.randn(1, 120, made.base.config.caption_channels)
    return Conditioning(tokens=words, canvas=size, image_latents=torch.randn(1, 4, size.height, size.width))


def test_the_network_is_the_forward_written_out(made: Made) -> None:
    size = Size(64, 64)  # native, where upstream's own positions are the same
    cond = conditions(made, size)
    x = torch.randn(1, 4, 64, 64)
    with torch.inference_mode():
        ours = made.network()(x, 321.0, cond)
        assert cond.image_latents is not None
        theirs = made.by_hand(x, 321.0, cond.tokens, cond.image_latents)
        plain = made.by_hand(x, 321.0, cond.tokens, torch.zeros_like(cond.image_latents))
    scale = float(theirs.abs().max())
    assert (ours - theirs).abs().max() <= 1e-5 * scale
    assert (plain - theirs).abs().max() > 1e-2 * scale, "the edges matter"


def test_projections_of_zeros_leave_the_base_exactly(tmp_path: Path) -> None:
    made = Made(tmp_path, zero=True)
    cond, x = conditions(made, Size(16, 24)), torch.randn(1, 4, 16, 24)
    with torch.inference_mode():
        controlled = made.network()(x, 100.0, cond)
        base = PixArtNetwork(load_network(made.spec(), torch.float32, CPU), span=32.0)(x, 100.0, cond)
    assert torch.equal(controlled, base)


def test_a_tile_follows_its_own_edges(made: Made) -> None:
    """Two tiles in one batch are what each is alone, and the edges are cut with the tile.

    In float64: these random weights amplify what a batch of another size rounds otherwise.
    """
    cond, x = conditions(made, Size(32, 48)).to(CPU, torch.float64), torch.randn(1, 4, 32, 48).double()
    boxes, network = (Box(0, 0, 16, 16), Box(8, 24, 16, 16)), made.network(torch.float64)
    tiles = [x[..., box.rows, box.cols] for box in boxes]
    with torch.inference_mode():
        both = network(torch.cat(tiles), 50.0, Conditioning.concatenate(*(cond.crop(box) for box in boxes)))
        for index, (tile, box) in enumerate(zip(tiles, boxes, strict=True)):
            alone = network(tile, 50.0, cond.crop(box))
            assert (both[index] - alone[0]).abs().max() <= 1e-4 * alone.abs().max()
        apart = network(tiles[1], 50.0, replace(cond.crop(boxes[1]), image_latents=cond.crop(boxes[0]).image_latents))
        assert (both[1] - apart[0]).abs().max() > 1e-2 * both[1].abs().max()


def test_the_spec_counts_the_copies(made: Made) -> None:
    spec, plain = made.spec(), load_spec(str(made.path), parts=made.parts)
    assert spec.family == "pixart-alpha-512"
    assert spec.network.control_blocks == COPIES  # type: ignore[union-attr]
    modules = (made.base, *made.copies, made.before, *made.after)
    assert spec.network_params == sum(p.numel() for module in modules for p in module.parameters())
    more = pixart_flops(spec.network, 64, 64, 120)  # type: ignore[arg-type]
    base = pixart_flops(replace(plain.network, control_blocks=0), 64, 64, 120)  # type: ignore[arg-type, type-var]
    assert 1.4 < more / base < 1.7


def test_a_render_follows_the_edges(made: Made) -> None:
    given: dict[str, Any] = {"model": str(made.path), "parts": made.parts, "size": "96x64", "steps": 2, "strategy": "direct"}
    edges = np.zeros((64, 96, 3), dtype=np.uint8)
    edges[20:24] = 255
    drawn, other = (hires.render("a sun", control=picture, **given).pixels for picture in (edges, np.zeros_like(edges)))
    assert drawn.shape == (64, 96, 3)
    assert not np.array_equal(drawn, other)
    with pytest.raises(RequestError, match=r"a ControlNet; give the edges .* `control`"):
        hires.render("a sun", **given)
    with pytest.raises(RequestError, match="demo has no ControlNet"):
        hires.render("a sun", size="64x64", control=edges)


def test_a_key_that_is_none_of_it_is_refused(made: Made, tmp_path: Path) -> None:
    state = torch.load(made.path)["state_dict"] | {"controlnet.0.copied_block.nothing.weight": torch.ones(2)}
    torch.save(state, tmp_path / "strange.pth")
    given = {"model": str(tmp_path / "strange.pth"), "parts": made.parts, "control": np.zeros((64, 64, 3), dtype=np.uint8)}
    with pytest.raises(ModelError, match=r"controlnet key copied_block\.nothing\.weight"):
        hires.render("a", size="64x64", **given)  # type: ignore[arg-type]
