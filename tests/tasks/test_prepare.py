import os
import tarfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.compute import ComputeConfig, LocalEngine
from storage.artifacts import Manifest, commit
from storage.errors import UserError
from storage.objects import Store
from storage.shards import ShardReader, read_index, read_table, shard_files
from tasks.contract import StageContext, StageResult
from tasks.ingest import DataConfig, fingerprint, open_source, plan_stretches
from tasks.source_parts import sample_key
from tasks.sources import SPLITS
from tests.datasets import HereEngine, prepare_all
from tests.real_images import encoded, image_column, jpeg, picture, png, pngs, write_images, write_splits

NAMES = ("cat", "dog", "owl")
BROKEN = encoded(picture(1, 64, 64), "JPEG")[:900]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A whole data set: 24 labeled images of three classes, 30 unlabeled ones."""
    return write_splits(tmp_path / "images")


class Prepared:
    """The data set of `images`, made once for the tests that only look at it."""

    def __init__(self, folder: Path) -> None:
        self.images, self.store = write_splits(folder / "images"), Store(str(folder / "store"))
        self.result = run(self.store, configure(self.images))
        self.manifest = dataset(self.store, self.result)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("prepared"))


def configure(root: Path, **fields: Any) -> DataConfig:
    return DataConfig(root=str(root), **{"shard_images": 10, **fields})


def run(store: Store, config: DataConfig, processes: int = 0) -> StageResult:
    """Both stages, in that many child processes; 0: in this one."""
    compute = ComputeConfig(processes=processes, task_images=1)
    context = StageContext(store, "k1", LocalEngine(compute) if processes else HereEngine(), compute)
    return prepare_all(context, **dict(config))


def dataset(store: Store, result: StageResult) -> Manifest:
    return commit(
        store,
        Manifest(
            kind="dataset",
            key="k1",
            stage="prepare",
            stage_version=1,
            config={},
            inputs={},
            files=result.files,
            metrics=result.metrics,
        ),
    )


def rejects(store: Store, result: StageResult, split: str) -> list[dict[str, Any]]:
    tables = [read_table(store, f) for f in result.files if f.name.startswith(f"rejects/{split}/")]
    return pa.concat_tables(tables).to_pylist()


def content(result: StageResult) -> dict[str, tuple[str, str]]:
    return {entry.name: (entry.path, entry.sha256) for entry in result.files}


def failure(root: Path, **fields: Any) -> str:
    """The one line of an error that comes before anything is written."""
    store = Store(str(root.parent / "store"))
    with pytest.raises(UserError) as error:
        run(store, configure(root, **fields))
    assert "\n" not in str(error.value)
    assert store.paths("") == []
    return str(error.value)


def test_every_image_is_in_a_shard_with_its_label_size_and_origin(prepared: Prepared) -> None:
    images, store, manifest = prepared.images, prepared.store, prepared.manifest
    assert manifest.metrics["class_names"] == list(NAMES)
    assert manifest.metrics["labeled_per_class"] == [8, 8, 8]
    reader = ShardReader(store, manifest.files_under("shards/"))
    for split, count in zip(SPLITS, (24, 6, 6, 30), strict=True):
        original = pq.read_table(images / f"{split}.parquet").to_pylist()
        rows = read_index(store, manifest, split).to_pylist()
        assert {**manifest.metrics[split], "images": count, "rejected": 0} == manifest.metrics[split]
        assert sorted(row["key"] for row in rows) == [f"{split}-{n:08d}" for n in range(count)]
        for row in rows:
            number = int(row["key"][-8:])
            data = reader.read(row["shard"], row["offset"], row["bytes"], row["sha256"])
            assert data == original[number]["image"]["bytes"]
            assert row["label"] == original[number].get("label", -1)
            assert (row["width"], row["height"]) == (12, 10)
            assert row["source"] == f"{split}.parquet:{number}.png"
    assert [shard.rows for shard in shard_files(manifest, "labeled")] == [10, 10, 4]


def test_tars_hold_the_image_under_its_format_and_the_label_where_there_is_one(store: Store, images: Path) -> None:
    labels = [0, 1, 2, 0, 1, 2]
    formats = [png(1), jpeg(2), encoded(picture(3), "WEBP"), encoded(picture(4), "GIF"), png(5), png(6)]
    write_images(images / "val.parquet", formats, labels)
    manifest = dataset(store, run(store, configure(images)))
    with tarfile.open(store.local_path(shard_files(manifest, "val")[0].path)) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    extensions = ["png", "jpg", "webp", "img", "png", "png"]
    expected = {f"val-{n:08d}.{e}": data for n, (e, data) in enumerate(zip(extensions, formats, strict=True))}
    assert members == {**expected, **{f"val-{n:08d}.cls": str(label).encode() for n, label in enumerate(labels)}}
    with tarfile.open(store.local_path(shard_files(manifest, "unlabeled")[0].path)) as tar:
        assert {Path(name).suffix for name in tar.getnames()} == {".png"}


def test_images_that_cannot_be_decoded_are_listed_with_the_reason(store: Store, images: Path) -> None:
    write_images(images / "unlabeled-0.parquet", [*pngs(20, 5000), BROKEN, b"text", *pngs(30, 6000)])
    write_images(images / "unlabeled-1.parquet", [b"", None])  # a shard without any image
    result = run(store, configure(images))
    assert (result.metrics["unlabeled"]["images"], result.metrics["unlabeled"]["rejected"]) == (80, 4)
    found = rejects(store, result, "unlabeled")
    assert [(r["source"], r["row"]) for r in found] == [
        ("unlabeled-0.parquet:20.png", 20),
        ("unlabeled-0.parquet:21.png", 21),
        ("unlabeled-1.parquet:0.png", 0),
        ("unlabeled-1.parquet:", 1),
    ]
    assert found[0]["reason"].startswith("cannot be decoded: ")
    assert [r["reason"] for r in found[1:]] == ["not an image: unknown format", "empty: 0 bytes", "empty: 0 bytes"]
    manifest = dataset(store, result)
    keys = set(read_index(store, manifest, "unlabeled", ["key"])["key"].to_pylist())
    assert len(keys) == 80
    assert not keys & {sample_key("unlabeled-0.parquet", row) for row in (20, 21)}
    assert all(shard.rows for shard in shard_files(manifest, "unlabeled")), "an empty tar stops a reader"


def test_more_rejects_than_allowed_are_an_error_with_the_first_reasons(store: Store, images: Path) -> None:
    write_images(images / "unlabeled.parquet", [*pngs(17, 5000), BROKEN, b"text", b""])
    with pytest.raises(UserError, match=r"data\.unlabeled: 3 of 20 images cannot be decoded") as error:
        run(store, configure(images))
    assert "data.max_reject_fraction=0.05" in str(error.value)
    assert "unlabeled.parquet:18.png row 18: not an image: unknown format" in str(error.value)
    assert run(store, configure(images, max_reject_fraction=0.15)).metrics["unlabeled"]["rejected"] == 3


def test_a_split_without_any_decodable_image_is_an_error_whatever_is_allowed(store: Store, images: Path) -> None:
    write_images(images / "test.parquet", [b"text"] * 4, [0, 1, 2, 0])
    with pytest.raises(UserError, match=r"data\.test: 4 of 4 images cannot be decoded.*unknown format"):
        run(store, configure(images, max_reject_fraction=1.0))


def test_a_class_that_loses_its_images_to_rejects_is_an_error(store: Store, images: Path) -> None:
    labels = [0] * 20 + [1] * 20 + [2] * 2
    write_images(images / "labeled.parquet", [*pngs(41, 8000), BROKEN], labels, NAMES)
    with pytest.raises(UserError, match=r"class 2 \(owl\) has 1 decodable labeled images"):
        run(store, configure(images))
    assert run(store, configure(images, min_images_per_class=1)).metrics["labeled_per_class"] == [20, 20, 1]


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ([0, 0, 1, 1], NAMES, "class 2 (owl) has 0 images in data.labeled='labeled*.parquet'; at least data.min_images_per_class=2"),
        ([0, 0, 2, 2], None, "class 1 (1) has 0 images"),
        ([0, 0, 1, 1, 2], NAMES, "class 2 (owl) has 1 images"),
        ([0, 0, 1, 1, 2, 2, 3], NAMES, "labeled.parquet: row 6 has label 3, outside the 3 classes 0..2 (1 such rows)"),
        ([0, 0, 1, 1, 2, 2, -1, -1], NAMES, "labeled.parquet: row 6 has label -1, outside the 3 classes 0..2 (2 such rows)"),
        ([0, 0, 0], None, "found one class only"),
        ([0, 0, 2**40], None, "3 images cannot fill the classes 0..1099511627776"),
        ([0, None, 1], NAMES, "labeled.parquet: 1 rows of column 'label' are empty"),
        ([], NAMES, "the files hold no rows"),
    ],
)  # fmt: skip
def test_labels_are_checked_before_an_image_is_read(
    images: Path, labels: list[int | None], names: Sequence[str] | None, expected: str
) -> None:
    write_images(images / "labeled.parquet", pngs(len(labels)), labels, names)
    write_images(images / "val.parquet", pngs(2), [0, 0], names)
    write_images(images / "test.parquet", pngs(2), [0, 0], names)
    assert expected in failure(images)


def test_labels_of_validation_and_test_images_are_checked_too(images: Path) -> None:
    write_images(images / "test.parquet", pngs(3), [0, 1, 3], NAMES)
    assert "test.parquet: row 2 has label 3" in failure(images)


def test_class_names_of_the_config_stand_before_those_of_the_files(prepared: Prepared, images: Path) -> None:
    config = configure(prepared.images, class_names=("a", "b", "c"))
    assert run(prepared.store, config).metrics["class_names"] == ["a", "b", "c"]
    assert "row 16 has label 2, outside the 2 classes" in failure(images, class_names=("a", "b"))
    assert "a class name occurs twice" in failure(images, class_names=("a", "b", "a"))


def test_without_names_classes_are_called_by_their_numbers(store: Store, images: Path) -> None:
    write_images(images / "labeled.parquet", pngs(24), [n % 3 for n in range(24)])
    assert run(store, configure(images)).metrics["class_names"] == ["0", "1", "2"]


def test_a_missing_folder_file_or_pattern_is_named(images: Path) -> None:
    assert "data.root: folder" in failure(images / "nowhere")
    assert "data.val: nothing matches 'valid*.parquet' in" in failure(images, val="valid*.parquet")
    assert "data.test: nothing matches ''" in failure(images, test="")
    assert "nothing matches 'vla.parquet' in" in failure(images, val="vla.parquet")
    assert "-> did you mean val.parquet?" in failure(images, val="vla.parquet")
    (images / "nothing").mkdir()
    assert f"data.val: folder 'nothing' in {images} is empty" in failure(images, val="nothing")
    assert "; there: labeled.parquet, nothing, test.parquet" in failure(images, val="x")
    absolute = str(images / "val.parquet")
    assert f"data.val={absolute!r} is absolute; give it relative to data.root" in failure(images, val=absolute)


def test_files_of_another_form_are_named_with_what_they_hold(images: Path) -> None:
    pq.write_table(pa.table({"img": [1], "label": [0]}), images / "val.parquet")
    assert "val.parquet has no column 'image: struct<bytes, path>' (it has img, label)" in failure(images)
    pq.write_table(pa.table({"image": image_column(pngs(1))}), images / "val.parquet")
    assert "val.parquet has no integer column 'label', which data.val needs (it has image)" in failure(images)
    pq.write_table(pa.table({"image": image_column(pngs(1)), "label": ["cat"]}), images / "val.parquet")
    assert "val.parquet has no integer column 'label'" in failure(images)
    (images / "val.parquet").write_bytes(b"PAR1 no more")
    assert "val.parquet is not a readable Parquet file" in failure(images)


def renamed(path: Path, names: dict[str, str]) -> None:
    """Give the columns of a Parquet file other names, in the metadata too."""
    table = pq.read_table(path)
    metadata = {key: value.replace(b'"label"', b'"fine_label"') for key, value in (table.schema.metadata or {}).items()}
    columns = [names.get(name, name) for name in table.column_names]
    pq.write_table(table.rename_columns(columns).replace_schema_metadata(metadata), path)


def test_the_columns_of_cifar_on_the_hub_are_found(store: Store, images: Path) -> None:
    before = run(store, configure(images))
    for path in images.iterdir():
        renamed(path, {"image": "img", "label": "fine_label"})
        table = pq.read_table(path)
        pq.write_table(table.append_column("coarse_label", pa.array([0] * len(table))), path)
    after = run(Store(store.url + "-other"), configure(images))
    assert after.metrics == before.metrics


def test_columns_may_be_named_and_another_column_is_another_part(store: Store, images: Path) -> None:
    path = images / "unlabeled.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("mask", image_column(pngs(30, 70))), path)
    plain = dataset(store, run(store, configure(images)))
    masks = run(store, configure(images, image_column="image")).files
    assert masks == plain.files
    config = configure(images, image_column="mask")
    images_of = [raw.data for raw in open_source(config).read(open_source(config).files(["unlabeled"])[0], 0, 2)]
    assert images_of == pngs(2, 70)
    keys = [
        {stretch.part_key() for stretch in plan_stretches(own, open_source(own).files(["unlabeled"]))}
        for own in (configure(images), config)
    ]
    assert keys[0].isdisjoint(keys[1])
    assert "labeled.parquet has no column 'mask: struct<bytes, path>'" in failure_of(store, config)
    assert "labeled.parquet has no integer column 'coarse'" in failure_of(
        store, configure(images, label_column="coarse")
    )


def failure_of(store: Store, config: DataConfig) -> str:
    with pytest.raises(UserError) as error:
        run(store, config)
    return str(error.value)


def test_file_names_with_spaces_brackets_and_other_alphabets_work(store: Store, tmp_path: Path) -> None:
    root = write_splits(tmp_path / "Bilder und 猫")
    (root / "sub folder").mkdir()
    (root / "unlabeled.parquet").rename(root / "sub folder" / "größe 1 [2].parquet")
    manifest = dataset(store, run(store, configure(root, unlabeled="sub folder/größe 1 [2].parquet")))
    rows = read_index(store, manifest, "unlabeled").to_pylist()
    assert len({row["key"] for row in rows}) == 30
    assert all(row["key"].isascii() and not set(row["key"]) & set(" ./[]") for row in rows)
    assert rows[0]["source"] == "sub folder/größe 1 [2].parquet:0.png"
    assert run(store, configure(root, unlabeled="sub folder")).files == manifest.files, "a folder means all its files"


def test_files_whose_safe_names_collide_have_keys_of_their_own(store: Store, images: Path) -> None:
    (images / "unlabeled.parquet").unlink()
    names = ["unlabeled a.parquet", "unlabeled_a.parquet", "unlabeled.a.parquet", "unlabeledüa.parquet"]
    for number, name in enumerate(names):
        write_images(images / name, pngs(3, 100 * number))
    manifest = dataset(store, run(store, configure(images)))
    keys = read_index(store, manifest, "unlabeled", ["key"])["key"].to_pylist()
    assert len(set(keys)) == len(keys) == 12


def test_a_new_file_keeps_the_shards_of_the_files_that_were_there(prepared: Prepared, images: Path) -> None:
    store, before = prepared.store, content(prepared.result)
    assert fingerprint(open_source(configure(images)).files(SPLITS)) == fingerprint(
        open_source(configure(prepared.images)).files(SPLITS)
    )
    write_images(images / "unlabeled-more.parquet", pngs(5, 9000))
    after = content(run(store, configure(images)))
    kept = [name for name in before if "unlabeled" not in name and name != "leaks.parquet"]
    assert kept
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    old_shards = {value for name, value in before.items() if name.startswith(("shards/unlabeled", "index/unlabeled"))}
    new_shards = {value for name, value in after.items() if name.startswith(("shards/unlabeled", "index/unlabeled"))}
    assert old_shards < new_shards
    assert len(new_shards - old_shards) == 2, "one tar and its index"


def test_a_touched_or_moved_file_is_the_same_data(prepared: Prepared, images: Path) -> None:
    for path in images.iterdir():
        os.utime(path, (1, 1))
    here, there = configure(prepared.images), configure(images)
    assert fingerprint(open_source(there).files(SPLITS)) == fingerprint(open_source(here).files(SPLITS))
    parts = prepared.store.paths("parts")
    assert run(prepared.store, there) == prepared.result
    assert prepared.store.paths("parts") == parts


def test_changed_bytes_are_other_data(images: Path) -> None:
    config = configure(images)
    identity = fingerprint(open_source(config).files(SPLITS))
    write_images(images / "unlabeled.parquet", pngs(30, 9000))
    assert fingerprint(open_source(config).files(SPLITS)) != identity


def test_three_processes_make_the_same_bytes_as_one(prepared: Prepared, store: Store) -> None:
    three = run(store, configure(prepared.images), processes=3)
    assert len(shard_files(prepared.manifest, "labeled")) + len(shard_files(prepared.manifest, "unlabeled")) == 6
    assert three == prepared.result


def test_finished_shards_are_not_made_again(prepared: Prepared) -> None:
    store = prepared.store
    before = {path: store.local_path(path).stat().st_mtime_ns for path in store.paths("parts")}
    assert run(store, configure(prepared.images)) == prepared.result
    assert {path: store.local_path(path).stat().st_mtime_ns for path in store.paths("parts")} == before


def test_labeled_images_are_shuffled_over_all_shards_and_files(store: Store, images: Path) -> None:
    (images / "labeled.parquet").unlink()
    for number in range(3):  # as class folders come: one class a file
        write_images(images / f"labeled-{number}.parquet", pngs(30, 1000 * number), [number] * 30, NAMES)
    manifest = dataset(store, run(store, configure(images, shard_images=30)))
    table = read_index(store, manifest, "labeled")
    by_shard = [[row["label"] for row in rows] for _, rows in groupby(table.to_pylist(), key=lambda row: row["shard"])]
    assert [len(labels) for labels in by_shard] == [30, 30, 30]
    for labels in by_shard:
        assert np.bincount(labels, minlength=3).min() >= 3
        longest = max(len(list(block)) for _, block in groupby(labels))
        assert longest <= 8, f"a block of {longest} images of one class"
    other = run(store, configure(images, shard_images=30, seed=1))
    assert {f.sha256 for f in other.files if f.name.startswith("shards/labeled")}.isdisjoint(
        {f.sha256 for f in shard_files(manifest, "labeled")}
    ), "the seed chooses the order"


def test_unlabeled_images_stay_in_the_order_of_their_files(prepared: Prepared) -> None:
    keys = read_index(prepared.store, prepared.manifest, "unlabeled", ["key"])["key"].to_pylist()
    assert keys == [f"unlabeled-{n:08d}" for n in range(30)]


def test_one_file_in_two_splits_makes_a_shuffled_and_a_plain_shard(store: Store, images: Path) -> None:
    manifest = dataset(store, run(store, configure(images, val="labeled.parquet", shard_images=100)))
    labeled = read_index(store, manifest, "labeled", ["key"])["key"].to_pylist()
    val = read_index(store, manifest, "val", ["key"])["key"].to_pylist()
    assert val == sorted(labeled)
    assert val != labeled
