"""Claims about the noise operations, against Pillow and the released code's arguments."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from models import noise as subject
from models.configs import PAPER_OPS, RELEASED_OPS
from models.noise import OPS, cover_patch
from tests.models.noise_pictures import (
    GRAY,
    PLAIN,
    SHIFTED,
    apply,
    picture,
    pixels,
    random_pictures,
    same,
    signs_seen,
    view,
)

# Levels to arguments


@pytest.mark.parametrize(
    ("magnitude", "degrees", "shear", "translate", "factor", "bits", "threshold", "addition", "half_side"),
    [
        (5, 15.0, 0.15, 50.0, 1.0, 2, 128, 55, 20),
        (9, 27.0, 0.27, 90.0, 1.72, 3, 230, 99, 36),
        (27, 81.0, 0.81, 270.0, 4.96, 10, 691, 297, 108),
    ],
)
def test_levels_give_the_released_codes_arguments_also_past_10(
    magnitude, degrees, shear, translate, factor, bits, threshold, addition, half_side
):
    assert subject.rotate_degrees(magnitude) == pytest.approx(degrees)
    assert subject.shear_factor(magnitude) == pytest.approx(shear)
    assert subject.translate_pixels(magnitude, 100) == pytest.approx(translate)
    assert subject.enhance_factor(magnitude) == pytest.approx(factor)
    assert subject.posterize_bits(magnitude) == bits
    assert subject.solarize_threshold(magnitude) == threshold
    assert subject.solarize_addition(magnitude) == addition
    assert subject.cutout_half_side(magnitude, 40) == half_side


def test_svhn_recipe_moves_and_covers_2_pixels_at_magnitude_5():
    assert subject.translate_pixels(5, 4) == 2
    assert subject.cutout_half_side(5, 4) == 2


@pytest.mark.parametrize("magnitude", [20, 22.5, 27, 30])
def test_posterize_changes_nothing_from_magnitude_20_on(magnitude):
    assert same(apply("Posterize", picture(), magnitude), picture())


@pytest.mark.parametrize("magnitude", [10, 15, 27])
def test_solarize_changes_nothing_from_magnitude_10_on(magnitude):
    white = Image.new("RGB", (16, 16), (255, 255, 255))
    assert same(apply("Solarize", white, magnitude), white)
    assert not same(apply("Solarize", white, 9.9), white)


@pytest.mark.parametrize("magnitude", [0, 5, 10, 12.5, 17.5, 19.9])
def test_posterize_keeps_the_leading_bits_and_at_least_one(magnitude):
    bits = max(1, int(magnitude / 10 * 4))
    assert same(apply("Posterize", picture(), magnitude), ImageOps.posterize(picture(), bits))


@pytest.mark.parametrize("magnitude", [0, 5, 9])
def test_solarize_inverts_values_at_and_above_its_threshold(magnitude):
    before, after = pixels(picture()), pixels(apply("Solarize", picture(), magnitude))
    assert np.array_equal(after, np.where(before < int(magnitude * 25.6), before, 255 - before))


@pytest.mark.parametrize(("magnitude", "addition"), [(0, 0), (5, 55), (9, 99), (27, 297)])
def test_solarize_add_brightens_values_below_128_only_and_stops_at_255(magnitude, addition):
    ramp = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2))
    after = pixels(apply("SolarizeAdd", ramp, magnitude))[0, :, 0]
    assert np.array_equal(after, [min(255, value + addition) if value < 128 else value for value in range(256)])


@pytest.mark.parametrize("name", ["Color", "Contrast", "Brightness", "Sharpness"])
@pytest.mark.parametrize(("magnitude", "factor"), [(0, 0.1), (5, 1.0), (9, 1.72), (27, 4.96)])
def test_enhancements_are_pillows_at_the_levels_factor(name, magnitude, factor):
    assert same(apply(name, picture(), magnitude), getattr(ImageEnhance, name)(picture()).enhance(factor))


# Operations


def test_the_table_holds_the_papers_14_and_the_released_16_operations():
    assert set(OPS) == set(RELEASED_OPS)
    assert len(OPS) == 16
    assert len(PAPER_OPS) == 14


@given(image=random_pictures, name=st.sampled_from(RELEASED_OPS), magnitude=st.floats(0, 30), seed=st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_every_operation_keeps_size_and_mode_and_leaves_its_input(image, name, magnitude, seed):
    before = image.tobytes()
    after = apply(name, image, magnitude, seed)
    assert (after.size, after.mode) == (image.size, "RGB")
    assert image.tobytes() == before


@pytest.mark.parametrize("name", SHIFTED)
def test_magnitude_zero_leaves_geometry_cutout_and_solarize_add_without_effect(name):
    assert all(same(result, picture()) for result in signs_seen(name, picture(), 0))


@given(image=random_pictures)
@settings(max_examples=100, deadline=None)
def test_auto_contrast_equalize_and_invert_equal_pillows(image):
    assert same(apply("AutoContrast", image, 9), ImageOps.autocontrast(image))
    assert same(apply("Equalize", image, 9), ImageOps.equalize(image))
    assert same(apply("Invert", image, 9), ImageOps.invert(image))


@pytest.mark.parametrize("name", ["AutoContrast", "Equalize"])
def test_an_image_of_one_color_stays_as_it_is(name):
    image = Image.new("RGB", (20, 20), (7, 0, 255))
    assert same(apply(name, image, 9), image)


@pytest.mark.parametrize(("name", "axis"), [("TranslateX", 1), ("TranslateY", 0)])
@pytest.mark.parametrize(("magnitude", "translate_px", "shift"), [(5, 4, 2), (10, 7, 7), (27, 10, 27)])
def test_translate_moves_by_the_exact_pixel_count_both_ways_and_fills_128(name, axis, magnitude, translate_px, shift):
    before = pixels(picture())
    results = signs_seen(name, picture(), magnitude, translate_px=translate_px)
    gap = np.full_like(before.take(range(shift), axis), 128)
    backward = np.concatenate([before.take(range(shift, 32), axis), gap], axis)
    forward = np.concatenate([gap, before.take(range(32 - shift), axis)], axis)
    assert {result.tobytes() for result in results} == {
        expected.astype(np.uint8).tobytes() for expected in (backward, forward)
    }


@pytest.mark.parametrize("name", ["TranslateX", "TranslateY"])
def test_translate_past_the_border_leaves_only_fill(name):
    assert apply(name, picture(224, 224), 27).getcolors() == [(224 * 224, GRAY)]


@pytest.mark.parametrize(("name", "axis"), [("ShearX", 1), ("ShearY", 0)])
@pytest.mark.parametrize(("line", "shift"), [(0, 0), (8, 2), (10, 3), (12, 4), (31, 9)])  # 0.3 a line, to the nearest
def test_shear_at_magnitude_10_moves_each_line_by_three_tenths_of_its_number(name, axis, line, shift):
    before = pixels(picture()).swapaxes(0, 1 - axis)[line]
    results = signs_seen(name, picture(), 10)
    gap = np.full((shift, 3), 128)
    expected = {np.concatenate([before[shift:], gap]).tobytes(), np.concatenate([gap, before[: 32 - shift]]).tobytes()}
    assert len(results) == 2
    assert {pixels(result).swapaxes(0, 1 - axis)[line].tobytes() for result in results} == expected


def test_rotate_at_magnitude_30_turns_by_90_degrees_either_way():
    quarter_turns = {
        picture().transpose(turn).tobytes() for turn in (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270)
    }
    assert {result.tobytes() for result in signs_seen("Rotate", picture(), 30)} == quarter_turns


def test_geometry_is_nearest_so_that_it_makes_no_new_colors():
    image = picture()
    known = {color for _, color in image.getcolors(32 * 32)} | {GRAY}
    for name in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"):
        assert {color for _, color in apply(name, image, 7.3).getcolors(32 * 32)} <= known


def test_rotate_fills_the_corners_with_128():
    turned = apply("Rotate", picture(), 15)  # 45 degrees
    assert {turned.getpixel(corner) for corner in ((0, 0), (31, 0), (0, 31), (31, 31))} == {GRAY}


@given(half_side=st.integers(0, 40), seed=st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_a_patch_is_a_gray_square_around_a_pixel_cut_at_the_border(half_side, seed):
    image = Image.new("RGB", (20, 24))
    covered = pixels(cover_patch(image, half_side, np.random.default_rng(seed)))[..., 0] == 128
    candidates = []
    for row in range(24):
        for column in range(20):
            mask = np.zeros((24, 20), dtype=bool)
            mask[max(0, row - half_side) : row + half_side, max(0, column - half_side) : column + half_side] = True
            candidates.append(mask.tobytes())
    assert covered.tobytes() in candidates


@pytest.mark.parametrize(("magnitude", "half_side"), [(5, 3), (10, 6), (27, 16)])
def test_the_cutout_operation_covers_a_square_of_its_own_scale(magnitude, half_side):
    black = Image.new("RGB", (64, 64))
    areas = [apply("Cutout", black, magnitude, seed, cutout_px=6).getcolors() for seed in range(40)]
    assert max({color: count for count, color in area}[GRAY] for area in areas) == (2 * half_side) ** 2


def test_patches_are_centered_on_every_pixel_alike():
    hits = np.zeros((8, 8))
    rng = np.random.default_rng(0)
    for _ in range(6400):
        covered = pixels(cover_patch(Image.new("RGB", (8, 8)), 1, rng))[..., 0] == 128
        rows, columns = np.nonzero(covered)
        hits[rows.max(), columns.max()] += 1  # half-side 1 covers the center pixel and its upper left neighbors
    assert hits.min() > 60  # 100 expected, standard deviation 10
    assert hits.max() < 140


def test_magnitude_27_is_not_clipped_at_10():
    for name in (
        "Rotate",
        "ShearX",
        "ShearY",
        "TranslateX",
        "TranslateY",
        "Brightness",
        "Color",
        "Contrast",
        "Sharpness",
    ):
        at_10, at_27 = (apply(name, picture(), magnitude, translate_px=10) for magnitude in (10, 27))
        assert not same(at_10, at_27), name
    settings = PLAIN.model_copy(update={"num_ops": 1, "ops": ("TranslateY",), "translate_px": 10.0, "magnitude": 27.0})
    gray_rows = (view(picture(), settings) == 128).all(axis=(1, 2))
    assert np.count_nonzero(gray_rows) == 27
