import numpy as np
import pytest
from PIL import Image

from storage.alignment import align, box_maps, detail, likeness, look, plausible
from storage.phash import SIDE, gray_thumbnail
from tests.photographs import patches

WHOLE = np.array([[0.0, 0.0, 1.0, 1.0]])


def thumbnails(images: list[Image.Image]) -> np.ndarray:
    return np.stack([gray_thumbnail(image) for image in images])


def cropped(images: list[Image.Image], box: tuple[float, float, float, float]) -> np.ndarray:
    return thumbnails([image.crop(tuple(round(edge * image.width) for edge in box)) for image in images])


def test_the_whole_box_is_the_picture_itself() -> None:
    pictures = thumbnails(patches(64))
    seen = look(pictures, box_maps(np.repeat(WHOLE, len(pictures), axis=0)))
    assert np.abs(seen - pictures).max() < 1e-3


def test_a_box_shows_that_part() -> None:
    ramp = np.tile(np.arange(SIDE, dtype=np.uint8) * 8, (1, SIDE, 1))
    seen = look(ramp, box_maps(np.array([[0.25, 0.0, 0.75, 1.0]])))
    assert np.allclose(np.diff(seen[0], axis=1), 4, atol=1e-3)
    assert seen[0].mean() == pytest.approx(ramp.mean(), abs=1e-3)


@pytest.mark.parametrize("box", [(0, 0, 0.9375, 0.9375), (0.0625, 0.03125, 1, 0.96875), (0.125, 0.125, 0.9375, 1)])
def test_alignment_finds_the_crop_from_a_guess_that_is_a_pixel_off(box: tuple[float, float, float, float]) -> None:
    images = patches(64)
    fixed, whole = cropped(images, box), thumbnails(images)
    guess = np.repeat(np.add([box], [[0.03, -0.03, 0.03, -0.03]]), len(images), axis=0)
    moved, maps = align(fixed, whole, box_maps(guess))
    before, after = likeness(fixed, look(whole, box_maps(guess))), likeness(fixed, moved)
    assert np.median(after) > 0.95 > np.median(before)
    assert np.median(np.abs(maps - box_maps(np.array([box])))) < 0.3, "pixels"
    assert plausible(maps).mean() > 0.9


def test_likeness_ignores_brightness_and_contrast() -> None:
    pictures = thumbnails(patches(64)).astype(np.float32)
    assert likeness(pictures, 0.5 * pictures + 40).min() > 0.9999
    assert likeness(pictures, 255 - pictures).max() < 0


def test_other_parts_of_the_same_photograph_are_not_alike() -> None:
    pictures = thumbnails(patches(64))
    assert likeness(pictures, np.roll(pictures, 1, axis=0)).max() < 0.7


def test_skies_have_no_detail_and_photographs_do() -> None:
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    skies = np.stack([np.full_like(x, 255), 3 * x + 2 * y, 200 - (x - 9) ** 2 // 8 - y])
    assert detail(skies).max() < 0.5
    assert detail(thumbnails(patches(64))).min() > 5


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({(0, 2): 0.05, (1, 1): -0.05}, True),  # turned by 3 degrees
        ({(0, 2): 0.2, (1, 1): -0.2}, False),  # by 11
        ({(0, 1): -0.45}, False),  # half of the width
        ({(0, 0): 0.15}, False),  # an edge outside of the picture
        ({(0, 1): -2.0}, False),  # mirrored
    ],
)
def test_only_crops_and_slight_turns_are_plausible(change: dict[tuple[int, int], float], expected: bool) -> None:
    maps = box_maps(WHOLE)
    for (row, column), by in change.items():
        maps[0, row, column] += by * SIDE
    assert plausible(maps).tolist() == [expected]


def test_pictures_are_aligned_alike_alone_and_among_others() -> None:
    fixed = cropped(patches(64), (0, 0, 0.9375, 1))
    whole, maps = thumbnails(patches(64)), box_maps(np.repeat(WHOLE, len(fixed), axis=0))
    together = align(fixed, whole, maps)[0]
    alone = np.concatenate([align(fixed[[n]], whole[[n]], maps[[n]])[0] for n in range(len(fixed))])
    assert np.array_equal(together, alone)
