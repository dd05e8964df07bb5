"""Peak bytes of networks and text encoders as functions of shapes. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from hires.checkpoints.families import NetworkShape, PixArtShape, UNetShape
from hires.kernels.attention_policies import EVERYWHERE, Global, KVPool, Policy, attended, axis
from hires.planning.costs.flops import TEXT_TOKENS
from hires.tiling.bands.storage import CPU_SCRATCH, HaloShape, halo_policy
from hires.tiling.geometry import Size


def network_live_bytes(
    shape: NetworkShape,
    cells: Size,
    batch: int,
    element_bytes: int,
    cpu: bool,
    tokens: int = TEXT_TOKENS,
    policy: Policy = EVERYWHERE,
) -> int:
    """Activations that live at once in one evaluation of `batch` pictures of `cells` and `tokens` of text."""
    if isinstance(shape, PixArtShape):
        return pixart_live_bytes(shape, cells, batch, element_bytes, cpu, tokens, policy)
    held = unet_bytes(shape, cells.height, cells.width, element_bytes, tokens, policy)
    return int(held * batch * (CPU_SCRATCH if cpu else 1.0))


PIXART_CONTROL_MAPS = 4  # the carried map, the base's beside it, their sum, and the edges' own channels: 3.1 to 3.6 tracked
PIXART_FORWARD_MAPS = 12  # in the feed-forward: four wide before its GELU, four after, its input, three maps of the residuals
PIXART_CROSS_MAPS = 7  # in cross-attention: three maps of the residuals, queries, result, the result laid out, projected
PIXART_SELF_MAPS = 6  # in self-attention: the block's input, the norm, queries, keys, values, the result
PIXART_CPU_SCRATCH = 1.5  # packed matrices and freed memory not given back: 1.1 to 1.4 measured at 512 to 1024 px, one thread
PIXART_TIME_ROWS = 13  # the timestep's embedding, its six shifts, scales and gates, and the same with a block's own table


def pixart_live_bytes(
    shape: PixArtShape,
    size: Size,
    batch: int,
    element_bytes: int,
    cpu: bool,
    tokens: int,
    policy: Policy = EVERYWHERE,
) -> int:
    """What an eager forward of the transformer holds at its peak, weights apart, conditions and latents included.

    Derived by walking a block; a row is `width` elements, a map one row per patch. Most is alive in the feed-forward, beside
    the projected words; or, where words outnumber patches, in cross-attention, beside the words, their keys and their values.
    Through both live the words as they came and as padded to a multiple of 8, with mask and bias, and in float32 the latents
    as they came and once more with the two channels that place them.
    """
    cells, words = size.area, -(-tokens // 8) * 8
    grid = size.height // shape.patch, size.width // shape.patch
    patches, extra = grid[0] * grid[1], gathered(policy.per(shape.patch), grid)
    rows = max(PIXART_FORWARD_MAPS * patches + words, PIXART_CROSS_MAPS * patches + 3 * words)
    rows = max(rows, PIXART_SELF_MAPS * patches + extra + words) + PIXART_TIME_ROWS
    rows += PIXART_CONTROL_MAPS * patches if shape.control_blocks else 0
    captions = (tokens + (words if words > tokens else 0)) * shape.caption_width
    held = (rows * shape.width + captions + words) * element_bytes + words + 4 * (2 * shape.latent_channels + 2) * cells
    held += 4 * 4  # time, resolution, aspect ratio
    return int(held * batch * (PIXART_CPU_SCRATCH if cpu else 1.0))


TAESD_CHANNELS = 64


def preview_bytes(element: int, cpu: bool) -> int:
    """What a small autoencoder holds while it draws a preview of `PREVIEW_CELLS` cells a side."""
    side, shape = PREVIEW_CELLS, HaloShape(reach=0, cell_px=8, channels=TAESD_CHANNELS, macs_per_cell=0)
    return halo_policy(shape, Size(side, side), side, element=element, cpu=cpu).peak_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerShape:
    """What decides the cost of a text encoder."""

    layers: int
    """Transformer blocks."""
    width: int
    """Channels of a token."""
    forward: int
    """Channels of the feed-forward layer."""
    heads: int
    """Attention heads."""
    forward_maps: int
    """How many maps of the feed-forward's width its activation holds."""


CLIP = {
    "clip_l": TowerShape(layers=12, width=768, forward=3072, heads=12, forward_maps=3),  # x * sigmoid(1.702 x): two results
    "clip_g": TowerShape(layers=32, width=1280, forward=5120, heads=20, forward_maps=2),
}
T5_XXL = TowerShape(layers=24, width=4096, forward=10240, heads=64, forward_maps=4)  # gated, by a tanh written out
T5_MAPS = (6, 4)  # of the width: in attention (input, norm, queries, keys, values, result), in the feed-forward


def text_elements(tower: str, prompts: int, tokens: int) -> int:
    """The most elements alive at once while `prompts` prompts of `tokens` tokens go through a tower, ids and mask included."""
    rows = prompts * tokens
    if tower == "t5":
        shape, bias = T5_XXL, T5_XXL.heads * tokens**2
        attention = 2 * prompts * bias + bias + T5_MAPS[0] * rows * shape.width  # scores and their softmax, and the bias
        forward = bias + rows * (shape.forward_maps * shape.forward + T5_MAPS[1] * shape.width)
        return max(attention, forward) + rows * tokens + 8 * rows
    shape = CLIP[tower]
    kept = shape.layers + 2  # every layer's states are handed back
    return rows * (kept * shape.width + shape.forward_maps * shape.forward) + 8 * rows


def text_live_bytes(towers: tuple[str, ...], prompts: int, tokens: int, element: int) -> int:
    """The peak over the towers, which run one after the other; weights not included."""
    return max(text_elements(tower, prompts, tokens) for tower in towers) * element


PREVIEW_CELLS = 64  # the longest side of a preview's latents
FEED_FORWARD = 21  # maps of c: the block's input and its two residuals, the norm, eight wide before the gate, four gated, four
ATTENTION = 7  # in self-attention: the block's input and its residual, the norm, queries, keys, values, the result
RESNET_END = 4  # maps of the output's channels: the second convolution, the shortcut, their sum, the sum scaled
EMBEDDING_ROWS = 16  # rows of the time embedding's width, four times the first level's channels


def gathered(policy: Policy, canvas: tuple[int, int]) -> int:
    """Tokens that PyTorch's path of a policy holds beside queries, keys, values and result.

    Of a row of blocks: the rows of keys and of values, the keys in blocks, the values as picked and in blocks, and the
    queries as rows and in blocks. Of pooled keys and values: one of the two laid out as a map, and the means.
    """
    h, w = canvas
    if isinstance(policy, Global):
        return 0
    if isinstance(policy, KVPool):
        return h * w + 3 * (attended(policy, canvas) // (h * w))
    rows, cols = axis(policy, h, 0), axis(policy, w, 1)
    lines = rows.block * (w + cols.count * cols.block)
    return 2 * rows.keys * w + 3 * cols.count * rows.keys * cols.keys + lines


@dataclass
class PeakTracker:
    """The peak in elements so far, `held` by maps that wait and by the frames of the forward."""

    shape: UNetShape
    policy: Policy
    held: int = 0
    peak: int = 0
    skips: list[tuple[int, int]] = field(default_factory=list)  # (channels, positions), the last to be taken first
    grids: list[tuple[int, int]] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)

    def moment(self, working: int) -> None:
        """Note a moment at which `working` elements are alive beside the held ones."""
        self.peak = max(self.peak, self.held + working)

    def resnet(self, c_in: int, c_out: int, n: int, source: int) -> None:
        """From a map of c_in channels, whose elements beyond those that others hold are `source`."""
        norms = max(2 * c_in, c_in + c_out, 2 * c_out)  # norm beside SiLU, SiLU beside the convolution, and again
        end = RESNET_END - (c_in == c_out)  # without a shortcut the input itself is added
        self.moment(source + n * max(norms, end * c_out))

    def transformer(self, c: int, level: int, layers: int) -> None:
        """A stack of `layers` transformer blocks on c channels at a level of the UNet."""
        if layers:
            extra = gathered(self.policy.per(2**level), self.grids[level])
            self.moment(c * max(FEED_FORWARD * self.cells[level], ATTENTION * self.cells[level] + extra))

    def run(self, h: int, w: int) -> int:
        """The peak in elements of one forward over h x w cells."""
        shape, channels = self.shape, self.shape.channels
        self.grids = [(-(-h // 2**i), -(-w // 2**i)) for i in range(len(channels))]
        self.cells = cells = [rows * cols for rows, cols in self.grids]
        last = len(channels) - 1
        self.push(channels[0], cells[0])
        c = channels[0]
        for i, width in enumerate(channels):
            for layers in shape.down(i):
                self.resnet(c, width, cells[i], 0)
                self.transformer(width, i, layers)
                self.push(width, cells[i])
                c = width
            if i < last:
                self.moment(c * cells[i + 1])
                self.push(c, cells[i + 1])
        self.middle(c, last)
        for i in reversed(range(len(channels))):
            c = self.up(c, i)
        return self.peak

    def push(self, c: int, n: int) -> None:
        """Hold a skip connection of c channels and n positions."""
        self.skips.append((c, n))
        self.held += c * n

    def middle(self, c: int, level: int) -> None:
        """The mid block on c channels at the lowest level."""
        n = self.cells[level]
        if self.shape.mid_resnets:
            self.resnet(c, c, n, 0)
        self.transformer(c, level, self.shape.middle)
        if self.shape.mid_resnets > 1:
            self.resnet(c, c, n, c * n)

    def up(self, c: int, i: int) -> int:
        """One level of the up path; the skips of its resnets are held until it ends, and so is the map it is given."""
        width, n, depths = self.shape.channels[i], self.cells[i], self.shape.up(i)
        given = c * n
        self.held += given
        taken = [self.skips.pop() for _ in range(self.shape.resnets + 1)]
        for index, (skip, _) in enumerate(taken):
            before = c * n if index else 0
            joined = (c + skip) * n
            self.moment(before + joined)
            self.resnet(c + skip, width, n, joined)
            self.transformer(width, i, depths[index])
            c = width
        self.moment(0)
        if i > 0:
            self.moment(c * n + 2 * c * self.cells[i - 1])  # the map, enlarged, and convolved
        self.held -= given + sum(skip * n for skip, n in taken)
        return c


def unet_bytes(shape: UNetShape, h: int, w: int, element: int, tokens: int, policy: Policy) -> int:
    """The most bytes of one picture that are alive at once in a forward, latents and conditions included, weights not."""
    maps = PeakTracker(shape, policy).run(h, w)
    conditions = tokens * shape.context_width + EMBEDDING_ROWS * 4 * shape.channels[0]
    latents = shape.latent_channels * h * w  # float32 as they came, and twice in the network's type: cast, and laid out
    return (maps + conditions) * element + latents * (4 + 2 * element)
