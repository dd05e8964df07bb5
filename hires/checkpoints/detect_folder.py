"""Tells what a diffusers folder is from its JSON.

SDXL, CosXL and SD1.5 by their UNet and scheduler, PixArt by its transformer. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from hires.checkpoints.containers.config_limits import read_config
from hires.checkpoints.detect_file import Finding, named, supported
from hires.checkpoints.families import FAMILIES
from hires.checkpoints.headers import folder_tensors
from hires.errors import ModelError
from hires.units import Json

TRANSFORMERS = ("PixArtTransformer2DModel", "Transformer2DModel")
JSON_NAMES = ("model_index.json", "transformer/config.json", "config.json")


def read_json(path: Path) -> Json:
    """The object in a model's JSON file. ModelError where it is missing, damaged or beyond any model."""
    try:
        return read_config(path)
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; a model folder holds unet, vae, scheduler, text encoders, tokenizers") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: is no config of a model ({error}); download the model again") from None


def is_model_folder(path: Path) -> bool:
    """Whether a folder is a model of diffusers, or a PixArt transformer alone."""
    return any((path / name).is_file() for name in JSON_NAMES)


def network_folder(path: Path) -> Path:
    """Where the UNet or transformer of a folder is; the folder itself where it holds nothing else."""
    for name in ("unet", "transformer"):
        if (path / name / "config.json").is_file():
            return path / name
    return path


def identify_folder(path: Path, family: str | None = None) -> Finding:
    """A diffusers folder. `family` is what the user says it is; ModelError where its JSON says otherwise."""
    folder = network_folder(path)
    if (path / "model_index.json").is_file() and folder == path:
        raise ModelError(f"{path}: holds neither unet nor transformer; download the model again ({supported()})")
    config = read_json(folder / "config.json")
    kind = str(config.get("_class_name", ""))
    if kind in TRANSFORMERS:
        return _pixart_folder(path, folder, config, family)
    if kind.startswith("Autoencoder"):
        return Finding(path=path, kind="vae", family="", layout="diffusers", why=(f"_class_name {kind}",))
    if kind not in ("", "UNet2DConditionModel"):
        raise ModelError(f"{path}: a {kind} is not supported; {supported()}")
    return named(_unet_folder(path, config), family)


def _refuse_other_unets(path: Path, config: Json) -> None:
    """ModelError, by name, for a UNet of the same class that reads other conditions."""
    pooled = config.get("projection_class_embeddings_input_dim")
    others = (
        ("Kolors", "text of a language model", config.get("encoder_hid_dim") == 4096 or pooled == 5632),
        ("the SDXL refiner", "projection_class_embeddings_input_dim 2560", pooled == 2560),
        ("Kandinsky 2", "conditions of pictures", str(config.get("addition_embed_type", "")).startswith("image")),
    )
    for name, key, found in others:
        if found:
            raise ModelError(f"{path}: {name} ({key}) is not supported; {supported()}")


def _unet_folder(path: Path, config: Json) -> Finding:
    _refuse_other_unets(path, config)
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    channels, latents = int(config["in_channels"]), int(read_json(path / "vae" / "config.json")["latent_channels"])
    context, sized = config.get("cross_attention_dim"), config.get("addition_embed_type") == "text_time"
    why = [f"UNet of {channels} input channels, text of width {context}, {'with' if sized else 'without'} size conditions"]
    if channels not in (latents, 2 * latents) or (not sized and channels != latents):
        kind = "an inpainting model" if channels == 2 * latents + 1 else "a UNet"
        raise ModelError(f"{path}: {kind} of {channels} input channels is not supported; {supported()}")
    if context == 1024 and not sized:
        raise ModelError(f"{path}: Stable Diffusion 2 (text of width 1024) is not supported; {supported()}")
    parameterisation, betas, sigmas, reason = _parameterisation(scheduler, path)
    why.append(reason)
    family = _unet_family(path, sized, channels == 2 * latents, parameterisation)
    few = _few_step(family, scheduler)
    return Finding(
        path=path,
        kind="model",
        family=few or family,
        layout="diffusers",
        why=tuple(why),
        parameterisation=parameterisation,
        sigma_range=sigmas,
        betas=betas,
        zero_terminal_snr=bool(scheduler.get("rescale_betas_zero_snr", False)),
    )


def _unet_family(path: Path, sized: bool, image: bool, parameterisation: str) -> str:
    names = {
        (True, False, "edm_v"): "cosxl",
        (True, True, "edm_v"): "cosxl-edit",
        (True, False, "eps"): "sdxl",
        (True, True, "eps"): "sdxl-ip2p",
        (True, False, "v"): "sdxl-v",
        (False, False, "eps"): "sd15",
    }
    if (sized, image, parameterisation) not in names:
        kind = "SDXL" if sized else "Stable Diffusion"
        raise ModelError(f"{path}: {kind} with {parameterisation} prediction of that input is not supported; {supported()}")
    return names[sized, image, parameterisation]


def _few_step(family: str, scheduler: Json) -> str | None:
    """The few-step family that the folder's own scheduler says, where the base family has the same keys."""
    name, spacing = scheduler.get("_class_name"), scheduler.get("timestep_spacing")
    if family == "sdxl" and name == "LCMScheduler":
        return "sdxl-lcm"
    if family == "sdxl" and name == "EulerAncestralDiscreteScheduler" and spacing == "trailing":
        return "sdxl-turbo"
    if family == "pixart-alpha-1024" and name == "LCMScheduler":
        return "pixart-delta"
    return None


def _parameterisation(
    scheduler: Json, path: Path
) -> tuple[str, tuple[str, float, float] | None, tuple[float, float] | None, str]:
    """Parameterisation, betas of a variance-preserving schedule or the sigma range of an EDM one, and why."""
    name, prediction = str(scheduler.get("_class_name", "")), str(scheduler.get("prediction_type", "epsilon"))
    why = f"{name}, {prediction}"
    continuous = scheduler.get("timestep_type") == "continuous"
    if prediction == "v_prediction" and (scheduler.get("sigma_data") == 1.0 if name.startswith("EDM") else continuous):
        low, high = float(scheduler["sigma_min"]), float(scheduler["sigma_max"])
        return "edm_v", None, (low, high), f"{why}, sigma {low:g} to {high:g}"
    if name.startswith("EDM") or continuous or prediction not in ("epsilon", "v_prediction"):
        data = f", sigma_data {scheduler['sigma_data']}" if "sigma_data" in scheduler else ""
        raise ModelError(
            f"{path}: scheduler {name} with {prediction!r} prediction{data} is not supported; supported: EDM v with "
            f"sigma_data 1 (CosXL), VP epsilon, VP v"
        )
    start, end = float(scheduler.get("beta_start", 0.00085)), float(scheduler.get("beta_end", 0.012))
    return (
        {"epsilon": "eps"}.get(prediction, "v"),
        (str(scheduler.get("beta_schedule", "scaled_linear")), start, end),
        None,
        why,
    )


def _pixart_folder(path: Path, folder: Path, config: Json, family: str | None) -> Finding:
    """α or Σ by the pipeline's name, else by the VAE's scale, else by size conditions; the size by sample_size."""
    conditions = any(".resolution_embedder." in name for name in folder_tensors(folder))
    index = path / "model_index.json"
    pipeline = str(read_json(index).get("_class_name", "")) if index.is_file() else ""
    vae = path / "vae" / "config.json"
    native = int(config.get("sample_size", 128)) * 8
    why = [f"PixArt transformer of sample_size {native // 8}: {native} px"]
    notes: tuple[str, ...] = ()
    named_alpha = {"PixArtAlphaPipeline": True, "PixArtSigmaPipeline": False}.get(pipeline)
    if conditions:
        alpha = True
        why.append("resolution_embedder: size conditions of α")
    elif vae.is_file():
        alpha = read_json(vae).get("scaling_factor") == 0.18215
        why.append(f"a VAE of the scale of {'α' if alpha else 'Σ'}")
        if named_alpha not in (None, alpha):
            notes = (f"{pipeline} is what model_index.json says, but the VAE is that of {'α' if alpha else 'Σ'}: taken as it",)
    elif family in FAMILIES and FAMILIES[family].network == "pixart":
        alpha = FAMILIES[family].tokens == 120
        why.append(f"{'α' if alpha else 'Σ'} as `family` says")
    elif named_alpha is not None:
        alpha = named_alpha
        why.append(pipeline)
    else:
        alpha = False
        if native < 2048:
            notes = (f"nothing here tells α from Σ: taken as Σ; else `family` pixart-alpha-{native}",)
    tokens = 120 if alpha else 300
    group = [f for f in FAMILIES.values() if f.network == "pixart" and f.tokens == tokens and f.same_keys_as is None]
    fitting = [facts for facts in group if facts.native_px == native]
    if not fitting:
        sizes = ", ".join(str(facts.native_px) for facts in group)
        raise ModelError(f"{path}: PixArt-{'α' if alpha else 'Σ'} of {native} px is not known; known: {sizes}")
    scheduler_file = path / "scheduler" / "scheduler_config.json"
    scheduler = read_json(scheduler_file) if scheduler_file.is_file() else {}
    finding = Finding(
        path=path,
        kind="model",
        family=_few_step(fitting[0].name, scheduler) or fitting[0].name,
        layout="diffusers",
        why=tuple(why),
        size_conditions=conditions,
        notes=notes,
    )
    return named(finding, family)
