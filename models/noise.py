"""Input noise: the clean view that a teacher sees and the noised view that a student sees.

Both take an RGB picture and give the pixels of a square; RandAugment is as in the paper's section 4.1, with the level
tables of the released code (level scale 10; a magnitude goes past 10, nothing clips it). Every random draw comes from
the generator that is passed in, so a view is a pure function of (image, settings, generator state).

Deviations from the released code: its SVHN recipe crops after RandAugment, here the crop always comes first; its
Contrast blends with the number of pixels / 256 where Pillow (and this) takes the mean gray.

    noised_view(decode_rgb(data), NoiseConfig(magnitude=27), 600, numpy.random.default_rng(seed))
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageChops, ImageEnhance

from models.configs import NoiseConfig

if TYPE_CHECKING:
    import torch

LEVEL_SCALE = 10.0  # the magnitude at which the level tables reach their nominal value
FILL = (128, 128, 128)  # what geometry leaves empty and what cutout covers
SOLARIZE_ADD_THRESHOLD = 128  # SolarizeAdd brightens the values below
LOG_ASPECTS = (math.log(3 / 4), math.log(4 / 3))  # width / height of crop=resized
CROP_TRIES = 10
MAX_CLEAN_ASPECT = 32  # past this, the ends of an image go before the resize: 1 x 100,000 at 224 px would need 20 GB

Op = Callable[[Image.Image, float, NoiseConfig, np.random.Generator], Image.Image]


def noised_view(
    image: "Image.Image | torch.Tensor", noise: NoiseConfig, image_size: int, rng: np.random.Generator
) -> np.ndarray:
    """Crop, flip, RandAugment, then the fixed cutout: uint8 [image_size, image_size, 3], writable, and 0-255.

    Each of `noise.num_ops` operations is drawn uniformly with replacement from `noise.ops` and always runs.
    `image` is RGB of any size, a picture or uint8 [3, height, width], and stays as it is. Raises ValueError on another mode.
    """
    if isinstance(image, Image.Image):
        image = _require_rgb(image)
    elif noise.crop != "resized":
        image = as_picture(image)
    image = CROPS[noise.crop](image, noise, image_size, rng)
    if noise.flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for _ in range(noise.num_ops):
        image = OPS[noise.ops[_draw_below(len(noise.ops), rng)]](image, noise.magnitude, noise, rng)
    if noise.patch_px > 0:
        image = cover_patch(image, noise.patch_px, rng)
    return np.array(image)


def clean_view(image: Image.Image, image_size: int, crop_pct: float) -> np.ndarray:
    """The un-noised view: uint8 [image_size, image_size, 3], 0-255; what timm's eval transform gives.

    The shorter side is resized (bicubic) to floor(image_size / crop_pct), then the center is cut out. `image` is RGB
    of any size, `crop_pct` in (0, 1]; an image longer than 32:1 is first cut to that. Raises ValueError on another mode.
    """
    return np.array(_clean(_require_rgb(image), image_size, crop_pct))


def as_picture(pixels: "torch.Tensor") -> Image.Image:
    """uint8 [3, height, width] -> an RGB picture."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def clean_sizes(width: int, height: int, image_size: int, crop_pct: float) -> tuple[tuple[int, int], tuple[int, int]]:
    """What the clean view keeps of the center of an image, and to what it resizes that: (width, height) each, in pixels."""
    short, target = min(width, height), math.floor(image_size / crop_pct)
    width, height = min(width, MAX_CLEAN_ASPECT * short), min(height, MAX_CLEAN_ASPECT * short)
    if short == target:
        return (width, height), (width, height)
    # the longer side is rounded down, by torchvision's order of operations: timm's pixels hang on it
    resized = (target, int(target * height / width)) if width <= height else (int(target * width / height), target)
    return (width, height), resized


def center_offset(outer: int, inner: int) -> int:
    """Where a centered stretch of `inner` pixels begins among `outer` ones; halves to even, as torchvision."""
    return round((outer - inner) / 2)


def _clean(image: Image.Image, image_size: int, crop_pct: float) -> Image.Image:
    kept, resized = clean_sizes(image.width, image.height, image_size, crop_pct)
    image = _center(image, *kept)
    if resized != kept:
        image = image.resize(resized, Image.Resampling.BICUBIC)
    return _center(image, image_size, image_size)


def _center(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    left, top = center_offset(image.width, width), center_offset(image.height, height)
    return image.crop((left, top, left + width, top + height))


def _crop_none(image: Image.Image, _noise: NoiseConfig, image_size: int, _rng: np.random.Generator) -> Image.Image:
    return _clean(image, image_size, 1.0)


def _crop_pad(image: Image.Image, noise: NoiseConfig, image_size: int, rng: np.random.Generator) -> Image.Image:
    image = _clean(image, image_size, 1.0)
    offsets = 2 * noise.pad_px + 1
    top, left = _draw_below(offsets, rng), _draw_below(offsets, rng)
    source = _reflected(image_size, noise.pad_px)  # the padded picture is never built, only its window is gathered
    pixels = np.asarray(image).take(source[top : top + image_size], 0).take(source[left : left + image_size], 1)
    return Image.fromarray(pixels)


def _crop_resized(
    image: "Image.Image | torch.Tensor", noise: NoiseConfig, image_size: int, rng: np.random.Generator
) -> Image.Image:
    from models.resize import resize, resize_pixels  # torch, which a process that only reads configs need not load

    if isinstance(image, Image.Image):
        box = random_resized_box(image.width, image.height, noise.min_area, rng)
        return Image.fromarray(resize(np.array(image.crop(box)), image_size, image_size))
    height, width = image.shape[1:]
    left, top, right, bottom = random_resized_box(width, height, noise.min_area, rng)
    return Image.fromarray(resize_pixels(image[:, top:bottom, left:right], image_size, image_size))


CROPS: dict[str, Callable[..., Image.Image]] = {"none": _crop_none, "pad": _crop_pad, "resized": _crop_resized}


def random_resized_box(width: int, height: int, min_area: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A random (left, top, right, bottom) in pixels inside a width x height image.

    Its area is uniform in `min_area`..1 of the image, the logarithm of its aspect uniform between 3/4 and 4/3. After
    10 draws that do not fit: the largest center box of an aspect in that range (torchvision's RandomResizedCrop).
    """
    low, high = LOG_ASPECTS
    for _ in range(CROP_TRIES):
        area = width * height * (min_area + (1 - min_area) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            left, top = _draw_below(width - box_width + 1, rng), _draw_below(height - box_height + 1, rng)
            return left, top, left + box_width, top + box_height
    box_width = min(width, round(height * 4 / 3))
    box_height = min(height, round(width * 4 / 3))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


@lru_cache(maxsize=16)
def _reflected(size: int, pad: int) -> np.ndarray:
    return np.pad(np.arange(size), pad, mode="reflect")


# Levels to arguments: the tables of the released code. `magnitude` is 0 or more, 10 is the nominal full scale.


def rotate_degrees(magnitude: float) -> float:
    """Degrees of Rotate, unsigned: 30 at magnitude 10, 81 at 27."""
    return magnitude / LEVEL_SCALE * 30.0


def shear_factor(magnitude: float) -> float:
    """Pixels that a row (column) moves for each row (column) further down (right), unsigned: 0.3 at magnitude 10."""
    return magnitude / LEVEL_SCALE * 0.3


def translate_pixels(magnitude: float, translate_px: float) -> float:
    """Pixels that TranslateX/Y move, unsigned: `translate_px` at magnitude 10. May exceed the image."""
    return magnitude / LEVEL_SCALE * translate_px


def enhance_factor(magnitude: float) -> float:
    """Factor of Color, Contrast, Brightness and Sharpness: 0.1 at magnitude 0, 1 (no change) at 5, 1.9 at 10."""
    return magnitude / LEVEL_SCALE * 1.8 + 0.1


def posterize_bits(magnitude: float) -> int:
    """Bits of each value that Posterize keeps: 4 at magnitude 10; from 20 on 8 or more, which changes nothing."""
    return int(magnitude / LEVEL_SCALE * 4)


def solarize_threshold(magnitude: float) -> int:
    """Least value that Solarize inverts: 128 at magnitude 5; from 10 on 256 or more, which changes nothing."""
    return int(magnitude / LEVEL_SCALE * 256)


def solarize_addition(magnitude: float) -> int:
    """What SolarizeAdd adds to values below 128: 110 at magnitude 10; from 23.2 on all of them end at 255."""
    return int(magnitude / LEVEL_SCALE * 110)


def cutout_half_side(magnitude: float, cutout_px: float) -> int:
    """Half the side in pixels of the square that Cutout covers: `cutout_px` at magnitude 10."""
    return int(magnitude / LEVEL_SCALE * cutout_px)


# Operations. Each gives an RGB picture of the same size and leaves its input as it is.


def _auto_contrast(
    image: Image.Image, _magnitude: float, _noise: NoiseConfig, _rng: np.random.Generator
) -> Image.Image:
    low, high = np.array(image.getextrema(), dtype=np.float64).T[:, :, None]  # [3 bands, 1] each
    flat = high <= low  # a band of one value stays
    scale = np.where(flat, 1.0, 255.0 / np.where(flat, 1.0, high - low))
    offset = np.where(flat, 0.0, -low * scale)
    tables = (np.arange(256) * scale + offset).clip(0, 255).astype(np.uint8)
    return _map_bands(image, tables)


def _equalize(image: Image.Image, _magnitude: float, _noise: NoiseConfig, _rng: np.random.Generator) -> Image.Image:
    histogram = np.array(image.histogram()).reshape(3, 256)
    highest = 255 - np.argmax(histogram[:, ::-1] > 0, axis=1)
    step = (image.width * image.height - histogram[(0, 1, 2), highest][:, None]) // 255  # [3 bands, 1]
    below = np.cumsum(histogram, axis=1) - histogram
    tables = (below + step // 2) // np.maximum(step, 1)
    return _map_bands(image, np.where(step == 0, np.arange(256), tables.clip(0, 255)).astype(np.uint8))


def _invert(image: Image.Image, _magnitude: float, _noise: NoiseConfig, _rng: np.random.Generator) -> Image.Image:
    return ImageChops.invert(image)


def _rotate(image: Image.Image, magnitude: float, _noise: NoiseConfig, rng: np.random.Generator) -> Image.Image:
    return image.rotate(_signed(rotate_degrees(magnitude), rng), Image.Resampling.NEAREST, fillcolor=FILL)


def _posterize(image: Image.Image, magnitude: float, _noise: NoiseConfig, _rng: np.random.Generator) -> Image.Image:
    bits = posterize_bits(magnitude)
    # below magnitude 2.5 the table asks for 0 bits; TensorFlow's shift stops at 7, which keeps one
    return image if bits >= 8 else _map_values(image, _posterizing_table(max(bits, 1)))


def _solarize(image: Image.Image, magnitude: float, _noise: NoiseConfig, _rng: np.random.Generator) -> Image.Image:
    threshold = solarize_threshold(magnitude)
    return image if threshold >= 256 else _map_values(image, _solarizing_table(threshold))


def _solarize_add(image: Image.Image, magnitude: float, _noise: NoiseConfig, _rng: np.random.Generator) -> Image.Image:
    return _map_values(image, _adding_table(solarize_addition(magnitude)))


def _enhance(kind: Callable[[Image.Image], Any]) -> Op:
    def op(image: Image.Image, magnitude: float, _noise: NoiseConfig, _rng: np.random.Generator) -> Image.Image:
        return kind(image).enhance(enhance_factor(magnitude))

    return op


def _shear_x(image: Image.Image, magnitude: float, _noise: NoiseConfig, rng: np.random.Generator) -> Image.Image:
    shear = _signed(shear_factor(magnitude), rng)
    return _affine(image, (1, shear, -shear / 2, 0, 1, 0))  # the half pixel: Pillow counts from pixel corners


def _shear_y(image: Image.Image, magnitude: float, _noise: NoiseConfig, rng: np.random.Generator) -> Image.Image:
    shear = _signed(shear_factor(magnitude), rng)
    return _affine(image, (1, 0, 0, shear, 1, -shear / 2))


def _translate_x(image: Image.Image, magnitude: float, noise: NoiseConfig, rng: np.random.Generator) -> Image.Image:
    return _affine(image, (1, 0, _signed(translate_pixels(magnitude, noise.translate_px), rng), 0, 1, 0))


def _translate_y(image: Image.Image, magnitude: float, noise: NoiseConfig, rng: np.random.Generator) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, _signed(translate_pixels(magnitude, noise.translate_px), rng)))


def _cutout(image: Image.Image, magnitude: float, noise: NoiseConfig, rng: np.random.Generator) -> Image.Image:
    return cover_patch(image, cutout_half_side(magnitude, noise.cutout_px), rng)


OPS: dict[str, Op] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
    "SolarizeAdd": _solarize_add,
    "Cutout": _cutout,
}


def cover_patch(image: Image.Image, half_side: int, rng: np.random.Generator) -> Image.Image:
    """A copy with a gray square of 2 x `half_side` pixels a side, its center uniform over the pixels, cut at the border."""
    column, row = _draw_below(image.width, rng), _draw_below(image.height, rng)
    image = image.copy()
    image.paste(FILL, (column - half_side, row - half_side, column + half_side, row + half_side))
    return image


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    # nearest, as tf.contrib.image's transforms by default: the released code names no interpolation
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=FILL)


def _map_values(image: Image.Image, table: bytes) -> Image.Image:
    # 10 us on 28 x 28 pixels, where Image.point takes 45: it rounds its whole table in Python
    return Image.frombytes("RGB", image.size, image.tobytes().translate(table))


def _map_bands(image: Image.Image, tables: np.ndarray) -> Image.Image:
    values = bytearray(image.tobytes())
    for band, table in enumerate(tables):
        values[band::3] = values[band::3].translate(table.tobytes())
    return Image.frombytes("RGB", image.size, bytes(values))


@lru_cache(maxsize=8)
def _posterizing_table(bits: int) -> bytes:
    return bytes(value >> (8 - bits) << (8 - bits) for value in range(256))


@lru_cache(maxsize=256)
def _solarizing_table(threshold: int) -> bytes:
    return bytes(value if value < threshold else 255 - value for value in range(256))


@lru_cache(maxsize=256)
def _adding_table(addition: int) -> bytes:
    return bytes(min(value + addition, 255) if value < SOLARIZE_ADD_THRESHOLD else value for value in range(256))


def _draw_below(count: int, rng: np.random.Generator) -> int:
    return int(rng.random() * count)  # 0.6 us, where rng.integers takes 2


def _signed(value: float, rng: np.random.Generator) -> float:
    return value if rng.random() < 0.5 else -value


def _require_rgb(image: Image.Image) -> Image.Image:
    if image.mode != "RGB":
        raise ValueError(f"the image has mode {image.mode}, a view needs RGB: decode it with storage.images.decode_rgb")
    return image
