"""Image bytes to an RGB picture, or the reason why not. The one place that decodes for checking and for training."""

import io
from functools import cache

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")  # no EPS: it runs a program
MAX_BYTES = 256 << 20  # no file of an image that can be used is larger
MAX_PIXELS = 100_000_000  # 10,000 x 10,000: past this an image counts as a decompression bomb


class ImageError(Exception):
    """The bytes are no image that can be used; the text is the reason, for the rejects table."""


def decode_rgb(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode image bytes to an upright RGB picture.

    Palettes, gray, CMYK, 16-bit and float (white is 1, 255 or 65535) are converted; alpha is laid over white; EXIF orientation is applied.
    Raises ImageError with a short reason: empty, not an image, too large, truncated.
    """
    image = open_image(data, max_pixels)
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:
        raise ImageError(f"cannot be decoded: {_first_line(error)}") from error


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read the header only: format, mode and size are known, no pixel is. Raises ImageError as `decode_rgb` does."""
    if not data:
        raise ImageError("empty: 0 bytes")
    if len(data) > MAX_BYTES:
        raise ImageError(f"too large: a file of {len(data):,} bytes, limit {MAX_BYTES:,}")
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except Image.DecompressionBombError as error:
        raise ImageError(f"too large: its header claims more than {max_pixels} pixels") from error
    except Exception as error:  # Pillow's plug-ins raise many kinds on hostile headers; each means the same here
        raise ImageError(f"not an image: {_first_line(error)}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"too large: {width} x {height} pixels, limit {max_pixels}")
    return image


def image_extension(data: bytes) -> str:
    """The file extension of encoded image bytes, by their first bytes: jpg, png, webp; `img` for any other format."""
    if data[:2] == b"\xff\xd8":
        return "jpg"
    if data[:4] == b"\x89PNG":
        return "png"
    return "webp" if data[8:12] == b"WEBP" else "img"


@cache
def _formats() -> tuple[str, ...]:
    """The formats that are read, of those that this Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):  # 16-bit and float gray: Pillow's own conversion would clip at 255
        values = np.asarray(image, dtype=np.float64)
        white = 65535.0 if image.mode.startswith("I;16") or values.max() > 255 else 255.0
        if image.mode == "F" and values.max() <= 1:  # no picture of 0..255 is that dark
            white = 1.0
        return Image.fromarray((values * (255.0 / white)).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return image.convert("RGB")


def _first_line(error: Exception) -> str:
    text = (str(error) or type(error).__name__).splitlines()[0]
    return text if "BytesIO" not in text else "unknown format"
