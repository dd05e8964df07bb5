"""Tells the keys of LoRAs and their kin apart: which layer, which factor of it, which kind of change.

Imports no torch. The spellings are those of kohya's scripts, LyCORIS, peft, diffusers, OneTrainer and ComfyUI's export.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hires.checkpoints.headers import Header
from hires.errors import ModelError

NETWORK, TEXT, TEXT_2 = "network", "text_encoder", "text_encoder_2"
PREFIXES = {
    NETWORK: (
        *("lora_unet_", "oft_unet_", "lycoris_", "lora_transformer_"),
        *("unet.base_model.model.", "unet.", "transformer.base_model.model.", "transformer.", "base_model.model."),
        *("model.diffusion_model.", "diffusion_model."),
    ),
    TEXT: (
        *("lora_te1_", "lora_te_", "oft_te1_", "oft_te_"),
        *("text_encoder.base_model.model.", "text_encoder.", "text_encoders.clip_l.transformer.", "clip_l.transformer."),
    ),
    TEXT_2: (
        *("lora_te2_", "oft_te2_"),
        *("text_encoder_2.base_model.model.", "text_encoder_2.", "text_encoders.clip_g.transformer.", "clip_g.transformer."),
    ),
}
"""What the names of layers start with, by the component that they change; the first that fits counts."""
BARE = ("down_blocks.", "mid_block.", "up_blocks.", "input_blocks.", "middle_block.", "output_blocks.")
"""How a UNet's layers start where a file has no prefix at all."""
EMBEDDINGS = "bundle_emb."
"""What the keys of embeddings that a LoRA brings along start with."""
IDLE = ("text_encoders.clip_l.transformer.text_projection", "clip_l.transformer.text_projection")
"""Layers of ComfyUI's export that no model here has a place for and no picture depends on: CLIP-L's pooled projection."""

_FACTORS = (
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    *("oft_blocks", "oft_diag", "boft_R", "boft_s", "oft_R", "on_input", "dora_scale", "scalar", "scale", "rescale"),
    *("bias_indices", "bias_values", "bias_size", "diff", "diff_b", "set_weight", "w_norm", "b_norm", "alpha"),
    "reshape_weight",
)
_ENDS = {f".{name}": name for name in _FACTORS}
_ENDS |= {f".{name}.weight": name for name in ("a1", "a2", "b1", "b2")}
_ENDS |= {".oft_R.weight": "oft_R", ".oft_R.default.weight": "oft_R", ".lora_mid.weight": "mid"}
for _end, _role in (("A", "down"), ("B", "up")):
    _ENDS |= {f".lora_{_end}{middle}": _role for middle in (".weight", ".default.weight", ".default_0.weight", ".default", "")}
for _role in ("down", "up"):
    _ENDS |= {f"{middle}{_role}.weight": _role for middle in (".lora_", ".lora.", "_lora.", ".lora_linear_layer.")}
for _tail in ("", ".weight", ".default", ".default.weight"):
    _ENDS[f".lora_magnitude_vector{_tail}"] = "magnitude"
ENDS = dict(sorted(_ENDS.items(), key=lambda item: -len(item[0])))
"""What each spelling at the end of a key stands for, the longest ones first."""
MODIFIERS = frozenset({"alpha", "scale", "scalar", "dora_scale", "magnitude", "rescale"})
SPARSE = frozenset({"bias_indices", "bias_values", "bias_size"})
TUCKER_OR_SPARSE = SPARSE | {"hada_t1", "hada_t2", "lokr_t2"}
"""Factors that are of no use without others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A way to change a weight, and the factors that it is stored as."""

    name: str
    title: str
    needs: tuple[tuple[frozenset[str], ...], ...]
    """Of each group one alternative must be there, whole."""
    takes: frozenset[str] = frozenset()
    """Further factors that it may have."""
    leaf: str = "weight"
    """The parameter of the layer that it changes, weight or bias."""

    @property
    def own(self) -> frozenset[str]:
        """The factors that no other kind has."""
        needed = (role for group in self.needs for alternative in group for role in alternative)
        return frozenset(needed) | (self.takes - MODIFIERS)

    @property
    def named(self) -> frozenset[str]:
        """Those of its own that tell it from other kinds."""
        return self.own - SPARSE


def _one(*roles: str) -> tuple[frozenset[str], ...]:
    return (frozenset(roles),)


_LOW_RANK = frozenset({"alpha", "scale", "scalar", "dora_scale", "magnitude"}) | SPARSE
KINDS = {
    kind.name: kind
    for kind in (
        Kind(name="lora", title="LoRA", needs=(_one("up", "down"),), takes=_LOW_RANK | {"mid"}),
        Kind(
            name="loha",
            title="LoHa",
            needs=(_one("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),
            takes=_LOW_RANK | {"hada_t1", "hada_t2"},
        ),
        Kind(
            name="lokr",
            title="LoKr",
            needs=(
                (frozenset({"lokr_w1"}), frozenset({"lokr_w1_a", "lokr_w1_b"})),
                (frozenset({"lokr_w2"}), frozenset({"lokr_w2_a", "lokr_w2_b"})),
            ),
            takes=_LOW_RANK | {"lokr_t2"},
        ),
        Kind(name="glora", title="GLoRA", needs=(_one("a1", "a2", "b1", "b2"),), takes=frozenset({"alpha", "scale", "scalar"})),
        Kind(name="ia3", title="(IA)³", needs=(_one("weight", "on_input"),)),
        Kind(
            name="oft",
            title="OFT",
            needs=((frozenset({"oft_blocks"}), frozenset({"oft_diag"})),),
            takes=frozenset({"alpha", "rescale"}),
        ),
        Kind(name="peft_oft", title="OFT of peft", needs=(_one("oft_R"),)),
        Kind(name="peft_boft", title="BOFT of peft", needs=(_one("boft_R", "boft_s"),)),
        Kind(name="diff", title="full difference", needs=(_one("diff"),)),
        Kind(name="diff_b", title="bias difference", needs=(_one("diff_b"),), leaf="bias"),
        Kind(name="set", title="replaced weight", needs=(_one("set_weight"),)),
        Kind(name="w_norm", title="norm difference", needs=(_one("w_norm"),)),
        Kind(name="b_norm", title="norm bias difference", needs=(_one("b_norm"),), leaf="bias"),
    )
}
_TOGETHER = ("diff_b", "w_norm", "b_norm")
"""Kinds that may stand beside another one in the same layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLayer:
    """What a file does to one parameter of one layer."""

    module: str
    """The layer's name as in the file."""
    component: str
    """network, text_encoder or text_encoder_2."""
    name: str
    """The layer's name below the prefix."""
    kind: Kind
    keys: Mapping[str, str]
    """The key of each factor."""

    @property
    def title(self) -> str:
        """The kind's name with what is special about it: 'LoCon (Tucker)', 'LoKr with DoRA'."""
        tucker = {"mid", "hada_t1", "lokr_t2"} & self.keys.keys()
        name = "LoCon" if "mid" in self.keys else self.kind.title
        dora = {"dora_scale", "magnitude"} & self.keys.keys()
        return f"{name}{' (Tucker)' if tucker else ''}{' with DoRA' if dora else ''}"


def component_of(module: str) -> tuple[str, str] | None:
    """The component that a layer's name is of, and the name below the prefix; None for an unknown prefix."""
    for component, prefixes in PREFIXES.items():
        prefix = next((prefix for prefix in prefixes if module.startswith(prefix)), None)
        if prefix is not None:
            return component, module.removeprefix(prefix)
    return (NETWORK, module) if module.startswith(BARE) else None


def split_keys(names: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The keys of a file by layer and factor, and those of no known factor. Embeddings of the file are in neither."""
    layers: dict[str, dict[str, str]] = defaultdict(dict)
    unknown = []
    inputs = {name.removesuffix(".on_input") for name in names if name.endswith(".on_input")}
    for name in names:
        if name.startswith(EMBEDDINGS):
            continue
        end = next((end for end in ENDS if name.endswith(end)), None)
        if end is None and name.endswith(".weight") and name.removesuffix(".weight") in inputs:
            layers[name.removesuffix(".weight")]["weight"] = name
        elif end is None or name == end:
            unknown.append(name)
        else:
            layers[_plain(name.removesuffix(end))][ENDS[end]] = name
    return dict(layers), unknown


def _plain(module: str) -> str:
    """A layer's name without what diffusers once put in between: '.attn1.processor.to_out' is '.attn1.to_out.0'."""
    if ".processor." in module:
        module = module.replace(".processor.", ".")
        module = f"{module}.0" if module.endswith(".to_out") else module
    return module


def read_layers(header: Header) -> tuple[AdapterLayer, ...]:
    """What a file changes. ModelError for a key of no known kind, a layer that lacks a factor, and an empty tensor."""
    grouped, unknown = split_keys(header.tensors)
    unknown += [next(iter(keys.values())) for module, keys in grouped.items() if component_of(module) is None]
    if unknown:
        few = ", ".join(sorted(unknown)[:3])
        raise ModelError(
            f"loras {header.path}: {len(unknown)} keys are of no kind that can be merged, such as {few}; "
            f"these are: {', '.join(sorted({kind.title for kind in KINDS.values()}))}"
        )
    taken = {key for keys in grouped.values() for key in keys.values()}
    second = min((key for key in header.tensors if key not in taken and not key.startswith(EMBEDDINGS)), default="")
    if second:
        raise ModelError(f"loras {header.path}: {second} stands beside the same factor of its layer; give one adapter a file")
    layers: list[AdapterLayer] = []
    for module, keys in grouped.items():
        if module not in IDLE:
            layers += _layers(header, module, keys)
    return tuple(layers)


def _layers(header: Header, module: str, keys: Mapping[str, str]) -> list[AdapterLayer]:
    where, left = f"loras {header.path}: layer {module}", set(keys)
    layers: list[AdapterLayer] = []
    if "reshape_weight" in keys:
        raise ModelError(f"{where} changes the weight's shape (reshape_weight), as Flux's control LoRAs do; not supported")
    empty = next((role for role, key in keys.items() if 0 in header.tensors[key].shape), None)
    if empty is not None:
        shape = header.tensors[keys[empty]].shape
        raise ModelError(
            f"{where}: {keys[empty]} is empty, of shape {shape}; the file is damaged, ask its author for a whole one"
        )
    component, name = component_of(module) or (NETWORK, module)
    for kind in KINDS.values():
        if not kind.named & left:
            continue
        if layers and kind.name not in _TOGETHER:
            raise ModelError(f"{where} holds two kinds of change, {layers[0].kind.title} and {kind.title}; not supported")
        own = (kind.own | kind.takes) & left
        _check_whole(where, kind, own)
        left -= own
        chosen = {role: keys[role] for role in own}
        layers.append(AdapterLayer(module=module, component=component, name=name, kind=kind, keys=chosen))
    if left:
        few = ", ".join(keys[role] for role in sorted(left))
        raise ModelError(f"{where}: {few} stands without the factors that it belongs to; the file is damaged or incomplete")
    return layers


EITHER = (frozenset({"dora_scale"}), frozenset({"magnitude"}))
"""The two kinds of magnitudes of a DoRA."""


def _check_whole(where: str, kind: Kind, own: Iterable[str]) -> None:
    """ModelError where a layer lacks a factor of its kind, or has one that contradicts another."""
    have = set(own)
    for group in (*kind.needs, EITHER):
        there = sorted(", ".join(sorted(alternative & have)) for alternative in group if alternative & have)
        if len(there) > 1:
            both = " and ".join(there)
            raise ModelError(f"{where} ({kind.title}) has {both}, which say the same; the file is damaged")
    for group in kind.needs:
        if any(alternative <= have for alternative in group):
            continue
        nearest = max(group, key=lambda alternative: len(alternative & have))
        lacks = ", ".join(sorted(nearest - have))
        raise ModelError(f"{where} ({kind.title}) lacks its {lacks}; the file is damaged or incomplete")
    for pair in (frozenset({"hada_t1", "hada_t2"}), frozenset({"lokr_t2", "lokr_w2_a"}), SPARSE):
        if have & pair & TUCKER_OR_SPARSE and not pair <= have:
            raise ModelError(
                f"{where} ({kind.title}) lacks its {', '.join(sorted(pair - have))}; the file is damaged or incomplete"
            )
