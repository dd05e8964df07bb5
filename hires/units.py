"""Conversions between amounts of memory or work and text."""

from __future__ import annotations

import re
from typing import Any

from hires.errors import RequestError

Json = dict[str, Any]
"""A JSON object, as it was parsed or is about to be written."""
BYTES_PER_ELEMENT = {"fp32": 4, "bf16": 2, "fp16": 2}


def pflop(count: float) -> str:
    """'12.30 PFLOP', or TFLOP below 0.1 PFLOP."""
    return f"{count / 1e15:.2f} PFLOP" if count >= 1e14 else f"{count / 1e12:.2f} TFLOP"


def gib(count: float) -> str:
    """Bytes as '1.25 GiB'."""
    return f"{count / 2**30:.2f} GiB"


def readable(count: float) -> str:
    """Bytes as '1.25 GiB', or as '12.5 MiB' below one."""
    return gib(count) if count >= 2**30 else f"{count / 2**20:.1f} MiB"


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes from '24GB' (10^9), '12GiB' (2^30), '800 MB' or a plain number.

    RequestError for any other text and for amounts below one byte.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([kmgt]i?)?b?\s*", text.lower())
    count = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if count < 1:
        raise RequestError(f"{text!r} is no amount of memory: give one such as 24GB or 12GiB")
    return count
