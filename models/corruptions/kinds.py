"""The corruptions themselves. Each takes uint8 [side, side, 3] pixels, a level (levels.py) and a generator.

It gives float32 in about [0, 1], which the caller clips and cuts off to bytes, or bytes; what it was given stays as it is.
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from models.corruptions.fields import (
    blur,
    convolve,
    disk,
    elastic,
    ice,
    motion_blur,
    plasma,
    shuffle_near,
    zoom_center,
)

Pixels = np.ndarray
GRAY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def _gaussian_noise(pixels: Pixels, level: float, rng: np.random.Generator) -> Pixels:
    return _unit(pixels) + level * rng.standard_normal(pixels.shape, np.float32)


def _shot_noise(pixels: Pixels, level: float, rng: np.random.Generator) -> Pixels:
    return rng.poisson(_unit(pixels) * level).astype(np.float32) / level


def _impulse_noise(pixels: Pixels, level: float, rng: np.random.Generator) -> Pixels:
    draw, made = rng.random(pixels.shape, np.float32), pixels.copy()
    made[draw < level] = 255
    made[draw < level / 2] = 0
    return made


def _defocus_blur(pixels: Pixels, level: tuple[float, float], rng: np.random.Generator) -> Pixels:
    return convolve(_unit(pixels), disk(*level))


def _glass_blur(pixels: Pixels, level: tuple[float, int, int], rng: np.random.Generator) -> Pixels:
    sigma, reach, rounds = level
    blurred = (np.clip(blur(_unit(pixels), sigma), 0, 1) * 255).astype(np.uint8)
    return blur(_unit(shuffle_near(blurred, reach, rounds, rng)), sigma)


def _motion_blur(pixels: Pixels, level: tuple[int, float], rng: np.random.Generator) -> Pixels:
    return motion_blur(_unit(pixels), *level, angle=rng.uniform(-45, 45))


def _zoom_blur(pixels: Pixels, level: tuple[float, float], rng: np.random.Generator) -> Pixels:
    image, factors = _unit(pixels), np.arange(1, *level)
    total = image.copy()
    for factor in factors:
        total += zoom_center(image, float(factor))
    return total / (len(factors) + 1)


def _snow(pixels: Pixels, level: tuple[Any, ...], rng: np.random.Generator) -> Pixels:
    mean, deviation, zoom, threshold, radius, sigma, mix = level
    flakes = mean + deviation * rng.standard_normal(pixels.shape[:2], np.float32)
    flakes = zoom_center(flakes[..., None], zoom)
    flakes = np.where(flakes < threshold, 0, flakes).clip(0, 1)
    fallen = motion_blur(flakes, radius, sigma, angle=rng.uniform(-135, -45))
    image = _unit(pixels)
    whitened = np.maximum(image, (image @ GRAY)[..., None] * 1.5 + 0.5)
    return mix * image + (1 - mix) * whitened + fallen + np.rot90(fallen, 2)


def _frost(pixels: Pixels, level: tuple[float, float], rng: np.random.Generator) -> Pixels:
    return level[0] * _unit(pixels) + level[1] * ice(pixels.shape[0], rng)


def _fog(pixels: Pixels, level: tuple[float, float], rng: np.random.Generator) -> Pixels:
    weight, decay = level
    image = _unit(pixels)
    brightest = image.max()
    return (image + weight * plasma(pixels.shape[0], decay, rng)[..., None]) * (brightest / (brightest + weight))


def _brightness(pixels: Pixels, level: float, rng: np.random.Generator) -> Pixels:
    return brighten(_unit(pixels), level)


def _contrast(pixels: Pixels, level: float, rng: np.random.Generator) -> Pixels:
    image = _unit(pixels)
    mean = image.mean(axis=(0, 1), keepdims=True)
    return (image - mean) * level + mean


def _elastic_transform(pixels: Pixels, level: tuple[float, float, float], rng: np.random.Generator) -> Pixels:
    side = pixels.shape[0]
    alpha, sigma, shift = (length * side for length in level)
    return elastic(_unit(pixels), alpha, sigma, shift, rng)


def _pixelate(pixels: Pixels, level: float, rng: np.random.Generator) -> Pixels:
    image, small = Image.fromarray(pixels), max(1, int(pixels.shape[0] * level))
    return np.array(image.resize((small, small), Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX))


def _jpeg_compression(pixels: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=level)
    return np.array(Image.open(stream))


KINDS: dict[str, Callable[[Pixels, Any, np.random.Generator], Pixels]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}


def brighten(image: np.ndarray, added: float) -> np.ndarray:
    """float32 [h, w, 3] in [0, 1] with `added` on the value of HSV, hue and saturation kept; black becomes gray."""
    value = image.max(axis=-1, keepdims=True)
    raised = np.clip(value + added, 0, 1)
    return np.where(value > 0, image * (raised / np.where(value > 0, value, 1)), raised)


def _unit(pixels: Pixels) -> np.ndarray:
    """Bytes as float32 in [0, 1]."""
    return pixels.astype(np.float32) / 255
