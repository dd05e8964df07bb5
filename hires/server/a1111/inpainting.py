"""Inpainting as A1111 does it: a part of a picture is drawn alone and pasted back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from hires.images import infotext
from hires.images.decoders import PILLOW_FORMATS
from hires.images.formats import read_text
from hires.images.whole import save_png
from hires.server.a1111.fields import Img2Img
from hires.server.job import Job
from hires.server.pictures import Box, box_around, mask_of
from hires.server.worker import FinishedPicture
from hires.tiling.geometry import Size


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedPicture:
    """A picture and where it is drawn anew."""

    picture: Image.Image
    """In RGB."""
    mask: Image.Image
    """White where it is drawn anew, in grey."""
    box: Box | None
    """The part that is drawn alone; None where the whole picture is drawn."""

    def drawn_part(self) -> tuple[Image.Image, Image.Image]:
        """The part that is drawn, and its mask."""
        if self.box is None:
            return self.picture, self.mask
        return self.picture.crop(self.box), self.mask.crop(self.box)

    def paste_result(self, job: Job, index: int) -> FinishedPicture:
        """Paste a drawn part back into the picture and write that as the result; a whole picture's file stays as it is."""
        result = job.pictures[index]
        if self.box is None:
            return result
        left, top, right, bottom = self.box
        path = job.folder / result.file
        text = read_text(path)
        with Image.open(path, formats=PILLOW_FORMATS) as opened:
            part = opened.convert("RGB").resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        whole = self.picture.copy()
        whole.paste(part, (left, top), self.mask.crop(self.box))
        if "parameters" in text:
            values = infotext.parsed(text["parameters"])
            prompt, negative = values.pop("Prompt"), values.pop("Negative prompt")
            size = {"Size": f"{whole.width}x{whole.height}"}
            text["parameters"] = infotext.written(prompt, negative, values | size)
        save_png(path, np.asarray(whole), text, overwrite=True)
        return replace(result, size=Size(whole.height, whole.width))


def mask_picture(body: Img2Img, picture: Image.Image, mask: Image.Image) -> MaskedPicture:
    """A picture with a mask, and the part to draw alone where the body asks for that and the mask is not black."""
    plain = picture.convert("RGB")
    grey = mask_of(mask, plain.size, body.mask_blur, bool(body.inpainting_mask_invert))
    box = box_around(grey, body.inpaint_full_res_padding, body.width, body.height) if body.inpaint_full_res else None
    return MaskedPicture(picture=plain, mask=grey, box=box)
