import imagehash
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from storage.phash import MIRRORING, gray_thumbnail, hash_grays, hash_spectra, perceptual_hash, spectra
from tests.photographs import patches, photograph
from tests.real_images import picture


def reference(image: Image.Image) -> int:
    return int(str(imagehash.phash(image)), 16)


@given(seed=st.integers(0, 10_000), width=st.integers(1, 191), height=st.integers(1, 191))
def test_the_bits_are_those_of_the_package_imagehash(seed: int, width: int, height: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    noise = Image.fromarray(pixels)
    soft = noise.resize((max(1, width // 3), max(1, height // 3))).resize((width, height))
    for image in (noise, soft):
        if np.ptp(gray_thumbnail(image), axis=(0, 1)).min() and min(width, height) > 8:
            assert perceptual_hash(image) == reference(image)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "YCbCr"])
def test_real_pictures_of_any_mode_have_the_bits_of_imagehash(mode: str) -> None:
    for patch in patches(64)[::9]:
        assert perceptual_hash(patch.convert(mode)) == reference(patch.convert(mode))


def test_large_photographs_differ_from_imagehash_in_two_bits_at_most() -> None:
    for name in ("china.jpg", "flower.jpg"):
        photo = photograph(name)
        assert (perceptual_hash(photo) ^ reference(photo)).bit_count() <= 2


def test_a_picture_has_the_same_hash_alone_and_among_others() -> None:
    images = patches(64)
    together = hash_grays(np.stack([gray_thumbnail(image) for image in images]))
    assert together.dtype == np.uint64
    assert together.tolist() == [perceptual_hash(image) for image in images]
    assert len(set(together.tolist())) > 0.95 * len(images)


def test_the_mirror_images_hash_follows_from_the_spectrum() -> None:
    grays = np.stack([gray_thumbnail(image) for image in patches(64)])
    mirrored = np.ascontiguousarray(grays[:, :, ::-1])
    assert np.array_equal(hash_spectra(spectra(grays) * MIRRORING), hash_grays(mirrored))


def test_mirroring_a_picture_mirrors_its_thumbnail() -> None:
    image = picture(5, 32, 32)
    assert np.array_equal(gray_thumbnail(ImageOps.mirror(image)), gray_thumbnail(image)[:, ::-1])


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (640, 427)])
def test_all_blank_pictures_share_one_hash(size: tuple[int, int]) -> None:
    hashes = {perceptual_hash(Image.new("RGB", size, (gray,) * 3)) for gray in (1, 77, 200, 255)}
    assert hashes == {1 << 63}
    assert perceptual_hash(Image.new("RGB", size)) == 0


def test_scaling_and_offsetting_gray_levels_changes_no_bit() -> None:
    grays = np.stack([gray_thumbnail(image) for image in patches(64)]).astype(np.float64)
    assert np.array_equal(hash_grays(grays * 0.5), hash_grays(grays))
