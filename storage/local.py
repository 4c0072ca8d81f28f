"""A store on a POSIX disk, local or shared: temporary file, fsync, then a hard link or a rename.

An interrupted write leaves a file in `.staging/` and nothing else.
"""

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG
from urllib.parse import unquote, urlsplit

from storage.backend import ObjectInfo
from storage.errors import MissingObject, StoreError

STAGING = ".staging"
BLOCK_BYTES = 4 << 20
PLACE_ATTEMPTS = 20


class LocalBackend:
    """Objects as files below a root folder."""

    def __init__(self, url: str, follow_links: bool = False) -> None:
        self.root = local_root(url)
        self._follow_links = follow_links
        self.url = self.root.as_uri()

    def scan(self, prefix: str) -> Iterator[ObjectInfo]:
        """All files below a folder; a folder that is not there has none."""
        root = str(self.root)
        for folder, folders, names in os.walk(
            str(self.root / prefix), onerror=self._unreadable, followlinks=self._follow_links
        ):
            if folder == root and STAGING in folders:
                folders.remove(STAGING)
            if folder != os.path.join(root, STAGING):
                yield from self._infos(folder, names)

    def stat(self, paths: Sequence[str]) -> list[ObjectInfo | None]:
        """What is there of some objects."""
        return [next(self._infos(str((self.root / path).parent), [Path(path).name]), None) for path in paths]

    def read(self, path: str) -> bytes:
        """A whole object."""
        with self._reading(path), open(f"{self.root}/{path}", "rb") as stream:
            return stream.read()

    def read_many(self, paths: Sequence[str]) -> list[bytes | None]:
        """Objects one by one: on a disk nothing is gained by more at once."""
        found: list[bytes | None] = []
        for path in paths:
            try:
                found.append(self.read(path))
            except MissingObject:
                found.append(None)
        return found

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        """Some bytes of an object."""
        with self._reading(path), (self.root / path).open("rb") as stream:
            return os.pread(stream.fileno(), size, offset)

    def blocks(self, path: str, size: int, tag: str = "") -> Iterator[bytes]:
        """An object in blocks."""
        with self._reading(path), (self.root / path).open("rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                yield block

    def create(self, path: str, data: bytes) -> bool:
        """A hard link of a synced temporary file: of any number of writers exactly one wins."""
        with self.staging() as folder, self._writing(path):
            _write_synced(folder / "object", data)
            try:
                _place(os.link, folder / "object", self.root / path)
            except FileExistsError:
                return False
        return True

    def replace(self, path: str, data: bytes) -> None:
        """A rename of a synced temporary file."""
        with self.staging() as folder, self._writing(path):
            _write_synced(folder / "object", data)
            _place(os.replace, folder / "object", self.root / path)

    def upload(self, source: Path, path: str) -> None:
        """A rename; from another file system a copy beside the target comes first."""
        with self._writing(path):
            _sync_file(source)
            try:
                _place(os.replace, source, self.root / path)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                with self.staging() as folder:
                    copy = folder / "object"
                    shutil.copyfile(source, copy)
                    _sync_file(copy)
                    _place(os.replace, copy, self.root / path)
                source.unlink()

    def delete(self, paths: Sequence[str]) -> None:
        """Delete files, and the folders that they leave empty."""
        for path in paths:
            with self._writing(path):
                (self.root / path).unlink(missing_ok=True)
            folder = (self.root / path).parent
            while folder != self.root:
                try:
                    folder.rmdir()  # another writer may be about to use it: it makes the folder again
                except OSError:
                    break
                folder = folder.parent

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A private folder on the store's own file system, so that a rename into the store is atomic."""
        folder = self.root / STAGING / uuid.uuid4().hex
        with self._writing(STAGING):
            folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def leftovers(self) -> Iterator[ObjectInfo]:
        """Files in `.staging/`: of writers at work, and of those that were killed."""
        for folder, _, names in os.walk(str(self.root / STAGING), onerror=self._unreadable):
            yield from self._infos(folder, names)

    def drop_leftovers(self, leftovers: Sequence[ObjectInfo]) -> None:
        """Delete staged files and their folders."""
        self.delete([info.path for info in leftovers])

    def _infos(self, folder: str, names: Sequence[str]) -> Iterator[ObjectInfo]:
        """What there is of some files of a folder below the root. Of 10,000 folders: no `Path`s."""
        above = f"{folder}/"[len(str(self.root).rstrip("/")) + 1 :]
        for name in names:
            try:
                found = os.stat(f"{folder}/{name}")
            except (FileNotFoundError, NotADirectoryError):
                continue  # deleted since it was listed
            if S_ISREG(found.st_mode):
                yield ObjectInfo(f"{above}{name}", found.st_size, found.st_mtime)

    def _unreadable(self, error: OSError) -> None:
        """A folder that cannot be listed is not an empty one: gc would delete what it cannot see a need for."""
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise StoreError(
                f"{self.url}: folder {error.filename} cannot be listed ({error.strerror}); check its permissions"
            ) from error

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            raise MissingObject(f"{self.url}: object {path} is missing; run `nst run` again to make it anew") from None
        except OSError as error:
            raise StoreError(
                f"{self.url}: object {path} cannot be read ({error.strerror}); check its permissions"
            ) from error

    @contextmanager
    def _writing(self, path: str) -> Iterator[None]:
        """Turn the operating system's errors into one line with the object's name and the remedy."""
        try:
            yield
        except OSError as error:
            remedy = {
                errno.ENOSPC: "free some space or choose another store",
                errno.EDQUOT: "raise the quota or choose another store",
            }.get(error.errno or 0, "check its permissions or choose another place with --store")
            raise StoreError(f"store {self.url} cannot be written ({path}: {error.strerror}); {remedy}") from error


def local_root(url: str) -> Path:
    """The root folder of a `file://` URL or plain path, absolute. Raises StoreError for a URL with a host."""
    parts = urlsplit(url)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise StoreError(f"store {url}: file URLs have three slashes (file:///folder), found host {parts.netloc!r}")
        return Path(unquote(parts.path)).absolute()
    return Path(url).expanduser().absolute()


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _place(move: Callable[[Path, Path], None], source: Path, target: Path) -> None:
    """Link or rename a finished file to its place; its folder may be deleted by others as long as it is empty."""
    for attempts_left in reversed(range(PLACE_ATTEMPTS)):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            move(source, target)
            break
        except FileNotFoundError:
            if not attempts_left or not source.exists():
                raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
