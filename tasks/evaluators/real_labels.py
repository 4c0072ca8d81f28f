"""Several right labels an image, from a JSON file: ReaL's own form, or by file name.

ReaL (Beyer et al. 2020, "Are we done with ImageNet?") is a list whose n-th entry has the classes of ILSVRC2012_val_<n + 1, 8 digits>.
The other form maps a file's name, without folders and ending, to classes, by number or name.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from storage.errors import UserError

VALIDATION_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")


class RealLabels:
    """The classes that are right for an image, by where the image came from."""

    def __init__(self, path: str, class_names: Sequence[str]) -> None:
        """Raises UserError where the file is not of either form, or names a class that is not there."""
        self._path, self._names = path, {name: number for number, name in enumerate(class_names)}
        try:
            self._found: Any = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"real_labels={path} cannot be read as JSON ({error}); give ReaL's real.json") from None
        if not isinstance(self._found, (list, dict)):
            raise UserError(f"real_labels={path} is neither a list (ReaL's form) nor maps file names to classes")

    def of(self, sources: Sequence[str]) -> list[set[int]]:
        """The right classes of each image by its source (an index's column); an empty set: it was not judged.

        Raises UserError where no image is named in the file.
        """
        accepted = [self._of(source) for source in sources]
        if all(own is None for own in accepted):
            raise UserError(
                f"real_labels={self._path} names none of the {len(sources)} images (the first: {sources[0]!r}); its names are "
                "files without folder and ending, or it is ReaL's list and the files are ILSVRC2012_val_..."
            )
        return [own or set() for own in accepted]

    def _of(self, source: str) -> set[int] | None:
        if isinstance(self._found, list):
            number = VALIDATION_NUMBER.search(source)
            place = int(number.group(1)) - 1 if number else -1
            return {self._number(c) for c in self._found[place]} if 0 <= place < len(self._found) else None
        found = self._found.get(Path(source.rpartition(":")[2]).stem)  # of a Parquet file: FILE:PATH
        return None if found is None else {self._number(c) for c in found}

    def _number(self, value: Any) -> int:
        number = self._names.get(value) if isinstance(value, str) else value
        if not isinstance(number, int) or not 0 <= number < len(self._names):
            raise UserError(f"real_labels={self._path}: {value!r} is no class of this data set's {len(self._names)}")
        return number
