"""Encodes prompts with a model's text encoders.

Two CLIPs (SDXL), one (SD1.5) or T5 (PixArt).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hires._imports import quiet_imports
from hires.checkpoints.adapters.embeddings import tokenizer_folder
from hires.checkpoints.configs import below, clip_config
from hires.checkpoints.detect_folder import read_json
from hires.checkpoints.families import UNetShape
from hires.checkpoints.headers import read_header, weight_files
from hires.checkpoints.locate import Part, missing
from hires.checkpoints.model import ModelSpec
from hires.errors import ModelError
from hires.models.adapters.change import Change
from hires.models.adapters.lora import merged, tower_layers
from hires.models.loading import Home, State, merge_anew, read_weights, take_weights
from hires.models.prompt_states import clip_conditions
from hires.models.state_dicts import clip_state, open_clip_state
from hires.options.lora import LoraRef
from hires.prompts.script import Wording
from hires.sampling.conditioning import Conditioning
from hires.tiling.retry import is_out_of_memory

log = logging.getLogger(__name__)
COMPONENTS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))


class TextEncoders:
    """The text encoders of a model, read when they first encode.

    Args:
        spec: the checkpoint.
        dtype: of their weights; T5 overflows in half precision and takes bf16 then.
        device: where they run.
        loras: merged into CLIP's weights.
        stay: whether they are kept until `unload`; without, each is let go before the next one is loaded.
    """

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        device: torch.device,
        loras: Sequence[LoraRef] = (),
        stay: bool = False,
    ) -> None:
        self.spec, self.dtype, self.device, self.loras, self.stay = spec, dtype, device, tuple(loras), stay
        self._towers: dict[str, nn.Module] = {}
        self._tokenizers: dict[str, Any] = {}

    def encode(self, texts: Sequence[Wording]) -> list[Conditioning]:
        """One Conditioning of batch 1 per text.

        Two CLIPs: penultimate states of both side by side, pooled from the second. One CLIP: its last states after the final
        norm, no pooled. Either in chunks of 75 tokens, weighted; see `prompt_states`. T5: its states with their mask (1, T),
        a longer text cut at the model's length. An empty prompt is encoded like any other, never zeroed. ModelError where a
        tower or its vocabulary is missing.
        """
        check_parts(self.spec)
        if self.spec.facts.text == ("t5",):
            conditions = _encode_t5(self, [text.text for text in texts])
        else:
            conditions = clip_conditions(self, texts)
        check_width(conditions[0].tokens, self.spec)
        return conditions

    def tower(self, name: str) -> nn.Module:
        """A text tower on the device, by its component's name."""
        if name in self._towers:
            return self._towers[name].to(self.device)
        tower = self._load(name)
        if self.stay:
            self._towers[name] = tower
        return tower

    def tokenizer(self, name: str) -> Any:
        """The tokenizer of T5."""
        if name not in self._tokenizers:
            self._tokenizers[name] = load_tokenizer(self.spec, name)
        return self._tokenizers[name]

    def _load(self, name: str) -> nn.Module:
        if self.spec.facts.text == ("t5",):
            return load_t5(self.spec, torch.float32 if self.dtype == torch.float32 else torch.bfloat16, self.device)
        return load_clip(self.spec, name, self.dtype, self.device, self.loras)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that are loaded."""
        return sum(tensor.nbytes for tower in self._towers.values() for tensor in (*tower.parameters(), *tower.buffers()))

    def take_loras(self, loras: Sequence[LoraRef]) -> None:
        """Change the LoRAs of what is loaded: weights that either set touches are read and merged anew."""
        if self.loras != tuple(loras):
            for name, tower in self._towers.items():
                remerge_tower(tower, self.spec.parts[name], self.loras, loras)
            self.loras = tuple(loras)

    def rest_on_host(self) -> None:
        """Keep what is loaded in host memory until the next prompt."""
        for tower in self._towers.values():
            tower.to("cpu")

    def move_to_host(self) -> None:
        """Let them go and run on the CPU from now on."""
        self.unload()
        self.device = torch.device("cpu")

    def unload(self) -> None:
        """Let their weights go; the next prompt loads them again."""
        self._towers.clear()


def encode_prompts(
    spec: ModelSpec, prompts: Sequence[str | Wording], dtype: torch.dtype, device: torch.device, loras: Sequence[LoraRef] = ()
) -> list[Conditioning]:
    """The conditions of prompts, by encoders that are loaded for them alone; plain text is read without syntax."""
    texts = [Wording(text=prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    return TextEncoders(spec, dtype, device, loras).encode(texts)


def check_width(tokens: Tensor, spec: ModelSpec) -> None:
    """ModelError where towers give text (1, T, D) of another width than the network reads: parts of another model."""
    network = spec.network
    wanted = network.context_width if isinstance(network, UNetShape) else network.caption_width
    if tokens.shape[-1] != wanted:
        towers = ", ".join(str(spec.parts[name].path) for name, _ in COMPONENTS[: len(spec.facts.text)])
        raise ModelError(
            f"the text towers give states of width {tokens.shape[-1]}, the network reads {wanted}: {towers} belong to another "
            f"model; give `parts` of this family"
        )


def check_parts(spec: ModelSpec) -> None:
    """ModelError for missing text encoders and vocabularies, before anything is loaded."""
    parts = [spec.parts[name] for names in COMPONENTS[: len(spec.facts.text)] for name in names]
    absent = [part for part in parts if part.layout == "missing"]
    if absent:
        raise missing(absent, spec.facts)


def _encode_t5(encoders: TextEncoders, prompts: list[str]) -> list[Conditioning]:
    """T5's wo overflows in half precision: it runs in bf16 instead, or in float32 as asked for. No LoRA is made for it."""
    spec, device = encoders.spec, encoders.device
    prompts = [prompt.lower().strip() for prompt in prompts]  # as every caption PixArt was trained on
    tokens, length = encoders.tokenizer("tokenizer"), spec.facts.tokens
    encoded = tokens(prompts, padding="max_length", max_length=length, truncation=True)
    _tell_cut(tokens, prompts, length, "T5")
    ids, mask = torch.tensor(encoded.input_ids), torch.tensor(encoded.attention_mask)
    _tell_unknown(ids == tokens.unk_token_id, mask)
    with torch.inference_mode():
        states = encoders.tower("text_encoder")(ids.to(device), attention_mask=mask.to(device))[0].float()
    keep = mask.bool().to(device)
    return [Conditioning(tokens=states[i : i + 1], mask=keep[i : i + 1], cell_px=spec.cell_px) for i in range(len(prompts))]


def _tell_cut(tokens: Any, prompts: list[str], limit: int, tower: str) -> None:
    for prompt in prompts:
        length = len(tokens(prompt).input_ids)
        if length > limit:
            log.warning("the prompt has %d tokens, %s reads the first %d", length, tower, limit)


def _tell_unknown(unknown: Tensor, mask: Tensor) -> None:
    """Warn of prompts that T5 v1.1 has no words for, such as Chinese ones."""
    for lost, kept in zip(unknown.sum(dim=1).tolist(), mask.sum(dim=1).tolist(), strict=True):
        if lost and 2 * lost >= kept - 1:  # the end mark is always known, and so is the space before a word
            log.warning("T5 has no words for %d of the prompt's %d tokens; write it in English", lost, kept)


def load_tokenizer(spec: ModelSpec, component: str) -> Any:
    """T5's tokenizer. ModelError says where it was looked for, or what else it needs."""
    folder = tokenizer_folder(spec, component)
    with quiet_imports():
        from transformers import AutoTokenizer
    try:
        with quiet_imports():
            # without trust_remote_code=False a folder's tokenizer asks on the terminal whether to run its own code
            tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if not tokens.model_max_length >= 1:
                raise ValueError(f"model_max_length {tokens.model_max_length}")
            return tokens
    except Exception as error:  # a damaged vocabulary is a bare Exception of the tokenizers library
        what = f"the tokenizer cannot be loaded ({_first_line(error)})"
        raise ModelError(f"{folder}: {what}{_spiece_hint(folder)}") from error


def _spiece_hint(folder: Path) -> str:
    if (folder / "spiece.model").is_file() and not (folder / "tokenizer.json").is_file():
        return "; a spiece.model needs `pip install sentencepiece protobuf`"
    return "; download it again"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]


def load_clip(
    spec: ModelSpec, tower: str, dtype: torch.dtype, device: torch.device, loras: Sequence[LoraRef] = ()
) -> nn.Module:
    """A CLIP text tower from its folder or the model's single file, in eval mode, its LoRAs merged in float32."""
    part = spec.parts[tower]
    if part.layout == "ldm":
        return _clip_of_file(part, dtype, device, loras)
    with quiet_imports():
        from transformers import CLIPTextModel, CLIPTextModelWithProjection
    kind = CLIPTextModelWithProjection if tower == "text_encoder_2" else CLIPTextModel
    model = _pretrained(kind, part, torch.float32 if loras else dtype)
    merge_into(model, tower_layers(loras, model.state_dict().keys(), tower))
    return model.to(device, dtype).eval()


def _clip_of_file(part: Part, dtype: torch.dtype, device: torch.device, loras: Sequence[LoraRef]) -> nn.Module:
    with quiet_imports():
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    assert part.path is not None and part.config is not None
    config = CLIPTextConfig(**clip_config(below(read_header(part.path).shapes, part.prefix), part.config))
    second = part.component == "text_encoder_2"
    with torch.device("meta"):
        model: nn.Module = (CLIPTextModelWithProjection if second else CLIPTextModel)(config)
    if second:
        state = open_clip_state(part.path, part.prefix, model.state_dict().keys())
    else:
        state = clip_state(part.path, part.prefix, model.state_dict().keys())
    layers = tower_layers(loras, model.state_dict().keys(), part.component)
    return take_weights(model, state, part.path, Home(device=device, dtype=dtype), layers)


def remerge_tower(tower: nn.Module, part: Part, before: Sequence[LoraRef], loras: Sequence[LoraRef]) -> None:
    """Give a CLIP tower that holds the LoRAs `before` others, as if it had been loaded with these, bit for bit."""
    names = tower.state_dict().keys()
    touched, layers = (tower_layers(refs, names, part.component) for refs in (before, loras))
    if touched or layers:
        merge_anew(tower, _tower_state(part, tower), touched, layers)


def _tower_state(part: Part, tower: nn.Module) -> State:
    """The tensors of a tower's file under the names of the loaded module, mapped and not read."""
    assert part.path is not None
    wanted = tower.state_dict().keys()
    if part.layout == "ldm":
        second = part.component == "text_encoder_2"
        return open_clip_state(part.path, part.prefix, wanted) if second else clip_state(part.path, part.prefix, wanted)
    state = read_weights(part.path)
    return state | {other: state[name] for name in state for other in _other_names(name) if other in wanted}


def _other_names(name: str) -> tuple[str, str]:
    """CLIP's tensors with and without the prefix that transformers once wrote and now leaves out."""
    return f"text_model.{name}", name.removeprefix("text_model.")


def load_t5(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The T5 encoder from its folder, in eval mode, in bf16 or float32."""
    with quiet_imports():
        from transformers import T5EncoderModel
    assert dtype != torch.float16, "T5 overflows in half precision"
    return _pretrained(T5EncoderModel, spec.parts["text_encoder"], dtype).to(device).eval()


def _pretrained(kind: Any, part: Part, dtype: torch.dtype) -> nn.Module:
    """A tower that transformers saved. ModelError where a weight is missing or of another shape."""
    if part.path is None or not (part.path / "config.json").is_file():
        raise ModelError(f"{part.path}/config.json: missing; a model folder holds its text encoders and tokenizers")
    config = read_json(part.path / "config.json")
    if type(config.get("eos_token_id", 2)) is not int and config.get("model_type") == "clip_text_model":
        raise ModelError(f"{part.path}: eos_token_id {str(config['eos_token_id'])[:60]} is no token; download the model again")
    variant = "fp16" if any(".fp16" in file.name for file in weight_files(part.path)) else None
    try:
        with quiet_imports():
            model, report = kind.from_pretrained(
                part.path,
                dtype=dtype,
                variant=variant,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # what transformers makes of an odd config is anything
        if is_out_of_memory(error):
            raise
        raise ModelError(f"{part.path}: cannot be loaded ({_first_line(error)}); download the model again") from None
    wrong = [key for kind_of in ("missing_keys", "mismatched_keys") for key in report[kind_of]]
    if wrong:
        raise ModelError(f"{part.path}: the weights lack {len(wrong)} tensors, such as {wrong[0]}; download it again")
    loaded: nn.Module = model
    return loaded


def merge_into(model: nn.Module, layers: dict[str, list[Change]]) -> None:
    """Merge LoRA layers into a loaded module's weights, in place."""
    state = model.state_dict()
    with torch.no_grad():
        for name, of_weight in layers.items():
            state[name].copy_(merged(state[name], of_weight))
