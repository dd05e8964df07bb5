"""Facts of the models, read from a folder's JSON or from the table of names. No torch, no weights opened."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hires.catalogue import FEW_STEP
from hires.errors import ModelError, unknown
from hires.resolution import make_bins
from hires.tiling.geometry import Size
from hires.types import ENLARGERS, SAMPLERS, SCHEDULES

ASSETS = Path(__file__).parent / "assets"
NAMED_MODELS = {"demo": ASSETS / "demo"}


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetShape:
    """What decides the cost of an SDXL-type UNet: channels, resnets and transformer layers per level."""

    channels: tuple[int, ...]
    resnets: int
    transformer_layers: tuple[int, ...]
    context_width: int
    latent_channels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeShape:
    """What decides the cost of an AutoencoderKL: channels per level (full resolution first) and resnets per level."""

    channels: tuple[int, ...]
    resnets: int
    latent_channels: int
    mid_attention: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """How a model is run unless the request says otherwise.

    The first stage starts from noise; each later one re-noises the enlarged picture to `relay_sigma` and takes
    `relay_steps` with guidance `relay_guidance` (1 = off, half the cost). `tile_px` is the training size. `few_step` says what
    a checkpoint was distilled for (lcm, turbo, dmd): its files do not.
    """

    sampler: str
    schedule: str
    steps: int
    guidance: float
    relay_sigma: float
    relay_steps: int
    relay_guidance: float
    tile_px: int
    overlap_px: int
    enlarger: str
    few_step: str | None = None

    def check(self) -> None:
        """ValueError or TypeError for values that no run could use."""
        if not (self.steps >= 1 and self.relay_steps >= 1 and 0 <= self.overlap_px < self.tile_px and self.relay_sigma > 0):
            raise ValueError("steps, tile or relay values out of range")
        if self.sampler not in SAMPLERS or self.schedule not in SCHEDULES or self.enlarger not in ENLARGERS:
            raise ValueError(f"one of {self.sampler!r}, {self.schedule!r}, {self.enlarger!r} is unknown")
        if self.few_step is not None and self.few_step not in FEW_STEP:
            raise ValueError(f"few_step {self.few_step!r} is none of {', '.join(FEW_STEP)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Facts of one checkpoint. Sigmas in units of the latents' standard deviation."""

    name: str
    path: Path
    family: str
    parameterisation: str
    sigma_min: float
    sigma_max: float
    vp_betas: tuple[str, float, float] | None
    latent_scale: float
    cell_px: int
    native_px: int
    align_px: int
    bins: tuple[Size, ...]
    unet: UNetShape
    vae: VaeShape
    network_params: int
    text_params: int
    vae_params: int
    defaults: Defaults


# Reference values of methods for families; a folder may override them in its own hires.json.
FAMILY_DEFAULTS = {
    "cosxl": Defaults(
        sampler="euler", schedule="exponential", steps=30, guidance=7.0, relay_sigma=1.0, relay_steps=8,
        relay_guidance=4.0, tile_px=1024, overlap_px=256, enlarger="pixel",
    ),
    "sdxl": Defaults(
        sampler="dpmpp_2m", schedule="karras", steps=30, guidance=6.0, relay_sigma=1.0, relay_steps=8,
        relay_guidance=4.0, tile_px=1024, overlap_px=256, enlarger="pixel",
    ),
}  # fmt: skip


def find_model(name: str) -> Path:
    """The folder of a model: a name of the table or a path to a diffusers folder. ModelError says what is wrong."""
    if name in NAMED_MODELS:
        return NAMED_MODELS[name]
    try:
        path = Path(name).expanduser()
        there, whole = path.exists(), (path / "model_index.json").is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"--model {name[:80]!r}: cannot be looked at ({error}); give a diffusers folder or 'demo'") from None
    if not there:
        looks_like_path = any(mark in name for mark in "/\\.")
        raise ModelError(
            f"--model {name!r}: no such folder; give a diffusers folder, or 'demo' for the model that ships with hires"
            if looks_like_path
            else f"{unknown('model', name, NAMED_MODELS)}, or a path to a diffusers folder"
        )
    if not whole:
        raise ModelError(f"--model {name!r}: not a model folder, it holds no model_index.json; give a diffusers folder")
    return path


def load_spec(name: str) -> ModelSpec:
    """Read the facts of a model from its folder. ModelError where a part is missing or of a kind not supported yet."""
    path = find_model(name)
    try:
        return _read_spec(name, path)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: a config lacks or misstates {error}; download the model again") from None


def _read_spec(name: str, path: Path) -> ModelSpec:
    unet, vae, scheduler = (
        read_json(path / part) for part in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")
    )
    if unet.get("addition_embed_type") != "text_time" or unet.get("in_channels") != vae.get("latent_channels"):
        raise ModelError(f"{path}: its UNet is not of the SDXL text-to-image type; supported now: cosxl, sdxl")
    family, parameterisation, betas, (sigma_min, sigma_max) = _parameterisation(scheduler, path)
    levels = len(unet["block_out_channels"])
    cell_px = 2 ** (len(vae["block_out_channels"]) - 1)
    native_px, align_px = unet["sample_size"] * cell_px, cell_px * 2 ** (levels - 1)
    return ModelSpec(
        name=name,
        path=path,
        family=family,
        parameterisation=parameterisation,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        vp_betas=betas,
        latent_scale=vae.get("scaling_factor", 0.13025),
        cell_px=cell_px,
        native_px=native_px,
        align_px=align_px,
        bins=make_bins(native_px, max(align_px, 64 if native_px >= 512 else align_px)),
        unet=_unet_shape(unet),
        vae=_vae_shape(vae),
        network_params=count_params(path / "unet"),
        text_params=count_params(path / "text_encoder") + count_params(path / "text_encoder_2"),
        vae_params=count_params(path / "vae"),
        defaults=_defaults(path, family),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a model's JSON file. ModelError where it is missing or damaged."""
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; a model folder holds unet, vae, scheduler, text encoders, tokenizers") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}); download the model again") from None
    if not isinstance(document, dict):
        raise ModelError(f"{path}: holds no JSON object; download the model again")
    return document


def _parameterisation(
    scheduler: Mapping[str, Any], path: Path
) -> tuple[str, str, tuple[str, float, float] | None, tuple[float, float]]:
    """Family, parameterisation, betas of a variance-preserving schedule (or None), least and largest sigma."""
    name, prediction = scheduler.get("_class_name", ""), scheduler.get("prediction_type", "epsilon")
    if name.startswith("EDM") and prediction == "v_prediction" and scheduler.get("sigma_data") == 1.0:
        return "cosxl", "edm_v", None, (float(scheduler["sigma_min"]), float(scheduler["sigma_max"]))
    if not name.startswith("EDM") and prediction == "epsilon":
        start, end = float(scheduler.get("beta_start", 0.00085)), float(scheduler.get("beta_end", 0.012))
        betas = (str(scheduler.get("beta_schedule", "scaled_linear")), start, end)
        sigmas = vp_sigmas(*betas)
        return "sdxl", "eps", betas, (sigmas[0], sigmas[-1])
    raise ModelError(f"{path}: scheduler {name} with {prediction!r} prediction is not supported; supported: EDM v, VP epsilon")


def vp_sigmas(beta_schedule: str, beta_start: float, beta_end: float, count: int = 1000) -> tuple[float, ...]:
    """sigma_t = sqrt((1 - abar_t) / abar_t) of a variance-preserving schedule, rising with t (SDXL: 0.0292 to 14.61)."""
    if beta_schedule not in ("linear", "scaled_linear"):
        raise ModelError(f"beta schedule {beta_schedule!r} is not supported; supported: linear, scaled_linear")
    power = 2 if beta_schedule == "scaled_linear" else 1
    low, high = beta_start ** (1 / power), beta_end ** (1 / power)
    result, kept = [], 1.0
    for t in range(count):
        kept *= 1 - (low + (high - low) * t / (count - 1)) ** power
        result.append(math.sqrt((1 - kept) / kept))
    return tuple(result)


def _unet_shape(config: Mapping[str, Any]) -> UNetShape:
    channels = tuple(config["block_out_channels"])
    layers = config.get("transformer_layers_per_block", 1)
    layers = [layers] * len(channels) if isinstance(layers, int) else layers
    attends = ["CrossAttn" in kind for kind in config["down_block_types"]]
    return UNetShape(
        channels=channels,
        resnets=int(config["layers_per_block"]),
        transformer_layers=tuple(n if on else 0 for n, on in zip(layers, attends, strict=True)),
        context_width=int(config["cross_attention_dim"]),
        latent_channels=int(config["in_channels"]),
    )


def _vae_shape(config: Mapping[str, Any]) -> VaeShape:
    return VaeShape(
        channels=tuple(config["block_out_channels"]),
        resnets=int(config["layers_per_block"]),
        latent_channels=int(config["latent_channels"]),
        mid_attention=bool(config.get("mid_block_add_attention", True)),
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component that would be loaded: the fp16 variant where there is one."""
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if ".fp16." in file.name] or files


def count_params(folder: Path) -> int:
    """Parameters of a component, from the headers of its files. ModelError for a file that is cut short."""
    total = 0
    for file in weight_files(folder):
        try:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header: dict[str, Any] = json.loads(stream.read(min(length, 2**27)))
            shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            raise ModelError(f"{file}: no safetensors header; the file is damaged or cut short, download it again") from None
        total += sum(math.prod(shape) for shape in shapes)
    return total


def _defaults(path: Path, family: str) -> Defaults:
    own = path / "hires.json"
    if not own.is_file():
        return FAMILY_DEFAULTS[family]
    try:
        defaults = Defaults(**read_json(own)["defaults"])
        defaults.check()
        return defaults
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{own}: its 'defaults' are not those of this version ({error}); remove the file") from None
