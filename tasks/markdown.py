"""Markdown of words that are not ours: class names, file names and settings are shown as they are, whatever is in them."""

from collections.abc import Sequence

SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*_[]|#~$"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\n": " "})


def escaped(text: str) -> str:
    """A text of one line that no reader of Markdown takes for more."""
    return text.translate(SPECIAL)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of finished cells: the first column to the left, numbers to the right; without a head all to the left."""
    marks = [":--", *("--:" for _ in head[1:])] if any(head) else [":--" for _ in head]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, marks, *rows))
