"""`nst lineage` on stores of made-up artifacts: the tree, JSON, mermaid, what is loaded, and how it grows."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from flows.mermaid import Box, flowchart
from storage.artifacts import list_artifacts
from storage.gc import collect
from storage.lineage import read_lineage
from storage.objects import Store
from tests.flows import runs
from tests.lineage_stores import experiments, publish

NUM_ARTIFACTS = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with a few experiments on the same data sets. Not to be changed."""
    folder = tmp_path_factory.mktemp("lineage") / "store"
    for name, stages in experiments(NUM_ARTIFACTS):
        publish(Store(str(folder)), name, stages)
    return str(folder)


def nst(*line: str, code: int = 0) -> str:
    return runs.nst("lineage", *line, cwd=Path.cwd(), code=code)


def test_the_tree_tells_stage_date_counts_accuracy_code_and_users(place: str) -> None:
    text = nst("birds-0001/1/select", "--store", place)
    manifests = {m.key: m for m in list_artifacts(Store(place))}
    graph = read_lineage(Store(place))
    selection = manifests[graph.find(Store(place), "birds-0001/1/select").key]
    first = text.splitlines()[0]
    assert f"birds-0001/1/select  selection {selection.key[:12]}" in first
    created, commit = selection.provenance["created"][:10], selection.provenance["code"]["commit"][:7]
    for words in (created, f"{selection.metrics['kept']:,} kept", f"code {commit}", "used by 2"):
        assert words in first
    up, down = re.split(r"└── used by *\n", text)
    teacher = manifests[graph.find(Store(place), "birds-0001/0/teacher").key]
    (evaluation,) = [m for m in manifests.values() if m.kind == "evaluation" and m.inputs["model"] == teacher.key]
    assert f"test top-1 {evaluation.metrics['test']['top1']:.2%}" in up
    for name in (
        "labels: birds-0001/1/label",
        "model: birds-0001/0/teacher",
        "data: birds-0000/unlabeled",
        "source: files",
    ):
        assert name in up
    for name in ("selection: birds-0001/1/student", "model: birds-0001/2/label", "model: birds-0001/3/evaluate"):
        assert name in down
    assert "birds-0001/3/evaluate" not in up
    assert "(see above)" in text


def test_json_has_ancestors_and_descendants_with_edges_both_ways(place: str) -> None:
    found = json.loads(nst("birds-0001/1/select", "--json", "--store", place))
    graph = read_lineage(Store(place))
    rows = {row["key"]: row for row in found["artifacts"]}
    assert set(rows) == graph.around(found["of"])
    for key, row in rows.items():
        assert all(rows[step]["layer"] < row["layer"] for step in row["inputs"].values() if step in rows)
        for step in set(row["inputs"].values()) & set(rows):
            assert key in [user["key"] for user in rows[step]["used_by"]]
    teacher = rows[graph.find(Store(place), "birds-0001/0/teacher").key]
    assert teacher["refs"] == ["birds-0001/0/teacher"]
    assert 0.7 < teacher["test_top1"] < 1
    assert teacher["metrics"]["num_parameters"] == 11_173_962


def test_mermaid_draws_each_artifact_once_and_each_edge_among_them(place: str) -> None:
    chart = nst("birds-0001/1/select", "--mermaid", "--store", place)
    graph = read_lineage(Store(place))
    around = graph.around(graph.find(Store(place), "birds-0001/1/select").key)
    assert chart.startswith("flowchart TD\n")
    boxes = re.findall(r'^  s(\w+)\["<b>', chart, re.MULTILINE)
    assert sorted(boxes) == sorted(around)
    arrows = set(re.findall(r"^  s(\w+) -->(?:\|[\w./]+\|)? s(\w+)$", chart, re.MULTILINE))
    assert arrows == {(step, key) for key in around for step in graph.inputs(key) if step in around}


def test_names_cannot_break_out_of_a_box_of_a_chart() -> None:
    chart = flowchart([Box("sa", ('"]; click sa "x', "<script>"), "made")], [])
    assert chart.splitlines()[1] == '  sa["<b>#quot;]; click sa #quot;x</b><br/>#lt;script#gt;"]'


def test_a_deleted_artifact_stays_in_the_tree_with_the_day_of_its_end(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    (_, stages), *_ = experiments(10, iterations=1)
    publish(store, "birds-0000", stages)
    for path in [*store.paths("runs"), *store.paths("refs")]:
        if "1/student" not in path:
            store.delete(path)
    collect(store, days=0)
    place = str(tmp_path / "store")
    assert "deleted 20" in nst(stages["1/evaluate"].key, "--store", place)
    text = nst("birds-0000/1/student", "--store", place)
    down = re.split(r"└── used by *\n", text)[1]
    assert f"model: evaluation {stages['1/evaluate'].key[:12]}  deleted 20" in down


def test_a_shared_data_set_prints_a_bounded_tree(place: str) -> None:
    text = nst("birds-0000/unlabeled", "--store", place)
    assert len(text.splitlines()) < 450
    assert "more (--json has all)" in text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["nobody/1/select"], "no ref 'nobody/1/select'"),
        (["birds-0000/1/select", "--html", "/missing/page.html"], "/missing is no folder"),
        (["birds-0000/1/select", "--html", "page.html", "--most", "0"], "--most"),
    ],
)
def test_a_mistake_is_one_line(place: str, line: list[str], words: str) -> None:
    said = nst(*line, "--store", place, code=2)
    assert words in said
    assert "Traceback" not in said


def test_lineage_loads_no_heavy_library_and_writes_nothing_but_its_page(place: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    before = sorted(path for path in Path(place).rglob("*") if path.is_file())
    ref = "birds-0001/1/select"
    lines = [
        ["lineage", ref, *more, "--store", place]
        for more in ([], ["--json"], ["--mermaid"], ["--html", str(page), "--pictures", "1"])
    ]
    output, heavy = runs.nst_in_one_process(lines, tmp_path)
    assert heavy == []
    assert str(page) in output
    assert sorted(path for path in Path(place).rglob("*") if path.is_file()) == before
    assert "exists already" in nst(ref, "--html", str(page), "--store", place, code=2)
    nst(ref, "--html", str(page), "--force", "--store", place)


def test_reading_the_lineage_costs_little_more_than_reading_the_manifests(tmp_path: Path) -> None:
    """Of 1,000 artifacts: refs and run records are read many at once too, and nothing is looked for in a list."""
    store = Store(str(tmp_path / "store"))
    for name, stages in experiments(1000):
        publish(store, name, stages)

    def seconds(act: Any) -> float:
        times = []
        for _ in range(3):
            started = time.process_time()
            act()
            times.append(time.process_time() - started)
        return min(times)

    manifests = seconds(lambda: list_artifacts(store))

    def lineage() -> None:
        graph = read_lineage(store)
        key = graph.find(store, "birds-0000/prepare").key
        graph.layers(graph.around(key))

    assert seconds(lineage) < 4 * manifests
