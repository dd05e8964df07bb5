"""FLOPs and peak bytes of every stage as functions of shapes. No torch.

One multiply-accumulate is two FLOPs. The formulas walk the same blocks as the networks do; the live-activation constants
say in maps of the widest level what an eager run holds at its peak (an SDXL UNet at 1024 px in bf16 holds 0.15 GiB, its
VAE 1.5 GiB for decoding and 1.25 GiB for encoding).
"""

from __future__ import annotations

from collections.abc import Iterator

from hires.specs import UNetShape, VaeShape

UNET_LIVE_MAPS = 15.7  # of the first level's channels: 157 B/px in bf16 at 320 channels and 64 px per cell
DECODE_LIVE_MAPS = 3.0  # of the second level's channels at full resolution: 1536 B/px in bf16 at 256
ENCODE_LIVE_MAPS = 5.0  # of the first level's channels at full resolution: 1280 B/px in bf16 at 128
CPU_SCRATCH = 2.0  # oneDNN keeps reordered copies of a convolution's input and output beside them
TEXT_TOKENS = 77


def _resnet(c_in: int, c_out: int) -> int:
    """Multiply-accumulates per position of a resnet block: two 3x3 convolutions and the 1x1 shortcut."""
    return 9 * c_in * c_out + 9 * c_out * c_out + (c_in * c_out if c_in != c_out else 0)


def _transformer(c: int, layers: int, positions: int, shape: UNetShape) -> int:
    """Multiply-accumulates of the transformer layers of one block over all positions, attention included."""
    per_layer = 4 * c * c + 2 * c * positions  # self-attention: projections, then scores and values
    per_layer += 2 * c * c + 2 * c * TEXT_TOKENS  # cross-attention
    per_layer += 12 * c * c  # gated feed-forward
    text = 2 * shape.context_width * c * TEXT_TOKENS
    return layers * (positions * per_layer + text) + 2 * c * c * positions


def unet_flops(shape: UNetShape, height_cells: int, width_cells: int) -> float:
    """One evaluation of the UNet for one picture of the given latent size."""
    return 2.0 * sum(_unet_macs(shape, height_cells, width_cells))


def _unet_macs(shape: UNetShape, h: int, w: int) -> Iterator[int]:
    channels, levels = shape.channels, len(shape.channels)
    cells = [max(1, h >> i) * max(1, w >> i) for i in range(levels)]
    yield 9 * 2 * shape.latent_channels * channels[0] * cells[0]
    skips, c = [channels[0]], channels[0]
    for i, width in enumerate(channels):
        for _ in range(shape.resnets):
            yield _resnet(c, width) * cells[i]
            if shape.transformer_layers[i]:
                yield _transformer(width, shape.transformer_layers[i], cells[i], shape)
            c = width
            skips.append(c)
        if i < levels - 1:
            yield 9 * c * c * cells[i + 1]
            skips.append(c)
    yield 2 * _resnet(c, c) * cells[-1]
    yield _transformer(c, shape.transformer_layers[-1], cells[-1], shape)
    for i in reversed(range(levels)):
        for _ in range(shape.resnets + 1):
            yield _resnet(c + skips.pop(), channels[i]) * cells[i]
            if shape.transformer_layers[i]:
                yield _transformer(channels[i], shape.transformer_layers[i], cells[i], shape)
            c = channels[i]
        if i > 0:
            yield 9 * c * c * cells[i - 1]


def vae_decode_flops(shape: VaeShape, height_cells: int, width_cells: int) -> float:
    """Decoding one picture of the given latent size, attention of the mid block included where there is one."""
    positions = height_cells * width_cells
    c = shape.channels[-1]
    macs = 9 * shape.latent_channels * c * positions + 2 * _resnet(c, c) * positions
    if shape.mid_attention:
        macs += 4 * c * c * positions + 2 * c * positions * positions
    for i in reversed(range(len(shape.channels))):
        for _ in range(shape.resnets + 1):
            macs += _resnet(c, shape.channels[i]) * positions
            c = shape.channels[i]
        if i > 0:
            positions *= 4
            macs += 9 * c * c * positions
    return 2.0 * (macs + 9 * c * 3 * positions)


def vae_encode_flops(shape: VaeShape, height_cells: int, width_cells: int) -> float:
    """Encoding one picture whose latent size is given."""
    positions = height_cells * width_cells * int(4 ** (len(shape.channels) - 1))
    c = shape.channels[0]
    macs = 9 * 3 * c * positions
    for i, width in enumerate(shape.channels):
        for _ in range(shape.resnets):
            macs += _resnet(c, width) * positions
            c = width
        if i < len(shape.channels) - 1:
            positions //= 4
            macs += 9 * c * c * positions
    macs += 2 * _resnet(c, c) * positions + 9 * c * 2 * shape.latent_channels * positions
    if shape.mid_attention:
        macs += 4 * c * c * positions + 2 * c * positions * positions
    return 2.0 * macs


def unet_live_bytes(shape: UNetShape, cells: int, batch: int, element_bytes: int, cpu: bool) -> int:
    """Activations that live at once in one evaluation of `batch` pictures of `cells` positions."""
    scratch = CPU_SCRATCH if cpu else 1.0
    return int(UNET_LIVE_MAPS * shape.channels[0] * cells * batch * element_bytes * scratch)


def vae_live_bytes(shape: VaeShape, pixels: int, element_bytes: int, cpu: bool, *, encode: bool = False) -> int:
    """Activations that live at once while `pixels` are decoded (or encoded) in one piece."""
    maps = ENCODE_LIVE_MAPS * shape.channels[0] if encode else DECODE_LIVE_MAPS * shape.channels[1]
    return int(maps * pixels * element_bytes * (CPU_SCRATCH if cpu else 1.0))
