"""`nst sample`, `diff` and `explain` on a finished tiny run."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flows.inspect_commands import COUNTS, _print_biography, _print_diff, _print_story
from storage.artifacts import get
from storage.objects import Store
from storage.runs import resolve_ref
from storage.shards import read_index, read_table
from tasks.inspection.biography import Biography
from tasks.inspection.compare_labels import LabelDiff
from tasks.inspection.explain_class import ClassStory
from tests.flows import runs


def nst(*line: str, code: int = 0) -> str:
    return runs.nst(*line, cwd=Path.cwd(), code=code)


def as_json(*line: str) -> Any:
    return json.loads(nst(*line, "--json"))


@pytest.fixture(scope="module")
def store(finished: Path) -> str:
    return str(finished)


def artifact(store: str, ref: str) -> Any:
    found = resolve_ref(Store(store), ref)
    return get(Store(store), found.kind, found.key)


def test_sample_tells_an_images_whole_story(store: str) -> None:
    selection, labels = artifact(store, "digits/1/select"), artifact(store, "digits/1/label")
    kept = read_index(Store(store), selection, "train").to_pylist()[0]
    story = as_json("sample", kept["source_key"], "--store", store)
    (place,) = story["places"]
    assert (place["dataset"], place["split"], place["sha256"]) == ("digits/unlabeled", "unlabeled", kept["sha256"])
    (label,) = story["labels"]
    assert (label["labels"], label["models"], label["label"]) == ("digits/1/label", ["digits/0/teacher"], kept["label"])
    assert label["confidence"] == pytest.approx(kept["confidence"])
    (chosen,) = story["selections"]
    assert (chosen["selection"], chosen["decision"]) == ("digits/1/select", "kept")
    assert kept["shard"] in chosen["shards"]
    assert chosen["students"] == ["digits/1/student"]
    copies = [
        row
        for row in read_index(Store(store), selection, "train").to_pylist()
        if row["source_key"] == kept["source_key"]
    ]
    assert chosen["copies"] == len(copies)
    text = nst("sample", kept["source_key"], "--store", store)
    assert "trained on by: digits/1/student" in text
    keys = {row["source_key"] for row in read_index(Store(store), selection, "train").to_pylist()}
    everything = read_table(Store(store), labels.files_under("predictions/")[0])["key"].to_pylist()
    dropped = next(key for key in everything if key not in keys)
    (chosen,) = as_json("sample", dropped, "--store", store)["selections"]
    assert chosen["decision"] in ("below_confidence", "over_cap")
    assert (chosen["copies"], chosen["shards"]) == (0, [])


def test_sample_knows_labeled_images_and_names_a_key_that_nobody_knows(store: str) -> None:
    key = read_index(Store(store), artifact(store, "digits/prepare"), "test")["key"][0].as_py()
    story = as_json("sample", key, "--store", store)
    assert [place["split"] for place in story["places"]] == ["test"]
    assert story["labels"] == []
    assert "no data set of" in nst("sample", "nobody", "--store", store, code=2)


def test_diff_of_labels_with_themselves_finds_nothing(store: str) -> None:
    same = as_json("diff", "digits/1/label", "digits/1/label", "--store", store)
    images = artifact(store, "digits/1/label").metrics["images"]
    assert (same["images"], same["flipped"], same["shift"], same["won"], same["lost"]) == (images, 0, 0, 0, 0)
    assert same["flips"] == []
    assert "flipped: 0" in nst("diff", "digits/1/label", "digits/1/label", "--store", store)
    assert "no label artifact but of kind selection" in nst(
        "diff", "digits/1/label", "digits/1/select", "--store", store, code=2
    )


def test_sample_diff_and_explain_load_no_heavy_library_and_write_nothing(store: str, tmp_path: Path) -> None:
    key = read_index(Store(store), artifact(store, "digits/unlabeled"), "unlabeled")["key"][0].as_py()
    lines = [
        ["sample", key, "--store", store],
        ["diff", "digits/1/label", "digits/1/label", "--store", store],
        ["explain", "digits/1/select", "--class", "0", "--store", store],
    ]
    before = sorted(path for path in Path(store).rglob("*") if path.is_file())
    output, heavy = runs.nst_in_one_process(lines, tmp_path)
    assert heavy == []
    assert all(words in output for words in ("in digits/unlabeled", "flipped: 0", "class 0"))
    assert sorted(path for path in Path(store).rglob("*") if path.is_file()) == before


@pytest.mark.parametrize("name", ["[/x]", "[unknown]", ":dog:", "owl"])
def test_names_are_printed_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Not taken for the terminal's markup."""
    row = {"images": 3, "flipped": 1, "shift": 0.1, "won": 0, "lost": 0}
    flips = [{"from_class": name, "to_class": "cat", "images": 1, "old": 0.1, "new": 0.2}]
    totals = {"changed": 0, "won_keys": [], "lost_keys": [], "only_in_a": 0, "only_in_b": 0, "min_confidence": 0.3}
    _print_diff(LabelDiff(**row, **totals, flips=flips, per_class=[{"class_name": name, **row}]), name, name)
    counts = {"label": 0, "threshold": 0.3, **dict.fromkeys(COUNTS, 1)}
    _print_story(ClassStory(name, counts, [{"key": name, "confidence": 0.5}], [], []), None)
    _print_biography(Biography(name, leaks=[{"dataset": name, "kind": "near", "evaluation_key": "k", "distance": 0.0}]))
    assert capsys.readouterr().out.count(name) == 7


def test_explain_counts_a_class_and_draws_it(store: str, tmp_path: Path) -> None:
    selection = artifact(store, "digits/1/select")
    counts = next(r for r in read_table(Store(store), selection.file("classes.parquet")).to_pylist() if r["kept"])
    name, picture = str(counts["label"]), tmp_path / "class.png"
    line = ["explain", "digits/1/select", "--class", name, "--store", store]
    story = as_json(*line, "--images", "5")
    assert story["counts"] == counts
    confidences = [row["confidence"] for row in story["most_confident"]]
    assert confidences == sorted(confidences, reverse=True)
    assert all(row["copies"] for row in [*story["most_confident"], *story["least_confident"]])
    assert not any(row["copies"] for row in story["nearest_dropped"])
    assert f"{counts['kept']:,} kept" in nst(*line, "--picture", str(picture))
    with Image.open(picture) as sheet:
        assert sheet.size[0] > 500
        assert len(sheet.convert("RGB").getcolors(1 << 24) or []) > 20
    assert "exists already" in nst(*line, "--picture", str(picture), code=2)
    nowhere = nst(*line, "--picture", "/missing/x.png", code=2)
    assert "/missing is no folder" in nowhere
    assert "Traceback" not in nowhere
    assert "no such class; there are 10" in nst(
        "explain", "digits/1/select", "--class", "cat", "--store", store, code=2
    )
