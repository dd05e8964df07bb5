"""What `import hires` offers: one list of names, each of which resolves."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

import hires


def test_dir_is_the_public_api() -> None:
    assert dir(hires) == list(hires.__all__)


@pytest.mark.parametrize("name", hires.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(hires, name) is not None


@pytest.mark.parametrize("name", ["inspect", "load", "measure", "render", "upscale", "Upscaler"])
def test_a_public_function_tells_its_arguments_and_errors(name: str) -> None:
    text = inspect.getdoc(getattr(hires, name)) or ""
    assert callable(getattr(hires, name)) and "Args:" in text and "Raises:" in text


def test_a_name_stays_what_it_is_when_its_module_is_imported() -> None:
    """`import hires.checkpoints.inspect` must not put a module in the place of `hires.inspect`."""
    for name, home in hires._HOMES.items():
        given = getattr(hires, name)
        importlib.import_module(home)
        assert getattr(hires, name) is given and (name == "errors") == inspect.ismodule(given), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hires.nothing  # type: ignore[attr-defined]


def test_the_package_is_a_command_and_loads_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-m", "hires", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"hires {hires.__version__}\n")
    code = "import sys, hires; dir(hires); assert not {'torch', 'numpy', 'typer'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
