"""Reads a pickle's opcodes before anything is built of it: how much it would build, and how deep."""

from __future__ import annotations

import pickletools
from typing import BinaryIO, cast

MOST_OPCODES = 500_000
"""A state dict of SDXL takes 80,000."""
LARGEST_PICKLE = 2**28
"""Bytes."""
DEEPEST = 100
"""Containers in containers; a state dict has three or four."""
_IN_PLACE = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"})
_MARK = -1


class _Bounded:
    """A stream that gives up where a pickle asks for more than `LARGEST_PICKLE` bytes."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._left = stream, LARGEST_PICKLE

    def read(self, count: int) -> bytes:
        if count > self._left:
            raise ValueError(f"a pickle of more than {LARGEST_PICKLE:,} bytes")
        return self._taken(self._stream.read(count))

    def readline(self) -> bytes:
        return self._taken(self._stream.readline(self._left + 1))

    def _taken(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(f"a pickle of more than {LARGEST_PICKLE:,} bytes")
        return data


class _Depths:
    """A pickle machine's stack and memo with the depth of each object in its place."""

    def __init__(self) -> None:
        self.stack: list[int] = []
        self.memo: dict[int, int] = {}

    def take(self, opcode: pickletools.OpcodeInfo, argument: object) -> None:
        """Do what an opcode does. LookupError where the stack lacks what it needs."""
        name = opcode.name
        if name == "MARK":
            self.stack.append(_MARK)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            if not (isinstance(argument, int) and argument <= MOST_OPCODES):
                raise ValueError(f"a memo of {argument} objects")
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])  # type: ignore[index]
        elif name == "DUP":
            self.stack.append(self.stack[-1])
        elif name == "POP":
            self.stack.pop()
        else:
            depth = self._depth_of(name, self._popped(opcode))
            self.stack += [depth] * len(opcode.stack_after)

    def _popped(self, opcode: pickletools.OpcodeInfo) -> list[int]:
        """What an opcode takes off the stack, the lowest first."""
        before = opcode.stack_before
        popped: list[int] = []
        if pickletools.markobject in before:
            while (top := self.stack.pop()) != _MARK:
                popped.append(top)
            before = before[: before.index(pickletools.markobject)]
        popped += [self.stack.pop() for _ in before]
        return popped[::-1]

    @staticmethod
    def _depth_of(name: str, popped: list[int]) -> int:
        if name in _IN_PLACE:
            return max(popped[0], 1 + max(popped[1:], default=0))
        return 1 + max(popped, default=0)


def check_pickle(stream: BinaryIO) -> None:
    """Read one pickle's opcodes and go back to where it began.

    Raises:
        ValueError: for one that would take more memory, time or depth than a state dict. Deep tuples as keys end the whole
            process, since a hash recurses in C; a memo index of 2**28 takes 4 GB.
    """
    begin, depths = stream.tell(), _Depths()
    for index, (opcode, argument, _) in enumerate(pickletools.genops(cast("BinaryIO", _Bounded(stream)))):
        if index >= MOST_OPCODES:
            raise ValueError(f"a pickle of more than {MOST_OPCODES:,} opcodes")
        if opcode.name == "FRAME" and isinstance(argument, int) and argument > LARGEST_PICKLE:
            raise ValueError(f"a pickle of more than {LARGEST_PICKLE:,} bytes")
        depths.take(opcode, argument)
        if depths.stack and depths.stack[-1] > DEEPEST:
            raise ValueError(f"a pickle of more than {DEEPEST} containers in one another")
    stream.seek(begin)
