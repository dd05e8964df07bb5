"""What an option declares about itself, and what is read from the declaration.

An option is one dataclass field, `seed: Annotated[int, Option(help=...)] = 0`. The command line, the JSON bodies, the checks
of ranges, the docs and the Python signatures are all made from it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from hires.errors import RequestError, unknown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    PictureLike = str | Path | Image.Image | NDArray[np.uint8]
else:
    PictureLike = object  # a declaration needs neither numpy nor Pillow

Group = Literal["machine", "model", "image", "run"]
Panel = Literal["Picture", "Prompt", "Model", "Memory", "Quality", "Output"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What an option says about itself."""

    help: str
    flag: str | None = None
    """Its name on the command line, where that is not the field's."""
    metavar: str | None = None
    ge: float | None = None
    le: float | None = None
    gt: float | None = None
    choices: tuple[str, ...] | tuple[int, ...] = ()
    words: tuple[str, ...] = ()
    """Words that stand for a number, such as auto."""
    advice: str = ""
    """What an error tells the user to give instead; made from the bounds where it is empty."""
    group: Group = "image"
    """What it describes: the machine, the model, the image or the run."""
    panel: Panel = "Picture"
    """Its section in `--help`."""
    local: bool = False
    """Never taken from a network: paths, devices."""
    envvar: str | None = None
    """The environment variable that gives it where the command line does not."""
    python_only: str = ""
    """Why the command line has no such option; empty where it has one."""


@dataclass(frozen=True, slots=True)
class Field:
    """One declared option."""

    name: str
    """The Python name."""
    type: object
    """The type without the declaration."""
    option: Option
    """The declaration."""
    default: object
    """`dataclasses.MISSING` where there is none."""

    @property
    def required(self) -> bool:
        """Whether the option has no default."""
        return self.default is dataclasses.MISSING

    @property
    def flag(self) -> str:
        """Its name on the command line; the long one where it has two."""
        return (self.option.flag or "--" + self.name.replace("_", "-")).split()[-1]

    @property
    def types(self) -> tuple[object, ...]:
        """The members of its type, without None."""
        union = get_origin(self.type) in (Union, types.UnionType)
        return tuple(member for member in (get_args(self.type) if union else (self.type,)) if member is not type(None))

    @property
    def optional(self) -> bool:
        """Whether None is a value."""
        return type(None) in get_args(self.type)


_DECLARED: dict[type, Mapping[str, Field]] = {}


def declared(cls: type) -> Mapping[str, Field]:
    """The options of a dataclass by name; fields without a declaration are left out."""
    if cls not in _DECLARED:
        _DECLARED[cls] = types.MappingProxyType(_read_declarations(cls))
    return _DECLARED[cls]


def _read_declarations(cls: type) -> dict[str, Field]:
    hints = get_type_hints(cls, include_extras=True)
    options: dict[str, Field] = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if get_origin(hint) is Annotated and isinstance(get_args(hint)[1], Option):
            plain, option = get_args(hint)[:2]
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            options[field.name] = Field(field.name, plain, option, default)
    return options


class Options:
    """A dataclass of options, whose values are checked against their declarations."""

    def __post_init__(self) -> None:
        check(self)


def check(options: object) -> None:
    """Raise RequestError for the first value that its declaration does not allow; the message begins with the option's name."""
    for field in declared(type(options)).values():
        value = getattr(options, field.name)
        if value is None and field.optional:
            continue
        _check_type(field, value)
        option = field.option
        if isinstance(value, str):
            _check_text(field, value)
        elif isinstance(value, int | float) and not _within(value, option):
            raise RequestError(f"{field.name} {value!r}: give {_advice(field)}")


def _check_text(field: Field, value: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise RequestError(f"{field.name} {value!r}: give valid text")
    names = [str(name) for name in field.option.choices]
    if names and value not in names:
        raise RequestError(f"{field.name}: " + unknown(field.name.replace("_", " "), value, names))
    if field.option.words and value not in field.option.words:
        raise RequestError(f"{field.name} {value!r}: give {_advice(field)}")


def _check_type(field: Field, value: object) -> None:
    allowed = field.types
    plain = tuple(member for member in allowed if isinstance(member, type) and get_origin(member) is None)
    if len(plain) < len(allowed) or object in plain:  # a picture, a size, a sequence: checked where it is read
        return
    fits = isinstance(value, plain) and (not isinstance(value, bool) or bool in plain)
    whole_as_float = float in plain and isinstance(value, int) and not isinstance(value, bool)
    path_as_text = str in plain and isinstance(value, os.PathLike)
    if not (fits or whole_as_float or path_as_text):
        raise RequestError(f"{field.name} {value!r}: give {_advice(field)}")


def _within(value: float, option: Option) -> bool:
    if option.choices and not isinstance(value, bool) and value not in option.choices:
        return False
    if not math.isfinite(value):
        return False
    low = (option.ge is None or value >= option.ge) and (option.gt is None or value > option.gt)
    return low and (option.le is None or value <= option.le)


def _advice(field: Field) -> str:
    """What to give instead of a value that is not allowed."""
    option = field.option
    if option.advice:
        return option.advice
    if option.choices:
        return " or ".join(map(str, option.choices))
    if bool in field.types:
        return "True or False"
    if str in field.types:
        return "text"
    if not {int, float} & set(field.types):
        return " or ".join(getattr(member, "__name__", str(member)) for member in field.types)
    number = "a whole number" if int in field.types else "a number"
    if option.gt is not None:
        return f"{number} above {option.gt:g}" + ("" if option.le is None else f" and up to {option.le:g}")
    if option.ge is not None:
        return f"{number} " + (f"of {option.ge} or more" if option.le is None else f"from {option.ge} to {option.le}")
    return number


def flags_of(*classes: type) -> dict[str, str]:
    """The flag of each option of these classes, by the option's name."""
    fields = [field for cls in classes for field in declared(cls).values()]
    return {field.name: field.flag for field in fields if not field.option.python_only}


def with_flags(message: str, flags: Mapping[str, str], leading: bool = True) -> str:
    """A message with its options as the command line writes them; flags: by the option's name.

    A name is an option where the message begins with it (`tile_px 0: ...`), with `leading`, or where it stands in backquotes;
    in these it may have the value None, which has a flag of its own.
    """
    if leading:
        message = re.sub(r"^([a-z_]+)(?=[ :=])", lambda match: flags.get(match[1], match[1]), message)
    return re.sub(r"`([a-z_]+(?:=None)?)`", lambda match: flags.get(match[1], match[0]), message)


Chosen = TypeVar("Chosen")


def chosen(cls: type[Chosen], function: str, keywords: Mapping[str, object]) -> Chosen:
    """The options of a call. TypeError for a keyword that is not declared, RequestError for a value that is not allowed."""
    fields = declared(cls)
    for name in keywords:
        if name not in fields:
            raise TypeError(f"{function}() takes no option {name!r}: " + unknown("option", name, fields))
    make: Callable[..., Chosen] = cls
    return make(**keywords)
