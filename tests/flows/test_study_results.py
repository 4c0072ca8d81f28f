"""The page of all studies' results: made of what a store has, and saying of the rest that it was not run."""

import json
from pathlib import Path
from typing import Any

import pytest

from flows.studies import load_study, shipped_studies
from storage.artifacts import get
from storage.objects import Store
from storage.runs import read_run
from tests.flows.runs import TINY, nst, nst_in_one_process


@pytest.fixture
def place(finished_copy: Path, tmp_path: Path) -> str:
    """The store of a finished run, in which a shipped study was run with the same settings: it trains nothing anew."""
    nst("study", "svhn", *TINY, "--seeds", "1", "--store", str(finished_copy), cwd=tmp_path)
    return str(finished_copy)


def test_the_page_has_the_stores_numbers_with_the_papers_and_where_they_come_from(place: str, tmp_path: Path) -> None:
    lines = [["study", "--results", "results.md", *TINY, "--store", place]]
    _, heavy = nst_in_one_process(lines, tmp_path)
    assert heavy == []
    page = (tmp_path / "results.md").read_text()
    teacher, student = results_of("study-svhn-noisy-student-seed0", place, tmp_path)
    difference = 100 * (student["top1"] - teacher["top1"])
    assert f"| digits, labels alone | 98.1 | {100 * teacher['top1']:.2f} (n=1) |" in page
    compared = f"{100 * student['top1']:.2f} (n=1) | +0.5 | {difference:+.2f} | supervised | one seed |"
    assert f"| Noisy Student (digits) | 98.6 | {compared}" in page
    store = Store(place)
    nodes = [node for node in read_run(store, "study-svhn-noisy-student-seed0").nodes if node.name != "report"]
    made = [get(store, node.kind, node.key) for node in nodes]
    hours = sum(m.provenance["seconds"] for m in made) / 3600
    dates = sorted({m.provenance["created"][:10] for m in made})
    days = " to ".join(dict.fromkeys([dates[0], dates[-1]]))
    assert f"| Noisy Student (digits) | digits | 0 | {days} | {hours:.2f} | cpu |" in page
    assert f"{len(made)} distinct artifacts, {hours:.2f} hours of work." in page
    assert student["key"][:12] in page
    assert place not in page


def results_of(run: str, place: str, folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(nst("results", run, "--json", "--store", place, cwd=folder))
    return found


def test_every_study_and_scale_without_results_is_listed_as_not_run(place: str, tmp_path: Path) -> None:
    nst("study", "--results", "results.md", *TINY, "--store", place, cwd=tmp_path)
    done, not_run = (tmp_path / "results.md").read_text().split("## Not run")
    expected = {(path.stem, scale) for path in shipped_studies() for scale in load_study(path.stem).scales}
    listed = {(line.split("`")[1], line.split("`")[3]) for line in not_run.splitlines() if line.startswith("* ")}
    assert listed == expected - {("svhn", "cifar10")}
    assert [line for line in done.splitlines() if line.startswith("## ")] == [
        "## svhn: Does Noisy Student help on another, smaller data set? (cifar10)"
    ]
    assert "(#svhn-does-noisy-student-help-on-another-smaller-data-set-cifar10)" in done


def test_a_further_store_counts_where_the_first_has_nothing(place: str, tmp_path: Path) -> None:
    line = ["study", "--results", "results.md", *TINY, "--store", str(tmp_path / "empty"), "--also", place]
    nst(*line, cwd=tmp_path)
    assert "## svhn: " in (tmp_path / "results.md").read_text()
    assert not (tmp_path / "empty").exists()


def test_without_results_or_a_place_to_write_nothing_is_written_and_the_remedy_told(place: str, tmp_path: Path) -> None:
    other = nst("study", "--results", "r.md", "student.epochs=77", "--store", place, cwd=tmp_path, code=2)
    assert "no study has results in" in other
    assert "the overrides with which it was run" in other
    assert "leave out svhn" in nst("study", "svhn", "--results", "r.md", "--store", place, cwd=tmp_path, code=2)
    assert "is no folder" in nst("study", "--results", "gone/r.md", "--store", place, cwd=tmp_path, code=2)
    assert not (tmp_path / "r.md").exists()
