import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from storage.errors import DamagedObject, MissingObject, StoreError
from storage.objects import STATS_AT_ONCE, Store, sealed, unsealed

NUM_WRITERS = 8
BIG = 4_000_000

RACER = """
import json, sys, time
from pathlib import Path
from storage.objects import Store

url, name, rounds, ready, go = sys.argv[1:]
store = Store(url)
Path(ready).touch()
while not Path(go).exists():
    time.sleep(0.001)
print(json.dumps([n for n in range(int(rounds)) if store.create(f"round/{n}", name.encode())]))
"""


def visible(store: Store) -> list[str]:
    """Every object, staging left out."""
    return store.paths("")


def test_of_many_threads_exactly_one_creates_an_object(store: Store) -> None:
    barrier = threading.Barrier(NUM_WRITERS)

    def race(name: int, round_number: int) -> bool:
        barrier.wait()
        return store.create(f"round/{round_number}", str(name).encode())

    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        for number in range(25 if store.root else 4):  # SeaweedFS takes seconds for eight at once
            won = list(pool.map(lambda name, n=number: race(name, n), range(NUM_WRITERS)))
            assert won.count(True) == 1
            assert store.read_bytes(f"round/{number}") == str(won.index(True)).encode()


def test_of_many_processes_exactly_one_creates_an_object(store: Store, tmp_path: Path) -> None:
    rounds, go = 60, tmp_path / "go"
    ready = [tmp_path / f"ready-{number}" for number in range(4)]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, store.url, f"p{number}", str(rounds), str(path), str(go)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number, path in enumerate(ready)
    ]
    while not all(path.exists() for path in ready):
        assert all(child.poll() is None for child in children), "a racer ended before the race"
    go.touch()
    wins = {f"p{number}": json.loads(child.communicate()[0]) for number, child in enumerate(children)}
    winners = {n: name for name, own in wins.items() for n in own}
    assert sorted(n for own in wins.values() for n in own) == list(range(rounds))
    assert {n: store.read_bytes(f"round/{n}").decode() for n in range(rounds)} == winners


def test_readers_never_see_a_part_of_an_object(store: Store) -> None:
    finished, seen, broken = threading.Event(), [0], []

    def read() -> None:
        while not finished.is_set():
            for path in visible(store):
                seen[0] += 1
                if len(store.read_bytes(path)) != BIG:
                    broken.append(path)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(100):  # on a busy machine the reader comes to look late
        assert store.create(f"big/{number}", b"x" * BIG)
        if number >= 15 and seen[0] > 15:
            break
    finished.set()
    reader.join()
    assert seen[0] > 15, "the reader never looked while objects were there"
    assert broken == []


def test_create_keeps_the_first_bytes_and_leaves_no_staging(store: Store) -> None:
    assert store.create("a/b", b"first")
    assert not store.create("a/b", b"second")
    assert store.read_bytes("a/b") == b"first"
    assert store.paths("") == ["a/b"]


def test_put_file_twice_keeps_the_object_that_is_there(disk: Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"same bytes")
    disk.put_file(source, "data/x-123.bin")
    assert not source.exists(), "put_file moves"
    inode = disk.local_path("data/x-123.bin").stat().st_ino
    source.write_bytes(b"same bytes")
    disk.put_file(source, "data/x-123.bin")
    assert disk.local_path("data/x-123.bin").stat().st_ino == inode
    assert visible(disk) == ["data/x-123.bin"]


def test_put_file_mends_an_object_that_was_cut_short(disk: Store, tmp_path: Path) -> None:
    target = disk.local_path("data/x.bin")
    target.parent.mkdir(parents=True)
    target.write_bytes(b"sa")
    source = tmp_path / "source"
    source.write_bytes(b"same bytes")
    disk.put_file(source, "data/x.bin")
    assert target.read_bytes() == b"same bytes"


def test_put_file_moves_between_file_systems(disk: Store, small_disk: Callable[[str], Path]) -> None:
    source = small_disk("200k") / "source"
    source.write_bytes(b"from another disk")
    assert source.stat().st_dev != disk.root.parent.stat().st_dev
    disk.put_file(source, "data/x.bin")
    assert disk.read_bytes("data/x.bin") == b"from another disk"
    assert disk.paths("") == ["data/x.bin"]


def test_a_full_disk_names_object_and_remedy_and_leaves_nothing_visible(
    small_disk: Callable[[str], Path], tmp_path: Path
) -> None:
    disk, big = Store(str(small_disk("200k") / "store")), tmp_path / "big"
    big.write_bytes(b"x" * 1_000_000)
    with pytest.raises(StoreError, match=r"runs/a/1\.json.*No space left.*free some space or choose another store"):
        disk.create("runs/a/1.json", b"x" * 1_000_000)
    with pytest.raises(StoreError, match=r"shards/big\.tar.*No space left.*free some space"):
        disk.put_file(big, "shards/big.tar")
    assert disk.paths("") == []
    assert disk.create("runs/a/1.json", b"small"), "a smaller object still fits: the failed ones left no rest"


def test_a_write_cut_off_by_the_system_leaves_nothing_visible(disk: Store) -> None:
    script = (
        "import resource, signal, sys\nfrom storage.objects import Store\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "Store(sys.argv[1]).create('runs/a/1.json', b'x' * 100_000)"
    )
    done = subprocess.run([sys.executable, "-c", script, disk.url], capture_output=True, text=True)
    assert "StoreError" in done.stderr
    assert "runs/a/1.json" in done.stderr
    assert disk.paths("") == []


def test_an_unwritable_store_is_named_with_its_remedy(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    for place in (file / "store", Path("/proc/nst-store")):
        with pytest.raises(StoreError, match="cannot be written.*--store") as error:
            Store(str(place)).check_writable()
        assert str(place) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_checked_store_holds_its_format_and_nothing_else(store: Store) -> None:
    for _ in range(2):
        store.check_writable()
        assert store.paths("") == ["store.json"]


def test_a_store_of_a_newer_version_is_left_alone(store: Store) -> None:
    store.create_record("store.json", {"format": 2, "dialect": "unknown"})
    for check in (store.check_writable, store.check_format):
        with pytest.raises(StoreError, match=r"has format 2, this program reads up to 1; update the program"):
            check()
    assert store.paths("") == ["store.json"]


def test_a_store_below_a_file_reads_as_an_empty_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    disk = Store(str(file))
    assert not disk.exists("a/b")
    assert disk.paths("a") == []
    with pytest.raises(StoreError, match="a/b"):
        disk.read_bytes("a/b")


@pytest.mark.parametrize("path", ["../x", "a/../../x", "a/..", "..", "/etc/passwd"])
def test_a_path_that_leaves_the_store_is_refused_by_every_call(store: Store, tmp_path: Path, path: str) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")
    calls: list[Callable[[], object]] = [
        lambda: store.create(path, b"x"),
        lambda: store.put_file(source, path),
        lambda: store.read_bytes(path),
        lambda: store.exists(path),
        lambda: store.delete(path),
        lambda: store.paths(path),
    ]
    for call in calls:
        with pytest.raises(StoreError, match="leaves the store"):
            call()
    assert source.read_bytes() == b"x"


@given(st.lists(st.sampled_from(["a", "b..", "..c", "...", ".", "..", "é"]), min_size=1, max_size=5))
def test_an_accepted_path_lies_below_the_root(steps: list[str]) -> None:
    store = Store("/data/store")
    path = "/".join(steps)
    if ".." in steps:
        with pytest.raises(StoreError):
            store.local_path(path)
    else:
        assert Path(os.path.normpath(store.local_path(path))).is_relative_to("/data/store")


@pytest.mark.parametrize("name", ["plain", "two words", "Größe-猫", "100%25", "a#b?c=d&e", "label=7"])
def test_a_store_is_found_again_by_its_url(tmp_path: Path, name: str) -> None:
    by_path = Store(str(tmp_path / name))
    assert by_path.url.startswith("file:///")
    by_path.create("x", name.encode())
    assert Store(by_path.url).root == tmp_path / name
    assert Store(by_path.url).read_bytes("x") == name.encode()
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_url_with_escapes_and_a_relative_path_mean_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Store("my store").root == Store(f"file://{tmp_path}/my%20store").root == tmp_path / "my store"
    assert Store(f"file://localhost{tmp_path}/x").root == tmp_path / "x"


@pytest.mark.parametrize("url", ["gs://bucket", "http://host/x", "file://host/x", ""])
def test_other_schemes_are_refused_by_name(url: str) -> None:
    with pytest.raises(StoreError, match="store") as error:
        Store(url)
    assert url.partition("://")[0] in str(error.value)
    assert "folder" in str(error.value)


def test_a_missing_object_and_a_damaged_one_are_named(store: Store) -> None:
    with pytest.raises(MissingObject, match=r"runs/a/1\.json is missing"):
        store.read_record("runs/a/1.json")
    store.create("runs/a/1.json", b'{"half":')
    with pytest.raises(DamagedObject, match=r"runs/a/1\.json is not as it was written.*edited by hand"):
        store.read_record("runs/a/1.json")
    store.create("x", b"altered")
    with pytest.raises(DamagedObject, match="x is damaged"):
        store.read_verified("x", "0" * 64)


def test_a_record_comes_back_as_it_was_written(store: Store) -> None:
    record = {"text": "größe\n猫", "numbers": [1, 2.5, 1e-300], "nested": {"b": None, "a": True}}
    assert store.create_record("a.json", record)
    assert not store.create_record("a.json", {"other": 1})
    assert store.read_record("a.json") == record
    store.replace_record("a.json", {"other": 1})
    assert store.read_record("a.json") == {"other": 1}


@given(st.binary(min_size=1, max_size=40), st.integers(0, 200), st.integers(1, 255))
def test_no_flipped_byte_of_a_record_goes_unnoticed(text: bytes, place: int, change: int) -> None:
    record = {"text": text.hex(), "bytes": len(text)}
    data = bytearray(sealed(record))
    data[place % len(data)] ^= change
    with contextlib.suppress(ValueError):
        assert unsealed(bytes(data)) == record, "a flipped byte of white space changes nothing"


def test_many_objects_are_sized_by_listing_the_folders_above_them(store: Store) -> None:
    paths = [f"parts/x/{number}/a.bin" for number in range(STATS_AT_ONCE + 20)]
    for number, path in enumerate(paths[:-1]):
        store.create(path, b"x" * (number % 7))
    assert store.sizes(paths) == {path: number % 7 for number, path in enumerate(paths[:-1])}
    assert store.sizes(paths[:3]) == {path: number for number, path in enumerate(paths[:3])}


def test_an_object_of_another_form_is_named_with_the_field_that_differs(store: Store) -> None:
    class Record(BaseModel):
        number: int

    store.create_record("a.json", {"number": 3})
    assert store.read_as("a.json", Record) == Record(number=3)
    store.create_record("b.json", {"number": "many"})
    with pytest.raises(StoreError, match=r"b\.json is no valid Record \(number: .*another version"):
        store.read_as("b.json", Record)
