"""Image bytes to the clean view, fast: torchvision's libjpeg-turbo and resize where they do as storage/images.py does.

One core decodes and resizes 600 photographs of 460 x 400 a second like this, 260 with Pillow (224 px). The decoded pixels
are Pillow's own, bit for bit; the resized ones differ by at most 2 of 255 (the mean of a picture by 0.02): Pillow and
torch round their fixed-point bicubic differently. tests/models/test_decode.py holds both.
"""

import warnings

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg

from models.noise import center_offset, clean_sizes
from storage.images import decode_rgb, open_image

warnings.filterwarnings("ignore", "The image decoding and encoding capabilities of TorchVision are deprecated")
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright


def decode_pixels(data: bytes) -> torch.Tensor:
    """The upright RGB pixels of `storage.images.decode_rgb`, uint8 [3, height, width]. Raises ImageError as it does.

    Only plain JPEGs (three colors or gray, upright) take the fast way; CMYK, palettes, alpha, 16 bit, other formats and
    what libjpeg stumbles on go through Pillow.
    """
    image = open_image(data)
    if image.format == "JPEG" and image.mode in ("RGB", "L") and _upright(image):
        try:
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        except RuntimeError:
            pass  # Pillow reads it after all, or says why not
    return torch.from_numpy(np.array(decode_rgb(data))).permute(2, 0, 1)


def clean_pixels(image: torch.Tensor, image_size: int, crop_pct: float) -> torch.Tensor:
    """`models.noise.clean_view` of uint8 [3, height, width] pixels: uint8 [image_size, image_size, 3]."""
    kept, resized = clean_sizes(image.shape[2], image.shape[1], image_size, crop_pct)
    image = _center(image, *kept)
    if resized != kept:
        size = (resized[1], resized[0])
        image = interpolate(image[None], size, mode="bicubic", antialias=True)[0]
    return _center(image, image_size, image_size).permute(1, 2, 0)


def _center(image: torch.Tensor, width: int, height: int) -> torch.Tensor:
    left, top = center_offset(image.shape[2], width), center_offset(image.shape[1], height)
    return image[:, top : top + height, left : left + width]


def _upright(image: Image.Image) -> bool:
    if "exif" not in image.info and "xmp" not in image.info:
        return True
    return image.getexif().get(ORIENTATION, 1) == 1
