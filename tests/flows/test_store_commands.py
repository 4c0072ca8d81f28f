"""The commands that look after a store, as people type them."""

import json
from pathlib import Path

import pytest

from storage.artifacts import Manifest, commit, list_artifacts
from storage.leases import at_work
from storage.objects import Store
from storage.runs import set_ref
from tests.flows.runs import nst
from tests.storage.small_store import make_checkpoint, make_lineage, make_run


@pytest.fixture
def place(tmp_path: Path) -> str:
    """A store with a run of four artifacts and the leftover of a crash."""
    store = Store(str(tmp_path / "store"))
    make_run(store, "cats", make_lineage(store))
    make_checkpoint(store, "never-committed", "a1")
    return str(tmp_path / "store")


def test_verify_names_what_is_broken_and_discard_takes_it_back(place: str, tmp_path: Path) -> None:
    store = Store(place)
    broken = next(m for m in list_artifacts(store) if m.key == "teacher").files[0].path
    store.local_path(broken).write_bytes(b"short")
    printed = nst("verify", "--all", "--store", place, cwd=tmp_path, code=1)
    assert f"{broken} has 5 bytes instead of" in printed
    assert "needed by model teacher" in printed
    assert "1 problems in 4 artifacts" in printed
    found = json.loads(nst("verify", "cats/teacher", "--json", "--store", place, cwd=tmp_path, code=1))
    assert [problem["path"] for problem in found["problems"]] == [broken]
    assert "all is as it was written" in nst("verify", "cats/student", "--store", place, cwd=tmp_path)
    assert "discarded: model teacher" in nst("verify", "--all", "--discard", "--store", place, cwd=tmp_path)
    assert "all is as it was written: 3 artifacts" in nst("verify", "--all", "--store", place, cwd=tmp_path)


@pytest.mark.parametrize("line", [["verify"], ["verify", "cats/teacher", "--all"]])
def test_verify_asks_for_one_ref_or_all(place: str, tmp_path: Path, line: list[str]) -> None:
    assert "give one ref to verify, or --all" in nst(*line, "--store", place, cwd=tmp_path, code=2)


def test_gc_shows_then_deletes_and_waits_for_work_to_end(place: str, tmp_path: Path) -> None:
    before = Store(place).paths("")
    printed = nst("gc", "--days", "0", "--store", place, cwd=tmp_path)
    assert "artifacts that were never committed: 1 (1 objects, 7 bytes)" in printed
    assert "model never-committed  7 bytes" in printed
    assert "would be deleted; --delete does it; 4 artifacts kept" in printed
    assert "0 bytes older than 7 days would be deleted" in nst("gc", "--store", place, cwd=tmp_path)
    assert Store(place).paths("") == before
    with at_work(Store(place), "cats"):
        printed = nst("gc", "--days", "0", "--delete", "--store", place, cwd=tmp_path)
    assert "1 more were left, because work is going on: cats (" in printed
    assert Store(place).paths("") == before
    found = json.loads(nst("gc", "--days", "0", "--delete", "--json", "--store", place, cwd=tmp_path))
    assert [garbage["name"] for garbage in found["garbage"]] == ["model never-committed"]
    assert len(Store(place).paths("")) == len(before) - 1


def test_a_report_is_saved_once_and_only_a_model_is_exported(place: str, tmp_path: Path) -> None:
    assert "has no report yet" in nst("report", "cats", "--store", place, cwd=tmp_path, code=2)
    printed = nst("export", "cats/data", "folder", "--store", place, cwd=tmp_path, code=2)
    assert "cats/data is no model but of kind dataset" in printed
    assert json.loads(nst("show", "cats/student", "--store", place, cwd=tmp_path))["key"] == "student"


def test_a_store_is_listed_with_the_refs_and_a_key_is_as_good_as_a_ref(tmp_path: Path) -> None:
    store, keys = Store(str(tmp_path / "store")), ["ab" * 16, "abab" + "cd" * 14]
    for number, key in enumerate(keys):
        commit(
            store, Manifest(kind="dataset", key=key, stage="prepare", stage_version=1, config={}, inputs={}, files=())
        )
        set_ref(store, "cats/data", "dataset", key)
        assert f"{key[:12]}  cats/data " in nst("ls", "--store", str(store.root), cwd=tmp_path), number
    listed = json.loads(nst("ls", "--json", "--store", str(store.root), cwd=tmp_path))
    assert {row["key"]: row["refs"] for row in listed} == {keys[0]: ["cats/data@1"], keys[1]: ["cats/data"]}
    shown = json.loads(nst("show", keys[0][:12], "--store", str(store.root), cwd=tmp_path))
    assert shown["key"] == keys[0]
    store_of = ("--store", str(store.root))
    assert "no ref 'abcabc'" in nst("show", "abcabc", *store_of, cwd=tmp_path, code=2)
    commit(
        store,
        Manifest(
            kind="labels", key="ababab" + "ef" * 13, stage="label", stage_version=1, config={}, inputs={}, files=()
        ),
    )
    assert "2 keys begin with ababab; give more digits" in nst("show", "ababab", *store_of, cwd=tmp_path, code=2)
