"""The lineage of an iteration as a mermaid graph in Markdown: what each artifact was made from, with links to pages."""

from collections.abc import Sequence

from flows.graph import Node
from flows.mermaid import Box, box_id, flowchart
from flows.ui_pages import RunView
from tasks.inspection.facts import artifact_facts


def iteration_of(name: str) -> int | None:
    """The iteration that a stage belongs to, the data sets to the first; None for the report."""
    number = name.rpartition("/")[0]
    return int(number) if number else (None if name == "report" else 0)


def lineage_page(view: RunView, nodes: Sequence[Node], iteration: int) -> str:
    """One iteration's stages and the earlier ones that they were made from; those not made yet have broken lines."""
    own = [node for node in nodes if iteration_of(node.name) == iteration]
    needed = {name for node in own for name in node.inputs.values()} | {node.name for node in own}
    shown = [node for node in nodes if node.name in needed]
    boxes = [_box(view, node.name, before=node not in own) for node in shown]
    arrows = [
        (box_id(name), box_id(node.name), "" if role == "data" else role)
        for node in own
        for role, name in node.inputs.items()
    ]
    graph = flowchart(boxes, arrows)
    return (
        f"## {view.experiment}: lineage of iteration {iteration}\n\n```mermaid\n{graph}\n```\n\n{_table(view, own)}\n"
    )


def _box(view: RunView, name: str, before: bool) -> Box:
    manifest = view.manifests.get(name)
    if manifest is None:
        return Box(box_id(name), (name, "not made yet"), "missing")
    facts = (manifest.kind, manifest.key[:12], *artifact_facts(manifest).split(", "))
    return Box(box_id(name), (name, *facts), "before" if before else "made", view.link(name))


def _table(view: RunView, own: Sequence[Node]) -> str:
    """The same in words, for reading and copying keys."""
    lines = ["| stage | artifact | made from |", "| :-- | :-- | :-- |"]
    for node in own:
        manifest = view.manifests.get(node.name)
        name = f"[{node.name}]({view.link(node.name)})" if manifest else node.name
        key = f"{manifest.kind} `{manifest.key[:12]}`" if manifest else "not made yet"
        lines.append(f"| {name} | {key} | {', '.join(node.inputs.values()) or 'files'} |")
    return "\n".join(lines)
