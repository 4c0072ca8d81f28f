"""select: confidence filter and class balancing (paper, section 3.1), then balanced WebDataset shards.

Of each class the images with confidence >= min_confidence are kept, at most images_per_class, the most confident first;
a class with fewer is duplicated at random, as evenly as can be, up to images_per_class. Ties go by key, chance by a
hash of seed and key: the selection is the same on every machine. `tasks/selection/` holds the parts of it.
"""

from collections.abc import Iterator
from itertools import chain, starmap
from pathlib import Path
from typing import Any

import pyarrow as pa

from models.compute import group_shards
from storage.artifacts import Manifest, Part, find_part, find_parts, made_parts, publish_part
from storage.errors import StoreError, UserError
from storage.keys import digest
from storage.objects import Store
from storage.shards import index_name, shard_files, write_parquet, write_parquet_batches
from tasks.contract import StageContext, StageResult
from tasks.ingest import NO_NUMERICS
from tasks.selection.config import SelectConfig
from tasks.selection.decisions import DECISIONS_FILE, DECISIONS_SCHEMA, decisions_batch
from tasks.selection.layout import Shuffle, draw_copies, shards_of_file
from tasks.selection.rules import ClassCounts, find_rules
from tasks.selection.scan import Batch, Predictions
from tasks.selection.shards import PASS_COPIES, STAGE

VERSION = 3  # 3: a sample names all its teachers
CLASSES_FILE = "classes.parquet"


def select(context: StageContext, config: SelectConfig, inputs: dict[str, Manifest]) -> StageResult:
    """Select from `inputs["labels"]` of `inputs["data"]` and write the balanced shards.

    Raises UserError where a class stays empty and on_empty_class is `error`.
    """
    data, labels = inputs["data"], inputs["labels"]
    _check_same_images(data, labels)
    plan = plan_selection(context.store, context.key, config, labels)
    layout = [file for file in plan.files if file.name.startswith("layout/")]
    total = plan.facts["total"]
    num_shards = -(-total // config.shard_images)
    keys = [digest({"version": VERSION, "selection": context.key, "shard": n}) for n in range(num_shards)]
    found = find_parts(context.store, STAGE, keys, NO_NUMERICS)
    missing = [n for n in range(num_shards) if found[keys[n]] is None]
    specs = []
    most = max(1, PASS_COPIES // config.shard_images)  # a process reads all the input, however few shards it writes
    for group in group_shards([config.shard_images] * len(missing), context.engine.processes, context.compute, most):
        numbers = [missing[place] for place in group]
        needed = sorted({number // shards_of_file(config.shard_images) for number in numbers})
        specs.append(
            {
                "store": context.store.url,
                "shard_images": config.shard_images,
                "layout": {str(number): layout[number].model_dump() for number in needed},
                "labels": labels.key,
                "data": data.key,
                "parts": {str(number): keys[number] for number in numbers},
            }
        )
    context.engine.map("tasks.selection.shards:write_shards", specs, context.progress_of(total))
    if missing:
        found = find_parts(context.store, STAGE, keys, NO_NUMERICS)
    files = [plan.file(DECISIONS_FILE), plan.file(CLASSES_FILE)]
    for number, part in enumerate(made_parts(STAGE, found, keys)):
        shard = part.file("shard.tar").model_copy(update={"name": f"shards/train/{number:05d}.tar"})
        files += [shard, part.file("index.parquet").model_copy(update={"name": index_name(shard)})]
    return StageResult(tuple(files), {**plan.facts, "class_names": labels.metrics["class_names"]})


def plan_selection(store: Store, key: str, config: SelectConfig, labels: Manifest) -> Part:
    """Everything but the shards of selection `key`, as a part of its own: made once, kept after a crash.

    Files: decisions.parquet, classes.parquet, and layout/00000.parquet and so on, which say what stands in each output
    shard. Facts: the counts. Raises UserError where a class, or all of it, stays empty.
    """
    part_key = digest({"version": VERSION, "selection": key, "plan": True})
    existing = find_part(store, STAGE, part_key, NO_NUMERICS)
    if existing is not None:
        return existing
    with store.staging() as folder:
        files, facts = make_plan(Predictions(store, labels, folder), config)
        return publish_part(store, STAGE, part_key, NO_NUMERICS, files, facts)


def make_plan(predictions: Predictions, config: SelectConfig) -> tuple[dict[str, tuple[Path, int]], dict[str, Any]]:
    """Write the files of `plan_selection` into the scratch folder; returns them (name -> path, rows) and the facts."""
    folder, rules = predictions.scratch, find_rules(predictions, config)
    counts = ClassCounts.none(predictions.num_classes)
    at_most = config.images_per_class * predictions.num_classes if config.balance else predictions.num_images

    with Shuffle(folder, at_most) as shuffle:

        def decide(batch: Batch) -> tuple[Any, ...]:
            decisions, copies = rules.decide(batch)
            pieces = starmap(shuffle.split, draw_copies(batch, copies, config.seed))
            return batch.labels, decisions, copies, chain([next(pieces)], pieces)  # the first is made here, in a thread

        def batches() -> Iterator[pa.RecordBatch]:
            for labels, decisions, copies, pieces in predictions.scan(decide):
                counts.add(labels, decisions, copies)
                for split in pieces:
                    shuffle.add(split)
                yield decisions_batch(decisions, copies)

        decisions = folder / DECISIONS_FILE
        files = {DECISIONS_FILE: (decisions, write_parquet_batches(decisions, DECISIONS_SCHEMA, batches()))}
        facts = _facts(counts)
        if not facts["total"]:
            raise UserError(
                f"select.subset={config.subset} leaves none of the images; raise it, or lower select.min_confidence"
            )
        table = counts.table(predictions.class_names).append_column("threshold", pa.array(rules.thresholds()))
        write_parquet(folder / CLASSES_FILE, table)
        files[CLASSES_FILE] = (folder / CLASSES_FILE, len(table))
        layout = shuffle.write(folder, config.shard_images)
    return files | {f"layout/{path.name}": (path, rows) for path, rows in layout}, facts


def _facts(counts: ClassCounts) -> dict[str, Any]:
    """The counts as metrics."""
    labeled, kept, total = (int(c.sum()) for c in (counts.available, counts.kept, counts.copies))
    per_class = {"available": counts.available, "kept": counts.kept, "copies": counts.copies}
    return {
        "labeled": labeled,
        "kept": kept,
        "dropped": labeled - kept,
        "duplicated": total - kept,
        "total": total,
        "per_class": {name: values.tolist() for name, values in per_class.items()},
    }


def _check_same_images(data: Manifest, labels: Manifest) -> None:
    """Raise StoreError where the files of the labels are not those of the data's shards."""
    own = [shard.rows for shard in shard_files(data, "unlabeled")]
    labeled = [entry.rows for entry in labels.files_under("predictions/")]
    if own != labeled:
        raise StoreError(
            f"labels {labels.key} have {len(labeled)} files of {sum(filter(None, labeled)):,} images, data set {data.key} has "
            f"{len(own)} unlabeled shards of {sum(filter(None, own)):,}; the labels are of another data set"
        )
