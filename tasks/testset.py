"""testset: labeled images of a folder of one's own as a data set with a test split alone, for evaluating models on it."""

from typing import ClassVar

from storage.artifacts import FileEntry, Manifest
from storage.errors import UserError
from tasks.contract import StageContext, StageResult
from tasks.ingest import DataConfig, fingerprint, ingest, name_files, open_source, plan_stretches
from tasks.prepare import labels_of
from tasks.reject_limit import check_rejects
from tasks.source_parts import shards_of

VERSION = 1
SPLIT = "test"


class TestsetConfig(DataConfig):
    """The data settings, of which `test` names the images (`labeled` must name the same, for the names of class folders)."""

    __test__: ClassVar[bool] = False  # no test class of pytest's
    not_in_key: ClassVar[tuple[str, ...]] = (
        *DataConfig.not_in_key, "labeled", "val", "unlabeled", "in_place", "leaks", "min_images_per_class", "seed",
    )  # fmt: skip

    def fingerprint(self) -> str:
        """The identity of the images. Raises UserError where there are none."""
        return fingerprint(open_source(self).files((SPLIT,)))

    def names(self) -> list[str]:
        """The classes that the files name; empty where they have numbers only."""
        return open_source(self).class_names()


def testset(context: StageContext, config: TestsetConfig, inputs: dict[str, Manifest]) -> StageResult:
    """Make the data set. Raises UserError on missing files, labels outside the classes, and too many rejects."""
    source = open_source(config)
    stretches = plan_stretches(config, source.files((SPLIT,)))
    parts = ingest(context, config, stretches)
    counts = check_rejects(config.max_reject_fraction, SPLIT, parts)
    shards = [shard for part in parts for shard in shards_of(part)]
    labels = labels_of(context.store, shards)
    names = list(config.class_names) or source.class_names()
    if not len(labels):
        raise UserError(f"data.test={config.test!r}: no image there can be decoded; give another folder")
    if not names:
        raise UserError(
            f"data.test={config.test!r}: the files number their classes and name none; set data.class_names"
        )
    if int(labels.max()) >= len(names) or int(labels.min()) < 0:
        worst = int(labels.max() if labels.max() >= len(names) else labels.min())
        raise UserError(
            f"data.test={config.test!r}: an image has label {worst}, outside the {len(names)} classes 0..{len(names) - 1}; "
            "choose data of the model's classes, or correct the labels"
        )
    entries: list[FileEntry] = name_files(
        SPLIT,
        [(shard.tar, shard.index) for shard in shards],
        [part.file("rejects.parquet") for part in parts],
    )
    return StageResult(tuple(entries), {SPLIT: counts, "class_names": names})
