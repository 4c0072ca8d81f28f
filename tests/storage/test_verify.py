import pytest

from storage.artifacts import find, find_part, get, list_artifacts, manifest_path
from storage.errors import StoreError
from storage.objects import Store, sealed
from storage.runs import set_ref
from storage.verify import Kind, Problem, discard_broken, verify_all, verify_artifact
from tests.fault_proxy import FaultProxy
from tests.storage.conftest import overwrite
from tests.storage.small_store import NUMERICS, make_artifact, make_checkpoint, make_lineage, make_part, make_run


def test_a_whole_store_is_found_whole(store: Store) -> None:
    make_run(store, "cats", make_lineage(store))
    make_checkpoint(store, "student", "a1")
    verdict = verify_all(store)
    assert verdict.problems == []
    assert (verdict.artifacts, verdict.files) == (4, 5)
    assert verdict.records == 4 + 1 + 1 + 4  # manifests, marker, run, refs
    assert verdict.bytes == sum(info.bytes for info in store.infos("") if info.path.endswith((".bin", ".parquet")))


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        ("missing", "is missing"),
        ("short", "has 3 bytes instead of"),
        ("altered", "is altered"),
    ],
)
def test_a_file_that_is_not_as_written_is_named_with_all_that_need_it(store: Store, damage: str, what: str) -> None:
    lineage = make_lineage(store)
    shared = lineage["labels"].file("rows.parquet")
    other = make_artifact(store, "evaluation", "shares", {}, shared.model_copy(update={"name": "other-name.parquet"}))
    data = store.read_bytes(shared.path)
    if damage == "missing":
        store.delete(shared.path)
    else:
        overwrite(store, shared.path, data[:3] if damage == "short" else b"X" + data[1:])
    for verdict in (verify_all(store), verify_artifact(store, other), verify_artifact(store, lineage["labels"])):
        (problem,) = verdict.problems
        assert problem.path == shared.path
        assert what in problem.what
    assert verify_all(store).problems[0].needed_by == ("evaluation shares", "labels labels")
    assert verify_artifact(store, lineage["teacher"]).problems == []


@pytest.mark.parametrize(
    "path", ["artifacts/model/student/manifest.json", "runs/cats/1.json", "refs/cats/student/@1.json"]
)
def test_an_edited_record_is_named(store: Store, path: str) -> None:
    make_run(store, "cats", make_lineage(store))
    overwrite(store, path, store.read_bytes(path).replace(b"student", b"studant", 1))
    assert [(p.path, "not as it was written" in p.what) for p in verify_all(store).problems if p.path == path] == [
        (path, True)
    ]


def test_an_edited_marker_of_a_part_is_named(store: Store) -> None:
    make_lineage(store)
    (path,) = [path for path in store.paths("parts") if path.endswith(".json")]
    overwrite(store, path, b"{}")
    assert [problem.path for problem in verify_all(store).problems] == [path]


def test_refs_and_inputs_that_lead_nowhere_are_named(store: Store) -> None:
    set_ref(store, "cats/1/student", "model", "no-such-key")
    make_artifact(store, "model", "orphan", {"data": "no-such-data"})
    assert verify_all(store).problems == [
        Problem(Kind.dangling, manifest_path("model", "orphan"), "names data no-such-data, which is not in the store"),
        Problem(Kind.dangling, "refs/cats/1/student/@1.json", "points at model no-such-key, which is not in the store"),
    ]


def test_what_was_discarded_can_be_made_anew_and_is_whole_again(store: Store) -> None:
    lineage = make_lineage(store)
    make_run(store, "cats", lineage)
    shared = lineage["labels"].file("rows.parquet")
    original = store.read_bytes(shared.path)
    overwrite(store, shared.path, b"X" + original[1:])
    own = lineage["teacher"].file("a.bin")
    overwrite(store, own.path, b"")
    discarded = discard_broken(store, verify_all(store))
    assert discarded == ["labels labels", "model teacher", "part predict part"]
    assert find(store, "labels", "labels") is None
    assert find_part(store, "predict", "part", NUMERICS) is None
    assert find(store, "model", "student") is not None, "an artifact that is whole stays"
    part = make_part(store, "part", original)
    make_artifact(store, "model", "teacher", lineage["teacher"].inputs)
    make_artifact(store, "labels", "labels", lineage["labels"].inputs, *part.files)
    assert get(store, "labels", "labels").files == lineage["labels"].files
    assert verify_all(store).problems == []


def test_a_damaged_manifest_can_be_discarded(store: Store) -> None:
    lineage = make_lineage(store)
    path = manifest_path("model", "student")
    overwrite(store, path, store.read_bytes(path)[:-40])
    verdict = verify_all(store)
    assert [problem.path for problem in verdict.problems] == [path]
    discard_broken(store, verdict)
    assert find(store, "model", "student") is None
    make_artifact(store, "model", "student", lineage["student"].inputs)
    assert verify_all(store).problems == []


def test_progress_reaches_the_total(store: Store) -> None:
    make_lineage(store)
    seen: list[tuple[int, int]] = []
    verdict = verify_all(store, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (verdict.bytes, verdict.bytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_store_of_a_newer_version_is_not_judged(store: Store) -> None:
    overwrite(store, "store.json", sealed({"format": 2}))
    with pytest.raises(StoreError, match="update the program"):
        verify_all(store)


def test_what_cannot_be_read_this_time_is_named_and_never_discarded(
    s3_store: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    lineage = make_lineage(s3_store)
    own = lineage["teacher"].file("a.bin")
    behind = Store(s3_store.url)
    monkeypatch.setattr("storage.s3.PATIENCE_S", 0.5)
    proxy.do("503", method="GET", path="model/teacher/a-", times=1000)  # not its listing
    verdict = verify_all(behind)
    proxy.clear()
    assert [(p.kind, p.path) for p in verdict.problems] == [(Kind.unreadable, own.path)]
    assert "cannot be read now" in verdict.problems[0].what
    assert discard_broken(behind, verdict) == []
    assert verify_all(s3_store).problems == []


def test_a_byte_that_is_flipped_while_hashing_is_no_damage(s3_store: Store, proxy: FaultProxy) -> None:
    lineage = make_lineage(s3_store)
    make_run(s3_store, "cats", lineage)
    fault = proxy.do("flip", method="GET", path="model/teacher/a-")
    assert verify_all(Store(s3_store.url)).problems == []
    assert fault.done == 1


def test_a_damaged_manifest_takes_no_descendant_with_it(store: Store) -> None:
    lineage = make_lineage(store)
    path = manifest_path("dataset", "data")
    overwrite(store, path, store.read_bytes(path)[:-40])
    overwrite(store, lineage["teacher"].file("a.bin").path, b"short")
    verdict = verify_all(store)
    assert [(p.kind, p.path) for p in verdict.problems] == [
        (Kind.record, path),
        (Kind.file, lineage["teacher"].file("a.bin").path),
    ]
    assert discard_broken(store, verdict) == ["model teacher", "dataset data"]
    assert {manifest.key for manifest in list_artifacts(store)} == {"labels", "student"}
