"""Which faults of a bucket's server are survived, and how the others end. A real server behind a proxy that does harm."""

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError

import storage.s3
from storage.artifacts import FileEntry
from storage.errors import DamagedObject, MissingObject, StoreAway, StoreError
from storage.objects import READ_ATTEMPTS, Store
from storage.s3_errors import explain
from tests.fault_proxy import FaultProxy

PART, BLOCK = 5 << 20, 2 << 20  # smaller than in earnest, so that a small object has several
BIG = os.urandom(1 << 20) * 12
TRANSIENT = ["503", "500", "reset", "stall", "slow"]
STALL_S = 1.0


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stalled request is given up after a second instead of fifteen; transfers are cut small."""
    monkeypatch.setattr(storage.s3, "READ_TIMEOUT_S", STALL_S)
    monkeypatch.setattr(storage.s3, "UPLOAD_PART_BYTES", PART)
    monkeypatch.setattr(storage.s3, "BLOCK_BYTES", BLOCK)


@pytest.fixture
def store(proxy: FaultProxy, s3: str) -> Store:
    """A store behind the proxy, which has answered once."""
    found = Store(s3)
    assert found.paths("") == []
    return found


def entry_of(path: str, data: bytes) -> FileEntry:
    return FileEntry(name=path, path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def times(action: str) -> int:
    """A slow answer is an answer: nothing is tried again."""
    return 1 if action == "slow" else 2


def put(store: Store, folder: Path, path: str, data: bytes) -> FileEntry:
    (folder / "source").write_bytes(data)
    store.put_file(folder / "source", path)
    return entry_of(path, data)


@pytest.mark.parametrize("action", [*TRANSIENT, "drop_answer", "flip_request"])
def test_a_small_write_survives(store: Store, proxy: FaultProxy, action: str) -> None:
    fault = proxy.do(action, method="PUT", path="a/b", times=times(action))
    started = time.monotonic()
    assert store.create("a/b", b"first and only")
    assert fault.done == fault.times
    assert time.monotonic() - started < 2 * STALL_S + 4
    proxy.clear()
    assert store.read_bytes("a/b") == b"first and only"
    assert not store.create("a/b", b"second")


@pytest.mark.parametrize("action", [*TRANSIENT, "reset_body"])
def test_a_small_read_survives(store: Store, proxy: FaultProxy, action: str) -> None:
    store.create("a/b", b"some bytes to be read")
    fault = proxy.do(action, method="GET", path="a/b", times=times(action))
    assert store.read_bytes("a/b") == b"some bytes to be read"
    assert fault.done == fault.times


@pytest.mark.parametrize("action", [*TRANSIENT, "reset_body"])
def test_a_listing_survives(store: Store, proxy: FaultProxy, action: str) -> None:
    store.create("a/b", b"x")
    fault = proxy.do(action, method="GET", path="list-type=2", times=times(action))
    assert store.paths("a") == ["a/b"]
    assert fault.done == fault.times


@pytest.mark.parametrize(
    ("call", "action"),
    [
        *[(call, action) for call in ("uploads", "partNumber=2", "POST") for action in (*TRANSIENT, "drop_answer")],
        ("partNumber=2", "flip_request"),
    ],
)
def test_a_large_upload_survives(store: Store, proxy: FaultProxy, tmp_path: Path, action: str, call: str) -> None:
    """At its start, in the middle, and at the completion."""
    method, path = ("POST", "uploadId=") if call == "POST" else ("", call)
    fault = proxy.do(action, method=method, path=path)
    entry = put(store, tmp_path, "big/x.bin", BIG)
    assert fault.done == 1
    assert store.hash_object(entry) == entry.sha256
    assert not (tmp_path / "source").exists()
    assert store.infos("")[0].bytes == len(BIG)


@pytest.mark.parametrize("action", [*TRANSIENT, "reset_body", "flip"])
def test_a_large_download_survives(store: Store, proxy: FaultProxy, tmp_path: Path, action: str) -> None:
    entry = put(store, tmp_path, "big/x.bin", BIG)
    proxy.requests.clear()
    fault = proxy.do(action, method="GET", path="big/x.bin", skip=2)
    with store.local_copy(entry) as path:
        assert path.read_bytes() == BIG
    assert fault.done == 1
    ranges = [request for request in proxy.requests if request[1].endswith("x.bin") and request[0] == "GET"]
    whole = -(-len(BIG) // BLOCK)
    assert len(ranges) == (2 * whole if action == "flip" else whole + (action != "slow")), (
        "only what failed comes again"
    )


def test_a_flipped_byte_of_a_record_is_read_again(store: Store, proxy: FaultProxy) -> None:
    store.create_record("a.json", {"some": "record", "of": [1, 2, 3]})
    fault = proxy.do("flip", method="GET", path="a.json", times=READ_ATTEMPTS - 1)
    assert store.read_record("a.json") == {"some": "record", "of": [1, 2, 3]}
    assert fault.done == READ_ATTEMPTS - 1


def test_bytes_that_stay_wrong_end_as_a_damaged_object(
    store: Store, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.s3, "PATIENCE_S", 1.0)
    entry = put(store, tmp_path, "big/x.bin", BIG)
    proxy.do("flip", method="GET", path="x.bin", times=1000)
    with pytest.raises(DamagedObject, match=r"big/x\.bin is damaged"), store.local_copy(entry):
        pass
    store.create("small", b"small bytes")
    proxy.do("flip", method="GET", path="small", times=1000)
    with pytest.raises(DamagedObject, match="small is damaged"):
        store.read_verified("small", hashlib.sha256(b"small bytes").hexdigest())


def test_a_lost_answer_to_a_write_of_ours_is_a_win_and_to_anothers_is_none(store: Store, proxy: FaultProxy) -> None:
    proxy.do("drop_answer", method="PUT", path="ours")
    assert store.create("ours", b"ours"), "the first try wrote it"
    store.create("theirs", b"theirs")
    proxy.do("drop_answer", method="PUT", path="theirs")
    assert not store.create("theirs", b"ours")
    assert store.read_bytes("theirs") == b"theirs"


def test_a_write_of_the_same_bytes_that_came_second_is_no_win(store: Store, proxy: FaultProxy) -> None:
    assert store.create("a", b"same")
    assert not store.create("a", b"same")
    proxy.do("drop_answer", method="PUT", path="/a")
    assert not store.create("a", b"same")


def test_a_failed_upload_leaves_nothing_and_keeps_the_source(
    store: Store, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.s3, "PATIENCE_S", 1.0)
    fault = proxy.do("500", method="PUT", path="partNumber=2", times=1000)
    with pytest.raises(StoreAway, match=r"big/x\.bin: InternalError, tried \d+ times in \d s"):
        put(store, tmp_path, "big/x.bin", BIG)
    assert fault.done > 2
    assert (tmp_path / "source").read_bytes() == BIG
    assert store.paths("") == []
    assert store.leftovers() == [], "the unfinished upload is aborted"


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("503", r"object a: SlowDown, tried \d+ times in \d s .*overloaded"),
        ("500", r"object a: InternalError, tried \d+ times"),
        ("reset", r"object a: .*tried \d+ times in \d s; check the network"),
        ("stall", r"object a: .*times in \d s; check the network"),
    ],
)
def test_a_fault_that_stays_ends_in_time_with_the_objects_name(
    store: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, action: str, message: str
) -> None:
    monkeypatch.setattr(storage.s3, "PATIENCE_S", 1.5)
    proxy.do(action, times=1000)
    calls: list[Any] = [lambda: store.read_bytes("a"), lambda: store.create("a", b"x"), lambda: store.exists("a")]
    for call in calls:
        started = time.monotonic()
        with pytest.raises(StoreAway, match=message) as error:
            call()
        assert time.monotonic() - started < 1.5 + STALL_S + 1.5
        assert "\n" not in str(error.value)


def test_a_server_that_never_answers_is_given_up_sooner(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nothing listens
    monkeypatch.setattr(storage.s3, "_answered", set())
    started = time.monotonic()
    with pytest.raises(StoreAway, match=r"cannot be reached, tried \d+ times.*check AWS_ENDPOINT_URL"):
        Store(s3).check_writable()
    assert time.monotonic() - started < storage.s3.FIRST_PATIENCE_S + 3


def test_a_trouble_that_lasts_is_logged_while_it_lasts(
    store: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(storage.s3, "SILENCE_S", 0.3)
    store.create("a", b"x")
    proxy.do("503", method="GET", path="/a", times=5)
    assert store.read_bytes("a") == b"x"
    assert any("object a: SlowDown" in line and "trying again" in line for line in caplog.messages)


def test_a_missing_object_is_told_at_once(store: Store, proxy: FaultProxy) -> None:
    proxy.requests.clear()
    with pytest.raises(MissingObject, match="object no/such is missing"):
        store.read_bytes("no/such")
    assert len(proxy.requests) == 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong-secret", "SignatureDoesNotMatch.*check AWS_SECRET_ACCESS_KEY"),
        ("AWS_ACCESS_KEY_ID", "nobody", "InvalidAccessKeyId.*check AWS_ACCESS_KEY_ID"),
    ],
)
def test_wrong_credentials_are_told_at_once_and_never_repeated(
    s3: str, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    calls: list[Any] = [Store(s3).check_writable, lambda: Store(s3).paths(""), lambda: Store(s3).exists("a")]
    for call in calls:
        started = time.monotonic()
        with pytest.raises(StoreError, match=message) as error:
            call()
        assert time.monotonic() - started < 3
        assert not isinstance(error.value, StoreAway), "that does not pass by itself"
        assert "wrong-secret" not in str(error.value)


def test_no_credentials_and_an_unknown_profile_are_told(
    s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StoreError, match="no credentials; set AWS_ACCESS_KEY_ID"):
        Store(s3).check_writable()
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StoreError, match="profile.*nobody.*check AWS_PROFILE"):
        Store(s3).check_writable()


def test_a_profile_names_endpoint_and_credentials(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key, secret = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name)
    text = f"aws_access_key_id={key}\naws_secret_access_key={secret}\nendpoint_url={endpoint}\nregion=us-east-1\n"
    (tmp_path / "config").write_text(f"[profile lab]\n{text}")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    Store(s3).check_writable()
    assert Store(s3).paths("") == ["store.json"]


def test_a_missing_bucket_is_told_at_once(s3: str) -> None:
    for call in (Store("s3://no-such-bucket/x").check_writable, lambda: Store("s3://no-such-bucket").paths("")):
        with pytest.raises(StoreError, match="NoSuchBucket.*create it, or check the name"):
            call()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://", "the bucket is missing"),
        ("s3:///prefix", "the bucket is missing"),
        ("s3://key:hidden-secret@bucket/x", "credentials must not be part of a URL"),
        ("s3://bucket/a/../b", "must not hold"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused(url: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as error:
        Store(url)
    assert "hidden-secret" not in str(error.value)


def test_a_prefix_may_hold_spaces_and_any_script(s3: str) -> None:
    store = Store(f"{s3}/a prefix/größe 猫%41")
    store.check_writable()
    assert store.create("x y\n+&?#/é", b"1")
    assert store.paths("") == ["store.json", "x y\n+&?#/é"]
    assert Store(store.url).read_bytes("x y\n+&?#/é") == b"1"
    store.delete(*store.paths(""))
    assert store.paths("") == []


def test_an_error_of_one_object_in_a_bulk_deletion_is_tried_again(store: Store, proxy: FaultProxy) -> None:
    for name in ("a", "b"):
        store.create(name, b"x")
    fault = proxy.do("delete_error", method="POST", path="delete", times=2)
    store.delete("a", "b", "never-there")
    assert fault.done == 2
    assert store.paths("") == []


def test_a_run_that_has_spoken_to_the_server_is_patient_in_its_children_too(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(storage.s3, "FIRST_PATIENCE_S", 0.2)
    monkeypatch.setattr(storage.s3, "PATIENCE_S", 2.0)
    monkeypatch.setattr(storage.s3, "_answered", set())

    def tried() -> int:
        with pytest.raises(StoreAway, match=r"tried \d+ times") as error:
            Store(s3).exists("a")
        return int(str(error.value).split("tried ")[1].split()[0])

    impatient = tried()
    monkeypatch.setenv("NST_STORE_ANSWERED", "1")
    assert tried() > impatient


def test_a_forked_child_and_its_parent_both_go_on_reading(s3: str) -> None:
    store = Store(s3)
    store.create("a", b"content")
    assert store.read_bytes("a") == b"content"
    child = os.fork()
    if child == 0:
        os._exit(0 if store.read_bytes("a") == b"content" else 1)
    started = time.monotonic()
    assert [store.read_bytes("a") for _ in range(5)] == [b"content"] * 5
    assert time.monotonic() - started < 8, "the child closed the parent's connections"
    assert os.waitpid(child, 0)[1] == 0
    assert store.read_bytes("a") == b"content"


def test_a_wrong_clock_is_told_at_once(store: Store, proxy: FaultProxy) -> None:
    fault = proxy.do("skew", times=1000)
    with pytest.raises(
        StoreError, match="object a: RequestTimeTooSkewed.*clock and the server's differ; set the clock"
    ):
        store.read_bytes("a")
    assert fault.done == 1


def test_a_servers_address_is_shown_whole_but_for_what_may_be_signed() -> None:
    address = "http://127.0.0.1:9/nst/a?X-Amz-Signature=abc"
    said = str(explain("s3://nst", "a", EndpointConnectionError(endpoint_url=address)))
    assert '"http://127.0.0.1:9/nst/a")' in said
    assert "Signature" not in said
