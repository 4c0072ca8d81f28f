import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from storage.artifacts import (
    FileEntry,
    Manifest,
    agree_numerics,
    agreed_numerics,
    artifact_folder,
    attempts_folder,
    commit,
    discard_attempt,
    find,
    find_part,
    get,
    list_artifacts,
    publish_file,
    publish_part,
)
from storage.errors import StoreError
from storage.objects import Store, sealed, unsealed
from storage.shards import index_name
from tests.storage.conftest import overwrite

FLOAT, HALF = {"dtype": "float32"}, {"dtype": "bfloat16"}


def publish(store: Store, key: str, name: str, data: bytes) -> FileEntry:
    """A file of the artifact `dataset KEY`, in the store."""
    with store.staging() as folder:
        (folder / "file").write_bytes(data)
        return publish_file(store, artifact_folder("dataset", key), name, folder / "file")


def manifest(key: str, *files: FileEntry, **fields: Any) -> Manifest:
    return Manifest(
        kind="dataset", key=key, stage="prepare", stage_version=1, config={}, inputs={}, files=files, **fields
    )


def part(store: Store, folder: Path, data: bytes, numerics: dict[str, Any]) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows").write_bytes(data)
    return publish_part(store, "predict", "k1", numerics, {"rows.parquet": (folder / "rows", 3)}, {"mean": 0.5})


def test_an_artifact_is_found_only_after_its_commit(store: Store) -> None:
    entry = publish(store, "k1", "shards/train/00000.tar", b"images")
    assert find(store, "dataset", "k1") is None
    assert list_artifacts(store) == []
    committed = commit(store, manifest("k1", entry, metrics={"images": 1}))
    assert find(store, "dataset", "k1") == get(store, "dataset", "k1") == committed
    assert list_artifacts(store) == [committed]
    assert store.read_verified(entry.path, entry.sha256) == b"images"


def test_a_reader_sees_a_whole_artifact_or_none(store: Store) -> None:
    keys, finished, seen, broken = [f"k{n}" for n in range(40)], threading.Event(), set(), []

    def read() -> None:
        while True:
            last_look = finished.is_set()
            for key in keys:
                found = find(store, "dataset", key)
                if found is None:
                    continue
                seen.add(key)
                for entry in found.files:
                    if hashlib.sha256(store.read_bytes(entry.path)).hexdigest() != entry.sha256:
                        broken.append(entry.path)
            if last_look:
                return

    reader = threading.Thread(target=read)
    reader.start()
    for key in keys:
        commit(store, manifest(key, *(publish(store, key, f"shards/{n}.tar", f"{key} {n}".encode()) for n in range(4))))
    finished.set()
    reader.join()
    assert seen == set(keys)
    assert broken == []


def test_concurrent_commits_end_with_one_manifest_that_all_callers_get(store: Store) -> None:
    for number in range(10 if store.root else 2):  # SeaweedFS takes seconds for six at once
        key, barrier = f"k{number}", threading.Barrier(6)

        def attempt(name: int, key: str = key, barrier: threading.Barrier = barrier) -> Manifest:
            entry = publish(store, key, "model.bin", f"bits of attempt {name}".encode())
            barrier.wait()
            return commit(store, manifest(key, entry, metrics={"attempt": name}))

        with ThreadPoolExecutor(6) as pool:
            results = list(pool.map(attempt, range(6)))
        assert len({found.model_dump_json() for found in results}) == 1
        standing = get(store, "dataset", key)
        assert results[0] == standing
        entry = standing.file("model.bin")
        assert (
            store.read_verified(entry.path, entry.sha256) == f"bits of attempt {standing.metrics['attempt']}".encode()
        )


def test_commit_refuses_a_missing_file(store: Store) -> None:
    entry = publish(store, "k1", "a.bin", b"data")
    store.delete(entry.path)
    with pytest.raises(StoreError, match=f"{entry.path} is missing"):
        commit(store, manifest("k1", entry))
    assert find(store, "dataset", "k1") is None


def test_commit_refuses_a_short_file(store: Store) -> None:
    entry = publish(store, "k1", "a.bin", b"data")
    overwrite(store, entry.path, b"dat")
    with pytest.raises(StoreError, match=f"{entry.path} has 3 bytes instead of 4"):
        commit(store, manifest("k1", entry))
    assert find(store, "dataset", "k1") is None


def test_commit_refuses_two_files_of_one_name(store: Store) -> None:
    entries = [publish(store, "k1", "a.bin", data) for data in (b"one", b"two")]
    with pytest.raises(StoreError, match="two files have one name"):
        commit(store, manifest("k1", *entries))
    assert find(store, "dataset", "k1") is None


def test_files_of_one_name_and_other_bytes_never_overwrite_each_other(store: Store) -> None:
    first, second = publish(store, "k1", "a.bin", b"one"), publish(store, "k1", "a.bin", b"two")
    assert first.path != second.path
    assert [store.read_verified(e.path, e.sha256) for e in (first, second)] == [b"one", b"two"]
    assert publish(store, "k1", "a.bin", b"one") == first


def resealed(**changes: Any) -> Any:
    """A change of fields under a seal that fits: what another version of the program would write."""
    return lambda data: sealed({**unsealed(data), **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[: len(data) // 2], "not as it was written.*edited by hand"),
        (lambda data: b"[]", "not as it was written"),
        (lambda data: data.replace(b'"files"', b'"fils"'), "not as it was written"),
        (lambda data: data.replace(b'"bytes": 4', b'"bytes": 5'), "not as it was written.*its seal does not fit"),
        (resealed(schema_version="1?"), "is no manifest"),
        (resealed(schema_version=3, colour="red"), "schema version 3.*reads up to 2; update"),
        (resealed(key="k2"), "names dataset k2; was it copied"),
    ],
    ids=["cut", "list", "field", "number", "version-text", "newer", "copied"],
)
def test_a_manifest_that_cannot_be_trusted_is_named(store: Store, change: Any, message: str) -> None:
    commit(store, manifest("k1", publish(store, "k1", "a.bin", b"data")))
    path = "artifacts/dataset/k1/manifest.json"
    overwrite(store, path, change(store.read_bytes(path)))
    with pytest.raises(StoreError, match=message) as error:
        find(store, "dataset", "k1")
    assert path in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_artifact_or_file_is_named(store: Store) -> None:
    with pytest.raises(StoreError, match=r"dataset k1 is not in .*run the stage"):
        get(store, "dataset", "k1")
    committed = commit(store, manifest("k1", publish(store, "k1", "a.bin", b"data")))
    with pytest.raises(StoreError, match=r"dataset k1 has no file 'b\.bin'"):
        committed.file("b.bin")


def test_files_of_a_prefix_come_in_the_order_of_their_names(store: Store) -> None:
    names = ["shards/b/1.tar", "shards/a/2.tar", "index/a/1.parquet", "shards/a/1.tar"]
    files = [publish(store, "k1", name, name.encode()) for name in names]
    found = manifest("k1", *files).files_under("shards/")
    assert [entry.name for entry in found] == ["shards/a/1.tar", "shards/a/2.tar", "shards/b/1.tar"]


def test_a_published_part_is_found_with_its_rows_and_facts(store: Store, tmp_path: Path) -> None:
    assert find_part(store, "predict", "k1", FLOAT) is None
    published = part(store, tmp_path, b"rows", FLOAT)
    found = find_part(store, "predict", "k1", FLOAT)
    assert found == published
    assert (found.file("rows.parquet").rows, found.facts) == (3, {"mean": 0.5})
    assert store.read_bytes(found.file("rows.parquet").path) == b"rows"


def test_other_numerics_make_another_part(store: Store, tmp_path: Path) -> None:
    first = part(store, tmp_path, b"rows", FLOAT)
    assert find_part(store, "predict", "k1", HALF) is None
    second = part(store, tmp_path, b"rounded rows", HALF)
    assert find_part(store, "predict", "k1", FLOAT) == first
    assert find_part(store, "predict", "k1", HALF) == second
    assert first.files != second.files


def test_the_order_in_which_numerics_are_written_does_not_matter(store: Store, tmp_path: Path) -> None:
    published = part(store, tmp_path, b"rows", {"dtype": "float32", "batch": 64})
    assert find_part(store, "predict", "k1", {"batch": 64, "dtype": "float32"}) == published


def test_of_concurrent_attempts_at_a_part_one_stands_and_all_get_it(store: Store, tmp_path: Path) -> None:
    barrier = threading.Barrier(6)

    def attempt(number: int) -> Any:
        barrier.wait()
        return part(store, tmp_path / str(number), f"rows {number}".encode(), FLOAT)

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(attempt, range(6)))
    assert len({found.model_dump_json() for found in results}) == 1
    assert find_part(store, "predict", "k1", FLOAT) == results[0]


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_a_part_whose_file_vanished_says_what_to_delete(store: Store, tmp_path: Path, damage: str) -> None:
    entry = part(store, tmp_path, b"rows", FLOAT).file("rows.parquet")
    store.delete(entry.path) if damage == "gone" else overwrite(store, entry.path, b"ro")
    with pytest.raises(
        StoreError, match=rf"{entry.path} is missing.*delete parts/predict/k1/.*\.json and run"
    ) as error:
        find_part(store, "predict", "k1", FLOAT)
    store.delete(str(error.value).split("delete ")[1].split(" and run")[0])
    assert find_part(store, "predict", "k1", FLOAT) is None, "the remedy does not help"
    part(store, tmp_path, b"rows", FLOAT)
    assert find_part(store, "predict", "k1", FLOAT) is not None


def test_a_damaged_marker_is_named(store: Store, tmp_path: Path) -> None:
    part(store, tmp_path, b"rows", FLOAT)
    marker = next(path for path in store.paths("parts") if path.endswith(".json"))
    overwrite(store, marker, b'{"stage": "predict"}')
    with pytest.raises(StoreError, match=marker):
        find_part(store, "predict", "k1", FLOAT)


def test_the_numerics_that_were_probed_first_stand(store: Store) -> None:
    assert agree_numerics(store, "model", "k1", FLOAT) == FLOAT
    assert agree_numerics(store, "model", "k1", HALF) == FLOAT
    assert agree_numerics(store, "model", "k2", HALF) == HALF


def test_numerics_that_made_nothing_are_replaced_unless_somebody_was_faster(store: Store) -> None:
    whole = {"dtype": "float64"}
    assert agree_numerics(store, "model", "k1", FLOAT) == FLOAT
    assert agree_numerics(store, "model", "k1", HALF, instead_of=FLOAT) == HALF
    assert agree_numerics(store, "model", "k1", whole, instead_of=FLOAT) == HALF, "another attempt has replaced them"
    assert agreed_numerics(store, "model", "k1") == HALF


def test_a_discarded_attempt_leaves_the_artifact_and_other_attempts(store: Store) -> None:
    entry = publish(store, "k1", "a.bin", b"data")
    for name in ("a1", "a2"):
        store.create(f"{attempts_folder('dataset', 'k1')}/{name}/step-5.pt", b"checkpoint")
    commit(store, manifest("k1", entry))
    discard_attempt(store, "dataset", "k1", "a1")
    left = [path.removeprefix("artifacts/dataset/k1/") for path in store.paths("artifacts/dataset/k1")]
    assert left == [entry.path.rsplit("/", 1)[1], "attempts/a2/step-5.pt", "manifest.json"]


def test_more_than_99_999_files_of_a_split_keep_their_order() -> None:
    """Labels and data are matched by place, so both must be in the order in which they were made."""
    numbers = list(range(100_001))
    names = [
        f"{kind}/unlabeled/{n:05d}.{ext}" for kind, ext in (("shards", "tar"), ("index", "parquet")) for n in numbers
    ]
    entry = FileEntry(name="", path="p", bytes=1, sha256="0" * 64)
    made = manifest("k1").model_copy(
        update={"files": tuple(entry.model_copy(update={"name": n}) for n in reversed(names))}
    )
    found = [made.files_under(f"{kind}/") for kind in ("shards", "index")]
    assert list(found[1]) == made.files_named(index_name(shard) for shard in found[0])
    assert [[int(f.name.split("/")[-1].split(".")[0]) for f in files] for files in found] == [numbers, numbers]
