"""FLOPs of networks as functions of shapes. Imports no torch.

One multiply-accumulate is two FLOPs. The formulas walk the same blocks as the networks do.
"""

from __future__ import annotations

from collections.abc import Iterator

from hires.checkpoints.families import NetworkShape, PixArtShape, UNetShape
from hires.kernels.attention_policies import EVERYWHERE, Policy, attended
from hires.tiling.bands.storage import resnet_macs

TEXT_TOKENS = 77


def _transformer(c: int, layers: int, canvas: tuple[int, int], shape: UNetShape, policy: Policy) -> int:
    """Multiply-accumulates of the transformer layers of one block over a canvas of tokens, attention included."""
    positions = canvas[0] * canvas[1]
    per_layer = 4 * c * c  # self-attention: projections
    per_layer += 2 * c * c + 2 * c * TEXT_TOKENS  # cross-attention
    per_layer += 12 * c * c  # gated feed-forward
    mixed = 2 * c * attended(policy, canvas)  # scores and values
    text = 2 * shape.context_width * c * TEXT_TOKENS
    return layers * (positions * per_layer + mixed + text) + 2 * c * c * positions


def network_flops(
    shape: NetworkShape, height_cells: int, width_cells: int, tokens: int = TEXT_TOKENS, policy: Policy = EVERYWHERE
) -> float:
    """One evaluation of a network for one picture of the given latent size and `tokens` tokens of text.

    policy: which latent cells self-attention attends to.
    """
    if isinstance(shape, PixArtShape):
        return pixart_flops(shape, height_cells, width_cells, tokens, policy)
    return unet_flops(shape, height_cells, width_cells, policy)


def pixart_flops(shape: PixArtShape, height_cells: int, width_cells: int, tokens: int, policy: Policy = EVERYWHERE) -> float:
    """One evaluation of a PixArt transformer; keys and values are thinned where the shape says so, and attended to all."""
    canvas = height_cells // shape.patch, width_cells // shape.patch
    c, positions = shape.width, canvas[0] * canvas[1]
    dense = shape.kv_compression or (1,) * shape.layers
    factors = (*dense, *(1,) * shape.control_blocks)
    macs = 2 * c * c * tokens * len(factors) + (shape.caption_width + c) * c * tokens
    for factor in factors:
        pairs = attended(policy.per(shape.patch), canvas) if factor == 1 else positions * (positions // factor**2)
        macs += 4 * c * c * positions + 2 * c * pairs  # self-attention: projections, then scores and values
        macs += positions * (2 * c * c + 2 * c * tokens)  # cross-attention
        macs += positions * 8 * c * c  # feed-forward
    patch = shape.patch**2 * shape.latent_channels
    macs += positions * c * patch * 3  # patches in, and twice as many channels out
    if shape.control_blocks:
        macs += positions * c * (patch + c * (shape.control_blocks + 1))  # the edges' patches, and the copies' projections
    return 2.0 * macs


def unet_flops(shape: UNetShape, height_cells: int, width_cells: int, policy: Policy = EVERYWHERE) -> float:
    """One evaluation of the UNet for one picture of the given latent size."""
    return 2.0 * sum(_unet_macs(shape, height_cells, width_cells, policy))


def _unet_macs(shape: UNetShape, h: int, w: int, policy: Policy) -> Iterator[int]:
    channels, levels = shape.channels, len(shape.channels)
    grids = [(-(-h // 2**i), -(-w // 2**i)) for i in range(levels)]
    cells = [rows * cols for rows, cols in grids]
    policies = [policy.per(2**i) for i in range(levels)]
    yield 9 * 2 * shape.latent_channels * channels[0] * cells[0]
    skips, c = [channels[0]], channels[0]
    for i, width in enumerate(channels):
        for layers in shape.down(i):
            yield resnet_macs(c, width) * cells[i]
            if layers:
                yield _transformer(width, layers, grids[i], shape, policies[i])
            c = width
            skips.append(c)
        if i < levels - 1:
            yield 9 * c * c * cells[i + 1]
            skips.append(c)
    yield shape.mid_resnets * resnet_macs(c, c) * cells[-1]
    if shape.mid_resnets > 1:
        yield _transformer(c, shape.middle, grids[-1], shape, policies[-1])
    for i in reversed(range(levels)):
        for layers in shape.up(i):
            yield resnet_macs(c + skips.pop(), channels[i]) * cells[i]
            if layers:
                yield _transformer(channels[i], layers, grids[i], shape, policies[i])
            c = channels[i]
        if i > 0:
            yield 9 * c * c * cells[i - 1]


def attention_flops(shape: NetworkShape, height_cells: int, width_cells: int, policy: Policy = EVERYWHERE) -> float:
    """The part of an evaluation that is scores and values of self-attention."""
    if isinstance(shape, PixArtShape):
        canvas = height_cells // shape.patch, width_cells // shape.patch
        positions, dense = canvas[0] * canvas[1], shape.kv_compression or (1,) * shape.layers
        pairs = attended(policy.per(shape.patch), canvas)
        factors = (*dense, *(1,) * shape.control_blocks)
        return 4.0 * shape.width * sum(pairs if f == 1 else positions * (positions // f**2) for f in factors)
    last, total = len(shape.channels) - 1, 0.0
    for i in range(len(shape.channels)):
        count = sum(shape.down(i)) + sum(shape.up(i)) + (shape.middle if i == last else 0)
        canvas = -(-height_cells // 2**i), -(-width_cells // 2**i)
        total += 4.0 * shape.channels[i] * count * attended(policy.per(2**i), canvas)
    return total
