"""What a request's prompts become on each kind of model: notes, refusals, tags."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import hires
from hires.errors import RequestError
from hires.options.lora import LoraRef
from hires.prompts.attention import read_runs
from hires.prompts.script import Prompts, write_script
from hires.prompts.syntax import notes, resolve_syntax, words_note
from hires.prompts.tags import cut_tags
from tests.support.checkpoints import Checkpoint, lora

Get = Callable[..., Checkpoint]
PLAN = {"size": "256x256", "vram": "24GB"}


@pytest.fixture(scope="module")
def sdxl(checkpoint: Get) -> Callable[..., hires.MemoryPlan]:
    made = checkpoint("sdxl")

    def plan(prompt: str, **options: object) -> hires.MemoryPlan:
        return hires.plan(prompt, **PLAN, model=str(made.path), parts=str(made.parts), **options)

    return plan


@pytest.mark.parametrize(
    ("prompt", "options", "told"),
    [
        ("a (fox", {}, "1 of its brackets never close"),
        ("a fox)", {}, "1 of its closing brackets open nowhere"),
        ("a AND", {}, "1 of the prompts around AND are empty"),
        ("a AND b:0.5", {}, "2 prompts put together by AND with weights 1, 0.5"),
        ("(a BREAK b:1.2)", {}, "a BREAK within brackets is a word"),
        ("a | b [c:d:0.5]", {}, "no schedule can be read in it"),
        ("a (fox: 1.3)", {}, "': 1.3)' is no weight but words"),
        ("a (fox:1e9)", {}, "':1e9)' is no weight but words"),
        ("a # <lora:unknown:1>", {}, "what follows a # is a comment"),
        ("a # b", {}, "what follows a # is a comment"),
        ("a embedding:lost", {}, "embedding:lost is not among the embeddings; read as words"),
        ("a embedding:lost", {"prompt_syntax": "comfyui"}, "embedding:lost is not among the embeddings; left out"),
        ("a BREAK [b:c:0.5] AND d", {"prompt_syntax": "comfyui"}, "BREAK, AND, square brackets are words"),
        ("a) (b:1.3)", {"prompt_syntax": "comfyui"}, "none of them weighs anything"),
        ("word " * 2000, {}, "the longest text takes"),
        ("a BREAK b", {"clean_caption": True}, "BREAK and AND are words"),
        ("a", {"clip_skip": 3}, "clip_skip 3: has no effect on SDXL in A1111's syntax"),
    ],
)
def test_what_a_prompt_means_is_told(
    sdxl: Callable[..., hires.MemoryPlan], prompt: str, options: dict[str, object], told: str
) -> None:
    if prompt.startswith("word"):
        prompt = prompt[:2000]  # of the test's vocabulary of letters
    assert any(told in note for note in sdxl(prompt, **options).notes)


@pytest.mark.parametrize(
    ("prompt", "options", "told"),
    [
        ("(x:1000000000)", {}, r"prompt weight 1e\+09 of 'x': give one from -100 to 100"),
        ("(x:1.2.3)", {}, "is no number"),
        ("[(x:1000000000):y:0.5]", {}, r"prompt weight 1e\+09"),
        ("a AND b", {"prompt_l": "c"}, "prompt_l: cannot stand beside AND"),
        ("word " * 2000, {}, "give at most 64"),
        ("a " * 30_000, {}, "prompt of 60000 characters"),
        ("a AND " * 64, {}, "AND puts 65 prompts together"),
        ("[" * 101, {}, "more than 100 brackets open at once"),
        ("(" * 101 + "a" + ":1)" * 101, {"prompt_syntax": "comfyui"}, "more than 100 brackets open at once"),
        ("a", {"crop": "1"}, "crop '1': give X,Y"),
        ("a", {"crop": "-1,0"}, "crop -1,0: give each from 0"),
        ("a", {"clip_skip": 13}, "clip_skip 13: give a layer from 1"),
        ("a", {"embeddings": "/no/such"}, "embeddings /no/such: is not a folder"),
        ("a <lora:x:0.8>", {}, "give the folder that it is in with `lora_dir`"),
        ("a <hypernet:x:1>", {}, "prompt tag <hypernet:x:1>: only <lora:name:scale> is known"),
    ],
)
def test_what_cannot_be_read_is_refused(
    sdxl: Callable[..., hires.MemoryPlan], prompt: str, options: dict[str, object], told: str
) -> None:
    with pytest.raises(RequestError, match=told):
        sdxl(prompt, **options)


def test_t5_and_the_shipped_model_take_words(checkpoint: Get) -> None:
    pixart = checkpoint("pixart-sigma-256")
    models = {"demo": {}, str(pixart.path): {"parts": str(pixart.parts)}}
    for model, options in models.items():
        notes = hires.plan("a (sun) over [hills] BREAK", **PLAN, model=model, **options).notes
        assert sum("takes no prompt syntax: ( ) [ ] BREAK are words" in note for note in notes) == 1
        assert not any("syntax" in note for note in hires.plan("a sun over hills", **PLAN, model=model, **options).notes)
        with pytest.raises(RequestError, match=r"prompt weight '\(sun:1.3\)': .* takes no weights"):
            hires.plan("a (sun:1.3) over hills", **PLAN, model=model, **options)
        hires.plan("a (sun:1.3) over hills", **PLAN, model=model, prompt_syntax="none", **options)
        with pytest.raises(RequestError, match=r"prompt_syntax a1111: .* takes whole sentences"):
            hires.plan("a", **PLAN, model=model, prompt_syntax="a1111", **options)
        with pytest.raises(RequestError, match="prompt tag <lora:x>: stands behind a #"):
            hires.plan("a #1 fox <lora:x>", **PLAN, model=model, **options)
        long = hires.plan("a sun over hills and " * 100, **PLAN, model=model, **options).notes
        assert any("reads the first" in note for note in long)
    with pytest.raises(RequestError, match=r"clip_skip 2: .* reads prompts with T5"):
        hires.plan("a", **PLAN, model=str(pixart.path), parts=str(pixart.parts), clip_skip=2)
    with pytest.raises(RequestError, match=r"target_size 64x64: .* is told no sizes"):
        hires.plan("a", **PLAN, model=str(pixart.path), parts=str(pixart.parts), target_size="64x64")


def test_an_edit_has_no_and(checkpoint: Get) -> None:
    made = checkpoint("cosxl-edit")
    with pytest.raises(RequestError, match="AND puts several estimates together, and an edit has three"):
        hires.plan("a AND b", **PLAN, model=str(made.path), parts=str(made.parts))


def test_loras_of_a_prompt_are_those_of_a_folder(
    tmp_path: Path, checkpoint: Get, sdxl: Callable[..., hires.MemoryPlan]
) -> None:
    (tmp_path / "inner").mkdir()
    lora(tmp_path / "inner" / "my style.safetensors", checkpoint("sdxl"), "kohya")
    notes = sdxl("a fox <lora:my style:0.5>, snow", lora_dir=tmp_path).notes
    assert any("LoRA my style.safetensors merged at 0.5" in note for note in notes)
    with pytest.raises(RequestError, match="unknown LoRA 'my stile': did you mean 'my style'"):
        sdxl("a <lora:my stile:1>", lora_dir=tmp_path)


def test_more_prompts_are_counted_in_the_plan(sdxl: Callable[..., hires.MemoryPlan]) -> None:
    """An estimate more per step for each, never more than two at once."""
    one, three = sdxl("a fox"), sdxl("a fox AND b AND c")
    assert three.costs[0].flops == pytest.approx(2 * one.costs[0].flops) and three.stages[0].batch <= one.stages[0].batch
    assert three.costs[0].peak_bytes == one.costs[0].peak_bytes


HOSTILE = [
    "(a",
    "[a",
    "a)",
    "(a:",
    "[a:",
    "[a:b:9",
    "[a|b",
    "\\",
    "<lora:",
    " BREAK",
    " ",
    "\n",
    "9",
    "(a:1.1)",
    "[a:b:1e999]",
    ":",
    "|",
    "#",
]


@pytest.mark.parametrize("syntax", ["a1111", "comfyui", "none"])
def test_ten_thousand_marks_are_read_or_refused_at_once(syntax: str) -> None:
    """Each repeated, after other marks and before others; a prompt that costs the square of its length takes a minute."""
    for mark in HOSTILE:
        for text in (mark * (10_000 // len(mark)), "[a (b:" + mark * (10_000 // len(mark)) + " x AND b)]"):
            began = time.process_time()
            with contextlib.suppress(RequestError):
                prompts = Prompts(positive=cut_tags(text, LoraRef, commented=True)[0], syntax=syntax)
                [*notes(prompts), words_note((text,), "m"), resolve_syntax(None, True, (text,), "m")]
                for wording in write_script(prompts, (("base", 4), ("refine 1", 4))).texts:
                    read_runs(wording.text, syntax)
            assert time.process_time() - began < 3, (mark, syntax)
