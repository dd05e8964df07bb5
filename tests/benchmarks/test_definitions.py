"""The key of a benchmark row changes with what code defines, not with where it stands."""

from __future__ import annotations

from pathlib import Path

from benchmarks.common import digest
from benchmarks.definitions import definitions
from benchmarks.report.changed import defined, differing

BEFORE = '''"""A module."""

from hires import errors
from hires.tiling.geometry import Size as Sides

NAMES = {"a": "hires.errors.RequestError"}
"""What it holds."""


def area(size: Sides) -> int:
    """In pixels."""
    from hires.tiling import geometry

    if size is None:
        raise errors.RequestError("no size")
    return geometry.round_up(size.height, 2)
'''
AFTER = """from hires.errors import RequestError
from hires.tiling.geometry import Size, round_up


def area(size: Size) -> int:
    if size is None:
        raise RequestError("no size")
    return round_up(size.height, 2)


NAMES = {"a": "hires.other.RequestError"}
"""


def test_a_move_keeps_what_is_defined() -> None:
    assert sorted(definitions(BEFORE)) == sorted(definitions(AFTER))


def test_a_changed_value_changes_it() -> None:
    assert sorted(definitions(AFTER)) != sorted(definitions(AFTER.replace("2)", "3)")))


def test_a_method_of_a_value_keeps_its_owner() -> None:
    assert definitions("from hires.errors import names\nx = names.first") != definitions("x = first")


def test_splitting_a_file_keeps_its_digits_and_data_counts_by_bytes(tmp_path: Path) -> None:
    whole, one, two, data = (tmp_path / name for name in ("whole.py", "one.py", "two.py", "weights.json"))
    whole.write_text("import os\n\nA = 1\n\nB = 2\n")
    one.write_text("B = 2\n")
    two.write_text("A = 1\n")
    data.write_text("{}")
    assert digest([whole, data]) == digest([one, two, data])
    before = digest([data])
    data.write_text("{ }")
    assert digest([data]) != before


def test_what_moved_is_the_same_and_what_differs_is_listed(tmp_path: Path) -> None:
    files = {
        "before/hires/one.py": "LIMIT = 2\n\n\ndef area(side):\n    return side**2\n\n\ndef half(x):\n    return x / 2\n",
        "now/hires/rooms/two.py": 'def area(side):\n    """In pixels."""\n    return side**2\n',
        "now/hires/one.py": "LIMIT = 3\n\n\nclass Box:\n    pass\n",
    }
    for name, source in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    assert differing(defined(tmp_path / "before"), defined(tmp_path / "now")) == [
        ("new", "Box", "", "hires/one.py"),
        ("changed", "LIMIT", "hires/one.py", "hires/one.py"),
        ("gone", "half", "hires/one.py", ""),
    ]
