"""The fast decoder gives Pillow's pixels, and the fast resize nearly so; what it cannot do goes through Pillow."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from models.decode import clean_pixels, decode_pixels
from models.noise import clean_view
from storage.images import ImageError, decode_rgb
from tests.real_images import encoded, picture

MOST = 2  # of 255, a pixel of the resized view
MEAN = 0.5  # of 255, of a whole view; these pictures are noisier than photographs


def oriented(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(1, 30, 20), "JPEG", exif=exif)


def sixteen_bit() -> bytes:
    values = np.arange(400, dtype=np.uint16).reshape(20, 20) * 160
    return encoded(Image.fromarray(values))


IMAGES = {
    "jpeg": encoded(picture(0, 61, 47), "JPEG", quality=80),
    "jpeg without subsampling": encoded(picture(0, 61, 47), "JPEG", subsampling=0),
    "progressive jpeg": encoded(picture(0, 61, 47), "JPEG", progressive=True),
    "gray jpeg": encoded(picture(0, 61, 47).convert("L"), "JPEG"),
    "cmyk jpeg": encoded(picture(0, 61, 47).convert("CMYK"), "JPEG"),
    **{f"jpeg turned {number}": oriented(number) for number in (1, 3, 6, 8)},
    "png": encoded(picture(2, 33, 50)),
    "palette": encoded(picture(2, 33, 50).convert("P")),
    "alpha": encoded(picture(2, 33, 50).convert("RGBA").rotate(30)),
    "16 bit": sixteen_bit(),
    "webp": encoded(picture(3, 33, 50), "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", IMAGES)
def test_decoded_pixels_are_pillows(name: str) -> None:
    pixels = decode_pixels(IMAGES[name])
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(decode_rgb(IMAGES[name])))


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    image_size=st.integers(8, 120),
    crop_pct=st.sampled_from([0.5, 0.875, 1.0]),
    seed=st.integers(0, 5),
)
def test_the_fast_view_is_the_clean_view_within_its_tolerance(
    width: int, height: int, image_size: int, crop_pct: float, seed: int
) -> None:
    image = picture(seed, width, height)
    expected = clean_view(image, image_size, crop_pct).astype(int)
    found = clean_pixels(torch.from_numpy(np.array(image)).permute(2, 0, 1), image_size, crop_pct)
    assert found.shape == (image_size, image_size, 3)
    difference = np.abs(found.numpy().astype(int) - expected)
    assert difference.max() <= MOST
    assert difference.mean() <= MEAN


def test_a_picture_of_the_right_size_is_not_touched() -> None:
    image = picture(4, 32, 32)
    found = clean_pixels(torch.from_numpy(np.array(image)).permute(2, 0, 1), 32, 1.0)
    assert np.array_equal(found.numpy(), np.asarray(image))


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty"), (b"\xff\xd8 no jpeg", "not an image"), (IMAGES["jpeg"][:700], "cannot be decoded|not an image")],
    ids=["empty", "header", "cut off"],
)
def test_what_cannot_be_decoded_is_refused_as_elsewhere(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode_pixels(data)
    with pytest.raises(ImageError, match=reason):
        decode_rgb(data)


def test_a_jpeg_in_a_file_of_several_pictures_is_the_first_one() -> None:
    stream = io.BytesIO()
    first, second = picture(1, 20, 20), picture(2, 20, 20)
    first.save(stream, "MPO", save_all=True, append_images=[second])
    found = decode_pixels(stream.getvalue()).permute(1, 2, 0).numpy()
    assert np.array_equal(found, np.asarray(decode_rgb(stream.getvalue())))
