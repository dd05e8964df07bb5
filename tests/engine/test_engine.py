"""Whole renders with the shipped model: exact size, same seed same picture, progress, cancelling, metadata."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

import hires
from hires.checkpoints.noise_levels import vp_sigmas
from hires.checkpoints.spec import load_spec
from hires.engine.results import RenderResult
from hires.errors import BackendError, Cancelled, MemoryLadderError, ModelError, RequestError
from hires.events import Event
from hires.images.formats import read_text
from hires.pipelines.progressive import first_sigma, stage_sigmas
from hires.planning.plan import MemoryPlan
from hires.sampling.noise import CanvasNoise
from hires.sampling.registry import evaluations
from hires.sampling.samplers import make_sigmas
from hires.tiling import retry

pytestmark = pytest.mark.usefixtures("warm")

if TYPE_CHECKING:
    from tests.support.checkpoints import Checkpoint

SDXL = ("scaled_linear", 0.00085, 0.012)
PROMPT = "a moon on the left over purple mountains and a lake at night"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> RenderResult:
    path = tmp_path_factory.mktemp("render") / "small.png"
    return hires.render(PROMPT, size="500x300", output=path, steps=4, seed=3)


def test_law_6_the_size_delivered_is_the_size_asked_for(small: RenderResult) -> None:
    assert small.path is not None
    with Image.open(small.path) as picture:
        assert picture.size == (500, 300)
        assert np.array_equal(np.asarray(picture), small.pixels)
    assert small.plan.canvas.width == 512


@pytest.mark.parametrize("size", ["17x16", "96x400", "257x255"])
def test_law_6_odd_sizes(size: str) -> None:
    result = hires.render(PROMPT, size=size, steps=1)
    width, height = map(int, size.split("x"))
    assert result.pixels.shape == (height, width, 3)


def test_the_file_tells_how_it_was_made(small: RenderResult) -> None:
    assert small.path is not None
    text = read_text(small.path)
    assert text["prompt"] == PROMPT
    assert text["seed"] == "3"
    assert text["sampler"] == small.plan.stages[0].sampler
    assert text["schedule"] == small.plan.stages[0].schedule == "karras"
    assert json.loads(text["hires:plan"])["strategy"] == "progressive"
    json.dumps(small.to_json(), default=str)
    assert [s.stage for s in small.stats] == ["base", "refine 1", "decode"]
    assert small.stats[1].tiles == small.plan.stages[1].steps * small.plan.stages[1].grid.count


def test_the_same_seed_is_the_same_picture_and_another_is_not(small: RenderResult) -> None:
    again = hires.render(PROMPT, size="500x300", steps=4, seed=3)
    assert np.array_equal(again.pixels, small.pixels)
    other = hires.render(PROMPT, size="500x300", steps=4, seed=4)
    assert np.abs(other.pixels.astype(int) - small.pixels.astype(int)).mean() > 2


def test_law_3_tile_batch_and_retries_do_not_change_the_picture(small: RenderResult, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch of more than one tile runs out of memory: the picture is that of any other batch."""
    real = retry.attempt

    def scarce(run: object, item: object) -> tuple[object, str]:
        if isinstance(item, list) and len(item) > 1:
            return None, "CUDA out of memory (injected)"
        return real(run, item)  # type: ignore[arg-type]

    monkeypatch.setattr(retry, "attempt", scarce)
    result = hires.render(PROMPT, size="500x300", steps=4, seed=3)
    assert sum(stage.retries for stage in result.stats) > 0
    assert np.abs(result.pixels.astype(int) - small.pixels.astype(int)).max() <= 1


@pytest.mark.slow
def test_law_3_tile_batch_and_threads_leave_the_canvas_noise_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[torch.Tensor]] = []
    made: list[MemoryPlan] = []
    real = CanvasNoise.__call__

    def recording(self: CanvasNoise, step: int, part: int = 0) -> torch.Tensor:
        value = real(self, step, part)
        drawn[-1].append(value)
        return value

    monkeypatch.setattr(CanvasNoise, "__call__", recording)
    threads = torch.get_num_threads()
    try:
        for options in ({}, {"tile_px": 384}, {"tile_px": 320, "overlap_px": 32}, {"vram": "30MB"}):
            drawn.append([])
            made.append(hires.plan(size="512x512", device="cpu", **options))  # type: ignore[arg-type]
            hires.render(PROMPT, size="512x512", steps=1, seed=3, sampler="euler_ancestral", **options)  # type: ignore[arg-type]
            torch.set_num_threads(1)
    finally:
        torch.set_num_threads(threads)
    assert len({plan.batch for plan in made}) > 1  # the cases do differ
    assert len({plan.latent_grid for plan in made}) > 1
    for other in drawn[1:]:
        assert len(other) == len(drawn[0]) >= 2
        assert all(torch.equal(a, b) for a, b in zip(other, drawn[0], strict=True))


def test_a_decode_rung_is_taken_logged_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Everything that is not done in bands runs out of memory: in the relay, once, and then never again."""
    from diffusers import AutoencoderKL

    def scarce(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")

    for name in ("decode", "encode"):
        monkeypatch.setattr(AutoencoderKL, name, scarce)
    result = hires.render(PROMPT, size="512x512", output=tmp_path / "a.png", steps=1)
    assert str(result.plan.decode) == "in bands of 64 rows (bands)"
    assert sum(stage.retries for stage in result.stats) == 1
    assert "predicted peak" in caplog.text
    assert "Tried to allocate 9.00 GiB" in caplog.text
    note = "ran out of memory: decoded in bands of 64 rows (bands) instead of whole"
    assert note in result.plan.notes
    assert note in read_text(tmp_path / "a.png")["hires:plan"]
    monkeypatch.undo()
    whole = hires.render(PROMPT, size="512x512", steps=1)
    assert np.abs(whole.pixels.astype(int) - result.pixels.astype(int)).max() <= 1


@pytest.mark.usefixtures("cold")
def test_running_out_of_memory_anywhere_else_is_an_error_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.00 GiB")

    monkeypatch.setattr("hires.pipelines.load.load_network", never)
    with pytest.raises(MemoryLadderError, match=r"Tried to allocate 5.00 GiB.*planned peak .* GiB"):
        hires.render(PROMPT, size="64x64", steps=1)


def test_progress_counts_every_tile_and_step() -> None:
    events: list[Event] = []
    hires.render(PROMPT, size="512x512", steps=4, on_event=events.append)
    assert list(dict.fromkeys(e.stage for e in events)) == [
        "load", "base", "decode for refine 1", "encode for refine 1", "refine 1", "decode",
    ]  # fmt: skip
    for stage in {e.stage for e in events}:
        counts = [e.done for e in events if e.stage == stage]
        assert counts == sorted(counts)
        assert counts[-1] == next(e.total for e in events if e.stage == stage)
    assert max(e.step for e in events if e.stage == "base") == 4


@pytest.mark.parametrize("sampler", ["heun", "restart", "dpm_fast", "dpm_adaptive"])
def test_progress_ends_where_the_evaluations_do(sampler: str) -> None:
    events: list[Event] = []
    result = hires.render(PROMPT, size="128x128", steps=3, sampler=sampler, on_event=events.append)
    base = [event for event in events if event.stage == "base"]
    assert (base[-1].done, base[-1].step) == (base[-1].total, 3)
    assert base[-1].done == result.stats[0].tiles
    assert max(event.done for event in base) == base[-1].done
    if sampler != "dpm_adaptive":
        assert {event.total for event in base} == {evaluations(sampler, 3)}


def test_names_of_other_programs_reach_the_plan_and_the_sigmas() -> None:
    asked = {"size": "256x256", "sampler": "DPM++ 3M SDE Exponential"}
    stage = hires.plan(**asked, steps=5).stages[0]  # type: ignore[arg-type]
    assert (stage.sampler, stage.schedule) == ("dpmpp_3m_sde", "exponential")
    spec = load_spec("demo")
    assert stage_sigmas(spec, stage).equal(
        make_sigmas("exponential", 5, sigma_min=spec.sigma_min, sigma_max=spec.sigma_max, discard_penultimate=True)
    )
    again = hires.plan(size="256x256", sampler="dpmpp_3m_sde", schedule="exponential", steps=5).stages[0]
    assert again == stage


def test_cancelling_leaves_no_file_but_what_is_finished(tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.stage == "base" and event.step >= 1:
            raise Cancelled("stopped by the caller")

    with pytest.raises(Cancelled):
        hires.render(PROMPT, size="128x128", output=tmp_path / "a.png", on_event=stop)
    assert [file.name for file in tmp_path.iterdir()] == [".a.png.hires"]
    with pytest.raises(Cancelled):
        hires.render(PROMPT, size="128x128", output=tmp_path / "b.png", journal=None, on_event=stop)
    assert [file.name for file in tmp_path.iterdir()] == [".a.png.hires"]


def test_an_epsilon_model_goes_through_the_same_road(eps_folder: Path) -> None:
    result = hires.render(PROMPT, size="256x256", model=str(eps_folder), steps=2)
    assert result.plan.stages[0].sigma_start == pytest.approx(14.615, abs=1e-3)
    assert result.pixels.shape == (256, 256, 3)
    below = hires.render(PROMPT, size="256x256", model=str(eps_folder), steps=2, sampler="ddim", schedule="ddim_uniform")
    assert below.plan.stages[0].schedule == "ddim_uniform"
    spec = load_spec(str(eps_folder))
    assert first_sigma(below.plan.stages[0], stage_sigmas(spec, below.plan.stages[0])) == pytest.approx(
        vp_sigmas(*SDXL)[501], rel=1e-5
    )
    assert first_sigma(result.plan.stages[0], stage_sigmas(spec, result.plan.stages[0])) == result.plan.stages[0].sigma_start


def test_a_folder_says_what_its_checkpoint_was_distilled_for(eps_folder: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "distilled"
    shutil.copytree(eps_folder, folder)
    document = json.loads((folder / "hires.json").read_text())

    def declare(**values: object) -> None:
        document["defaults"] |= values
        (folder / "hires.json").write_text(json.dumps(document))

    declare(few_step="lcm", sampler="lcm", schedule="lcm", steps=4)
    result = hires.render(PROMPT, size="128x128", model=str(folder))
    assert result.stats[0].tiles == 4
    other = hires.plan(size="256x256", model=str(folder), sampler="euler")
    assert any("was distilled for lcm on lcm" in note for note in other.notes)
    declare(few_step="yoso")
    with pytest.raises(ModelError, match="few_step 'yoso' is none of lcm, turbo, dmd, distilled"):
        hires.plan(size="256x256", model=str(folder))


@pytest.mark.slow
def test_a_single_file_renders_the_picture_of_its_folder(tmp_path: Path, checkpoint: Callable[..., Checkpoint]) -> None:
    """And a LoRA changes it, the more the stronger it is."""
    from tests.support.checkpoints import lora

    file, folder = checkpoint("cosxl"), checkpoint("cosxl", "folder")
    options = {"size": "64x64", "steps": 2, "strategy": "direct", "sampler": "euler"}
    wanted = hires.render(PROMPT, model=str(folder.path), **options).pixels  # type: ignore[arg-type]
    result = hires.render(PROMPT, model=str(file.path), parts=file.parts, **options)  # type: ignore[arg-type]
    assert wanted.std() > 5
    assert np.array_equal(result.pixels, wanted)
    style = lora(tmp_path / "style.safetensors", file, "kohya").path
    changes = []
    for scale in (0, 0.02, 0.2):
        made = hires.render(PROMPT, model=str(folder.path), loras=[f"{style}:{scale}"], **options)  # type: ignore[arg-type]
        changes.append(np.abs(made.pixels.astype(int) - wanted).mean())
    assert changes[0] == 0 < changes[1] < changes[2]


def test_damaged_models_say_so(eps_folder: Path, tmp_path: Path) -> None:
    import shutil

    with pytest.raises(ModelError, match="no such folder"):
        hires.render(PROMPT, size="256x256", model="./nowhere")
    with pytest.raises(ModelError, match=r"unknown model 'demmo': did you mean 'demo'"):
        hires.plan(size="256x256", model="demmo")
    with pytest.raises(ModelError, match=r"holds no model_index\.json"):
        hires.plan(size="256x256", model=str(tmp_path))
    broken = tmp_path / "broken"
    shutil.copytree(eps_folder, broken)
    weights = next((broken / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(ModelError, match="damaged or cut short"):
        hires.render(PROMPT, size="256x256", model=str(broken))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="no safetensors header"):
        hires.plan(size="256x256", model=str(broken))
    shutil.rmtree(broken / "vae")
    with pytest.raises(ModelError, match="missing"):
        hires.plan(size="256x256", model=str(broken))


def test_python_options_are_checked() -> None:
    for options, words in (({"size": 1024}, "1024"), ({"size": ("a", 2)}, "whole numbers"), ({"size": (512.7, 512)}, "512.7")):
        with pytest.raises(RequestError, match=words):
            hires.plan(**options)  # type: ignore[arg-type]
    for option in ({"steps": "3"}, {"steps": 2.5}, {"seed": True}, {"guidance": "7"}):
        with pytest.raises(RequestError, match=next(iter(option))):
            hires.plan(size="256x256", **option)  # type: ignore[arg-type]
    assert hires.plan(size=(640, 480)).output.height == 480


def test_a_named_attention_backend_runs_or_says_why_not_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"size": "64x64", "steps": 2, "seed": 1}
    default, named = hires.render(PROMPT, **options), hires.render(PROMPT, attention="chunked", **options)  # type: ignore[arg-type]
    assert default.plan.backends == (("attention", "sdpa"),)
    assert named.plan.backends == (("attention", "chunked"),)
    assert np.abs(default.pixels.astype(int) - named.pixels.astype(int)).max() <= 1
    monkeypatch.setattr("hires.pipelines.load.load_family", lambda *a: pytest.fail("it was loaded"))
    with pytest.raises(BackendError, match=r"attention triton: .*triton: "):
        hires.render(PROMPT, attention="triton", **options)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="no attention backend 'fast'; known: sdpa, xformers, triton"):
        hires.render(PROMPT, attention="fast", **options)  # type: ignore[arg-type]


def test_a_policy_of_attention_reaches_the_network_and_the_plan() -> None:
    """Over the canvas in one piece: another picture than of tiles, the same again, and named in the plan."""
    options = {"size": "264x352", "steps": 1, "seed": 3}
    tiles, policy, again = (
        hires.render(PROMPT, attention_policy=name, **options)  # type: ignore[arg-type]
        for name in (None, "npa:256", "npa:256")
    )
    assert np.array_equal(policy.pixels, again.pixels)
    assert not np.array_equal(policy.pixels, tiles.pixels)
    assert all(stage.tiles <= 4 for stage in policy.stats)
    assert any(note.startswith("approximation: self-attention") for note in policy.plan.notes)
    wide = hires.render(PROMPT, attention_policy="npa:1024", **options)  # type: ignore[arg-type]
    whole = hires.render(PROMPT, attention_policy="kvpool:1", **options)  # type: ignore[arg-type]
    assert np.array_equal(wide.pixels, whole.pixels)  # both are all keys, by other ways
