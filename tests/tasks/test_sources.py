import gc
import io
import os
import pickle
import shutil
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from models.compute import ComputeConfig
from storage.artifacts import Manifest
from storage.errors import StoreError, UserError
from storage.objects import Store
from storage.shards import ShardReader, read_index, shard_files
from tasks.contract import StageContext
from tasks.ingest import DataConfig, fingerprint, open_source, plan_stretches
from tasks.sources import LABELED_SPLITS, SPLITS, Member
from tasks.sources.folders import cut_by_names
from tests.datasets import HereEngine, prepare_all
from tests.real_images import jpeg, png, pngs, write_images

CLASSES = ("n01_cat", "n02_dog", "n03_owl")


def prepared(store: Store, root: Path | str, **fields: Any) -> Manifest:
    context = StageContext(store, "s1", HereEngine(), ComputeConfig(processes=1))
    result = prepare_all(context, root, **{"shard_images": 10, **fields})
    return Manifest(
        kind="dataset", key="s1", stage="prepare", stage_version=1, config={}, inputs={}, files=result.files, metrics=result.metrics
    )  # fmt: skip


def make_folders(root: Path) -> dict[str, str]:
    """ImageNet's layout, and a flat folder of unlabeled images; the settings that name them."""
    for at, (split, count) in enumerate((("train", 8), ("val", 3), ("test", 2))):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for n in range(count):
                (folder / f"{name}_{n}.JPEG").write_bytes(jpeg(1000 * at + 100 * label + n))
    (root / "crawl/deep").mkdir(parents=True)
    for n in range(12):
        (root / ("crawl/deep" if n % 2 else "crawl") / f"{n:02d}.png").write_bytes(png(9000 + n))
    (root / "crawl/README.txt").write_text("no image")
    return {"labeled": "train", "val": "val", "test": "test", "unlabeled": "crawl"}


@pytest.fixture(params=["disk", "bucket"])
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, str]]:
    """Class folders on disk and in a bucket: root and settings."""
    settings = make_folders(tmp_path / "images")
    if request.param == "disk":
        return str(tmp_path / "images"), settings
    bucket = Store(f"{request.getfixturevalue('s3')}/images")
    for path in (tmp_path / "images").rglob("*.*"):
        bucket._backend.replace(path.relative_to(tmp_path / "images").as_posix(), path.read_bytes())
    return bucket.url, settings


def test_class_folders_give_images_labels_and_names(store: Store, folders: tuple[str, dict[str, str]]) -> None:
    root, settings = folders
    manifest = prepared(store, root, **settings)
    assert manifest.metrics["class_names"] == list(CLASSES)
    assert manifest.metrics["labeled_per_class"] == [8, 8, 8]
    rows = read_index(store, manifest, "labeled").to_pylist()
    assert len({row["key"] for row in rows}) == 24
    reader = ShardReader(store, shard_files(manifest, "labeled"))
    for row in rows:
        split, name, file = row["source"].split("/")
        n = int(file.removesuffix(".JPEG").rpartition("_")[2])
        assert (split, name) == ("train", CLASSES[row["label"]])
        assert reader.read(row["shard"], row["offset"], row["bytes"], row["sha256"]) == jpeg(100 * row["label"] + n)
    unlabeled = read_index(store, manifest, "unlabeled").to_pylist()
    assert [row["source"] for row in unlabeled] == sorted(row["source"] for row in unlabeled)
    assert len(unlabeled) == 12
    assert {row["label"] for row in unlabeled} == {-1}


def test_folders_patterns_and_a_given_order_of_classes(store: Store, tmp_path: Path) -> None:
    settings = make_folders(tmp_path)
    turned = tuple(reversed(CLASSES))
    manifest = prepared(store, tmp_path, **{**settings, "labeled": "train/*/*.JPEG"}, class_names=turned)
    assert manifest.metrics["class_names"] == list(turned)
    for row in read_index(store, manifest, "val").to_pylist():
        assert row["source"].split("/")[1] == turned[row["label"]]


def test_labels_that_folders_cannot_give_are_errors_before_an_image_is_read(tmp_path: Path) -> None:
    settings = make_folders(tmp_path)

    def failure(**fields: Any) -> str:
        source = open_source(DataConfig(root=str(tmp_path), **{**settings, **fields}))
        with pytest.raises(UserError) as error:
            source.files(SPLITS)
        return str(error.value)

    assert "data.class_names and the class folders of data.labeled differ in 'n03_owl', 'owl'" in failure(
        class_names=("n01_cat", "n02_dog", "owl")
    )
    (tmp_path / "val/n09_emu").mkdir()
    (tmp_path / "val/n09_emu/a.png").write_bytes(png(1))
    assert "data.val: folder 'n09_emu' (val/n09_emu/a.png) is no class of data.labeled" in failure()
    shutil.rmtree(tmp_path / "val/n09_emu")
    assert "crawl/00.png lies in no class folder" in failure(labeled="crawl")
    write_images(tmp_path / "labeled.parquet", pngs(6), [0, 1, 0, 1, 0, 1])
    assert "data.val are class folders, data.labeled are parquet" in failure(labeled="labeled.parquet")
    assert "data.unlabeled: 1 files match 'crawl/README.txt', none of them a .parquet, a .tar or an image" in failure(
        unlabeled="crawl/README.txt"
    )


def test_the_fingerprint_of_folders_follows_names_and_bytes_not_times(tmp_path: Path) -> None:
    settings = make_folders(tmp_path)
    config = DataConfig(root=str(tmp_path), shard_images=10, **settings)

    def identity() -> str:
        return fingerprint(open_source(config).files(SPLITS))

    before = identity()
    (tmp_path / "crawl/00.png").touch()
    assert identity() == before
    (tmp_path / "crawl/00.png").write_bytes(png(77))
    changed = identity()
    assert changed != before
    (tmp_path / "crawl/00.png").rename(tmp_path / "crawl/000.png")
    assert identity() not in (before, changed)


def test_a_file_that_changed_with_its_old_time_and_size_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    """Rewritten within the clock's tick: what was just written is never remembered."""
    config = DataConfig(root=str(tmp_path), **make_folders(tmp_path))
    path = tmp_path / "crawl/00.png"
    before, status = fingerprint(open_source(config).files(["unlabeled"])), path.stat()
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint(open_source(config).files(["unlabeled"])) != before


def test_an_image_that_is_replaced_between_listing_and_reading_is_noticed(tmp_path: Path) -> None:
    config = DataConfig(root=str(tmp_path), **make_folders(tmp_path))
    (file,) = open_source(config).files(["unlabeled"])
    (tmp_path / "crawl/02.png").write_bytes(png(5))
    with pytest.raises(StoreError, match=r"crawl/02\.png was replaced since it was listed"):
        list(open_source(config).read(file, 0, 12))


@pytest.mark.parametrize("limits", [{"shard_images": 20}, {"shard_bytes": 20 * 500}], ids=["images", "bytes"])
@pytest.mark.parametrize("added", ["000.png", "150.png", "zzz.png"])
def test_a_new_image_file_keeps_all_shards_but_those_beside_it(
    tmp_path: Path, limits: dict[str, int], added: str
) -> None:
    folder = tmp_path / "crawl"
    folder.mkdir()
    for n in range(300):
        (folder / f"{n + 1:03d}0.png").write_bytes(png(n)[:300] + bytes(400 * (n % 2)))
    config = DataConfig(root=str(tmp_path), unlabeled="crawl", **limits)

    def shards() -> dict[str, int]:
        stretches = plan_stretches(config, open_source(config).files(["unlabeled"]))
        return {stretch.part_key(): stretch.num_images for stretch in stretches}

    before = shards()
    (folder / added).write_bytes(png(999))
    after = shards()
    assert (sum(before.values()), sum(after.values())) == (300, 301)
    assert max(after.values()) <= (20 if "shard_images" in limits else 33)
    assert 15 <= len(before) <= 60
    assert len(after.keys() - before.keys()) <= 3


@given(st.lists(st.integers(0, 900), max_size=80), st.integers(1, 30), st.integers(1, 3000))
def test_cuts_by_names_keep_both_limits(sizes: list[int], most_images: int, most_bytes: int) -> None:
    members = [Member(f"{n}.jpg", size, "") for n, size in enumerate(sizes)]
    cuts = cut_by_names(members, most_images, most_bytes)
    for first, last in pairwise([*cuts, len(sizes)]):
        assert last - first <= most_images
        assert last - first <= 1 or sum(sizes[first:last]) <= most_bytes


def test_a_listing_takes_little_memory(tmp_path: Path) -> None:
    folder = tmp_path / "crawl"
    folder.mkdir()
    for n in range(2000):
        (folder / f"{n:06d}.jpg").write_bytes(b"%d" % n)
    source = open_source(DataConfig(root=str(tmp_path), unlabeled="crawl"))
    source.files(["unlabeled"])
    source = open_source(DataConfig(root=str(tmp_path), unlabeled="crawl"))
    tracemalloc.start()
    files = source.files(["unlabeled"])
    gc.collect()
    used = tracemalloc.get_traced_memory()[0] / 2000
    tracemalloc.stop()
    assert sum(file.rows for file in files) == 2000
    assert used < 600, f"{used:.0f} bytes a file"


def test_the_unlabeled_files_may_lie_elsewhere(store: Store, tmp_path: Path) -> None:
    settings = make_folders(tmp_path / "here")
    (tmp_path / "here/crawl").rename(tmp_path / "far")
    manifest = prepared(
        store, tmp_path / "here", **{**settings, "unlabeled": "**/*.png"}, unlabeled_root=str(tmp_path / "far")
    )
    assert manifest.metrics["unlabeled"]["images"] == 12
    with pytest.raises(UserError, match=r"data\.unlabeled_root: folder .*nowhere does not exist"):
        prepared(store, tmp_path / "here", **settings, unlabeled_root=str(tmp_path / "nowhere"))


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[bytes, int]]]:
    """CIFAR-10's files with 20 images each, in torchvision's layout; pixels and labels in their order."""
    from torchvision.datasets import CIFAR10

    from tasks.sources import torchvision

    monkeypatch.setenv("NST_CACHE_DIR", str(root / "cache"))
    folder, rng = root / CIFAR10.base_folder, np.random.default_rng(0)
    folder.mkdir(parents=True)
    found: dict[str, list[tuple[bytes, int]]] = {"train": [], "test": []}
    for part, names in (("train", [f"data_batch_{n}" for n in range(1, 6)]), ("test", ["test_batch"])):
        for name in names:
            pixels, labels = rng.integers(0, 256, (20, 3072), dtype=np.uint8), [n % 10 for n in range(20)]
            (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
            found[part] += [(row.tobytes(), label) for row, label in zip(pixels, labels, strict=True)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {n}" for n in range(10)]}))
    for attribute in ("train_list", "test_list"):  # torchvision checks the sums of the real files
        monkeypatch.setattr(CIFAR10, attribute, [(name, None) for name, _ in getattr(CIFAR10, attribute)])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    monkeypatch.setitem(torchvision.IMAGES, "CIFAR10", {"train": 100, "test": 20})
    return found


def test_cifar_10_is_split_by_seed_and_loses_no_pixel(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = write_cifar(tmp_path / "raw", monkeypatch)
    settings = {"source": "torchvision", "torchvision": {"num_val": 20, "num_labeled": 50}, "leaks": {"enabled": False}}
    manifest = prepared(store, tmp_path / "raw", **settings)
    assert {split: manifest.metrics[split]["images"] for split in SPLITS} == dict(
        zip(SPLITS, (50, 20, 20, 30), strict=True)
    )
    assert manifest.metrics["class_names"] == [f"class {n}" for n in range(10)]
    seen = set()
    for split in SPLITS:
        reader = ShardReader(store, shard_files(manifest, split))
        for row in read_index(store, manifest, split).to_pylist():
            part, name = row["source"].split(":")[1].split("/")
            expected, label = pixels[part][int(name[:-4])]
            image = decoded(reader.read(row["shard"], row["offset"], row["bytes"], row["sha256"]))
            assert image.transpose(2, 0, 1).tobytes() == expected
            assert row["label"] == (-1 if split == "unlabeled" else label)
            seen.add((part, name))
    assert len(seen) == 120
    with pytest.raises(UserError, match="has no unlabeled images of its own; set num_labeled"):
        prepared(store, tmp_path / "raw", **{**settings, "torchvision": {"num_val": 20}})


def test_a_missing_torchvision_data_set_is_told_with_the_remedy(tmp_path: Path) -> None:
    source = open_source(DataConfig(root=str(tmp_path), source="torchvision", torchvision={"dataset": "SVHN"}))
    with pytest.raises(UserError, match=r"train_32x32\.mat is not below .*SVHN\(FOLDER, download=True\)"):
        source.files(LABELED_SPLITS)


def test_svhn_has_its_extra_images_unlabeled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path, monkeypatch)
    config = DataConfig(root=str(tmp_path), source="torchvision", torchvision={"dataset": "SVHN", "num_val": 6})
    source = open_source(config)
    files = {file.split: file for file in source.files(SPLITS)}
    assert {split: file.rows for split, file in files.items()} == dict(zip(SPLITS, (24, 6, 10, 40), strict=True))
    images = list(source.read(files["unlabeled"], 0, 40))
    assert images[3].path == "extra/000003.png"
    assert images[3].label == -1
    labels = source.labels(files["test"])
    assert labels is not None
    assert labels.tolist() == [*range(1, 10), 0]
    assert source.class_names() == [str(n) for n in range(10)]


def test_the_processes_of_a_machine_share_the_pixels_of_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = write_svhn(tmp_path, monkeypatch)
    config = DataConfig(root=str(tmp_path), source="torchvision", torchvision={"dataset": "SVHN", "num_val": 6})
    (unlabeled,) = open_source(config).files(["unlabeled"])
    first = [raw.data for raw in open_source(config).read(unlabeled, 0, 40)]
    for number, data in enumerate(first):
        assert np.array_equal(decoded(data), pixels["extra"][..., number])
    (folder,) = (tmp_path / "cache/unpacked").glob("*/")
    folder.rename(folder.with_suffix(".making"))  # as a kill while unpacking leaves it
    assert [raw.data for raw in open_source(config).read(unlabeled, 0, 40)] == first
    monkeypatch.setattr("tasks.sources.unpacked._load", lambda *which: pytest.fail(f"loaded again: {which}"))
    other = open_source(config)
    assert [raw.data for raw in other.read(unlabeled, 0, 40)] == first
    assert isinstance(other._loaded("extra").pixels, np.memmap)  # type: ignore[attr-defined]


def write_svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """SVHN's files with few images, in torchvision's layout, and a cache of their own; the pixels of each part."""
    from scipy import io as scipy_io
    from torchvision.datasets import SVHN

    from tasks.sources import torchvision

    monkeypatch.setenv("NST_CACHE_DIR", str(root / "cache"))
    pixels: dict[str, np.ndarray] = {}
    rng = np.random.default_rng(1)
    for part, count in (("train", 30), ("test", 10), ("extra", 40)):
        pixels[part] = rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        content = {"X": pixels[part], "y": np.arange(count)[:, None] % 10 + 1}
        scipy_io.savemat(root / f"{part}_32x32.mat", content)
    parts = {part: [*facts[:2], None] for part, facts in SVHN.split_list.items()}
    monkeypatch.setattr(SVHN, "split_list", parts)
    monkeypatch.setitem(torchvision.IMAGES, "SVHN", {"train": 30, "test": 10, "extra": 40})
    return pixels


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))
