"""What the tests of the noise share: pictures, and the operations and views with an explicit seed."""

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from models.configs import NoiseConfig
from models.noise import OPS, noised_view

GRAY = (128, 128, 128)
PLAIN = NoiseConfig(crop="none", flip=False, num_ops=0)  # changes nothing: a test switches on what it is about
SHIFTED = (
    "Rotate",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Cutout",
    "SolarizeAdd",
)  # zero argument at level 0


def picture(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    """A smooth, asymmetric picture with grain: no two rows or columns alike, no value 128 over a whole pixel."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    ramps = np.stack(
        [columns * 150 / width, rows * 150 / height, (rows + 2 * columns) * 50 / (height + width)], axis=-1
    )
    pixels = (ramps + rng.integers(20, 90, (height, width, 3))).astype(np.uint8)
    pixels[..., 0][(pixels == 128).all(axis=-1)] = 127
    return Image.fromarray(pixels)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def same(first: Image.Image, second: Image.Image) -> bool:
    return first.size == second.size and np.array_equal(np.asarray(first), np.asarray(second))


def apply(name: str, image: Image.Image, magnitude: float, seed: int = 0, **settings: float) -> Image.Image:
    return OPS[name](image, magnitude, NoiseConfig(**settings), np.random.default_rng(seed))


def view(image: Image.Image, settings: NoiseConfig, seed: int = 0, image_size: int = 32) -> np.ndarray:
    return noised_view(image, settings, image_size, np.random.default_rng(seed))


def signs_seen(name: str, image: Image.Image, magnitude: float, **settings: float) -> list[Image.Image]:
    """The different results over 20 seeds."""
    results = [apply(name, image, magnitude, seed, **settings) for seed in range(20)]
    return list({result.tobytes(): result for result in results}.values())


random_pictures = st.builds(
    lambda width, height, low, high, seed: Image.fromarray(
        np.random.default_rng(seed).integers(min(low, high), max(low, high) + 1, (height, width, 3)).astype(np.uint8)
    ),
    st.integers(8, 40), st.integers(8, 40), st.integers(0, 255), st.integers(0, 255), st.integers(0, 2**32),
)  # fmt: skip
