"""Sequences: as many frames as published, seeded, moving as they are named."""

from itertools import pairwise

import numpy as np
import pytest

from models.corruptions.apply import noise_of
from models.perturbation_levels import LEVELS, SEQUENCES, num_frames
from models.perturbations import sequence
from tests.photographs import patches

STARTS_CLEAN = ("gaussian_noise", "shot_noise", "zoom_blur")
STILL_FRAME = {"brightness": 15, "rotate": 15}  # in the middle of a sequence nothing is changed


def photo(side: int) -> np.ndarray:
    return np.asarray(patches(96)[3].resize((side, side)))


def frames_of(kind: str, wide: int, side: int, table: str, key: str = "a") -> list[np.ndarray]:
    return sequence(photo(wide), side, kind, noise_of(0, kind, 0, key), table)


@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize(("table", "side", "wide"), [("cifar", 32, 32), ("cifar", 28, 32), ("imagenet", 224, 256)])
def test_frames_are_as_many_as_published_and_change_little_by_little(
    kind: str, table: str, side: int, wide: int
) -> None:
    frames = frames_of(kind, wide, side, table)
    assert len(frames) == num_frames(kind, table)
    assert {(frame.shape, frame.dtype) for frame in frames} == {((side, side, 3), np.dtype(np.uint8))}
    steps = [np.abs(b.astype(int) - a).mean() for a, b in pairwise(frames)]
    assert max(steps) < 40
    assert sum(step > 0 for step in steps) >= len(steps) // 2


@pytest.mark.parametrize("kind", SEQUENCES)
def test_a_sequence_belongs_to_its_image(kind: str) -> None:
    first, again = (np.stack(frames_of(kind, 32, 32, "cifar")) for _ in range(2))
    other = np.stack(frames_of(kind, 32, 32, "cifar", "b"))
    assert (first == again).all()
    assert (first == other).all() == (kind not in ("gaussian_noise", "shot_noise", "snow"))


@pytest.mark.parametrize("kind", STARTS_CLEAN)
def test_noise_is_compared_with_a_clean_first_frame(kind: str) -> None:
    center = photo(36)[2:-2, 2:-2]
    assert (frames_of(kind, 36, 32, "cifar")[0] == center).all()


@pytest.mark.parametrize(("kind", "place"), STILL_FRAME.items())
def test_the_middle_of_a_turn_is_the_image_itself(kind: str, place: int) -> None:
    middle = frames_of(kind, 32, 32, "cifar")[place]
    assert np.abs(middle.astype(int) - photo(32)).max() <= 1


def test_translation_moves_by_a_pixel_a_frame_and_shows_what_lies_beside() -> None:
    wide = photo(256)
    frames = frames_of("translate", 256, 224, "imagenet")
    for number in (4, 20, 36):
        shift = number - 20
        assert (frames[number] == wide[16:240, 16 - shift : 240 - shift]).all()


def test_without_a_margin_the_border_is_black() -> None:
    frames = frames_of("translate", 32, 32, "cifar")
    assert (frames[0][:, -7:] == 0).all()
    assert (frames[-1][:, :8] == 0).all()


def test_a_quarter_turn_is_numpys() -> None:
    """The published steps are degrees; the same function turns by 90."""
    from models.perturbations import _affine

    turned = np.asarray(_affine(photo(32), 90, 1)).astype(int)
    assert np.abs(turned - np.rot90(photo(32), -1)).max() <= 1


def test_a_tilt_of_zero_is_the_published_matrix() -> None:
    """The plane lies at distance 1 from where it turns, f = sqrt(2) x 32 from the eye: it is seen f / (f + 1) as large."""
    from models.perturbations import _tilted

    a, b, c, d, e, f, g, h = _tilted(32, 0.0)
    factor = 1 + 1 / np.hypot(32, 32)
    assert (a, e) == pytest.approx((factor, factor))
    assert (b, d, g, h) == pytest.approx((0, 0, 0, 0))
    assert (c, f) == pytest.approx((16.5 - factor * 16.5, 16.5 - factor * 16.5))


def test_a_tilt_moves_opposite_corners_apart() -> None:
    """The corner that comes nearer is seen larger: more of the picture's left upper corner, less of the right lower one."""
    from models.perturbations import _tilted

    a, b, c, d, e, f, g, h = _tilted(32, np.radians(10))
    source = [
        ((a * x + b * y + c) / (g * x + h * y + 1), (d * x + e * y + f) / (g * x + h * y + 1))
        for x, y in ((1, 1), (31, 31))
    ]
    spans = [abs(x - 16) + abs(y - 16) for x, y in source]
    assert spans[0] != pytest.approx(spans[1], rel=0.01)


def test_scaling_keeps_the_center_and_both_tables_have_all_kinds() -> None:
    frames = frames_of("scale", 32, 32, "cifar")
    assert (frames[15] == photo(32)).all(), ".7 + 15 x .02 is 1"
    assert (frames[0][0] == 0).all()
    assert all(tuple(levels) == SEQUENCES for levels in LEVELS.values())
