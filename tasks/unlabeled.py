"""unlabeled: the images whose labels nobody knows -> shards, or tars of others registered where they lie."""

from typing import ClassVar

from storage.artifacts import Manifest
from tasks.contract import StageContext, StageResult
from tasks.ingest import DataConfig, check_rejects, ingest, name_files, open_source, plan_stretches, shard_entry

VERSION = 1
SPLIT = "unlabeled"


class UnlabeledConfig(DataConfig):
    """The data settings, of which the unlabeled images depend on these."""

    not_in_key: ClassVar[tuple[str, ...]] = (
        *DataConfig.not_in_key,
        *("labeled", "val", "test", "class_names", "min_images_per_class", "seed"),
    )


def unlabeled(context: StageContext, config: UnlabeledConfig, inputs: dict[str, Manifest]) -> StageResult:
    """Make the data set of unlabeled images. Raises UserError on missing files and on too many rejects."""
    source = open_source(config)
    stretches = plan_stretches(config, source.files([SPLIT]))
    parts = ingest(context, config, stretches)
    counts = check_rejects(config, SPLIT, parts)
    shards = [(shard_entry(part), part.file("index.parquet")) for part in parts]
    entries = name_files(SPLIT, shards, [part.file("rejects.parquet") for part in parts])
    return StageResult(tuple(entries), {SPLIT: counts, "class_names": inputs["data"].metrics["class_names"]})
