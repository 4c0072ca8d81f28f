"""The pages of stages that Prefect's UI shows: Markdown with the report's figures and sheets of images as data URIs.

Nothing here knows Prefect; flows/ui_artifacts.py publishes the pages.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from storage.artifacts import SOURCE_ROLE, Manifest
from storage.objects import Store
from storage.shards import index_name, read_table, shard_files
from tasks.inspection.images import contact_sheet, read_images
from tasks.markdown import escaped, table
from tasks.report import pick_images
from tasks.report_drawings import (
    Drawing,
    balance_drawing,
    class_drawing,
    classes_tested,
    confidence_drawing,
    reliability_drawing,
    training_drawings,
)
from tasks.report_images import data_uri
from tasks.results import gains, result_records
from tasks.sources import SPLITS

MOST_BYTES = 900_000  # of a page: the UI shows it whole, and Prefect refuses events of more than 1.5 MB
SHEET_BYTES = 250_000  # a larger sheet, of photographs, becomes a JPEG
SHEET_COLUMNS = 4  # readable on a phone
SHEET_IMAGES = 16
MOST_CLASSES = 40  # in a table; of more classes the ends are shown


@dataclass(frozen=True)
class RunView:
    """What pages know of a run: the artifacts that are there, by their stages' names, and where their pages are."""

    experiment: str
    store: Store
    manifests: Mapping[str, Manifest]
    link: Callable[[str], str]

    def name_of(self, key: str) -> str:
        """The stage that has an artifact; empty where this run has none."""
        return next((name for name, manifest in self.manifests.items() if manifest.key == key), "")


@dataclass(frozen=True)
class Picture:
    """A picture of a page: the first to be left out where the page would be too large."""

    alt: str
    uri: str


Block = str | Picture


def stage_page(view: RunView, name: str) -> str:
    """The page of a stage whose artifact is there: what it is, numbers, class counts, figures, images. Under 1 MB."""
    manifest = view.manifests[name]
    blocks: list[Block] = [f"## {view.experiment}/{name}", _origin(view, manifest)]
    blocks += {
        "dataset": _dataset,
        "model": _model,
        "labels": _labels,
        "selection": _selection,
        "evaluation": _evaluation,
        "report": _report,
    }[manifest.kind](view, name, manifest)
    blocks.append(f"On a command line: `nst show {view.experiment}/{name} --store {view.store.url}`")
    return fitted(blocks)


def fitted(blocks: Sequence[Block]) -> str:
    """The blocks as Markdown, with as many of the pictures, from the first, as a page may hold."""
    left = MOST_BYTES - sum(len(block.encode()) + 2 for block in blocks if isinstance(block, str))
    lines = []
    for block in blocks:
        line = block
        if isinstance(block, Picture):
            line = f"![{escaped(block.alt)}]({block.uri})"
            if len(line) > left:
                line = f"*(left out, the page would be too large: {escaped(block.alt)})*"
            left -= len(line.encode()) + 2
        lines.append(line)
    return "\n\n".join(lines)  # type: ignore[arg-type]


def results_page(view: RunView) -> str:
    """The table of a run so far: top-1 of teacher and students on the test images, counts of pseudo labels."""
    records = result_records(view.experiment, dict(view.manifests))
    with_top5 = any(record["top5"] is not None for record in records)
    others = list(dict.fromkeys(title for record in records for title in record["others"]))
    rows = []
    for record, gain in zip(records, gains(records), strict=True):
        name = f"{record['iteration']}/{record['role']}"
        shares = [_percent(record["top1"]), *([_percent(record["top5"])] if with_top5 else [])]
        counts = [_count(record[field]) for field in ("kept", "dropped", "duplicated")]
        robust = [_percent(record["others"].get(title)) for title in others]
        rows.append(
            [f"[{name}]({view.link(name)})", *shares, "" if gain is None else f"{100 * gain:+.2f}", *robust, *counts]
        )
    top5 = ["top-5, %"] if with_top5 else []
    named = [f"{title}, %" for title in others]
    head = ["model", "top-1, %", *top5, "gain", *named, "kept", "dropped", "duplicated"]
    return "\n\n".join(
        [
            f"## {view.experiment}: results",
            table(head, rows),
            "Top-1 on the test images; gain in points over the first teacher. Kept, dropped, duplicated: unlabeled images "
            "of the selection that the student learned from.",
        ]
    )


def _origin(view: RunView, manifest: Manifest) -> str:
    """A table of what the artifact is and what it was made from, when and where."""
    provenance = manifest.provenance
    inputs = []
    for role, key in sorted(manifest.inputs.items()):
        name = view.name_of(key)
        where = f"[{name}]({view.link(name)}) " if name else ""
        inputs.append(f"{role}: {where}`{key[:12]}`" if role != SOURCE_ROLE else f"files: `{key[:12]}`")
    rows = [
        ["artifact", f"{manifest.kind} `{manifest.key}`"],
        ["made from", ", ".join(inputs) or "-"],
        [
            "made",
            f"{provenance.get('created', '')} in {provenance.get('seconds', 0):.0f} s on {provenance.get('device', '')}",
        ],
    ]
    if manifest.generation:
        rows.append(["rerun", f"number {manifest.generation}"])
    return table(["", ""], rows)


def _dataset(view: RunView, name: str, manifest: Manifest) -> list[Block]:
    metrics = manifest.metrics
    splits = [split for split in SPLITS if split in metrics]
    rows = [
        [split, *(_count(metrics[split].get(field)) for field in ("images", "rejected", "leaked"))] for split in splits
    ]
    blocks: list[Block] = [table(["split", "images", "rejected", "leaked"], rows)]
    if "labeled_per_class" in metrics:
        blocks.append(_class_table(metrics["class_names"], {"labeled images": metrics["labeled_per_class"]}))
    split = splits[0]
    keys = _sample_keys(view.store, manifest, split)
    images = read_images(view.store, manifest, split, keys)
    blocks.append(_sheet({f"{split} images": [(image, "") for image in images]}))
    return blocks


def _sample_keys(store: Store, manifest: Manifest, split: str) -> list[str]:
    """Keys of a few images, spread over the shards; of each of these only the index is read."""
    shards = shard_files(manifest, split)
    num = min(SHEET_COLUMNS, len(shards))
    keys = []
    for shard in (shards[i * len(shards) // num] for i in range(num)):
        own = read_table(store, manifest.file(index_name(shard)), ["key"])["key"].to_pylist()
        most = min(len(own), SHEET_IMAGES // num)
        keys += [own[i * len(own) // most] for i in range(most)]
    return keys


def _model(view: RunView, name: str, manifest: Manifest) -> list[Block]:
    metrics, rate = manifest.metrics, manifest.provenance.get("train_images_per_s")
    rows = [
        ["validation top-1, %", _percent(metrics["val_top1"])],
        ["parameters", _count(metrics["num_parameters"])],
        ["steps", _count(metrics["num_steps"])],
        ["images a second", f"{rate:,.0f}" if rate else "-"],
    ]
    losses = {"last loss": "final_loss_labeled", "on unlabeled images": "final_loss_unlabeled"}
    rows += [[words, f"{metrics[field]:.3f}"] for words, field in losses.items() if field in metrics]
    blocks: list[Block] = [table(["", ""], rows)]
    if metrics["num_steps"]:
        blocks += _drawn(training_drawings(view.store, {name: manifest}))
    return blocks


def _labels(view: RunView, name: str, manifest: Manifest) -> list[Block]:
    metrics = manifest.metrics
    return [
        f"**{metrics['images']:,}** images labeled, mean confidence **{metrics['mean_confidence']:.3f}**.",
        *_drawn([confidence_drawing(manifest, None)]),
        _class_table(metrics["class_names"], {"labeled as the class": metrics["per_class"]}),
    ]


def _selection(view: RunView, name: str, manifest: Manifest) -> list[Block]:
    metrics, labels = manifest.metrics, view.manifests[view.name_of(manifest.inputs["labels"])]
    data = view.manifests[view.name_of(manifest.inputs["data"])]
    fields = ("labeled", "kept", "dropped", "duplicated", "total")
    blocks: list[Block] = [table(list(fields), [[_count(metrics[field]) for field in fields]])]
    blocks += _drawn([confidence_drawing(labels, manifest), balance_drawing(manifest)])
    picked = {fate: rows for fate, rows in pick_images(view.store, labels, manifest, SHEET_IMAGES).items() if rows}
    keys = [row["key"] for rows in picked.values() for row in rows]
    images = dict(zip(keys, read_images(view.store, data, "unlabeled", keys), strict=True))
    blocks.append(
        _sheet(
            {
                fate: [(images[row["key"]], f"{row['class_name'][:9]} ({row['confidence']:.2f})") for row in rows]
                for fate, rows in picked.items()
            }
        )
    )
    blocks.append(_class_table(metrics["class_names"], metrics["per_class"]))
    return blocks


def _evaluation(view: RunView, name: str, manifest: Manifest) -> list[Block]:
    if manifest.stage != "evaluate":
        return _robustness(manifest)
    metrics = manifest.metrics
    rows = [
        [split, _count(metrics[split]["images"]), *(_percent(metrics[split].get(n)) for n in ("top1", "top5", "ece"))]
        for split in ("val", "test")
    ]
    names, sizes, accuracy = classes_tested(view.store, manifest)
    columns = {"test images": sizes.tolist(), "top-1, %": (accuracy * 100).round(1).tolist()}
    blocks: list[Block] = [table(["split", "images", "top-1, %", "top-5, %", "calibration error, %"], rows)]
    if any(entry.name == "reliability.parquet" for entry in manifest.files):
        blocks += _drawn([reliability_drawing(view.store, manifest)])
    first = view.manifests.get("0/evaluate")
    if first is not None and first.key != manifest.key:
        _, _, before = classes_tested(view.store, first)
        network = view.name_of(manifest.inputs["model"]) or name
        blocks += _drawn([class_drawing(names, before, accuracy, network)])
        columns["gain, points"] = ((accuracy - before) * 100).round(1).tolist()
    return [*blocks, _class_table(names, columns)]


def _robustness(manifest: Manifest) -> list[Block]:
    """Errors by corruption and severity, or top-1 by epsilon."""
    metrics = manifest.metrics
    images = f"{_count(metrics['images'])} {metrics.get('split', '')} images".replace("  ", " ")
    if "flips" in metrics:
        rows = [
            [kind.replace("_", " "), _percent(flip), f"{metrics['top5_distances'][kind]:.3f}"]
            for kind, flip in metrics["flips"].items()
        ]
        return [images, table(["perturbation", "flips, %", "top-5 distance"], rows)]
    if "errors" not in metrics and "accuracy" not in metrics:
        rows = [
            [name, _percent(metrics.get(name))] for name in ("top1", "top5", "ece") if metrics.get(name) is not None
        ]
        return [images, table(["", "%"], rows)]
    if "accuracy" in metrics:
        rows = [[epsilon, _percent(value)] for epsilon, value in metrics["accuracy"].items()]
        return [images, table(["largest change of a pixel, 1/255", "top-1, %"], rows)]
    severities = list(next(iter(metrics["errors"].values())))
    rows = [
        [kind.replace("_", " "), *(_percent(own[s]) for s in severities), _percent(metrics["mean_errors"][kind])]
        for kind, own in metrics["errors"].items()
    ]
    rows.append(["all", *("" for _ in severities), _percent(metrics["mean_error"])])
    return [f"Error in percent by severity, {images}.", table(["corruption", *severities, "mean"], rows)]


def _report(view: RunView, name: str, manifest: Manifest) -> list[Block]:
    place = view.store.location(manifest.file("report.html").path)
    return [results_page(view), f"The page with all figures and images: `{place}`"]


def _drawn(drawings: Sequence[Drawing]) -> list[Block]:
    """Each figure with its title and caption; on a white ground, which both of the UI's color schemes bear."""
    blocks: list[Block] = []
    for drawing in drawings:
        blocks += [f"### {drawing.title}", Picture(drawing.alt, drawing.light), f"*{drawing.caption}*"]
    return blocks


def _sheet(groups: Mapping[str, Sequence[tuple[Any, str]]]) -> Block:
    """Images of a few kinds as one picture."""
    if not any(groups.values()):
        return "No images."
    sheet, stream = contact_sheet(groups, SHEET_COLUMNS), io.BytesIO()
    sheet.save(stream, "PNG", optimize=True)
    subtype = "png"
    if stream.tell() > SHEET_BYTES:
        stream, subtype = io.BytesIO(), "jpeg"
        sheet.save(stream, "JPEG", quality=85)
    counts = ", ".join(f"{len(tiles)} {title}" for title, tiles in groups.items())
    return Picture(f"Sheet of images: {counts}", data_uri(stream.getvalue(), subtype))


def _class_table(names: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> str:
    """A row a class, folded away; of many classes those at both ends of the first column."""
    order = list(range(len(names)))
    title = "All classes"
    if len(names) > MOST_CLASSES:
        ranked = np.argsort(-np.asarray(next(iter(columns.values()))), kind="stable").tolist()
        order = [*ranked[: MOST_CLASSES // 2], *ranked[-MOST_CLASSES // 2 :]]
        title = f"{MOST_CLASSES // 2} classes with the most and {MOST_CLASSES // 2} with the fewest of {len(names):,}"
    rows = [[escaped(names[n]), *(_count(values[n]) for values in columns.values())] for n in order]
    return f"<details><summary>{title}</summary>\n\n{table(['class', *columns], rows)}\n\n</details>"


def _count(value: float | None) -> str:
    if value is None or value != value:
        return "-"
    return f"{value:,}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
