"""Images that cannot be used: how many of a split may be, told as soon as it is certain, not after days of reading."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from storage.artifacts import Part
from storage.errors import UserError
from tasks.source_parts import FIRST_REJECTS, Stretch, shards_of
from tasks.sources import UNKNOWN_ROWS

MARGIN = (
    4  # nobody knows how many images unread tars hold: at most so many times what the tars before them lead to expect
)

Progress = dict[str, Any]


@dataclass(slots=True)
class Seen:
    """What was read of a split so far, and what is left of it."""

    kept: int = 0
    rejected: int = 0
    reasons: list[str] = field(default_factory=list)
    tar_images: int = 0
    tar_bytes: int = 0
    rows_left: int = 0  # of files whose rows are known
    bytes_left: int = 0  # of tars

    def most_images(self) -> float:
        """More than the split can hold, as far as can be known."""
        images = self.kept + self.rejected + self.rows_left
        if not self.bytes_left:
            return images
        if not self.tar_images:
            return float("inf")
        return images + MARGIN * self.bytes_left * self.tar_images / max(1, self.tar_bytes)


def check_rejects(most_fraction: float, split: str, parts: Sequence[Part]) -> dict[str, int]:
    """The counts of a split's images and rejects. Raises UserError on too many rejects, and where nothing is left.

    A torn tar is one row of the rejects and counts as all the images that it lost, by estimate.
    """
    facts = [part_facts(part) for part in parts]
    kept, rejected = (sum(fact[name] for fact in facts) for name in ("kept", "rejected"))
    if rejected > most_fraction * (kept + rejected) or not kept:
        reasons = [reason for fact in facts for reason in fact["reasons"]]
        raise UserError(
            f"data.{split}: {rejected} of {kept + rejected} images cannot be decoded, more than "
            f"data.max_reject_fraction={most_fraction} allows ({_first(reasons) or 'the files hold no rows'}); mend or remove them"
        )
    return {"images": kept, "rejected": rejected}


def part_facts(part: Part) -> dict[str, Any]:
    """Of a part what its split's limit depends on, as JSON."""
    kept = sum(shard.index.rows or 0 for shard in shards_of(part))
    return {"kept": kept, "rejected": part.facts["rejected"], "reasons": part.facts["rejects"]}


class RejectLimit:
    """Adds up the rejects while shards are made, and ends the work where a split has too many whatever may follow."""

    def __init__(self, most_fraction: float, stretches: Sequence[Stretch], found: Iterable[Part | None]) -> None:
        """`found`: for each stretch its part, where an earlier attempt made it. Raises UserError as `add` does."""
        self._most, self._stretches = most_fraction, {stretch.part_key(): stretch for stretch in stretches}
        self._seen = {stretch.file.split: Seen() for stretch in stretches}
        for stretch in self._stretches.values():
            seen = self._seen[stretch.file.split]
            if stretch.last == UNKNOWN_ROWS:
                seen.bytes_left += stretch.file.bytes
            else:
                seen.rows_left += stretch.num_images
        for part in found:
            if part is not None:
                self.add(part.key, **part_facts(part))

    def add(self, key: str, kept: int, rejected: int, reasons: Sequence[str]) -> None:
        """A stretch (by its part's key) was read. Raises UserError where its split cannot stay within the limit."""
        stretch = self._stretches.pop(key, None)
        if stretch is None:  # told by two attempts
            return
        seen = self._seen[stretch.file.split]
        seen.kept, seen.rejected = seen.kept + kept, seen.rejected + rejected
        seen.reasons = [*seen.reasons, *reasons][:FIRST_REJECTS]
        if stretch.last == UNKNOWN_ROWS:
            seen.bytes_left -= stretch.file.bytes
            seen.tar_bytes, seen.tar_images = seen.tar_bytes + stretch.file.bytes, seen.tar_images + kept + rejected
        else:
            seen.rows_left -= stretch.num_images
        if seen.rejected > self._most * seen.most_images() and (seen.rows_left or seen.bytes_left):
            raise UserError(
                f"data.{stretch.file.split}: {seen.rejected} of the first {seen.kept + seen.rejected} images cannot be decoded, "
                f"more than data.max_reject_fraction={self._most} allows even if all others can ({_first(seen.reasons)}); "
                "mend or remove them"
            )

    def listener(self, on_progress: Callable[[Progress], None]) -> Callable[[Progress], None]:
        """A listener for `Engine.map` that takes from the workers' progress what `add` needs."""

        def listen(progress: Progress) -> None:
            on_progress({name: value for name, value in progress.items() if name != "made"})
            if "made" in progress:
                self.add(**progress["made"])

        return listen


def _first(reasons: Sequence[str]) -> str:
    return "; ".join(reasons[:FIRST_REJECTS])
