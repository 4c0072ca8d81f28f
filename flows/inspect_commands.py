"""The commands that look into a run: `sample`, `diff`, `explain`. None loads torch or Prefect."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from flows.terminal import JsonOption, StoreOption, artifact_of, check_target, console
from storage.artifacts import get
from storage.errors import UserError
from storage.objects import Store
from tasks.inspection.biography import Biography, biography
from tasks.inspection.compare_labels import LabelDiff, diff_labels
from tasks.inspection.explain_class import ClassStory, explain_class, picture_of

FEW = 16  # rows of a long table that are printed
COUNTS = ("available", "kept", "dropped", "duplicated", "copies")


def sample(
    key: Annotated[str, typer.Argument(help="An image's key, as in an index, a report, or `nst explain`.")],
    store: StoreOption = "nst-store",
    as_json: JsonOption = False,
) -> None:
    """Tell an image's biography: source, labels with their confidence, kept or dropped and why, copies, students.

    A rejected image is found by its source's path too.

    Example: nst sample digits-unlabeled-00000017
    """
    found = biography(Store(store), key)
    if as_json:
        print(json.dumps(asdict(found), indent=1))
        return
    _print_biography(found)


def diff(
    a: Annotated[str, typer.Argument(help="A label artifact's ref, such as digits/1/label.")],
    b: Annotated[str, typer.Argument(help="Another one, such as digits/2/label or digits/1/label@1.")],
    confidence: Annotated[
        float, typer.Option(min=0, max=1, help="An image is won or lost when it crosses this.")
    ] = 0.3,
    store: StoreOption = "nst-store",
    as_json: JsonOption = False,
) -> None:
    """Compare two label versions: flips by class pair, how confidence moved, images won and lost (by key with --json).

    Example: nst diff digits/1/label digits/2/label
    """
    opened = Store(store)
    found = diff_labels(opened, artifact_of(opened, a), artifact_of(opened, b), confidence, with_keys=as_json)
    if as_json:
        print(json.dumps(asdict(found), indent=1))
        return
    _print_diff(found, a, b)


def explain(
    dataset: Annotated[str, typer.Argument(metavar="SELECTION", help="A selection's ref, such as digits/1/select.")],
    class_name: Annotated[str, typer.Option("--class", help="A class by name or number.")],
    picture: Annotated[Path | None, typer.Option(help="Write the images as one PNG to this file.")] = None,
    images: Annotated[int, typer.Option(min=1, max=200, help="Images of each kind.")] = 16,
    store: StoreOption = "nst-store",
    as_json: JsonOption = False,
) -> None:
    """Explain what a selection took of a class: available, threshold, kept, duplicated, the most and least confident.

    Example: nst explain digits/1/select --class 7 --picture seven.png
    """
    opened = Store(store)
    selection = artifact_of(opened, dataset)
    if selection.kind != "selection":
        raise UserError(f"{dataset} is no selection but of kind {selection.kind}; give a ref such as digits/1/select")
    if picture is not None:
        check_target(picture)
    labels = get(opened, "labels", selection.inputs["labels"])
    story = explain_class(opened, selection, labels, class_name, images)
    if picture is not None:
        sheet = picture_of(opened, get(opened, "dataset", selection.inputs["data"]), story)
        try:
            sheet.save(picture, "PNG")
        except OSError as error:
            raise UserError(f"{picture} cannot be written ({error.strerror}); give another place") from error
    if as_json:
        print(json.dumps(asdict(story), indent=1))
        return
    _print_story(story, picture)


def _print_biography(found: Biography) -> None:
    for place in found.places:
        label = f", label {place['label']}" if place["label"] >= 0 else ""
        _say(f"in {place['dataset']} ({place['split']}): {place['source']}{label}")
        _say(f"  {place['width']} x {place['height']} px, {place['bytes']:,} bytes, sha256 {place['sha256']}")
        _say(f"  {place['shard']} at {place['offset']}")
        if place["split"] == "labeled":
            _say(f"  trained on by: {', '.join(place['models']) or 'no model yet'}")
    for row in found.rejects:
        _say(f"rejected by {row['dataset']} ({row['split']}): {row['source']} row {row['row']}: {row['reason']}")
    for leak in found.leaks:
        _say(
            f"left out of {leak['dataset']}: {leak['kind']} copy of {leak['evaluation_key']} (distance {leak['distance']:.3f})"
        )
    several = len({row["sha256"] for row in found.labels}) > 1
    for row in found.labels:
        which = f" (the image with sha256 {row['sha256'][:12]} of {row['dataset']})" if several else ""
        _say(
            f"{row['labels']}{which}: {row['class_name']} with confidence {row['confidence']:.4f}, by {', '.join(row['models'])}"
        )
    for row in found.selections:
        threshold = f", threshold of its class {row['threshold']:.4f}" if row["threshold"] is not None else ""
        copies = f", {row['copies']} {'copy' if row['copies'] == 1 else 'copies'}" if row["copies"] else ""
        _say(f"{row['selection']}: {row['decision'].replace('_', ' ')}{copies}{threshold}")
        for shard in row["shards"]:
            _say(f"  in {shard}")
        if row["copies"]:
            _say(f"  trained on by: {', '.join(row['students']) or 'no student yet'}")


def _print_diff(found: LabelDiff, a: str, b: str) -> None:
    share = found.flipped / found.images if found.images else 0
    _say(f"{found.images:,} images in both ({found.only_in_a:,} only in {a}, {found.only_in_b:,} only in {b})")
    if found.changed:
        _say(f"{found.changed:,} keys name another image in {b}'s data set than in {a}'s: left out of what follows")
    _say(f"flipped: {found.flipped:,} ({share:.2%}); confidence moved by {found.shift:+.4f} on average")
    _say(f"at confidence >= {found.min_confidence:g}: {found.won:,} won, {found.lost:,} lost")
    flips = _table("from", "to", "images", "confidence")
    for row in found.flips[:FEW]:
        confidences = f"{row['old']:.3f} -> {row['new']:.3f}"
        flips.add_row(Text(row["from_class"]), Text(row["to_class"]), f"{row['images']:,}", confidences)
    console.print(flips)
    classes = _table("class", "images", "flipped", "shift", "won", "lost")
    for row in sorted(found.per_class, key=lambda row: -row["flipped"])[:FEW]:
        numbers = (
            f"{row['images']:,}",
            f"{row['flipped']:,}",
            f"{row['shift']:+.4f}",
            f"{row['won']:,}",
            f"{row['lost']:,}",
        )
        classes.add_row(Text(row["class_name"]), *numbers)
    console.print(classes)
    hidden = max(len(found.flips), len(found.per_class)) - FEW
    if hidden > 0:
        _say("(the largest only; --json has all)")


def _print_story(story: ClassStory, picture: Path | None) -> None:
    counts = story.counts
    _say(f"class {counts['label']} ({story.class_name})")
    _say("  " + ", ".join(f"{counts[name]:,} {name}" for name in COUNTS) + f"; threshold {counts['threshold']:.4f}")
    why = {name: n for name, n in counts.items() if name not in (*COUNTS, "label", "class_name", "threshold") and n}
    if why:
        _say("  dropped: " + ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in why.items()))
    table = _table("kept, most confident", "", "kept, least confident", "", "dropped, most confident", "")
    columns = (story.most_confident, story.least_confident, story.nearest_dropped)
    for rank in range(min(FEW, max(map(len, columns)))):
        cells = [cell for rows in columns for cell in ((Text(rows[rank]["key"]), f"{rows[rank]['confidence']:.4f}") if rank < len(rows) else ("", ""))]  # fmt: skip
        table.add_row(*cells)
    console.print(table)
    if picture is not None:
        _say(f"picture: {picture.absolute()}")


def _table(*columns: str) -> Table:
    table = Table(box=None)
    for column in columns:
        table.add_column(column)
    return table


def _say(text: str) -> None:
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
