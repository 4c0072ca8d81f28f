"""A store by its URL: objects written whole or not at all, created at most once, verified when they are read.

Two primitives carry everything above: `create` (small, create-if-absent: the commit of manifests, part markers, run
records, refs) and `put_file` (large, under a name that contains its own digest, so that repeating it changes nothing).
Records (JSON) carry a seal, a digest of themselves, so that a flipped byte or an edit by hand is found.
"""

import hashlib
import os
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError

from storage.backend import Backend, ObjectInfo
from storage.cache import Cache, node_cache
from storage.errors import DamagedObject, MissingObject, StoreError
from storage.local import LocalBackend
from storage.places import checked, missing, open_backend, outside
from storage.seals import sealed, unsealed

FORMAT = 1  # of the store as a whole: folders and records
FORMAT_PATH = "store.json"
READ_ATTEMPTS = 3  # a byte may be flipped on its way from a bucket; what lies wrong stays wrong
STATS_AT_ONCE = 256  # more objects are looked up by listing the folders above them
TRANSFERS = 4

Form = TypeVar("Form", bound=BaseModel)


class Located(Protocol):
    """What tells where an object lies and what it must contain, such as a manifest's FileEntry."""

    @property
    def path(self) -> str: ...  # noqa: D102
    @property
    def bytes(self) -> int: ...  # noqa: D102
    @property
    def sha256(self) -> str: ...  # noqa: D102


class Store:
    """A store, named by its root URL: `file:///data/nst`, a plain path, or `s3://bucket/prefix`.

    Object paths are relative, with `/`, and never contain `..`; a path that is a URL names an object outside the store,
    such as a tar that is used in place, and is only ever read. Raises StoreError with the path and the remedy.
    """

    def __init__(self, url: str) -> None:
        self._backend = open_backend(url)
        self.url = self._backend.url
        self._outside: dict[str, Backend] = {}  # where objects lie that are used in place
        self._trusted: dict[str, tuple[int, int, int]] = {}  # local files whose digest this process has checked

    @property
    def root(self) -> Path | None:
        """The folder of a store on disk; None for a bucket."""
        return self._backend.root if isinstance(self._backend, LocalBackend) else None

    def check_writable(self) -> None:
        """Make sure, before any work, that objects can be created once, read and deleted, and that the format fits.

        Raises StoreError on a read-only store, wrong credentials, a missing bucket, a server without conditional writes,
        a store made by a newer version.
        """
        if not self.exists(FORMAT_PATH):
            self.create_record(FORMAT_PATH, {"format": FORMAT})
        self.check_format()
        probe = f"probes/{uuid.uuid4().hex}"
        self.create(probe, b"probe")
        if self.create(probe, b"again"):
            raise StoreError(
                f"store {self.url}: the server ignores If-None-Match, so two writers could overwrite each other's work; use "
                "a server, or a version of it, with conditional writes"
            )
        self.delete(probe)

    def check_format(self) -> None:
        """Raise StoreError on a store made by a newer version: it may hold what this program does not know."""
        if self.exists(FORMAT_PATH):
            found = self.read_record(FORMAT_PATH).get("format")
            if not isinstance(found, int) or found > FORMAT:
                raise StoreError(
                    f"store {self.url} has format {found}, this program reads up to {FORMAT}; update the program"
                )

    def local_path(self, path: str) -> Path:
        """Where an object lies on this machine's disk. Raises StoreError for a bucket: `local_copy` works for both."""
        found = self._disk_path(path)
        if found is None:
            raise StoreError(f"{self.url}: object {path} has no place on this machine's disk")
        return found

    def location(self, path: str) -> str:
        """Where a person finds an object: a path of this machine, or a URL."""
        backend, name = self._place(path)
        return str(backend.root / name) if isinstance(backend, LocalBackend) else f"{backend.url}/{name}"

    def exists(self, path: str) -> bool:
        """Whether the object is there, whole."""
        return self._backend.stat([checked(path)])[0] is not None

    def sizes(self, paths: Sequence[str]) -> dict[str, int]:
        """The sizes of those objects that are there. Many are looked up by listing, not one by one."""
        places: dict[str, list[str]] = {"": []}
        for path in paths:
            places.setdefault(outside(path)[0], []).append(path)
        found = {}
        for root, own in places.items():
            by_name = {self._place(path)[1]: path for path in own}
            infos = self._look_up(
                self._backend if not root else self._outside[root], list(by_name), 2 if not root else -1
            )
            found.update({by_name[i.path]: i.bytes for i in infos if i is not None and i.path in by_name})
        return found

    def paths(self, prefix: str) -> list[str]:
        """The paths of all objects below a folder, sorted."""
        return sorted(info.path for info in self._backend.scan(checked(prefix)))

    def infos(self, prefix: str) -> list[ObjectInfo]:
        """All objects below a folder with size and time, sorted by path."""
        return sorted(self._backend.scan(checked(prefix)), key=lambda info: info.path)

    def read_bytes(self, path: str) -> bytes:
        """The object's bytes. Raises MissingObject where it is not there."""
        return self._backend.read(checked(path))

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        """Some bytes of an object, unverified: the caller checks them."""
        backend, name = self._place(path)
        try:
            return backend.read_range(name, offset, size)
        except MissingObject:
            raise missing(self.url, path) from None

    def read_verified(self, path: str, sha256: str) -> bytes:
        """The object's bytes, checked. Raises DamagedObject where they are not those that were written."""
        for _ in range(READ_ATTEMPTS):
            data = self.read_bytes(path)
            if hashlib.sha256(data).hexdigest() == sha256:
                return data
        raise self._damaged(path)

    def read_record(self, path: str) -> dict[str, Any]:
        """A sealed record. Raises MissingObject, or DamagedObject where it is not as it was written."""
        return self._read_sealed(path, self.read_bytes(path))

    def read_as(self, path: str, form: type[Form]) -> Form:
        """A sealed record as a typed one. Raises StoreError where it is missing, damaged or of another version."""
        return self._typed(path, self.read_record(path), form)

    def read_all_records(self, paths: Sequence[str]) -> list[dict[str, Any]]:
        """Many sealed records at once, in the order of the paths."""
        found = self.read_present_records(paths)
        for path in paths:
            if path not in found:
                raise MissingObject(f"{self.url}: object {path} is missing; run `nst run` again to make it anew")
        return [found[path] for path in paths]

    def read_present_records(self, paths: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Many sealed records at once, by path, without those that are not there (any more)."""
        found = self._backend.read_many([checked(path) for path in paths])
        return {p: self._read_sealed(p, data) for p, data in zip(paths, found, strict=True) if data is not None}

    def damaged_records(self, paths: Sequence[str]) -> dict[str, str]:
        """Which of some records are not as they were written, and why."""
        found: dict[str, str] = {}
        for path, data in zip(paths, self._backend.read_many([checked(path) for path in paths]), strict=True):
            try:
                unsealed(data if data is not None else b"")
            except ValueError:
                try:
                    self.read_record(path)  # again: a byte may have been flipped on its way
                except MissingObject:
                    continue  # deleted since it was listed
                except DamagedObject as error:
                    found[path] = str(error.__cause__ or error)
        return found

    def read_all_as(self, paths: Sequence[str], form: type[Form]) -> list[Form]:
        """Many sealed records at once, typed. Raises StoreError as `read_as` does."""
        records = self.read_all_records(paths)
        return [self._typed(path, record, form) for path, record in zip(paths, records, strict=True)]

    def create(self, path: str, data: bytes) -> bool:
        """Write a small object unless it exists: True if this call made it, False if it was there already."""
        return self._backend.create(checked(path), data)

    def create_record(self, path: str, record: BaseModel | dict[str, Any]) -> bool:
        """Write a record, sealed, unless there is one."""
        return self.create(path, sealed(record))

    def replace_record(self, path: str, record: BaseModel | dict[str, Any]) -> None:
        """Write a record over the one that is there: for leases, and numerics that made nothing; all else is written once."""
        self._backend.replace(checked(path), sealed(record))

    def put_file(self, source: Path, path: str) -> None:
        """Move a finished local file into the store. The path must contain the file's digest.

        Where the object exists already it has the same bytes, so it is kept.
        """
        size = source.stat().st_size
        if self.sizes([path]).get(path) == size:
            source.unlink()
            return
        self._backend.upload(source, checked(path))

    def delete(self, *paths: str) -> None:
        """Delete objects; deleting a missing one is no error."""
        if paths:
            self._backend.delete([checked(path) for path in paths])

    def staging(self) -> AbstractContextManager[Path]:
        """A private local folder for files in the making; removed at the end."""
        return self._backend.staging()

    def leftovers(self) -> list[ObjectInfo]:
        """What interrupted writes left: staged files of a disk, unfinished uploads of a bucket."""
        return list(self._backend.leftovers())

    def drop_leftovers(self, leftovers: Sequence[ObjectInfo]) -> None:
        """Delete some of them."""
        self._backend.drop_leftovers(leftovers)

    def hash_object(self, entry: Located) -> str:
        """The sha256 of an object as it lies in the store, no cache asked."""
        found = hashlib.sha256()
        for block in self.blocks(entry):
            found.update(block)
        return found.hexdigest()

    def blocks(self, entry: Located) -> Iterator[bytes]:
        """An object in order, in blocks, unverified: the caller checks them."""
        backend, name = self._place(entry.path)
        try:
            yield from backend.blocks(name, entry.bytes)
        except MissingObject:
            raise missing(self.url, entry.path) from None

    @contextmanager
    def local_copy(self, entry: Located) -> Iterator[Path]:
        """One object as a verified local file, of the same extension; see `local_copies`."""
        with self.local_copies([entry]) as (path,):
            yield path

    @contextmanager
    def local_copies(self, entries: Sequence[Located]) -> Iterator[list[Path]]:
        """Objects as verified local files, valid within the block: those of a disk themselves, of a bucket from the cache.

        Raises DamagedObject where an object is not what its entry says.
        """
        paths = [self._disk_path(entry.path) for entry in entries]
        for entry, path in zip(entries, paths, strict=True):
            if path is not None:
                self._check_local(entry, path)
        far = [number for number, path in enumerate(paths) if path is None]
        if not far:
            yield [path for path in paths if path is not None]
            return
        cache = node_cache()
        with cache.private_folder() as folder, ThreadPoolExecutor(TRANSFERS) as pool:
            copies = {n: folder / f"{n:06d}{Path(entries[n].path).suffix}" for n in far}
            list(pool.map(lambda n: self._link(cache, entries[n], copies[n]), far))
            yield [path or copies[n] for n, path in enumerate(paths)]

    def open_local(self, entry: Located) -> int:
        """A handle for random reads of an object whose every read is checked: the file itself, or a cached copy."""
        path = self._disk_path(entry.path)
        if path is None:
            with self._naming(entry):
                return node_cache().open(entry.sha256, entry.bytes, lambda: self.blocks(entry), verify=False)
        try:
            return os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise missing(self.url, entry.path) from None
        except OSError as error:
            raise StoreError(f"{self.url}: object {entry.path} cannot be read ({error.strerror})") from error

    def on_disk(self, entries: Iterable[Located]) -> bool:
        """Whether all these objects lie on this machine's disk, so that nothing is gained by a copy."""
        return all(self._disk_path(entry.path) is not None for entry in entries)

    def fits_local(self, size: int) -> bool:
        """Whether copies of so many bytes may be kept on this machine beside others."""
        return size <= node_cache().limit_bytes // 2

    def open_bytes(self) -> int:
        """How large the copies may be, all together, that one reader holds open: they cannot make room for others."""
        return sys.maxsize if self.root is not None and not self._outside else node_cache().limit_bytes // 8

    def forget_local(self, entry: Located) -> bool:
        """Drop the cached copy of an object, found bad; False where there is none but the object itself."""
        if self._disk_path(entry.path) is not None:
            return False
        node_cache().drop(entry.sha256)
        return True

    def _place(self, path: str) -> tuple[Backend, str]:
        """Where an object lies: a backend, and its path there."""
        root, name = outside(path)
        if not root:
            return self._backend, checked(path)
        if root not in self._outside:
            self._outside[root] = open_backend(root)
        return self._outside[root], checked(name)

    def _disk_path(self, path: str) -> Path | None:
        backend, name = self._place(path)
        return backend.root / name if isinstance(backend, LocalBackend) else None

    @staticmethod
    def _look_up(backend: Backend, names: list[str], steps: int) -> Iterator[ObjectInfo | None]:
        """Some objects, one by one or by listing the first `steps` folders above them (-1: the nearest)."""
        if len(names) <= STATS_AT_ONCE:
            yield from backend.stat(names)
            return
        folders = {"/".join(name.split("/")[:-1][: steps if steps > 0 else None]) for name in names}
        for folder in sorted(folders):
            yield from backend.scan(folder)

    def _link(self, cache: Cache, entry: Located, target: Path) -> None:
        with self._naming(entry):
            cache.link(entry.sha256, entry.bytes, lambda: self.blocks(entry), target)

    def _check_local(self, entry: Located, path: Path) -> None:
        """Hash a local file, once a process and state of the file."""
        try:
            found = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise missing(self.url, entry.path) from None
        state = (found.st_ino, found.st_mtime_ns, found.st_size)
        if self._trusted.get(entry.path) != state:
            if found.st_size != entry.bytes or self.hash_object(entry) != entry.sha256:
                raise self._damaged(entry.path)
            self._trusted[entry.path] = state

    def _read_sealed(self, path: str, data: bytes) -> dict[str, Any]:
        for attempts_left in reversed(range(READ_ATTEMPTS)):
            try:
                return unsealed(data)
            except ValueError as error:
                if not attempts_left:
                    raise DamagedObject(
                        f"{self.url}: record {path} is not as it was written ({error}); was it edited by hand? Put the "
                        "original back, or delete it and run again"
                    ) from error
                data = self.read_bytes(path)
        raise AssertionError("unreachable")

    def _typed(self, path: str, record: dict[str, Any], form: type[Form]) -> Form:
        try:
            return form.model_validate(record)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(step) for step in first["loc"])
            raise StoreError(
                f"{self.url}: record {path} is no valid {form.__name__} ({field}: {first['msg']}); it was made by another "
                "version of this program"
            ) from None

    @contextmanager
    def _naming(self, entry: Located) -> Iterator[None]:
        try:
            yield
        except DamagedObject:
            raise self._damaged(entry.path) from None

    def _damaged(self, path: str) -> DamagedObject:
        return DamagedObject(
            f"{self.url}: object {path} is damaged: its sha256 is not the one in its manifest; `nst verify --all --discard` "
            "and `nst run` make it anew"
        )
