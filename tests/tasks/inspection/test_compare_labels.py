from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from models.predictions import predictions_table
from storage.artifacts import Manifest, artifact_folder, commit, publish_file
from storage.errors import UserError
from storage.objects import Store
from storage.shards import read_tables, write_parquet
from tasks.inspection.compare_labels import diff_labels

NAMES = ["cat", "dog", "owl"]


def labels(store: Store, key: str, keys: list[str], seed: int, files: int = 3, names: list[str] = NAMES) -> Manifest:
    """A label artifact of some keys, cut into files."""
    probabilities = np.random.default_rng(seed).dirichlet(np.ones(len(names)), len(keys)).astype(np.float32)
    entries = []
    for number, places in enumerate(np.array_split(np.arange(len(keys)), files)):
        with store.staging() as folder:
            table = predictions_table([keys[place] for place in places], probabilities[places])
            write_parquet(folder / "p.parquet", table)
            name = f"predictions/unlabeled/{number:05d}.parquet"
            entries.append(publish_file(store, artifact_folder("labels", key), name, folder / "p.parquet", len(table)))
    return Manifest(
        kind="labels", key=key, stage="label", stage_version=1, config={}, inputs={}, files=tuple(entries), metrics={"class_names": names}
    )  # fmt: skip


def rows_of(store: Store, manifest: Manifest) -> dict[str, tuple[int, float]]:
    rows = [row for table in read_tables(store, manifest.files) for row in table.to_pylist()]
    return {row["key"]: (row["label"], row["confidence"]) for row in rows}


def test_the_difference_is_that_of_a_join_by_hand(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    a = labels(store, "a", [f"k{n}" for n in range(200)], seed=1)
    b = labels(store, "b", [f"k{n}" for n in range(250, 20, -1)], seed=2, files=5)
    found = diff_labels(store, a, b, 0.6)
    before, after = rows_of(store, a), rows_of(store, b)
    both = sorted(before.keys() & after.keys())
    assert (found.images, found.only_in_a, found.only_in_b) == (len(both), 21, 51)
    assert found.flipped == sum(before[k][0] != after[k][0] for k in both)
    assert found.shift == pytest.approx(np.mean([after[k][1] - before[k][1] for k in both]))
    assert found.won == sum(after[k][1] >= 0.6 > before[k][1] for k in both)
    assert found.lost == sum(before[k][1] >= 0.6 > after[k][1] for k in both)
    assert found.won_keys == found.lost_keys == [], "not asked for"
    named = diff_labels(store, a, b, 0.6, with_keys=True)
    assert named.won_keys == [k for k in both if after[k][1] >= 0.6 > before[k][1]]
    assert named.lost_keys == [k for k in both if before[k][1] >= 0.6 > after[k][1]]
    assert min(named.won, named.lost) > 5
    flips = {(row["from_class"], row["to_class"]): row["images"] for row in found.flips}
    expected: dict[tuple[str, str], int] = {}
    for k in both:
        pair = NAMES[before[k][0]], NAMES[after[k][0]]
        if pair[0] != pair[1]:
            expected[pair] = expected.get(pair, 0) + 1
    assert flips == expected
    assert [row["images"] for row in found.flips] == sorted(expected.values(), reverse=True)
    assert sum(row["flipped"] for row in found.per_class) == found.flipped
    assert {row["class_name"]: row["images"] for row in found.per_class} == {
        name: sum(before[k][0] == n for k in both) for n, name in enumerate(NAMES)
    }


def data_set(store: Store, key: str, images: dict[str, str]) -> Manifest:
    """A data set of unlabeled images: key -> sha256."""
    with store.staging() as folder:
        write_parquet(folder / "i.parquet", pa.table({"key": list(images), "sha256": list(images.values())}))
        name = "index/unlabeled/00000.parquet"
        entry = publish_file(store, artifact_folder("dataset", key), name, folder / "i.parquet", len(images))
    facts = {"stage": "unlabeled", "stage_version": 1, "config": {}, "inputs": {}}
    return commit(store, Manifest(kind="dataset", key=key, files=(entry,), **facts))


def test_a_key_that_names_another_image_now_is_no_flip(tmp_path: Path) -> None:
    """unlabeled.parquet was replaced: row 17 is another picture, with the key of the old one."""
    store, keys = Store(str(tmp_path)), [f"unlabeled-{n:08d}" for n in range(60)]
    data_set(store, "old", {key: f"{key} old" for key in keys})
    data_set(store, "new", {key: f"{key} {'old' if n < 20 else 'new'}" for n, key in enumerate(keys[:50])})
    a, b = labels(store, "a", keys, seed=1), labels(store, "b", keys[:50], seed=2)
    a, b = (m.model_copy(update={"inputs": {"data": data}}) for m, data in ((a, "old"), (b, "new")))
    found = diff_labels(store, a, b, 0.6, with_keys=True)
    assert (found.images, found.changed, found.only_in_a, found.only_in_b) == (20, 30, 10, 0)
    before, after = rows_of(store, a), rows_of(store, b)
    assert found.flipped == sum(before[k][0] != after[k][0] for k in keys[:20])
    assert found.flipped == sum(row["images"] for row in found.flips) == sum(row["flipped"] for row in found.per_class)
    assert {*found.won_keys, *found.lost_keys} <= {*keys[:20]}


def test_labels_of_other_classes_and_what_are_no_labels_are_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    a = labels(store, "a", ["k1", "k2", "k3"], seed=1)
    with pytest.raises(UserError, match="other classes"):
        diff_labels(store, a, labels(store, "b", ["k1", "k2", "k3"], seed=1, names=["cat", "dog", "emu"]), 0.3)
    with pytest.raises(UserError, match="no label artifact but of kind model"):
        diff_labels(store, a.model_copy(update={"kind": "model"}), a, 0.3)
