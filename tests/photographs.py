"""The two photographs that scikit-learn carries, whole and cut into patches: real detail for the tests of the leak guard."""

from functools import cache

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

NAMES = ("china.jpg", "flower.jpg")


@cache
def photograph(name: str) -> Image.Image:
    """One of NAMES, 640 x 427, RGB."""
    return Image.fromarray(load_sample_image(name))


@cache
def patches(side: int, name: str = NAMES[0]) -> list[Image.Image]:
    """The photograph cut into squares, without those that show hardly anything (plain sky, blur)."""
    photo = photograph(name)
    corners = [(x, y) for y in range(0, photo.height - side + 1, side) for x in range(0, photo.width - side + 1, side)]
    cut = [photo.crop((x, y, x + side, y + side)) for x, y in corners]
    return [patch for patch in cut if np.asarray(patch.convert("L")).std() > 20]
