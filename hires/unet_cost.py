"""What an eager forward of a diffusers UNet holds at its peak, by walking its blocks. No torch.

A walk counts elements of one picture: maps that wait for their place in the up path, what the frames of the blocks hold, and
what the block at work makes. One position of a map of c channels is c elements.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hires.checkpoints.families import UNetShape
from hires.kernels.attention_policies import Global, KVPool, Policy, attended, axis

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
class Walk:
    """The peak in elements so far, `held` by maps that wait and by the frames of the forward."""

    shape: UNetShape
    policy: Policy
    held: int = 0
    peak: int = 0
    skips: list[tuple[int, int]] = field(default_factory=list)  # (channels, positions), the last to be taken first
    grids: list[tuple[int, int]] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)

    def moment(self, working: int) -> None:
        self.peak = max(self.peak, self.held + working)

    def resnet(self, c_in: int, c_out: int, n: int, source: int) -> None:
        """From a map of c_in channels, whose elements beyond those that others hold are `source`."""
        norms = max(2 * c_in, c_in + c_out, 2 * c_out)  # norm beside SiLU, SiLU beside the convolution, and again
        end = RESNET_END - (c_in == c_out)  # without a shortcut the input itself is added
        self.moment(source + n * max(norms, end * c_out))

    def transformer(self, c: int, level: int, layers: int) -> None:
        if layers:
            extra = gathered(self.policy.per(2**level), self.grids[level])
            self.moment(c * max(FEED_FORWARD * self.cells[level], ATTENTION * self.cells[level] + extra))

    def run(self, h: int, w: int) -> int:
        shape, channels = self.shape, self.shape.channels
        self.grids = [(-(-h // 2**i), -(-w // 2**i)) for i in range(len(channels))]
        self.cells = cells = [rows * cols for rows, cols in self.grids]
        last = len(channels) - 1
        self.push(channels[0], cells[0])
        c = channels[0]
        for i, width in enumerate(channels):
            for _ in range(shape.resnets):
                self.resnet(c, width, cells[i], 0)
                self.transformer(width, i, shape.transformer_layers[i])
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
        self.skips.append((c, n))
        self.held += c * n

    def middle(self, c: int, level: int) -> None:
        layers = self.shape.transformer_layers[-1] if self.shape.mid_layers is None else self.shape.mid_layers
        n = self.cells[level]
        self.resnet(c, c, n, 0)
        self.transformer(c, level, layers)
        self.resnet(c, c, n, c * n)

    def up(self, c: int, i: int) -> int:
        """One level of the up path; the skips of its resnets are held until it ends, and so is the map it is given."""
        width, n, layers = self.shape.channels[i], self.cells[i], self.shape.transformer_layers[i]
        given = c * n
        self.held += given
        taken = [self.skips.pop() for _ in range(self.shape.resnets + 1)]
        for index, (skip, _) in enumerate(taken):
            before = c * n if index else 0
            joined = (c + skip) * n
            self.moment(before + joined)
            self.resnet(c + skip, width, n, joined)
            self.transformer(width, i, layers)
            c = width
        self.moment(0)
        if i > 0:
            self.moment(c * n + 2 * c * self.cells[i - 1])  # the map, enlarged, and convolved
        self.held -= given + sum(skip * n for skip, n in taken)
        return c


def unet_bytes(shape: UNetShape, h: int, w: int, element: int, tokens: int, policy: Policy) -> int:
    """The most bytes of one picture that are alive at once in a forward, latents and conditions included, weights not."""
    maps = Walk(shape, policy).run(h, w)
    conditions = tokens * shape.context_width + EMBEDDING_ROWS * 4 * shape.channels[0]
    latents = shape.latent_channels * h * w  # float32 as they came, and twice in the network's type: cast, and laid out
    return (maps + conditions) * element + latents * (4 + 2 * element)
