"""`hires.load`: a model stays loaded, and a used engine draws what a fresh process draws (law 10)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import hires
from hires.engine.background import TurnLock
from hires.engine.loaded import LoadedModels, models_on
from hires.errors import Cancelled, MemoryLadderError, NotFiniteError, RequestError
from hires.events import Event
from hires.models.loading import network_state
from hires.models.text_encoders import TextEncoders
from hires.options.render import RenderOptions
from hires.pipelines import progressive
from hires.tiling import retry
from tests.support.checkpoints import Checkpoint

PROMPT = "a sun on the right over green mountains and a lake at dusk"
SMALL: dict[str, Any] = {"size": "96x64", "steps": 2}
Get = Callable[[str, str], Checkpoint]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often networks, autoencoders and text towers were loaded; what engines of other tests still hold goes first."""
    models_on("cpu").unload()
    counts: Counter[str] = Counter()

    def counted(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def load(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, load)

    from hires.pipelines import load as loading

    counted(loading, "load_network")
    counted(loading, "load_vae")
    counted(TextEncoders, "_load")
    return counts


@pytest.fixture
def engine() -> Iterator[hires.Engine]:
    with hires.load() as engine:
        yield engine


def test_eight_renders_load_once(engine: hires.Engine, loads: Counter[str]) -> None:
    assert engine.loaded == () and "nothing loaded" in repr(engine)
    for index in range(8):
        engine.render(f"{PROMPT} {index}", seed=index, **SMALL)
    assert loads == {"load_network": 1, "load_vae": 1, "_load": 2}  # the shipped model has two text towers
    assert engine.loaded == ("demo",) and "weights in memory" in repr(engine)
    engine.unload()
    assert engine.loaded == ()


def options_of(index: int) -> dict[str, Any]:
    """Another prompt, size, seed and sampler each time; every third one is of two stages."""
    samplers = ("euler", "dpmpp_2m", "heun", "euler_ancestral")
    size = ("96x64", "64x120", "400x272")[index % 3]
    return {"size": size, "steps": 2, "seed": index, "sampler": samplers[index % 4]}


def test_a_used_engine_is_a_fresh_one(engine: hires.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """After other requests, an out-of-memory, a cancelled and a failed run."""
    fresh = [hires.render(f"{PROMPT} {index % 2}", **options_of(index)).pixels for index in range(4)]
    for index in (*range(4), 1, 0):
        result = engine.render(f"{PROMPT} {index % 2}", **options_of(index))
        assert np.array_equal(result.pixels, fresh[index]), index
        if index < 2:
            disturb(engine, monkeypatch, **SMALL)


def disturb(engine: hires.Engine, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """A cancelled run, one that runs out of memory and one whose estimates are not finite."""

    def stop(event: Event) -> None:
        if event.stage == "base" and event.step == 1:
            raise Cancelled("stop")

    def scarce(run: object, item: object) -> tuple[object, str]:
        if isinstance(item, list) and len(item) > 1:
            return None, "CUDA out of memory (injected)"
        return real(run, item)  # type: ignore[arg-type]

    real = retry.attempt
    with pytest.raises(Cancelled):
        engine.render(PROMPT, on_event=stop, **options)
    with monkeypatch.context() as disturbed:
        disturbed.setattr(retry, "attempt", scarce)
        engine.render(PROMPT, **options)
    with monkeypatch.context() as disturbed:
        disturbed.setattr("hires.models.precision.finite_pictures", lambda x: torch.zeros(len(x), dtype=torch.bool))
        with pytest.raises(NotFiniteError):
            engine.render(PROMPT, **options)


@pytest.mark.parametrize("family", ["cosxl", pytest.param("sd15", marks=pytest.mark.slow), "pixart-sigma-256"])
def test_every_family_stays_as_it_was(
    family: str, checkpoint: Get, loads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = checkpoint(family, "folder")
    wanted: list[dict[str, Any]] = [SMALL, SMALL | {"seed": 1, "size": "64x128"}, SMALL | {"seed": 2, "sampler": "heun"}]
    model: dict[str, Any] = {"parts": made.parts, "vram": "2GB", "device": "cpu"}
    with hires.load(str(made.path), **model) as engine:
        used = [engine.render("a red sun", **options).pixels for options in wanted]
        disturb(engine, monkeypatch, **SMALL)
        assert loads["load_network"] == loads["load_vae"] == 1
        used += [engine.render("a red sun", **options).pixels for options in wanted]
    fresh = [hires.render("a red sun", model=str(made.path), **model, **options).pixels for options in wanted]
    assert all(np.array_equal(*pair) for pair in zip(used, fresh * 2, strict=True))


def test_an_edit_stays_as_it_was(checkpoint: Get) -> None:
    made, picture = checkpoint("cosxl-edit", "folder"), np.full((64, 96, 3), 90, np.uint8)
    with hires.load(str(made.path), parts=made.parts) as engine:
        used = [engine.edit(picture + np.uint8(shade), "make it winter", steps=2).pixels for shade in (0, 80, 0)]
    fresh = hires.edit(picture, "make it winter", model=str(made.path), parts=made.parts, steps=2).pixels
    assert np.array_equal(used[0], fresh) and np.array_equal(used[2], fresh) and not np.array_equal(used[1], fresh)


def test_a_file_that_changed_is_loaded_again(tmp_path: Path, eps_folder: Path, loads: Counter[str]) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(eps_folder, folder)
    with hires.load(str(folder)) as engine:
        engine.render(PROMPT, **SMALL)
        weights = next(file for file in (folder / "unet").iterdir() if file.suffix == ".safetensors")
        os.utime(weights, ns=(0, 0))
        engine.render(PROMPT, **SMALL)
    assert (loads["load_network"], loads["_load"]) == (2, 2)


def network_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of a UNet evaluates, from now on."""
    from hires.models.unet import UNetNetwork

    calls, real = list[int](), UNetNetwork.__call__

    def counted(self: Any, x: Any, *args: Any) -> Any:
        calls.append(len(x))
        return real(self, x, *args)

    monkeypatch.setattr(UNetNetwork, "__call__", counted)
    return calls


def test_many_prompts_share_batches_and_are_those_of_each(
    engine: hires.Engine, loads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, calls = [f"{PROMPT} {index}" for index in range(5)], network_calls(monkeypatch)
    results = list(engine.render_many(prompts, seed=4, sampler="euler_ancestral", **SMALL))
    assert loads == {"load_network": 1, "load_vae": 1, "_load": 2}
    assert calls == [8, 8, 2, 2], "four pictures with two estimates each, then the fifth, two steps each"
    alone = [hires.render(prompt, seed=4, sampler="euler_ancestral", **SMALL).pixels for prompt in prompts]
    different = [np.abs(result.pixels.astype(int) - pixels) for result, pixels in zip(results, alone, strict=True)]
    print("largest difference", max(int(each.max()) for each in different), "of 255")
    assert all(each.max() <= 1 and (each > 0).mean() < 1e-3 for each in different), "rounding of sums in another batch"
    assert [stage.stage for stage in results[1].stats] == ["base", "decode"] and results[1].stats[0].tiles == 2
    with pytest.raises(RequestError, match=r"output a\.png: would be one file"):
        engine.render_many(iter(prompts), output="a.png", **SMALL)
    with pytest.raises(RequestError, match=r"prompts 'cat': is one prompt"):
        engine.render_many("cat", **SMALL)
    assert all(result.seconds >= result.stats[0].seconds > 0 for result in results), "the base's share is in it"


def test_many_prompts_are_cleaned_as_those_of_each(checkpoint: Get) -> None:
    made, prompts = checkpoint("pixart-sigma-256", "folder"), ["<b>a red sun</b> &amp; a sea", "A Blue <i>lake</i>"]
    options = SMALL | {"clean_caption": True}
    with hires.load(str(made.path), parts=made.parts, device="cpu", vram="2GB") as engine:
        together = [result.pixels.astype(int) for result in engine.render_many(prompts, **options)]
        alone = [engine.render(prompt, **options).pixels for prompt in prompts]
    assert max(np.abs(a - b).max() for a, b in zip(together, alone, strict=True)) <= 1


def test_a_cheaper_picture_begins_anew() -> None:
    from hires.engine.engine import render_job
    from hires.engine.fallback import cheaper_job

    job = render_job(PROMPT, RenderOptions(size="256x256", strategy="tiled", tile_px=256, allow_approximate=True))
    base: Any = object()
    assert cheaper_job(replace(job, base=base), MemoryLadderError("no room")).base is None


@pytest.mark.slow
def test_many_that_cannot_share_are_drawn_alone(
    engine: hires.Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompts, calls = [PROMPT, "a lake"], network_calls(monkeypatch)
    picture = np.full((64, 96, 3), 120, np.uint8)
    for options in ({"init": picture}, {"sampler": "dpm_adaptive"}):
        assert len([*engine.render_many(prompts, **{**SMALL, **options})]) == 2  # type: ignore[typeddict-item]
        assert set(calls) == {2}, options
        calls.clear()
    fresh = [hires.render(prompt, **SMALL).pixels for prompt in prompts]
    with monkeypatch.context() as disturbed:
        disturbed.setattr("hires.pipelines.progressive.first_stage", out_of_memory)
        drawn = [result.pixels for result in engine.render_many(prompts, **SMALL)]
    assert all(np.array_equal(*pair) for pair in zip(drawn, fresh, strict=True))
    assert "2 pictures cannot share batches (no room)" in caplog.text


def out_of_memory(*args: object) -> None:
    raise torch.OutOfMemoryError("no room")


def test_events_of_many_rise_for_each_picture(engine: hires.Engine) -> None:
    fractions: list[float] = []
    ends = []
    for _ in engine.render_many([PROMPT, "a lake", "a hill"], on_event=lambda event: fractions.append(event.fraction), **SMALL):
        ends.append(len(fractions))
    pictures = [fractions[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    assert len(pictures) == 3 and all(picture == sorted(picture) and picture[-1] == 1.0 for picture in pictures), pictures
    assert pictures[0][0] == 0 and min(pictures[1][0], pictures[2][0]) > 0.5, "their base is there from the beginning"


def test_the_fraction_never_falls_where_sharing_fails_late(engine: hires.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    real, events = progressive.first_stage, list[Event]()

    def late(*given: Any) -> Any:
        real(*given)
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(progressive, "first_stage", late)
    next(engine.render_many([PROMPT, "a lake"], on_event=events.append, **SMALL))
    assert [event.fraction for event in events] == sorted(event.fraction for event in events)
    assert [event.elapsed for event in events] == sorted(event.elapsed for event in events)


def test_two_threads_wait_for_each_other(engine: hires.Engine) -> None:
    fresh = [hires.render(PROMPT, seed=seed, **SMALL).pixels for seed in (1, 2)]
    found: dict[int, Any] = {}

    def work(seed: int) -> None:
        found[seed] = engine.render(PROMPT, seed=seed, **SMALL).pixels

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(found[1], fresh[0]) and np.array_equal(found[2], fresh[1])


def test_what_belongs_elsewhere_and_a_closed_engine_are_refused(engine: hires.Engine) -> None:
    with pytest.raises(RequestError, match=r"vram: belongs to the model or the machine; give it to hires\.load"):
        engine.render(PROMPT, vram="2GB", **SMALL)
    with pytest.raises(TypeError, match=r"load\(\) takes no option 'sise'"):
        hires.load("demo", sise="64x64")  # type: ignore[call-arg]
    with pytest.raises(RequestError, match="unknown model 'nothing'"):
        hires.load("nothing")
    engine.close()
    with pytest.raises(RequestError, match="engine: is closed"):
        engine.render(PROMPT, **SMALL)
    with pytest.raises(RequestError, match="engine: is closed"):
        engine.start(PROMPT, **SMALL)
    assert "closed" in repr(engine)


def test_plans_are_those_of_the_one_shot_function(engine: hires.Engine) -> None:
    assert engine.plan(size="512x512").to_json() == hires.plan(size="512x512").to_json()


def test_a_run_tells_its_events_and_gives_its_result(engine: hires.Engine) -> None:
    heard: list[Event] = []
    run = engine.start(PROMPT, seed=3, on_event=heard.append, **SMALL)
    events = list(run)
    assert {event.stage for event in events} >= {"load", "base", "decode"} and events == heard
    assert run.done() and np.array_equal(run.result().pixels, hires.render(PROMPT, seed=3, **SMALL).pixels)
    assert list(run) == [] and "finished" in repr(run)

    async def wait() -> tuple[int, Any]:
        awaited = engine.start(PROMPT, seed=3, **SMALL)
        count = len([event async for event in awaited])
        return count, (await awaited).pixels

    count, pixels = asyncio.run(wait())
    assert count == len(events) and np.array_equal(pixels, run.result().pixels)


def test_runs_have_their_turn_and_a_waiting_one_can_be_cancelled(engine: hires.Engine) -> None:
    begun, go = list[int](), threading.Event()

    def hear(number: int, event: Event) -> None:
        go.wait()
        if event.stage == "load" and not event.done:
            begun.append(number)

    runs = [engine.start(PROMPT, seed=n, on_event=partial(hear, n), **SMALL) for n in range(5)]
    runs[3].cancel()
    with pytest.raises(Cancelled, match="before it began"):
        runs[3].result(timeout=60)
    assert not runs[0].done(), "it waited for nobody"
    go.set()
    assert [runs[n].result(timeout=60).seed for n in (4, 2, 1, 0)] == [4, 2, 1, 0] and begun == [0, 1, 2, 4]


def test_a_turn_comes_in_order_and_a_thread_may_take_its_own_again() -> None:
    lock, taken, threads = TurnLock(), list[int](), list[threading.Thread]()

    def work(number: int) -> None:
        with lock, lock:
            taken.append(number)

    with lock:
        for number in range(20):
            threads.append(threading.Thread(target=work, args=(number,)))
            threads[-1].start()
            while len(lock._waiting) <= number:
                pass
        assert taken == []
    for thread in threads:
        thread.join(10)
    assert taken == list(range(20))


STAGES = ("load", "base", "decode for refine 1", "encode for refine 1", "refine 1", "decode")


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_is_cancelled_in_any_stage(engine: hires.Engine, stage: str) -> None:
    started, runs, seen = threading.Event(), [], list[str]()

    def cancel(event: Event) -> None:
        started.wait()
        seen.append(event.stage)
        if event.stage == stage:
            runs[0].cancel()

    runs.append(engine.start(PROMPT, on_event=cancel, size="400x272", steps=2))
    started.set()
    with pytest.raises(Cancelled):
        runs[0].result(timeout=60)
    assert seen[-1] == stage and set(seen) == set(STAGES[: STAGES.index(stage) + 1]), seen
    assert engine.render(PROMPT, **SMALL).size == hires.plan(size="96x64").output


def test_a_result_is_held_in_the_hand(engine: hires.Engine, tmp_path: Path) -> None:
    result = engine.render(PROMPT, **SMALL)
    assert repr(result).startswith("<hires.RenderResult 96x64, seed 0, ")
    assert result.image.size == (96, 64) and np.array_equal(np.asarray(result.image), result.pixels)
    path = result.save(tmp_path / "a.png")
    with Image.open(path) as opened:
        assert np.array_equal(np.asarray(opened), result.pixels) and "hires:plan" in opened.info
    with pytest.raises(hires.errors.OutputError, match=r"a\.png"):
        result.save(path)
    assert result._repr_png_().startswith(b"\x89PNG")
    sixteen = engine.render(PROMPT, bits=16, **SMALL)
    assert sixteen.image.mode == "RGB" and np.abs(np.asarray(sixteen.image).astype(int) - result.pixels).max() <= 1


def test_a_render_from_within_an_event_is_refused(engine: hires.Engine) -> None:
    def hear(event: Event) -> None:
        if event.step == 1:
            with hires.load() as other, pytest.raises(RequestError, match="cannot begin inside the `on_event` of another"):
                other.render("a hill", **SMALL)

    pixels = engine.render(PROMPT, on_event=hear, **SMALL).pixels
    assert np.array_equal(pixels, hires.render(PROMPT, **SMALL).pixels)
    with hires.Upscaler(scale=2, refine=True, steps=2) as upscaler, pytest.raises(RequestError, match="cannot begin inside"):
        engine.render(PROMPT, on_event=lambda event: upscaler.run(pixels), **SMALL)
    engine.render(PROMPT, **SMALL)


def test_an_asynchronous_iteration_that_gives_up_loses_nothing(engine: hires.Engine) -> None:
    go = threading.Event()

    async def look() -> int:
        run = engine.start(PROMPT, on_event=lambda event: go.wait() and None, **SMALL)
        for _ in range(3):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(anext(aiter(run)), 0.03)
        go.set()
        await run
        return len(list(run))

    assert asyncio.run(look()) == len(list(engine.start(PROMPT, **SMALL)))


def test_plans_of_a_used_engine_are_those_it_renders(engine: hires.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hires.devices.machines.available_host_bytes", lambda: 300 * 2**20)
    before = engine.plan(**SMALL).budget_bytes
    budgets = [engine.render(PROMPT, **SMALL).plan.budget_bytes for _ in range(2)]
    assert budgets == [before, engine.plan(**SMALL).budget_bytes] and budgets[1] > budgets[0]
    engine.close()
    assert engine._models is None, "a closed engine keeps nothing alive"
    with pytest.raises(RequestError, match="vram 'x' is no amount of memory"):
        hires.load(vram="x")


@pytest.mark.parametrize("room", [True, False])
def test_two_models_alternate(room: bool, eps_folder: Path, loads: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for both nothing is loaded after the first two; without, each switch loads once."""
    from hires.engine.engine import render_on
    from hires.options.render import RenderOptions

    if not room:
        monkeypatch.setattr("hires.engine.loaded.available_host_bytes", lambda: 0)
    models = LoadedModels()
    for index in range(4):
        options = RenderOptions(model=("demo", str(eps_folder))[index % 2], vram="1GB", device="cpu", **SMALL)
        pixels = render_on(models, PROMPT, options).pixels
        fresh = hires.render(PROMPT, model=options.model, vram="1GB", device="cpu", **SMALL).pixels
        assert np.array_equal(pixels, fresh)
    of_the_fresh = 4
    assert loads["load_network"] - of_the_fresh == (2 if room else 4)
    assert len(models.names) == (2 if room else 1)


def test_engines_of_a_device_share_what_is_loaded(eps_folder: Path, loads: Counter[str]) -> None:
    with hires.load() as first, hires.load() as second, hires.load(str(eps_folder)) as other:
        first.render(PROMPT, **SMALL)
        second.render(PROMPT, **SMALL)
        assert (loads["load_network"], loads["_load"]) == (1, 2) and repr(first) == repr(second)
        other.render(PROMPT, **SMALL)
        assert first.loaded == other.loaded == ("demo", other.spec.name)
        first.close()
        assert second.loaded == ("demo", other.spec.name), "the second one still views it"
        second.close()
        assert other.loaded == (other.spec.name,)
    with hires.load(keep_weights="no") as engine:
        engine.render(PROMPT, **SMALL)
        assert engine.loaded == ()
    with pytest.raises(RequestError, match="keep_weights"):
        hires.load(keep_weights="cellar")


@pytest.mark.parametrize("text", [pytest.param(False, marks=pytest.mark.slow), True])
def test_other_loras_are_merged_into_what_is_loaded(text: bool, loads: Counter[str], tmp_path: Path) -> None:
    """Scales, files and none at all, each as a fresh process draws it; what changed on disk is loaded again."""
    one, two = lora_file(tmp_path / "one.safetensors", 1, text), lora_file(tmp_path / "two.safetensors", 2, text)
    wanted = [(), (f"{one}:0.5",), (f"{one}:1.5",), (f"{one}:1.5", f"{two}:-1"), (f"{two}:0.5",), ()]
    fresh = [hires.render(PROMPT, loras=loras, **SMALL).pixels for loras in wanted]
    loads.clear()
    engines = [hires.load(loras=loras) for loras in wanted]
    used = [engine.render(PROMPT, **SMALL).pixels for engine in engines]
    assert loads == {"load_network": 1, "load_vae": 1, "_load": 2}
    assert all(np.array_equal(*pair) for pair in zip(used, fresh, strict=True))
    assert not any(np.array_equal(fresh[0], other) for other in fresh[1:-1]), "LoRAs that change nothing show nothing"
    engines[4].render(PROMPT, **SMALL)
    lora_file(two, 3, text)
    changed = engines[4].render(PROMPT, **SMALL).pixels
    assert loads["load_network"] == 2, "the weights that the old file touched are not known any more"
    assert np.array_equal(changed, hires.render(PROMPT, loras=(f"{two}:0.5",), **SMALL).pixels)
    for engine in engines:
        engine.close()


WIDTHS = {"text_encoder": 64, "text_encoder_2": 128}


def lora_file(path: Path, seed: int, text: bool) -> Path:
    """A LoRA of rank 2 for some layers of the shipped model's network, and of its text towers."""
    generator, state = torch.Generator().manual_seed(seed), dict[str, torch.Tensor]()
    weights = network_state(hires.load().spec)
    names = [name for name in weights if name.endswith(("attn1.to_q.weight", "attn2.to_v.weight"))][seed::2]
    shapes = {f"unet.{name.removesuffix('.weight')}": tuple(weights[name].shape) for name in names}
    if text:
        shapes |= {f"{tower}.text_model.encoder.layers.0.self_attn.q_proj": (width, width) for tower, width in WIDTHS.items()}
    for name, (rows, cols) in shapes.items():
        state[f"{name}.lora_A.weight"] = torch.randn(2, cols, generator=generator)
        state[f"{name}.lora_B.weight"] = torch.randn(rows, 2, generator=generator) * 0.3
    save_file(state, path)
    return path


@pytest.mark.parametrize("weights", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_packed_weights_are_another_load_and_a_used_engine_is_a_fresh_one(
    weights: str, loads: Counter[str], tmp_path: Path
) -> None:
    """Each storage is loaded by itself and close to the exact picture; LoRAs change in place as a fresh process has them."""
    loras = (f"{lora_file(tmp_path / 'one.safetensors', 1, False)}:0.8",)
    exact = hires.render(PROMPT, **SMALL).pixels.astype(int)
    fresh = [hires.render(PROMPT, weights=weights, loras=refs, **SMALL).pixels for refs in ((), loras)]
    assert 0 < np.abs(fresh[0] - exact).mean() < 8 and not np.array_equal(*fresh)
    loads.clear()
    with hires.load(weights=weights) as plain, hires.load(weights=weights, loras=loras) as merged:
        used = [engine.render(PROMPT, **SMALL).pixels for engine in (plain, merged, plain)]
    assert loads["load_network"] == 1
    assert all(np.array_equal(pixels, fresh[index % 2]) for index, pixels in enumerate(used))
