import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from storage.images import ImageError, decode_rgb, image_extension
from tests.broken_images import broken_images, odd_images
from tests.real_images import encoded, jpeg, picture, png

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def solid(mode: str, color: Any, size: tuple[int, int] = (8, 6)) -> Image.Image:
    return Image.new(mode, size, color)


def pixel(data: bytes, place: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    """A pixel of the decoded image, which must be RGB."""
    image = decode_rgb(data)
    assert image.mode == "RGB"
    return image.getpixel(place)  # type: ignore[return-value]


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims that size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")
    )


def test_a_png_comes_back_pixel_for_pixel() -> None:
    image = picture(3)
    assert np.array_equal(np.asarray(decode_rgb(encoded(image))), np.asarray(image))


def test_a_palette_is_looked_up() -> None:
    image = solid("P", 1)
    image.putpalette([*GREEN, *RED])
    assert pixel(encoded(image)) == RED
    assert pixel(encoded(image, "GIF")) == RED


def test_gray_becomes_three_equal_channels() -> None:
    assert pixel(encoded(solid("L", 77))) == (77, 77, 77)
    assert pixel(encoded(solid("1", 1))) == WHITE


def test_cmyk_jpegs_are_converted() -> None:
    red, green, blue = pixel(encoded(solid("CMYK", (0, 255, 255, 0)), "JPEG", quality=95))
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (solid("RGBA", (10, 20, 30, 0)), {}),
        (solid("LA", (10, 0)), {}),
        (solid("P", 0), {"transparency": 0}),
        (solid("L", 9), {"transparency": 9}),
        (solid("RGB", (10, 20, 30)), {"transparency": (10, 20, 30)}),
    ],
    ids=["rgba", "la", "palette", "gray-key", "rgb-key"],
)
def test_transparent_pixels_are_white(image: Image.Image, options: dict[str, Any]) -> None:
    assert pixel(encoded(image, **options)) == WHITE


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    red, green, blue = pixel(encoded(solid("RGBA", (255, 0, 0, 128))))
    assert (red, green, blue) == (255, 127, 127)


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (128, 0), (257 * 50, 50), (65535, 255)])
def test_16_bit_gray_keeps_its_brightness(value: int, expected: int) -> None:
    data = encoded(Image.fromarray(np.full((6, 8), value, np.uint16)))
    assert pixel(data) == (expected,) * 3


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_float_gray_keeps_its_brightness_whatever_white_is(white: int) -> None:
    values = np.full((6, 8), 0.4 * white, np.float32)
    values[0, 0] = white
    data = encoded(Image.fromarray(values), "TIFF")
    assert (pixel(data), pixel(data, (3, 3))) == (WHITE, (102,) * 3)


def test_a_black_float_picture_stays_black() -> None:
    assert pixel(encoded(Image.fromarray(np.zeros((6, 8), np.float32)), "TIFF")) == (0, 0, 0)


def test_exif_orientation_is_applied() -> None:
    image = solid("RGB", GREEN, (8, 4))
    image.putpixel((0, 0), RED)  # top left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    upright = decode_rgb(encoded(image, "PNG", exif=exif))
    assert upright.size == (4, 8)
    assert upright.getpixel((3, 0)) == RED


@pytest.mark.parametrize("form", ["GIF", "WEBP", "BMP", "TIFF"])
def test_other_formats_are_decoded(form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    assert pixel(encoded(solid("RGB", RED), form, **options)) == RED


def test_of_an_animation_the_first_frame_counts() -> None:
    frames = [solid("RGB", RED), solid("RGB", GREEN)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert pixel(data) == RED


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty: 0 bytes"),
        (b"not found, said the server", "not an image: unknown format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image: unknown format"),
        (b"\x89PNG\r\n\x1a\n", "not an image"),
        (jpeg()[:100], "not an image|cannot be decoded"),
        (encoded(picture(1, 64, 64), "JPEG")[:900], "cannot be decoded: .*truncated"),
        (encoded(picture(1, 64, 64))[:900], "cannot be decoded"),
        (bomb(50_000, 50_000), "too large"),
        (bomb(12_000, 9_000), "too large: 12000 x 9000 pixels, limit 100000000"),
        (bomb(40, 40), "cannot be decoded"),
    ],
    ids=["empty", "text", "svg", "magic", "jpeg-head", "jpeg-cut", "png-cut", "bomb", "large", "png-hollow"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_whole_image_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=f"^(?:{reason})") as error:
        decode_rgb(data)
    assert "\n" not in str(error.value)
    assert "0x" not in str(error.value), "an object's address is no reason"


def test_the_limit_counts_pixels_and_includes_itself() -> None:
    data = encoded(picture(0, 20, 10))
    assert decode_rgb(data, max_pixels=200).size == (20, 10)
    with pytest.raises(ImageError, match="too large: 20 x 10 pixels, limit 199"):
        decode_rgb(data, max_pixels=199)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow speaks of cut TIFF tags
def test_no_prefix_of_an_image_raises_anything_but_an_image_error() -> None:
    for data in (png(1), jpeg(1), encoded(picture(1), "GIF"), encoded(picture(1), "WEBP"), encoded(picture(1), "TIFF")):
        rejected = 0
        for end in range(0, len(data) // 2, 7):
            try:
                decode_rgb(data[:end])
            except ImageError:
                rejected += 1
        assert rejected >= len(range(0, len(data) // 2, 7)) - 1, "half an image was taken for a whole one"


def test_extensions_follow_the_bytes() -> None:
    extensions = [image_extension(encoded(picture(1), form)) for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP")]
    assert extensions == ["jpg", "png", "webp", "img", "img"]


@pytest.mark.parametrize("kind", broken_images())
def test_every_kind_of_broken_image_is_refused_with_a_reason(kind: str) -> None:
    data, reason = broken_images()[kind]
    with pytest.raises(ImageError, match=reason) as error:
        decode_rgb(data)
    assert "\n" not in str(error.value)
    assert 5 < len(str(error.value)) < 200


@pytest.mark.parametrize("kind", odd_images())
def test_every_kind_of_unusual_image_comes_out_right(kind: str) -> None:
    image = decode_rgb(odd_images()[kind])
    red, green, blue = np.asarray(image).reshape(-1, 3).mean(axis=0)
    assert image.mode == "RGB"
    assert (red > 235, green < 25, blue < 25) == (True, True, True), (red, green, blue)
    assert image.size == {"jpeg turned by exif": (10, 12), "one pixel": (1, 1)}.get(kind, (12, 10))
