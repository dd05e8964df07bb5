"""Reads the facts of a model from its folder, file or name.

Imports no torch and reads no tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hires.checkpoints.configs import (
    LDM_CLIP_G,
    LDM_CLIP_L,
    LDM_VAE,
    PIXART_TABLES,
    below,
    diffusers_vae_config,
    kv_compression,
    ldm_unet_config,
    ldm_vae_config,
    pixart_config,
    shipped_config,
)
from hires.checkpoints.containers.layers import LayerCount, count_layers
from hires.checkpoints.detect_file import Finding, identify_file, supported, unet_shapes
from hires.checkpoints.detect_folder import identify_folder, read_json
from hires.checkpoints.families import (
    FAMILIES,
    PART_PARAMS,
    VAE_COUNT,
    Defaults,
    FamilyFacts,
    NetworkShape,
    PixArtShape,
    UNetShape,
)
from hires.checkpoints.few_step.applied import profiled
from hires.checkpoints.headers import folder_tensors, read_header
from hires.checkpoints.locate import Part, find_model, find_part, folder_part, vae_part
from hires.checkpoints.model import ModelSpec
from hires.checkpoints.noise_levels import as_said, vp_range, vp_sigmas
from hires.errors import ModelError
from hires.tiling.bands.memory import VaeShape
from hires.units import Json


def load_spec(
    name: str,
    *,
    family: str | None = None,
    parts: str | Path | None = None,
    profile: str | None = None,
    vae: str | Path | None = None,
    prediction: str | None = None,
    zero_terminal_snr: bool = False,
) -> ModelSpec:
    """Read the facts of a model: 'demo', a diffusers folder, a checkpoint file, or 'org/name' on the hub.

    `family` is what the user says it is, for files whose keys are those of several; `parts` a diffusers folder in which parts
    that it lacks are looked for first; `profile` how it is run in few steps, 'none' to take no profile from its name; `vae` an
    autoencoder in place of its own; `prediction` and `zero_terminal_snr` how it was trained, where its keys do not tell.
    ModelError where it is damaged, of a kind not supported, or contradicts `family`; RequestError for an unknown profile.
    """
    path = find_model(name)
    extra = parts_folder(parts)
    try:
        finding = as_said(identify(path, family), prediction, zero_terminal_snr)
        spec = profiled(spec_of(name, finding, extra, vae), finding, family, profile)
        return spec if prediction is None else replace(spec, parameterisation=prediction.replace("-", "_"))
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError) as error:
        raise unknown_layout(path, error) from None


def unknown_layout(path: Path, error: Exception) -> ModelError:
    """The error for a file or folder in which something is missing that every known layout has."""
    return ModelError(f"{path}: a config or key lacks or misstates {error}: of an unknown layout, or incomplete; {supported()}")


def identify(path: Path, family: str | None = None) -> Finding:
    """What a folder or file is."""
    return identify_folder(path, family) if path.is_dir() else identify_file(path, family)


def parts_folder(parts: str | Path | None) -> Path | None:
    """The folder given as `parts`. ModelError for a path that is no folder."""
    if parts is None:
        return None
    folder = Path(parts).expanduser()
    if not folder.is_dir():
        raise ModelError(
            f"parts {parts}: no such folder; give a diffusers folder that holds tokenizers, text encoders or a VAE"
        )
    return folder


def spec_of(name: str, finding: Finding, extra: Path | None, vae: str | Path | None = None) -> ModelSpec:
    """The facts of a model that was identified.

    extra: where parts that it lacks are looked for first. vae: the file or folder of an autoencoder in place of its own.
    """
    if finding.kind != "model":
        raise _no_model(finding)
    facts = FAMILIES[finding.family]
    if facts.network == "pixart" and finding.size_conditions is not None:
        facts = replace(facts, size_conditions="pixart" if finding.size_conditions else None)
    defaults = _defaults(finding.path, facts)
    facts = replace(facts, few_step=defaults.few_step or facts.few_step)
    parts = find_parts(finding, facts, extra)
    own_vae = parts["vae"]
    if vae is not None:
        parts["vae"] = _given_vae(vae, own_vae, facts)
    unet_config, vae_config = network_config(finding, facts), vae_config_of(parts["vae"], facts)
    check_vae(parts["vae"], vae_config, facts, finding)
    cell_px = 2 ** (len(vae_config["block_out_channels"]) - 1)
    shape = _network_shape(unet_config, finding, facts)
    network, vae_count = _count([parts["network"]], finding), _count([parts["vae"]], finding)
    vae_count = vae_count if vae_count.values else VAE_COUNT
    native_px = (
        unet_config["sample_size"] * cell_px if finding.layout not in UNET_FILES and not facts.same_keys_as else facts.native_px
    )
    align_px = align_of(shape, cell_px)
    betas = None if facts.sigma_range else finding.betas or facts.betas
    sigmas = finding.sigma_range or facts.sigma_range or vp_range(betas, finding.zero_terminal_snr)
    return ModelSpec(
        name=name,
        path=finding.path,
        facts=facts,
        parameterisation=finding.parameterisation or facts.parameterisation,
        sigma_min=sigmas[0],
        sigma_max=sigmas[1] if facts.start_timestep is None or betas is None else vp_sigmas(*betas)[facts.start_timestep],
        vp_betas=betas,
        zero_terminal_snr=finding.zero_terminal_snr,
        latent_scale=vae_config.get("scaling_factor", facts.latent_scale),
        cell_px=cell_px,
        native_px=native_px,
        align_px=align_px,
        network=shape,
        vae=_vae_shape(vae_config),
        network_params=network.values,
        text_params=sum(_text_params(finding, facts, parts)),
        vae_params=vae_count.values,
        defaults=defaults,
        parts=parts,
        network_count=network,
        vae_count=vae_count,
        notes=(
            *finding.notes,
            *_vae_notes(parts["vae"], own_vae, facts),
            *_unused_notes(parts, extra, vae is not None),
            *_missing_note(parts),
        ),
    )


def _given_vae(vae: str | Path, own: Part, facts: FamilyFacts) -> Part:
    """The autoencoder that a user gives. ModelError, which names it, for one that does not fit or is incomplete."""
    try:
        part = vae_part(vae, facts)
        _vae_shape(vae_config_of(part, facts))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ModelError(f"vae {vae}: its config or a key lacks or misstates {error}; give a whole one") from None
    _check_levels(part, own, facts)
    return part


def _check_levels(part: Part, own: Part, facts: FamilyFacts) -> None:
    """ModelError for an autoencoder whose latent cells are of another size than the model's."""
    given, wanted = (len(vae_config_of(each, facts)["block_out_channels"]) for each in (part, own))
    if given != wanted:
        raise ModelError(
            f"vae {part.path}: {2 ** (given - 1)} px a latent cell, {facts.title} has {2 ** (wanted - 1)}; give one made for it"
        )


UNET_FILES = ("ldm", "diffusers file")
"""Layouts of a UNet in a file without a config."""


def _vae_notes(part: Part, own: Part, facts: FamilyFacts) -> Iterator[str]:
    """What a plan says of an autoencoder that was given in place of the model's own."""
    if part is own:
        return
    scale = f"latent scale {facts.latent_scale:g}, that of {facts.title}"
    told = "" if part.layout == "diffusers" else ", assumed: no file tells its own"
    yield f"VAE {part.path}: as asked for with `vae`; {scale}{told}"


def _unused_notes(parts: Mapping[str, Part], extra: Path | None, vae_given: bool) -> Iterator[str]:
    """Components in the folder given as `parts` that are not used, since the model has its own or `vae` gave another."""
    for name in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        place = None if extra is None else extra / name
        if place is not None and place.is_dir() and name in parts and parts[name].path not in (place, extra):
            hint = "; give it with `vae` to use it" if name == "vae" and not vae_given else ""
            yield f"{name} of `parts` is not used: that of {parts[name].path} is{hint}"


def _missing_note(parts: Mapping[str, Part]) -> tuple[str, ...]:
    absent = [part.component for part in parts.values() if part.layout == "missing"]
    counted = "its parts are counted at their published size until then"
    return (f"to be run it needs {', '.join(absent)}, see `hires inspect`; {counted}",) if absent else ()


def align_of(shape: NetworkShape, cell_px: int) -> int:
    """What a canvas's sides must divide by, in pixels: every level of a UNet halves them, PixArt cuts them into patches."""
    return cell_px * (2 ** (len(shape.channels) - 1) if isinstance(shape, UNetShape) else shape.patch)


def check_vae(part: Part, config: Json, facts: FamilyFacts, finding: Finding) -> None:
    """ModelError for a VAE of another scale that was found outside the model, and for any such of a PixArt model."""
    scale = config.get("scaling_factor", facts.latent_scale)
    inside = part.path is not None and part.path.is_relative_to(finding.path) and part.layout != "missing"
    if scale != facts.latent_scale and (facts.network == "pixart" or not inside):
        raise ModelError(
            f"{part.path}: a VAE of latent scale {scale:g}, {facts.title} needs one of {facts.latent_scale:g}; "
            f"give the right one with `vae` or `parts`, or say what the model is with `family`"
        )


def _no_model(finding: Finding) -> ModelError:
    if finding.kind == "lora":
        made_for = f" for {finding.family}" if finding.family else ""
        return ModelError(f"{finding.path}: a LoRA{made_for}, no model; give it with `loras` beside a `model`")
    if finding.layout == "tiny":
        return ModelError(
            f"{finding.path}: a small autoencoder (TAESD) alone, no model; give its diffusers folder with `tiny_vae`"
        )
    return ModelError(f"{finding.path}: an autoencoder alone, no model; give it with `vae` beside a `model`")


def find_parts(finding: Finding, facts: FamilyFacts, extra: Path | None) -> dict[str, Part]:
    """Every component of a model: in its own file or folder, in `extra`, or in the hub's local cache."""
    own = finding.path if finding.path.is_dir() else finding.path.parent
    folders = tuple(folder for folder in (extra, own) if folder is not None)
    texts = ("text_encoder", "text_encoder_2")[: len(facts.text)]
    inside = _parts_inside(finding, facts)
    components = ("network", "vae", *texts, *("tokenizer", "tokenizer_2")[: len(texts)])
    return {component: inside.get(component) or find_part(component, facts, folders) for component in components}


def _parts_inside(finding: Finding, facts: FamilyFacts) -> dict[str, Part]:
    """The components that a model's own file or folder holds."""
    if finding.layout == "diffusers":
        network = "unet" if facts.network == "unet" else "transformer"
        folder = finding.path / network if (finding.path / network).is_dir() else finding.path
        return {"network": folder_part(folder, "network")} | {
            component: folder_part(finding.path / component, component)
            for component in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
            if (finding.path / component).is_dir()
        }
    if finding.layout == "pixart":
        return {"network": _network_in_file(finding, shipped_config("pixart", transformer_name(facts)))}
    assert finding.header is not None
    parts = {"network": _network_in_file(finding, shipped_config(facts.configs, "unet"))}
    first = LDM_CLIP_L[0] if facts.size_conditions else LDM_CLIP_L[1]
    prefixes = {"vae": LDM_VAE, "text_encoder": first, "text_encoder_2": LDM_CLIP_G}
    for component, prefix in ((component, finding.outer + prefix) for component, prefix in prefixes.items()):
        if any(name.startswith(prefix) for name in finding.header.tensors):
            config = shipped_config(facts.configs, component)
            parts[component] = Part(component=component, layout="ldm", path=finding.path, prefix=prefix, config=config)
    return parts


def _network_in_file(finding: Finding, config: Path) -> Part:
    return Part(component="network", layout=finding.layout, path=finding.path, prefix=finding.prefix, config=config)


def transformer_name(facts: FamilyFacts) -> str:
    """The folder of the shipped config of a PixArt transformer."""
    return "transformer-" + (facts.same_keys_as or facts.name).removeprefix("pixart-")


def network_config(finding: Finding, facts: FamilyFacts) -> Json:
    """The network's config: its own, or the one that its tensors' shapes say."""
    if finding.layout == "diffusers":
        inside = _parts_inside(finding, facts)["network"]
        assert inside.config is not None
        config = read_json(inside.config)
        return config | ({} if finding.size_conditions is None else {"use_additional_conditions": finding.size_conditions})
    assert finding.header is not None
    if finding.layout in UNET_FILES:
        return ldm_unet_config(unet_shapes(finding.header, finding), shipped_config(facts.configs, "unet"))
    shapes = below(finding.header.shapes, finding.prefix)
    return pixart_config(shapes, shipped_config("pixart", transformer_name(facts)), facts.position_span or 32.0)


def vae_config_of(part: Part, facts: FamilyFacts) -> Json:
    """The autoencoder's config: its own, the one its shapes say, or the published one where it is missing."""
    if part.layout == "diffusers":
        assert part.config is not None
        return read_json(part.config)
    base = shipped_config(facts.configs, "vae")
    if part.layout in UNET_FILES:
        assert part.path is not None
        read = ldm_vae_config if part.layout == "ldm" else diffusers_vae_config
        return read(below(read_header(part.path).shapes, part.prefix), base) | {"scaling_factor": facts.latent_scale}
    return read_json(base) | {"scaling_factor": facts.latent_scale}


def _count(parts: Iterable[Part], finding: Finding) -> LayerCount:
    """The weights of parts, from the headers of their files; nothing for what is missing."""
    total = LayerCount()
    for part in parts:
        if part.layout == "diffusers":
            assert part.path is not None
            total += count_layers((name, info.shape) for name, info in folder_tensors(part.path).items())
        elif part.path is not None:
            header = finding.header if part.path == finding.path else read_header(part.path)
            assert header is not None
            names = below(header.shapes, part.prefix)
            total += count_layers((name, shape) for name, shape in names.items() if name not in PIXART_TABLES)
            if part.component == "network" and finding.control:
                copied = below(header.shapes, part.prefix.removesuffix("base_model.") + "controlnet.")
                total += count_layers(copied.items())
    return total


def _text_params(finding: Finding, facts: FamilyFacts, parts: Mapping[str, Part]) -> list[int]:
    towers = zip(facts.text, ("text_encoder", "text_encoder_2"), strict=False)
    return [_count([parts[component]], finding).values or PART_PARAMS[tower] for tower, component in towers]


def _network_shape(config: Json, finding: Finding, facts: FamilyFacts) -> NetworkShape:
    if facts.network == "unet":
        return unet_shape(config, facts)
    shapes = {} if finding.header is None else below(finding.header.shapes, finding.prefix)
    return replace(pixart_shape(config), kv_compression=kv_compression(shapes), control_blocks=finding.control)


def pixart_shape(config: Json) -> PixArtShape:
    """The shape of a diffusers PixArtTransformer2DModel from its config."""
    return PixArtShape(
        layers=int(config["num_layers"]),
        heads=int(config["num_attention_heads"]),
        head_dim=int(config["attention_head_dim"]),
        patch=int(config["patch_size"]),
        caption_width=int(config["caption_channels"]),
        latent_channels=int(config["in_channels"]),
    )


def unet_shape(config: Json, facts: FamilyFacts) -> UNetShape:
    """The shape of a diffusers UNet2DConditionModel from its config."""
    channels = tuple(config["block_out_channels"])
    resnets = int(config["layers_per_block"])
    layers = config.get("transformer_layers_per_block", 1)
    layers = [layers] * len(channels) if isinstance(layers, int) else layers
    rising = config.get("reverse_transformer_layers_per_block") or list(reversed(layers))
    heads = config.get("num_attention_heads") or config["attention_head_dim"]  # diffusers' name for their number
    heads = [heads] * len(channels) if isinstance(heads, int) else heads
    down = _depths(layers, config["down_block_types"], resnets)
    up = tuple(reversed(_depths(rising, config["up_block_types"], resnets + 1)))
    middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    deepest = layers[-1] if isinstance(layers[-1], int) else layers[-1][0]
    return UNetShape(
        channels=channels,
        resnets=resnets,
        transformer_layers=down,
        context_width=int(config["cross_attention_dim"]),
        latent_channels=int(config["in_channels"]) - facts.image_channels,
        mid_layers=int(deepest) if "CrossAttn" in (middle or "") else 0,
        head_dims=tuple(width // count for width, count in zip(channels, heads, strict=True)),
        guidance_width=int(config.get("time_cond_proj_dim") or 0),
        up_transformer_layers=() if up == down else up,
        mid_resnets={"UNetMidBlock2D": 1, None: 0}.get(middle, 2),
    )


def _depths(layers: Sequence[int | Sequence[int]], kinds: Sequence[str], blocks: int) -> tuple[int | tuple[int, ...], ...]:
    """The depth of the transformers of each level: a number where all are as deep, else one for each of its `blocks`."""
    found: list[int | tuple[int, ...]] = []
    for deep, kind in zip(layers, kinds, strict=True):
        each = (deep,) * blocks if isinstance(deep, int) else tuple(deep)
        if len(each) != blocks:
            raise ModelError(f"transformer_layers_per_block {list(each)}: {blocks} numbers are needed for a level")
        each = each if "CrossAttn" in kind else (0,) * blocks
        found.append(each[0] if len(set(each)) == 1 else each)
    return tuple(found)


def _vae_shape(config: Json) -> VaeShape:
    return VaeShape(
        channels=tuple(config["block_out_channels"]),
        resnets=int(config["layers_per_block"]),
        latent_channels=int(config["latent_channels"]),
        mid_attention=bool(config.get("mid_block_add_attention", True)),
    )


def _defaults(path: Path, facts: FamilyFacts) -> Defaults:
    own = path / "hires.json"
    if not own.is_file():
        return facts.defaults
    try:
        values: Json = read_json(own)["defaults"]
        fields: Json = {name: _tuples(value) for name, value in values.items()}
        fields |= {name: (fields[name],) for name in ("enlarger", "relay_sampler") if isinstance(fields.get(name), str)}
        defaults = Defaults(**fields)
        defaults.check()
        return defaults
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{own}: its 'defaults' are not those of this version ({error}); remove the file") from None


def _tuples(value: object) -> object:
    """Lists of a JSON value, at any depth, as tuples."""
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value
