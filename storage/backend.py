"""What a kind of store must offer. Two kinds: `storage/local.py` (POSIX disk) and `storage/s3.py` (buckets).

Everything above (records, artifacts, parts, refs, verify, gc) is written once, on these few calls.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from storage.errors import StoreError

ANSWERED = "NST_STORE_ANSWERED"  # set for the children of a run: it has spoken to the store already


@dataclass(frozen=True)
class ObjectInfo:
    """One object of a listing: its path below the store's root, its size, when it was written, its version tag."""

    path: str
    bytes: int
    modified: float  # seconds since 1970, by the store's clock
    tag: str = ""  # a bucket's ETag; empty on disk


class Backend(Protocol):
    """Objects by relative path. Errors are StoreError with the object's name and the remedy; MissingObject if absent."""

    url: str

    def scan(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects whose path starts with the folder `prefix`, in any order."""
        ...

    def stat(self, paths: Sequence[str]) -> list[ObjectInfo | None]:
        """What is there of some objects; None where one is missing."""
        ...

    def read(self, path: str) -> bytes:
        """A whole, small object."""
        ...

    def read_many(self, paths: Sequence[str]) -> list[bytes | None]:
        """Small objects, many at once; None where one is missing."""
        ...

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`, or fewer at the object's end."""
        ...

    def blocks(self, path: str, size: int, tag: str = "") -> Iterator[bytes]:
        """The object's `size` bytes in order, in blocks, some read ahead; memory does not grow with the object.

        With `tag` (of a listing) raises StoreError where the object was replaced since.
        """
        ...

    def create(self, path: str, data: bytes) -> bool:
        """Write a small object unless it exists: True if this call made it. Readers see all bytes or no object."""
        ...

    def replace(self, path: str, data: bytes) -> None:
        """Write a small object over whatever is there. Readers see the old or the new bytes."""
        ...

    def upload(self, source: Path, path: str) -> None:
        """Move a local file into the store, whole or not at all."""
        ...

    def delete(self, paths: Sequence[str]) -> None:
        """Delete objects; missing ones are no error."""
        ...

    def staging(self) -> AbstractContextManager[Path]:
        """A private local folder for files in the making, removed at the end."""
        ...

    def leftovers(self) -> Iterator[ObjectInfo]:
        """What interrupted writes left behind: staged files, unfinished uploads. Not listed by `scan`."""
        ...

    def drop_leftovers(self, leftovers: Sequence[ObjectInfo]) -> None:
        """Delete some of them."""
        ...


def refuse_credentials(url: str, setting: str) -> str:
    """The URL. Raises UserError on one with a user or a password in it, without repeating them."""
    host = url.partition("://")[2].partition("/")[0]
    if "@" in host:
        raise StoreError(
            f"{setting}: credentials must not be part of a URL; they come from the environment (AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_ENDPOINT_URL)"
        )
    return url
