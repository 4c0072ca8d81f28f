"""Claims about the clean and the noised view, against timm, torchvision and Pillow where those are the reference.

Run: `PYTHONPATH=. .venv/bin/python -m pytest tests/models/test_noise.py -q`
"""

import math
import random
import subprocess
import sys

import numpy as np
import pytest
import timm.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as reference

from models import noise as subject
from models.configs import PAPER_OPS, RELEASED_OPS, NoiseConfig
from models.noise import OPS, clean_view, cover_patch, noised_view, random_resized_box

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


# The noised view


def test_a_drawn_operation_always_runs():
    settings = PLAIN.model_copy(update={"num_ops": 1, "ops": ("Invert",)})
    inverted = 255 - clean_view(picture(), 32, 1.0)
    assert all(np.array_equal(view(picture(), settings, seed), inverted) for seed in range(200))


def test_operations_are_drawn_uniformly_with_replacement():
    settings = PLAIN.model_copy(update={"num_ops": 2, "ops": ("Invert", "TranslateX"), "magnitude": 27})
    gray, clean = np.full((32, 32, 3), 128), clean_view(picture(), 32, 1.0)
    outcomes = {"twice Invert": clean, "Invert first": gray, "TranslateX first": 255 - gray}
    counts = dict.fromkeys(outcomes, 0)
    for seed in range(800):  # TranslateX by 270 px leaves only fill, so an outcome tells what was drawn last
        result = view(picture(), settings, seed)
        counts[next(name for name, expected in outcomes.items() if np.array_equal(result, expected))] += 1
    # of four equally likely pairs: II; IT and TT both end gray; TI is gray inverted (127)
    for name, expected in (("twice Invert", 200), ("Invert first", 400), ("TranslateX first", 200)):
        assert abs(counts[name] - expected) < 60, (name, counts)  # standard deviations 12 and 14


def test_every_listed_operation_is_drawn_and_no_other(monkeypatch):
    drawn = []
    for name in RELEASED_OPS:
        monkeypatch.setitem(OPS, name, lambda image, _magnitude, _noise, _rng, name=name: drawn.append(name) or image)
    rng = np.random.default_rng(0)
    for _ in range(500):
        noised_view(picture(), NoiseConfig(num_ops=3, ops=PAPER_OPS), 32, rng)
    assert len(drawn) == 1500
    assert set(drawn) == set(PAPER_OPS)
    assert min(drawn.count(name) for name in PAPER_OPS) > 60  # 107 expected, standard deviation 10


noise_settings = st.builds(
    NoiseConfig,
    crop=st.sampled_from(["none", "pad", "resized"]),
    pad_px=st.integers(0, 40),
    flip=st.booleans(),
    num_ops=st.integers(0, 4),
    magnitude=st.floats(0, 30),
    ops=st.just(RELEASED_OPS),
    patch_px=st.integers(0, 12),
)


@given(image=random_pictures, settings_=noise_settings, seed=st.integers(0, 2**63), size=st.integers(8, 48))
@settings(max_examples=150, deadline=None)
def test_a_view_is_a_pure_function_of_image_settings_and_generator(image, settings_, seed, size):
    before = image.tobytes()
    random.seed(1)
    np.random.seed(1)
    first = noised_view(image, settings_, size, np.random.default_rng(seed))
    random.seed(2)
    np.random.seed(2)
    states = random.getstate(), np.random.get_state()
    second = noised_view(image, settings_, size, np.random.default_rng(seed))
    assert np.array_equal(first, second)
    assert random.getstate() == states[0]
    assert all(np.array_equal(now, then) for now, then in zip(np.random.get_state(), states[1], strict=True))
    assert (first.shape, first.dtype, first.flags.writeable) == ((size, size, 3), np.uint8, True)
    assert image.tobytes() == before


def test_different_generators_give_different_views():
    views = {view(picture(), NoiseConfig(translate_px=4), seed).tobytes() for seed in range(50)}
    assert len(views) == 50


def test_flip_false_never_mirrors_and_flip_true_mirrors_half():
    clean = clean_view(picture(), 32, 1.0)
    assert all(np.array_equal(view(picture(), PLAIN, seed), clean) for seed in range(100))
    flipping = PLAIN.model_copy(update={"flip": True})
    results = [view(picture(), flipping, seed) for seed in range(400)]
    mirrored = sum(np.array_equal(result, clean[:, ::-1]) for result in results)
    kept = sum(np.array_equal(result, clean) for result in results)
    assert mirrored + kept == 400
    assert 150 < mirrored < 250  # standard deviation 10


def test_the_fixed_cutout_comes_last():
    settings = PLAIN.model_copy(update={"num_ops": 1, "ops": ("Invert",), "patch_px": 8})
    result, inverted = view(picture(), settings, seed=3), 255 - clean_view(picture(), 32, 1.0)
    covered = (result == 128).all(axis=-1)
    assert covered.any()
    assert np.array_equal(result[~covered], inverted[~covered])
    assert np.count_nonzero(covered) <= 16 * 16


def test_a_picture_that_is_not_rgb_is_refused_by_name_of_its_mode():
    gray = Image.new("L", (32, 32))
    with pytest.raises(ValueError, match=r"mode L.*decode_rgb"):
        clean_view(gray, 32, 1.0)
    with pytest.raises(ValueError, match=r"mode L.*decode_rgb"):
        view(gray, NoiseConfig())


# Crops


@pytest.mark.parametrize(("size", "image_size"), [((32, 32), 32), ((64, 48), 32), ((20, 90), 32)])
def test_crop_none_is_the_clean_view_without_margin(size, image_size):
    assert np.array_equal(view(picture(*size), PLAIN, 5, image_size), clean_view(picture(*size), image_size, 1.0))


@pytest.mark.parametrize("pad_px", [0, 4, 40])  # 40: wider than the picture, so the reflection folds back
def test_crop_pad_is_a_window_of_the_reflected_picture_and_reaches_every_offset(pad_px):
    settings = PLAIN.model_copy(update={"crop": "pad", "pad_px": pad_px})
    padded = np.pad(clean_view(picture(), 32, 1.0), ((pad_px, pad_px), (pad_px, pad_px), (0, 0)), mode="reflect")
    offsets = range(2 * pad_px + 1)
    windows = {padded[top : top + 32, left : left + 32].tobytes(): (top, left) for top in offsets for left in offsets}
    seen = [windows[view(picture(), settings, seed).tobytes()] for seed in range(600)]  # KeyError: no such window
    if pad_px == 4:
        assert set(seen) == set(windows.values())  # 81 offsets


@given(width=st.integers(1, 600), height=st.integers(1, 600), min_area=st.floats(0.01, 1), seed=st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_a_random_resized_box_lies_inside_and_keeps_area_and_aspect_or_is_the_center(width, height, min_area, seed):
    left, top, right, bottom = random_resized_box(width, height, min_area, np.random.default_rng(seed))
    box_width, box_height = right - left, bottom - top
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    centered = (left, top) == ((width - box_width) // 2, (height - box_height) // 2)
    rounding = 0.5 * (box_width + box_height) + 0.25  # both sides were rounded to whole pixels
    in_area = min_area * width * height <= box_width * box_height + rounding
    in_aspect = (box_width - 0.5) / (box_height + 0.5) <= 4 / 3 and (box_height - 0.5) / (box_width + 0.5) <= 4 / 3
    assert in_aspect
    assert in_area or centered


class NeverFits:
    """A generator whose draws are always the largest: the whole area at aspect 4/3."""

    def random(self) -> float:
        return 1 - 2**-53


@pytest.mark.parametrize(("width", "height"), [(100, 100), (100, 400), (401, 100), (90, 110)])
def test_when_no_draw_fits_the_box_is_torchvisions_center_fallback(width, height):
    left, top, right, bottom = random_resized_box(width, height, 1.0, NeverFits())
    expected = RandomResizedCrop.get_params(Image.new("RGB", (width, height)), [2.0, 2.0], [3 / 4, 4 / 3])
    assert (top, left, bottom - top, right - left) == expected


def test_random_resized_boxes_are_spread_as_torchvisions():
    rng = np.random.default_rng(0)
    boxes = np.array([random_resized_box(500, 400, 0.08, rng) for _ in range(3000)])
    sides = boxes[:, 2:] - boxes[:, :2]
    image = Image.new("RGB", (500, 400))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(1000)])
    for ours, theirs, spread in (
        (sides.prod(axis=1) / 200_000, draws[:, 2] * draws[:, 3] / 200_000, 0.04),
        (np.log(sides[:, 0] / sides[:, 1]), np.log(draws[:, 3] / draws[:, 2]), 0.04),
        (boxes[:, 0] / 500, draws[:, 1] / 500, 0.04),
        (boxes[:, 1] / 400, draws[:, 0] / 400, 0.04),
    ):  # standard errors of the differences are below 0.01
        assert abs(ours.mean() - theirs.mean()) < spread
        assert abs(ours.std() - theirs.std()) < spread


def test_crop_resized_has_torchvisions_pixels_for_the_same_box():
    image = picture(120, 90)
    settings = PLAIN.model_copy(update={"crop": "resized"})
    for seed in range(20):
        left, top, right, bottom = random_resized_box(120, 90, 0.08, np.random.default_rng(seed))
        expected = reference.resized_crop(
            image, top, left, bottom - top, right - left, [32, 32], InterpolationMode.BICUBIC
        )
        assert np.array_equal(view(image, settings, seed), np.asarray(expected))


# The clean view


def timms_view(image: Image.Image, image_size: int, crop_pct: float) -> np.ndarray:
    transform = timm.data.create_transform(
        (3, image_size, image_size), interpolation="bicubic", crop_pct=crop_pct, crop_mode="center", normalize=False
    )
    return transform(image).permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("width", "height", "image_size", "crop_pct"),
    [
        (32, 32, 32, 1.0),
        (28, 28, 28, 1.0),
        (64, 64, 32, 1.0),
        (500, 400, 224, 1.0),
        (500, 400, 224, 224 / 256),
        (375, 500, 224, 0.875),
        (333, 500, 299, 0.9),
        (17, 51, 32, 0.95),
        (256, 300, 224, 0.875),  # the shorter side needs no resize
    ],
)
def test_the_clean_view_equals_timms_eval_transform(width, height, image_size, crop_pct):
    image = picture(width, height)
    ours = clean_view(image, image_size, crop_pct)
    assert (ours.shape, ours.dtype, ours.flags.writeable) == ((image_size, image_size, 3), np.uint8, True)
    assert np.array_equal(ours, timms_view(image, image_size, crop_pct))


@given(
    width=st.integers(8, 200), height=st.integers(8, 200), image_size=st.integers(8, 64), crop_pct=st.floats(0.5, 1.0)
)
@settings(max_examples=100, deadline=None)
def test_the_clean_view_equals_timms_at_any_size(width, height, image_size, crop_pct):
    image = picture(width, height)
    assert np.array_equal(clean_view(image, image_size, crop_pct), timms_view(image, image_size, crop_pct))


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1)])
def test_a_hair_thin_image_gives_a_view_and_not_a_picture_of_gigabytes(size, monkeypatch):
    largest = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, to, *args: largest.append(math.prod(to)) or resize(self, to, *args)
    )
    assert clean_view(Image.new("RGB", size, (9, 8, 7)), 224, 0.875).reshape(-1, 3).tolist() == [[9, 8, 7]] * 224**2
    assert largest == [256 * 256 * 32]


def test_the_module_needs_no_torch():
    code = "import sys, models.noise; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
