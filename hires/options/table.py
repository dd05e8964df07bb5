"""Makes the docs' option table, docstrings and signatures of the declarations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TypeVar

from hires.options.fields import Field, declared
from hires.options.plan import PlanOptions
from hires.options.render import NOT_APPLICABLE, EditOptions, RenderOptions
from hires.options.upscale import UpscaleOptions

COMMANDS: Mapping[str, type] = {
    "render": RenderOptions,
    "edit": EditOptions,
    "upscale": UpscaleOptions,
    "plan": PlanOptions,
}
"""The options of each command and Python function."""


def option_table() -> str:
    """All options as a markdown table: Python name, flag, where each is taken, bounds and meaning."""
    names = dict.fromkeys(name for cls in COMMANDS.values() for name in declared(cls))
    lines = [
        "| Python | Command line | Default | Taken by | HTTP | Meaning |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in names:
        fields = {command: declared(cls)[name] for command, cls in COMMANDS.items() if name in declared(cls)}
        field = next(iter(fields.values()))
        flag = "" if field.option.python_only else f"`{field.option.flag or field.flag}`".replace(" ", ", ")
        cells = (
            f"`{name}`",
            flag,
            default_text(field),
            ", ".join(fields),
            "" if field.option.local else "yes",
            _meaning(field),
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    for command, reasons in NOT_APPLICABLE.items():
        lines += ["", f"`{command}` does not take:", ""]
        lines += [f"- `{name}`: {reason}" for name, reason in reasons.items()]
    return "\n".join(lines) + "\n"


def default_text(field: Field) -> str:
    """The default as the docs write it; empty for None and for options of Python only."""
    return "" if field.required or field.default in (None, (), "") or field.option.python_only else f"`{field.default}`"


def _meaning(field: Field) -> str:
    option = field.option
    bounds = [f"from {option.ge:g}"] if option.ge is not None else [f"above {option.gt:g}"] if option.gt is not None else []
    bounds += [f"up to {option.le:g}"] if option.le is not None else []
    return option.help + (f" ({' '.join(bounds)})" if bounds else "")


Function = TypeVar("Function", bound=Callable[..., object])


def with_options(cls: type) -> Callable[[Function], Function]:
    """Write the options of `cls` into a function's signature and docstring, where it takes them as `**options`."""

    def documented(function: Function) -> Function:
        lines = [f"        {name}: {field.option.help}" for name, field in declared(cls).items()]
        function.__doc__ = (
            inspect.cleandoc(function.__doc__ or "") + "\n\n" + inspect.cleandoc("\n".join(["    Options:", *lines]))
        )
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        named = {each.name for each in own}
        options = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.required else field.default,
                annotation=field.type,
            )
            for name, field in declared(cls).items()
            if name not in named
        ]
        function.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
        return function

    return documented
