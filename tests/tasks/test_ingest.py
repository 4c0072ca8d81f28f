import hashlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.compute import ComputeConfig
from storage.errors import StoreError
from storage.objects import Store
from tasks.contract import StageContext
from tasks.ingest import DataConfig, fingerprint, ingest, open_source, plan_stretches
from tasks.source_parts import sample_key
from tasks.sources import SPLITS, Source, SourceFile, cut_rows
from tasks.sources.digits import DigitsConfig, DigitsSource
from tasks.sources.files import FilesSource
from tests.datasets import HereEngine
from tests.real_images import png, pngs, write_images, write_splits


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A whole data set: 24 labeled images of three classes, 30 unlabeled ones."""
    return write_splits(tmp_path / "images")


def configure(root: Path, **fields: Any) -> DataConfig:
    return DataConfig(root=str(root), **{"shard_images": 10, **fields})


@given(st.sets(st.tuples(st.text("a_-. ü/", min_size=1, max_size=2), st.integers(0, 2)), min_size=10, max_size=60))
def test_sample_keys_are_distinct_and_safe_for_a_tar(places: set[tuple[str, int]]) -> None:
    keys = [sample_key(f"{stem}.parquet", row) for stem, row in places]
    assert len(set(keys)) == len(places)
    assert all(key.isascii() and not set(key) & set("./ ") for key in keys)


def test_each_row_is_in_one_stretch_of_a_shards_size(images: Path) -> None:
    config = configure(images, shard_images=7)
    stretches = plan_stretches(config, open_source(config).files(SPLITS))
    for split, count in zip(SPLITS, (24, 6, 6, 30), strict=True):
        own = [stretch for stretch in stretches if stretch.file.split == split]
        assert [row for stretch in own for row in range(stretch.first, stretch.last)] == list(range(count))
        assert max(stretch.num_images for stretch in own) <= 7
    assert len({stretch.part_key() for stretch in stretches}) == len(stretches)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9000)), max_size=12), st.integers(1, 30), st.integers(1, 3000)
)
def test_cuts_leave_no_row_out_and_keep_both_limits(
    blocks: list[tuple[int, int]], most_rows: int, most_bytes: int
) -> None:
    cuts = cut_rows(blocks, most_rows, most_bytes)
    means = [size / rows for rows, size in blocks if rows for _ in range(rows)]
    assert cuts[0] == 0
    assert list(cuts) == sorted(set(cuts))
    ends = (*cuts[1:], len(means))
    for first, last in zip(cuts, ends, strict=True):
        assert last - first <= most_rows
        assert last - first <= 1 or sum(means[first:last]) <= most_bytes * 1.000001
    for first, last in pairwise(cuts):
        full = last - first == most_rows or sum(means[first : last + 1]) > most_bytes * 0.999999
        assert full, "a shard was closed before it was full"


@given(st.integers(0, 19), st.integers(1, 20))
def test_a_stretch_is_read_across_row_groups(images_of_20: tuple[Source, SourceFile], first: int, count: int) -> None:
    source, file = images_of_20
    last = min(20, first + count)
    assert [(raw.data, raw.label) for raw in source.read(file, first, last)] == [
        (png(n), n % 2) for n in range(first, last)
    ]


@pytest.fixture(scope="module")
def images_of_20(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, SourceFile]:
    """20 images in row groups of 7."""
    root = tmp_path_factory.mktemp("rows")
    path = write_images(root / "all.parquet", pngs(20), [n % 2 for n in range(20)])
    assert pq.ParquetFile(path).num_row_groups == 3
    source = open_source(DataConfig(root=str(root), labeled="all.parquet"))
    return source, source.files(["labeled"])[0]


def test_digits_have_the_same_images_each_time_and_share_none_between_splits() -> None:
    config = DigitsConfig(labeled_per_class=3, num_val=20, num_test=30, num_out_of_domain=40)
    first, second = DigitsSource(config, 1000), DigitsSource(config, 1000)
    files = first.files(SPLITS)
    assert files == second.files(SPLITS)
    assert {file.split: file.rows for file in files} == {"labeled": 30, "val": 20, "test": 30, "unlabeled": 4960}
    labeled = next(file for file in files if file.split == "labeled")
    assert np.bincount(first.labels(labeled)).tolist() == [3] * 10
    paths = [raw.path for file in files for raw in first.read(file, 0, min(file.rows, 100))]
    assert len(set(paths)) == len(paths)
    digests = [
        [hashlib.sha256(raw.data).hexdigest() for raw in source.read(labeled, 5, 30)] for source in (first, second)
    ]
    assert digests[0] == digests[1]
    other = DigitsSource(DigitsConfig(labeled_per_class=3, num_val=20, num_test=30, num_out_of_domain=40, seed=1), 1000)
    assert fingerprint(other.files(SPLITS)) != fingerprint(files)


def test_after_a_crash_only_the_stretches_that_are_missing_are_read(
    images: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(images)
    context = StageContext(store, "k1", HereEngine(), ComputeConfig())
    stretches = plan_stretches(config, open_source(config).files(["labeled", "unlabeled"]))
    parts = ingest(context, config, stretches)
    lost = stretches[1]
    store.delete(*(path for path in store.paths(f"parts/ingest/{lost.part_key()}") if path.endswith(".json")))
    read: list[tuple[str, int]] = []

    def reading(source: Source, file: SourceFile, first: int, last: int) -> Any:
        read.append((file.name, first))
        return plain(source, file, first, last)

    plain = FilesSource.read
    monkeypatch.setattr(FilesSource, "read", reading)
    assert ingest(context, config, stretches) == parts
    assert read == [(lost.file.name, lost.first)]


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_a_file_of_a_bucket_that_changes_during_a_run_is_noticed(
    s3: str, images: Path, tmp_path: Path, change: str
) -> None:
    """What a worker reads must be what the key was made from."""
    bucket = Store(f"{s3}/images")
    for path in images.iterdir():
        bucket._backend.replace(path.name, path.read_bytes())
    config = DataConfig(root=bucket.url, shard_images=10)
    planned = open_source(config).files(SPLITS)
    unlabeled = next(file for file in planned if file.split == "unlabeled")
    if change == "removed":
        bucket.delete("unlabeled.parquet")
        bucket._backend.replace("unlabeled-2.parquet", (images / "val.parquet").read_bytes())
    else:
        write_images(images / "unlabeled.parquet", pngs(30, 77))
        bucket._backend.replace("unlabeled.parquet", (images / "unlabeled.parquet").read_bytes())
    expected = "was replaced while" if change == "replaced" else "is missing"
    with pytest.raises(StoreError, match=rf"unlabeled\.parquet.* {expected}"):
        list(open_source(config).read(unlabeled, 0, 2))
