"""What an engine that stays is worth: time left, many prompts, a start.

    python -m benchmarks engine                        # ten minutes on two quiet cores
    python -m benchmarks engine --parts many,start     # without the time left at 1024 and 2048 px
    python -m benchmarks engine --quick                # a little of each part at toy sizes, into no file

`eta` holds `eta_seconds` of every event against what was truly left; `many` draws the same prompts by a command each, by
`engine.render` and by `engine.render_many`; `start` is a whole command beside the import of torch. Each row has a process of
its own, on a machine without a calibration; those that results/engine.csv has for the same code are kept, and pictures lie in
runs/engine. The last line of stdout is one JSON document; the exit code is 1 where a limit is broken. What a start should take
stands under "wanted": it is known to be missed, and breaks nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import RESULTS, code_of_pictures, digest, file_of
from benchmarks.demo.held_out import held_out_scenes
from benchmarks.rows import ROOT, STATE, Case, Row, Suite, carried_out, child, newest, sides_of
from benchmarks.suites.demo import START

if TYPE_CHECKING:
    from hires.engine.resident import Engine
    from hires.events import Event

Rows = Sequence[Mapping[str, Any]]
Moment = tuple[float, float | None]
"""When an event came, by the process's clock, and its `eta_seconds`."""


class CommandSuite(Suite):
    """A suite whose rows are of the command line too."""

    def settings(self) -> str:
        """Changes with the code and the weights that the rows come from, the fronts that a command goes through included."""
        package = ROOT / "hires"
        fronts = [package / "__init__.py", *(package / "cli").rglob("*.py")]
        return digest([*code_of_pictures(), *fronts, *(file_of(name) for name in ("rows", *self.code))])


SUITE = CommandSuite(
    name="engine",
    key=("part", "side", "prompts", "way", "round"),
    columns=("seconds", "eta_at_tenth", "eta_largest", "largest_difference_255", "import_torch_s", "stages_s", "over_stages"),
    code=("bench_engine", "bench_demo"),
)
PICTURES = Path("runs/engine")
SIDES = (1024, 2048)
MANY_SIDE, START_SIDE, QUICK_SIDE, PROMPTS = 256, 64, 256, 8
TENTH, NEARLY = 0.1, 0.9
"""Of the seconds of drawing: where the time left must be known, and up to where it is looked at; near the end it is nothing."""
ETA_WITHIN = 0.25
OF_PROCESSES, OF_RENDERS, SAME_255 = 0.2, 0.9, 1
WANTED_OVER_STAGES = 2.0
FIRST, SECOND = "first render", "second render"
RENDERS = {FIRST: 1, SECOND: 2}
PROCESSES, ENGINE, MANY, WHOLE = "hires render", "engine.render", "render_many", "render_many with its start"
WHOLE_SCRIPT = """import sys
from pathlib import Path
import hires
size, folder, *prompts = sys.argv[1:]
with hires.load() as engine:
    for number, result in enumerate(engine.render_many(prompts, size=size)):
        result.save(Path(folder) / f"{number}.png", overwrite=True)"""


@contextmanager
def never_calibrated() -> Iterator[None]:
    """Processes that start within find no calibration of this machine."""
    before = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        try:
            yield
        finally:
            del os.environ["XDG_CACHE_HOME"]
            if before is not None:
                os.environ["XDG_CACHE_HOME"] = before


def command(*arguments: str) -> tuple[float, str]:
    """Seconds of a whole Python process on this tree, and its stdout. RuntimeError with what it said where it fails.

    It keeps what Python compiled, as a user's does, and has as many threads as this process.
    """
    import torch

    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment = inherited | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    begun = time.perf_counter()
    ended = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - begun
    if ended.returncode:
        raise RuntimeError(f"python {arguments[2:]}: exit code {ended.returncode}\n{ended.stderr[-2000:]}")
    return seconds, ended.stdout


def rendered(prompt: str, side: int, picture: Path, *options: str) -> tuple[float, str]:
    """`hires render` as a whole command; errors as of `command`."""
    return command("-c", START, "render", prompt, "--size", f"{side}x{side}", "-o", str(picture), "--overwrite", *options)


def captions(count: int) -> list[str]:
    return [scene.caption for scene in held_out_scenes(count)]


def heard(engine: Engine, side: int) -> tuple[list[Moment], float]:
    """The moments of a render into a file, loading apart, and when it was done."""
    moments: list[Moment] = []

    def hear(event: Event) -> None:
        if event.stage != "load":
            moments.append((time.perf_counter(), event.eta_seconds))

    with tempfile.TemporaryDirectory() as folder:
        engine.render(captions(1)[0], size=(side, side), output=Path(folder) / "picture.png", on_event=hear)
        return moments, time.perf_counter()


def eta_errors(moments: Sequence[Moment], end: float) -> Row:
    """How far `eta_seconds` was from what was left, as a share of that: first after a tenth, and at most up to 90 %.

    One that is not known is as wrong as one of no seconds.
    """
    begun = moments[0][0]
    whole = end - begun
    after = [(at, abs((eta or 0.0) / (end - at) - 1)) for at, eta in moments if at >= begun + TENTH * whole]
    errors = [error for at, error in after if at <= begun + NEARLY * whole] or [after[0][1]]
    return {"seconds": round(whole, 2), "eta_at_tenth": round(after[0][1], 3), "eta_largest": round(max(errors), 3)}


def measured_eta(case: Case) -> Row:
    """The last of the renders that an engine draws."""
    import hires

    with hires.load() as engine:
        for _ in range(RENDERS[case["way"]]):
            moments, end = heard(engine, int(case["side"]))
    return eta_errors(moments, end)


def by_commands(prompts: Sequence[str], side: int, folder: Path) -> float:
    """Seconds of a `hires render` for each prompt."""
    return sum(rendered(prompt, side, folder / f"{number}.png")[0] for number, prompt in enumerate(prompts))


def by_engine(prompts: Sequence[str], side: int, folder: Path) -> float:
    """Seconds of a render for each prompt, on an engine that has drawn another."""
    with warm_engine(len(prompts), side) as engine:
        begun = time.perf_counter()
        for number, prompt in enumerate(prompts):
            engine.render(prompt, size=(side, side)).save(folder / f"{number}.png", overwrite=True)
        return time.perf_counter() - begun


def together(prompts: Sequence[str], side: int, folder: Path) -> float:
    """Seconds of `render_many`, on an engine that has drawn another prompt."""
    with warm_engine(len(prompts), side) as engine:
        begun = time.perf_counter()
        for number, result in enumerate(engine.render_many(prompts, size=(side, side))):
            result.save(folder / f"{number}.png", overwrite=True)
        return time.perf_counter() - begun


def together_from_start(prompts: Sequence[str], side: int, folder: Path) -> float:
    """Seconds of a process that loads the model and draws all prompts."""
    return command("-c", WHOLE_SCRIPT, f"{side}x{side}", str(folder), *prompts)[0]


@contextmanager
def warm_engine(known: int, side: int) -> Iterator[Engine]:
    """An engine that has drawn a prompt which is none of the first `known` captions."""
    import hires

    with hires.load() as engine:
        engine.render(captions(known + 1)[-1], size=(side, side))
        yield engine


WAYS: dict[str, Callable[[Sequence[str], int, Path], float]] = {
    ENGINE: by_engine,
    MANY: together,
    PROCESSES: by_commands,
    WHOLE: together_from_start,
}
"""The first draws what the pictures of all are held against."""


def measured_many(case: Case) -> Row:
    """Every prompt into a file by one of the ways; the pictures of `engine.render` are drawn first where they are not here."""
    prompts, side = captions(int(case["prompts"])), int(case["side"])
    own, reference = (Path(case["pictures"]) / f"{side} {way}" for way in (case["way"], ENGINE))
    for folder in (own, reference):
        folder.mkdir(parents=True, exist_ok=True)
    took = WAYS[case["way"]](prompts, side, own)
    names = [f"{number}.png" for number in range(len(prompts))]
    if not all((reference / name).exists() for name in names):
        WAYS[ENGINE](prompts, side, reference)
    return {"seconds": round(took, 2), "largest_difference_255": max(difference(own / n, reference / n) for n in names)}


def difference(first: Path, second: Path) -> int:
    """The largest between two pictures of 8 bits, 0 to 255."""
    import numpy as np
    from PIL import Image

    one, other = (np.asarray(Image.open(path)).astype(int) for path in (first, second))
    return int(np.abs(one - other).max())


def measured_start(case: Case) -> Row:
    """The import of torch, then a whole command, with the seconds that its stages took by its own words."""
    torch_s, _ = command("-c", "import torch")
    with tempfile.TemporaryDirectory() as folder:
        took, said = rendered(captions(1)[0], int(case["side"]), Path(folder) / "picture.png", "--json")
    stages = sum(stage["seconds"] for stage in json.loads(said.splitlines()[-1])["stats"])
    return {
        "seconds": round(took, 3),
        "import_torch_s": round(torch_s, 3),
        "stages_s": round(stages, 3),
        "over_stages": round((took - torch_s) / stages, 2),
    }


PARTS: dict[str, Callable[[Case], Row]] = {"eta": measured_eta, "many": measured_many, "start": measured_start}


def measured(case: Case) -> Row:
    return PARTS[case["part"]](case)


def cases(sides: Sequence[int], rounds: int, pictures: Path) -> list[dict[str, str]]:
    """Starts, the time left once for every size and render, the ways of many prompts in turn."""
    turns = range(1, rounds + 1)
    told = [("start", START_SIDE, 1, PROCESSES, turn) for turn in turns]
    told += [("eta", side, 1, way, 1) for side in sides for way in RENDERS]
    told += [("many", MANY_SIDE, PROMPTS, way, turn) for turn in turns for way in WAYS]
    return [as_case(*values, pictures) for values in told]


def quick_cases(pictures: Path) -> list[dict[str, str]]:
    """The least that shows each part: one command, a first render, two prompts on an engine in both ways."""
    told = [("start", START_SIDE, 1, PROCESSES), ("eta", QUICK_SIDE, 1, FIRST)]
    told += [("many", START_SIDE, 2, way) for way in (ENGINE, MANY)]
    return [as_case(*values, 1, pictures) for values in told]


def as_case(part: str, side: int, prompts: int, way: str, turn: int, pictures: Path) -> dict[str, str]:
    return dict(zip(SUITE.key, (part, str(side), str(prompts), way, str(turn)), strict=True)) | {"pictures": str(pictures)}


def of_part(rows: Rows, part: str, way: str | None = None) -> list[Mapping[str, Any]]:
    """The rows of a part that ran."""
    return [row for row in rows if row["part"] == part and row["way"] in (way or row["way"],) and row[STATE] == "ran"]


def median(rows: Rows, column: str) -> float:
    return statistics.median(float(row[column]) for row in rows)


def seconds_of_ways(rows: Rows) -> dict[str, float]:
    """Median seconds of the ways of many prompts that ran, in the order of `WAYS`."""
    own = {way: of_part(rows, "many", way) for way in WAYS}
    return {way: median(part, "seconds") for way, part in own.items() if part}


def kept(rows: Rows, timed: bool = True) -> dict[str, bool]:
    """Every row ran, the time left is known after a tenth, many prompts together are quicker, to the same pictures."""
    verdict = {f"{row['part']} {row['side']} {row['way']}: ran": False for row in rows if row[STATE] != "ran"}
    for row in of_part(rows, "eta") if timed else ():
        error = float(row["eta_at_tenth"])
        verdict[f"eta {row['side']} {row['way']}: {error:.0%} off at a tenth, at most {ETA_WITHIN:.0%}"] = error <= ETA_WITHIN
    took = seconds_of_ways(rows)
    for other, limit in ((PROCESSES, OF_PROCESSES), (ENGINE, OF_RENDERS)):
        if timed and {MANY, other} <= took.keys():
            share = took[MANY] / took[other]
            verdict[f"{MANY}: {share:.2f} of the seconds of {other}, at most {limit:g}"] = share <= limit
    if took:
        most = max(int(row["largest_difference_255"]) for row in of_part(rows, "many"))
        verdict[f"many: largest difference {most}, at most {SAME_255}"] = most <= SAME_255
    return verdict


def over_stages(starts: Rows) -> float:
    """What a command takes beside the import of torch, over what its stages take: of the medians."""
    return (median(starts, "seconds") - median(starts, "import_torch_s")) / median(starts, "stages_s")


def wanted(rows: Rows) -> dict[str, bool]:
    """What is not promised: how long a start takes beside the picture, and beside eight of them."""
    starts, took, missing = of_part(rows, "start"), seconds_of_ways(rows), dict[str, bool]()
    if starts:
        ratio = over_stages(starts)
        told = f"start: beside the import of torch {ratio:.1f} times its stages, {WANTED_OVER_STAGES:g} is wanted"
        missing[told] = ratio <= WANTED_OVER_STAGES
    if {WHOLE, PROCESSES} <= took.keys():
        share = took[WHOLE] / took[PROCESSES]
        missing[f"{WHOLE}: {share:.2f} of the seconds of {PROCESSES}, {OF_PROCESSES:g} is wanted"] = share <= OF_PROCESSES
    return missing


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *body)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def eta_table(rows: Rows) -> str:
    """Markdown: a line for every size and render."""
    body = []
    for row in (row for row in rows if row["part"] == "eta"):
        errors = [f"{float(row[name]):.0%}" for name in ("eta_at_tenth", "eta_largest")] if row[STATE] == "ran" else ["", ""]
        seconds = f"{float(row['seconds']):.1f}" if row[STATE] == "ran" else row[STATE]
        body.append([f"{row['side']}², {row['way']}", seconds, *errors])
    return markdown(("", "s of drawing", "off at a tenth", "off at most, a tenth to 90 %"), body)


def many_table(rows: Rows) -> str:
    """Markdown: a line for every way."""
    many, took = [row for row in rows if row["part"] == "many"], seconds_of_ways(rows)
    body = []
    for way in (way for way in WAYS if any(row["way"] == way for row in many)):
        own = of_part(many, "many", way)
        body.append([f"`{way}`", *(way_cells(own, took) if own else [state_of(many, way), *[""] * 4])])
    head = (f"of `{PROCESSES}`", f"of `{ENGINE}`", f"largest difference to `{ENGINE}`")
    return markdown((f"{many[0]['prompts']} pictures at {many[0]['side']}²", "s (p50)", "least to most", *head), body)


def state_of(rows: Rows, way: str) -> str:
    return next(str(row[STATE]) for row in rows if row["way"] == way)


def way_cells(own: Rows, took: Mapping[str, float]) -> list[str]:
    """The cells of a way that ran: seconds, their span, what they are of the others', the pictures' largest difference."""
    every, seconds = [float(row["seconds"]) for row in own], median(own, "seconds")
    shares = [f"{seconds / took[other]:.2f}" if other in took else "" for other in (PROCESSES, ENGINE)]
    most = max(int(row["largest_difference_255"]) for row in own)
    return [f"{seconds:.1f}", f"{min(every):.1f} to {max(every):.1f}", *shares, str(most)]


def start_table(rows: Rows) -> str:
    """Markdown: the medians of a whole command and of what it is made of."""
    starts = of_part(rows, "start")
    if not starts:
        return markdown(("`hires render`",), [[row[STATE]] for row in rows if row["part"] == "start"])
    ratio = over_stages(starts)
    met = "met" if ratio <= WANTED_OVER_STAGES else "not met"
    numbers = [f"{median(starts, name):.2f}" for name in ("seconds", "import_torch_s", "stages_s")]
    head = (
        f"`hires render` at {starts[0]['side']}², s",
        "`import torch`, s",
        "its stages, s",
        "the rest ÷ its stages",
        "wanted",
    )
    return markdown(head, [[*numbers, f"{ratio:.1f}", f"at most {WANTED_OVER_STAGES:g}: {met}"]])


TABLES: dict[str, Callable[[Rows], str]] = {"eta": eta_table, "many": many_table, "start": start_table}


def table(rows: Rows) -> str:
    """Markdown: a table for every part that has rows."""
    return "\n\n".join(TABLES[part](rows) for part in PARTS if any(row["part"] == part for row in rows))


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks engine", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"between commas, of: {', '.join(PARTS)}")
    parser.add_argument("--sides", default=",".join(map(str, SIDES)), help="of the pictures whose time left is measured")
    parser.add_argument("--rounds", type=int, default=3, help="turns of the ways of many prompts, and of starts")
    parser.add_argument("--quick", action="store_true", help="a little of each part at toy sizes, into no file")
    parser.add_argument("--csv", type=Path, default=RESULTS / "engine.csv")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str]) -> int:
    parser = parser_of()
    args = parser.parse_args(argv)
    if args.child:
        return child(args.child, measured)
    sides, parts = sides_of(parser, args.sides), [name.strip() for name in args.parts.split(",")]
    if set(parts) - PARTS.keys() or min(sides, default=0) < 64 or args.rounds < 1:
        parser.error(f"--parts {args.parts}: of {', '.join(PARTS)}; --sides {args.sides}: from 64; --rounds: from 1")
    csv, threads = (None, 1) if args.quick else (args.csv, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as scratch, never_calibrated():
        pictures = PICTURES.absolute() / SUITE.settings()
        every = quick_cases(Path(scratch)) if args.quick else cases(sides, args.rounds, pictures)
        chosen = [case for case in every if case["part"] in parts]
        rows = newest(carried_out(SUITE, chosen, csv, threads, measured), SUITE.key)
    print(table(rows), file=sys.stderr)
    verdict, missing = kept(rows, not args.quick), wanted(rows)
    for what, met in (verdict | missing).items():
        print(f"{'met' if met else 'not met'}: {what}", file=sys.stderr)
    print(json.dumps({"suite": "engine", "rows": rows, "limits": verdict, "wanted": missing}))
    return 0 if all(verdict.values()) else 1
