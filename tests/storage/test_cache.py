import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from storage.artifacts import FileEntry
from storage.cache import Cache, node_cache
from storage.errors import DamagedObject, StoreError, UserError
from storage.objects import Store
from storage.shards import ShardReader
from tests.fault_proxy import FaultProxy
from tests.storage.conftest import overwrite

KB = 1000
READER = """
import hashlib, random, sys
from pathlib import Path
from storage.cache import Cache
root, limit, seed, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
cache, rng = Cache(root, limit), random.Random(seed)
print("begins", flush=True)
for _ in range(rounds):
    number = rng.randrange(12)
    data = bytes([number]) * 40_000
    def fill():
        for start in range(0, len(data), 1000):
            yield data[start : start + 1000]
    sha = hashlib.sha256(data).hexdigest()
    with cache.private_folder() as folder:
        cache.link(sha, len(data), fill, folder / "copy")
        assert (folder / "copy").read_bytes() == data
print("good")
"""


class Source:
    """Objects to be cached, and how often each was fetched."""

    def __init__(self, count: int = 8, size: int = 100 * KB) -> None:
        self.data = {hashlib.sha256(data).hexdigest(): data for data in (bytes([n]) * size for n in range(count))}
        self.names = list(self.data)
        self.fetched: list[str] = []

    def fill(self, sha256: str) -> Callable[[], Iterator[bytes]]:
        def bring() -> Iterator[bytes]:
            self.fetched.append(sha256)
            data = self.data[sha256]
            for start in range(0, len(data), 30 * KB):
                yield data[start : start + 30 * KB]

        return bring

    def read(self, cache: Cache, sha256: str, verify: bool = True) -> bytes:
        handle = cache.open(sha256, len(self.data[sha256]), self.fill(sha256), verify)
        with os.fdopen(handle, "rb") as stream:
            return stream.read()


def copies(cache: Cache) -> list[str]:
    return sorted(path.name for path in cache.root.glob("copies/*/*"))


def disk_bytes(cache: Cache) -> int:
    """What lies there at one moment: no room is taken or made meanwhile, and a file that is being moved counts once."""
    found: dict[int, int] = {}
    with cache._locked("room"):
        for name in ("making", "copies"):
            for path in cache.root.glob(f"{name}/**/*"):
                with suppress(FileNotFoundError):
                    if path.is_file():
                        found[path.stat().st_ino] = path.stat().st_size
    return sum(found.values())


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 500 * KB)


def test_a_copy_is_fetched_once(cache: Cache) -> None:
    source = Source()
    for _ in range(3):
        assert source.read(cache, source.names[0]) == source.data[source.names[0]]
    assert source.fetched == [source.names[0]]
    assert source.read(Cache(cache.root, cache.limit_bytes), source.names[0]) == source.data[source.names[0]]
    assert len(source.fetched) == 1, "another process finds it"


def test_the_bound_holds_and_the_least_recently_used_goes_first(cache: Cache) -> None:
    source = Source()
    for name in source.names[:4]:
        source.read(cache, name)
    source.read(cache, source.names[0])  # used again
    for name in source.names[4:6]:
        source.read(cache, name)
        assert disk_bytes(cache) <= cache.limit_bytes
    assert source.names[0] in copies(cache)
    assert source.names[1] not in copies(cache)
    assert source.read(cache, source.names[1]) == source.data[source.names[1]]


def test_a_copy_in_use_survives_its_eviction(cache: Cache) -> None:
    source = Source()
    first = source.names[0]
    handle = cache.open(first, 100 * KB, source.fill(first))
    with cache.private_folder() as folder:
        cache.link(first, 100 * KB, source.fill(first), folder / "kept.tar")
        for name in source.names[1:]:
            source.read(cache, name)
        assert first not in copies(cache)
        assert os.pread(handle, 100 * KB, 0) == (folder / "kept.tar").read_bytes() == source.data[first]
        held = folder
    os.close(handle)
    assert not held.exists()


@pytest.mark.parametrize("damage", ["short", "altered", "gone"])
def test_a_bad_copy_is_fetched_again(cache: Cache, damage: str) -> None:
    source = Source()
    name = source.names[0]
    source.read(cache, name)
    (path,) = cache.root.glob("copies/*/*")
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(source.data[name][: 50 * KB] if damage == "short" else b"X" + source.data[name][1:])
    assert source.read(Cache(cache.root, cache.limit_bytes), name) == source.data[name]
    assert source.fetched == [name, name]


def test_bytes_that_come_wrong_are_fetched_again_and_never_kept(cache: Cache) -> None:
    name, good = hashlib.sha256(b"good").hexdigest(), iter([b"evil", b"good"])
    handle = cache.open(name, 4, lambda: iter([next(good)]))
    assert os.pread(handle, 4, 0) == b"good"
    os.close(handle)
    cache.drop(name)
    with pytest.raises(DamagedObject):
        cache.open(name, 4, lambda: iter([b"evil"]))
    assert copies(cache) == []
    assert list(cache.root.glob("making/*")) == []


def test_a_failed_fetch_leaves_nothing(cache: Cache) -> None:
    def fail() -> Iterator[bytes]:
        yield b"x" * KB
        raise StoreError("the server is gone")

    with pytest.raises(StoreError, match="gone"):
        cache.open("0" * 64, 10 * KB, fail)
    assert disk_bytes(cache) == 0
    assert list(cache.root.glob("making/*")) == []


def test_of_many_readers_one_fetches(cache: Cache) -> None:
    source, barrier = Source(), threading.Barrier(8)
    name = source.names[0]

    def read(_: int) -> bytes:
        barrier.wait()
        return source.read(Cache(cache.root, cache.limit_bytes), name)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(read, range(8))) == {source.data[name]}
    assert source.fetched == [name]


def test_an_object_larger_than_the_cache_is_named(cache: Cache) -> None:
    with pytest.raises(StoreError, match="501,000 bytes does not fit .* of 500,000 bytes; raise NST_CACHE_BYTES"):
        cache.open("0" * 64, 501 * KB, lambda: iter([]))


def test_a_full_disk_is_named_with_its_remedy_and_what_is_there_stays(small_disk: Callable[[str], Path]) -> None:
    source, cache = Source(), Cache(small_disk("300k") / "cache", 10_000 * KB)
    source.read(cache, source.names[0])
    source.read(cache, source.names[1])
    with pytest.raises(
        StoreError, match="No space left.*free some space, or lower NST_CACHE_BYTES, or set NST_CACHE_DIR"
    ):
        source.read(cache, source.names[2])
    assert source.names[0] in copies(cache)
    assert source.read(cache, source.names[0]) == source.data[source.names[0]]


def test_processes_that_are_killed_leave_a_cache_that_others_use_and_clear(cache: Cache) -> None:
    """Readers of a cache that holds half of what they want; some are killed -9 at any moment."""

    def start(seed: int, rounds: int) -> "subprocess.Popen[str]":
        line = [sys.executable, "-c", READER, str(cache.root), str(260 * KB), str(seed), str(rounds)]
        return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    steady = [start(seed, 1500) for seed in (1, 2)]
    for seed in range(3, 9):
        victim = start(seed, 1_000_000)
        assert victim.stdout is not None
        victim.stdout.readline()
        time.sleep(0.1 + 0.03 * seed)
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    for child in steady:
        output, trouble = child.communicate(timeout=120)
        assert "good" in output, trouble
    with Cache(cache.root, 260 * KB).private_folder():
        pass
    Source().read(Cache(cache.root, 260 * KB), Source().names[0])
    assert list(cache.root.glob("making/*")) == list(cache.root.glob("private/*")) == [], (
        "the dead one's files are gone"
    )
    assert disk_bytes(cache) <= 260 * KB


def test_the_environment_chooses_place_and_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NST_CACHE_DIR", str(tmp_path / "here"))
    monkeypatch.setenv("NST_CACHE_BYTES", "12345")
    assert (node_cache().root, node_cache().limit_bytes) == (tmp_path / "here", 12345)
    monkeypatch.delenv("NST_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert node_cache().root == tmp_path / "xdg/nst"
    monkeypatch.setenv("NST_CACHE_BYTES", "20 GB")
    with pytest.raises(UserError, match="NST_CACHE_BYTES='20 GB' is not a number of bytes"):
        node_cache()


def shard_of(store: Store, data: bytes) -> FileEntry:
    store.create("shards/x.tar", data)
    return FileEntry(name="x", path="shards/x.tar", bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def test_a_reader_mends_a_bad_cached_copy_of_a_shard(s3_store: Store) -> None:
    data = os.urandom(50 * KB)
    shard = shard_of(s3_store, data)
    place = (shard.path, 1000, 500, hashlib.sha256(data[1000:1500]).hexdigest())
    reader = ShardReader(s3_store, [shard], whole=True)
    assert reader.read(*place) == data[1000:1500]
    (copy,) = node_cache().root.glob("copies/*/*")
    copy.write_bytes(data[:1200] + b"\x00" + data[1201:])
    assert ShardReader(s3_store, [shard], whole=True).read(*place) == data[1000:1500]
    assert copy.read_bytes() == data


def test_few_samples_of_large_shards_are_read_by_ranges(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NST_CACHE_BYTES", str(80 * KB))
    data = os.urandom(50 * KB)
    shard = shard_of(s3_store, data)
    reader = ShardReader(s3_store, [shard])
    assert reader.read(shard.path, 9, 500, hashlib.sha256(data[9:509]).hexdigest()) == data[9:509]
    assert list(node_cache().root.glob("copies/*/*")) == [], "no copy of the shard was made"
    overwrite(s3_store, shard.path, b"X" * len(data))
    with pytest.raises(DamagedObject, match="the 500 bytes at 9 are not what its index says"):
        reader.read(shard.path, 9, 500, hashlib.sha256(data[9:509]).hexdigest())


def test_a_shard_that_is_read_again_costs_no_request(s3_store: Store, proxy: FaultProxy, s3: str) -> None:
    data = os.urandom(50 * KB)
    shard = shard_of(s3_store, data)
    behind = Store(s3)
    for start in range(0, 10_000, 1000):
        assert ShardReader(behind, [shard], whole=True).read(
            shard.path, start, 10, hashlib.sha256(data[start : start + 10]).hexdigest()
        )
    assert len([request for request in proxy.requests if request[0] == "GET" and "x.tar" in request[1]]) == 1


def test_the_bound_holds_for_downloads_side_by_side(cache: Cache) -> None:
    source, peak, finished = Source(8, 200 * KB), [0], threading.Event()

    def watch() -> None:
        while not finished.is_set():
            peak[0] = max(peak[0], disk_bytes(cache))

    def slow(name: str) -> Callable[[], Iterator[bytes]]:
        def bring() -> Iterator[bytes]:
            for start in range(0, 200 * KB, 50 * KB):
                time.sleep(0.02)
                yield source.data[name][start : start + 50 * KB]

        return bring

    def read(name: str) -> bool:
        handle = Cache(cache.root, cache.limit_bytes).open(name, 200 * KB, slow(name))
        with os.fdopen(handle, "rb") as stream:
            return stream.read() == source.data[name]

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, source.names * 2))
    finished.set()
    watcher.join()
    assert 200 * KB < peak[0] <= cache.limit_bytes


def test_a_name_is_learned_by_one_of_many_and_a_bad_note_is_learned_again(cache: Cache) -> None:
    calls, data = [], b"the same content" * 100

    def fill() -> Iterator[bytes]:
        calls.append(1)
        time.sleep(0.05)
        yield data

    with ThreadPoolExecutor(6) as pool:
        found = set(pool.map(lambda _: Cache(cache.root, cache.limit_bytes).learn("x|tag", len(data), fill), range(6)))
    assert found == {hashlib.sha256(data).hexdigest()}
    assert len(calls) == 1
    (note,) = cache.root.glob("names/*")
    for bad in ("", "../../etc"):
        note.write_text(bad)
        assert {cache.learn("x|tag", len(data), fill)} == found
        assert note.read_text() in found


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    cache = Cache(tmp_path / "file/cache", 1000)
    with (
        pytest.raises(StoreError, match="cache .*file/cache cannot be written.*set NST_CACHE_DIR"),
        cache.private_folder(),
    ):
        pass
    with pytest.raises(StoreError, match="set NST_CACHE_DIR"):
        cache.open("0" * 64, 4, lambda: iter([b"data"]))


def test_a_reader_holds_no_more_open_than_a_part_of_the_cache(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NST_CACHE_BYTES", str(800 * KB))
    shards, rows = [], []
    for number in range(6):
        data = bytes([number]) * 50 * KB
        entry = FileEntry(name="x", path=f"{number}.tar", bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        s3_store.create(entry.path, data)
        shards.append(entry)
        rows.append((entry.path, 0, 10, hashlib.sha256(data[:10]).hexdigest()))
    before = len(os.listdir("/proc/self/fd"))
    reader = ShardReader(s3_store, shards, whole=True)
    for row in rows:
        reader.read(*row)
    assert len(os.listdir("/proc/self/fd")) - before <= 2, "100 KB of 800 may be held open"
    reader.close()
