"""GroupNorm that does not look at the picture: an AutoencoderKL whose statistics are held by two constant channels.

A GroupNorm divides by the standard deviation of whatever the tile shows, so a small autoencoder trained on crops encodes
the same sky differently beside a lake and alone: latents differed by 40 % (RMS) between a 256 px tile and the whole 2048 px
picture, which was then reproduced at 17 dB. Here every normalised map carries, in its one group of C channels, the constants
+HOLD and -HOLD and the negative sum of all others. Its mean is then zero and its deviation nearly HOLD sqrt(2 / C), whatever
is drawn: the norm is a fixed scale. Inside a 256 px tile the shipped weights code as in the whole 2048 px picture to 0.6 %
(RMS), and a whole 1024 px picture comes back at 44 dB. The layout of the file stays that of any AutoencoderKL; weights and
biases are held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

HOLD = 2048.0  # exact in half precision; far above what the maps hold
HELD = slice(-3, None)  # +HOLD, -HOLD, the negative sum of the rest
OUTER = ("conv_out", "quant_conv", "post_quant_conv")  # these feed no norm
RAW = ("conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")  # these read a map that no norm went over


def _convolutions(vae: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    """Every convolution whose output is normalised later."""
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d) and name.split(".")[-1] not in OUTER:
            yield name, module


def hold_gradients(vae: nn.Module) -> None:
    """Hide the held entries from the optimiser: their gradients are zero from now on."""

    def hide(parameter: Tensor | None, axis: int) -> None:
        assert parameter is not None
        mask = torch.ones_like(parameter)
        mask.transpose(0, axis)[HELD] = 0
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradient * mask)  # type: ignore[no-untyped-call]

    for name, conv in _convolutions(vae):
        hide(conv.weight, 0)
        hide(conv.bias, 0)
        if name.endswith(RAW):
            hide(conv.weight, 1)
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            hide(module.weight, 0)
            hide(module.bias, 0)


@torch.no_grad()
def pin_norms(vae: nn.Module) -> None:
    """Put the held entries back in place; called after every step of an optimiser.

    No later layer reads a held channel: their norm weights are zero, and so is what unnormalised maps would pass on.
    """
    for name, conv in _convolutions(vae):
        assert conv.bias is not None
        hold = 0.0 if name.endswith("conv2") else HOLD  # conv2 is added to a map that has the constants already
        if name.endswith(RAW):
            conv.weight[:, HELD] = 0
        for values in (conv.weight, conv.bias):
            values[HELD] = 0
            values[-1] = -values[: HELD.start].sum(0)
        conv.bias[-3], conv.bias[-2] = hold, -hold
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            assert module.num_groups == 1
            module.weight[HELD] = 0
            module.bias[HELD] = 0


@torch.no_grad()
def start_scales(vae: nn.Module) -> None:
    """Norm weights of a fresh module such that a map of unit deviation leaves the norm as it came."""
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.fill_(HOLD * math.sqrt(2 / module.num_channels))
    pin_norms(vae)


@torch.no_grad()
def fold_norms(old: nn.Module, new: nn.Module, pixels: Tensor) -> None:
    """Take over an autoencoder with ordinary norms: its mean statistics over `pixels` (B, 3, H, W) become fixed scales.

    The channels that are now held lose what they carried; training has to make up for both.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str, norm: nn.GroupNorm) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            groups = inputs[0].reshape(inputs[0].shape[0], norm.num_groups, -1)
            var, mean = torch.var_mean(groups, dim=-1, correction=0)
            size = norm.num_channels // norm.num_groups
            seen[name] = (mean.mean(0).repeat_interleave(size), var.mean(0).sqrt().repeat_interleave(size))

        norm.register_forward_pre_hook(hook)

    for name, module in old.named_modules():
        if isinstance(module, nn.GroupNorm):
            watch(name, module)
    old.decode(old.encode(pixels).latent_dist.mean)  # type: ignore[operator]
    new.load_state_dict(old.state_dict())
    for name, module in new.named_modules():
        if isinstance(module, nn.GroupNorm):
            mean, deviation = seen[name]
            scale = module.weight / deviation
            module.bias.sub_(scale * mean)
            module.weight.copy_(scale * HOLD * math.sqrt(2 / module.num_channels))
    pin_norms(new)
