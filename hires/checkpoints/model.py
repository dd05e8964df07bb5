"""The facts of one checkpoint, and the noise levels that follow from them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hires.checkpoints.containers.layers import NOT_COUNTED, LayerCount
from hires.checkpoints.families import Defaults, FamilyFacts, NetworkShape, UNetShape
from hires.checkpoints.few_step.profiles import Profile
from hires.checkpoints.locate import Part
from hires.checkpoints.noise_levels import vp_sigmas
from hires.errors import RequestError
from hires.prompts.request import TextModel
from hires.sampling.registry import LCM_TIMESTEPS
from hires.tiling.bands.memory import VaeShape
from hires.tiling.geometry import Size


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Facts of one checkpoint. Sigmas are in units of the latents' standard deviation."""

    name: str
    """As the user gave it."""
    path: Path
    """Its file or folder."""
    facts: FamilyFacts
    """Those of its family."""
    parameterisation: str
    sigma_min: float
    sigma_max: float
    vp_betas: tuple[str, float, float] | None
    """(kind, first, last) of a variance-preserving model; None for EDM."""
    zero_terminal_snr: bool
    latent_scale: float
    cell_px: int
    """Pixels per side of a latent cell."""
    native_px: int
    align_px: int
    """What the sides of a canvas must divide by."""
    network: NetworkShape
    vae: VaeShape
    network_params: int
    """Values of the network's weights."""
    text_params: int
    """Values of the text encoders' weights."""
    vae_params: int
    """Values of the VAE's weights."""
    defaults: Defaults
    parts: Mapping[str, Part]
    """Where each component is."""
    network_count: LayerCount = NOT_COUNTED
    """What decides the bytes of the network's weights where they are packed."""
    vae_count: LayerCount = NOT_COUNTED
    """The same of the VAE's."""
    notes: tuple[str, ...] = ()
    """What a plan says about the checkpoint."""
    profile: Profile | None = None
    """How it is run in few steps, where its name, a LoRA or the user says so."""
    prompt_chunks: int = 1
    """Chunks of the longest text of the request."""
    prompt_parts: int = 1
    """Prompts that AND puts together in the request."""

    @property
    def text_tokens(self) -> int:
        """The tokens that the network's cross-attention reads."""
        return self.facts.tokens * self.prompt_chunks

    @property
    def text_model(self) -> TextModel:
        """What it reads prompts with."""
        towers = 0 if self.facts.text == ("t5",) else len(self.facts.text)
        return TextModel(
            name=self.name if self.defaults.words_only else self.facts.title,
            towers=towers,
            words_only=not towers or self.defaults.words_only,
            sized=self.facts.size_conditions == "sdxl",
            edits=self.facts.image_channels > 0,
        )

    @property
    def family(self) -> str:
        """The name of the model's family."""
        return self.facts.name

    @property
    def missing(self) -> tuple[Part, ...]:
        """The parts that were not found; with any the model cannot run."""
        return tuple(part for part in self.parts.values() if part.layout == "missing")


def embeds_guidance(spec: ModelSpec) -> bool:
    """Whether the network is told the guidance scale, and needs one evaluation a step whatever it is."""
    return isinstance(spec.network, UNetShape) and spec.network.guidance_width > 0


def sigma_table(spec: ModelSpec) -> tuple[float, ...] | None:
    """The rising sigmas of a variance-preserving model's timesteps, None for an EDM model."""
    return None if spec.vp_betas is None else vp_sigmas(*spec.vp_betas, zero_snr=spec.zero_terminal_snr)


def schedule_table(spec: ModelSpec, schedule: str) -> tuple[float, ...] | None:
    """The timesteps that a schedule is made of: of an LCM the 50 that it was distilled at, which `lcm` picks for itself.

    So ComfyUI's ModelSamplingDiscrete with lcm has them. None for an EDM model.
    """
    table = sigma_table(spec)
    if table is None or spec.facts.few_step != "lcm" or schedule == "lcm":
        return table
    spacing = len(table) // LCM_TIMESTEPS
    return table[spacing - 1 :: spacing]


def sigma_max_for(spec: ModelSpec, size: Size) -> float:
    """min(sigma_max, 14.6 x longest side / 1024): the noise that hides the largest shapes of a picture of that size.

    Twice the side needs twice the noise (arXiv 2409.15997), and SDXL's 14.6 is made for 1024 px. RequestError for a
    variance-preserving model.
    """
    if spec.vp_betas is not None:
        raise RequestError(
            f"sigma_max: {spec.name} is variance-preserving, its {len(sigma_table(spec) or ())} noise levels end at "
            f"{spec.sigma_max:.2f} and its network knows no others; leave the option out"
        )
    return min(spec.sigma_max, 14.6 * max(size.height, size.width) / 1024)
