"""Attention policies: which keys each query attends to.

The whole canvas, a neighbourhood, a window, or pooled keys. A policy counts in tokens; in a plan it counts in latent cells,
and `per(n)` converts it to tokens of n cells a side, so that one value serves every level of a network. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Global:
    """Every query attends to every key."""

    trained: int | None = None
    """Tokens of the training canvas; None for plain attention.

    On N > trained tokens, scores are scaled by sqrt(ln N / ln trained) (proportional attention, Jin et al. 2023, arXiv
    2306.08645).
    """

    def __str__(self) -> str:
        return "global" if self.trained is None else f"proportional:{math.isqrt(self.trained)}"

    def per(self, cells: int) -> Global:
        """The policy in tokens of `cells` cells a side."""
        return self if self.trained is None else Global(max(1, self.trained // cells**2))

    def stretch(self, tokens: int) -> float:
        """The factor on the scores of that many tokens; 1 up to the trained length."""
        if self.trained is None or tokens <= self.trained:
            return 1.0
        return math.sqrt(math.log(tokens) / math.log(self.trained))


@dataclass(frozen=True, slots=True)
class NPA:
    """Neighbourhood patch attention (ScaleDiff, arXiv 2510.25818), an approximation of `Global`.

    Blocks of (window / 2)^2 queries attend to the window^2 keys around them, clamped at the borders. Equal to `Global` on
    canvases no larger than the window.
    """

    window: int
    """Keys per side of the window; a multiple of 4."""
    shift: tuple[int, int] = (0, 0)
    """How far the block grid moves up and left (rows, columns)."""
    circular: tuple[bool, bool] = (False, False)
    """Whether rows, columns wrap around."""

    def __post_init__(self) -> None:
        if self.window < 4 or self.window % 4:
            raise ValueError(f"NPA: a window is a positive multiple of 4, not {self.window}")

    def __str__(self) -> str:
        return f"npa:{self.window}"

    def per(self, cells: int) -> NPA:
        """The policy in tokens of `cells` cells a side."""
        window = -(-self.window // (4 * cells)) * 4
        return replace(self, window=window, shift=_per(self.shift, cells))


@dataclass(frozen=True, slots=True)
class Windows:
    """Blocks of window^2 queries attend to themselves (shifted windows, arXiv 2103.14030), an approximation of `Global`.

    At the borders the window of keys is clamped, so that every query has equally many keys.
    """

    window: int
    """Tokens per side of a block."""
    shift: tuple[int, int] = (0, 0)
    """How far the block grid moves up and left (rows, columns)."""
    circular: tuple[bool, bool] = (False, False)
    """Whether rows, columns wrap around."""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"Windows: a window is at least 1, not {self.window}")

    def __str__(self) -> str:
        return f"windows:{self.window}"

    def per(self, cells: int) -> Windows:
        """The policy in tokens of `cells` cells a side."""
        return replace(self, window=-(-self.window // cells), shift=_per(self.shift, cells))


@dataclass(frozen=True, slots=True)
class KVPool:
    """Keys and values are means over r x r tokens (PixArt-Σ's compression without its weights, arXiv 2403.04692)."""

    r: int
    """Tokens per side of the area that is averaged."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"KVPool: r is at least 1, not {self.r}")

    def __str__(self) -> str:
        return f"kvpool:{self.r}"

    def per(self, cells: int) -> KVPool:
        """The policy itself: the factor does not depend on the level."""
        return self


@dataclass(frozen=True, slots=True)
class Rows:
    """Each row of queries attends to the whole rows around it; at the edges the window moves inside the canvas."""

    window: int
    """Rows of keys."""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"Rows: a window is at least 1 row, not {self.window}")

    def __str__(self) -> str:
        return f"rows:{self.window}"

    def per(self, cells: int) -> Rows:
        """The policy in tokens of `cells` cells a side."""
        return Rows(-(-self.window // cells))


Policy = Global | NPA | Windows | Rows | KVPool
Windowed = NPA | Windows | Rows
POLICIES = ("global", "npa", "windows", "kvpool", "proportional")
MOVING = ("npa", "windows")  # policies whose block grid can be shifted
EVERYWHERE = Global()
Attending = Callable[[float], Policy]  # a policy for each of the network's times, on which the shift may depend


def everywhere(time: float) -> Policy:
    """`Global` at any time."""
    return EVERYWHERE


def _per(shift: tuple[int, int], cells: int) -> tuple[int, int]:
    return shift[0] // cells, shift[1] // cells


def make_policy(name: str, native: int, value: int | None = None) -> Policy:
    """A policy by its name in `POLICIES`. ValueError for an unknown name or an invalid value.

    Args:
        name: the policy.
        native: the side of the training canvas, the default size of windows.
        value: the window, or the factor of 'kvpool' (default 2); 'global' takes none.
    """
    window = native if value is None else value
    match name:
        case "npa":
            return NPA(-(-window // 4) * 4 if window > 0 else window)
        case "windows":
            return Windows(window)
        case "kvpool":
            return KVPool(2 if value is None else value)
        case "proportional":
            return Global(trained=window**2)
    if name != "global" or value is not None:
        raise ValueError(f"{name}: one of {', '.join(POLICIES)}, global without a value")
    return Global()


@dataclass(frozen=True, slots=True)
class Axis:
    """Blocks of queries along one axis.

    Block a holds the tokens [a block - shift, (a + 1) block - shift) that lie on the axis.
    """

    length: int
    """Tokens of the axis."""
    block: int
    """Queries per block."""
    keys: int
    """Keys that a block attends to, from `key_start(a)` on."""
    margin: int
    """Keys before the first query of a block."""
    shift: int
    """How far the block grid moves towards the start."""
    circular: bool
    """Whether the axis wraps around."""

    @property
    def count(self) -> int:
        """The number of blocks."""
        return -(-(self.length + (0 if self.circular else self.shift)) // self.block)

    def key_start(self, index: int) -> int:
        """The first key of a block; may be negative on a circular axis."""
        start = index * self.block - self.shift - self.margin
        return start if self.circular else min(max(start, 0), self.length - self.keys)


def axis(policy: Windowed, length: int, which: int) -> Axis:
    """The blocks of a policy along `length` rows (which = 0) or columns (which = 1)."""
    if isinstance(policy, Rows):
        if which == 1 or policy.window >= length:
            return Axis(length, length, length, 0, 0, False)
        return Axis(length, 1, policy.window, policy.window // 2, 0, False)
    if policy.window >= length:
        return Axis(length, length, length, 0, 0, False)
    block, margin = (policy.window // 2, policy.window // 4) if isinstance(policy, NPA) else (policy.window, 0)
    return Axis(length, block, policy.window, margin, policy.shift[which] % block, policy.circular[which])


def attended(policy: Policy, canvas: tuple[int, int]) -> int:
    """The number of query-key pairs that a policy computes over a canvas of (h, w) tokens."""
    h, w = canvas
    if isinstance(policy, Global):
        return (h * w) ** 2
    if isinstance(policy, KVPool):
        return h * w * -(-h // policy.r) * -(-w // policy.r)
    rows, cols = axis(policy, h, 0), axis(policy, w, 1)
    return h * w * rows.keys * cols.keys
