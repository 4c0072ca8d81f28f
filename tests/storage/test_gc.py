import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import storage.leases
from storage.artifacts import SCHEMA_VERSION, commit, find, find_part, list_artifacts
from storage.errors import StoreError, UserError
from storage.gc import Kind, collect, reachable, survey
from storage.leases import SWEEP, at_work, sweeping
from storage.objects import Store
from storage.runs import set_ref
from storage.verify import verify_all
from tests.storage.small_store import NUMERICS, make_artifact, make_checkpoint, make_lineage, make_part, make_run


def kinds(store: Store, days: float = 0, keep_runs: int = 0) -> dict[Kind, list[str]]:
    """What a dry run names."""
    found: dict[Kind, list[str]] = {}
    for garbage in survey(store, days, keep_runs).garbage:
        found.setdefault(garbage.kind, []).append(garbage.name)
    return found


def test_a_store_in_which_everything_is_needed_has_no_garbage(store: Store) -> None:
    make_run(store, "cats", make_lineage(store))
    before = store.infos("")
    assert kinds(store) == {}
    sweep = collect(store, days=0)
    assert (sweep.garbage, sweep.kept_artifacts) == ([], 4)
    assert store.infos("") == before


def test_a_dry_run_changes_nothing(store: Store) -> None:
    make_lineage(store)
    before = store.infos("")
    assert kinds(store)[Kind.artifact] == ["dataset data", "labels labels", "model student", "model teacher"]
    assert store.infos("") == before


@pytest.mark.parametrize("root", ["run", "ref", "old ref"])
def test_whatever_lineage_leads_to_is_kept(store: Store, root: str) -> None:
    """One ref on the student keeps its labels, their part, the teacher and the data."""
    lineage, others = make_lineage(store), make_lineage(store, "-2")
    if root == "run":
        make_run(store, "cats", {"student": lineage["student"]})
    else:
        set_ref(store, "cats/1/student", "model", "student")
    if root == "old ref":
        set_ref(store, "cats/1/student", "model", others["student"].key)
    collect(store, days=0)
    for manifest in lineage.values():
        assert find(store, manifest.kind, manifest.key) == manifest
    assert find_part(store, "predict", "part", NUMERICS) is not None
    assert (find(store, "model", "student-2") is not None) == (root == "old ref")
    assert (find_part(store, "predict", "part-2", NUMERICS) is not None) == (root == "old ref")
    assert verify_all(store).problems == []


def test_what_nothing_reaches_goes_and_leaves_a_tombstone(store: Store) -> None:
    lineage = make_lineage(store)
    collect(store, days=0)
    assert list_artifacts(store) == []
    left = [path for path in store.paths("") if path.startswith(("artifacts", "parts"))]
    assert left == sorted(f"artifacts/{m.kind}/{m.key}/tombstone.json" for m in lineage.values())
    buried = store.read_record("artifacts/model/student/tombstone.json")
    assert buried["inputs"] == lineage["student"].inputs
    assert buried["files"][0]["sha256"] == lineage["student"].files[0].sha256
    assert kinds(store) == {}, "a tombstone is no garbage"
    again = make_artifact(store, "model", "student", lineage["student"].inputs)
    assert find(store, "model", "student") == again, "what was deleted can be made again"


def test_with_keep_runs_only_the_newest_runs_are_roots(store: Store) -> None:
    for number in (1, 2, 3):
        make_run(store, "cats", make_lineage(store, f"-{number}"))
    make_run(store, "dogs", make_lineage(store, "-dogs"))
    assert kinds(store) == {}
    gone = kinds(store, keep_runs=2)
    assert gone[Kind.artifact] == ["dataset data-1", "labels labels-1", "model student-1", "model teacher-1"]
    assert gone[Kind.part] == ["predict part-1"]
    collect(store, days=0, keep_runs=2)
    assert {m.key for m in list_artifacts(store) if m.kind == "dataset"} == {"data-2", "data-3", "data-dogs"}
    assert verify_all(store).problems == [], "an older run's refs lead to tombstones, not to nothing"


def test_what_is_younger_than_the_days_asked_for_is_left(store: Store) -> None:
    make_lineage(store)
    assert kinds(store, days=1) == {}
    assert collect(store, days=1).garbage == []
    assert len(list_artifacts(store)) == 4


def test_uncommitted_work_is_found_by_its_kind(store: Store) -> None:
    make_run(store, "cats", make_lineage(store))
    orphan = make_checkpoint(store, "student", "crashed")
    unfinished = make_checkpoint(store, "never-committed", "a1")
    make_part(store, "part-of-no-artifact", b"rows of nobody")
    assert kinds(store) == {
        Kind.attempt: ["model student"],
        Kind.unfinished: ["model never-committed"],
        Kind.part: ["predict part-of-no-artifact"],
    }
    collect(store, days=0)
    assert not store.exists(orphan)
    assert not store.exists(unfinished)
    assert find_part(store, "predict", "part-of-no-artifact", NUMERICS) is None
    assert kinds(store) == {}
    assert verify_all(store).problems == []


def test_staged_files_of_killed_writers_are_garbage(disk: Store) -> None:
    assert disk.root is not None
    folder = disk.root / ".staging/dead"
    folder.mkdir(parents=True)
    (folder / "object").write_bytes(b"half")
    assert kinds(disk) == {Kind.leftover: [".staging/dead/object"]}
    assert kinds(disk, days=1) == {}
    collect(disk, days=0)
    assert not folder.exists()


def test_unfinished_uploads_are_garbage(s3_store: Store) -> None:
    backend = s3_store._backend
    backend._call("x", lambda s3: s3.create_multipart_upload(Bucket="nst", Key=backend._key("parts/x")))
    assert kinds(s3_store) == {Kind.leftover: ["parts/x"]}
    collect(s3_store, days=0)
    assert s3_store.leftovers() == []


def test_beside_a_running_pipeline_nothing_that_it_may_use_is_deleted(store: Store) -> None:
    make_lineage(store)
    with at_work(store, "cats"):
        sweep = collect(store, days=0)
        assert [lease.what for lease in sweep.leases] == ["cats"]
        assert sweep.garbage == []
        assert {g.kind for g in sweep.spared} == {Kind.artifact, Kind.part}
        assert len(list_artifacts(store)) == 4
    assert store.paths("leases") == []
    collect(store, days=0)
    assert list_artifacts(store) == []


def test_a_run_that_begins_during_a_sweep_waits_for_its_end(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    began = threading.Event()

    def work() -> None:
        with at_work(store, "cats"):
            began.set()

    thread = threading.Thread(target=work)
    with sweeping(store):
        thread.start()
        deadline = time.monotonic() + 20
        while not store.paths("leases"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not began.wait(1.5)
    assert began.wait(20)
    thread.join()
    assert "waiting for `nst gc`" in caplog.text
    assert store.paths("leases") == store.paths("gc") == []


def test_only_one_sweeps_at_a_time(store: Store) -> None:
    with sweeping(store), pytest.raises(UserError, match="another `nst gc` is at work"):
        collect(store, days=0)
    assert collect(store, days=0).garbage == []


def test_the_leases_and_the_sweep_of_the_dead_do_not_block(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.create_record(SWEEP, {"holder": "gone", "what": "gc", "renewals": 0})
    store.create_record("leases/dead.json", {"holder": "gone", "what": "cats", "renewals": 0})
    make_lineage(store)
    monkeypatch.setattr(storage.leases, "TTL_S", 1.5)
    time.sleep(2.6)
    with at_work(store, "dogs"):
        pass
    assert collect(store, days=0).leases == []
    assert list_artifacts(store) == []


def test_the_lease_of_a_process_that_was_killed_here_does_not_block_at_all(store: Store) -> None:
    program = (
        "import os, signal, sys\nfrom storage.leases import at_work\nfrom storage.objects import Store\n"
        "with at_work(Store(sys.argv[1]), 'cats'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, store.url])
    assert done.returncode == -signal.SIGKILL
    assert len(store.paths("leases")) == 1
    make_lineage(store)
    assert collect(store, days=0).leases == []
    assert list_artifacts(store) == []


def test_a_run_that_fails_gives_its_lease_back(store: Store) -> None:
    for failure in (UserError("wrong"), KeyboardInterrupt()):
        with pytest.raises(type(failure)), at_work(store, "cats"):
            raise failure
        assert store.paths("leases") == []


def test_a_lease_is_renewed_while_its_run_lives(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.leases, "RENEW_S", 0.05)
    with at_work(store, "cats"):
        (path,) = store.paths("leases")
        deadline = time.monotonic() + 20
        while store.read_record(path)["renewals"] < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_store_of_a_newer_version_is_not_collected(store: Store) -> None:
    make_lineage(store)
    store.create_record("store.json", {"format": 2})
    for act in (survey, collect):
        with pytest.raises(StoreError, match="format 2.*update"):
            act(store, days=0)
    assert len(list_artifacts(store)) == 4


def test_a_manifest_of_a_newer_version_stops_gc_before_it_deletes(store: Store) -> None:
    make_lineage(store)
    newer = {**find(store, "model", "student").model_dump(mode="json"), "schema_version": SCHEMA_VERSION + 1}  # type: ignore[union-attr]
    store.replace_record("artifacts/model/student/manifest.json", newer)
    with pytest.raises(StoreError, match="schema version"):
        collect(store, days=0)
    assert store.exists("artifacts/model/teacher/manifest.json")


def test_reachable_follows_inputs_to_their_end(store: Store) -> None:
    lineage = make_lineage(store)
    assert reachable(lineage.values(), ["labels"]) == {"labels", "data", "teacher", "outside"}
    assert reachable(lineage.values(), []) == set()


def test_gc_in_a_loop_beside_commits_loses_nothing(store: Store) -> None:
    """Runs and sweeps alternate as fast as they can; at the end every run's artifacts are whole."""
    finished, failures = threading.Event(), []

    def sweep() -> None:
        while not finished.is_set():
            try:
                collect(store, days=0)
            except Exception as error:
                failures.append(error)
                return

    thread = threading.Thread(target=sweep)
    thread.start()
    try:
        for number in range(6 if store.root else 3):
            with at_work(store, "cats"):
                lineage = make_lineage(store, f"-{number}")
                make_run(store, f"cats-{number}", lineage)
    finally:
        finished.set()
        thread.join()
    assert failures == []
    assert len(list_artifacts(store)) == 4 * (6 if store.root else 3)
    assert verify_all(store).problems == []
    assert commit(store, lineage["student"]) == lineage["student"]


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    disk: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(disk, "cats", make_lineage(disk))
    listed = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("/runs"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for act in (survey, collect):
        with pytest.raises(StoreError, match="runs cannot be listed .Permission denied.; check its permissions"):
            act(disk, days=0)
    monkeypatch.undo()
    assert len(list_artifacts(disk)) == 4


def test_a_lease_that_cannot_be_understood_counts_as_work(store: Store) -> None:
    make_lineage(store)
    store.create_record("leases/other.json", {"holder": "other:1", "what": "cats", "invented_later": True})
    sweep = collect(store, days=0)
    assert [lease.holder for lease in sweep.leases] == ["unknown"]
    assert len(list_artifacts(store)) == 4


def test_a_sweep_that_was_held_up_too_long_deletes_nothing_more(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    make_lineage(store)
    real = time.time
    with sweeping(store) as right:
        right.check()
        monkeypatch.setattr("storage.leases.time.time", lambda: real() + storage.leases.TTL_S)
        with pytest.raises(UserError, match="held up for so long that others may be at work; run it again"):
            right.check()
        monkeypatch.undo()


def test_a_sweep_that_another_took_over_deletes_nothing_more_and_leaves_the_others_record(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.leases, "CHECK_S", 0.0)
    with sweeping(store) as right:
        right.check()
        store.replace_record(SWEEP, {"holder": "other:1", "what": "gc", "token": "another"})
        with pytest.raises(UserError, match="run it again"):
            right.check()
    assert store.exists(SWEEP)


def test_unfinished_uploads_of_others_in_the_bucket_are_left_alone(s3_store: Store) -> None:
    backend = s3_store._backend
    key = backend._key("another-store/artifacts/x")
    upload = backend._call("x", lambda s3: s3.create_multipart_upload(Bucket="nst", Key=key))
    assert s3_store.leftovers() == []
    below = Store(f"{s3_store.url}/another-store")
    assert [(info.path, info.tag) for info in below.leftovers()] == [("artifacts/x", upload["UploadId"])]
    below.drop_leftovers(below.leftovers())
    assert below.leftovers() == []
