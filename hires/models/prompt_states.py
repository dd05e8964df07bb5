"""Encodes weighted prompts of any length with CLIP towers: chunks of 75 tokens, joined."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hires.checkpoints.adapters.embeddings import chunks_of, clip_vocabulary, count_rows, fitting, tower_widths, widths
from hires.checkpoints.model import ModelSpec
from hires.errors import ModelError, RequestError
from hires.models.adapters.textual_inversion import read_rows
from hires.planning.costs.text import TEXTS_AT_ONCE
from hires.prompts.chunks import Chunk
from hires.prompts.embeddings import EmbeddingFile
from hires.prompts.script import Wording
from hires.prompts.vocabulary import Vocabulary
from hires.sampling.conditioning import Conditioning

log = logging.getLogger(__name__)
SDXL_LAYER = 2
"""Which of its last layers SDXL was trained on, counted from the end."""
LEAST_MEAN = 0.05
"""Below this share of the old mean, A1111's division by the new one amplifies rounding; a warning says so."""


class ClipTowers(Protocol):
    """The text encoders of a model, loaded as they are needed."""

    spec: ModelSpec
    device: torch.device

    def tower(self, name: str) -> nn.Module:
        """A tower by its component's name, on the device."""
        ...


@dataclass(frozen=True, slots=True)
class ChunkStates:
    """What a CLIP tower gives for chunks of text."""

    tokens: Tensor
    """The states of the layer that feeds the network, (n, T, D) float32."""
    pooled: Tensor | None
    """(n, P) float32; None for a tower without a projection."""


def clip_conditions(encoders: ClipTowers, texts: Sequence[Wording]) -> list[Conditioning]:
    """One Conditioning of batch 1 per text: tokens (1, T·chunks, D) of both towers side by side, pooled (1, P) of the second.

    Weights scale the states of the layer that feeds the network, in the rule of each text's syntax; pooled is that of the
    first chunk, never weighted. An empty prompt is encoded like any other. ModelError for parts of another model.
    """
    count = len(encoders.spec.facts.text)
    names = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))[:count]
    chunks = [chunks_of(encoders.spec, text) for text in texts]
    tell_unfitting(encoders.spec, texts)
    rows = []
    pooled: list[Tensor | None] = [None] * len(texts)
    for index, (component, vocabulary) in enumerate(names):
        tower = ClipTower(encoders.tower(component), clip_vocabulary(encoders.spec, vocabulary), index, single=count == 1)
        states = tower.encode(texts, [of_text[index] for of_text in chunks], encoders.device)
        rows.append([state.tokens.flatten(0, 1) for state in states])
        pooled = [None if state.pooled is None else state.pooled[:1] for state in states]
        del tower
    cell_px = encoders.spec.cell_px
    together = [torch.cat(parts, dim=-1) for parts in zip(*rows, strict=True)]
    return [Conditioning(tokens=row[None], pooled=pool, cell_px=cell_px) for row, pool in zip(together, pooled, strict=True)]


def tell_unfitting(spec: ModelSpec, texts: Sequence[Wording]) -> None:
    """Warn of embeddings that were trained for other text towers."""
    files = {file.name: (file, text.syntax) for text in texts for file in text.embeddings}
    for name, (file, syntax) in files.items():
        towers = tower_widths(spec)
        rows = fitting(file, towers, every=syntax == "a1111")
        if 0 in rows:
            outcome = "its name is read as words" if syntax == "a1111" else "it is left out of the towers that it does not fit"
            log.warning(
                "embedding %s is for text towers of width %s, this model's have %s: %s",
                name,
                " and ".join(map(str, widths(file))),
                " and ".join(map(str, towers)),
                outcome,
            )


class ClipTower:
    """A CLIP text tower with its vocabulary.

    Args:
        tower: transformers' CLIPTextModel or CLIPTextModelWithProjection.
        vocabulary: its vocabulary.
        index: 0 for CLIP-L, 1 for SDXL's OpenCLIP-G.
        single: whether it is the model's only tower, whose states go through the final norm (SD1.5).
    """

    def __init__(self, tower: nn.Module, vocabulary: Vocabulary, index: int, single: bool) -> None:
        self.module, self.vocabulary, self.index, self.single = tower, vocabulary, index, single
        inner: Any = getattr(tower, "text_model", tower)
        self.table: nn.Embedding = inner.embeddings.token_embedding
        self._norm: nn.Module = inner.final_layer_norm
        known = self.table.num_embeddings
        if vocabulary.size > known:
            raise ModelError(
                f"{vocabulary.path}: a vocabulary of {vocabulary.size} words, the text tower knows {known}; "
                f"give `parts` with the tokenizer of this model"
            )

    def encode(self, texts: Sequence[Wording], chunks: Sequence[Sequence[Chunk]], device: torch.device) -> list[ChunkStates]:
        """The weighted states of the chunks of each text."""
        empty = any(text.syntax == "comfyui" and _weighted(of_text) for text, of_text in zip(texts, chunks, strict=True))
        rows: list[Chunk] = [chunk for of_text in chunks for chunk in of_text] + [()] * empty
        vectors = self._vectors(texts)
        parts = [self._forward(rows[i : i + TEXTS_AT_ONCE], vectors, device) for i in range(0, len(rows), TEXTS_AT_ONCE)]
        skips = {text.clip_skip if self.single or text.syntax != "a1111" else None for text in texts}
        assert len(skips) == 1, "the texts of a request are read by one rule"
        tokens = torch.cat([self._layer(part, next(iter(skips))) for part in parts])
        pooled = [getattr(part, "text_embeds", None) for part in parts]
        whole = None if pooled[0] is None else torch.cat([pool.float() for pool in pooled if pool is not None])
        result, start = [], 0
        for text, of_text in zip(texts, chunks, strict=True):
            stop = start + len(of_text)
            states = self._weigh(text.syntax, tokens[start:stop], of_text, tokens[-1])
            result.append(ChunkStates(states, None if whole is None else whole[start:stop]))
            start = stop
        return result

    def _vectors(self, texts: Sequence[Wording]) -> dict[str, Tensor]:
        files: dict[str, EmbeddingFile] = {file.name: file for text in texts for file in text.embeddings}
        width = self.table.embedding_dim
        rows = {name: read_rows(file, self.index, width) for name, file in files.items() if count_rows(file, self.index, width)}
        return {name: value.to(self.table.weight) for name, value in rows.items()}

    def ids(self, chunks: Sequence[Chunk]) -> Tensor:
        """The chunks with their marks and padding, (n, length)."""
        length, pad = self.vocabulary.length, self.vocabulary.pad(self.index)
        rows = [[self.vocabulary.start, *(token.id for token in chunk), self.vocabulary.end] for chunk in chunks]
        return torch.tensor([row + [pad] * (length - len(row)) for row in rows])

    def _forward(self, chunks: Sequence[Chunk], vectors: dict[str, Tensor], device: torch.device) -> Any:
        places = [
            (row, place + 1, vectors[token.vector.embedding][token.vector.row])
            for row, chunk in enumerate(chunks)
            for place, token in enumerate(chunk)
            if token.vector is not None
        ]

        def replace_rows(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            for row, place, value in places:
                output[row, place] = value
            return output

        hook = self.table.register_forward_hook(replace_rows) if places else None
        try:
            with torch.inference_mode():
                return self.module(self.ids(chunks).to(device), output_hidden_states=True)
        finally:
            if hook is not None:
                hook.remove()

    def _layer(self, output: Any, clip_skip: int | None) -> Tensor:
        """The states that feed the network: SD1.5's go through the final norm, SDXL's do not."""
        layers = len(output.hidden_states) - 1
        if clip_skip is not None and clip_skip > layers:
            raise RequestError(f"clip_skip {clip_skip}: the text tower has {layers} layers; give 1 to {layers}")
        if not self.single:
            states: Tensor = output.hidden_states[-(clip_skip or SDXL_LAYER)].float()
            return states
        if clip_skip in (None, 1):
            last: Tensor = output.last_hidden_state.float()
            return last
        with torch.inference_mode():
            normed: Tensor = self._norm(output.hidden_states[-clip_skip]).float()
        return normed

    def _weigh(self, syntax: str, states: Tensor, chunks: Sequence[Chunk], empty: Tensor) -> Tensor:
        """States (n, T, D) of chunks under the weights of their tokens."""
        if not _weighted(chunks):
            return states
        weights = torch.ones(states.shape[:2], dtype=states.dtype)
        for row, chunk in enumerate(chunks):
            weights[row, 1 : len(chunk) + 1] = torch.tensor([token.weight for token in chunk])
        weights = weights[..., None].to(states.device)
        return toward_empty(states, weights, empty) if syntax == "comfyui" else mean_kept(states, weights)


def _weighted(chunks: Sequence[Chunk]) -> bool:
    return any(token.weight != 1.0 for chunk in chunks for token in chunk)


def mean_kept(states: Tensor, weights: Tensor) -> Tensor:
    """A1111's rule: z' = z w, times mean(z) / mean(z') of each chunk, marks and padding included.

    states (n, T, D), weights (n, T, 1). A mean near 0 or of the other sign, which negative weights can give, makes the factor
    large or negative: it is applied as it is there, and told in a warning.
    """
    scaled = states * weights
    before, after = states.mean((1, 2), keepdim=True), scaled.mean((1, 2), keepdim=True)
    factors = before / after
    unsteady = ~torch.isfinite(factors) | (factors <= 0) | (factors.abs() > 1 / LEAST_MEAN)
    if unsteady.any():
        log.warning(
            "the prompt's weights change the mean of its states to %.3g of what it was: A1111's scaling is unsteady there; "
            "use weights nearer to 1, or the comfyui syntax",
            float((after / before)[unsteady][0]),
        )
        factors = torch.where(torch.isfinite(factors), factors, torch.ones_like(factors))
    return scaled * factors


def toward_empty(states: Tensor, weights: Tensor, empty: Tensor) -> Tensor:
    """ComfyUI's rule: z' = e + w (z - e), e (T, D) the states of an empty prompt at the same place."""
    return torch.where(weights == 1, states, empty + weights * (states - empty))
