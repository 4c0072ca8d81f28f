"""Objects of a store: written whole or not at all, created at most once.

Two primitives carry everything above: `create` (small, create-if-absent: the commit of manifests, part markers, run
records, refs) and `put_file` (large, under a name that contains its own digest, so that repeating it changes nothing).
An interrupted write leaves a file in `.staging/` and nothing else.
"""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ValidationError

from storage.errors import StoreError

STAGING = ".staging"

Form = TypeVar("Form", bound=BaseModel)


class Store:
    """A store on a local or shared POSIX disk, named by its root URL (`file:///data/nst`, or a plain path).

    Object paths are relative, with `/`, and never contain `..`. Raises StoreError with the path and the remedy.
    """

    def __init__(self, url: str) -> None:
        self.root = local_root(url)
        self.url = self.root.as_uri()

    def check_writable(self) -> None:
        """Create and delete one object, so that an unwritable store is known before any work."""
        probe = f"{STAGING}/probe-{uuid.uuid4().hex}"
        self.create(probe, b"probe")
        self.delete(probe)

    def local_path(self, path: str) -> Path:
        """Where the object lies on this machine's file system."""
        if ".." in path.split("/") or path.startswith("/"):
            raise StoreError(f"object path {path!r} leaves the store; paths are relative and without '..'")
        return self.root / path

    def exists(self, path: str) -> bool:
        """Whether the object is there, whole."""
        return self.local_path(path).is_file()

    def read_bytes(self, path: str) -> bytes:
        """The object's bytes. Raises StoreError where it is missing."""
        try:
            return self.local_path(path).read_bytes()
        except FileNotFoundError:
            raise StoreError(f"{self.url}: object {path} is missing; run `nst run` again to make it anew") from None
        except OSError as error:
            raise StoreError(
                f"{self.url}: object {path} cannot be read ({error.strerror}); check its permissions"
            ) from error

    def read_verified(self, path: str, sha256: str) -> bytes:
        """The object's bytes, checked. Raises StoreError where they are not those that were written."""
        data = self.read_bytes(path)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StoreError(f"{self.url}: object {path} is damaged: its sha256 is not the one in its manifest")
        return data

    def read_json(self, path: str) -> Any:
        """The object as JSON. Raises StoreError where it is missing or no JSON."""
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            raise StoreError(f"{self.url}: object {path} is not valid JSON ({error}); was it edited by hand?") from None

    def read_as(self, path: str, form: type[Form]) -> Form:
        """The object as a typed record. Raises StoreError where it is missing, damaged or of another version."""
        try:
            return form.model_validate(self.read_json(path))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(step) for step in first["loc"])
            raise StoreError(
                f"{self.url}: object {path} is no valid {form.__name__} ({field}: {first['msg']}); it was edited by hand "
                "or made by another version of this program"
            ) from None

    def list(self, prefix: str) -> list[str]:
        """The paths of all objects below a folder, sorted."""
        top = self.local_path(prefix)
        found = []
        for folder, _, names in os.walk(top):
            found += [(Path(folder) / name).relative_to(self.root).as_posix() for name in names]
        return sorted(found)

    def create(self, path: str, data: bytes) -> bool:
        """Write a small object unless it exists: True if this call made it, False if it was there already.

        A hard link of a synced temporary file: of any number of writers exactly one wins, and readers see all bytes
        or no object.
        """
        with self.staging() as folder:
            temporary = folder / "object"
            with self._naming(path):
                _write_synced(temporary, data)
                target = self.local_path(path)
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(temporary, target)
                except FileExistsError:
                    return False
                _sync_folder(target.parent)
        return True

    def put_file(self, source: Path, path: str) -> None:
        """Move a finished local file into the store. The path must contain the file's digest.

        Where the object exists already it has the same bytes, so it is kept.
        """
        with self._naming(path):
            target = self.local_path(path)
            if target.is_file() and target.stat().st_size == source.stat().st_size:
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            with source.open("rb") as stream:
                os.fsync(stream.fileno())
            try:
                os.replace(source, target)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                with self.staging() as folder:  # another file system: copy beside the target, then rename
                    copy = folder / "object"
                    shutil.copyfile(source, copy)
                    with copy.open("rb") as stream:
                        os.fsync(stream.fileno())
                    os.replace(copy, target)
            _sync_folder(target.parent)

    def delete(self, path: str) -> None:
        """Delete an object; deleting a missing one is no error."""
        self.local_path(path).unlink(missing_ok=True)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A private folder for files in the making, on the store's own file system; removed at the end."""
        folder = self.root / STAGING / uuid.uuid4().hex
        with self._naming(STAGING):
            folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _naming(self, path: str) -> Iterator[None]:
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
    """The root folder of a `file://` URL or plain path, absolute. Raises StoreError for other schemes."""
    parts = urlsplit(url)
    if not url:
        raise StoreError("the store's URL is empty; give a folder or a file:// URL with --store")
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise StoreError(f"store {url}: file URLs have three slashes (file:///folder), found host {parts.netloc!r}")
        return Path(unquote(parts.path)).absolute()
    if "://" in url:
        raise StoreError(f"store {url}: scheme {parts.scheme!r} is not supported; use a folder or a file:// URL")
    return Path(url).expanduser().absolute()


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
