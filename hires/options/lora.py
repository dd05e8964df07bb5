"""LoRAs of a request: files, strengths of the network and of the text, block weights."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hires.errors import RequestError

BLOCKS = ("BASE", *(f"IN{i:02}" for i in range(12)), "M00", *(f"OUT{i:02}" for i in range(12)))
"""The 26 places that a block weight may be for: both text towers, then the blocks of a UNet of four levels (SD1.5)."""
_SDXL = ("BASE", *(f"IN{i:02}" for i in range(9)), "M00", *(f"OUT{i:02}" for i in range(9)))
_SDXL_ATTENTION = ("BASE", "IN04", "IN05", "IN07", "IN08", "M00", *(f"OUT{i:02}" for i in range(6)))
_SD15_ATTENTION = (
    *("BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00"),
    *(f"OUT{i:02}" for i in range(3, 12)),
)
BLOCK_LISTS: Mapping[int, tuple[str, ...]] = {26: BLOCKS, 17: _SD15_ATTENTION, 20: _SDXL, 12: _SDXL_ATTENTION}
"""What the weights of a list are for, by how many there are; blocks that a list leaves out get 0."""
COUNTS = "12 or 20 (SDXL), 17 or 26 (SD1.5)"
NOT_HONOURED = ("dyn", "lbwe", "start", "stop", "step", "role", "in", "out")
"""What other programs read in a LoRA tag and nothing here does."""
LARGEST = 100.0


def loras_of(loras: Loras) -> tuple[LoraRef, ...]:
    """LoRAs given as 'PATH[:MODEL[:TEXT]][:lbw=...]' or as references. RequestError for an invalid strength."""
    return tuple(parse_lora(lora) if isinstance(lora, str) else lora for lora in loras)


@dataclass(frozen=True, slots=True)
class LoraRef:
    """A LoRA to merge: its file, or a folder that holds one, and how strongly."""

    path: str
    scale: float = 1.0
    """The strength on the network."""
    text_scale: float | None = None
    """The strength on the text towers; None for the same."""
    blocks: tuple[float, ...] = ()
    """Weights of the network's blocks in the order of `BLOCK_LISTS`; empty for 1 everywhere."""

    def __post_init__(self) -> None:
        given = (self.scale,) if self.text_scale is None else (self.scale, self.text_scale)
        if not isinstance(self.path, str) or not all(_is_number(value) for value in given):
            raise RequestError(f"LoRA {self.path!r} at {', '.join(map(repr, given))}: give a path and a number")
        if not all(abs(value) <= LARGEST for value in given):
            told = ":".join(f"{value:g}" if abs(value) < sys.float_info.max else "inf" for value in given)
            raise RequestError(f"loras {self.path}:{told}: give a scale from -100 to 100")
        if not isinstance(self.blocks, tuple | list):
            raise RequestError(f"loras {self.path}: lbw is {self.blocks!r}; give {COUNTS} numbers")
        if self.blocks:
            _check_blocks(self.path, self.blocks)

    @property
    def text_strength(self) -> float:
        """The strength on the text towers, the block weight BASE included."""
        text = self.scale if self.text_scale is None else self.text_scale
        return text * (self.blocks[0] if self.blocks else 1.0)

    def strength(self, block: str | None) -> float:
        """The strength on a block of the network, such as 'IN04'; None for a layer outside all blocks, which none weighs."""
        return self.scale * (self.block_weights.get(block, 0.0) if self.blocks and block is not None else 1.0)

    @property
    def block_weights(self) -> dict[str, float]:
        """The weight of each of `BLOCKS`, 0 for those that the list leaves out; empty without a list."""
        if not self.blocks:
            return {}
        return dict.fromkeys(BLOCKS, 0.0) | dict(zip(BLOCK_LISTS[len(self.blocks)], self.blocks, strict=True))

    @property
    def strengths(self) -> str:
        """The strengths as they are written behind the path: '0.8', '0.8:0.5:lbw=1,0,...'."""
        text = "" if self.text_scale is None else f":{_plain(self.text_scale)}"
        blocks = f":lbw={','.join(map(_plain, self.blocks))}" if self.blocks else ""
        return f"{_plain(self.scale)}{text}{blocks}"

    def __str__(self) -> str:
        full = self
        if self.text_scale is None and _strength(self.path.rpartition(":")[2]) is not None:
            full = LoraRef(self.path, self.scale, self.scale, self.blocks)  # so that the path's own number stays the path's
        return f"{self.path}:{full.strengths}"


Loras = Sequence[str | LoraRef]


def parse_lora(text: str) -> LoraRef:
    """'style.safetensors:0.8:0.5:lbw=1,0,...': a path, the strength on the network, on the text, block weights.

    `PATH:0.8` sets both strengths, a path alone leaves both at 1; `unet=`, `te=` and `lbw=` may follow by name. A colon that
    neither a number nor such a name follows belongs to the path. RequestError for a strength that is no number from -100 to
    100, and for another count of block weights than `BLOCK_LISTS` has.
    """
    rest, named = text, dict[str, str]()
    while True:
        path, colon, last = rest.rpartition(":")
        name, equals, value = last.partition("=")
        if not (colon and path and equals and name in ("unet", "te", "lbw", *NOT_HONOURED)):
            break
        if name in NOT_HONOURED:
            raise RequestError(f"loras {text[:200]}: {name}= is not supported; leave it out")
        if name in named:
            raise RequestError(f"loras {text[:200]}: gives {name}= twice; leave one of them out")
        named[name] = value
        rest = path
    numbers: list[float] = []
    while len(numbers) < 2:
        path, colon, last = rest.rpartition(":")
        number = _strength(last)
        if not (colon and path) or number is None:
            break
        numbers.insert(0, number)
        rest = path
    twice = sorted(named.keys() & {"unet", "te"}) if len(numbers) == 2 else []
    if twice:
        raise RequestError(f"loras {text[:200]}: gives both strengths and {twice[0]}= too; leave one of them out")
    scale, text_scale = (*numbers, None, None)[:2]
    if "unet" in named:
        text_scale = next((value for value in (text_scale, scale) if value is not None), 1.0)
        scale = _named(text, "unet", named["unet"])
    if "te" in named:
        text_scale = _named(text, "te", named["te"])
    blocks = block_list(text, named["lbw"]) if "lbw" in named else ()
    return LoraRef(rest, 1.0 if scale is None else scale, text_scale, blocks)


def parse_lora_tag(inside: str) -> tuple[LoraRef, tuple[str, ...]]:
    """What stands between '<lora:' and '>' in a prompt: the LoRA by its name, and the arguments that are not honoured.

    As A1111 reads it: 'name:0.8' sets both strengths; of 'name:0.8:0.5' the first number is the **text's** and the second the
    network's, the other way round than in `parse_lora`; `te=`, `unet=` and `lbw=` name them, and a list with commas is block
    weights. RequestError for a strength that is no number.
    """
    name, *arguments = inside.split(":")
    named: dict[str, str] = {}
    numbers: list[float] = []
    left = []
    for argument in arguments:
        key, equals, value = argument.strip().partition("=")
        if equals and key in ("te", "unet", "lbw"):
            named[key] = value
        elif not equals and "," in key:
            named.setdefault("lbw", key)
        elif equals or len(numbers) >= 2:
            left.append(argument)
        elif key:
            numbers.append(_named(inside, "the tag", key))
    text_scale = _named(inside, "te", named["te"]) if "te" in named else (numbers[0] if numbers else 1.0)
    scale = _named(inside, "unet", named["unet"]) if "unet" in named else (numbers[1] if len(numbers) > 1 else text_scale)
    blocks = block_list(inside, named["lbw"]) if "lbw" in named else ()
    return LoraRef(name.strip(), scale, None if text_scale == scale else text_scale, blocks), tuple(left)


def tag_of(lora: LoraRef) -> str:
    """A LoRA as a prompt's tag, for the text of a picture: its file's name without folder and ending."""
    name = lora.path.replace("\\", "/").rstrip("/").rpartition("/")[2]
    name = name.removesuffix(".safetensors")
    text = lora.scale if lora.text_scale is None else lora.text_scale
    blocks = f":lbw={','.join(map(_plain, lora.blocks))}" if lora.blocks else ""
    return f"<lora:{name}:{_plain(text)}{'' if text == lora.scale else f':{_plain(lora.scale)}'}{blocks}>"


def block_list(where: str, text: str) -> tuple[float, ...]:
    """'1,0,0.5,...' as numbers. RequestError for a preset's name or a random weight, and for another count."""
    values = []
    for part in text.split(","):
        value = _strength(part)
        if value is None:
            random = part.strip() in ("R", "U", "X")
            reason = (
                "a random weight is not supported" if random else "give the weights as numbers; presets by name are not known"
            )
            raise RequestError(f"loras {where[:200]}: lbw={part.strip()[:40]}: {reason}")
        values.append(value)
    _check_blocks(where[:200], tuple(values))
    return tuple(values)


def _check_blocks(where: str, blocks: tuple[float, ...]) -> None:
    if len(blocks) not in BLOCK_LISTS:
        raise RequestError(f"loras {where}: lbw has {len(blocks)} block weights; give {COUNTS}")
    if not all(_is_number(value) and abs(value) <= LARGEST for value in blocks):
        raise RequestError(f"loras {where}: lbw takes weights from -100 to 100")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _strength(text: str) -> float | None:
    """A number as people write it; None for anything else, such as Python's 1_0 for 10."""
    if "_" in text or not text.isascii():
        return None
    try:
        return float(text)
    except ValueError:
        return None


def _named(where: str, name: str, text: str) -> float:
    value = _strength(text)
    if value is None:
        raise RequestError(f"loras {where[:200]}: {name} says {text[:40]!r}; give a number from -100 to 100")
    return value


def _plain(value: float) -> str:
    """A number without more digits than it needs to be read back the same."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))
