"""The JSON documents that A1111's clients read."""

from __future__ import annotations

from typing import TypedDict


class InfoDocument(TypedDict):
    """How pictures were made: `info` of an answer, as JSON text."""

    prompt: str
    all_prompts: list[str]
    negative_prompt: str
    all_negative_prompts: list[str]
    seed: int
    all_seeds: list[int]
    subseed: int
    all_subseeds: list[int]
    subseed_strength: float
    width: int
    height: int
    sampler_name: str
    cfg_scale: float | None
    steps: int | None
    batch_size: int
    restore_faces: bool
    face_restoration_model: str | None
    sd_model_name: str
    sd_model_hash: str | None
    sd_vae_name: str | None
    sd_vae_hash: str | None
    seed_resize_from_w: int
    seed_resize_from_h: int
    denoising_strength: float | None
    extra_generation_params: dict[str, list[str]]
    index_of_first_image: int
    infotexts: list[str]
    styles: list[str]
    job_timestamp: str
    clip_skip: int
    is_using_inpainting_conditioning: bool
    version: str
    ignored: list[str]
    """Ours: the fields that ask for something this server does not do."""
    saved: list[str]
    """Ours: the files of `save_images`."""
    interrupted: bool
    """Ours: whether the job was cancelled before all pictures were finished."""


class StateDocument(TypedDict):
    """What the server is doing."""

    skipped: bool
    interrupted: bool
    stopping_generation: bool
    job: str
    job_count: int
    job_timestamp: str
    job_no: int
    sampling_step: int
    sampling_steps: int


class ProgressDocument(TypedDict):
    """How far the running job has come."""

    progress: float
    eta_relative: float
    """Expected seconds until the job is done."""
    state: StateDocument
    current_image: str | None
    """The latest preview, a PNG in base64."""
    textinfo: str | None
    current_task: str | None


class UpscalerDocument(TypedDict):
    """An upscaler that can be named."""

    name: str
    model_name: str | None
    model_path: str | None
    model_url: str | None
    scale: int


class ModelDocument(TypedDict):
    """A checkpoint that can be named."""

    title: str
    model_name: str
    hash: str | None
    sha256: str | None
    filename: str
    config: str | None
