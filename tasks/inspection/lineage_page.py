"""The page that `nst lineage --html` writes: one file, nothing loaded, the graph to explore and everything behind it.

All is in one JSON object, which the page's script draws; without scripts its list of artifacts is there. Of large data
sets only the tables and the image bytes that are shown are read; what was left out is said where it would have stood.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.artifacts import Manifest
from storage.errors import StoreError, UserError
from storage.lineage import Lineage, LineageNode, State
from storage.objects import Store
from storage.shards import read_table
from tasks.inspection.facts import artifact_facts, code_of, numbers_of, tested_top1
from tasks.inspection.lineage_changes import differences, flat
from tasks.inspection.lineage_layout import place
from tasks.inspection.lineage_samples import Samples, read_samples
from tasks.report_drawings import Drawing, balance_drawing, confidence_drawing, training_drawings

ASSETS = Path(__file__).parent
SCRIPTS = ("lineage_graph.js", "lineage_panel.js", "lineage_tables.js")
MOST_CLASS_TABLES = 40  # selections whose classes.parquet is read; of the others the counts in the manifest are shown
MOST_FILES, MOST_VALUES = 12, 24  # of a manifest, that are printed
KEY_DIGITS = 12

Row = dict[str, Any]


@dataclass(frozen=True)
class PageLimits:
    """How much of a lineage is in the page: artifacts; of these with figures and images; images of a selection."""

    artifacts: int = 500
    detailed: int = 8
    samples: int = 24


def write_page(store: Store, lineage: Lineage, key: str, limits: PageLimits, file: Path) -> tuple[int, int]:
    """Write the page of an artifact's lineage; returns how many artifacts are in it, and of how many."""
    nearest = lineage.nearest(key, members(lineage, key), last="report")
    shown = nearest[: limits.artifacts]
    page = page_data(store, lineage, key, shown, limits)
    page["total"] = len(nearest)
    html = _render(page)
    try:
        file.write_text(html, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}); give another place") from error
    return len(shown), len(nearest)


def members(lineage: Lineage, key: str) -> set[str]:
    """What belongs on a page: ancestors, descendants, what these were made from too, how models among them were tested."""
    found = lineage.around(key)
    found |= {step for member in found for step in lineage.inputs(member)}
    tested = {user for member in found for role, user in lineage.users.get(member, ()) if role == "model"}
    return found | {user for user in tested if lineage.nodes[user].kind == "evaluation"}


def page_data(store: Store, lineage: Lineage, key: str, shown: Sequence[str], limits: PageLimits) -> Row:
    """What the page knows. `shown`: keys of the artifacts in it, the nearest to `key` first."""
    layers = lineage.layers(set(shown))
    nodes = [lineage.nodes[member] for member in shown]
    edges = [
        (step, node.key)
        for node in nodes
        for step in lineage.inputs(node.key)
        if step in layers and (node.kind != "report" or layers[node.key] - layers[step] == 1)  # it is of everything
    ]
    order = [
        node.key for node in sorted(nodes, key=lambda node: (node.name.partition("/")[0], node.created, node.name))
    ]
    places = place(layers, edges, order)
    drawable = [node for node in nodes if node.state is State.made and node.kind in ("model", "labels", "selection")]
    detailed = [node.key for node in drawable[: limits.detailed]]
    selections = [member for member in detailed if lineage.nodes[member].kind == "selection"]
    samples = read_samples(store, lineage, selections, limits.samples)
    records = [_record(lineage, node, places[node.key], layers) for node in nodes]
    read, problems = _class_tables(store, nodes), dict(samples.problems)
    for record in records:
        node = lineage.nodes[record["key"]]
        record["classes"] = read.get(node.key)
        record["figures"], problem = _figures(store, lineage, node) if node.key in detailed else ([], "")
        record["note"] = problem or problems.get(node.key) or _left_out(node, detailed, limits)
        record["samples"] = samples.shown.get(node.key, [])
    records.sort(key=lambda record: (record["layer"], record["y"]))
    return {"of": key, "store": store.url, "nodes": records, "images": _images(samples, lineage)}


def _record(lineage: Lineage, node: LineageNode, spot: tuple[int, float], layers: dict[str, int]) -> Row:
    """One artifact. Lists of other artifacts name those in the page; `used` counts all."""
    manifest = node.manifest
    before = lineage.predecessor(node.key)
    return {
        "key": node.key,
        "name": node.name,
        "kind": node.kind,
        "stage": node.stage,
        "state": node.state.value,
        "there": node.state is State.made,
        "created": node.created,
        "deleted": node.deleted,
        "refs": list(node.names),
        "runs": list(node.runs),
        "layer": spot[0],
        "y": round(spot[1], 3),
        "inputs": [[role, key] for role, key in node.inputs.items()],
        "users": [[role, key] for role, key in lineage.users.get(node.key, ()) if key in layers],
        "used": len(lineage.made_of(node.key)),
        "facts": _facts(lineage, node),
        **_described(manifest),
        "change": _change(lineage, manifest, *before) if manifest and before else None,
    }


def _facts(lineage: Lineage, node: LineageNode) -> str:
    if node.manifest is None or node.kind == "report":
        return ""
    top1 = tested_top1(lineage, node.key)
    facts = [f"test top-1 {top1:.2%}" if top1 is not None else "", artifact_facts(node.manifest)]
    return ", ".join(filter(None, facts))


def _described(manifest: Manifest | None) -> Row:
    """What only a manifest tells."""
    if manifest is None:
        return {"code": "", "config": {}, "numbers": {}, "bytes": 0, "files": 0, "manifest": None}
    plain = manifest.model_dump(mode="json")
    plain["files"] = [f"{entry.path} ({entry.bytes:,} bytes)" for entry in manifest.files[:MOST_FILES]]
    if len(manifest.files) > MOST_FILES:
        plain["files"].append(f"and {len(manifest.files) - MOST_FILES:,} more; `nst show` has all")
    return {
        "code": code_of(manifest),
        "config": flat(manifest.config),
        "numbers": numbers_of(manifest.metrics),
        "bytes": sum(entry.bytes for entry in manifest.files),
        "files": len(manifest.files),
        "manifest": _short(plain),
    }


def _short(value: Any) -> Any:
    """JSON with long lists cut, and said so."""
    if isinstance(value, dict):
        return {name: _short(item) for name, item in value.items()}
    if isinstance(value, list):
        more = [f"and {len(value) - MOST_VALUES:,} more"] if len(value) > MOST_VALUES + 1 else []
        return [_short(item) for item in value[: MOST_VALUES if more else None]] + more
    return value


def _change(lineage: Lineage, manifest: Manifest, before: str, why: str) -> Row | None:
    """What differs from the predecessor."""
    old = lineage.nodes[before]
    if old.manifest is None:
        return None
    rows = [[c.part, c.name, c.before, c.after] for c in differences(old.manifest, manifest)]
    return {"key": before, "name": old.name, "why": why, "rows": rows}


def _class_tables(store: Store, nodes: Sequence[LineageNode]) -> dict[str, Row]:
    """Selection -> {columns, rows}, a row a class; of the nearest selections with thresholds and why images were dropped."""
    tables: dict[str, Row] = {}
    left = MOST_CLASS_TABLES
    for node in nodes:
        if node.kind != "selection" or node.manifest is None:
            continue
        entry = next((f for f in node.manifest.files if f.name == "classes.parquet"), None)
        if entry is not None and left and node.state is State.made:
            left -= 1
            try:
                table = read_table(store, entry)
            except StoreError:  # the counts are in the manifest too
                table = None
            if table is not None:
                names = ["class_name", "label", *(n for n in table.column_names if n not in ("class_name", "label"))]
                columns = [_rounded(table[name].to_pylist()) for name in names]
                tables[node.key] = {"columns": names, "rows": [list(row) for row in zip(*columns, strict=True)]}
                continue
        counts = node.manifest.metrics.get("per_class", {})
        names = node.manifest.metrics.get("class_names", [])
        rows = [list(row) for row in zip(names, range(len(names)), *counts.values(), strict=False)]
        tables[node.key] = {"columns": ["class_name", "label", *counts], "rows": rows}
    return tables


def _rounded(values: Sequence[Any]) -> list[Any]:
    """Without digits that nobody reads; None for what JSON has no word for."""
    return [(round(v, 6) if math.isfinite(v) else None) if isinstance(v, float) else v for v in values]


def _figures(store: Store, lineage: Lineage, node: LineageNode) -> tuple[list[Row], str]:
    """The report's figures of an artifact; or none, and why."""
    manifest = node.manifest
    assert manifest is not None
    drawings: list[Drawing] = []
    try:
        if node.kind == "model" and manifest.metrics.get("num_steps", 1):
            drawings = training_drawings(store, {node.name: manifest})[:2]
        elif node.kind == "labels":
            drawings = [confidence_drawing(manifest, None)]
        elif node.kind == "selection":
            labels = lineage.nodes[manifest.inputs["labels"]].manifest
            drawings = [confidence_drawing(labels, manifest)] if labels else []
            drawings.append(balance_drawing(manifest))
        fields = ("title", "alt", "caption", "light", "dark")
        return [{name: getattr(drawing, name) for name in fields} for drawing in drawings], ""
    except (StoreError, KeyError) as error:
        return [], f"no figures: {error}"


def _left_out(node: LineageNode, detailed: Sequence[str], limits: PageLimits) -> str:
    """Said of artifacts whose figures and images are not in the page."""
    if node.kind not in ("model", "labels", "selection") or node.key in detailed or node.state is not State.made:
        return ""
    return f"Figures and images are in the page for the nearest artifacts only (--pictures {limits.detailed})."


def _images(samples: Samples, lineage: Lineage) -> dict[str, dict[str, Row]]:
    """Data set -> key -> image, with the teachers and students of each of its fates by their names."""
    for images in samples.images.values():
        for image in images.values():
            for fate in image["fates"]:
                labels = lineage.nodes[fate["labels"]]
                fate["teachers"] = [n.name for r, k in labels.inputs.items() if r.startswith("model") for n in (lineage.nodes[k],)]  # fmt: skip
                users = lineage.users.get(fate["selection"], ())
                fate["students"] = [key for role, key in users if role == "selection" and lineage.nodes[key].kind == "model"]  # fmt: skip
    return samples.images


def _render(page: Row) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["short"] = lambda key: key[:KEY_DIGITS]
    data = json.dumps(page, ensure_ascii=False, separators=(",", ":"))
    return environment.get_template("lineage.html.j2").render(
        page=page,
        chosen=next(record for record in page["nodes"] if record["key"] == page["of"]),
        data=data.replace("<", "\\u003c"),  # no `</script>` can stand in it
        style=(ASSETS / "lineage.css").read_text(encoding="utf-8"),
        script="\n".join((ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS),
    )
