"""Prompts to conditions: the towers of files and folders say what the modules they were made from say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hires.checkpoints.families import FAMILIES
from hires.checkpoints.spec import load_spec
from hires.errors import ModelError, RequestError
from hires.models import text_encoders
from hires.models.text_encoders import encode_prompts, load_tokenizer
from tests.support.checkpoints import Checkpoint

Get = Callable[..., Checkpoint]
CPU = torch.device("cpu")
PROMPTS = ["a red house by the sea", ""]


def expected(made: Checkpoint, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Tokens and pooled straight from transformers' modules."""
    with torch.inference_mode():
        if FAMILIES[made.family].text == ("t5",):
            return made.texts[0](ids, attention_mask=mask).last_hidden_state, None
        outputs = [tower(ids, output_hidden_states=True) for tower in made.texts]
    if len(outputs) == 1:
        return outputs[0].last_hidden_state, None
    return torch.cat([o.hidden_states[-2] for o in outputs], dim=-1), outputs[1].text_embeds


@pytest.mark.parametrize("layout", ["file", "folder"])
@pytest.mark.parametrize("family", ["cosxl", "sd15", "pixart-sigma-256", "pixart-alpha-256"])
def test_conditions_are_those_of_the_towers(family: str, layout: str, checkpoint: Get) -> None:
    made = checkpoint(family, layout)
    spec = load_spec(str(made.path), parts=made.parts)
    length = FAMILIES[family].tokens
    batch = load_tokenizer(spec, "tokenizer")(PROMPTS, padding="max_length", max_length=length, return_tensors="pt")
    tokens, pooled = expected(made, batch.input_ids, batch.attention_mask)
    for i, cond in enumerate(encode_prompts(spec, PROMPTS, torch.float32, CPU)):
        assert cond.tokens.shape == (1, length, tokens.shape[-1])
        assert cond.tokens.dtype == torch.float32
        assert torch.equal(cond.tokens[0], tokens[i])
        assert cond.tokens.abs().mean() > 0.01  # an empty prompt is encoded, never zeroed
        assert (cond.pooled is None) == (pooled is None)
        if pooled is not None and cond.pooled is not None:
            assert torch.equal(cond.pooled[0], pooled[i])
        if family.startswith("pixart"):
            assert cond.mask is not None
            assert cond.mask.dtype == torch.bool
            assert torch.equal(cond.mask, batch.attention_mask[i : i + 1].bool())
            assert cond.mask.sum() == (1 if i else len(PROMPTS[0].replace(" ", "_")) + 2)
        else:
            assert cond.mask is None


def test_t5_never_runs_in_half_precision(checkpoint: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = text_encoders.load_t5

    def watched(spec: object, dtype: torch.dtype, device: torch.device) -> object:
        seen.append(dtype)
        return real(spec, dtype, device)  # type: ignore[arg-type]

    monkeypatch.setattr(text_encoders, "load_t5", watched)
    made = checkpoint("pixart-sigma-256")
    spec = load_spec(str(made.path), parts=made.parts)
    for asked in (torch.float16, torch.bfloat16, torch.float32):
        cond = encode_prompts(spec, ["a"], asked, CPU)[0]
        assert cond.tokens.isfinite().all()
    assert seen == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_towers_are_loaded_one_after_the_other_and_freed(checkpoint: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    alive: list[weakref.ref[object]] = []
    real = text_encoders.load_clip

    def watched(*args: object) -> object:
        gc.collect()
        assert not [ref for ref in alive if ref() is not None]
        model = real(*args)  # type: ignore[arg-type]
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(text_encoders, "load_clip", watched)
    made = checkpoint("cosxl")
    encode_prompts(load_spec(str(made.path), parts=made.parts), ["a"], torch.float32, CPU)
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_a_long_prompt_is_cut_for_t5_and_says_so(checkpoint: Get, caplog: pytest.LogCaptureFixture) -> None:
    made = checkpoint("pixart-alpha-256")
    cond = encode_prompts(load_spec(str(made.path), parts=made.parts), ["word " * 200], torch.float32, CPU)[0]
    assert cond.tokens.shape[1] == 120
    assert "reads the first 120" in caplog.text


def test_a_prompt_that_t5_has_no_words_for_is_told(checkpoint: Get, caplog: pytest.LogCaptureFixture) -> None:
    made = checkpoint("pixart-sigma-256")
    spec = load_spec(str(made.path), parts=made.parts)
    encode_prompts(spec, ["a house", ""], torch.float32, CPU)
    assert "no words for" not in caplog.text
    encode_prompts(spec, ["夕 阳 下 的 红 房 子"], torch.float32, CPU)
    assert "T5 has no words for" in caplog.text


def test_towers_of_files_without_the_outer_name_load_as_well(tmp_path: Path, checkpoint: Get) -> None:
    """Some SD1.5 merges were saved without text_model."""
    made = checkpoint("sd15")
    state = {key.replace("transformer.text_model.", "transformer."): value for key, value in load_file(made.path).items()}
    save_file(state, tmp_path / "a.safetensors")
    spec = load_spec(str(tmp_path / "a.safetensors"), parts=made.parts)
    wanted = encode_prompts(load_spec(str(made.path), parts=made.parts), ["a house"], torch.float32, CPU)[0]
    assert torch.equal(encode_prompts(spec, ["a house"], torch.float32, CPU)[0].tokens, wanted.tokens)


def test_towers_of_another_model_are_refused(tmp_path: Path, checkpoint: Get) -> None:
    """A T5 of another width among the parts."""
    from transformers import T5Config, T5EncoderModel

    made = checkpoint("pixart-sigma-256")
    assert made.parts is not None
    shutil.copytree(made.parts, tmp_path / "parts")
    config = T5Config(**json.loads((made.parts / "text_encoder" / "config.json").read_text()) | {"d_model": 48})
    T5EncoderModel(config).save_pretrained(tmp_path / "parts" / "text_encoder")
    with pytest.raises(ModelError, match="width 48, the network reads 32"):
        encode_prompts(load_spec(str(made.path), parts=tmp_path / "parts"), ["a"], torch.float32, CPU)


def test_a_missing_tower_says_where_it_was_looked_for_and_what_to_do(checkpoint: Get) -> None:
    made = checkpoint("pixart-sigma-256")
    with pytest.raises(
        ModelError, match=r"text_encoder missing \(looked in .*text_encoder.*give `parts`.*hf download"
    ) as caught:
        encode_prompts(load_spec(str(made.path)), ["a"], torch.float32, CPU)
    assert str(made.path.parent / "text_encoder") in str(caught.value)
    assert FAMILIES["pixart-sigma-256"].parts_from[0] in str(caught.value)
    with pytest.raises(ModelError, match="no such folder"):
        load_spec(str(made.path), parts="/no/such/folder")


def test_damaged_towers_and_vocabularies_say_so(tmp_path: Path, checkpoint: Get) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("cosxl", "folder").path, folder)
    weights = next((folder / "text_encoder").glob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    with pytest.raises(ModelError, match="damaged or cut short"):
        load_spec(str(folder))
    weights.write_bytes(whole)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ModelError, match="the weights lack"):
        encode_prompts(load_spec(str(folder)), ["a"], torch.float32, CPU)
    (folder / "tokenizer" / "vocab.json").write_text("{")
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        encode_prompts(load_spec(str(folder)), ["a"], torch.float32, CPU)


def test_cleaning_deletes_what_captions_never_had() -> None:
    from hires.options.captions import clean

    assert (
        clean("A Red &amp; Blue House by the wide Sea, https://x.org/a <b>now</b> …")
        == "a red & blue house by the wide sea, now …"
    )
    assert clean("") == ""
    assert clean("a house 房子") == "a house"


def test_cleaning_that_would_lose_the_prompt_is_refused() -> None:
    import hires

    with pytest.raises(RequestError, match=r"would delete 12 of the prompt's 12 letters.*leave `clean_caption` out"):
        hires.plan("夕阳下的红房子和蓝色大海", size="256x256", clean_caption=True)
    assert hires.plan("夕阳下的红房子和蓝色大海", size="256x256").strategy


def test_the_spiece_model_that_pixart_is_published_with(tmp_path: Path, checkpoint: Get) -> None:
    """A vocabulary of sentencepiece in the folder's layout, read to the same ids as sentencepiece itself gives."""
    import sentencepiece

    made = checkpoint("pixart-sigma-256")
    assert made.parts is not None
    parts = tmp_path / "parts"
    shutil.copytree(made.parts, parts)
    shutil.rmtree(parts / "tokenizer")
    (parts / "tokenizer").mkdir()
    words = tmp_path / "words.txt"
    words.write_text(
        "\n".join(
            f"a red sun over the {place} and the {other}" for place in ["lake", "sea", "hill"] for other in ["x", "y", "z"]
        )
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(words), model_prefix=str(parts / "tokenizer" / "spiece"), vocab_size=22, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (parts / "tokenizer" / "spiece.vocab").unlink()
    (parts / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 0, "legacy": True})
    )
    spec = load_spec(str(made.path), family=made.family, parts=str(parts))
    tokens = load_tokenizer(spec, "tokenizer")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(parts / "tokenizer" / "spiece.model"))
    for prompt in ("a red sun over the lake", "the hill and the sea", ""):
        assert tokens(prompt).input_ids == [*reference.encode(prompt), 1]
