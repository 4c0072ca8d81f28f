"""This machine's copies of a bucket's objects: verified, bounded, shared by all its processes, safe under kill -9.

Copies are named by their sha256, so they are shared between stores too. A copy is written under `making/` and renamed
when its digest is right; whatever a killed process left there is known by its free lock, and deleted. Room is taken
before a download begins, so the bound holds for all processes together; the copies that were used least recently go
first. A copy that is in use stays readable: by its open handle, or by a second hard link (`private_folder`).

    NST_CACHE_DIR     default: $XDG_CACHE_HOME/nst, or ~/.cache/nst
    NST_CACHE_BYTES   default: 20 GB
"""

import errno
import fcntl
import functools
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from storage.errors import DamagedObject, StoreError, UserError

DEFAULT_BYTES = 20_000_000_000
HASH_BLOCK_BYTES = 4 << 20
LOCKS = 64  # downloads are locked by digest, modulo this
ROOM_S, ROOM_POLL_S = 600.0, 0.1  # others' downloads come to an end
SHA256 = re.compile("[0-9a-f]{64}")
ATTEMPTS = 3  # a copy may be evicted or found bad between two looks; bytes may be altered on their way

Fill = Callable[[], Iterator[bytes]]


class Cache:
    """Copies below `root`, of at most `limit_bytes` in all."""

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self.root, self.limit_bytes = root, limit_bytes
        self._trusted: dict[str, tuple[int, int, int]] = {}  # copies whose digest this process has checked

    def open(self, sha256: str, size: int, fill: Fill, verify: bool = True) -> int:
        """A handle of the copy, to be closed by the caller; `fill()` brings the bytes where there is none.

        With `verify` a copy that is there is hashed before its first use by this process; leave it out where every
        read is checked anyway. A bad copy is replaced. Raises DamagedObject where the bytes that come are not those of
        `sha256`, StoreError where the copy does not fit or the disk is full.
        """
        for _ in range(ATTEMPTS):
            try:
                handle = os.open(self._place(sha256), os.O_RDONLY)
            except (FileNotFoundError, NotADirectoryError):
                self._download(sha256, size, fill)
                continue
            if self._is_whole(handle, sha256, size, verify):
                with suppress(OSError):
                    os.utime(handle, ns=(time.time_ns(), os.fstat(handle).st_mtime_ns))  # the time of last use
                return handle
            os.close(handle)
            self.drop(sha256)
        raise self._thrashing()

    def drop(self, sha256: str) -> None:
        """Forget a copy that was found bad."""
        self._trusted.pop(sha256, None)
        self._place(sha256).unlink(missing_ok=True)

    def link(self, sha256: str, size: int, fill: Fill, target: Path) -> None:
        """Give the copy a second name that eviction does not touch."""
        for _ in range(ATTEMPTS):
            handle = self.open(sha256, size, fill)
            try:
                os.link(self._place(sha256), target)
                if os.stat(target).st_ino == os.fstat(handle).st_ino:
                    return
                target.unlink()  # replaced since it was checked
            except FileNotFoundError:
                continue  # evicted since it was checked
            finally:
                os.close(handle)
        raise self._thrashing()

    def learn(self, name: str, size: int, fill: Fill, md5: str = "") -> str:
        """The sha256 of an object that is known by another name only, such as URL and version tag; downloads it once.

        Raises DamagedObject where bytes come that have another `md5`, unless the same ones come twice: then the tag was
        no MD5 (encrypted objects).
        """
        note, seen = self._note(name), set[str]()
        with self._locked(f"get-{int(note.name[:8], 16) % LOCKS}"):
            if note.exists() and SHA256.fullmatch(known := note.read_text()):
                return known
            for _ in range(ATTEMPTS):
                sha256, found = self._try_download("", size, fill)
                if not md5 or found == md5 or sha256 in seen:
                    with self._naming_full_disk():
                        _write_whole(note, sha256)
                    return sha256
                seen.add(sha256)
        raise DamagedObject("other bytes come each time it is read")

    def unlearn(self, name: str) -> None:
        """Forget what was learned of a name: its bytes do not come again."""
        self._note(name).unlink(missing_ok=True)

    @contextmanager
    def private_folder(self) -> Iterator[Path]:
        """A folder of this process, deleted at the end, or by another process after a kill."""
        with self._held(self._folder("private") / uuid.uuid4().hex) as lock:
            folder = Path(lock.name).with_suffix(".files")
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _download(self, sha256: str, size: int, fill: Fill) -> None:
        """Make the copy; of several processes one does, the others wait for it."""
        with self._locked(f"get-{int(sha256[:8], 16) % LOCKS}"):
            if self._place(sha256).exists():
                return
            for attempts_left in reversed(range(ATTEMPTS)):
                if self._try_download(sha256, size, fill)[0] == sha256:
                    return
                if not attempts_left:
                    raise DamagedObject(f"its sha256 is not {sha256[:16]}..., the one in its manifest")

    def _try_download(self, sha256: str, size: int, fill: Fill) -> tuple[str, str]:
        """Bring the bytes, and keep them where they are those of `sha256` (empty: any). Returns their sha256 and MD5."""
        with self._held(self._folder("making") / uuid.uuid4().hex, size) as stream:
            digest, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)

            for block in fill():
                with self._naming_full_disk():
                    stream.write(block)
                digest.update(block)
                if not sha256:
                    md5.update(block)
            with self._naming_full_disk():
                stream.flush()
            found = digest.hexdigest()
            if found == (sha256 or found) and stream.tell() == size:
                place = self._place(found)
                place.parent.mkdir(parents=True, exist_ok=True)
                state = os.fstat(stream.fileno())
                self._trusted[found] = (state.st_ino, state.st_mtime_ns, state.st_size)
                os.replace(stream.name, place)
            return found, md5.hexdigest()

    @contextmanager
    def _held(self, path: Path, size: int = 0) -> Iterator[IO[bytes]]:
        """A new file, locked while this process lives; `size` is the room that is taken for it."""
        deadline = time.monotonic() + ROOM_S
        while (stream := self._try_hold(path, size)) is None:
            if time.monotonic() > deadline:
                raise StoreError(f"cache {self.root} is full of what others fetch just now; raise NST_CACHE_BYTES")
            time.sleep(ROOM_POLL_S)
        try:
            yield stream
        finally:
            with suppress(OSError):  # a full disk: what was written is not kept
                stream.close()
            Path(stream.name).unlink(missing_ok=True)

    def _try_hold(self, path: Path, size: int) -> IO[bytes] | None:
        """The file, or None as long as downloads that others have begun leave no room for it."""
        with self._naming_full_disk(), self._locked("room"):
            self._sweep(path.parent)
            if size and not self._take_room(size):
                return None
            stream = path.with_suffix(".held").open("wb")
            fcntl.flock(stream, fcntl.LOCK_EX)
            os.truncate(stream.fileno(), size)  # counted in full from now on
            return stream

    def _take_room(self, size: int) -> bool:
        if size > self.limit_bytes:
            raise StoreError(
                f"an object of {size:,} bytes does not fit into the cache {self.root} of {self.limit_bytes:,} bytes; "
                "raise NST_CACHE_BYTES"
            )
        counter = self.root / "used"
        known = counter.read_text() if counter.exists() else ""
        used = int(known) if known.isdecimal() else self.limit_bytes  # unknown: count
        if used + size > self.limit_bytes:
            used = self._evict(size)
        if used + size > self.limit_bytes:
            return False
        _write_whole(counter, str(used + size))
        return True

    def _evict(self, size: int) -> int:
        """Delete the copies used least recently until `size` fits; returns the bytes that are left."""
        self._sweep(self._folder("making"))
        used = sum(_stat(path)[1] for path in self._folder("making").iterdir())
        copies = sorted((*_stat(path), path) for path in self._folder("copies").glob("*/*"))
        used += sum(copy_bytes for _, copy_bytes, _ in copies)
        spare = self.limit_bytes // 10  # so that not every download has to look at all copies
        for _, copy_bytes, path in copies:
            if used + size <= self.limit_bytes - (spare if size < spare else 0):
                break
            path.unlink(missing_ok=True)
            used -= copy_bytes
        return used

    def _sweep(self, folder: Path) -> None:
        """Delete what killed processes left: their locks are free."""
        for path in folder.glob("*.held"):
            with suppress(OSError), path.open("r+b") as stream:  # NFS locks only what may be written
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path.with_suffix(".files"), ignore_errors=True)
                path.unlink()

    def _is_whole(self, handle: int, sha256: str, size: int, verify: bool) -> bool:
        found = os.fstat(handle)
        if found.st_size != size:
            return False
        if not verify or self._trusted.get(sha256) == (found.st_ino, found.st_mtime_ns, size):
            return True
        digest, offset = hashlib.sha256(), 0
        while block := os.pread(handle, HASH_BLOCK_BYTES, offset):
            digest.update(block)
            offset += len(block)
        if digest.hexdigest() != sha256:
            return False
        self._trusted[sha256] = (found.st_ino, found.st_mtime_ns, size)
        return True

    def _thrashing(self) -> StoreError:
        return StoreError(f"cache {self.root}: a copy vanishes as fast as it is made; raise NST_CACHE_BYTES")

    def _place(self, sha256: str) -> Path:
        return self.root / "copies" / sha256[:2] / sha256

    def _folder(self, name: str) -> Path:
        folder = self.root / name
        with self._naming_full_disk():
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _note(self, name: str) -> Path:
        return self._folder("names") / hashlib.sha256(name.encode()).hexdigest()

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with self._naming_full_disk():
            stream = (self._folder("locks") / name).open("wb")
        with stream:
            fcntl.flock(stream, fcntl.LOCK_EX)  # free again when its holder ends, however it ends
            yield

    @contextmanager
    def _naming_full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = "free some space, or lower NST_CACHE_BYTES" if full else "check its permissions"
            raise StoreError(
                f"cache {self.root} cannot be written ({error.strerror}); {remedy}, or set NST_CACHE_DIR to another disk"
            ) from error


@functools.cache
def _cache(root: str, limit_bytes: int) -> Cache:
    return Cache(Path(root), limit_bytes)


def node_cache() -> Cache:
    """The cache that the environment names. Raises UserError on a size that is no number."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    size = os.environ.get("NST_CACHE_BYTES", str(DEFAULT_BYTES))
    if not size.isdecimal() or int(size) == 0:
        raise UserError(f"NST_CACHE_BYTES={size!r} is not a number of bytes; write for example 20000000000")
    return _cache(os.environ.get("NST_CACHE_DIR") or f"{home}/nst", int(size))


def _write_whole(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    written = path.with_suffix(f".{uuid.uuid4().hex}")
    with written.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(written, path)


def _stat(path: Path) -> tuple[int, int]:
    """Time of last use and size; zeros for a file that is gone."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_atime_ns, found.st_size
