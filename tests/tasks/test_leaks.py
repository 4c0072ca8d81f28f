import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from storage.images import decode_rgb
from storage.phash import SIDE, gray_thumbnail
from tasks.leaks import INDEX_SCHEMA, Leak, LeakConfig, LeakIndex, evaluation_table
from tests.photographs import patches
from tests.real_images import encoded, png

SIZE = 64


def table_of(images: Sequence[bytes]) -> pa.Table:
    keys = [f"test-{number:03d}" for number in range(len(images))]
    return evaluation_table(keys, [hashlib.sha256(data).hexdigest() for data in images], thumbnails(images))


def thumbnails(images: Sequence[bytes]) -> np.ndarray:
    return np.stack([gray_thumbnail(decode_rgb(data)) for data in images])


def find(index: LeakIndex, images: Sequence[bytes]) -> list[Leak | None]:
    return index.find([hashlib.sha256(data).hexdigest() for data in images], thumbnails(images))


@pytest.fixture(scope="module")
def evaluation() -> list[bytes]:
    """Pieces of one real photograph, as JPEG files."""
    return [encoded(patch, "JPEG", quality=90) for patch in patches(SIZE)]


@pytest.fixture(scope="module")
def index(evaluation: list[bytes]) -> LeakIndex:
    return LeakIndex(LeakConfig(), table_of(evaluation))


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    return encoded(image, "JPEG", quality=quality)


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "re-encoded": lambda image: jpeg(image, 30),
    "brighter": lambda image: jpeg(ImageEnhance.Brightness(image).enhance(1.3)),
    "darker": lambda image: jpeg(ImageEnhance.Brightness(image).enhance(0.6)),
    "contrast": lambda image: jpeg(ImageEnhance.Contrast(image).enhance(1.4)),
    "enlarged": lambda image: jpeg(image.resize((3 * SIZE, 3 * SIZE), Image.Resampling.BICUBIC)),
    "shrunk": lambda image: jpeg(image.resize((SIZE // 2, SIZE // 2), Image.Resampling.LANCZOS)),
    "png": lambda image: encoded(image),
    "webp": lambda image: encoded(image, "WEBP", quality=80),
    "gray": lambda image: jpeg(image.convert("L")),
    "blurred": lambda image: jpeg(image.filter(ImageFilter.GaussianBlur(1.5))),
    "cropped a little": lambda image: jpeg(image.crop((2, 0, SIZE - 1, SIZE - 3))),
    "cropped": lambda image: jpeg(image.crop((0, 5, SIZE - 8, SIZE - 2))),
    "cropped and resized": lambda image: jpeg(image.crop((4, 4, SIZE - 4, SIZE - 4)).resize((SIZE, SIZE))),
    "one side cropped": lambda image: jpeg(image.crop((12, 0, SIZE, SIZE))),
    "turned": lambda image: jpeg(image.rotate(1, Image.Resampling.BICUBIC)),
}


@pytest.mark.parametrize("kind", COPIES)
def test_altered_copies_are_found_with_their_original(kind: str, index: LeakIndex, evaluation: list[bytes]) -> None:
    found = find(index, [COPIES[kind](decode_rgb(data)) for data in evaluation])
    right = [leak is not None and leak.evaluation_key == f"test-{number:03d}" for number, leak in enumerate(found)]
    assert np.mean(right) >= 0.95
    kinds = {leak.kind for leak in found if leak is not None}
    assert kinds == {"near"}


def test_the_same_bytes_are_exact(index: LeakIndex, evaluation: list[bytes]) -> None:
    expected = [Leak(f"test-{number:03d}", "exact", 0.0) for number in range(len(evaluation))]
    assert find(index, evaluation) == expected


def test_pixels_that_are_the_same_in_another_format_are_at_distance_zero(
    index: LeakIndex, evaluation: list[bytes]
) -> None:
    for leak in find(index, [encoded(decode_rgb(data)) for data in evaluation]):
        assert leak is not None
        assert leak.kind == "near"
        assert leak.distance == pytest.approx(0, abs=1e-4)


def test_mirror_images_are_found_where_the_config_wants_them(index: LeakIndex, evaluation: list[bytes]) -> None:
    mirrored = [jpeg(ImageOps.mirror(decode_rgb(data))) for data in evaluation]
    assert {leak.kind for leak in find(index, mirrored) if leak} == {"mirrored"}
    assert sum(leak is not None for leak in find(index, mirrored)) >= 0.95 * len(evaluation)
    without = LeakIndex(LeakConfig(mirrored=False), table_of(evaluation))
    assert find(without, mirrored) == [None] * len(evaluation)


def test_other_photographs_are_kept(index: LeakIndex) -> None:
    others = [*patches(SIZE, "flower.jpg"), *patches(96, "flower.jpg")]
    assert find(index, [jpeg(image) for image in others]) == [None] * len(others)


def test_other_parts_of_the_same_photograph_are_kept(index: LeakIndex, evaluation: list[bytes]) -> None:
    for number, data in enumerate(evaluation[::3]):
        rest = [other for place, other in enumerate(evaluation) if place != 3 * number]
        assert find(LeakIndex(LeakConfig(), table_of(rest)), [data]) == [None]


def shading(rng: np.random.Generator) -> Image.Image:
    """A sky: light that changes slowly, in some direction and color, with the noise of a sensor."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE - 0.5
    slope = rng.uniform(-60, 60, 2)
    light = rng.uniform(100, 200, 3) + (slope[0] * x + slope[1] * y)[..., None] + rng.normal(0, 1, (SIZE, SIZE, 1))
    return Image.fromarray(light.clip(0, 255).astype(np.uint8))


def test_blank_pictures_and_skies_match_nothing_but_their_own_bytes(evaluation: list[bytes]) -> None:
    rng = np.random.default_rng(0)
    skies = [jpeg(shading(rng), 75) for _ in range(60)]
    blanks = [png_of_color(gray) for gray in (0, 1, 128, 254, 255)]
    index = LeakIndex(LeakConfig(), table_of([*skies[:30], *blanks[:3], *evaluation]))
    assert find(index, [*skies[30:], *blanks[3:]]) == [None] * 32
    assert [leak.kind for leak in find(index, [*skies[:30], *blanks[:3]]) if leak] == ["exact"] * 33


def png_of_color(gray: int) -> bytes:
    return encoded(Image.new("RGB", (SIZE, SIZE), (gray,) * 3))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_an_answer_depends_on_its_image_only(seed: int, index: LeakIndex, evaluation: list[bytes]) -> None:
    rng = np.random.default_rng(seed)
    kinds = list(COPIES.values())
    images = [kinds[rng.integers(len(kinds))](decode_rgb(evaluation[n])) for n in rng.permutation(len(evaluation))[:20]]
    assert find(index, images) == [find(index, [image])[0] for image in images]


def test_of_equal_evaluation_images_the_first_is_named(evaluation: list[bytes]) -> None:
    index = LeakIndex(LeakConfig(), table_of([evaluation[4], evaluation[7], evaluation[4]]))
    copies = [evaluation[4], jpeg(decode_rgb(evaluation[4]), 50)]
    assert [leak.evaluation_key for leak in find(index, copies) if leak] == ["test-000", "test-000"]


def test_a_saved_index_answers_the_same(index: LeakIndex, evaluation: list[bytes], tmp_path: Path) -> None:
    halves = [table_of(evaluation).slice(0, 20), table_of(evaluation).slice(20)]
    pq.write_table(pa.concat_tables(halves), tmp_path / "evaluation.parquet")
    loaded = pq.read_table(tmp_path / "evaluation.parquet")
    assert loaded.schema.equals(INDEX_SCHEMA)
    copies = [jpeg(decode_rgb(data).crop((3, 3, SIZE, SIZE))) for data in evaluation]
    assert find(LeakIndex(LeakConfig(), loaded), copies) == find(index, copies)


@pytest.mark.parametrize("num_images", [0, 3])
def test_without_evaluation_images_nothing_is_found(num_images: int) -> None:
    index = LeakIndex(LeakConfig(), INDEX_SCHEMA.empty_table())
    assert index.find(["0" * 64] * num_images, np.zeros((num_images, SIDE, SIDE), np.uint8)) == [None] * num_images


def test_a_stricter_distance_finds_fewer(evaluation: list[bytes]) -> None:
    copies = [jpeg(decode_rgb(data).resize((24, 24)), 40) for data in evaluation]
    counts = []
    for max_distance in (0.0, 0.05, 0.15):
        found = find(LeakIndex(LeakConfig(max_distance=max_distance), table_of(evaluation)), copies)
        assert all(leak.distance <= max_distance for leak in found if leak)
        counts.append(sum(leak is not None for leak in found))
    assert counts == sorted(counts)
    assert counts[0] == 0 < counts[2]


def test_copies_of_cifar_images_are_found_among_thousands() -> None:
    path = Path(__file__).resolve().parents[2].parent / "shared/data/cifar10-val.parquet"
    if not path.exists():
        pytest.skip("../shared/data is not there")
    images = [row["bytes"] for row in pq.read_table(path)["image"].to_pylist()]
    index = LeakIndex(LeakConfig(), table_of(images))
    for size in (27, 29, 30):  # of 32
        copies = [jpeg(Image.open(io.BytesIO(data)).crop((1, 2, 1 + size, 2 + size))) for data in images[::20]]
        found = find(index, copies)
        right = [leak is not None and leak.evaluation_key == f"test-{20 * n:03d}" for n, leak in enumerate(found)]
        assert np.mean(right) > 0.95
    assert find(index, [png(seed) for seed in range(50)]) == [None] * 50
