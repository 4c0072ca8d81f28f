"""One image and one class: a leak that was left out, several teachers, what a selection made of them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from models.compute import ComputeConfig
from models.predictions import predictions_table, probabilities_table
from storage.artifacts import FileEntry, Manifest, artifact_folder, commit, publish_file
from storage.objects import Store
from storage.runs import NodeRecord, RunRecord, record_run
from storage.shards import read_table, write_parquet
from tasks.contract import StageContext, StageResult
from tasks.inspection.biography import biography
from tasks.inspection.explain_class import explain_class, picture_of
from tasks.select import select
from tasks.selection.config import SelectConfig
from tests.datasets import HereEngine, prepare_all
from tests.real_images import pngs, write_images, write_splits


@dataclass
class Made:
    """30 unlabeled images, the first of which is a test image; labels by two teachers; a selection."""

    store: Store
    data: Manifest
    labels: Manifest
    selection: Manifest


@pytest.fixture(params=["store", "label=7 [x]"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Made:
    """DuckDB takes a folder such as label=7 for a column, unless it is told not to."""
    store, root = Store(str(tmp_path / request.param)), write_splits(tmp_path / "images")
    write_images(root / "test.parquet", pngs(12, 100), [n % 3 for n in range(12)])
    write_images(root / "unlabeled.parquet", [pngs(1, 105)[0], *pngs(29, 9000)])
    context = StageContext(store, "s1", HereEngine(), ComputeConfig())
    result = prepare_all(context, root, shard_images=10, leaks={"max_distance": 0})
    data = committed(store, "dataset", {}, result)
    inputs = {"model": "m1", "model.2": "m2", "data": data.key}
    labels = committed(store, "labels", inputs, StageResult(predicted(store, data), {"class_names": list("abc")}))
    config = SelectConfig(min_confidence=0.45, images_per_class=4, on_empty_class="skip", shard_images=3)
    result = select(context, config, {"data": data, "labels": labels})
    return Made(store, data, labels, committed(store, "selection", {"data": data.key, "labels": labels.key}, result))


def committed(store: Store, kind: str, inputs: dict[str, str], result: StageResult, number: int = 1) -> Manifest:
    facts = {"stage": kind, "stage_version": 1, "config": {}, "metrics": result.metrics}
    return commit(store, Manifest(kind=kind, key=f"{kind}{number}", inputs=inputs, files=result.files, **facts))


def another_data_set(made: Made, folder: Path, name: str = "unlabeled") -> Manifest:
    """Other images in files of the same names, but for the unlabeled ones if need be; the first of them is broken."""
    root = write_splits(folder)
    (root / "unlabeled.parquet").unlink()
    write_images(root / f"{name}.parquet", [b"no image", *pngs(29, 500)])
    context = StageContext(made.store, "s2", HereEngine(), ComputeConfig())
    result = prepare_all(context, root, shard_images=10, max_reject_fraction=0.1, unlabeled=f"{name}.parquet")
    return committed(made.store, "dataset", {}, result, 2)


def predicted(store: Store, data: Manifest) -> tuple[FileEntry, ...]:
    """Image n is of class a up to 10, of b after that, none of c, with confidence .4 + n / 100."""
    files = []
    for number, entry in enumerate(data.files_under("index/unlabeled/")):
        keys = read_table(store, entry)["key"].to_pylist()
        places = np.array([int(key[-2:]) for key in keys])
        rows = np.zeros((len(keys), 3), np.float32)
        rows[np.arange(len(keys)), (places > 10).astype(int)] = 0.4 + places / 100
        rows[:, 2] = 1 - rows.sum(axis=1)
        tables = {
            "predictions": predictions_table(keys, rows * [1, 1, 0.5]),
            "probabilities": probabilities_table(rows),
        }
        for kind, table in tables.items():
            with store.staging() as folder:
                write_parquet(folder / kind, table)
                name = f"{kind}/unlabeled/{number:05d}.parquet"
                files.append(publish_file(store, artifact_folder("labels", "labels1"), name, folder / kind, len(keys)))
    return tuple(files)


def test_a_kept_image_names_all_its_teachers_its_threshold_and_its_shards(made: Made) -> None:
    found = biography(made.store, "unlabeled-00000010")
    (label,) = found.labels
    assert (label["models"], label["class_name"]) == (["m1", "m2"], "a")
    (chosen,) = found.selections
    assert (chosen["decision"], chosen["copies"]) == ("kept", 1)
    assert chosen["threshold"] == pytest.approx(0.47), "the least confident of the four that are kept"
    assert len(chosen["shards"]) == 1
    assert biography(made.store, "unlabeled-00000006").selections[0]["decision"] == "over_cap"
    assert biography(made.store, "unlabeled-00000001").selections[0]["decision"] == "below_confidence"


def test_a_leaked_image_tells_of_which_evaluation_image_it_is_a_copy(made: Made) -> None:
    found = biography(made.store, "unlabeled-00000000")
    assert (found.places, found.labels, found.selections) == ([], [], [])
    (leak,) = found.leaks
    assert (leak["evaluation_key"], leak["kind"]) == ("test/test-00000005", "exact")


def test_a_class_is_explained_by_its_most_and_least_confident_images(made: Made) -> None:
    story = explain_class(made.store, made.selection, made.labels, "a", images=3)
    assert [row["key"][-2:] for row in story.most_confident] == ["10", "09", "08"]
    assert [row["key"][-2:] for row in story.least_confident] == ["07", "08", "09"]
    assert [row["key"][-2:] for row in story.nearest_dropped] == ["06", "05", "04"]
    assert picture_of(made.store, made.data, story).height > 3 * 112


def test_a_class_that_nobody_has_is_explained_too(made: Made) -> None:
    story = explain_class(made.store, made.selection, made.labels, "c", images=3)
    assert story.counts["available"] == 0
    assert story.most_confident == story.least_confident == story.nearest_dropped == []
    assert picture_of(made.store, made.data, story).width > 100


def test_of_an_interval_the_images_nearest_to_it_are_those_below(made: Made) -> None:
    """Study 3 takes such as [.45, .48): what is above it was dropped for being too sure."""
    config = SelectConfig(min_confidence=0.45, max_confidence=0.48, images_per_class=4, on_empty_class="skip")
    context = StageContext(made.store, "s2", HereEngine(), ComputeConfig())
    result = select(context, config, {"data": made.data, "labels": made.labels})
    narrow = made.selection.model_copy(update={"files": result.files, "metrics": result.metrics})
    story = explain_class(made.store, narrow, made.labels, "a", images=5)
    assert [row["key"][-2:] for row in story.nearest_dropped] == ["04", "03", "02", "01", "10"]


def test_labels_and_selections_are_told_of_their_own_data_sets_image(made: Made, tmp_path: Path) -> None:
    """unlabeled.parquet was replaced by another one: row 10 is another image, which keeps the key of the old one."""
    other = another_data_set(made, tmp_path / "other")
    inputs = {"model": "m3", "data": other.key}
    result = StageResult(predicted(made.store, other), {"class_names": list("abc")})
    committed(made.store, "labels", inputs, result, 2)
    found = biography(made.store, "unlabeled-00000010")
    sha256 = {place["dataset"]: place["sha256"] for place in found.places}
    assert len(set(sha256.values())) == 2
    assert {row["labels"]: row["sha256"] for row in found.labels} == {
        "labels1": sha256["dataset1"],
        "labels2": sha256["dataset2"],
    }
    (chosen,) = found.selections
    assert (chosen["selection"], chosen["sha256"]) == ("selection1", sha256["dataset1"])
    assert [row["labels"] for row in biography(made.store, "unlabeled-00000001").labels] == ["labels1", "labels2"]


def test_a_rejected_image_is_found_by_its_key_and_by_its_source(made: Made, tmp_path: Path) -> None:
    other = another_data_set(made, tmp_path / "other", name="crawl")
    rejects = [row for f in other.files_under("rejects/") for row in read_table(made.store, f).to_pylist()]
    for key in ("crawl-00000000", rejects[0]["source"]):
        (reject,) = biography(made.store, key).rejects
        assert (reject["dataset"], reject["split"], reject["row"]) == ("dataset2", "unlabeled", 0)
        assert reject["reason"] == rejects[0]["reason"] != ""


def test_a_labeled_image_names_the_models_that_trained_on_it(made: Made) -> None:
    committed(made.store, "model", {"data": made.data.key}, StageResult((), {}))
    committed(made.store, "model", {"data": "another"}, StageResult((), {}), 2)
    key = read_table(made.store, made.data.files_under("index/labeled/")[0])["key"][0].as_py()
    (place,) = biography(made.store, key).places
    assert (place["split"], place["models"]) == ("labeled", ["model1"])


def test_no_more_files_are_opened_than_the_key_can_be_in(made: Made, tmp_path: Path) -> None:
    """A data set of other files is not looked through, nor labels of other shards."""
    other = another_data_set(made, tmp_path / "other", name="crawl")
    for data, name in ((made.data, "unlabeled"), (other, "crawl")):
        node = NodeRecord(name=name, stage="unlabeled", kind="dataset", key=data.key, version=1, config={}, inputs={})
        sources = {f"unlabeled: {name}.parquet": "s", "labeled: labeled.parquet": "s"}
        draft = RunRecord(experiment=name, number=0, recipe="r", config={}, sources=sources, nodes=(node,))
        record_run(made.store, draft)
    expected = biography(made.store, "unlabeled-00000010")
    shared = {file.path for file in made.data.files}  # parts of files that both have
    others = [file.path for file in (*other.files_under("index/"), *other.files_under("rejects/"))]
    others = [path for path in others if path not in shared]
    own = made.labels.files_under("predictions/")
    made.store.delete(*others, own[0].path, own[2].path)
    assert biography(made.store, "unlabeled-00000010") == expected
    assert [place["dataset"] for place in expected.places] == ["unlabeled/unlabeled"]
    assert len(expected.labels) == len(expected.selections) == 1
