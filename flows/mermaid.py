"""Flowcharts in mermaid's language, which GitHub, Prefect's UI and many editors draw."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STYLES = {
    "chosen": "fill:#0072b2,stroke:#0072b2,color:#ffffff",
    "made": "fill:#dbeafe,stroke:#0072b2,color:#1f2937",
    "before": "fill:#f3f4f6,stroke:#9aa3af,color:#1f2937",
    "missing": "fill:transparent,stroke:#9aa3af,color:#9aa3af,stroke-dasharray:4 3",
}
SPECIAL = str.maketrans({'"': "#quot;", "<": "#lt;", ">": "#gt;", "\n": " "})


@dataclass(frozen=True)
class Box:
    """One box: its lines of text, the first one bold; a style of `STYLES`; a link, or none."""

    id: str
    lines: tuple[str, ...]
    style: str
    link: str = ""


def box_id(name: str) -> str:
    """A name that mermaid takes for a box: `s1_label`."""
    return "s" + re.sub(r"\W", "_", name)


def flowchart(boxes: Sequence[Box], arrows: Sequence[tuple[str, str, str]]) -> str:
    """A chart from top to bottom; arrows are (from, to, words or none)."""
    lines = ["flowchart TD"]
    for box in boxes:
        title, *rest = (line.translate(SPECIAL) for line in box.lines)
        lines.append(f'{box.id}["{"<br/>".join([f"<b>{title}</b>", *rest])}"]')
    lines += [f"{start} -->{f'|{words}|' if words else ''} {end}" for start, end, words in arrows]
    lines += [f'click {box.id} "{box.link}"' for box in boxes if box.link]
    styled = {style: ids for style, ids in _by_style(boxes).items() if ids}
    lines += [f"classDef {style} {STYLES[style]}" for style in styled]
    lines += [f"class {','.join(ids)} {style}" for style, ids in styled.items()]
    return "\n  ".join(lines)


def _by_style(boxes: Sequence[Box]) -> Mapping[str, list[str]]:
    return {style: [box.id for box in boxes if box.style == style] for style in STYLES}
