"""Corruptions: seeded, of the published strength, and their arithmetic held against scipy's and matplotlib's own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from scipy import ndimage

from models.corruptions import fields
from models.corruptions.apply import corrupt, noise_of
from models.corruptions.kinds import KINDS, brighten
from models.corruptions.levels import KIND_NAMES, LEVELS, SEVERITIES, TABLES, table_for
from tests.photographs import patches

SEEDLESS = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
BLURS = ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform", "pixelate")


def photo(side: int) -> np.ndarray:
    """A square of a real photograph."""
    return np.asarray(patches(96)[3].resize((side, side)))


def corrupted(pixels: np.ndarray, kind: str, severity: int, table: str, key: str = "a", seed: int = 0) -> np.ndarray:
    return corrupt(pixels, kind, severity, noise_of(seed, kind, severity, key), table)


def unit(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / 255


@pytest.mark.parametrize("kind", KIND_NAMES)
@pytest.mark.parametrize(("table", "side"), [("cifar", 32), ("cifar", 28), ("imagenet", 224)])
def test_each_kind_gives_an_image_of_the_same_form_that_severity_changes_more(kind: str, table: str, side: int) -> None:
    pixels = photo(side)
    before = pixels.copy()
    made = [corrupted(pixels, kind, severity, table) for severity in SEVERITIES]
    assert (pixels == before).all(), "its input was changed"
    for image in made:
        assert (image.shape, image.dtype) == (pixels.shape, np.uint8)
    distances = [np.abs(image.astype(int) - pixels).mean() for image in made]
    assert 0 < distances[0] < 110
    if kind not in ("elastic_transform", "frost"):  # levels that trade large waves for small ones, light for ice
        assert distances[-1] > distances[0]


def test_thicker_frost_hides_more_of_the_image() -> None:
    pixels = photo(224)
    seen = [corrupted(pixels, "frost", severity, "imagenet") for severity in (1, 3, 5)]
    likeness = [np.corrcoef(pixels.ravel(), image.ravel())[0, 1] for image in seen]
    assert likeness[0] > likeness[1] > likeness[2] > 0.2


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_noise_belongs_to_seed_and_image(kind: str) -> None:
    pixels = photo(32)
    again, other_key, other_seed = (
        corrupted(pixels, kind, 5, "cifar", key, seed) for key, seed in (("a", 0), ("b", 0), ("a", 1))
    )
    first = corrupted(pixels, kind, 5, "cifar")
    assert (first == again).all()
    assert ((first == other_key).all(), (first == other_seed).all()) == (kind in SEEDLESS, kind in SEEDLESS)


@given(st.sampled_from(BLURS), st.sampled_from(SEVERITIES), st.integers(0, 255))
def test_what_only_moves_pixels_leaves_a_plain_image_plain(kind: str, severity: int, value: int) -> None:
    plain = np.full((32, 32, 3), value, np.uint8)
    made = corrupted(plain, kind, severity, "cifar")
    assert np.abs(made.astype(int) - value).max() <= 2, "two bytes were cut off on the way"


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("table", TABLES)
def test_noise_has_the_published_strength(table: str, severity: int) -> None:
    gray = np.full((224, 224, 3), 128, np.uint8)
    levels = {kind: LEVELS[table][kind][severity - 1] for kind in KIND_NAMES}
    rng = np.random.default_rng(0)
    gaussian = KINDS["gaussian_noise"](gray, levels["gaussian_noise"], rng)
    assert gaussian.std() == pytest.approx(levels["gaussian_noise"], rel=0.02)
    shot = KINDS["shot_noise"](gray, levels["shot_noise"], rng)
    assert shot.mean() == pytest.approx(128 / 255, rel=0.02)
    assert shot.var() == pytest.approx(128 / 255 / levels["shot_noise"], rel=0.04), "a Poisson variable's is its mean"
    impulse = KINDS["impulse_noise"](gray, levels["impulse_noise"], rng)
    for value in (0, 255):
        assert (impulse == value).mean() == pytest.approx(levels["impulse_noise"] / 2, rel=0.1)


def test_contrast_by_hand() -> None:
    """ImageNet-C's severity 1 keeps .4 of the distance from the mean: 100 and 200 become 130 and 170."""
    image = np.full((4, 4, 3), 100, np.uint8)
    image[:2] = 200
    made = corrupted(image, "contrast", 1, "imagenet")
    assert (made[:2] // 2 == 85).all() or (made[:2] == 169).all()
    assert np.abs(made[2:].astype(int) - 130).max() <= 1


@given(st.integers(0, 2**32 - 1), st.floats(0, 0.5))
def test_brightness_raises_the_value_and_keeps_hue_and_saturation(seed: int, added: float) -> None:
    image = np.random.default_rng(seed).random((4, 4, 3)).astype(np.float32)
    image[0, 0] = 0
    hsv = rgb_to_hsv(image)
    hsv[..., 2] = np.clip(hsv[..., 2] + added, 0, 1)
    assert np.abs(brighten(image, added) - hsv_to_rgb(hsv)).max() < 1e-5


@pytest.mark.parametrize("factor", [1.0, 1.01, 1.11, 1.25, 2.25, 4.5])
@pytest.mark.parametrize("side", [28, 32, 224])
def test_zooming_is_scipys_zoom_of_the_center(factor: float, side: int) -> None:
    image = unit(photo(side))
    kept = int(np.ceil(side / factor))
    first = (side - kept) // 2
    large = ndimage.zoom(image[first : first + kept, first : first + kept], (factor, factor, 1), order=1)
    trim = (large.shape[0] - side) // 2
    expected = large[trim : trim + side, trim : trim + side]
    if expected.shape == image.shape:  # rounding may leave the reference a pixel short
        assert np.abs(fields.zoom_center(image, factor) - expected).max() < 1e-4


@pytest.mark.parametrize(("repeat_border", "mode"), [(True, "reflect"), (False, "mirror")])
def test_sampling_between_pixels_is_scipys(repeat_border: bool, mode: str) -> None:
    image = unit(photo(32))
    places = np.random.default_rng(0).uniform(-40, 70, (2, 32, 32))
    made = fields._sample(image, *places, repeat_border=repeat_border)
    for channel in range(3):
        expected = ndimage.map_coordinates(image[..., channel], places, order=1, mode=mode)
        assert np.abs(made[..., channel] - expected).max() < 1e-4


def test_a_blur_of_a_field_by_matrices_is_scipys_filter() -> None:
    field = np.random.default_rng(0).uniform(-1, 1, (32, 32))
    for sigma in (0.4, 3.0, 22.4):
        smooth = fields._blur_matrix(32, sigma)
        expected = ndimage.gaussian_filter(field, sigma, mode="reflect", truncate=fields.ELASTIC_REACH)
        assert np.abs(smooth @ field @ smooth.T - expected).max() < 1e-10


@pytest.mark.parametrize(("radius", "rim"), [(1.5, 0.1), (3, 0.1), (8, 0.5), (10, 0.5)])
def test_a_disk_by_fourier_transforms_is_the_plain_sum(radius: float, rim: float) -> None:
    kernel, image = fields.disk(radius, rim), unit(photo(64))
    assert kernel.sum() == pytest.approx(1, abs=0.015)
    expected = ndimage.correlate(image, kernel[..., None], mode="mirror")
    assert np.abs(fields.convolve(image, kernel) - expected).max() < 1e-5


@pytest.mark.parametrize(("angle", "step"), [(0, (0, -1)), (90, (-1, 0)), (-90, (1, 0))])
def test_motion_draws_a_point_out_along_its_angle(angle: float, step: tuple[int, int]) -> None:
    point = np.zeros((41, 41, 1), np.float32)
    point[20, 20] = 1
    made = fields.motion_blur(point, 10, 3, angle)[..., 0]
    weights = np.exp(-0.5 * (np.arange(20) / 3) ** 2)
    drawn = [made[20 + i * step[0], 20 + i * step[1]] for i in range(20)]
    assert drawn == pytest.approx(list(weights / weights.sum()), abs=1e-5)
    assert made.sum() == pytest.approx(1, abs=1e-5)


def test_glass_takes_colors_from_near_and_leaves_the_rim() -> None:
    """Each row has a color of its own: one round takes none from more than `reach` rows away."""
    rows = np.repeat(np.arange(40, dtype=np.uint8)[:, None, None], 40, axis=1).repeat(3, axis=2)
    made = fields.shuffle_near(rows, 3, 1, np.random.default_rng(0))
    distance = np.abs(made[..., 0].astype(int) - rows[..., 0])
    assert distance[:4].max() == distance[-2:].max() == 0
    assert distance.max() > 0
    assert np.median(distance[4:38, 4:38]) <= 3


def test_clouds_fill_their_range_and_rough_ones_have_more_detail() -> None:
    smooth, rough = (fields.plasma(224, decay, np.random.default_rng(0)) for decay in (3.0, 1.4))
    for field in (smooth, rough):
        assert field.shape == (224, 224)
        assert 0 <= field.min() < 0.2
        assert 0.8 < field.max() <= 1
    assert np.abs(np.diff(rough)).mean() > 2 * np.abs(np.diff(smooth)).mean()


def test_both_tables_have_all_kinds_at_all_severities() -> None:
    assert tuple(KINDS) == KIND_NAMES
    for levels in LEVELS.values():
        assert {kind: len(own) for kind, own in levels.items()} == dict.fromkeys(KIND_NAMES, len(SEVERITIES))
    assert (table_for(32), table_for(64), table_for(224)) == ("cifar", "cifar", "imagenet")
