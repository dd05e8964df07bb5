"""The command line's parameters, made from the declarations of the options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, replace
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from hires.errors import RequestError
from hires.options.declarations import JournalOptions, ModelOptions
from hires.options.fields import Field, Option, Options, declared

PANELS = ("Picture", "Prompt", "Model", "Memory", "Quality", "Output")
Given = dict[str, Any]
"""What the command line gives for a command, by the names of its parameters."""


@dataclass(frozen=True, kw_only=True)
class JournalFlags:
    """How unfinished work is kept; the others are those of `JournalOptions`."""

    no_journal: Annotated[
        bool, Option(help="Keep no track of the render: what stops it loses it.", group="run", panel="Output")
    ] = False


@dataclass(frozen=True, kw_only=True)
class PreviewFlags:
    """A picture of each step."""

    preview: Annotated[
        str | None,
        Option(
            help="A PNG that shows each step, sharper with --tiny-vae; overwritten.",
            metavar="FILE",
            group="run",
            panel="Output",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class MeasuringFlags:
    """What is measured beside a render."""

    profile: Annotated[
        str | None,
        Option(
            help="Write a trace (.json) of the first steps; print the costliest operators.",
            metavar="FILE",
            group="run",
            panel="Output",
        ),
    ] = None
    memory_timeline: Annotated[
        str | None,
        Option(help="Draw planned and measured memory (.png, .svg; extra plot).", metavar="FILE", group="run", panel="Output"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class JsonFlags:
    """Output for programs."""

    as_json: Annotated[
        bool,
        Option(help="Print one JSON document on stdout and nothing else there.", flag="--json", group="run", panel="Output"),
    ] = False


@dataclass(frozen=True, kw_only=True)
class ReportFlags(JsonFlags):
    """What is printed."""

    quiet: Annotated[bool, Option(help="No progress, no summary.", group="run", panel="Output")] = False


@dataclass(frozen=True, kw_only=True)
class DrawingFlags:
    """Where a plan is drawn."""

    svg: Annotated[str | None, Option(help="Draw the plan to an SVG.", metavar="FILE", group="run", panel="Output")] = None
    png: Annotated[str | None, Option(help="Draw the plan to a PNG.", metavar="FILE", group="run", panel="Output")] = None


@dataclass(frozen=True, kw_only=True)
class BatchFlags:
    """How the files of a folder are written."""

    suffix: Annotated[
        str | None,
        Option(help="Format of the files in a folder; default: their own.", metavar=".EXT", group="run", panel="Output"),
    ] = None


MOST_PICTURES = 10_000


@dataclass(frozen=True, kw_only=True)
class CountFlags(Options):
    """How many pictures of a prompt are drawn."""

    count: Annotated[
        int | None,
        Option(
            help="Pictures of each prompt, with the seeds SEED, SEED + 1, ...",
            metavar="N",
            ge=1,
            le=MOST_PICTURES,
            group="run",
            panel="Picture",
            advice=f"a number of pictures from 1 to {MOST_PICTURES}",
        ),
    ] = None


def whole(text: str) -> int:
    """An integer."""
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no whole number") from None


def number(text: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number") from None


def level(text: str) -> float | str:
    """'auto' or a number."""
    return text if text == "auto" else number(text)


def argument(
    name: str, metavar: str, help: str, default: object = inspect.Parameter.empty, *, kind: type = str
) -> inspect.Parameter:
    """A positional argument of a command, of type `kind`."""
    annotation = Annotated[kind, typer.Argument(metavar=metavar, help=help, show_default=False)]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation)


def parameter(field: Field, panel: str | None = None) -> Any:
    """What Typer reads an option from: the type of its values on the command line, and its declaration."""
    option = field.option
    kind, parser = _reading(field)
    names = (option.flag or field.flag).split()
    default: dict[str, Any] = {"parser": parser} if parser is not None else {}
    if field.required:
        default["show_default"] = False
    if option.envvar is not None:
        default["envvar"] = option.envvar
    info = typer.Option(*names, help=option.help, metavar=option.metavar, rich_help_panel=panel or option.panel, **default)
    return Annotated[kind, info]


def _reading(field: Field) -> tuple[Any, Callable[[str], Any] | None]:
    """The type that Typer reads an option as, and the function that parses it where Typer does not."""
    kinds = field.types
    plain: Any
    if bool in kinds:
        return bool, None
    if any(getattr(kind, "__origin__", None) not in (None, tuple) for kind in kinds):
        return list[str] | None, None
    if float in kinds and str in kinds:
        return Any, level
    if float in kinds:
        plain, parser = float, number
    elif int in kinds and str not in kinds:
        plain, parser = int, whole
    else:
        return (str if _is_given(field) else str | None), None
    return (plain if _is_given(field) else plain | None), parser


def _is_given(field: Field) -> bool:
    return field.required or field.default is not None


Family = parameter(declared(ModelOptions)["family"])
Parts = parameter(declared(ModelOptions)["parts"])
AsJson = parameter(declared(JsonFlags)["as_json"])


class SectionedCommand(TyperCommand):
    """A command whose `--help` lists its options in sections, as plain text."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options section by section; sections without one are left out."""
        sections: dict[str, list[tuple[str, str]]] = {name: [] for name in ("Arguments", *PANELS)}
        for each in self.get_params(ctx):
            record = each.get_help_record(ctx)
            if record is not None:
                argument = each.param_type_name == "argument"
                panel = "Arguments" if argument else getattr(each, "rich_help_panel", None) or "Other options"
                sections.setdefault(panel, []).append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command of the command line: its arguments, and the classes that declare its options."""

    arguments: Sequence[inspect.Parameter] = ()
    options: Sequence[type] = ()
    required: Sequence[str] = ()
    """Options that must be given here."""
    changes: Mapping[str, Option] | None = None
    """By option, what takes the place of its declaration here."""
    panels: Mapping[str, str] | None = None
    """By option, its section of the help."""
    sections: bool = True
    """Whether the help lists the options in sections; in one list, in the order of their declarations, otherwise."""

    def add(self, app: typer.Typer, name: str, run: Callable[[Given], None], help: str | None = None) -> None:
        """Register `run`, which gets the values of all parameters by name; its docstring is the help where none is given."""

        def called(**given: Any) -> None:
            run(given)

        parameters = list(self.arguments)
        for field in self.fields().values():
            default = inspect.Parameter.empty if field.required else None if field.default == () else field.default
            annotation = parameter(field, (self.panels or {}).get(field.name))
            parameters.append(
                inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            )
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__doc__ = run.__doc__
        called.__annotations__ = {each.name: each.annotation for each in parameters}
        app.command(name, cls=SectionedCommand if self.sections else None, help=help)(called)

    def fields(self) -> dict[str, Field]:
        """The declared options, those first that stand first in the help."""
        options: dict[str, Field] = {}
        for cls in self.options:
            for name, field in declared(cls).items():
                if not field.option.python_only:
                    options[name] = self._changed(field)
        if not self.sections:
            return options
        return dict(sorted(options.items(), key=lambda entry: PANELS.index(entry[1].option.panel)))

    def _changed(self, field: Field) -> Field:
        option = (self.changes or {}).get(field.name, field.option)
        return replace(field, option=option, default=MISSING if field.name in self.required else field.default)


def keywords(cls: type, given: Given) -> Given:
    """The options of `cls` in what the command line gives, as a Python function takes them."""
    return {name: given[name] for name in declared(cls) if given.get(name) is not None}


def journal(given: Given) -> JournalOptions | None:
    """How a render's unfinished work is kept; None for not at all."""
    if given["no_journal"] and (given["resume"] or given["restart"]):
        raise RequestError("--no-journal: there is nothing to go on from or to throw away without a journal; leave it out")
    return None if given["no_journal"] else JournalOptions(**keywords(JournalOptions, given))
