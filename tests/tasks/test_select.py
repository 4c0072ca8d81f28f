import io
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.compute import ComputeConfig, LocalEngine
from models.predictions import predictions_table, probabilities_table, read_probabilities
from storage.artifacts import FileEntry, Manifest, artifact_folder, commit, publish_file
from storage.errors import StoreError, UserError
from storage.objects import Store
from storage.shards import ShardReader, read_index, read_table, shard_files, write_parquet
from tasks.contract import StageContext, StageResult
from tasks.select import select
from tasks.selection.config import SelectConfig
from tasks.selection.decisions import read_decisions
from tasks.selection.shards import _Source
from tests.datasets import HereEngine, prepare_all
from tests.real_images import write_splits
from tests.tasks.selection.predicted import NAMES, Row, expected_fates

READ_WITH_WEBDATASET = """
import hashlib, json, sys
import webdataset

samples = webdataset.WebDataset(sys.argv[1:], shardshuffle=False)
found = []
for sample, arrays in zip(samples, webdataset.WebDataset(sys.argv[1:], shardshuffle=False).decode()):
    image, = (e for e in sample if e in ("png", "jpg"))
    found.append({"key": sample["__key__"], "image": hashlib.sha256(sample[image]).hexdigest(), "json": arrays["json"],
                  "soft": arrays["npy"].tolist(), "dtype": str(arrays["npy"].dtype),
                  "members": sorted(e for e in sample if not e.startswith("__"))})
print(json.dumps(found))
"""


def probabilities(rows: Sequence[Row]) -> np.ndarray:
    """For each row the confidence at its label, the rest shared evenly: float32 [n, 3]."""
    found = np.zeros((len(rows), len(NAMES)), np.float32)
    for place, (_, label, confidence) in enumerate(rows):
        found[place] = (1 - confidence) / (len(NAMES) - 1)
        found[place, label] = confidence
    return found


class Labeled:
    """A prepared data set of 30 unlabeled images in 3 shards, and predictions of them, in a store."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(str(folder / "store label=7 [x]"))
        result = prepare_all(self.context("d1"), write_splits(folder / "images"), shard_images=10)
        self.data = self.commit("dataset", "d1", "prepare", {}, result.files, result.metrics)
        self.rows: dict[str, Row] = {}
        self.labels = self.commit(
            "labels", "l1", "label", {"model.2": "m2", "model": "m1"}, self.predict(), {"class_names": list(NAMES)}
        )

    def predict(self) -> tuple[FileEntry, ...]:
        """Class 0 has 15 images, class 1 has 10, class 2 has 5, with confidences from 0.4 to 0.98."""
        files = []
        for number, shard in enumerate(shard_files(self.data, "unlabeled")):
            index = read_index(self.store, self.data, "unlabeled").to_pylist()
            keys = [row["key"] for row in index if row["shard"] == shard.path]
            own = [
                (key, [0, 0, 0, 1, 1, 2][int(key[-8:]) % 6], 0.4 + 0.02 * ((7 * int(key[-8:])) % 30)) for key in keys
            ]
            self.rows.update({row[0]: row for row in own})
            with self.store.staging() as folder:
                made = {"predictions": predictions_table(keys, probabilities(own))}
                made["probabilities"] = probabilities_table(probabilities(own))
                for kind, table in made.items():
                    write_parquet(folder / kind, table)
                    name = f"{kind}/unlabeled/{number:05d}.parquet"
                    files.append(
                        publish_file(self.store, artifact_folder("labels", "l1"), name, folder / kind, len(keys))
                    )
        return tuple(files)

    def context(self, key: str, processes: int = 1) -> StageContext:
        compute = ComputeConfig(processes=processes, task_images=1)
        return StageContext(self.store, key, LocalEngine(compute), compute)

    def commit(
        self,
        kind: str,
        key: str,
        stage: str,
        inputs: dict[str, str],
        files: tuple[FileEntry, ...],
        metrics: dict[str, Any],
    ) -> Manifest:
        manifest = Manifest(
            kind=kind, key=key, stage=stage, stage_version=1, config={}, inputs=inputs, files=files, metrics=metrics
        )
        return commit(self.store, manifest)

    def select(self, key: str, processes: int = 1, engine: Any = None, **fields: Any) -> StageResult:
        config = SelectConfig(**{"min_confidence": 0.5, "images_per_class": 9, "shard_images": 8, **fields})
        context = self.context(key, processes)
        context = replace(context, engine=engine) if engine else context
        return select(context, config, {"data": self.data, "labels": self.labels})


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Labeled:
    return Labeled(tmp_path_factory.mktemp("labeled"))


@pytest.fixture(scope="module")
def selection(labeled: Labeled) -> Manifest:
    result = labeled.select("s1")
    return labeled.commit("selection", "s1", "select", {"labels": "l1"}, result.files, result.metrics)


def expected_copies(labeled: Labeled) -> dict[str, int]:
    fates = expected_fates(list(labeled.rows.values()), SelectConfig(min_confidence=0.5, images_per_class=9))
    return {key: copies for key, (_, copies) in fates.items() if copies}


def test_every_class_has_exactly_as_many_images_as_asked_for(labeled: Labeled, selection: Manifest) -> None:
    rows = read_index(labeled.store, selection, "train").to_pylist()
    assert Counter(row["label"] for row in rows) == {0: 9, 1: 9, 2: 9}
    copies: dict[str, list[int]] = {}
    for row in rows:
        copies.setdefault(row["source_key"], []).append(row["copy"])
    wanted = expected_copies(labeled)
    assert {key: sorted(own) for key, own in copies.items()} == {k: list(range(n)) for k, n in wanted.items()}
    assert len({row["key"] for row in rows}) == 27
    assert [shard.rows for shard in shard_files(selection, "train")] == [8, 8, 8, 3]


def test_metrics_and_the_table_of_classes_count_what_the_decisions_say(labeled: Labeled, selection: Manifest) -> None:
    decisions = read_decisions(labeled.store, labeled.labels, selection).read_all().to_pylist()
    kept = Counter(row["label"] for row in decisions if row["decision"] == "kept")
    assert sum(kept.values()) == len(expected_copies(labeled))
    assert selection.metrics == {
        "labeled": 30,
        "kept": sum(kept.values()),
        "dropped": 30 - sum(kept.values()),
        "duplicated": 27 - sum(kept.values()),
        "total": 27,
        "per_class": {"available": [15, 10, 5], "kept": [kept[0], kept[1], kept[2]], "copies": [9, 9, 9]},
        "class_names": list(NAMES),
    }
    assert 0 < kept[2] < 9, "class 2 has to be duplicated for this test to mean anything"
    assert any(row["decision"] == "over_cap" for row in decisions)
    for row in read_table(labeled.store, selection.file("classes.parquet")).to_pylist():
        own = [decision for decision in decisions if decision["label"] == row["label"]]
        assert row["class_name"] == NAMES[row["label"]]
        assert row["dropped"] == sum(not decision["copies"] for decision in own) == row["available"] - row["kept"]
        assert row["duplicated"] == 9 - row["kept"]
        least = min(d["confidence"] for d in own if d["decision"] == "kept")
        assert row["threshold"] == (least if row["over_cap"] else np.float32(0.5))


def test_decisions_stand_beside_their_predictions(labeled: Labeled, selection: Manifest) -> None:
    fates = expected_fates(list(labeled.rows.values()), SelectConfig(min_confidence=0.5, images_per_class=9))
    found = read_decisions(labeled.store, labeled.labels, selection).read_all().to_pylist()
    assert [row["key"] for row in found] == list(labeled.rows)
    for row in found:
        assert (row["decision"], row["copies"]) == fates[row["key"]]
        assert (row["label"], row["confidence"]) == (
            labeled.rows[row["key"]][1],
            np.float32(labeled.rows[row["key"]][2]),
        )


def test_webdataset_reads_image_soft_label_and_facts_of_every_copy(labeled: Labeled, selection: Manifest) -> None:
    shards = [str(labeled.store.local_path(shard.path)) for shard in shard_files(selection, "train")]
    done = subprocess.run([sys.executable, "-c", READ_WITH_WEBDATASET, *shards], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    samples = json.loads(done.stdout)
    sources = {row["key"]: row for row in read_index(labeled.store, labeled.data, "unlabeled").to_pylist()}
    for sample in samples:
        facts = sample["json"]
        key, label, _ = labeled.rows[facts["source_key"]]
        row = probabilities([labeled.rows[key]])
        assert sample["members"] == ["json", "npy", "png"]
        assert sample["key"] == f"{key}-c{facts['copy']}"
        assert sample["image"] == sources[key]["sha256"]
        assert (sample["dtype"], sample["soft"]) == ("float16", row[0].astype(np.float16).tolist())
        assert facts == {
            "class": label,
            "confidence": float(row.max()),
            "labeled_by": ["m1", "m2"],
            "source_key": key,
            "source": sources[key]["source"],
            "copy": facts["copy"],
        }
    found = Counter(sample["json"]["source_key"] for sample in samples)
    assert found == expected_copies(labeled)


def test_the_index_leads_to_image_and_soft_label(labeled: Labeled, selection: Manifest) -> None:
    reader = ShardReader(labeled.store, shard_files(selection, "train"))
    for row in read_index(labeled.store, selection, "train").to_pylist():
        original = labeled.rows[row["source_key"]]
        image = reader.read(row["shard"], row["offset"], row["bytes"], row["sha256"])
        assert image.startswith(b"\x89PNG")
        soft = np.lib.format.read_array(
            io.BytesIO(reader.read(row["shard"], row["soft_offset"], row["soft_bytes"], row["soft_sha256"]))
        )
        assert soft.tolist() == probabilities([original])[0].astype(np.float16).tolist()
        assert (row["label"], row["confidence"]) == (original[1], float(np.float32(original[2])))


def test_classes_and_copies_are_mixed_over_the_shards(labeled: Labeled, selection: Manifest) -> None:
    rows = read_index(labeled.store, selection, "train").to_pylist()
    first = [row["label"] for row in rows[:8]]
    assert len(set(first)) == 3
    assert [row["label"] for row in rows] != sorted(row["label"] for row in rows)


def test_a_selection_made_by_three_processes_has_the_same_bytes(labeled: Labeled, selection: Manifest) -> None:
    again = labeled.select("s2", processes=3)
    assert [(f.name, f.sha256) for f in again.files] == [(f.name, f.sha256) for f in selection.files]
    assert again.metrics == selection.metrics


def test_finished_parts_of_a_selection_are_kept(
    labeled: Labeled, selection: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No time of a file would tell: the store keeps a file whose bytes it has, also of work that was done again."""
    monkeypatch.setattr("tasks.select.make_plan", lambda *_: pytest.fail("it was planned again"))
    monkeypatch.setattr("tasks.selection.shards.write_shards", lambda *_: pytest.fail("shards were written again"))
    assert labeled.select("s1", engine=HereEngine()).files == selection.files


def test_a_crash_before_the_commit_loses_neither_the_plan_nor_a_shard(
    labeled: Labeled, selection: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = labeled.select("s6", engine=HereEngine())
    shards = [file for file in result.files if file.name.startswith("shards/")]
    lost, kept = Path(shards[1].path).parent, Path(shards[2].path).parent
    markers = [path for path in labeled.store.paths(lost.as_posix()) if path.endswith(".json")]
    labeled.store.delete(*markers)
    written: list[str] = []

    def write(source: Any, part_key: str, *rows: Any) -> None:
        written.append(part_key)
        write_shard(source, part_key, *rows)

    write_shard = _Source.write_shard
    monkeypatch.setattr(_Source, "write_shard", write)
    monkeypatch.setattr("tasks.select.make_plan", lambda *_: pytest.fail("it was planned again"))
    again = labeled.select("s6", engine=HereEngine())
    assert again.files == result.files
    assert written == [lost.name] != [kept.name]
    own = [
        [file.sha256 for file in files if file.name.startswith("shards/")] for files in (again.files, selection.files)
    ]
    assert own[0] == own[1]


def test_another_threshold_reads_the_labels_and_changes_none_of_their_files(labeled: Labeled) -> None:
    before = {
        path: labeled.store.local_path(path).stat().st_mtime_ns for path in labeled.store.paths("artifacts/labels")
    }
    assert labeled.select("s7", min_confidence=0.8, on_empty_class="skip").metrics["kept"] < 20
    after = {
        path: labeled.store.local_path(path).stat().st_mtime_ns for path in labeled.store.paths("artifacts/labels")
    }
    assert after == before


def test_the_shards_that_are_gathered_at_once_change_no_byte(labeled: Labeled, selection: Manifest) -> None:
    one_shard = labeled.select("s8", shard_images=27)
    index = read_table(labeled.store, one_shard.files[3])
    assert index["key"].to_pylist() == read_index(labeled.store, selection, "train")["key"].to_pylist()


def test_the_labels_of_an_input_shard_are_read_once_however_many_shards_are_written(
    labeled: Labeled, selection: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the cost grows with the images and not with their square."""
    read: list[str] = []

    def counting(store: Store, labels: Manifest, entry: FileEntry, rows: Any) -> Any:
        read.append(entry.name)
        return read_probabilities(store, labels, entry, rows)

    monkeypatch.setattr("tasks.selection.shards.read_probabilities", counting)
    monkeypatch.setattr("tasks.selection.shards.GATHER_BYTES", 1)  # each output shard is gathered alone
    again = labeled.select("s11", engine=HereEngine())
    assert [file.sha256 for file in again.files] == [file.sha256 for file in selection.files]
    assert read == [entry.name for entry in labeled.labels.files_under("probabilities/")]


def test_labels_of_another_data_set_are_refused_before_anything_is_written(labeled: Labeled, tmp_path: Path) -> None:
    fewer = labeled.labels.model_copy(update={"files": labeled.labels.files[2:]})
    with pytest.raises(
        StoreError, match=r"labels l1 have 2 files of 20 images, data set d1 has 3 .* of another data set"
    ):
        select(labeled.context("s9"), SelectConfig(), {"data": labeled.data, "labels": fewer})


def test_labels_whose_keys_are_not_those_of_the_images_are_refused(tmp_path: Path) -> None:
    labeled = Labeled(tmp_path)
    names = {"00000": "00001", "00001": "00000"}
    swapped = [
        f.model_copy(update={"name": f.name.replace(f.name[-13:-8], names.get(f.name[-13:-8], f.name[-13:-8]))})
        for f in labeled.labels.files
    ]
    labeled.labels = labeled.commit("labels", "l2", "label", {"model": "m1"}, tuple(swapped), labeled.labels.metrics)
    with pytest.raises(UserError, match="labels l2 and data set d1 name different images in shard"):
        labeled.select("s1")


def test_a_subset_without_an_image_is_an_error(labeled: Labeled) -> None:
    with pytest.raises(UserError, match=r"select.subset=1e-12 leaves none of the images"):
        labeled.select("s10", subset=1e-12)


def test_an_empty_class_is_left_out_where_that_was_asked_for(labeled: Labeled) -> None:
    result = labeled.select("s4", min_confidence=0.97, on_empty_class="skip", images_per_class=4)
    assert sorted(result.metrics["per_class"]["copies"]) == [0, 0, 4]
    assert result.metrics["total"] == 4
