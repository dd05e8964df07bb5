"""The bodies that A1111's clients send.

Fields that are not listed are accepted; those that ask for something are named in the answer's `info`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from hires.server.settings import PROMPT_CHARACTERS

Text = Annotated[str, Field(max_length=PROMPT_CHARACTERS)]
Side = Annotated[int, Field(ge=0, le=131_072)]
"""In pixels; 0 leaves it to the other side or to a factor."""
OwnSide = Annotated[int, Field(ge=1, le=131_072)]
Share = Annotated[float, Field(ge=0, le=1)]


class Lenient(BaseModel):
    """A body that accepts further fields, in `model_extra`; null means the default."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _null_is_default(cls, value: object, info: ValidationInfo) -> object:
        if value is not None or info.field_name is None:
            return value
        field = cls.model_fields.get(info.field_name)
        return value if field is None or field.is_required() else field.get_default(call_default_factory=True)


class Drawing(Lenient):
    """What `txt2img` and `img2img` share."""

    prompt: Text = ""
    negative_prompt: Text = ""
    styles: list[str] = Field(default_factory=list)
    seed: Annotated[int, Field(ge=-1, lt=2**63)] = -1
    sampler_name: Annotated[str, Field(max_length=200)] | None = None
    sampler_index: Annotated[str, Field(max_length=200)] | None = None
    scheduler: Annotated[str, Field(max_length=200)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=10_000)] = 1
    n_iter: Annotated[int, Field(ge=1, le=10_000)] = 1
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    cfg_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    width: OwnSide = 512
    height: OwnSide = 512
    denoising_strength: Share | None = None
    override_settings: dict[str, object] = Field(default_factory=dict)
    script_name: Annotated[str, Field(max_length=200)] | None = None
    script_args: list[object] = Field(default_factory=list)
    alwayson_scripts: dict[str, object] = Field(default_factory=dict)
    send_images: bool = True
    save_images: bool = False


class Txt2Img(Drawing):
    """The body of `txt2img`; the `hr_` fields describe a second, larger stage."""

    enable_hr: bool = False
    hr_scale: Annotated[float, Field(gt=0, le=64)] = 2.0
    hr_upscaler: Annotated[str, Field(max_length=200)] | None = None
    hr_second_pass_steps: Annotated[int, Field(ge=0, le=1000)] = 0
    hr_resize_x: Side = 0
    hr_resize_y: Side = 0
    hr_prompt: Text = ""
    hr_negative_prompt: Text = ""


class Img2Img(Drawing):
    """The body of `img2img`; pictures and masks are base64."""

    init_images: Annotated[list[str], Field(max_length=64)] | None = None
    resize_mode: Annotated[int, Field(ge=0, le=3)] = 0
    image_cfg_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    mask: str | None = None
    mask_blur: Annotated[float, Field(ge=0, le=1024)] = 4.0
    inpaint_full_res: bool = True
    inpaint_full_res_padding: Annotated[int, Field(ge=0, le=16_384)] = 0
    inpainting_mask_invert: Annotated[int, Field(ge=0, le=1)] = 0
    include_init_images: bool = False


class Extras(Lenient):
    """What both bodies of enlargements share."""

    resize_mode: Annotated[int, Field(ge=0, le=1)] = 0
    upscaling_resize: Annotated[float, Field(gt=0, le=64)] = 2.0
    upscaling_resize_w: Side = 512
    upscaling_resize_h: Side = 512
    upscaling_crop: bool = True
    upscaler_1: Annotated[str, Field(max_length=200)] = "None"
    upscaler_2: Annotated[str, Field(max_length=200)] = "None"
    extras_upscaler_2_visibility: Share = 0.0


class ExtrasSingle(Extras):
    """The body of `extra-single-image`."""

    image: str


class NamedPicture(Lenient):
    """A picture in base64 and its file name."""

    data: str
    name: Annotated[str, Field(max_length=1000)] = ""


class ExtrasBatch(Extras):
    """The body of `extra-batch-images`."""

    imageList: Annotated[list[NamedPicture], Field(max_length=256)]  # noqa: N815  the field's name


class PngInfo(Lenient):
    """The body of `png-info`: a picture in base64."""

    image: str


NEUTRAL: dict[str, object] = {
    "show_extras_results": True,
    "do_not_save_samples": False,
    "s_noise": 1,
    "eta": 1.0,
    "initial_noise_multiplier": 1,
    "subseed": -1,
    "override_settings_restore_afterwards": True,
    "firstphase_width": 0,
    "seed_resize_from_h": -1,
    "seed_resize_from_w": -1,
    "hr_checkpoint_name": "Use same checkpoint",
}
"""Values of unlisted fields that ask for nothing, besides false, 0, "" and an empty list."""


def ignored(body: Lenient) -> list[str]:
    """The fields of a body that ask for something this server does not do."""
    return sorted(name[:100] for name, value in (body.model_extra or {}).items() if value and NEUTRAL.get(name) != value)
