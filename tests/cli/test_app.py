"""The command line as a user meets it: bad input, JSON, Ctrl-C, start-up time."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hires.cli.app import app
from tests.support.forked import Command
from tests.support.speed import half_a_second, processor_seconds

PROMPT = "a sun on the right over green mountains and a lake at dusk"


def run(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(args))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def spawn(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "hires", *args], capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--size", "0x0"], "0x0"),
        (["--size", "100x"], "'100x'"),
        (["--size", "99999999x8"], "99999999x8"),
        (["--size", "64x64", "--steps", "-5"], "--steps -5"),
        (["--size", "64x64", "--guidance", "nan"], "--guidance nan"),
        (["--size", "64x64", "--model", "demmo"], "did you mean 'demo'"),
        (["--size", "64x64", "--sampler", "eular"], "did you mean 'euler'"),
        (["--size", "64x64", "--schedule", "karas"], "did you mean 'karras'"),
        (["--size", "64x64", "--schedule", "sgm_uniform"], "take exponential"),
        (["--size", "64x64", "--strategy", "tilled"], "did you mean 'tiled'"),
        (["--size", "64x64", "--model", "."], "no model_index.json"),
        (["--size", "64x64", "--dtype", "fp8"], "unknown dtype 'fp8'"),
        (["--size", "64x64", "--device", "cuda:7"], "cuda:7"),
        (["--size", "64x64", "--device", "gpu"], "'gpu'"),
        (["--size", "64x64", "--vram", "lots"], "'lots'"),
        (["--size", "2048x2048", "--vram", "1MB", "--device", "cpu"], "would do"),
        (["--size", "2048x2048", "--overlap", "256"], "--overlap 256"),
        (["--size", "256x256", "--sigma-max", "500"], "--sigma-max 500"),
        (["--size", "64x64", "--seed", "-1"], "--seed -1"),
        (["--size", "64x64", "--steps", "many"], "'many'"),
        (["--size", "9" * 5000], "--size"),
        (["--size", "64x64", "--vram", "9" * 400], "no amount of memory"),
        (["--size", "64x64", "--model", "~nosuchuser/x"], "nosuchuser"),
        (["--size", "64x64", "--model", "m" * 300], "cannot be looked at"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(options: list[str], words: str, tmp_path: Path) -> None:
    output = tmp_path / "a.png"
    code, stdout, stderr = run("render", PROMPT, "-o", str(output), *options)
    assert code == 2
    assert words in stderr
    assert "Traceback" not in stderr
    assert stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "there.png").write_bytes(b"keep me")
    for target, words in (("there.png", "--overwrite"), ("no/such/a.png", "does not exist"), ("a.gif", "must end in .png")):
        code, _, stderr = run("render", PROMPT, "--size", "64x64", "-o", str(tmp_path / target))
        assert (code, "Traceback" in stderr) == (2, False)
        assert words in stderr
    assert (tmp_path / "there.png").read_bytes() == b"keep me"


def test_a_full_disk_is_exit_code_1_and_no_file(tmp_path: Path) -> None:
    """A real limit on file size: the render finishes, the file does not fit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, before[1]))
    try:
        command = ["render", PROMPT, "--size", "256x256", "--steps", "1", "--quiet", "-o", str(tmp_path / "a.png")]
        code, _, stderr = run(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1
    assert "nothing was written" in stderr
    assert "Traceback" not in stderr
    assert [file.name for file in tmp_path.iterdir()] == [".a.png.hires"], "what is finished, for when there is room"


def test_plan_needs_no_torch_and_half_a_second() -> None:
    """The best of up to five runs, in CPU seconds: what the command costs, not what else the machine does."""
    code = (
        "import sys, time; begun = time.perf_counter()\n"
        "from hires.cli.app import app\n"
        "try: app(['plan', '--size', '8192x8192', '--model', 'demo', '--vram', '8GB', '--json'])\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    for _ in range(5):
        seconds, printed = processor_seconds(code)
        if seconds < half_a_second():
            break
    document = json.loads(printed)
    assert document["canvas"] == {"height": 8192, "width": 8192}
    assert document["predicted_peak_bytes"] <= 8e9
    assert len(document["notes"]) >= 4
    assert seconds < half_a_second()


def test_render_prints_one_json_document_and_nothing_else(tmp_path: Path) -> None:
    """As a child process: library messages at import must not reach stdout or stderr."""
    path = tmp_path / "a.png"
    done = spawn("render", PROMPT, "--size", "128x96", "--steps", "1", "-o", str(path), "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["path"], document["size"], document["seed"]) == (str(path), "128x96", 0)
    assert {"plan", "stats"} <= document.keys()
    assert path.exists()
    assert done.stderr == ""


def test_progress_goes_to_stderr(tmp_path: Path) -> None:
    code, stdout, stderr = run("render", PROMPT, "--size", "256x256", "--steps", "1", "-o", str(tmp_path / "a.png"))
    assert code == 0
    assert "base: step 1/1, tile" in stderr
    assert "256x256" in stdout


@pytest.mark.parametrize("sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_ctrl_c_and_sigterm_stop_at_once_and_leave_a_journal(sent: signal.Signals, tmp_path: Path) -> None:
    output, shown = tmp_path / "a.png", tmp_path / "stderr"
    process = Command("render", PROMPT, "--size", "1024x1024", "--steps", "500", "-o", str(output), stderr=shown)
    while not (shown.exists() and shown.read_text().endswith("\n")):  # the model is loaded, the base stage runs
        assert process.poll() is None
        time.sleep(0.01)
    assert "load" in shown.read_text()
    time.sleep(0.5)
    process.send_signal(sent)
    begun = time.monotonic()
    assert process.wait(30) == 128 + sent
    assert time.monotonic() - begun < 10
    rest = shown.read_text()
    assert "Traceback" not in rest
    assert "stopped" in rest
    shown.unlink()
    assert [file.name for file in tmp_path.iterdir()] == [".a.png.hires"]


def test_info_names_device_backends_and_models() -> None:
    code, stdout, _ = run("info", "--json")
    assert code == 0
    facts = json.loads(stdout)
    assert list(facts["attention backends"]) == ["sdpa", "xformers", "triton", "flash", "efficient", "cudnn", "math", "chunked"]
    assert "cosxl, 256 px native" in facts["models"]["demo"]
    assert facts["libraries"]["torch"]


def test_help_lists_every_option_of_the_interface() -> None:
    env = {**os.environ, "COLUMNS": "200", "TERM": "dumb"}
    done = spawn("render", "--help", env=env)
    for option in (
        "--size", "--output", "--model", "--negative", "--steps", "--guidance", "--sampler", "--schedule", "--seed",
        "--strategy", "--vram", "--device", "--dtype", "--tile", "--overlap", "--sigma-max", "--init", "--strength",
        "--family", "--parts", "--lora", "--clean-caption", "--json", "--quiet", "--overwrite",
    ):  # fmt: skip
        assert option in done.stdout


def test_version() -> None:
    assert run("--version")[1].startswith("hires 0.")
