"""Finds a model and its parts: a folder, a file, the hub's cache, the hub.

Imports no torch and opens no weights.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hires.checkpoints.configs import shipped_config
from hires.checkpoints.detect_file import unet_place, vae_place
from hires.checkpoints.detect_folder import is_model_folder, network_folder, read_json
from hires.checkpoints.families import FAMILIES, FamilyFacts
from hires.checkpoints.headers import read_header, weight_files
from hires.checkpoints.other_families import other_kind
from hires.errors import ModelError, unknown

log = logging.getLogger(__name__)
ASSETS = Path(__file__).parents[1] / "assets"
TOKENIZERS = ASSETS / "tokenizers"
"""The vocabularies of CLIP and T5, one folder each."""
NAMED_MODELS = {"demo": ASSETS / "demo"}
FILE_ENDS = (".safetensors", ".gguf", ".pth", ".pt", ".ckpt", ".bin")
HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/(?P<file>\S+\.(?:safetensors|gguf|pth|pt|ckpt|bin)))?")
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
TOWER_KINDS = {"clip_l": "clip", "clip_g": "clip", "t5": "t5"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Where one component of a model is."""

    component: str
    """network, vae, text_encoder, text_encoder_2, tokenizer or tokenizer_2."""
    layout: str
    """How its keys are named: diffusers (a folder), 'diffusers file', ldm (SDXL's and SD1.5's single files), pixart (the
    original .pth), or missing.
    """
    path: Path | None
    """Its folder or file; None where it is missing."""
    prefix: str = ""
    """What its keys in a single file start with."""
    config: Path | None = None
    """The JSON file with its shape, its own or a shipped one."""
    looked_in: tuple[str, ...] = ()
    """Where a missing part was looked for, for messages."""


def find_model(name: str) -> Path:
    """The folder or file of a model: a name of the table, a path, or 'org/name' on the hub. ModelError says what is wrong."""
    if name in NAMED_MODELS:
        return NAMED_MODELS[name]
    try:
        path = Path(name).expanduser()
        there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"model {name[:80]!r}: cannot be looked at ({error}); give a file, a diffusers folder or 'demo'"
        ) from None
    if not there:
        match = HUB_ID.fullmatch(name)
        if (match and not name.endswith(FILE_ENDS)) or (match and match["file"]):
            return _from_hub(name, match["repo"], match["file"])
        looks_like_path = any(mark in name for mark in "/\\.")
        raise ModelError(
            f"model {name!r}: no such folder or file; give a checkpoint, a diffusers folder, or 'demo' (ships with hires)"
            if looks_like_path
            else f"{unknown('model', name, NAMED_MODELS)}, or a path to a checkpoint or diffusers folder"
        )
    if path.is_dir() and not is_model_folder(path):
        files = sorted(file.name for file in path.iterdir() if file.suffix in FILE_ENDS)
        hint = f"name the file: {', '.join(files[:4])}" if files else "give a diffusers folder or a checkpoint file"
        raise ModelError(f"model {name!r}: not a model folder, it holds no model_index.json; {hint}")
    return path


def _from_hub(name: str, repo: str, file: str | None) -> Path:
    """A repository's folder, or one file of it: the local cache first, then the network."""
    cached = cached_snapshot(repo)
    if cached is not None and file is not None and (cached / file).is_file():
        return cached / file
    if cached is not None and file is None and is_model_folder(cached) and weight_files(network_folder(cached)):
        return cached
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    log.warning("%s is not in the local Hugging Face cache: downloading", name)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; what it gives up for is in the message below
    try:
        if file is not None:
            return Path(hf_hub_download(repo, file))
        wanted = wanted_files(HfApi().list_repo_files(repo))
        folder = Path(snapshot_download(repo, allow_patterns=wanted))
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:160]
        raise ModelError(
            f"model {name!r}: no such path, not in the local Hugging Face cache, and the hub did not give it ({reason}); "
            f"where there is a network run `hf download {repo}`, or give the path of a checkpoint"
        ) from error
    if not is_model_folder(folder):
        raise ModelError(f"model {name!r}: holds no diffusers model; name one of its files, such as {repo}/model.safetensors")
    return folder


def wanted_files(names: list[str]) -> list[str]:
    """The files of a repository that a diffusers folder needs: JSON, vocabularies, safetensors, fp16 where there is one."""
    weights = [n for n in names if n.endswith(".safetensors") and "/" in n and ".non_ema" not in n]
    halves = {n.rpartition("/")[0] for n in weights if ".fp16" in n}
    chosen = [n for n in weights if ".fp16" in n or n.rpartition("/")[0] not in halves]
    return [n for n in names if n.endswith((".json", ".txt", ".model"))] + chosen


def cached_snapshot(repo: str) -> Path | None:
    """The folder of a repository's main revision in the hub's local cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    root = Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    try:
        folder = root / "snapshots" / (root / "refs" / "main").read_text().strip()
    except OSError:
        return None
    return folder if folder.is_dir() else None


def folder_part(path: Path, component: str) -> Part:
    """A component in its own folder."""
    return Part(component=component, layout="diffusers", path=path, config=path / "config.json")


def find_part(component: str, facts: FamilyFacts, folders: tuple[Path, ...]) -> Part:
    """A part in the first of `folders` that has it, else in the hub's local cache; layout 'missing' where nothing has.

    A vocabulary that is found nowhere is the one that ships with hires: all published CLIPs share one, and so do all T5s.
    """
    kind = _tower(component, facts)
    for folder in folders:
        for place in (folder / component, *([folder] if component.startswith("tokenizer") else [])):
            if _holds(place, component, kind):
                return folder_part(place, component)
    for repo in facts.parts_from:
        cached = cached_snapshot(repo)
        if cached is not None and _holds(cached / component, component, kind):
            return folder_part(cached / component, component)
    if component.startswith("tokenizer"):
        return folder_part(TOKENIZERS / kind, component)
    looked = (*(str(folder / component) for folder in folders), f"the local Hugging Face cache of {facts.parts_from[0]}")
    return Part(component=component, layout="missing", path=None, looked_in=looked)


LATENTS = {16: "Flux, Stable Diffusion 3 and Qwen-Image", 32: "Flux.2 or Sana", 128: "LTX-Video"}
"""Whose autoencoders have so many latent channels."""


def vae_part(given: str | Path, facts: FamilyFacts) -> Part:
    """The autoencoder that a user gives as a file or a folder. ModelError for one that does not fit the family."""
    try:
        path = Path(given).expanduser()
        folder, there = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"vae {str(given)[:80]!r}: cannot be looked at ({error}); give a file or a diffusers folder") from None
    if not there:
        raise ModelError(f"vae {given}: no such file or folder; give a VAE's .safetensors file or its diffusers folder")
    return _vae_folder(path, facts) if folder else _vae_file(path, facts)


def _vae_folder(path: Path, facts: FamilyFacts) -> Part:
    place = path if (path / "config.json").is_file() else path / "vae"
    if not (place / "config.json").is_file():
        raise ModelError(f"vae {path}: holds no config.json; give the folder of an AutoencoderKL, or its .safetensors file")
    config = read_json(place / "config.json")
    kind = str(config.get("_class_name", "AutoencoderKL"))
    if kind == "AutoencoderTiny":
        raise _tiny(path)
    if kind != "AutoencoderKL":
        raise ModelError(f"vae {path}: an {kind} is not supported; {_right_vae(facts)}")
    _check_latents(path, int(config.get("latent_channels", 4)), facts)
    if not weight_files(place):
        raise ModelError(f"vae {path}: holds no .safetensors weights; give the VAE's file")
    return folder_part(place, "vae")


def _vae_file(path: Path, facts: FamilyFacts) -> Part:
    shapes = read_header(path).shapes
    found = vae_place(shapes)
    if found is None:
        other = other_kind(shapes)
        what = f"{other[0].name} ({other[1]})" if other else f"no autoencoder (it holds {', '.join(sorted(shapes)[:3])})"
        raise ModelError(f"vae {path}: {what}; {_right_vae(facts)}")
    if found.layout == "tiny":
        raise _tiny(path)
    kernel = shapes.get(f"{found.prefix}decoder.conv_in.weight", ())
    if len(kernel) != 4:
        what = "an autoencoder of video" if len(kernel) == 5 else "half an autoencoder, without decoder.conv_in"
        raise ModelError(f"vae {path}: {what}; {_right_vae(facts)}")
    _check_latents(path, kernel[1], facts)
    _check_checkpoint(path, shapes, facts)
    config = shipped_config(facts.configs, "vae")
    return Part(component="vae", layout=found.layout, path=path, prefix=found.prefix, config=config)


def _check_latents(path: Path, channels: int, facts: FamilyFacts) -> None:
    if channels != facts.latent_channels:
        whose = f", that of {LATENTS[channels]}" if channels in LATENTS else ""
        raise ModelError(f"vae {path}: a VAE of {channels} latent channels{whose}; {_right_vae(facts)}")


def _check_checkpoint(path: Path, shapes: Mapping[str, tuple[int, ...]], facts: FamilyFacts) -> None:
    """ModelError for a whole checkpoint of a family whose latents have another scale."""
    place = unet_place(shapes)
    if place is None:
        return
    sized = {f"{place.prefix}{name}.weight" for name in ("label_emb.0.0", "add_embedding.linear_1")} & shapes.keys()
    whose = FAMILIES["sdxl" if sized else "sd15"]
    if whose.latent_scale != facts.latent_scale:
        raise ModelError(
            f"vae {path}: a checkpoint of {whose.title}'s layout, with latents of scale {whose.latent_scale:g} and not "
            f"{facts.latent_scale:g}; {_right_vae(facts)}"
        )


def _right_vae(facts: FamilyFacts) -> str:
    example = "sdxl_vae.safetensors" if facts.latent_scale != 0.18215 else "vae-ft-mse-840000-ema-pruned.safetensors"
    return f"{facts.title} needs an AutoencoderKL of {facts.latent_channels} latent channels, such as {example}"


def _tiny(path: Path) -> ModelError:
    return ModelError(f"vae {path}: a small autoencoder (TAESD); give its folder with `tiny_vae`, and a whole VAE with `vae`")


def _tower(component: str, facts: FamilyFacts) -> str:
    """Which kind of text tower or vocabulary a component is; '' for others."""
    index = 1 if component.endswith("_2") else 0
    return TOWER_KINDS[facts.text[index]] if component.startswith(("text_encoder", "tokenizer")) else ""


def _holds(place: Path, component: str, kind: str) -> bool:
    """Whether a folder holds that component, of that kind."""
    if component.startswith("tokenizer"):
        return any((place / name).is_file() for name in VOCABULARIES)
    try:
        config = json.loads((place / "config.json").read_text())
        named = f"{config.get('model_type', '')} {config.get('_class_name', '')}".lower()
    except (OSError, ValueError, AttributeError):
        return False
    return named.startswith(kind) if kind else "autoencoder" in named


def missing(parts: Sequence[Part], facts: FamilyFacts) -> ModelError:
    """The error for parts that were not found: where they were looked for, and the next move."""
    names, looked = [part.component for part in parts], sorted({place for part in parts for place in part.looked_in})
    where = f" (looked in {', '.join(looked)})" if looked else ""
    return ModelError(f"{' and '.join(names)} missing{where}: {next_move(names, facts)}")


def next_move(components: Sequence[str], facts: FamilyFacts) -> str:
    """What to do about parts that were not found."""
    wanted = " ".join(f"--include '{component}/*'" for component in components)
    inside = " and ".join(f"{component}/" for component in components)
    return (
        f"give `parts`, a diffusers folder that holds {inside}, or run `hf download {facts.parts_from[0]} "
        f"--include model_index.json {wanted}` once where there is a network"
    )
