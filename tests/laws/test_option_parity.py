"""Every option is the same everywhere: Python, command line, HTTP and plan take it, or a reason says why not."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer
from pydantic import ValidationError
from typer.testing import CliRunner

import hires
from hires.cli.app import app
from hires.cli.render import EDIT, PLAN, RENDER
from hires.cli.upscale import UPSCALE
from hires.errors import HiresError, RequestError
from hires.options.declarations import LoadOptions
from hires.options.fields import check, declared, flags_of, with_flags
from hires.options.keywords import EditKeywords, LoadKeywords, PlanKeywords, RenderKeywords, UpscaleKeywords
from hires.options.plan import PlanOptions
from hires.options.render import NOT_APPLICABLE, EditOptions, JournalOptions, RenderOptions, RenderRequest
from hires.options.table import COMMANDS, option_table
from hires.options.upscale import UpscaleOptions
from hires.server.bodies import EditTask, RenderTask, Task, UpscaleTask
from tests.support.count_options import MOST, declarations

FLAGS = Path(__file__).parent.parent / "resources" / "cli_flags.json"
KEYWORDS = {"render": RenderKeywords, "edit": EditKeywords, "upscale": UpscaleKeywords, "plan": PlanKeywords}
BODIES: dict[str, type[Task]] = {"render": RenderTask, "edit": EditTask, "upscale": UpscaleTask}
LINES = {"render": RENDER, "edit": EDIT, "upscale": UPSCALE, "plan": PLAN}


@pytest.mark.parametrize("name", sorted(set(declared(RenderOptions)) | set(declared(EditOptions))))
def test_render_edit_and_plan_take_every_option_or_say_why_not(name: str) -> None:
    for command, cls in (("render", RenderOptions), ("edit", EditOptions), ("plan", PlanOptions)):
        reason = NOT_APPLICABLE.get(command, {}).get(name)
        assert (name in declared(cls)) != bool(reason), f"{command}: {name} is neither taken nor declared not applicable"


@pytest.mark.parametrize("command", ["render", "edit", "upscale"])
def test_plan_takes_all_that_the_commands_take(command: str) -> None:
    missing = set(declared(COMMANDS[command])) - set(declared(PlanOptions)) - {"prompt"}  # the first argument of plan
    assert not missing


@pytest.mark.parametrize("command", COMMANDS)
def test_the_keywords_are_those_declared(command: str) -> None:
    own = {"model": str} if command == "edit" else {}  # required, so it is an argument of its own
    fields = {name: field.type for name, field in declared(COMMANDS[command]).items()}
    assert get_type_hints(KEYWORDS[command]) | own == fields


def test_load_takes_what_belongs_to_the_machine_and_the_model() -> None:
    options = declared(RenderOptions)
    shared = {name for name, field in options.items() if field.option.group in ("machine", "model")}
    assert set(declared(LoadOptions)) == shared | {"keep_weights"}  # a one-shot render keeps nothing
    hints = {name: field.type for name, field in declared(LoadOptions).items() if name != "model"}
    assert get_type_hints(LoadKeywords) == hints


@pytest.mark.parametrize("command", COMMANDS)
def test_the_signature_and_the_docstring_list_every_option(command: str) -> None:
    function = getattr(hires, command)
    for name, field in declared(COMMANDS[command]).items():
        parameter = inspect.signature(function).parameters[name]
        assert field.required or parameter.default == field.default
        assert f"{name}: " in inspect.getdoc(function)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_takes_every_option(command: str) -> None:
    found = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    flags = {flag for each in found.params for flag in each.opts}
    for name, field in declared(COMMANDS[command]).items():
        assert field.option.python_only or field.flag in flags, name


@pytest.mark.parametrize("command", BODIES)
def test_http_takes_every_option_that_is_not_local(command: str) -> None:
    for name, field in declared(COMMANDS[command]).items():
        assert (name in BODIES[command].model_fields) != field.option.local, name


@pytest.mark.parametrize("name", [name for name, field in declared(RenderOptions).items() if field.option.local])
def test_http_refuses_a_local_option(name: str) -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        RenderTask(prompt="a lake", **{name: None})


def test_no_flag_of_before_is_lost() -> None:
    """The flags and metavars of the commands before options were declared once; only more may come."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for command, flags in json.loads(FLAGS.read_text()).items():
        found = {flag: each.metavar for each in commands[command].params for flag in each.opts}
        for flag, metavar in flags.items():
            assert flag in found, f"{command} has lost {flag}"
            assert metavar is None or found[flag] == metavar


def test_help_has_its_sections() -> None:
    shown = CliRunner().invoke(app, ["render", "--help"]).stdout
    places = [shown.index(f"{title}:\n") for title in ("Picture", "Model", "Memory", "Quality", "Output")]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("options", "python", "flag"),
    [
        ({"tile_px": 0}, "tile_px 0: ", "--tile 0: "),
        ({"position_mode": "here"}, "position_mode: unknown", "--positions: unknown"),
        ({"strength": 2.0}, "strength 2.0: ", "--strength 2.0: "),
        ({"steps": True}, "steps True: ", "--steps True: "),
        ({"overwrite": 1}, "overwrite 1: give True or False", "--overwrite 1: "),
        ({"negative": "\ud800"}, "negative ", "--negative "),
    ],
)
def test_an_error_names_the_python_option_and_the_command_line_its_flag(
    options: dict[str, Any], python: str, flag: str
) -> None:
    with pytest.raises(RequestError) as caught:
        RenderOptions(**options)
    assert str(caught.value).startswith(python)
    assert with_flags(str(caught.value), flags_of(RenderOptions)).startswith(flag)


def test_flags_replace_names_in_backquotes_and_nothing_else() -> None:
    message = "seconds 3: `stages` and `model`, a model of `hires info`"
    assert with_flags("vae: an autoencoder", {"vae": "--vae"}, leading=False).startswith("vae: ")
    shown = with_flags(message, flags_of(RenderOptions, JournalOptions))
    assert shown == "--journal-seconds 3: --stage and --model, a model of `hires info`"


def test_a_keyword_that_is_no_option_is_a_type_error_with_a_hint() -> None:
    with pytest.raises(TypeError, match="did you mean 'tile_px'"):
        hires.plan("a lake", size="512x512", tile_pxx=4)  # type: ignore[call-arg]


def test_the_request_is_checked_by_the_same_declarations() -> None:
    shared = declared(RenderRequest)
    for name in ("steps", "seed", "tile_px", "guidance", "strength", "image_guidance", "strategy"):
        assert shared[name].option == (declared(RenderOptions) | declared(EditOptions))[name].option
    check(RenderOptions())


PLANS = [
    ({"strength": 0.5}, "how much of a picture"),
    ({"mask": "m.png"}, "says where a picture is drawn anew"),
    ({"image_guidance": 1.5}, "draws from text"),
    ({"scale": 2.0}, "give the picture to enlarge"),
    ({"output": "a.gif"}, "must end in"),
]


@pytest.mark.parametrize(("options", "words"), PLANS)
def test_plan_refuses_what_a_render_would(options: dict[str, Any], words: str) -> None:
    with pytest.raises(HiresError, match=words):
        hires.plan("a lake", **({"size": "512x512", "vram": "8GB"} | options if "scale" not in options else options))


def test_plan_reads_the_size_of_a_picture_from_its_header_alone(tmp_path: Path) -> None:
    from PIL import Image

    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (320, 256)).save(tmp_path / "a.png")
    Image.new("RGB", (320, 256)).save(tmp_path / "turned.jpg", exif=turned)
    with (tmp_path / "a.png").open("r+b") as opened:
        opened.truncate(60)  # its header and no pixel
    assert str(hires.plan(init=tmp_path / "a.png", strength=0.5, vram="8GB").canvas) == "320x256"
    assert str(hires.plan(init=tmp_path / "turned.jpg", vram="8GB").canvas) == "256x320"


def test_plan_of_a_refinement(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (128, 96)).save(tmp_path / "a.png")
    made = hires.plan(picture=str(tmp_path / "a.png"), scale=4, refine=True, vram="8GB")
    assert str(made.canvas) == "512x384"
    assert [guide.cutoff for guide in made.stages[-1].guides] == [0.125], "held to what the given picture shows"


def test_plan_on_the_command_line_takes_a_picture(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (320, 256)).save(tmp_path / "a.png")
    line = ["plan", "--init", str(tmp_path / "a.png"), "--strength", "0.5", "--vram", "8GB", "--json"]
    done = CliRunner().invoke(app, line)
    assert json.loads(done.stdout)["canvas"] == {"height": 256, "width": 320}
    refused = CliRunner().invoke(app, ["plan", "--size", "64x64", "--strength", "0.5"])
    assert refused.exit_code == 2
    assert "--strength 0.5: how much of a picture to draw anew; give the picture with --init" in refused.stderr


def test_the_table_lists_every_option() -> None:
    table = option_table()
    for cls in COMMANDS.values():
        for name in declared(cls):
            assert f"| `{name}` |" in table
    assert all(reason in table for reasons in NOT_APPLICABLE.values() for reason in reasons.values())


def test_an_enlargement_without_a_diffusion_model_says_that_there_is_nothing_to_plan() -> None:
    from PIL import Image

    with pytest.raises(RequestError, match="nothing to plan without `refine`"):
        hires.plan(picture=Image.new("RGB", (64, 64)), scale=2.0, vram="8GB")
    assert declared(UpscaleOptions)["scale"].option.le == 1000


def test_options_are_declared_once() -> None:
    assert sum(declarations().values()) <= MOST
