"""Weighted prompts of any length through tiny towers with CLIP's real vocabulary, against the formulas in float64."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hires._imports import quiet_imports
from hires.checkpoints.locate import TOKENIZERS, folder_part
from hires.checkpoints.model import ModelSpec
from hires.errors import ModelError, RequestError
from hires.models import prompt_states
from hires.models.prompt_states import clip_conditions, mean_kept, toward_empty
from hires.prompts.embeddings import find_embeddings
from hires.prompts.script import Wording
from hires.prompts.vocabulary import read_vocabulary

with quiet_imports():
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

WORDS = read_vocabulary(TOKENIZERS / "clip")
WIDTH = 16
COMMA = 267


@dataclass
class Towers:
    """Two towers of two layers, or the first alone."""

    spec: ModelSpec
    modules: dict[str, nn.Module]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def tower(self, name: str) -> nn.Module:
        return self.modules[name]


@pytest.fixture(scope="module")
def towers() -> Towers:
    tiny = {
        "hidden_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 32, "projection_dim": 12,
        "vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406,
    }  # fmt: skip
    torch.manual_seed(3)
    first, second = (
        CLIPTextModel(CLIPTextConfig(**tiny)),
        CLIPTextModelWithProjection(CLIPTextConfig(**tiny, hidden_act="gelu")),
    )
    for module in (first, second):
        for parameter in module.parameters():
            parameter.data.normal_(0.1, 0.3)
    modules = {"text_encoder": first.eval(), "text_encoder_2": second.eval()}
    return Towers(spec_of("sdxl"), modules)


def spec_of(family: str) -> ModelSpec:
    from hires.checkpoints.families import FAMILIES
    from hires.checkpoints.spec import load_spec

    parts = {name: folder_part(TOKENIZERS / "clip", name) for name in ("tokenizer", "tokenizer_2")}
    return replace(load_spec("demo"), facts=FAMILIES[family], parts=parts, defaults=FAMILIES[family].defaults)


def prompts(syntax: str) -> list[tuple[str, list[list[tuple[str, float]]]]]:
    """200 prompts with their runs, between breaks."""
    rng = random.Random(f"prompts {syntax}")
    nouns = [
        "fox",
        "snow",
        "a red",
        "castle",
        "",
        " ",
        "of glass",
        "extraordinarily",
        "xylophone 12",
        "at dusk",
        "höhe",
        "'s",
        "mountain range",
    ]
    result = []
    for index in range(200):
        sections: list[list[tuple[str, float]]] = [[]]
        text = ""
        for _ in range(rng.randint(0, 3) if index % 4 else rng.randint(4, 30)):
            words = " ".join(rng.choice(nouns) for _ in range(rng.randint(1, 12)))
            words = (words + rng.choice((", ", " ", ""))) or "fox"
            weight = rng.choice((1.0, 1.0, 1.3, 0.7, 1.05, -0.2))
            text += words if weight == 1.0 else f"({words}:{weight:g})"
            sections[-1].append((words, weight))
            if syntax == "a1111" and rng.random() < 0.08:
                text += " BREAK "
                sections.append([])
        result.append((text, sections))
    return result


def joined_runs(runs: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Neighbours of one weight as one run: A1111 encodes them together."""
    result: list[tuple[str, float]] = []
    for words, weight in runs:
        if result and result[-1][1] == weight:
            result[-1] = (result[-1][0] + words, weight)
        else:
            result.append((words, weight))
    return result


def a1111_reference(sections: list[list[tuple[str, float]]]) -> list[list[tuple[int, float]]]:
    """Chunks, each the longest head of what is left that the rules allow."""
    chunks: list[list[tuple[int, float]]] = []
    for index, runs in enumerate(sections):
        rest = [(number, weight) for words, weight in joined_runs(runs) for number in WORDS.encode(words)]
        before = len(chunks)
        while len(rest) > 75:
            cut = 75
            commas = [place for place in range(75) if rest[place][0] == COMMA]
            if rest[75][0] != COMMA and commas and 75 - commas[-1] <= 20:
                cut = commas[-1] + 1
            chunks.append(rest[:cut])
            rest = rest[cut:]
        last = index == len(sections) - 1
        if rest or (not (last and chunks) and len(chunks) == before):
            chunks.append(rest)
    return chunks


def comfyui_reference(runs: list[tuple[str, float]]) -> list[list[tuple[int, float]]]:
    chunks: list[list[tuple[int, float]]] = [[]]
    for words, weight in merged_plain(runs):
        group = [(number, weight) for number in WORDS.encode(words)]
        small = len(group) < 8
        while group:
            room = 75 - len(chunks[-1])
            if len(group) > room and small:
                chunks.append([])
            elif len(group) > room:
                chunks[-1] += group[:room]
                group = group[room:]
                chunks.append([])
            else:
                chunks[-1] += group
                group = []
    return chunks


def merged_plain(runs: Sequence[tuple[str, float]]) -> Iterator[tuple[str, float]]:
    """Text without brackets between two brackets is one segment; every bracket is one of its own."""
    plain = ""
    for words, weight in runs:
        if weight == 1.0:
            plain += words
            continue
        if plain:
            yield plain, 1.0
        plain = ""
        yield words, weight
    if plain:
        yield plain, 1.0


def reference(module: nn.Module, chunks: list[list[tuple[int, float]]], syntax: str, pad: int) -> tuple[Tensor, Tensor | None]:
    """The weighted penultimate states of a prompt (77 n, D) and the pooled ones of its first chunk, in float64."""
    ids = [[49406, *(number for number, _ in chunk), 49407] for chunk in [*chunks, []]]
    rows = torch.tensor([row + [pad] * (77 - len(row)) for row in ids])
    with torch.inference_mode():
        output = module(rows, output_hidden_states=True)
    states, pooled = output.hidden_states[-2], getattr(output, "text_embeds", None)
    result = []
    for z, chunk in zip(states[:-1], chunks, strict=True):
        w = torch.ones(77, 1, dtype=torch.float64)
        for place, (_, weight) in enumerate(chunk):
            w[place + 1] = weight
        if syntax == "a1111":
            result.append(z * w * (z.mean() / (z * w).mean()))
        else:
            result.append(states[-1] + w * (z - states[-1]))
    return torch.cat(result), None if pooled is None else pooled[0]


@pytest.mark.parametrize("syntax", ["a1111", "comfyui"])
def test_200_prompts_equal_the_formulas(towers: Towers, syntax: str) -> None:
    """Emphasis times old mean over new mean in A1111's syntax, distance from the empty prompt in ComfyUI's; both towers."""
    made = prompts(syntax)
    found = clip_conditions(towers, [Wording(text=text, syntax=syntax) for text, _ in made])
    doubled = [copy.deepcopy(towers.modules[name]).double() for name in ("text_encoder", "text_encoder_2")]
    lengths = set()
    for (text, sections), cond in zip(made, found, strict=True):
        chunks = a1111_reference(sections) if syntax == "a1111" else comfyui_reference(sections[0])
        states = [reference(module, chunks, syntax, pad) for module, pad in zip(doubled, (49407, 0), strict=True)]
        wanted = torch.cat([tokens for tokens, _ in states], dim=-1)
        assert cond.tokens.shape[1:] == wanted.shape, text
        assert (cond.tokens[0] - wanted).abs().max() <= 2e-5 * wanted.abs().max(), text
        assert cond.pooled is not None and states[1][1] is not None
        assert (cond.pooled[0] - states[1][1]).abs().max() <= 2e-5 * states[1][1].abs().max(), text
        lengths.add(len(chunks))
    assert {1, 2, 3} <= lengths


def test_the_reference_numbers_of_both_rules() -> None:
    z = torch.tensor([[1, 2, -1, 0.5], [0.5, -1, 3, 2], [2, 0.25, -0.5, 1]]).double()[None]
    e = torch.tensor([[1, 2, -1, 0.5], [0.25, 0.5, 1, -1], [-0.5, 1, 0, 0.75]]).double()
    w = torch.tensor([1, 1.3, 0.8]).double()[None, :, None]
    assert torch.allclose(
        mean_kept(z, w)[0, 1], torch.tensor([0.6007109005, -1.2014218009, 3.6042654028, 2.4028436019]).double()
    )
    assert torch.allclose(
        toward_empty(z, w, e)[0, 1:], torch.tensor([[0.575, -1.45, 3.6, 2.9], [1.5, 0.4, -0.4, 0.95]]).double()
    )


def test_a_mean_that_changes_its_sign_is_told(caplog: pytest.LogCaptureFixture) -> None:
    z = torch.tensor([[1, 2, -1, 0.5], [0.5, -1, 3, 2], [2, 0.25, -0.5, 1]]).double()[None]
    turned = mean_kept(z, torch.tensor([1.0, -1, 0]).double()[None, :, None])
    assert torch.allclose(turned[0, 0], -4.875 * z[0, 0]) and "unsteady" in caplog.text
    caplog.clear()
    assert mean_kept(z - z.mean(), torch.ones(1, 3, 1)).isfinite().all()


def test_long_prompts_are_joined_and_the_second_tower_is_filled_with_zeros(towers: Towers) -> None:
    """The pad of the second tower is id 0, whatever folder its vocabulary was found in."""
    (cond,) = clip_conditions(towers, [Wording(text="a fox " * 100, syntax="a1111")])
    assert cond.tokens.shape == (1, 3 * 77, 2 * WIDTH)
    seen: list[Tensor] = []
    hook = towers.modules["text_encoder_2"].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    clip_conditions(towers, [Wording(text="a fox")])
    hook.remove()
    assert seen[0][0].tolist() == [49406, 320, 3240, 49407] + [0] * 73


def test_the_shorter_of_two_texts_gets_empty_chunks(towers: Towers) -> None:
    long, short = "a fox " * 50, "a house"
    both, alone = clip_conditions(towers, [Wording(text=long, text_l=short), Wording(text=short)])
    assert both.tokens.shape[1] == 2 * 77
    assert torch.allclose(both.tokens[:, :77, :WIDTH], alone.tokens[..., :WIDTH], atol=1e-6)


@pytest.mark.parametrize(
    ("family", "syntax", "skip", "layer", "normed"),
    [
        ("sd15", "a1111", None, -1, True), ("sd15", "a1111", 1, -1, True), ("sd15", "a1111", 2, -2, True),
        ("sd15", "comfyui", 2, -2, True), ("sdxl", "a1111", None, -2, False), ("sdxl", "a1111", 3, -2, False),
        ("sdxl", "comfyui", 1, -1, False), ("sdxl", "comfyui", 2, -2, False), ("sdxl", "comfyui", 3, -3, False),
    ],
)  # fmt: skip
def test_clip_skip(towers: Towers, family: str, syntax: str, skip: int | None, layer: int, normed: bool) -> None:
    """SD1.5: the layer through the final norm; SDXL: without it, and in A1111's syntax always the one before the last."""
    (cond,) = clip_conditions(replace(towers, spec=spec_of(family)), [Wording(text="a fox", syntax=syntax, clip_skip=skip)])
    module = towers.modules["text_encoder"]
    ids = torch.tensor([[49406, 320, 3240] + [49407] * 74])
    with torch.inference_mode():
        states = module(ids, output_hidden_states=True).hidden_states[layer]
        inner = getattr(module, "text_model", module)
        wanted = inner.final_layer_norm(states) if normed else states
    assert torch.allclose(cond.tokens[..., :WIDTH], wanted, atol=1e-5)


def test_a_layer_that_is_not_there_is_refused(towers: Towers) -> None:
    with pytest.raises(RequestError, match=r"clip_skip 12: the text tower has 3 layers; give 1 to 3"):
        clip_conditions(towers, [Wording(text="a", syntax="comfyui", clip_skip=12)])


# --- textual inversion -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Embeddings of every kind for towers of this width."""
    for module in (prompt_states, __import__("hires.checkpoints.adapters.embeddings", fromlist=["x"])):
        monkeypatch.setattr(module, "tower_widths", lambda spec: (WIDTH,) * len(spec.facts.text))
    draw = torch.Generator().manual_seed(1)

    def rows(count: int, width: int = WIDTH) -> Tensor:
        return torch.randn(count, width, generator=draw)

    save_file({"clip_l": rows(2), "clip_g": rows(2)}, tmp_path / "pair.safetensors")
    save_file({"<token>": rows(1)[0]}, tmp_path / "diff users.safetensors")
    torch.save(
        {"string_to_param": {"*": rows(3)}, "string_to_token": {"*": 265}, "name": "old", "step": 5}, tmp_path / "old.pt"
    )
    save_file({"emb_params": rows(2)}, tmp_path / "kohya.safetensors")
    save_file({"emb_params": rows(2, 20)}, tmp_path / "wide.safetensors")
    save_file({"emb_params": rows(80)}, tmp_path / "huge.safetensors")
    return tmp_path


def ids_and_rows(towers: Towers, text: str, folder: Path, syntax: str, family: str = "sd15") -> tuple[list[int], Tensor]:
    """The ids that the first tower is given and the embeddings that it starts from."""
    from hires.prompts.script import Prompts

    known = tuple(find_embeddings(folder).values())
    wording = Prompts(positive=text, syntax=syntax, embeddings=known).wording(text, None)
    seen: list[tuple[Tensor, Tensor]] = []
    module = towers.modules["text_encoder"]
    inner = getattr(module, "text_model", module)
    hook = inner.embeddings.register_forward_hook(lambda layer, args, output: seen.append((layer, output)))
    ids: list[Tensor] = []
    table = inner.embeddings.token_embedding.register_forward_pre_hook(lambda layer, args: ids.append(args[0]))
    try:
        clip_conditions(replace(towers, spec=spec_of(family)), [wording])
    finally:
        hook.remove()
        table.remove()
    places = inner.embeddings.position_embedding.weight
    return ids[0][0].tolist(), seen[0][1][0] - places


@pytest.mark.parametrize(
    ("text", "syntax", "file", "key", "place"),
    [
        ("a pair x", "a1111", "pair.safetensors", "clip_l", 2),
        ("a embedding:pair x", "a1111", "pair.safetensors", "clip_l", 2),
        ("a embedding:pair, x", "comfyui", "pair.safetensors", "clip_l", 2),
        ("a embedding:pair.safetensors x", "comfyui", "pair.safetensors", "clip_l", 2),
        ("a (diff  Users:1.2) x", "a1111", "diff users.safetensors", "<token>", 2),
        ("a kohya x", "a1111", "kohya.safetensors", "emb_params", 2),
        ("embedding:old", "comfyui", "old.pt", "*", 1),
        ("old", "a1111", "old.pt", "*", 1),
    ],
)
def test_an_embedding_takes_the_place_of_its_name(
    towers: Towers, folder: Path, text: str, syntax: str, file: str, key: str, place: int
) -> None:
    from safetensors.torch import load_file

    path = folder / file
    tensors = torch.load(path)["string_to_param"] if path.suffix == ".pt" else load_file(path)
    wanted = tensors[key].reshape(-1, WIDTH)
    ids, rows = ids_and_rows(towers, text, folder, syntax)
    assert torch.allclose(rows[place : place + len(wanted)], wanted, atol=1e-5)
    assert ids[place : place + len(wanted)] == [0] * len(wanted)
    before = {1: [49406], 2: [49406, 320]}[place]
    assert ids[:place] == before


@pytest.mark.parametrize("text", ["a pair x", "a kohya x"])
def test_a_bare_name_is_a_word_in_comfyuis_syntax(towers: Towers, folder: Path, text: str) -> None:
    assert ids_and_rows(towers, text, folder, "comfyui")[0][1:-1][:3] == WORDS.encode(text)[:3]


def test_what_does_not_fit_is_read_as_words_or_left_out_and_told(
    towers: Towers, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "a embedding:wide x"
    ids, _ = ids_and_rows(towers, text, folder, "a1111")
    assert ids[: len(WORDS.encode(text)) + 1] == [49406, *WORDS.encode(text)] and "width 20" in caplog.text
    caplog.clear()
    ids, _ = ids_and_rows(towers, text, folder, "comfyui")
    assert ids[:4] == [49406, 320, WORDS.encode("x")[0], 49407] and "left out" in caplog.text
    ids, _ = ids_and_rows(towers, "a embedding:none x", folder, "comfyui")
    assert ids[:4] == [49406, 320, WORDS.encode("x")[0], 49407]
    with pytest.raises(ModelError, match="an embedding of 80 rows"):
        ids_and_rows(towers, "huge", folder, "a1111")


def test_an_embedding_that_no_longer_fits_begins_the_next_chunk(towers: Towers, folder: Path) -> None:
    ids, _ = ids_and_rows(towers, "a " * 74 + "pair", folder, "a1111")
    assert ids[:77] == [49406] + [320] * 74 + [49407] * 2


def test_a_lora_brings_embeddings_by_their_names(towers: Towers, folder: Path, tmp_path: Path) -> None:
    from hires.checkpoints.adapters.embeddings import prompts_of
    from hires.options.lora import LoraRef
    from hires.options.render import RenderRequest
    from hires.tiling.geometry import Size

    rows = torch.arange(2.0 * WIDTH).reshape(2, WIDTH)
    save_file({"bundle_emb.glow.string_to_param.*": rows, "lora_te_x.alpha": torch.ones(())}, tmp_path / "lora.safetensors")
    lora = LoraRef(str(tmp_path / "lora.safetensors"))
    request = RenderRequest(prompt="a glow", size=Size(64, 64), loras=(lora,), embeddings=str(folder))
    prompts = prompts_of(request, spec_of("sd15"))
    wording = prompts.wording("a glow", None)
    assert [(file.name, file.bundle) for file in wording.embeddings] == [("glow", "bundle_emb.glow.")]
    (cond,) = clip_conditions(replace(towers, spec=spec_of("sd15")), [wording])
    (words,) = clip_conditions(replace(towers, spec=spec_of("sd15")), [Wording(text="a glow", syntax="a1111")])
    assert not torch.allclose(cond.tokens, words.tokens)
