"""The command `nst lineage`: what an artifact was made from and what was made of it. Loads neither torch nor Prefect."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from rich.tree import Tree

from flows.mermaid import Box, box_id, flowchart
from flows.terminal import JsonOption, StoreOption, check_target, console
from storage.artifacts import Manifest
from storage.lineage import Lineage, LineageNode, State, read_lineage
from storage.objects import Store
from tasks.inspection.facts import artifact_facts, code_of, numbers_of, tested_top1

FEW = 12  # branches of one artifact that are printed
MOST_LINES = 200  # of either half of the tree
MERMAID_STYLES = {State.made: "made", State.deleted: "missing", State.recorded: "missing"}


def lineage(
    ref: Annotated[str, typer.Argument(help="A ref such as digits/1/select, an older one (@1), or a key's beginning.")],
    html: Annotated[
        Path | None, typer.Option(help="Write a page to explore, that needs no network, to this file.")
    ] = None,
    most: Annotated[int, typer.Option(min=1, help="Of the page: artifacts, the nearest.")] = 500,
    pictures: Annotated[
        int, typer.Option(min=0, help="Of the page: artifacts with figures and images, the nearest.")
    ] = 8,
    samples: Annotated[int, typer.Option(min=0, max=500, help="Of the page: images of a selection.")] = 24,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    mermaid: Annotated[bool, typer.Option("--mermaid", help="Print a mermaid flowchart.")] = False,
    store: StoreOption = "nst-store",
    as_json: JsonOption = False,
) -> None:
    """Show what an artifact was made from and what was made of it, deleted artifacts too.

    Example: nst lineage digits/1/select --html lineage.html
    """
    if html is not None:
        check_target(html, force)
    opened = Store(store)
    graph = read_lineage(opened)
    node = graph.find(opened, ref)
    if as_json:
        print(json.dumps({"of": node.key, "artifacts": _records(graph, node)}, indent=1))
    elif mermaid:
        print(_chart(graph, node))
    elif html is not None:
        from tasks.inspection.lineage_page import PageLimits, write_page

        limits = PageLimits(artifacts=most, detailed=pictures, samples=samples)
        shown, total = write_page(opened, graph, node.key, limits, html)
        console.print(f"{shown:,} of {total:,} artifacts: {html.absolute()}", highlight=False, soft_wrap=True)
    else:
        console.print(_tree(graph, node), soft_wrap=True)


def _tree(graph: Lineage, node: LineageNode) -> Tree:
    """The artifact with two branches: what it was made from, what was made of it."""
    tree = Tree(_line(graph, node, ""), guide_style="dim")
    for title, up in (("made from", True), ("used by", False)):
        steps = _steps(graph, node, up, reports=True)
        if steps:
            _grow(tree.add(Text(title, "italic")), graph, steps, up)
        else:
            tree.add(Text(f"{title}: nothing", "italic"))
    return tree


def _steps(graph: Lineage, node: LineageNode, up: bool, reports: bool = False) -> list[tuple[str, str]]:
    """(role, key) of what it was made from, or of what was made of it.

    A report is of everything in its run, so what was made of an artifact is in no report that the artifact is not in too.
    """
    if up:
        return list(node.inputs.items())
    return [step for step in graph.users.get(node.key, []) if reports or graph.nodes[step[1]].kind != "report"]


def _grow(top: Tree, graph: Lineage, steps: list[tuple[str, str]], up: bool) -> None:
    """Depth first; an artifact that stands above already is not unfolded again."""
    waiting: list[tuple[Tree, str, str]] = []
    seen: set[str] = set()

    def wait(branch: Tree, steps: list[tuple[str, str]]) -> None:
        if len(steps) > FEW:
            waiting.append((branch, "", f"and {len(steps) - FEW:,} more (--json has all)"))
        waiting.extend((branch, key, role) for role, key in reversed(steps[:FEW]))

    wait(top, steps)
    for _ in range(MOST_LINES):
        if not waiting:
            return
        parent, key, words = waiting.pop()
        if not key:
            parent.add(Text(words, "dim"))
            continue
        node = graph.nodes[key]
        below = _steps(graph, node, up)
        if key in seen and below:
            parent.add(_line(graph, node, words, short=True).append("  (see above)", "dim"))
            continue
        seen.add(key)
        wait(parent.add(_line(graph, node, words)), below)
    top.add(Text("and more (--json has all)", "dim"))


def _line(graph: Lineage, node: LineageNode, role: str, short: bool = False) -> Text:
    """One artifact: role, name, kind, key, date, what matters, code, by how many it is used."""
    line = Text()
    line.append(f"{role}: " if role else "", "dim")
    line.append(node.name, "" if short else "bold")
    if short:
        return line
    if node.names or node.runs:  # else the name is the kind and the key
        line.append(f"  {node.kind} {node.key[:12]}", "cyan")
    if node.state in (State.recorded, State.unknown):
        line.append(f"  {node.state.value}", "yellow")
    if node.state is State.deleted:
        line.append(f"  deleted {node.deleted[:10]}", "yellow")
    for fact in _facts(graph, node):
        line.append(f"  {fact}", "")
    return line


def _facts(graph: Lineage, node: LineageNode) -> list[str]:
    """Date, counts, accuracy, code, by how many it is used."""
    facts = [node.created[:10]]
    if node.manifest is not None:
        top1 = tested_top1(graph, node.key)
        code = code_of(node.manifest)
        facts += ["" if node.kind == "report" else artifact_facts(node.manifest)]
        facts += [f"test top-1 {top1:.2%}" if top1 is not None else "", f"code {code}" if code else ""]
    used = len(graph.made_of(node.key))
    return [fact for fact in (*facts, f"used by {used:,}" if used else "") if fact]


def _records(graph: Lineage, node: LineageNode) -> list[dict[str, Any]]:
    """Everything in the lineage of an artifact for programs, in the order of layers."""
    layers = graph.layers(graph.around(node.key))
    nodes = [graph.nodes[key] for key in sorted(layers, key=lambda key: (layers[key], graph.nodes[key].created, key))]
    return [
        {
            "key": n.key,
            "name": n.name,
            "kind": n.kind,
            "stage": n.stage,
            "state": n.state.value,
            "layer": layers[n.key],
            "created": n.created,
            "deleted": n.deleted,
            "refs": list(n.names),
            "runs": list(n.runs),
            "inputs": dict(n.inputs),
            "used_by": [{"role": role, "key": key} for role, key in graph.users.get(n.key, ())],
            **_described(graph, n.key, n.manifest),
        }
        for n in nodes
    ]


def _described(graph: Lineage, key: str, manifest: Manifest | None) -> dict[str, Any]:
    """What only a manifest tells; `test_top1` of a model is its evaluation's."""
    if manifest is None:
        return {"metrics": {}, "test_top1": None, "config": {}, "code": {}}
    return {
        "metrics": numbers_of(manifest.metrics),
        "test_top1": tested_top1(graph, key),
        "config": manifest.config,
        "code": manifest.provenance.get("code") or {},
    }


def _chart(graph: Lineage, node: LineageNode) -> str:
    """Its ancestors and descendants as a mermaid flowchart; the artifact itself is a box of its own color."""
    layers = graph.layers(graph.around(node.key))
    keys = sorted(layers, key=lambda key: (layers[key], graph.nodes[key].name, key))
    boxes = []
    for n in (graph.nodes[key] for key in keys):
        facts = artifact_facts(n.manifest).split(", ") if n.manifest and n.kind != "report" else []
        facts = [f"{n.kind} {n.key[:12]}", *facts] if n.names or n.runs else facts  # else the name says that
        state = {State.made: "", State.deleted: f"deleted {n.deleted[:10]}"}.get(n.state, n.state.value)
        style = "chosen" if n is node else MERMAID_STYLES.get(n.state, "before")
        boxes.append(Box(box_id(n.key), (n.name, *(words for words in (*facts, state) if words)), style))
    arrows = [
        (box_id(key), box_id(n.key), "" if role == "data" else role)
        for n in (graph.nodes[key] for key in keys)
        for role, key in n.inputs.items()
        if key in layers
    ]
    return flowchart(boxes, arrows)
