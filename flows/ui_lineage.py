"""The lineage of an iteration as a mermaid graph in Markdown: what each artifact was made from, with links to pages."""

from collections.abc import Sequence

from flows.console import artifact_facts
from flows.graph import Node
from flows.ui_pages import RunView

STYLES = (
    "classDef made fill:#dbeafe,stroke:#0072b2,color:#1f2937",
    "classDef before fill:#f3f4f6,stroke:#9aa3af,color:#1f2937",
    "classDef missing fill:transparent,stroke:#9aa3af,color:#9aa3af,stroke-dasharray:4 3",
)


def iteration_of(name: str) -> int | None:
    """The iteration that a stage belongs to, the data sets to the first; None for the report."""
    number = name.rpartition("/")[0]
    return int(number) if number else (None if name == "report" else 0)


def lineage_page(view: RunView, nodes: Sequence[Node], iteration: int) -> str:
    """One iteration's stages and the earlier ones that they were made from; those not made yet have broken lines."""
    own = [node for node in nodes if iteration_of(node.name) == iteration]
    needed = {name for node in own for name in node.inputs.values()} | {node.name for node in own}
    shown = [node for node in nodes if node.name in needed]
    lines = ["flowchart TD"]
    lines += [_box(view, node.name) for node in shown]
    for node in own:
        for role, name in node.inputs.items():
            label = "" if role == "data" else f"|{role}|"
            lines.append(f"{_id(name)} -->{label} {_id(node.name)}")
    lines += [f'click {_id(name)} "{view.link(name)}"' for name in (n.name for n in shown) if name in view.manifests]
    lines += STYLES
    for style, names in _styled(view, own, shown).items():
        if names:
            lines.append(f"class {','.join(map(_id, names))} {style}")
    graph = "\n  ".join(lines)
    return (
        f"## {view.experiment}: lineage of iteration {iteration}\n\n```mermaid\n{graph}\n```\n\n{_table(view, own)}\n"
    )


def _box(view: RunView, name: str) -> str:
    manifest = view.manifests.get(name)
    words = [f"<b>{name}</b>"]
    if manifest is None:
        words.append("not made yet")
    else:
        words += [manifest.kind, manifest.key[:12], *artifact_facts(manifest).split(", ")]
    return f'{_id(name)}["{"<br/>".join(words)}"]'


def _styled(view: RunView, own: Sequence[Node], shown: Sequence[Node]) -> dict[str, list[str]]:
    names = {node.name for node in own}
    there = [node.name for node in shown if node.name in view.manifests]
    return {
        "made": [name for name in there if name in names],
        "before": [name for name in there if name not in names],
        "missing": [node.name for node in shown if node.name not in view.manifests],
    }


def _table(view: RunView, own: Sequence[Node]) -> str:
    """The same in words, for reading and copying keys."""
    lines = ["| stage | artifact | made from |", "| :-- | :-- | :-- |"]
    for node in own:
        manifest = view.manifests.get(node.name)
        name = f"[{node.name}]({view.link(node.name)})" if manifest else node.name
        key = f"{manifest.kind} `{manifest.key[:12]}`" if manifest else "not made yet"
        lines.append(f"| {name} | {key} | {', '.join(node.inputs.values()) or 'files'} |")
    return "\n".join(lines)


def _id(name: str) -> str:
    """A name that mermaid takes for a box: `s1_label`."""
    return "s" + name.replace("/", "_").replace("-", "_")
