"""Tells what a checkpoint file is from the names and shapes of its tensors.

Imports no torch and reads no tensor.

Where keys cannot tell (PixArt's δ, DMD, YOSO) the user says so with a family's name; a word in the file's name is a
hint, and the finding says that it was used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from hires.checkpoints.adapters.detect import lora_facts
from hires.checkpoints.configs import LDM_CLIP_G, LDM_NETWORK, Shapes, as_ldm_names, below, count
from hires.checkpoints.families import FAMILIES
from hires.checkpoints.headers import Header, read_header
from hires.checkpoints.other_families import other_kind
from hires.errors import ModelError, unknown

HINTS = {  # few-step files of SDXL and SD1.5 are told in profiles.py
    "lcm": ("pixart-delta",),
    "dmd": ("pixart-dmd",),
    "yoso": ("yoso-pixart-512",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a file or folder is."""

    path: Path
    kind: str
    """model, lora or vae."""
    family: str
    """A name of `FAMILIES`; for a LoRA what it was trained for, in words where no family fits, or '' where its keys do not
    tell.
    """
    layout: str
    """How its keys are named: ldm, pixart, diffusers, or 'diffusers file' for a UNet of diffusers in one file."""
    why: tuple[str, ...]
    """The keys and values that decided."""
    header: Header | None = None
    prefix: str = ""
    """What the names of the network's tensors start with."""
    outer: str = ""
    """What all names in the file start with: 'state_dict.' of a .ckpt."""
    parameterisation: str | None = None
    sigma_range: tuple[float, float] | None = None
    """The least and the largest sigma that the file gives; None without."""
    betas: tuple[str, float, float] | None = None
    """The betas that the file gives; None without."""
    zero_terminal_snr: bool = False
    size_conditions: bool | None = None
    native_px: int | None = None
    context: int | None = None
    """The width of the text that a LoRA's cross-attention reads; None without."""
    control: int = 0
    """Copied blocks of a PixArt ControlNet."""
    notes: tuple[str, ...] = ()


def supported() -> str:
    """The families, for messages."""
    return f"supported: {', '.join(FAMILIES)}"


def identify_file(path: Path, family: str | None = None) -> Finding:
    """A single file of weights. `family` is what the user says it is; ModelError where the keys say otherwise."""
    header = read_header(path)
    shapes = header.shapes
    lora = identify_lora(header)
    if lora is not None:
        return lora
    _refuse_other_kinds(path, shapes)
    place = unet_place(shapes)
    if place is not None:
        return named(_ldm(header, place), family)
    if any(name.endswith("t_block.1.weight") for name in shapes):
        return named(_pixart(header, family), family)
    return _other(header)


def named(finding: Finding, family: str | None) -> Finding:
    """The finding as the family that the user names, or that a word in the file's name hints at."""
    base = FAMILIES[finding.family].same_keys_as or finding.family
    alike = [
        finding.family,
        *(f.name for f in FAMILIES.values() if base in (f.name, f.same_keys_as) and f.name != finding.family),
    ]
    if family is not None:
        if family not in FAMILIES:
            raise ModelError(unknown("family", family, FAMILIES))
        if family not in alike:
            others = f", or give {' or '.join(alike[1:])} if it is that" if alike[1:] else ""
            raise ModelError(
                f"family {family}: {finding.path} is {finding.family} ({'; '.join(finding.why)}); leave `family` out{others}"
            )
        return replace(finding, family=family, why=(*finding.why, f"family {family}"))
    if FAMILIES[finding.family].few_step:
        return finding
    for word, families in HINTS.items():
        hinted = [name for name in families if name in alike]
        if hinted and says(word, finding.path.name):
            note = f"{word!r} in its name: taken as {hinted[0]}, whose keys are those of {base}; else `family` {base}"
            return replace(finding, family=hinted[0], notes=(*finding.notes, note))
    return finding


def says(word: str, name: str) -> bool:
    """Whether a name holds a word: sd_xl_turbo, dreamLCM and lcm-lora do, calcmatic does not."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).lower()
    return re.search(rf"(?<![a-z]){word}(?![a-z])", apart) is not None


def identify_lora(header: Header) -> Finding | None:
    """What a LoRA was made for, from its keys and the width of the text it reads; None for a file that is no LoRA."""
    facts = lora_facts(header)
    if facts is None:
        return None
    return Finding(
        path=header.path,
        kind="lora",
        family=facts.family,
        layout="pixart" if facts.family == "pixart" else "ldm",
        why=facts.why,
        header=header,
        context=facts.context,
    )


def _refuse(path: Path, what: str, why: str) -> ModelError:
    return ModelError(f"{path}: {what} ({why}) is not supported; {supported()}")


def _refuse_other_kinds(path: Path, shapes: Shapes) -> None:
    """ModelError that names a file of another kind, says which key decided, and what to do instead."""
    other = other_kind(shapes)
    if other is not None:
        kind, key = other
        raise ModelError(f"{path}: {kind.name} ({key}) is no model that hires runs: {kind.move}")


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetPlace:
    """Where in a file a UNet is, and how its tensors are named."""

    layout: str
    """ldm or 'diffusers file'."""
    prefix: str
    outer: str


FIRST_LDM, FIRST_DIFFUSERS = "input_blocks.0.0.weight", "down_blocks.0.resnets.0.conv1.weight"


def unet_place(shapes: Iterable[str]) -> UNetPlace | None:
    """Where a file's UNet is: under the prefix of a whole checkpoint, else under any or none; None without one."""
    names = set(shapes)
    for first, layout in ((FIRST_LDM, "ldm"), (FIRST_DIFFUSERS, "diffusers file")):
        prefixes = [name.removesuffix(first) for name in names if name == first or name.endswith(f".{first}")]
        prefixes = [p for p in prefixes if not p.endswith("encoder.") and (layout == "ldm" or f"{p}conv_in.weight" in names)]
        if prefixes:
            prefix = min(prefixes, key=lambda p: (not p.endswith(LDM_NETWORK), len(p), p))
            inside = prefix.endswith(LDM_NETWORK)
            return UNetPlace(layout=layout, prefix=prefix, outer=prefix.removesuffix(LDM_NETWORK) if inside else "")
    return None


def unet_shapes(header: Header, finding: Finding | UNetPlace) -> dict[str, tuple[int, ...]]:
    """The UNet's tensors under latent diffusion's names, however the file names them."""
    shapes = below(header.shapes, finding.prefix)
    return as_ldm_names(shapes) if finding.layout == "diffusers file" else shapes


def _ldm(header: Header, place: UNetPlace) -> Finding:
    """A UNet of SDXL's or SD1.5's layout in a file, in the order: input channels, size conditions, flags."""
    path, shapes = header.path, below(header.shapes, place.outer)
    unet = unet_shapes(header, place)
    if not any(name.endswith(".attn2.to_k.weight") for name in unet):
        raise _refuse(path, "a UNet that reads no text", f"no attn2.to_k under {place.prefix or 'its names'}")
    channels = unet[FIRST_LDM][1]
    context = next((shape[1] for name, shape in unet.items() if name.endswith(".attn2.to_k.weight")), 0)
    naming = "diffusers" if place.layout == "diffusers file" else "latent diffusion"
    why = [f"UNet keys of {naming} {f'under {place.prefix}' if place.prefix else 'without a prefix'}"]
    if channels not in (4, 8):
        raise _refuse(
            path, CHANNELS.get(channels, f"a UNet of {channels} input channels"), f"{FIRST_LDM} of {channels} channels"
        )
    made = Finding(path=path, kind="model", family="sdxl", layout=place.layout, why=(), header=header)
    made = replace(made, prefix=place.prefix, outer=place.outer, notes=_file_notes(header))
    if "label_emb.0.0.weight" not in unet:
        if context == 1024 or any(name.startswith("cond_stage_model.model.") for name in shapes):
            raise _refuse(path, "Stable Diffusion 2", f"text of width {context}")
        if channels == 8:
            raise _refuse(path, "a Stable Diffusion 1.5 of 8 input channels", "InstructPix2Pix or CustomNet")
        why.append(f"no size conditions (label_emb), text of width {context}")
        return replace(made, family="sd15", why=tuple(why))
    why.append("size conditions (label_emb.0.0)")
    if any(name.startswith(LDM_CLIP_G) for name in shapes):
        why.append(f"a second text tower under {LDM_CLIP_G}")
    return _sdxl(made, unet, channels, why)


CHANNELS = {
    5: "a depth model of 5 input channels",
    7: "a UNet that enlarges, of 7 input channels",
    9: "an inpainting model of 9 input channels, for which `init` and `mask` with a plain checkpoint stand in,",
}
"""What a UNet is that takes more than noisy latents."""
LAYOUTS: dict[tuple[tuple[int, ...], ...], str] = {
    ((0, 0), (2, 2), (4, 4)): "SSD-1B",
    ((0, 0), (1, 1), (2, 2)): "Segmind-Vega",
    ((0,), (2,), (5,)): "KOALA-700M",
    ((0,), (2,), (6,)): "KOALA-1B",
}
"""Thinner SDXL UNets, by the depth of each transformer on the way down."""


def layout_name(unet: Shapes) -> str | None:
    """The name of a thinner UNet of SDXL's kind, by its depths; None for SDXL's own and others."""
    inputs = count(unet, r"input_blocks\.(\d+)\.")
    levels: list[list[int]] = [[]]
    for i in range(1, inputs):
        if f"input_blocks.{i}.0.op.weight" in unet:
            levels.append([])
        else:
            levels[-1].append(count(unet, rf"input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\."))
    return LAYOUTS.get(tuple(map(tuple, levels)))


def _file_notes(header: Header) -> tuple[str, ...]:
    """What a plan says of how a file stores its tensors, and of tensors that are not used."""
    notes = []
    if header.storage:
        notes.append(f"weights stored as {header.storage}, widened to the computing type as they are loaded")
    if any("model_ema." in name for name in header.tensors):
        notes.append("model_ema: the running mean of its UNet is not used, the UNet itself is")
    return tuple(notes)


def _sdxl(finding: Finding, unet: Shapes, channels: int, why: list[str]) -> Finding:
    header, image = finding.header, channels == 8
    assert header is not None
    shapes = below(header.shapes, finding.outer)
    thinner = layout_name(unet)
    if thinner:
        why.append(f"transformers as deep as {thinner}'s")
    if image:
        why.append("8 input channels: latents of a picture to edit")
    if "edm_vpred.sigma_max" in shapes:
        highest = header.scalars.get(f"{finding.outer}edm_vpred.sigma_max", math.nan)
        lowest = header.scalars.get(f"{finding.outer}edm_vpred.sigma_min", 0.002)
        if not 0 < lowest < highest < math.inf:
            raise ModelError(f"{header.path}: edm_vpred.sigma_min {lowest}, sigma_max {highest} is no range; download it again")
        why.append(f"edm_vpred.sigma_max {highest:g}, sigma_min {lowest:g}")
        family = "cosxl-edit" if image else "cosxl"
        return replace(finding, family=family, why=tuple(why), sigma_range=(lowest, highest))
    if "v_pred" in shapes:
        if image:
            raise _refuse(header.path, "a v-prediction SDXL of 8 input channels", "v_pred")
        zero = "ztsnr" in shapes
        why.append("v_pred and ztsnr" if zero else "v_pred")
        return replace(finding, family="sdxl-v", why=tuple(why), zero_terminal_snr=zero)
    why.append("no edm_vpred and no v_pred: epsilon prediction")
    return replace(finding, family="sdxl-ip2p" if image else "sdxl", why=tuple(why))


def _pixart(header: Header, family: str | None) -> Finding:
    """An original PixArt .pth: tokens of y_embedding, trained grid of pos_embed, size conditions, KV compression."""
    path = header.path
    names = [name.removesuffix("t_block.1.weight") for name in header.tensors if name.endswith("t_block.1.weight")]
    prefix = min(names, key=lambda name: (name != "state_dict.", name))
    shapes = below(header.shapes, prefix)
    tokens = shapes.get("y_embedder.y_embedding", (0,))[0]
    if tokens not in (120, 300):
        raise _refuse(path, f"a PixArt of {tokens} text tokens", "y_embedder.y_embedding; α has 120, Σ 300")
    conditions = "csize_embedder.mlp.0.weight" in shapes
    why = [f"{prefix}t_block.1.weight: PixArt", f"y_embedding of {tokens} tokens: {'Σ' if tokens == 300 else 'α'}"]
    if conditions:
        why.append("csize_embedder and ar_embedder: size conditions")
    compressed = sum(name.endswith(".attn.sr.weight") for name in shapes)
    if compressed:
        why.append(f"attn.sr in {compressed} blocks: KV compression")
    control = control_blocks(header, prefix)
    if control:
        why.append(f"controlnet of {control} copied blocks beside base_model")
    group = [f for f in FAMILIES.values() if f.network == "pixart" and f.tokens == tokens]
    if "pos_embed" in shapes:
        grid = math.isqrt(shapes["pos_embed"][-2])
        why.append(f"pos_embed of {grid} x {grid} patches: {grid * 16} px")
        fitting = [facts for facts in group if facts.native_px == grid * 16]
    else:
        fitting = [facts for facts in group if facts.name == family]
    if not fitting:
        names_of = ", ".join(facts.name for facts in group)
        raise ModelError(f"{path}: PixArt of a size that is not known ({'; '.join(why)}); give `family`, one of {names_of}")
    base = fitting[0].same_keys_as or fitting[0].name
    return Finding(
        path=path,
        kind="model",
        family=base,
        layout="pixart",
        why=tuple(why),
        header=header,
        prefix=prefix,
        size_conditions=conditions,
        control=control,
    )


def control_blocks(header: Header, prefix: str) -> int:
    """How many copied blocks a PixArt ControlNet has beside the base model that is under `prefix`."""
    beside = prefix.removesuffix("base_model.") + "controlnet."
    return len({name.removeprefix(beside).split(".")[0] for name in header.tensors if name.startswith(beside)})


@dataclass(frozen=True, slots=True, kw_only=True)
class VaePlace:
    """Where in a file an autoencoder is, and how its tensors are named."""

    layout: str
    """ldm, 'diffusers file', or tiny for an AutoencoderTiny."""
    prefix: str


VAE_FIRSTS = {
    "ldm": "encoder.down.0.block.0.conv1.weight",
    "diffusers file": "encoder.down_blocks.0.resnets.0.conv1.weight",
}


def vae_place(shapes: Iterable[str]) -> VaePlace | None:
    """Where a file's autoencoder is; None without one."""
    names = set(shapes)
    for layout, first in VAE_FIRSTS.items():
        prefixes = [name.removesuffix(first) for name in names if name == first or name.endswith(f".{first}")]
        if prefixes:
            return VaePlace(layout=layout, prefix=min(prefixes, key=len))
    small = ("encoder.layers.", "decoder.layers.", "taesd_decoder.", "taesd_encoder.")
    if any(name.startswith(small) for name in names) or {"1.weight", "3.conv.0.weight"} <= names:
        return VaePlace(layout="tiny", prefix="")
    return None


def _other(header: Header) -> Finding:
    """An autoencoder alone; ModelError for anything else, by name where it has one."""
    path, names = header.path, set(header.tensors)
    vae = vae_place(names)
    if vae is not None:
        tiny = vae.layout == "tiny"
        why = "keys of an AutoencoderTiny" if tiny else "encoder keys of an AutoencoderKL"
        return Finding(path=path, kind="vae", family="", layout=vae.layout, why=(why,), header=header, prefix=vae.prefix)
    if any(name.startswith(("down_blocks.", "transformer_blocks.")) for name in names):
        raise ModelError(
            f"{path}: a network in diffusers' naming; give its folder, which holds the config.json that says its kind"
        )
    few = ", ".join(sorted(names)[:3]) or "no tensors by names; of a whole module, save the state_dict()"
    raise ModelError(f"{path}: no known kind of checkpoint (it holds {few}); {supported()}")
