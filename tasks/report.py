"""report: one self-contained HTML page of a whole run: results, training curves, selections, images, lineage.

The page loads nothing: figures and images are data URIs. It holds no time and no path of this machine, so the same
inputs make the same bytes. Of large data sets only the rows and the image bytes that are shown are read.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pydantic import Field

from storage.artifacts import Manifest, artifact_folder, publish_file
from storage.keys import Config, canonical_json
from storage.objects import Store
from storage.shards import ShardReader, shard_files
from tasks.contract import StageContext, StageResult
from tasks.evaluators import EVALUATORS
from tasks.inspection.images import locate_images
from tasks.label import model_roles
from tasks.report_drawings import balance_drawing, class_drawing, classes_tested, confidence_drawing, training_drawings
from tasks.report_evaluations import evaluation_section
from tasks.report_figures import MOST_BARS
from tasks.report_images import leak_section, shown
from tasks.results import gains, result_records
from tasks.selection.config import SelectConfig
from tasks.selection.decisions import read_decisions
from tasks.sources import SPLITS

VERSION = 2  # 2: evaluations
TEMPLATE = "report.html.j2"
CONFIDENCE_BINS = 20  # the shown images are spread over these
KEY_DIGITS = 12
MOST_CLASS_ROWS = 20
WITHIN_ITERATION = ("teacher", "selector", "label", "select", "student", "finetune", *EVALUATORS)

Item = TypeVar("Item")
Row = dict[str, Any]


class ReportConfig(Config):
    """What the page is called and how many images it shows."""

    experiment: str = Field(description="name of the experiment, the page's title")
    grid_images: int = Field(
        24, ge=1, le=500, description="kept images shown of each selection, and as many dropped ones"
    )


def report(context: StageContext, config: ReportConfig, inputs: dict[str, Manifest]) -> StageResult:
    """Write the page of a run. `inputs`: stage name (`prepare`, `0/teacher`, `1/select` ...) -> artifact."""
    records = result_records(config.experiment, inputs)
    rounds = _rounds(inputs)
    sections = []
    for number, stages in rounds.items():
        sections.append(_section(context.store, config, inputs, number, stages))
        context.on_progress({"done": len(sections), "total": len(rounds), "unit": "iterations"})
    page = {
        "experiment": config.experiment,
        "data": {**inputs["unlabeled"].metrics, **inputs["prepare"].metrics},
        "splits": SPLITS,
        "result": _result(records, inputs),
        "training": training_drawings(context.store, _models(inputs)),
        "sections": sections,
        "evaluations": evaluation_section(context.store, _models(inputs), _evaluations(inputs)),
        "classes": _class_accuracy(context.store, records, inputs),
        "leaks": leak_section(context.store, inputs["unlabeled"], inputs["prepare"], config.grid_images // 2),
        "lineage": _lineage(inputs),
    }
    with context.store.staging() as folder:
        (folder / "report.html").write_text(_render(page), encoding="utf-8", newline="\n")
        place = artifact_folder("report", context.key)
        entry = publish_file(context.store, place, "report.html", folder / "report.html")
    return StageResult((entry,), {"models": records})


def spread(items: Sequence[Item]) -> list[Item]:
    """The items in an order of which every beginning is spread over the whole: last, first, middle, quarters ..."""
    last = len(items) - 1
    halvings = [1 << power for power in range(len(items).bit_length())]
    steps = [round(k * last / parts) for parts in halvings for k in range(parts, -1, -1)]
    return [items[i] for i in dict.fromkeys([*steps, *range(len(items))])]


def take_evenly(queues: Iterable[Sequence[Item]], most: int) -> list[Item]:
    """Up to `most` items, one of each queue in turn until all are empty."""
    left = [list(queue) for queue in queues]
    taken: list[Item] = []
    while len(taken) < most and any(left):
        taken += [queue.pop(0) for queue in left if queue]
    return taken[:most]


def pick_decisions(decisions: pa.RecordBatchReader, kept: bool, classes: Sequence[int], most: int) -> list[Row]:
    """Up to `most` decisions to show: key, label, confidence, decision, copies. Chance is a hash of the key.

    `decisions` are those of `read_decisions`. Kept ones are spread over `classes`, then over confidence; dropped ones
    over confidence alone. One pass; memory grows with `most` only.
    """
    import duckdb

    wanted = [classes[i * len(classes) // most] for i in range(most)] if len(classes) > most else list(classes)
    query = """
        SELECT label_group, least(floor(confidence * $bins), $bins - 1) AS bin,
            arg_min(
                {'key': key, 'label': label, 'confidence': confidence, 'decision': decision, 'copies': copies},
                md5(key), $most
            )
        FROM (
            SELECT *, CASE WHEN $kept THEN label ELSE 0 END AS label_group FROM decisions
            WHERE (decision = 'kept') = $kept AND (NOT $kept OR label IN (SELECT unnest($wanted)))
        )
        GROUP BY label_group, bin ORDER BY label_group, bin
    """
    values = {"kept": kept, "wanted": wanted, "bins": CONFIDENCE_BINS, "most": most}
    groups: dict[int, list[list[Row]]] = {}
    with duckdb.connect() as connection:
        for group, _, rows in connection.execute(query, values).fetchall():
            groups.setdefault(group, []).append(rows)
    queues = []
    for number, bins in enumerate(groups.values()):
        order = spread(bins)
        turn = number % len(order)  # with one image a class, not of each class the most confident one
        queues.append(take_evenly(order[turn:] + order[:turn], most))
    picked = take_evenly(queues, most)
    return sorted(picked, key=lambda row: (row["label"] if kept else 0, -row["confidence"], row["key"]))


def pick_images(store: Store, labels: Manifest, selection: Manifest, most: int) -> dict[str, list[Row]]:
    """Up to `most` kept and as many dropped images to show, as `pick_decisions` has them and with their class_name."""
    names, kept = selection.metrics["class_names"], selection.metrics["per_class"]["kept"]
    classes = [number for number, count in enumerate(kept) if count]
    picked = {
        fate: pick_decisions(read_decisions(store, labels, selection), fate == "kept", classes, most)
        for fate in ("kept", "dropped")
    }
    return {fate: [{**row, "class_name": names[row["label"]]} for row in rows] for fate, rows in picked.items()}


def _render(page: dict[str, Any]) -> str:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        count=lambda value: "–" if value is None else f"{value:,}",
        percent=lambda value: "–" if value is None else f"{value * 100:.2f}",
        points=lambda value: "–" if value is None else f"{value * 100:+.2f}",
        short=lambda key: key[:KEY_DIGITS],
    )
    return environment.get_template(TEMPLATE).render(page)


def _rounds(inputs: dict[str, Manifest]) -> dict[int, dict[str, Manifest]]:
    """Iteration -> its stages by their short names, of the iterations in which something was labeled or selected."""
    rounds: dict[int, dict[str, Manifest]] = {}
    for name in sorted(inputs, key=stage_order):
        if "/" in name:
            number, stage = name.split("/")
            rounds.setdefault(int(number), {})[stage] = inputs[name]
    return {number: stages for number, stages in rounds.items() if "label" in stages or "select" in stages}


def stage_order(name: str) -> tuple[int, int, str]:
    """Sorts stage names in the order of work; the report comes before the first iteration."""
    number, _, stage = name.rpartition("/")
    place = WITHIN_ITERATION.index(stage) if stage in WITHIN_ITERATION else len(WITHIN_ITERATION)
    return (int(number), place, stage) if number else (-1, 0, stage)


def _result(records: list[Row], inputs: dict[str, Manifest]) -> Row:
    """The rows of the table, and what the reader needs to judge a difference."""
    teacher = next((record["top1"] for record in records if record["top1"] is not None), None)
    rows = [{**record, "gain": gain} for record, gain in zip(records, gains(records), strict=True)]
    num_images = inputs["0/evaluate"].metrics["test"]["images"] if "0/evaluate" in inputs else 0
    error = math.sqrt(teacher * (1 - teacher) / num_images) if num_images and teacher is not None else None
    return {
        "rows": rows,
        "with_top5": any(r["top5"] is not None for r in records),
        "others": list(dict.fromkeys(title for record in records for title in record["others"])),
        "images": num_images,
        "error": error,
    }


def _models(inputs: dict[str, Manifest]) -> dict[str, Manifest]:
    return {name: inputs[name] for name in sorted(inputs, key=stage_order) if inputs[name].kind == "model"}


def _evaluations(inputs: dict[str, Manifest]) -> list[Manifest]:
    return [inputs[name] for name in sorted(inputs, key=stage_order) if inputs[name].kind == "evaluation"]


def _section(
    store: Store, config: ReportConfig, inputs: dict[str, Manifest], number: int, stages: dict[str, Manifest]
) -> Row:
    """One iteration: who labeled, what was selected, and images of both fates."""
    labels, selection = stages.get("label"), stages.get("select")
    by_key = {manifest.key: name for name, manifest in inputs.items()}
    settings = SelectConfig.model_validate(selection.config) if selection else None
    drawn, teachers = [], [labels.inputs[role] for role in model_roles(labels.inputs)] if labels else []
    if labels:
        drawn.append(confidence_drawing(labels, selection))
    if selection:
        drawn.append(balance_drawing(selection))
    return {
        "number": number,
        "labels": labels.metrics if labels else None,
        "labeled_by": ", ".join(by_key.get(key, key[:KEY_DIGITS]) for key in teachers),
        "selection": selection.metrics if selection else None,
        "settings": settings,
        "figures": drawn,
        "grids": _grids(store, config, inputs, selection) if selection else [],
    }


def _grids(store: Store, config: ReportConfig, inputs: dict[str, Manifest], selection: Manifest) -> list[Row]:
    """The shown images of both fates. Keys are picked first; only their bytes are read, one image at a time."""
    data = inputs["unlabeled"]
    labels = next(manifest for manifest in inputs.values() if manifest.key == selection.inputs["labels"])
    picked = pick_images(store, labels, selection, config.grid_images)
    places = locate_images(store, data, "unlabeled", [row["key"] for rows in picked.values() for row in rows])
    reader, grids = ShardReader(store, shard_files(data, "unlabeled"), whole=False), []
    try:
        for fate, rows in picked.items():
            tiles = [_tile(reader, row, places[row["key"]]) for row in rows]
            grids.append({"fate": fate, "tiles": tiles, "of": selection.metrics[fate]})
    finally:
        reader.close()
    return grids


def _tile(reader: ShardReader, row: Row, place: Row) -> Row:
    return {**row, "source": place["source"], **shown(reader, place)}


def _class_accuracy(store: Store, records: list[Row], inputs: dict[str, Manifest]) -> Row | None:
    """Teacher against last student on each class of the test set; None for a run without a student."""
    last = records[-1]
    evaluations = (inputs.get("0/evaluate"), inputs.get(f"{last['iteration']}/evaluate"))
    if last["iteration"] == 0 or None in evaluations:
        return None
    student = f"{last['iteration']}/{last['role']}"
    (names, sizes, before), (_, _, after) = (classes_tested(store, found) for found in evaluations if found)
    gains = after - before
    columns = zip(names, sizes.tolist(), before.tolist(), after.tolist(), gains.tolist(), strict=True)
    rows = [dict(zip(("name", "images", "before", "after", "gain"), c, strict=True)) for c in columns if c[1]]
    cut = len(rows) > MOST_BARS
    if cut:
        rows.sort(key=lambda row: -row["gain"])
        rows = rows[: MOST_CLASS_ROWS // 2] + rows[-MOST_CLASS_ROWS // 2 :]
    figure = class_drawing(names, before, after, student)
    return {"figure": figure, "rows": rows, "student": student, "all": not cut}


def _lineage(inputs: dict[str, Manifest]) -> list[Row]:
    """Each artifact and what it was made from, in the order of work. Times and machines are left to the manifests."""
    by_key = {manifest.key: name for name, manifest in inputs.items()}
    return [
        {
            "name": name,
            "kind": manifest.kind,
            "key": manifest.key,
            "generation": manifest.generation,
            "inputs": [(role, key, by_key.get(key, "")) for role, key in sorted(manifest.inputs.items())],
            "config": canonical_json(manifest.config).decode() if manifest.config else "",
        }
        for name, manifest in sorted(inputs.items(), key=lambda item: stage_order(item[0]))
    ]
