"""ImageNet-P's and CIFAR-10-P's sequences, made on the fly: an image that changes a little from frame to frame. Without torch.

    sequence(pixels, 224, "tilt", noise_of(seed, "tilt", 0, key), "imagenet")

From the benchmark's published parameters (Hendrycks and Dietterich 2019; the released code's make_imagenet_p.py and make_cifar_p.py),
with numpy, scipy and Pillow. Its frames are stored as video, whose compression is not imitated.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from models.corruptions.fields import motion_blur, zoom_center
from models.corruptions.kinds import GRAY, brighten
from models.perturbation_levels import LEVELS

Frames = Iterator[np.ndarray]


def sequence(pixels: np.ndarray, side: int, kind: str, rng: np.random.Generator, table: str) -> list[np.ndarray]:
    """The frames of an image: uint8 [side, side, 3] each.

    `pixels` is uint8 [wide, wide, 3] with wide >= side: what lies around the center comes into view where a frame moves; beyond it is
    black. Raises KeyError on another kind or table.
    """
    return [_bytes(_center(frame, side)) for frame in MAKERS[kind](pixels, side, LEVELS[table][kind], rng)]


def _gaussian_noise(pixels: np.ndarray, side: int, level: Any, rng: np.random.Generator) -> Frames:
    yield pixels
    image = _unit(_center(pixels, side))
    for _ in range(1, level[1]):
        yield image + level[0] * rng.standard_normal(image.shape, np.float32)


def _shot_noise(pixels: np.ndarray, side: int, level: Any, rng: np.random.Generator) -> Frames:
    yield pixels
    image = _unit(_center(pixels, side))
    for _ in range(1, level[1]):
        yield rng.poisson(image * level[0]).astype(np.float32) / level[0]


def _motion_blur(pixels: np.ndarray, side: int, level: Any, rng: np.random.Generator) -> Frames:
    radius, sigma, degrees, frames = level
    image = _unit(_center(pixels, side))
    for i in range(frames):
        yield motion_blur(image, radius, sigma, (i - frames + 1) * degrees)


def _zoom_blur(pixels: np.ndarray, side: int, level: Any, rng: np.random.Generator) -> Frames:
    yield pixels
    total = _unit(_center(pixels, side))
    for i in range(1, level[1]):
        total = total + _unit(_center(np.asarray(_affine(pixels, 0, 1 + level[0] * i)), side))
        yield total / (i + 1)


def _snow(pixels: np.ndarray, side: int, level: Any, rng: np.random.Generator) -> Frames:
    zoom, radius, sigma, frames = level
    image = _unit(_center(pixels, side))
    flakes = zoom_center((0.05 + 0.3 * rng.standard_normal((side, side), np.float32))[..., None], zoom)
    flakes = np.where(flakes < 0.5, 0, flakes).clip(0, 1)
    whitened = 0.85 * image + 0.15 * np.maximum(image, (image @ GRAY)[..., None] * 1.5 + 0.5)
    for i in range(frames):
        fallen = motion_blur(flakes, radius, sigma, i * 4 - 150)
        yield whitened + fallen + np.rot90(fallen, 2)


def _brightness(pixels: np.ndarray, side: int, level: Any, rng: np.random.Generator) -> Frames:
    image = _unit(_center(pixels, side))
    for i in range(level[1]):
        yield brighten(image, (i - level[1] // 2) * level[0])


def _translate(pixels: np.ndarray, side: int, level: Any, rng: np.random.Generator) -> Frames:
    picture = Image.fromarray(pixels)
    for shift in range(level[0], level[0] + level[1]):
        yield np.asarray(picture.transform(picture.size, Image.Transform.AFFINE, (1, 0, -shift, 0, 1, 0)))


def _rotate(pixels: np.ndarray, side: int, level: Any, rng: np.random.Generator) -> Frames:
    for i in range(level[1]):
        yield np.asarray(_affine(pixels, (i - level[1] // 2) * level[0], 1))


def _tilt(pixels: np.ndarray, side: int, level: Any, rng: np.random.Generator) -> Frames:
    picture, wide = Image.fromarray(pixels), pixels.shape[0]
    for i in range(level[1]):
        seen = _tilted(wide, math.radians((i - level[1] // 2) * level[0]))
        yield np.asarray(picture.transform(picture.size, Image.Transform.PERSPECTIVE, seen, Image.Resampling.BILINEAR))


def _scale(pixels: np.ndarray, side: int, level: Any, rng: np.random.Generator) -> Frames:
    first, more, frames = level
    for i in range(frames):
        yield np.asarray(_affine(pixels, 0, first + more * i))


MAKERS: dict[str, Callable[[np.ndarray, int, Any, np.random.Generator], Frames]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "brightness": _brightness,
    "translate": _translate,
    "rotate": _rotate,
    "tilt": _tilt,
    "scale": _scale,
}


def _affine(pixels: np.ndarray, degrees: float, factor: float) -> Image.Image:
    """Rotated clockwise and enlarged about the center, bilinear, black beyond the border."""
    picture, middle = Image.fromarray(pixels), pixels.shape[0] / 2
    cos, sin = (turn(math.radians(degrees)) / factor for turn in (math.cos, math.sin))
    matrix = (cos, sin, middle * (1 - cos - sin), -sin, cos, middle * (1 + sin - cos))
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def _tilted(wide: int, angle: float) -> tuple[float, ...]:
    """Where each pixel of a picture turned by `angle` about both axes of its plane comes from: Pillow's 8 coefficients."""
    distance, cos, sin = math.hypot(wide, wide), math.cos(angle), math.sin(angle)
    flat = np.array([[1, 0, -wide / 2], [0, 1, -wide / 2], [0, 0, 1], [0, 0, 1]])
    about_x = np.array([[1, 0, 0, 0], [0, cos, -sin, 0], [0, sin, cos, 0], [0, 0, 0, 1]])
    about_y = np.array([[cos, 0, -sin, 0], [0, 1, 0, 0], [sin, 0, cos, 0], [0, 0, 0, 1]])
    away = np.eye(4)
    away[2, 3] = distance
    seen = np.array([[distance, 0, wide / 2, 0], [0, distance, wide / 2, 0], [0, 0, 1, 0]])
    back = np.linalg.inv(seen @ away @ about_x @ about_y @ flat)
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # Pillow counts from the corner of a pixel, not its center
    back = half @ back @ np.linalg.inv(half)
    return tuple((back / back[2, 2]).ravel()[:8].tolist())


def _center(image: np.ndarray, side: int) -> np.ndarray:
    first = (image.shape[0] - side) // 2
    return image[first : first + side, first : first + side]


def _unit(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / 255


def _bytes(image: np.ndarray) -> np.ndarray:
    """Bytes as they are; others cut off, as the benchmark does."""
    return np.ascontiguousarray(image) if image.dtype == np.uint8 else (np.clip(image, 0, 1) * 255).astype(np.uint8)
