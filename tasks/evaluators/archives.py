"""Published benchmarks as they lie unpacked in a folder or below an `s3://` URL; nothing is copied.

ImageNet-A: CLASS/IMAGE. ImageNet-C: KIND/SEVERITY/CLASS/IMAGE. ImageNet-P: KIND/CLASS/VIDEO.mp4, harder noises as KIND_2 and KIND_3.
Folders above these (the archives' own `noise`, `blur` ...) may be there or not: the last steps of a path count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from pydantic import Field, field_validator

from storage.artifacts import Manifest
from storage.backend import refuse_credentials
from storage.errors import UserError
from storage.external import ExternalFile, ExternalFolder
from storage.keys import digest
from tasks.evaluators.altered import ImageSet, classes_of
from tasks.evaluators.contract import EvaluatorConfig
from tasks.sources.folders import IMAGE_SUFFIXES

STRETCH_FILES = 1000  # of one pass: what a crash loses at most
VIDEO_SUFFIXES = (".mp4",)


class ArchiveConfig(EvaluatorConfig):
    """Where the archive lies unpacked. No part of the key; its listing is."""

    not_in_key: ClassVar[tuple[str, ...]] = ("root",)

    root: str = Field("", description="folder or s3:// URL of the unpacked archive")

    @field_validator("root")
    @classmethod
    def _without_credentials(cls, root: str) -> str:
        return refuse_credentials(root, "root")

    def external(self) -> str:
        """The folder."""
        return f"archive:{self.root}"

    def fingerprint(self) -> str:
        """A digest of the listing: names and sizes, and in a bucket ETags.

        Not of the bytes: ImageNet-C has 3.8 million files, which nobody changes one by one.
        """
        return Archive(self.root, self.suffixes()).fingerprint()

    def suffixes(self) -> tuple[str, ...]:
        """Of the files that count."""
        return IMAGE_SUFFIXES


@dataclass(frozen=True)
class Archive:
    """The files of an unpacked archive."""

    root: str
    suffixes: tuple[str, ...] = IMAGE_SUFFIXES

    @cached_property
    def files(self) -> list[ExternalFile]:
        """Sorted by name. Raises UserError where the folder is not there or has no such file."""
        if not self.root:
            raise UserError("root is not set; set root=FOLDER to where the unpacked archive lies")
        folder = ExternalFolder(self.root, "root")
        folder.check()
        found = [file for file in folder.find("**") if file.name.lower().endswith(self.suffixes)]
        if not found:
            raise UserError(
                f"root={self.root}: no {' or '.join(self.suffixes[:3])} file lies there; unpack the archive and set root to "
                "its folder"
            )
        return found

    def fingerprint(self) -> str:
        """What changes when a file comes, goes or has another size."""
        return digest([[file.name, file.bytes, file.tag] for file in self.files])

    def by_folder(self, depth: int) -> dict[tuple[str, ...], list[ExternalFile]]:
        """The files by the last `depth` folders above them: (class,), (kind, class), (kind, severity, class).

        Raises UserError where a file has fewer folders above it.
        """
        found: dict[tuple[str, ...], list[ExternalFile]] = {}
        for file in self.files:
            steps = tuple(file.name.split("/")[:-1])
            if len(steps) < depth:
                layout = {1: "CLASS/IMAGE", 2: "KIND/CLASS/VIDEO", 3: "KIND/SEVERITY/CLASS/IMAGE"}[depth]
                raise UserError(
                    f"root={self.root}: {file.name} does not lie in {layout}; is this the archive's folder?"
                )
            found.setdefault(steps[-depth:], []).append(file)
        return found

    def stretches(self, files: Sequence[ExternalFile], labels: Sequence[int], name: str) -> list[ImageSet]:
        """Files with the model's class of each, cut into pieces that are read in one pass."""
        url = ExternalFolder(self.root, "root").url_of("").rstrip("/")
        sets = []
        for start in range(0, len(files), STRETCH_FILES):
            some = slice(start, start + STRETCH_FILES)
            rows = [[f.name, f.bytes, f.tag, label] for f, label in zip(files[some], labels[some], strict=True)]
            label = f"{name} {start // STRETCH_FILES}".strip()
            sets.append(ImageSet(label, len(rows), digest(rows), {"folder": url, "files": rows}))
        return sets


def labeled(
    model: Manifest, archive: Archive, by_class: dict[str, list[ExternalFile]]
) -> tuple[list[ExternalFile], list[int]]:
    """The files of some classes in the order of their names, and the model's class of each."""
    numbers = dict(zip(by_class, classes_of(model, list(by_class), f"root={archive.root}"), strict=True))
    pairs = sorted(
        ((file, numbers[name]) for name, files in by_class.items() for file in files), key=lambda pair: pair[0].name
    )
    return [file for file, _ in pairs], [number for _, number in pairs]
