"""What a model's text towers make of prompts: vocabularies, rows of textual inversions, chunks. Imports no torch.

The kinds of embedding files: A1111's (`string_to_param`), diffusers' (one tensor, the token as its name), SDXL's (`clip_l`,
`clip_g`), kohya's (`emb_params`), and those that a LoRA brings (`bundle_emb.NAME.`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hires.checkpoints.adapters.detect import bundled_embeddings
from hires.checkpoints.adapters.keys import EMBEDDINGS as BUNDLE
from hires.checkpoints.adapters.loras import lora_file
from hires.checkpoints.configs import below
from hires.checkpoints.detect_folder import read_json
from hires.checkpoints.headers import read_header
from hires.checkpoints.locate import TOKENIZERS, VOCABULARIES, missing
from hires.checkpoints.model import ModelSpec
from hires.errors import ModelError
from hires.options.render import RenderRequest
from hires.prompts.attention import read_runs
from hires.prompts.chunks import CONTENT, Chunk, a1111_chunks, comfyui_chunks
from hires.prompts.embeddings import EmbeddingFile, Placing
from hires.prompts.request import read_prompts
from hires.prompts.script import Prompts, Wording
from hires.prompts.vocabulary import Vocabulary, read_vocabulary, saved_tokenizer

TOWER_KEYS = ("clip_l", "clip_g")
Shape = tuple[int, ...]


def row_keys(shapes: Mapping[str, Shape], tower: int, width: int) -> list[str]:
    """The keys of a file whose tensors are rows for a tower (0: CLIP-L, 1: OpenCLIP-G) of a width; none where none fit."""
    named = {key.rpartition(".")[2]: key for key in shapes if key.rpartition(".")[2] in TOWER_KEYS}
    if named:
        key = named.get(TOWER_KEYS[tower])
        return [key] if key is not None and _fits(shapes[key], width) else []
    return [key for key in sorted(shapes) if _fits(shapes[key], width)]


def _fits(shape: Shape, width: int) -> bool:
    return len(shape) in (1, 2) and shape[-1] == width


def count_rows(file: EmbeddingFile, tower: int, width: int) -> int:
    """How many rows of an embedding there are for a tower; 0 where none fit. ModelError for more than a chunk holds."""
    shapes = _shapes(file)
    rows = sum(1 if len(shapes[key]) == 1 else shapes[key][0] for key in row_keys(shapes, tower, width))
    if rows > CONTENT:
        raise ModelError(f"{file.path}: an embedding of {rows} rows; a chunk of a prompt holds {CONTENT}, give one of fewer")
    return rows


def widths(file: EmbeddingFile) -> list[int]:
    """The widths of an embedding's rows, for messages."""
    return sorted({shape[-1] for shape in _shapes(file).values() if shape})


def _shapes(file: EmbeddingFile) -> dict[str, Shape]:
    shapes = read_header(file.path).shapes
    return {key: shape for key, shape in shapes.items() if key.startswith(file.bundle)}


def tower_widths(spec: ModelSpec) -> tuple[int, ...]:
    """The width of the token embeddings of every text tower, from the headers and configs of its parts."""
    widths = []
    for component in ("text_encoder", "text_encoder_2")[: len(spec.facts.text)]:
        part = spec.parts[component]
        if part.path is None:
            raise missing([part], spec.facts)
        if part.layout == "diffusers":
            widths.append(int(read_json(part.path / "config.json")["hidden_size"]))
        else:
            shapes = below(read_header(part.path).shapes, part.prefix)
            widths.append(next(shape[1] for name, shape in shapes.items() if name.endswith("token_embedding.weight")))
    return tuple(widths)


def fitting(file: EmbeddingFile, towers: Sequence[int], every: bool) -> tuple[int, ...]:
    """How many rows an embedding has for each tower, widths in order.

    every: whether it counts only where it has rows for all towers, as in A1111. ModelError where their numbers differ.
    """
    rows = tuple(count_rows(file, index, width) for index, width in enumerate(towers))
    present = {count for count in rows if count}
    if len(present) > 1:
        raise ModelError(f"{file.path}: has {rows[0]} rows for the first tower and {rows[1]} for the second; train it again")
    return (0,) * len(rows) if every and 0 in rows else rows


def prompts_of(request: RenderRequest, spec: ModelSpec) -> Prompts:
    """The prompts of a request as a model reads them, its LoRAs' embeddings too. RequestError for what it cannot read."""
    bundled = []
    for lora in request.loras:
        path = lora_file(lora)
        for name in bundled_embeddings(read_header(path)):
            bundled.append(EmbeddingFile.of(name, path, f"{BUNDLE}{name}."))
    return read_prompts(request, spec.text_model, bundled)


def tokenizer_folder(spec: ModelSpec, component: str) -> Path:
    """The folder of a tower's vocabulary. ModelError says where it was looked for."""
    part = spec.parts[component]
    if part.path is None:
        raise missing([part], spec.facts)
    if not any((part.path / name).is_file() for name in VOCABULARIES):
        raise ModelError(f"{part.path}: missing one of {', '.join(VOCABULARIES)}; give `parts`, a folder that has them")
    return part.path


def clip_vocabulary(spec: ModelSpec, component: str) -> Vocabulary:
    """The vocabulary of a CLIP tower. ModelError says where it was looked for, or that it is damaged."""
    return read_vocabulary(tokenizer_folder(spec, component))


def chunks_of(spec: ModelSpec, text: Wording) -> list[list[Chunk]]:
    """The chunks of a text for every CLIP tower, as many for each: the shorter is filled up with empty ones.

    RequestError for a weight that is no usable number, ModelError for an embedding that cannot be read.
    """
    components = ("tokenizer", "tokenizer_2")[: len(spec.facts.text)]
    widths = tower_widths(spec) if text.embeddings else (0,) * len(components)
    rows = {file.name: fitting(file, widths, every=text.syntax == "a1111") for file in text.embeddings}
    towers = []
    for tower, component in enumerate(components):
        words = text.text_l if tower == 0 and text.text_l is not None and len(components) > 1 else text.text
        counts = {name: of_towers[tower] for name, of_towers in rows.items()}
        towers.append(_tower_chunks(text, words, clip_vocabulary(spec, component), counts))
    most = 1 if text.cut else max(len(chunks) for chunks in towers)
    return [chunks[:most] + [()] * (most - len(chunks)) for chunks in towers]


def _tower_chunks(text: Wording, words: str, vocabulary: Vocabulary, rows: Mapping[str, int]) -> list[Chunk]:
    known = {file.name.lower(): file for file in text.embeddings}
    placing = Placing(known, lambda file: rows[file.name], vocabulary.encode, text.syntax)
    groups, size = placing.groups(read_runs(words, text.syntax)), vocabulary.length - 2
    if text.syntax == "comfyui":
        return comfyui_chunks(groups, size)
    return a1111_chunks(groups, vocabulary.comma if text.syntax == "a1111" else None, size)


def count_tokens(spec: ModelSpec, text: str) -> int:
    """How many tokens a text without syntax takes, marks apart."""
    if spec.text_model.towers:
        return len(clip_vocabulary(spec, "tokenizer").encode(text))
    folder = spec.parts["tokenizer"].path
    file = None if folder is None else folder / "tokenizer.json"
    if file is None or not file.is_file():  # all T5s of these models share one vocabulary
        file = TOKENIZERS / "t5" / "tokenizer.json"
    return len(saved_tokenizer(file).encode(text, add_special_tokens=False).ids)
