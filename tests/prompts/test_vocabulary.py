"""The shipped vocabularies, and reading one from a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from hires.checkpoints.locate import ASSETS, TOKENIZERS
from hires.errors import ModelError
from hires.prompts.vocabulary import read_vocabulary, saved_tokenizer

ODD = [
    "",
    "  ",
    "\u65e5\u672c\u8a9e \u0442\u0435\u043a\u0441\u0442",
    "\U0001f600 \u00fcn\u00efcode \uff26ull\u3000width\n two  spaces",
    "it's DON'T 1024x768!!!",
    "a\u0301 \u00c9 \ufb01 \u00bd \u2167",
    "<|endoftext|> x <|startoftext|>",
    "\u0000 x \ufeff",
]


def test_clips_vocabulary_gives_the_ids_of_transformers() -> None:
    from transformers import CLIPTokenizer

    known = read_vocabulary(TOKENIZERS / "clip")
    theirs = CLIPTokenizer.from_pretrained(TOKENIZERS / "clip")
    assert (known.size, known.start, known.end, known.comma) == (49408, 49406, 49407, 267)
    assert known.length == 77 and (known.pad(0), known.pad(1)) == (49407, 0)
    assert known.encode("an astronaut riding a horse") == [550, 18376, 6765, 320, 4558]
    for text in ODD:
        assert known.encode(text) == theirs(text, add_special_tokens=False).input_ids, text


def test_t5s_vocabulary_gives_the_published_ids() -> None:
    ids = saved_tokenizer(TOKENIZERS / "t5" / "tokenizer.json").encode("Hello, my dog is cute").ids
    assert ids == [8774, 6, 82, 1782, 19, 5295, 1]  # of the documentation of T5


def test_a_damaged_vocabulary_names_its_folder(tmp_path: Path) -> None:
    for name, content in (("vocab.json", "{"), ("merges.txt", "#version: 0.2\n")):
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=r"the tokenizer cannot be loaded"):
        read_vocabulary(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0, "b</w>": 1}')
    with pytest.raises(ModelError, match="no vocabulary of CLIP"):
        read_vocabulary(tmp_path)


def test_every_asset_of_others_has_the_text_of_its_licence() -> None:
    """What is not the project's own lies beside its licence; the expression in pyproject.toml names each."""
    import tomllib

    project = tomllib.loads((ASSETS.parents[1] / "pyproject.toml").read_text())["project"]
    others = {"tokenizers/clip": "MIT", "tokenizers/t5": "Apache-2.0", "web": "BSD-3-Clause", "swagger": "Apache-2.0"}
    first_words = {"MIT": "MIT License", "Apache-2.0": "Apache License", "BSD-3-Clause": "Redistribution and use"}
    own = {"configs", "demo"}
    rooms = {path.name for path in ASSETS.iterdir() if path.is_dir()}
    assert rooms == own | {place.split("/")[0] for place in others}
    assert {path.name for path in (ASSETS / "tokenizers").iterdir()} == {"clip", "t5"}
    for place, licence in others.items():
        texts = [path for path in (ASSETS / place).iterdir() if "LICENSE" in path.name]
        assert texts and first_words[licence] in texts[0].read_text()[:600], place
    assert set(project["license"].split(" AND ")) == {"Apache-2.0", *others.values()}
    assert {"hires/assets/**/*LICENSE*", "hires/assets/**/NOTICE"} <= {*project["license-files"]}
    assert "SmartBear" in (ASSETS / "swagger" / "NOTICE").read_text()
