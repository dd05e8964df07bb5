"""LoRA tags of A1111's prompts: read as A1111 reads them, what is not honoured is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from hires.errors import RequestError
from hires.server.a1111.fields import Txt2Img
from hires.server.a1111.scripts import ScriptSettings
from hires.server.a1111.tasks import Translator
from hires.server.app import create_app
from hires.server.settings import Library, Limits, Settings
from tests.support.sent_pictures import png_base64


def translated(folder: Path, prompt: str, negative: str = "") -> tuple[object, object, list[str]]:
    (folder / "style.safetensors").write_bytes(b"x")
    settings = Settings(folder=folder, loras=folder)
    translator = Translator(settings, Library(settings))
    body = Txt2Img(prompt=prompt, negative_prompt=negative)
    request, options = translator._common(body, ScriptSettings())
    return options["prompt"], options["loras"], request.notes


def test_tags_become_loras_with_the_texts_strength_first(tmp_path: Path) -> None:
    ones = ",".join("1" * 12)
    prompt, loras, notes = translated(
        tmp_path, f"a <lora:style:0.8:0.5>lake<lora:style:1:lbw={ones}> <lora:nobody>", "ugly<lora:style:2>"
    )
    assert (prompt, loras) == ("a lake ", ["style:0.5:0.8", f"style:1:lbw={ones}"])
    assert notes == [
        "LoRA nobody: is not offered here, left out",
        "negative_prompt: its tags are left out; give them in the prompt",
    ]
    ref = Library(Settings(folder=tmp_path, loras=tmp_path)).lora("style:0.5:0.8")
    assert (Path(ref.path).name, ref.scale, ref.text_scale) == ("style.safetensors", 0.5, 0.8)


def test_arguments_that_are_not_honoured_are_told_and_wrong_ones_refused(tmp_path: Path) -> None:
    _, loras, notes = translated(tmp_path, "<lora:style:1:dyn=8:start=3>")
    assert loras == ["style:1"]
    assert notes == ["LoRA style: dyn=8 is not supported, left out", "LoRA style: start=3 is not supported, left out"]
    with pytest.raises(RequestError, match="the tag says 'strong'"):
        translated(tmp_path, "<lora:style:strong>")


def test_tags_of_other_kinds_are_left_out_and_told(tmp_path: Path) -> None:
    prompt, loras, notes = translated(tmp_path, "a <hypernet:old:1>lake <lyco:style:0.5>")
    assert (prompt, loras) == ("a lake ", ["style:0.5"])
    assert notes == ["prompt tag <hypernet:old:1>: is not known, left out"]


@pytest.mark.parametrize(("value", "wanted"), [(None, None), (1, None), (2, 2), (2.0, 2)])
def test_clip_stop_is_clip_skip(tmp_path: Path, value: object, wanted: int | None) -> None:
    settings = Settings(folder=tmp_path)
    body = Txt2Img(prompt="a", override_settings={} if value is None else {"CLIP_stop_at_last_layers": value})
    translated, options = Translator(settings, Library(settings))._common(body, ScriptSettings())
    assert options["clip_skip"] == wanted and translated.ignored == []


def test_a_layer_that_is_no_number_is_refused(tmp_path: Path) -> None:
    settings = Settings(folder=tmp_path)
    body = Txt2Img(prompt="a", override_settings={"CLIP_stop_at_last_layers": "two"})
    with pytest.raises(RequestError, match="CLIP_stop_at_last_layers 'two': give a layer"):
        Translator(settings, Library(settings))._common(body, ScriptSettings())


def tiled(*args: object) -> dict[str, object]:
    return {"alwayson_scripts": {"Tiled Diffusion": {"args": [True, "MultiDiffusion", *args]}}}


def ultimate(kind: int, *args: object) -> dict[str, object]:
    before = [None, 512, 0, 8, 32, 64, 0.35, 32, 0, True, 0, False, 8, 0]
    return {"script_name": "ultimate sd upscale", "script_args": [*before, kind, *args]}


def test_sizes_without_pixels_or_beyond_the_limits_are_refused_before_a_picture_is_resized(tmp_path: Path) -> None:
    limits = Limits(input_pixels=10_000, output_pixels=40_000)
    client = TestClient(create_app(Settings(folder=tmp_path, limits=limits)), base_url="http://127.0.0.1")
    picture = {"prompt": "a", "init_images": [png_base64(16, 16)]}
    masked = picture | {"mask": png_base64(16, 16, "L")}
    for sides in ({"width": 0}, {"height": 0}, {"width": False}, {"width": 0, "height": 0}):
        for path, body in (
            ("txt2img", {"prompt": "a"}),
            ("txt2img", {"prompt": "a", "enable_hr": True}),
            ("txt2img", {"prompt": "a", "enable_hr": True, "hr_resize_y": 64}),
            ("img2img", picture),
            ("img2img", masked),
            ("img2img", masked | {"inpaint_full_res": False}),
        ):
            answer = client.post(f"/sdapi/v1/{path}", json=body | sides)
            assert answer.status_code == 422 and "greater than or equal to 1" in answer.json()["detail"], (path, body.keys())
    for body, reason in (
        ({"width": 256, "height": 256}, "over this server's limit"),
        ({"width": 128, "height": 128}, "send the picture to /jobs"),
        ({"width": 128, "height": 128, "mask": masked["mask"]}, "send the picture to /jobs"),
        (tiled(True, False, 0, 0), "at least 16 px"),
        (tiled(False, True, 0, 0, 96, 96, 48, 4, "Lanczos", 1e-9), "at least 16 px"),
        (tiled(False, True, 0, 0, 96, 96, 48, 4, "Lanczos", 1e308), "scale_factor"),
        (tiled(False, True, 0, 0, 96, 96, 48, 4, "Lanczos", -1), "scale_factor"),
        (ultimate(1, 0, 0), "at least 16 px"),
        (ultimate(1, -4, 50), "give WIDTHxHEIGHT"),
        (ultimate(2, 0, 0, 1e-9), "at least 16 px"),
    ):
        answer = client.post("/sdapi/v1/img2img", json={"width": 64, "height": 64} | picture | body)
        assert answer.status_code == 400 and reason in answer.json()["detail"], (body, answer.text[:300])
