"""LoRA tags of A1111's prompts: read as A1111 reads them, what is not honoured is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from hires.errors import RequestError
from hires.server.a1111.fields import Txt2Img
from hires.server.a1111.scripts import ScriptSettings
from hires.server.a1111.tasks import Translator
from hires.server.settings import Library, Settings


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
        "negative_prompt: its LoRA tags are left out; give them in the prompt",
    ]
    ref = Library(Settings(folder=tmp_path, loras=tmp_path)).lora("style:0.5:0.8")
    assert (Path(ref.path).name, ref.scale, ref.text_scale) == ("style.safetensors", 0.5, 0.8)


def test_arguments_that_are_not_honoured_are_told_and_wrong_ones_refused(tmp_path: Path) -> None:
    _, loras, notes = translated(tmp_path, "<lora:style:1:dyn=8:start=3>")
    assert loras == ["style:1"]
    assert notes == ["LoRA style: dyn=8 is not supported, left out", "LoRA style: start=3 is not supported, left out"]
    with pytest.raises(RequestError, match="the tag says 'strong'"):
        translated(tmp_path, "<lora:style:strong>")
