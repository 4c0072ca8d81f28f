import hashlib
import io
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from models.compute import ComputeConfig, LocalEngine
from models.predictions import predictions_table, probabilities_table
from storage.artifacts import FileEntry, Manifest, artifact_folder, commit, publish_file
from storage.errors import UserError
from storage.objects import Store
from storage.shards import ROW_GROUP_ROWS, ShardReader, read_index, shard_files, write_parquet
from tasks.contract import StageContext, StageResult
from tasks.prepare import PrepareConfig, prepare
from tasks.select import SelectConfig, _layout_rows, decide, select
from tests.real_images import write_splits

NAMES = ["cat", "dog", "owl"]
CONFIDENCES = [0.375, 0.5, 0.6, 0.7, 0.875, 1.0]  # few, so that ties and exact thresholds are common
Row = tuple[str, int, float]  # key, label, confidence

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


def decided(folder: Path, files: Sequence[Sequence[Row]], config: SelectConfig) -> list[dict[str, Any]]:
    """What `decide` says of these prediction files."""
    paths = []
    for number, rows in enumerate(files):
        paths.append(folder / f"{number}.parquet")
        write_parquet(paths[-1], predictions_table([row[0] for row in rows], probabilities(rows)))
    return [row for batch in decide(paths, config) for row in batch.to_pylist()]


def oracle(files: Sequence[Sequence[Row]], config: SelectConfig) -> list[dict[str, Any]]:
    """The rule in plain Python: filter, sort, cap, then copies by a draw that hashes seed and key."""
    rows = [
        {"key": k, "label": label, "confidence": float(np.float32(c)), "file": f, "row": r}
        for f, own in enumerate(files)
        for r, (k, label, c) in enumerate(own)
    ]
    least, cap = float(np.float32(config.min_confidence)), config.images_per_class
    found = []
    for label in sorted({row["label"] for row in rows}):
        own = sorted((r for r in rows if r["label"] == label), key=lambda r: (-r["confidence"], r["key"]))
        confident = [row for row in own if row["confidence"] >= least]
        kept = confident[:cap]
        drawn = sorted(
            (row["key"] for row in kept),
            key=lambda key: (hashlib.md5(f"{config.seed}|{key}".encode()).hexdigest(), key),
        )
        for row in own:
            decision, copies = "kept", 0
            if row not in confident:
                decision = "below_confidence"
            elif row not in kept:
                decision = "over_cap"
            else:
                copies = cap // len(kept) + (drawn.index(row["key"]) < cap % len(kept))
            found.append({**row, "decision": decision, "copies": copies})
    return found


predictions = st.lists(
    st.tuples(st.text("abZ_-é猫0", min_size=1, max_size=4), st.integers(0, 2), st.sampled_from(CONFIDENCES)),
    min_size=1,
    max_size=25,
    unique_by=lambda row: row[0],
)
configs = st.builds(
    SelectConfig,
    min_confidence=st.sampled_from([0.0, 0.4, *CONFIDENCES]),
    images_per_class=st.integers(1, 12),
    seed=st.integers(0, 3),
)


@given(predictions, configs, st.integers(1, 3))
@example([("b", 0, 0.7), ("a", 0, 0.7), ("c", 1, 0.6)], SelectConfig(min_confidence=0.7, images_per_class=1), 1)
def test_decisions_and_copies_are_those_of_the_rule_in_plain_python(
    rows: list[Row], config: SelectConfig, num_files: int
) -> None:
    files = [own for own in (rows[number::num_files] for number in range(num_files)) if own]
    with tempfile.TemporaryDirectory() as folder:
        found = decided(Path(folder), files, config)
    assert found == oracle(files, config)
    for label in {row["label"] for row in found}:
        copies = [row["copies"] for row in found if row["label"] == label and row["decision"] == "kept"]
        assert sum(copies) in (config.images_per_class, 0)
        assert bool(copies) == (sum(copies) > 0)
        assert not copies or max(copies) - min(copies) <= 1


def test_a_case_worked_out_by_hand(tmp_path: Path) -> None:
    rows = [("d", 0, 0.5), ("a", 0, 0.9), ("c", 0, 0.6), ("b", 0, 0.6), ("x", 1, 0.9), ("y", 1, 0.4)]
    found = decided(tmp_path, [rows], SelectConfig(min_confidence=0.5, images_per_class=3))
    assert [(r["key"], r["decision"], r["copies"]) for r in found] == [
        ("a", "kept", 1),
        ("b", "kept", 1),  # ties go by key
        ("c", "kept", 1),
        ("d", "over_cap", 0),
        ("x", "kept", 3),
        ("y", "below_confidence", 0),
    ]


def test_a_confidence_equal_to_the_threshold_is_kept_though_float32_rounds_it_down(tmp_path: Path) -> None:
    assert float(np.float32(0.7)) < 0.7
    found = decided(tmp_path, [[("a", 0, 0.7)]], SelectConfig(min_confidence=0.7))
    assert found[0]["decision"] == "kept"


def test_how_predictions_are_cut_into_files_decides_nothing(tmp_path: Path) -> None:
    rows = [(f"k{n}", n % 3, CONFIDENCES[n % 5]) for n in range(30)]
    config = SelectConfig(min_confidence=0.5, images_per_class=7)
    facts = ("key", "decision", "copies")
    cuts = [[rows], [rows[:4], rows[4:]], [rows[20:], rows[:11], rows[11:20]]]
    found = [[[row[name] for name in facts] for row in decided(tmp_path, cut, config)] for cut in cuts]
    assert found[0] == found[1] == found[2]


def test_the_seed_chooses_who_is_duplicated_and_nothing_else(tmp_path: Path) -> None:
    rows = [(f"k{n}", 0, 0.9) for n in range(20)]
    lucky = []
    for seed in (0, 0, 1):
        found = decided(tmp_path, [rows], SelectConfig(images_per_class=30, seed=seed))
        assert Counter(row["copies"] for row in found) == {1: 10, 2: 10}
        lucky.append({row["key"] for row in found if row["copies"] == 2})
    assert lucky[0] == lucky[1]
    assert lucky[0] != lucky[2]


@pytest.mark.parametrize("name", ["label=7", "we[i]rd *", "Größe 猫"])
def test_the_names_of_folders_mean_nothing(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name / "confidence=1.0"
    folder.mkdir(parents=True)
    files = [[("a", 0, 0.5), ("b", 1, 0.75)], [("c", 1, 0.5)]]
    config = SelectConfig(min_confidence=0.5, images_per_class=2)
    assert decided(folder, files, config) == oracle(files, config)


def test_rows_of_an_output_shard_are_found_across_row_groups(store: Store, tmp_path: Path) -> None:
    write_parquet(tmp_path / "layout.parquet", pa.table({"n": np.arange(ROW_GROUP_ROWS + 5000)}))
    layout = publish_file(store, "parts/select/k1", "layout.parquet", tmp_path / "layout.parquet")
    size = 10_000
    for number in range(8):
        rows = [row["n"] for row in _layout_rows(store, layout, number, size)]
        assert rows == list(range(number * size, min((number + 1) * size, ROW_GROUP_ROWS + 5000)))


class Labeled:
    """A prepared data set of 30 unlabeled images in 3 shards, and predictions of them, in a store."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(str(folder / "store label=7 [x]"))
        config = PrepareConfig(root=str(write_splits(folder / "images")), shard_images=10)
        result = prepare(self.context("d1"), config, {})
        self.data = self.commit("dataset", "d1", "prepare", {}, result.files, result.metrics)
        self.rows: dict[str, Row] = {}
        self.labels = self.commit("labels", "l1", "label", {"model": "m1"}, self.predict(), {"class_names": NAMES})

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
                    files.append(publish_file(self.store, artifact_folder("labels", "l1"), name, folder / kind))
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

    def select(self, key: str, processes: int = 1, **fields: Any) -> StageResult:
        config = SelectConfig(**{"min_confidence": 0.5, "images_per_class": 9, "shard_images": 8, **fields})
        return select(self.context(key, processes), config, {"data": self.data, "labels": self.labels})


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Labeled:
    return Labeled(tmp_path_factory.mktemp("labeled"))


@pytest.fixture(scope="module")
def selection(labeled: Labeled) -> Manifest:
    result = labeled.select("s1")
    return labeled.commit("selection", "s1", "select", {"labels": "l1"}, result.files, result.metrics)


def expected_copies(labeled: Labeled) -> dict[str, int]:
    config = SelectConfig(min_confidence=0.5, images_per_class=9)
    files = [list(labeled.rows.values())]
    return {row["key"]: row["copies"] for row in oracle(files, config) if row["copies"]}


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


def test_metrics_count_what_the_decisions_say(labeled: Labeled, selection: Manifest) -> None:
    decisions = pq.read_table(labeled.store.local_path(selection.file("decisions.parquet").path)).to_pylist()
    assert len(decisions) == 30
    kept = Counter(row["label"] for row in decisions if row["decision"] == "kept")
    assert sum(kept.values()) == len(expected_copies(labeled))
    assert selection.metrics == {
        "labeled": 30,
        "kept": sum(kept.values()),
        "dropped": 30 - sum(kept.values()),
        "duplicated": 27 - sum(kept.values()),
        "total": 27,
        "per_class": {"available": [15, 10, 5], "kept": [kept[0], kept[1], kept[2]], "copies": [9, 9, 9]},
        "class_names": NAMES,
    }
    assert 0 < kept[2] < 9, "class 2 has to be duplicated for this test to mean anything"
    assert any(row["decision"] == "over_cap" for row in decisions)


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
            "labeled_by": "m1",
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


def test_finished_parts_of_a_selection_are_kept(labeled: Labeled, selection: Manifest) -> None:
    before = {path: labeled.store.local_path(path).stat().st_mtime_ns for path in labeled.store.paths("parts")}
    assert labeled.select("s1").files == selection.files
    assert {path: labeled.store.local_path(path).stat().st_mtime_ns for path in before} == before


def test_a_class_without_an_image_is_an_error_that_names_class_threshold_and_remedy(labeled: Labeled) -> None:
    with pytest.raises(UserError) as error:
        labeled.select("s3", min_confidence=0.97)
    assert "has 0 images at confidence >= 0.97, so it cannot be balanced." in str(error.value)
    assert "Lower select.min_confidence or set select.on_empty_class=skip" in str(error.value)
    empty = [label for label in range(3) if not any(r[1] == label and r[2] >= 0.97 for r in labeled.rows.values())]
    assert f"class {empty[0]} ({NAMES[empty[0]]}) (and 1 more)" in str(error.value)


def test_an_empty_class_is_left_out_where_that_was_asked_for(labeled: Labeled) -> None:
    result = labeled.select("s4", min_confidence=0.97, on_empty_class="skip", images_per_class=4)
    assert sorted(result.metrics["per_class"]["copies"]) == [0, 0, 4]
    assert result.metrics["total"] == 4


def test_a_selection_of_nothing_is_an_error_even_where_classes_may_be_empty(labeled: Labeled) -> None:
    with pytest.raises(UserError, match=r"class 0 \(cat\) \(and 2 more\) has 0 images"):
        labeled.select("s5", min_confidence=1.0, on_empty_class="skip")
