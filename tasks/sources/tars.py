"""WebDataset tars: members with one name up to the first dot are one sample, as webdataset and img2dataset write them.

Read through in one pass; nothing is ever unpacked to a path, so a member's name can do no harm.
"""

import hashlib
import io
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from storage.errors import UserError
from storage.external import ExternalFile, ExternalFolder
from storage.images import MAX_BYTES
from tasks.sources import UNKNOWN_ROWS, USUAL_BYTES, RawImage, SourceFile

NAME = re.compile(r"^((?:.*/)?[^./][^.]*)\.([^/]+)$", re.DOTALL)  # of a sample, and what tells its members apart
IMAGE_MEMBERS = frozenset(
    ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "jp2", "avif", "img"]
)
LABEL_MEMBER = "cls"
MAX_LABEL_BYTES = 64
MAX_LABEL = 2**31 - 1  # the index has 32 bits for it
BUFFER_BYTES = 1 << 20


class TarFiles:
    """The tars of one folder or bucket. Each is a shard; its length is known once it was read."""

    def __init__(self, folder: ExternalFolder) -> None:
        self._folder = folder
        self._digests: dict[str, str] = {}

    def describe(self, split: str, files: Sequence[ExternalFile]) -> list[SourceFile]:
        """The tars, without opening them."""
        return [
            SourceFile(split=split, name=file.name, bytes=file.bytes, sha256=sha256, rows=UNKNOWN_ROWS)
            for file, sha256 in zip(files, self._folder.fingerprints(files), strict=True)
        ]

    def read(self, file: SourceFile, first: int, last: int) -> Iterator[RawImage]:
        """The samples in the tar's order. Where a tar is torn, the last one is a problem that says what is lost."""
        samples = self._samples(file)
        yield from islice(samples, first, None if last == UNKNOWN_ROWS else last)

    def location(self, file: SourceFile) -> str:
        """Where the tar lies."""
        return self._folder.url_of(file.name)

    def sha256(self, file: SourceFile) -> str:
        """The digest of a tar that was read to its end."""
        return self._digests[file.name]

    def _samples(self, file: SourceFile) -> Iterator[RawImage]:
        tag = file.sha256.removeprefix("etag:") if file.sha256.startswith("etag:") else ""
        place = ExternalFile(name=file.name, bytes=file.bytes, tag=tag)
        stream = _Hashing(self._folder.blocks(place))
        name, image, label, num_samples = "", None, None, 0
        tear: _Tear | None = None
        for member in _members(stream, self._folder.url_of(file.name)):
            if isinstance(member, _Tear):
                tear = member
                break
            info, data, sample, kind = member
            if sample != name:
                if image is not None or label is not None:
                    yield _sample(name, image, label, file.split)
                name, image, label, num_samples = sample, None, None, num_samples + 1
            if kind in IMAGE_MEMBERS and image is None:
                problem = _problem(info)
                image = RawImage(data, info.name, offset=info.offset_data, problem=problem)
            elif kind == LABEL_MEMBER and info.isreg():
                label = data
            elif image is None and label is None:
                label = b""  # a sample without an image is told, not passed over
        if image is not None or label is not None:
            yield _sample(name, image, label, file.split)
        if tear is not None:
            yield tear.problem(file.name, num_samples)
        sha256 = stream.finish()
        if not tag and sha256 != file.sha256:
            raise UserError(f"{self._folder.url_of(file.name)} was replaced since it was listed; run again")
        self._digests[file.name] = sha256


class _Header(tarfile.TarInfo):
    """A damaged or missing header is an error. (tarfile takes any but the first for the end of the tar.)"""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            raise tarfile.ReadError("it ends without an end marker") from None
        except (tarfile.HeaderError, ValueError, OverflowError) as error:
            raise tarfile.ReadError(f"a damaged header ({error})") from None


@dataclass(frozen=True, slots=True)
class _Tear:
    """Why a tar cannot be read on, at which byte, and how many bytes of it hold something from there on."""

    reason: str
    at: int
    lost_bytes: int

    def problem(self, name: str, num_samples: int) -> RawImage:
        """The tear as a problem that stands for all images lost, by the mean size of the samples before it."""
        mean = self.at / num_samples if num_samples else USUAL_BYTES
        lost = max(1, round(self.lost_bytes / mean))
        about = f"about {lost:,} images are lost" if self.lost_bytes else "what is missing cannot be counted"
        return RawImage(
            b"", name, problem=f"the tar is torn at byte {self.at:,}: {self.reason}; {about}", stands_for=lost
        )


def _members(stream: "_Hashing", url: str) -> Iterator[tuple[tarfile.TarInfo, bytes, str, str] | _Tear]:
    """The files of a tar with their bytes (those of images and labels), sample and kind; at the end, where it is torn."""
    try:
        tar = tarfile.open(fileobj=stream, mode="r|", bufsize=BUFFER_BYTES, tarinfo=_Header)  # noqa: SIM115
    except tarfile.TarError as error:
        raise UserError(
            f"{url} is no tar that can be read ({error}); compressed tars must be unpacked first"
        ) from error
    reason = ""
    try:
        for info in tar:
            tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header: 1 kB an image
            found = NAME.match(info.name) if info.isreg() or info.islnk() or info.issym() else None
            if found is None:
                continue
            kind = found[2].lower()
            if not info.isreg() or info.issparse():
                yield info, b"", found[1], kind
                continue
            most = MAX_BYTES if kind in IMAGE_MEMBERS else MAX_LABEL_BYTES
            wanted = (kind in IMAGE_MEMBERS or kind == LABEL_MEMBER) and info.size <= most
            content = tar.extractfile(info) if wanted else None
            data = content.read() if content else b""
            if wanted and len(data) != info.size:
                raise tarfile.ReadError("unexpected end of data")
            yield info, data, found[1], kind
    except (tarfile.TarError, EOFError) as error:
        reason = str(error)
    at = tar.offset
    end = _end_of_content(tar)
    if reason or end > at:
        yield _Tear(reason or "other bytes follow its end marker (tars glued together?)", at, max(0, end - at))


def _end_of_content(tar: tarfile.TarFile) -> int:
    """Read a tar to its end: the place behind the last byte that is not zero."""
    place, end = tar.fileobj.tell(), 0
    while block := tar.fileobj.read(BUFFER_BYTES):
        content = len(block.rstrip(b"\0"))
        end = place + content if content else end
        place += len(block)
    return end


def _problem(info: tarfile.TarInfo) -> str:
    """Why a member has no bytes of its own that could be an image; empty where it has."""
    if not info.isreg():
        return f"a link to {info.linkname[:200]!r}, whose bytes are not here; write tars with --hard-dereference"
    if info.issparse():
        return "a sparse file; write tars without --sparse"
    return "" if info.size <= MAX_BYTES else f"too large: {info.size:,} bytes, limit {MAX_BYTES:,}"


def _sample(name: str, image: RawImage | None, label: bytes | None, split: str) -> RawImage:
    if image is None:
        return RawImage(b"", name, problem="no image among its members")
    if split != "unlabeled" and not image.problem:
        text = (label or b"").strip()
        if text.isdigit() and int(text) <= MAX_LABEL:
            image.label = int(text)
        elif text.isdigit():
            image.problem = f"its label is {text[:20].decode()}, more than {MAX_LABEL:,}"
        else:
            image.problem = f"its label is {text[:20]!r}, not a number" if text else f"no label (.{LABEL_MEMBER})"
    return image


class _Hashing(io.RawIOBase):
    """A stream of blocks for tarfile, hashed as it passes."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._rest, self._hash = blocks, memoryview(b""), hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if not self._rest:
            block = next(self._blocks, b"")
            self._hash.update(block)
            self._rest = memoryview(block)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

    def finish(self) -> str:
        """The sha256 of all blocks, those too that nobody read."""
        for block in self._blocks:
            self._hash.update(block)
        return self._hash.hexdigest()
