"""Claims about the clean and the noised view, against timm and torchvision where those are the reference."""

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
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as reference

from models.configs import PAPER_OPS, RELEASED_OPS, NoiseConfig
from models.noise import OPS, clean_view, noised_view, random_resized_box
from tests.models.noise_pictures import PLAIN, picture, pixels, random_pictures, view

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


@given(image=random_pictures, settings_=noise_settings, seed=st.integers(0, 2**63), size=st.integers(8, 48))
@settings(max_examples=150, deadline=None)
def test_a_view_of_pixels_is_that_of_the_picture(image, settings_, seed, size):
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    before = tensor.clone()
    found = noised_view(tensor, settings_, size, np.random.default_rng(seed))
    assert np.array_equal(found, noised_view(image, settings_, size, np.random.default_rng(seed)))
    assert found.flags.writeable
    assert torch.equal(tensor, before)


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


def test_crop_resized_has_torchvisions_pixels_for_the_same_box_to_within_2_of_255():
    differences = []
    image = picture(120, 90)
    settings = PLAIN.model_copy(update={"crop": "resized"})
    for seed in range(20):
        left, top, right, bottom = random_resized_box(120, 90, 0.08, np.random.default_rng(seed))
        expected = reference.resized_crop(
            image, top, left, bottom - top, right - left, [32, 32], InterpolationMode.BICUBIC
        )
        differences.append(np.abs(pixels(Image.fromarray(view(image, settings, seed))) - pixels(expected)))
    assert np.max(differences) <= 2
    assert np.mean(differences) < 0.1


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
