"""Files that are not ours: the images that people bring, in a folder of this machine or below an `s3://` URL."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

from storage.cache import node_cache
from storage.errors import DamagedObject, StoreError, UserError
from storage.fingerprints import file_digests
from storage.local import LocalBackend
from storage.places import open_backend

WILD = "*?["
MD5 = re.compile("[0-9a-f]{32}")
RANGE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class ExternalFile:
    """One file: its name below the folder, its size, and what tells whether it changed."""

    name: str
    bytes: int
    tag: str = ""  # a bucket's ETag; empty on disk


class ExternalFolder:
    """A folder of files, by its path or URL; reads only. `setting` is how messages name the place it was given in."""

    def __init__(self, url: str, setting: str) -> None:
        self._backend = open_backend(url)
        if isinstance(self._backend, LocalBackend):
            self._backend = LocalBackend(url, follow_links=True)  # people lay out their data with links
        self._setting = setting
        self.root = self._backend.root if isinstance(self._backend, LocalBackend) else None

    def check(self) -> None:
        """Raise UserError where a folder of this machine does not exist."""
        if self.root is not None and not self.root.is_dir():
            raise UserError(
                f"{self._setting}: folder {self.root} does not exist; set {self._setting}=FOLDER to where the images are"
            )

    def find(self, pattern: str) -> list[ExternalFile]:
        """The files that a pattern names, sorted: a file, a glob pattern, or a folder, of which all files count.

        `*`, `?` and `[...]` stay within a step of the path, `**` is any number of steps.
        """
        steps = [step for step in pattern.split("/") if step not in ("", ".")]
        if not steps:
            return []
        if ".." in steps:
            raise UserError(
                f"{pattern!r} leaves {self._setting}; name files below it, or set {self._setting} higher up"
            )
        found = self._backend.stat(["/".join(steps)])[0]  # its name may hold what a pattern gives a meaning
        if found is not None:
            return [ExternalFile(name=found.path, bytes=found.bytes, tag=found.tag)]
        literal = next((place for place, step in enumerate(steps) if set(step) & set(WILD)), None)
        wanted = [*steps, "**", "*"] if literal is None else steps
        infos = self._backend.scan("/".join(steps[:literal]))
        files = [
            ExternalFile(name=i.path, bytes=i.bytes, tag=i.tag) for i in infos if matches(i.path.split("/"), wanted)
        ]
        return sorted(files, key=lambda file: file.name)

    def top(self) -> list[str]:
        """The names of the files and folders in a folder of this machine; none of a bucket."""
        if self.root is None or not self.root.is_dir():
            return []
        return sorted(path.name for path in self.root.iterdir() if not path.name.startswith("."))

    def fingerprint(self, file: ExternalFile) -> str:
        """What changes when the file's content does: its sha256, or in a bucket its ETag (no byte is read)."""
        return self.fingerprints([file])[0]

    def fingerprints(self, files: Sequence[ExternalFile]) -> list[str]:
        """The fingerprints of many files. Raises UserError where one of this machine cannot be read."""
        if self.root is None:
            return [f"etag:{file.tag}" for file in files]
        try:
            return file_digests([self.root / file.name for file in files])
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read ({error.strerror}); mend it or leave it out") from error

    def url_of(self, file: str) -> str:
        """Where a file lies, as a URL that names it from anywhere."""
        return (self.root / file).as_uri() if self.root is not None else f"{self._backend.url}/{file}"

    def read(self, file: ExternalFile) -> bytes:
        """A whole, small file. Raises MissingObject where it is gone."""
        return self._backend.read(file.name)

    def blocks(self, file: ExternalFile) -> Iterator[bytes]:
        """A file in order, in blocks. Raises StoreError where one in a bucket was replaced since it was listed."""
        return self._backend.blocks(file.name, file.bytes, file.tag)

    @contextmanager
    def local(self, file: ExternalFile) -> Iterator[Path]:
        """The file on this machine, valid within the block: itself, or a copy in the cache.

        A copy is checked against an ETag that is an MD5; those of multipart uploads cannot be checked. Raises StoreError
        where the file was replaced since it was listed.
        """
        if self.root is not None:
            yield self.root / file.name
            return
        cache = node_cache()

        def fill() -> Iterator[bytes]:
            return self._backend.blocks(file.name, file.bytes, file.tag)

        name = f"{self._backend.url}/{file.name}|{file.tag}|{file.bytes}"
        with cache.private_folder() as folder:
            copy = folder / f"copy{Path(file.name).suffix}"
            try:
                sha256 = cache.learn(name, file.bytes, fill, file.tag if MD5.fullmatch(file.tag) else "")
                cache.link(sha256, file.bytes, fill, copy)
            except DamagedObject as error:
                cache.unlearn(name)
                raise StoreError(f"{self._backend.url}/{file.name} is damaged: {error}") from None
            yield copy

    @contextmanager
    def ranges(self, file: ExternalFile) -> Iterator[BinaryIO]:
        """The file for reading a few places of it, such as a footer: one in a bucket is not downloaded as a whole."""
        if self.root is not None:
            with (self.root / file.name).open("rb") as stream:
                yield stream
            return
        raw = _Ranges(lambda offset, size: self._backend.read_range(file.name, offset, size), file.bytes)
        yield io.BufferedReader(raw, RANGE_BYTES)


class _Ranges(io.RawIOBase):
    """A read-only file of ranged reads."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self._size, self._at = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = min(len(buffer), self._size - self._at)
        data = self._read(self._at, size) if size > 0 else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the steps of a path are those of a glob pattern; `**` is any number of steps."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(matches(path[skip:], pattern[1:]) for skip in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and matches(path[1:], pattern[1:])
